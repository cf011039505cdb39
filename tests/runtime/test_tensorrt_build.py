"""Every way in which a build can fail is an error of its own; the stand-in fails as TensorRT is documented to."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from standin_tensorrt import look_in, tensorrt_library

from normfuse.errors import BadInput, CheckFailed, MissingDependency, UnsupportedModel, UsageError
from normfuse.manifest import sha256_of
from normfuse.quant.target import Via
from normfuse.runtime import tensorrt_child
from normfuse.runtime.engine_sidecar import check_engine, read_sidecar
from normfuse.runtime.tensorrt_build import (
    TENSORRT,
    TENSORRT_RTX,
    TORCH_TENSORRT,
    Backend,
    BuildOptions,
    BuiltEngine,
    build_engine,
    installed_backend,
)

STANDIN = Backend("standin_trt", "pip install standin")

LIBRARY = tensorrt_library()
"""With capabilities, as TensorRT-RTX is."""

FULL = LIBRARY.replace("class ComputeCapability", "class Nothing")
"""Without: TensorRT builds for the GPU at hand."""

ON = BuildOptions(shapes={"x": ((1, 3), (4, 3), (8, 3))}, capabilities=("SM89",), seconds=30, level=2)
AT_HAND = replace(ON, capabilities=())


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder whose modules the child finds, with a model in it."""
    look_in(tmp_path, monkeypatch)
    (tmp_path / "model.onnx").write_bytes(b"a model")
    return tmp_path


def built(folder: Path, behaviour: str, text: str = LIBRARY, options: BuildOptions = ON) -> BuiltEngine:
    (folder / "standin_trt.py").write_text(text.replace('"builds"', repr(behaviour), 1))
    return build_engine(folder / "model.onnx", folder / "model.engine", STANDIN, options)


def test_an_engine_and_what_the_builder_says(folder: Path) -> None:
    found = built(folder, "builds")
    assert found.version == "11.4.0.106"
    assert found.messages == ("a warning",)
    assert found.layers == ("Name: a, LayerType: gemm", "Name: b, LayerType: kgen")
    expected = f"engine 2 {4 << 30} 8.9 [('x', ([1, 3], [4, 3], [8, 3]))] []"
    assert (folder / "model.engine").read_bytes() == expected.encode()


def test_a_library_that_is_not_installed(folder: Path) -> None:
    with pytest.raises(MissingDependency, match="no_such_trt is not installed") as missing:
        build_engine(
            folder / "model.onnx", folder / "model.engine", Backend("no_such_trt", "pip install it"), BuildOptions()
        )
    assert missing.value.hint == "pip install it"


def test_a_library_whose_libraries_are_missing(folder: Path) -> None:
    text = "raise ImportError('libnvinfer.so.11: cannot open shared object file')"
    with pytest.raises(MissingDependency, match="what standin_trt loads is not installed") as missing:
        built(folder, "", text)
    assert missing.value.where == ("the builder of standin_trt (libnvinfer.so.11: cannot open shared object file)")


def test_no_driver(folder: Path) -> None:
    with pytest.raises(MissingDependency, match="a driver of the GPU") as missing:
        built(folder, "no driver")
    assert "CUDA initialization failure" in missing.value.where


def test_a_node_that_is_refused(folder: Path) -> None:
    with pytest.raises(UnsupportedModel, match="refuses 1 node") as refusal:
        built(folder, "refuses")
    assert refusal.value.where == "blocks.0.attn/QuantizeLinear: Non-zero zero point is not supported"


def test_no_engine(folder: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"gave no engine.*an engine is a wish"):
        built(folder, "no engine")


@pytest.mark.parametrize("behaviour", ["no memory", "no workspace"])
def test_too_little_workspace(behaviour: str, folder: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"out of workspace: (OutOfMemory|no tactics)") as failure:
        built(folder, behaviour)
    assert "more workspace" in failure.value.hint


@pytest.mark.parametrize("behaviour", ["no shapes", "other shapes"])
def test_shapes_that_are_missing(behaviour: str, folder: Path) -> None:
    with pytest.raises(UsageError, match="shapes are missing or do not fit") as failure:
        built(folder, behaviour)
    assert "--shapes" in failure.value.hint


def test_a_process_that_ends(folder: Path) -> None:
    with pytest.raises(CheckFailed, match="ended with signal 11"):
        built(folder, "crashes")


def test_a_build_that_takes_too_long(folder: Path) -> None:
    with pytest.raises(CheckFailed, match="more than 2 s"):
        built(folder, "hangs", options=replace(ON, seconds=2))


@pytest.mark.parametrize("behaviour", ["no driver", "refuses", "no engine", "no memory", "no shapes", "crashes"])
def test_what_fails_leaves_an_engine_of_before(behaviour: str, folder: Path) -> None:
    before = built(folder, "builds")
    engine, held = (folder / "model.engine").read_bytes(), {each.name for each in folder.iterdir()}
    with pytest.raises((MissingDependency, UnsupportedModel, CheckFailed, UsageError)):
        built(folder, behaviour, options=replace(ON, level=3))
    assert (folder / "model.engine").read_bytes() == engine
    assert read_sidecar(folder / "model.engine") == before.sidecar
    assert {each.name for each in folder.iterdir()} == held


def test_a_sidecar_that_cannot_be_written_leaves_the_engine_of_before(folder: Path) -> None:
    (folder / "model.engine").write_bytes(b"before")
    (folder / "model.engine.json").mkdir()
    with pytest.raises(BadInput, match="cannot be written"):
        built(folder, "builds")
    assert (folder / "model.engine").read_bytes() == b"before"
    assert not list(folder.glob(".*partial*"))


def test_the_sidecar(folder: Path) -> None:
    (folder / "model.onnx.data").write_bytes(b"its weights")
    built(folder, "builds")
    engine = folder / "model.engine"
    assert engine.stat().st_mode & 0o777 == 0o600
    found = check_engine(
        engine,
        backend_module="standin_trt",
        backend_version="11.4.0.106",
        capability="SM89",
        onnx=folder / "model.onnx",
    )
    assert found is not None
    assert found.sha256 == sha256_of(engine)
    assert found.onnx_sha256 == sha256_of(folder / "model.onnx")
    assert found.weights_sha256 == sha256_of(folder / "model.onnx.data")
    assert (found.flavour, found.via) == ("standin_trt", Via.ONNX)
    assert found.shapes == {"x": ((1, 3), (4, 3), (8, 3))}
    assert (found.capabilities, found.level, found.messages) == (("SM89",), 2, ("a warning",))


def test_capabilities_are_of_tensorrt_rtx_alone(folder: Path) -> None:
    with pytest.raises(UsageError, match="for the GPU at hand alone"):
        built(folder, "builds", FULL)
    capabilities = built(folder, "builds", FULL, AT_HAND).sidecar.capabilities
    assert all(re.fullmatch("SM[0-9]+", each) for each in capabilities), "none where there is no GPU"


@pytest.mark.parametrize(("failure", "expected"), [(0, "SM120"), (100, "")])
def test_the_capability_that_a_driver_tells(failure: int, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def attribute(value: Any, which: int, device: Any) -> int:
        value._obj.value = {75: 12, 76: 0}[which]
        return 0

    driver = SimpleNamespace(
        cuInit=lambda flags: failure, cuDeviceGet=lambda device, index: 0, cuDeviceGetAttribute=attribute
    )
    monkeypatch.setattr("ctypes.CDLL", lambda name: driver)
    assert tensorrt_child._capability_at_hand() == expected


def test_a_capability_that_there_is_not(folder: Path) -> None:
    with pytest.raises(UsageError, match="does not build for a compute capability") as failure:
        built(folder, "builds", options=replace(ON, capabilities=("SM89", "SM33")))
    assert failure.value.expected == "some of SM89"


def test_version_compatible(folder: Path) -> None:
    assert built(folder, "builds", options=replace(ON, version_compatible=True)).sidecar.version_compatible
    assert (folder / "model.engine").read_bytes().endswith(b"['compatible', 'lean']")


def test_a_timing_cache_is_begun_and_added_to(folder: Path) -> None:
    cache = folder / "timing.cache"
    for expected in (b"+timed", b"+timed+timed"):
        assert built(folder, "builds", FULL, replace(AT_HAND, timing_cache=cache)).messages == ("a warning",)
        assert cache.read_bytes() == expected


@pytest.mark.parametrize("held", [b"broken", b"of 10.13"])
def test_a_file_that_is_no_timing_cache_is_never_replaced(held: bytes, folder: Path) -> None:
    cache = folder / "timing.cache"
    cache.write_bytes(held)
    with pytest.raises(BadInput, match="another version or GPU, or no timing cache"):
        built(folder, "builds", FULL, replace(AT_HAND, timing_cache=cache))
    assert cache.read_bytes() == held
    assert not (folder / "model.engine").exists()


def test_a_timing_cache_of_a_build_that_fails_stays(folder: Path) -> None:
    (folder / "timing.cache").write_bytes(b"held")
    with pytest.raises(UnsupportedModel):
        built(folder, "no memory", FULL, replace(AT_HAND, timing_cache=folder / "timing.cache"))
    assert (folder / "timing.cache").read_bytes() == b"held"


def test_tensorrt_rtx_uses_no_timing_cache(folder: Path) -> None:
    said = built(folder, "builds", options=replace(ON, timing_cache=folder / "timing.cache")).messages
    assert said[0] == "the timing cache is not used: standin_trt times nothing while it builds"
    assert not (folder / "timing.cache").exists()


@pytest.mark.parametrize("where", [".", "no/timing.cache"])
def test_a_timing_cache_that_cannot_be(where: str, folder: Path) -> None:
    with pytest.raises(BadInput, match="timing cache cannot be read"):
        built(folder, "builds", FULL, replace(AT_HAND, timing_cache=folder / where))


def test_a_model_that_cannot_be_read(folder: Path) -> None:
    (folder / "model.onnx").unlink()
    with pytest.raises(BadInput, match="ONNX file cannot be read"):
        built(folder, "builds")


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"level": 6}, "optimization level is 6"),
        ({"level": -1}, "optimization level is -1"),
        ({"workspace_bytes": 0}, "workspace is 0"),
        ({"seconds": 0.0}, "time limit is 0.0"),
        ({"seconds": float("nan")}, "time limit is nan"),
        ({"shapes": {"x": ((2, 3), (1, 3), (8, 3))}}, "shapes of x are not in order at axis 0"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], what: str) -> None:
    with pytest.raises(UsageError, match=what):
        BuildOptions(**options)


def test_the_installed_library(monkeypatch: pytest.MonkeyPatch) -> None:
    there: set[str] = set()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if name in there else None)
    with pytest.raises(MissingDependency, match="tensorrt is not installed") as missing:
        installed_backend()
    assert missing.value.exit_code == 5
    assert TENSORRT.install in missing.value.hint
    assert TENSORRT_RTX.install in missing.value.hint
    assert TORCH_TENSORRT.install not in missing.value.hint
    there.add("tensorrt_rtx")
    assert installed_backend() is TENSORRT_RTX
    there.add("tensorrt")
    assert installed_backend() is TENSORRT
    with pytest.raises(MissingDependency, match="torch_tensorrt is not installed") as missing:
        installed_backend(Via.TORCH_TENSORRT)
    assert missing.value.hint == "pip install 'normfuse[torch-tensorrt]'"
    there.add("torch_tensorrt")
    assert installed_backend(Via.TORCH_TENSORRT) is TORCH_TENSORRT
    assert installed_backend() is TENSORRT
