"""Every way in which a build can fail is an error of its own; the stand-in fails as TensorRT is documented to."""

from __future__ import annotations

from pathlib import Path

import pytest

from normfuse.errors import CheckFailed, MissingDependency, UnsupportedModel
from normfuse.runtime.tensorrt_build import Backend, BuildOptions, BuiltEngine, build_engine

STANDIN = Backend("standin_trt", "pip install standin")

LIBRARY = """
import os, time, types
__version__ = "11.4.0.106"
BEHAVIOUR = {behaviour!r}

class ILogger:
    Severity = types.SimpleNamespace(WARNING=2)

class NetworkDefinitionCreationFlag:
    STRONGLY_TYPED = 1

class MemoryPoolType:
    WORKSPACE = 0

class ProfilingVerbosity:
    DETAILED = 2

class ComputeCapability:
    SM89 = "8.9"

class Error:
    def node_name(self): return "blocks.0.attn/QuantizeLinear"
    def node_operator(self): return "QuantizeLinear"
    def desc(self): return "Non-zero zero point is not supported"

class OnnxParser:
    num_errors = 1
    def __init__(self, network, logger): pass
    def parse_from_file(self, path): return BEHAVIOUR != "refuses"
    def get_error(self, index): return Error()

class Config:
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
        if BEHAVIOUR == "no engine":
            self.logger.log(1, "OutOfMemory (Requested size was 39856848 bytes.)")
            return None
        self.logger.log(2, "a warning")
        self.logger.log(4, "Layers:\\nName: a, LayerType: gemm\\nName: b, LayerType: kgen\\n\\nBindings:\\nx")
        shapes = sorted(getattr(config, "profile", {{}}).items())
        return f"engine {{config.builder_optimization_level}} {{config.size}} {{config.capability}} {{shapes}}".encode()
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder whose modules the child finds, with a model in it."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "model.onnx").write_bytes(b"a model")
    return tmp_path


def built(folder: Path, behaviour: str, text: str = LIBRARY, *, seconds: float = 30) -> BuiltEngine:
    (folder / "standin_trt.py").write_text(text.format(behaviour=behaviour) if text is LIBRARY else text)
    options = BuildOptions(shapes={"x": ((1, 3), (4, 3), (8, 3))}, capabilities=("SM89",), seconds=seconds, level=2)
    return build_engine(folder / "model.onnx", folder / "model.engine", STANDIN, options)


def test_an_engine_and_what_the_builder_says(folder: Path) -> None:
    found = built(folder, "builds")
    assert found.version == "11.4.0.106"
    assert found.messages == ("a warning",)
    assert found.layers == ("Name: a, LayerType: gemm", "Name: b, LayerType: kgen")
    expected = f"engine 2 {4 << 30} 8.9 [('x', ([1, 3], [4, 3], [8, 3]))]"
    assert (folder / "model.engine").read_bytes() == expected.encode()


def test_a_library_that_is_not_installed(folder: Path) -> None:
    with pytest.raises(MissingDependency, match="no_such_trt is not installed") as missing:
        build_engine(
            folder / "model.onnx", folder / "model.engine", Backend("no_such_trt", "pip install it"), BuildOptions()
        )
    assert missing.value.hint == "pip install it"


def test_a_library_whose_libraries_are_missing(folder: Path) -> None:
    text = "raise ImportError('libnvinfer.so.11: cannot open shared object file')"
    with pytest.raises(MissingDependency, match=r"libnvinfer\.so\.11"):
        built(folder, "", text)


def test_no_driver(folder: Path) -> None:
    with pytest.raises(MissingDependency, match="a driver of the GPU") as missing:
        built(folder, "no driver")
    assert "CUDA initialization failure" in missing.value.where


def test_a_node_that_is_refused(folder: Path) -> None:
    with pytest.raises(UnsupportedModel, match="refuses 1 node") as refusal:
        built(folder, "refuses")
    assert refusal.value.where == "blocks.0.attn/QuantizeLinear: Non-zero zero point is not supported"


def test_no_engine(folder: Path) -> None:
    with pytest.raises(UnsupportedModel, match="OutOfMemory"):
        built(folder, "no engine")


def test_a_process_that_ends(folder: Path) -> None:
    with pytest.raises(CheckFailed, match="ended with signal 11"):
        built(folder, "crashes")


def test_a_build_that_takes_too_long(folder: Path) -> None:
    with pytest.raises(CheckFailed, match="more than 2 s"):
        built(folder, "hangs", seconds=2)


@pytest.mark.parametrize("behaviour", ["no driver", "refuses", "no engine", "crashes"])
def test_what_fails_leaves_an_engine_of_before(behaviour: str, folder: Path) -> None:
    (folder / "model.engine").write_bytes(b"before")
    with pytest.raises((MissingDependency, UnsupportedModel, CheckFailed)):
        built(folder, behaviour)
    assert (folder / "model.engine").read_bytes() == b"before"
    assert (folder / "model.onnx").exists()
