"""What a measurement on a GPU depends on: the device and its driver, versions, and its state at the moment."""

from __future__ import annotations

import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

import torch

from normfuse.errors import MissingDependency

__all__ = ["FLOAT8_CAPABILITY", "capability", "describe_device", "device_at_hand", "device_state", "open_device"]

FLOAT8_CAPABILITY: Final = (8, 9)
"""Of the first GPUs that multiply float8 numbers."""
QUERY_SECONDS: Final = 10.0
STATE: Final = {
    "sm_clock_mhz": "clocks.sm",
    "memory_clock_mhz": "clocks.mem",
    "temperature_c": "temperature.gpu",
    "power_w": "power.draw",
    "power_limit_w": "power.limit",
}


def device_at_hand() -> str | None:
    """Return PyTorch's name of the GPU, None where it finds none."""
    return "cuda" if torch.cuda.is_available() else None


def open_device(name: str, *, needed_for: str) -> torch.device:
    """Return the device to measure on, with its arithmetic of float32 as it is in IEEE's, not TF32.

    Raises:
        MissingDependency: it is a CUDA device, and PyTorch finds none.
    """
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise MissingDependency(
            "a CUDA device that PyTorch can use",
            needed_for=needed_for,
            install="run it on a machine with an NVIDIA GPU, with a PyTorch that is built for CUDA",
        )
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    return device


def capability(device: torch.device) -> tuple[int, int] | None:
    """Return the compute capability, None of what is no GPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def describe_device(device: torch.device) -> dict[str, Any]:
    """Return device, driver and versions for JSON; None stands for what there is not, or cannot be asked."""
    found: dict[str, Any] = {
        "type": device.type,
        "name": None,
        "capability": None,
        "memory_gib": None,
        "multiprocessors": None,
        "driver": (_ask(device, {"driver": "driver_version"}) or {}).get("driver"),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "triton": _version("triton"),
    }
    if device.type != "cuda":
        return found
    properties = torch.cuda.get_device_properties(device)
    return {
        **found,
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
    }


def device_state(device: torch.device) -> dict[str, float | None] | None:
    """Return clocks, temperature and power at this moment; None where nvidia-smi does not tell."""
    found = _ask(device, STATE)
    return None if found is None else {name: _number(text) for name, text in found.items()}


def _ask(device: torch.device, wanted: dict[str, str]) -> dict[str, str] | None:
    """Return what nvidia-smi says of this very GPU: PyTorch may number GPUs in another order."""
    if device.type != "cuda":
        return None
    identity = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    query = f"--query-gpu={','.join(wanted.values())}"
    command = ("nvidia-smi", query, "--format=csv,noheader,nounits", f"--id={identity}")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=QUERY_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    answers = [text.strip() for text in done.stdout.strip().split(",")]
    return dict(zip(wanted, answers, strict=True)) if len(answers) == len(wanted) else None


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:  # "[N/A]"
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
