"""Builds one TensorRT engine, in a process of its own: ``python tensorrt_child.py REQUEST.json``.

A builder can end its process (it has on a single Attention in float32), so nothing that must live runs it. This file is
run as a script and imports nothing of normfuse, which would load torch first.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import sys
from pathlib import Path
from typing import Any, Final

__all__ = ["main", "recording_logger"]

DRIVER: Final = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
CAPABILITY_MAJOR, CAPABILITY_MINOR = 75, 76
"""CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*, of the CUDA driver API."""


def main(request_file: str) -> None:
    """Do what a request says and write the answer beside it."""
    request = json.loads(Path(request_file).read_text(encoding="utf-8"))
    answer = _built(_imported(request["module"]), request)
    Path(request["answer"]).write_text(json.dumps(answer), encoding="utf-8")


def _imported(module: str) -> Any:
    """Return the library; a library of its own that is missing is an ImportError, as the module itself."""
    try:
        return importlib.import_module(module)
    except OSError as error:
        raise ImportError(str(error)) from error


def _built(trt: Any, request: dict[str, Any]) -> dict[str, Any]:
    logger = recording_logger(trt)
    answer: dict[str, Any] = {"version": trt.__version__, "messages": logger.messages, "errors": logger.errors}
    if (known := _strange_capabilities(trt, request)) is not None:
        return {**answer, "outcome": "no such capability", "known": known}
    try:
        builder = trt.Builder(logger)
    except TypeError as error:  # a null builder, where there is no driver
        return {**answer, "outcome": "no builder", "messages": [*logger.messages, str(error)]}
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(request["model"]):
        found = [parser.get_error(index) for index in range(parser.num_errors)]
        return {**answer, "outcome": "refused", "refusals": [_refusal(each) for each in found]}
    config = _config(trt, builder, request)
    fits, cache = _timing_cache(trt, config, request, logger)  # lives as long as the build
    if not fits:
        return {**answer, "outcome": "no timing cache"}
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        return {**answer, "outcome": "not built"}
    Path(request["engine"]).write_bytes(plan)
    if cache is not None:
        Path(request["timing_cache"]).write_bytes(config.get_timing_cache().serialize())
    return {**answer, "outcome": "built", "layers": logger.layers, "capabilities": _capabilities(trt, request)}


def recording_logger(trt: Any) -> Any:
    """Return a logger of the library that keeps what it is told, in lists that are read while it is used."""

    class Recording(trt.ILogger):  # type: ignore[misc]
        """Keeps errors and warnings, the errors alone too, and the list of kernels that the builder prints."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.messages: list[str] = []
            self.errors: list[str] = []
            self.layers: list[str] = []
            self._warning = int(trt.ILogger.Severity.WARNING)

        def log(self, severity: Any, text: str) -> None:
            if int(severity) <= self._warning:
                self.messages.append(text)
            elif text.startswith("Layers:"):
                self.layers = [line for line in text.splitlines() if line.startswith("Name: ")]
            if int(severity) < self._warning:
                self.errors.append(text)

    return Recording()


def _refusal(error: Any) -> dict[str, str]:
    return {"node": error.node_name(), "operator": error.node_operator(), "says": error.desc()}


def _config(trt: Any, builder: Any, request: dict[str, Any]) -> Any:
    config = builder.create_builder_config()
    config.builder_optimization_level = request["level"]
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, request["workspace_bytes"])
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if request["version_compatible"]:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
        config.set_flag(trt.BuilderFlag.EXCLUDE_LEAN_RUNTIME)  # a runtime in the engine would be code of its builder's
    if request["capabilities"]:
        config.num_compute_capabilities = len(request["capabilities"])
        for index, name in enumerate(request["capabilities"]):
            config.set_compute_capability(getattr(trt.ComputeCapability, name), index)
    if request["shapes"]:
        profile = builder.create_optimization_profile()
        for name, (least, best, most) in request["shapes"].items():
            profile.set_shape(name, least, best, most)
        config.add_optimization_profile(profile)
    return config


def _timing_cache(trt: Any, config: Any, request: dict[str, Any], logger: Any) -> tuple[bool, Any]:
    """Return whether the library takes the timings that a build starts from and adds to, and these.

    None if none are wanted or it times nothing. What it does not take may be any file, and is never replaced.
    """
    if request["timing_cache"] is None:
        return True, None
    if _names_capabilities(trt):
        logger.messages.append(f"the timing cache is not used: {trt.__name__} times nothing while it builds")
        return True, None
    cache = config.create_timing_cache(Path(request["timing_cache"]).read_bytes())
    return cache is not None and bool(config.set_timing_cache(cache, ignore_mismatch=False)), cache


def _names_capabilities(trt: Any) -> bool:
    """Whether the library builds for GPUs by their name (TensorRT-RTX), and not for the one at hand (TensorRT)."""
    return hasattr(trt, "ComputeCapability")


def _strange_capabilities(trt: Any, request: dict[str, Any]) -> list[str] | None:
    """Return the capabilities that can be asked for, if others were."""
    members = dir(trt.ComputeCapability) if _names_capabilities(trt) else []
    known = [name for name in members if name == "CURRENT" or (name[:2] == "SM" and name[2:].isdigit())]
    return None if set(request["capabilities"]) <= set(known) else known


def _capabilities(trt: Any, request: dict[str, Any]) -> list[str]:
    """Return what an engine was built for; nothing where TensorRT-RTX was asked for no GPU or the GPU is not known."""
    asked = request["capabilities"] if _names_capabilities(trt) else ["CURRENT"]
    found = [_capability_at_hand() if name == "CURRENT" else name for name in asked]
    return [name for name in found if name]


def _capability_at_hand() -> str:
    """Return the compute capability of the first GPU as ``SM90``; empty where the driver does not say."""
    try:
        driver = ctypes.CDLL(DRIVER)
    except OSError:
        return ""
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    failed = (
        driver.cuInit(0)
        or driver.cuDeviceGet(ctypes.byref(device), 0)
        or driver.cuDeviceGetAttribute(ctypes.byref(major), CAPABILITY_MAJOR, device)
        or driver.cuDeviceGetAttribute(ctypes.byref(minor), CAPABILITY_MINOR, device)
    )
    return "" if failed else f"SM{major.value}{minor.value}"


if __name__ == "__main__":
    main(sys.argv[1])
