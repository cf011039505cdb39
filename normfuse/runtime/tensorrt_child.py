"""Builds one TensorRT engine, in a process of its own: ``python tensorrt_child.py REQUEST.json``.

A builder can end its process (it has on a single Attention in float32), so nothing that must live runs it. This file is
run as a script and imports nothing of normfuse, which would load torch first.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any


def main(request_file: str) -> None:
    """Do what a request says and write the answer beside it."""
    request = json.loads(Path(request_file).read_text(encoding="utf-8"))
    answer = _built(importlib.import_module(request["module"]), request)
    Path(request["answer"]).write_text(json.dumps(answer), encoding="utf-8")


def _built(trt: Any, request: dict[str, Any]) -> dict[str, Any]:
    logger = _recording_logger(trt)
    answer: dict[str, Any] = {"version": trt.__version__, "refusals": [], "messages": logger.messages}
    try:
        builder = trt.Builder(logger)
    except TypeError as error:  # a null builder, where there is no driver
        return {**answer, "outcome": "no builder", "messages": [*logger.messages, str(error)]}
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(request["model"]):
        found = [parser.get_error(index) for index in range(parser.num_errors)]
        return {**answer, "outcome": "refused", "refusals": [_refusal(each) for each in found]}
    config = _config(trt, builder, network, request)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        return {**answer, "outcome": "not built"}
    Path(request["engine"]).write_bytes(plan)
    return {**answer, "outcome": "built", "layers": logger.layers}


def _recording_logger(trt: Any) -> Any:
    class Recording(trt.ILogger):  # type: ignore[misc]
        """Keeps errors and warnings, and the list of kernels that the builder prints."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.messages: list[str] = []
            self.layers: list[str] = []
            self._worst = int(trt.ILogger.Severity.WARNING)

        def log(self, severity: Any, text: str) -> None:
            if int(severity) <= self._worst:
                self.messages.append(text)
            elif text.startswith("Layers:"):
                self.layers = [line for line in text.splitlines() if line.startswith("Name: ")]

    return Recording()


def _refusal(error: Any) -> dict[str, str]:
    return {"node": error.node_name(), "operator": error.node_operator(), "says": error.desc()}


def _config(trt: Any, builder: Any, network: Any, request: dict[str, Any]) -> Any:
    config = builder.create_builder_config()
    config.builder_optimization_level = request["level"]
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, request["workspace_bytes"])
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
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


if __name__ == "__main__":
    main(sys.argv[1])
