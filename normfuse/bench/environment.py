"""What a measurement depends on, without a word about whose machine it is."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

from normfuse.runtime.instruction_set import detect_instruction_set

__all__ = ["Environment", "default_threads", "describe_environment"]

PACKAGES: Final = ("normfuse", "torch", "onnx", "onnxscript", "onnxruntime", "numpy")
MOST_THREADS: Final = 2
"""A default that every machine has, so that figures of different machines mean the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """Processor, memory and versions."""

    processor: str
    instruction_set: str
    cores: int
    memory_gib: float
    system: str
    python: str
    packages: dict[str, str]

    def as_dict(self) -> dict[str, object]:
        """Return the environment for JSON."""
        return asdict(self)


def describe_environment() -> Environment:
    """Return what this process runs on."""
    return Environment(
        processor=_processor(),
        instruction_set=detect_instruction_set().value,
        cores=_cores(),
        memory_gib=round(_memory() / 2**30, 1),
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        packages={name: _version(name) for name in PACKAGES},
    )


def default_threads(asked: int = 0) -> int:
    """Return the number asked for, or the visible cores, two at most."""
    return asked or min(_cores(), MOST_THREADS)


def _cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return 0


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
