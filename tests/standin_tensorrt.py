"""A module that passes for TensorRT in the builder's process: it writes a file, or fails as the real one does."""

from __future__ import annotations

import importlib.util
import json
import re
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Final

import pytest

__all__ = ["VERSION", "hide_tensorrt", "install_standin", "look_in", "tensorrt_library", "with_constants"]

VERSION: Final = "11.4.0.106"

LIBRARY: Final = """
import os, time, types
__version__ = "11.4.0.106"
BEHAVIOUR = "builds"
NODE = "blocks.0.attn/QuantizeLinear"
REFUSAL = "Non-zero zero point is not supported"
LAYERS = "Name: a, LayerType: gemm\\nName: b, LayerType: kgen"
PLAN = "engine {level} {size} {capability} {shapes} {flags}"

class ILogger:
    Severity = types.SimpleNamespace(WARNING=2)

class NetworkDefinitionCreationFlag:
    STRONGLY_TYPED = 1

class MemoryPoolType:
    WORKSPACE = 0

class ProfilingVerbosity:
    DETAILED = 2

class BuilderFlag:
    VERSION_COMPATIBLE = "compatible"
    EXCLUDE_LEAN_RUNTIME = "lean"

class ComputeCapability:
    SM89 = "8.9"

class TimingCache:
    def __init__(self, data): self.data = data
    def serialize(self): return self.data + b"+timed"

class Error:
    def node_name(self): return NODE
    def node_operator(self): return "QuantizeLinear"
    def desc(self): return REFUSAL

class OnnxParser:
    num_errors = 1
    def __init__(self, network, logger): pass
    def parse_from_file(self, path):
        global MODEL
        MODEL = path
        return BEHAVIOUR != "refuses" and os.path.getsize(path) > 0
    def get_error(self, index): return Error()

class Config:
    capability = cache = None
    def __init__(self): self.flags = []
    def set_flag(self, flag): self.flags.append(flag)
    def create_timing_cache(self, data): return None if data == b"broken" else TimingCache(data)
    def set_timing_cache(self, cache, ignore_mismatch):
        assert ignore_mismatch is False
        self.cache = cache
        return cache.data != b"of 10.13"
    def get_timing_cache(self): return self.cache
    def set_memory_pool_limit(self, pool, size): self.size = size
    def set_compute_capability(self, capability, index): self.capability = capability
    def add_optimization_profile(self, profile): self.profile = profile

class Profile(dict):
    def set_shape(self, name, least, best, most): self[name] = (least, best, most)

class Builder:
    def __init__(self, logger):
        self.logger = logger
        if BEHAVIOUR == "no driver":
            logger.log(1, "CUDA initialization failure with error: 35")
            raise TypeError("pybind11::init(): factory function returned nullptr")
    def create_network(self, flags):
        assert flags == 1 << 1, "strongly typed"
        return object()
    def create_builder_config(self): return Config()
    def create_optimization_profile(self): return Profile()
    def build_serialized_network(self, network, config):
        if BEHAVIOUR == "crashes":
            os.kill(os.getpid(), 11)
        if BEHAVIOUR == "hangs":
            time.sleep(60)
        for behaviour, says in SAYS.items():
            if BEHAVIOUR == behaviour:
                self.logger.log(2, "Skipping a tactic: insufficient memory")
                self.logger.log(1, says)
                return None
        self.logger.log(2, "a warning")
        self.logger.log(4, f"Layers:\\n{LAYERS}\\n\\nBindings:\\nx")
        shapes = sorted(getattr(config, "profile", {}).items())
        level, size = config.builder_optimization_level, config.size
        told = dict(level=level, size=size, capability=config.capability, shapes=shapes, flags=config.flags)
        return open(MODEL, "rb").read() if PLAN == "the model" else PLAN.format(**told).encode()

SAYS = {
    "no engine": "Error Code 4: Internal Error (an engine is a wish)",
    "no memory": "OutOfMemory (Requested size was 39856848 bytes.)",
    "no workspace": "no tactics to implement the operation within workspace limit.",
    "no shapes": "Network has dynamic or shape inputs, but no optimization profile has been defined.",
    "other shapes": "Dimension mismatch for tensor x and profile 0.",
}
"""

LAYER: Final = (
    "Name: first, LayerType: gemm, Inputs: [ { Name: x, Datatype: Int8, Format/StrideOrder: a }], Constants: "
    "[ { Name: w, Datatype: Int8, Format/StrideOrder: a }], Outputs: [ { Name: y, Datatype: Half, Format/StrideOrder: "
    "a }], TacticName: t, Metadata: [ONNX Layer: made up]"
)
"""A kernel as the builder prints it."""


def tensorrt_library(behaviour: str = "builds", **texts: str) -> str:
    """Return the module's text: how it behaves, and what stands in it by the name of a constant."""
    return with_constants(LIBRARY, BEHAVIOUR=behaviour, **texts)


def with_constants(library: str, **texts: str) -> str:
    """Return a module's text with other texts in its constants."""
    for name, text in texts.items():
        line = f"{name} = {json.dumps(text)}".replace("\\", r"\\")
        library = re.sub(rf"^{name} = .*$", line, library, count=1, flags=re.MULTILINE)
    return library


def install_standin(
    folder: Path, monkeypatch: pytest.MonkeyPatch, behaviour: str = "builds", runtime: str = ""
) -> None:
    """Put the module into a folder and the folder where this process and its children look.

    With a ``runtime``, the text of one, an engine is the ONNX file that it was built from.
    """
    text = tensorrt_library(
        behaviour,
        NODE="up/QuantizeLinear",
        REFUSAL="an operator of another world",
        LAYERS=LAYER,
        PLAN="the model" if runtime else "a made up engine",
    )
    # As full TensorRT, which builds for the GPU at hand.
    text = text.replace("class ComputeCapability", "class Nothing")
    (folder / "tensorrt.py").write_text(text + runtime, encoding="utf-8")
    look_in(folder, monkeypatch)


def look_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process and its children find the modules in a folder."""
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", str(folder))


def hide_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no library that builds engines be found."""
    find = importlib.util.find_spec

    def found(name: str, package: str | None = None) -> ModuleSpec | None:
        return None if name in ("tensorrt", "tensorrt_rtx", "torch_tensorrt") else find(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", found)
