"""A module that passes for TensorRT in the builder's process: it writes a file, or fails as the real one does."""

from __future__ import annotations

import importlib.util
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Final

import pytest

__all__ = ["VERSION", "hide_tensorrt", "install_standin"]

VERSION: Final = "11.4.0.106"

LIBRARY: Final = """
import os, time, types
__version__ = "11.4.0.106"
BEHAVIOUR = "builds"
LAYERS = '''Layers:
Name: first, LayerType: gemm, Inputs: [ { Name: x, Datatype: Int8, Format/StrideOrder: a }], Constants: \
[ { Name: w, Datatype: Int8, Format/StrideOrder: a }], Outputs: [ { Name: y, Datatype: Half, Format/StrideOrder: a }], \
TacticName: t, Metadata: [ONNX Layer: made up]
'''

class ILogger:
    Severity = types.SimpleNamespace(WARNING=2)

class NetworkDefinitionCreationFlag:
    STRONGLY_TYPED = 1

class MemoryPoolType:
    WORKSPACE = 0

class ProfilingVerbosity:
    DETAILED = 2

class Error:
    def node_name(self): return "up/QuantizeLinear"
    def node_operator(self): return "QuantizeLinear"
    def desc(self): return "an operator of another world"

class OnnxParser:
    num_errors = 1
    def __init__(self, network, logger): pass
    def parse_from_file(self, path): return BEHAVIOUR != "refuses" and os.path.getsize(path) > 0
    def get_error(self, index): return Error()

class Config:
    def set_memory_pool_limit(self, pool, size): pass
    def add_optimization_profile(self, profile): pass

class Profile:
    def set_shape(self, name, least, best, most): pass

class Builder:
    def __init__(self, logger):
        self.logger = logger
        if BEHAVIOUR == "no driver":
            raise TypeError("pybind11::init(): factory function returned nullptr")
    def create_network(self, flags): return object()
    def create_builder_config(self): return Config()
    def create_optimization_profile(self): return Profile()
    def build_serialized_network(self, network, config):
        if BEHAVIOUR == "crashes":
            os.kill(os.getpid(), 11)
        if BEHAVIOUR == "hangs":
            time.sleep(60)
        if BEHAVIOUR == "no shapes":
            self.logger.log(1, "no optimization profile has been defined.")
            return None
        self.logger.log(4, LAYERS)
        return b"a made up engine"
"""


def install_standin(folder: Path, monkeypatch: pytest.MonkeyPatch, behaviour: str = "builds") -> None:
    """Put the module into a folder and the folder where this process and its children look."""
    (folder / "tensorrt.py").write_text(LIBRARY.replace('"builds"', repr(behaviour), 1), encoding="utf-8")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", str(folder))


def hide_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let neither library be found."""
    find = importlib.util.find_spec

    def found(name: str, package: str | None = None) -> ModuleSpec | None:
        return None if name in ("tensorrt", "tensorrt_rtx") else find(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", found)
