"""An engine by torch-tensorrt: what it is told, and an error of its own for every way in which it can fail."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from standin_torch_tensorrt import VERSION, install_torch_tensorrt, told
from torch import Tensor, nn

from normfuse.capturing import capture_model
from normfuse.errors import CheckFailed, MissingDependency, UnsupportedModel, UsageError
from normfuse.graph.program import program_bytes
from normfuse.manifest import sha256_of
from normfuse.quant.target import Via
from normfuse.runtime.engine_sidecar import check_engine
from normfuse.runtime.tensorrt_build import TORCH_TENSORRT, BuildOptions, BuiltEngine, build_engine
from normfuse.testing import Small, randomized, seeded

pytestmark = pytest.mark.slow  # every build starts a process that loads torch

ON = BuildOptions(
    shapes={"z": ((1, 3), (4, 3), (8, 3)), "a": ((1,), (4,), (8,))}, workspace_bytes=1 << 20, level=2, seconds=60
)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(3, 5)

    def forward(self, z: Tensor, fixed: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        return self.up(z) * fixed + a.unsqueeze(1), z.sum(dim=1)


def network() -> nn.Module:
    return randomized(Network())


@pytest.fixture(scope="module")
def program() -> memoryview:
    """A model whose inputs are not in the order of their names: two with a free batch, between them one without."""
    examples = [torch.randn(2, 3, generator=seeded(0)), torch.ones(1, 5), torch.arange(2)]
    return program_bytes(capture_model(network(), examples, None))


@pytest.fixture
def folder(tmp_path: Path, program: memoryview) -> Path:
    return filled(tmp_path, program)


def filled(folder: Path, program: memoryview) -> Path:
    (folder / "model.onnx").write_bytes(b"a model")
    (folder / "model.pt2").write_bytes(program)
    return folder


def built(folder: Path, options: BuildOptions = ON) -> BuiltEngine:
    model, engine = folder / "model.onnx", folder / "model.engine"
    return build_engine(model, engine, TORCH_TENSORRT, options, program=folder / "model.pt2")


@pytest.fixture(scope="module")
def engine(program: memoryview, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine that was built."""
    folder = tmp_path_factory.mktemp("built")
    with pytest.MonkeyPatch.context() as monkeypatch:
        install_torch_tensorrt(folder, monkeypatch)
        found = built(filled(folder, program))
    assert (found.version, found.messages, found.layers) == (VERSION, ("a warning",), ())
    return folder / "model.engine"


def test_what_it_is_told(engine: Path) -> None:
    found = told(engine)
    assert found["inputs"] == [
        {"min_shape": [1, 3], "opt_shape": [4, 3], "max_shape": [8, 3], "dtype": "torch.float32"},
        {"shape": [1, 5], "dtype": "torch.float32"},
        {"min_shape": [1], "opt_shape": [4], "max_shape": [8], "dtype": "torch.int64"},
    ]
    assert found["options"] == {
        "workspace_size": 1 << 20,
        "optimization_level": 2,
        "version_compatible": False,
        "truncate_double": True,
        "attn_bias_is_causal": False,
        "immutable_weights": True,
    }
    assert found["moves"] == ["cuda:0"]


def test_it_gets_the_model(engine: Path) -> None:
    with torch.no_grad():
        expected = network()(torch.full((4, 3), 0.5), torch.full((1, 5), 0.5), torch.zeros(4, dtype=torch.int64))
    for found, wanted in zip(told(engine)["outputs"], expected, strict=True):
        # Sums of four terms, in another order at worst.
        atol = 4 * torch.finfo(torch.float32).eps * float(wanted.abs().max())
        torch.testing.assert_close(torch.tensor(found), wanted, atol=atol, rtol=0)


def test_without_a_timing_cache_nothing_is_shared(engine: Path) -> None:
    timings = Path(told(engine)["timings"])
    assert timings.parent.name.startswith("normfuse-build-"), "not torch-tensorrt's own, which all programs share"
    assert not timings.exists()
    assert not list(engine.parent.glob("*timing*"))


def test_the_sidecar(engine: Path) -> None:
    model = engine.with_name("model.onnx")
    found = check_engine(engine, backend_module="tensorrt", backend_version=VERSION, capability="SM90", onnx=model)
    assert found is not None
    assert engine.stat().st_mode & 0o777 == 0o600
    assert (found.flavour, found.via, found.version) == ("tensorrt", Via.TORCH_TENSORRT, VERSION)
    assert found.onnx_sha256 == sha256_of(model)
    assert found.shapes == ON.shapes
    assert (found.capabilities, found.level, found.messages) == (("SM90",), 2, ("a warning",))


def test_nothing_is_moved_where_there_is_no_gpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_torch_tensorrt(folder, monkeypatch, GPU="")
    assert built(folder).sidecar.capabilities == ()
    assert told(folder / "model.engine")["moves"] == []


def test_version_compatible(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_torch_tensorrt(folder, monkeypatch)
    assert built(folder, replace(ON, version_compatible=True)).sidecar.version_compatible
    assert told(folder / "model.engine")["options"]["version_compatible"] is True


def test_a_timing_cache_is_added_to(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_torch_tensorrt(folder, monkeypatch)
    (folder / "timing.cache").write_bytes(b"held")
    built(folder, replace(ON, timing_cache=folder / "timing.cache"))
    assert (folder / "timing.cache").read_bytes() == b"held+timed"


def test_it_is_not_installed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match="torch_tensorrt is not installed") as missing:
        built(folder)
    assert missing.value.exit_code == 5
    assert missing.value.hint == "pip install 'normfuse[torch-tensorrt]'"


@pytest.mark.parametrize(
    ("raises", "said"),
    [
        (
            "Exception('import error when try to import _TensorRTProxyModule, got error no libnvinfer.so\\n  Search')",
            "Exception: import error when try to import _TensorRTProxyModule, got error no libnvinfer.so",
        ),
        ("OSError('libtorch_cuda.so: cannot open')", "OSError: libtorch_cuda.so: cannot open"),
        ("AssertionError('Torch not compiled with CUDA')", "AssertionError: Torch not compiled with CUDA"),
    ],
)
def test_it_cannot_be_imported(raises: str, said: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_torch_tensorrt(folder, monkeypatch, RAISES=raises)
    with pytest.raises(MissingDependency, match="what torch_tensorrt loads is not installed") as missing:
        built(folder)
    assert missing.value.where == f"the builder of torch_tensorrt ({said})"


def test_the_module_is_that_of_tensorrt_rtx(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_torch_tensorrt(folder, monkeypatch, tensorrt_package_name="tensorrt_rtx")
    with pytest.raises(MissingDependency) as missing:
        built(folder)
    assert "torch_tensorrt is that of tensorrt_rtx; install torch-tensorrt" in missing.value.where


def test_no_gpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_torch_tensorrt(folder, monkeypatch, "refuses", GPU="")
    with pytest.raises(MissingDependency, match="a driver of the GPU") as missing:
        built(folder)
    assert "Found no NVIDIA driver" in missing.value.where


def test_an_operator_that_it_does_not_convert(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_torch_tensorrt(folder, monkeypatch, "unsupported")
    with pytest.raises(UnsupportedModel) as refusal:
        built(folder)
    said = "Conversion of function torch._ops.aten.aten::erfinv not currently supported!"
    assert refusal.value.what == f"torch-tensorrt does not convert the model: {said}"
    assert refusal.value.where == f"tensorrt {VERSION}"
    assert "leave --via out" in refusal.value.hint


def test_no_engine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_torch_tensorrt(folder, monkeypatch, "refuses")
    with pytest.raises(UnsupportedModel, match=r"gave no engine.*an engine is a wish"):
        built(folder)


@pytest.mark.parametrize("behaviour", ["none", "empty"])
def test_no_bytes(behaviour: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_torch_tensorrt(folder, monkeypatch, behaviour)
    with pytest.raises(UnsupportedModel, match="the builder gave no engine: nothing"):
        built(folder)
    assert not (folder / "model.engine").exists()


def test_too_little_workspace(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_torch_tensorrt(folder, monkeypatch, "no memory")
    with pytest.raises(UnsupportedModel, match="out of workspace: Error Code 2: OutOfMemory"):
        built(folder)


def test_a_free_axis_without_shapes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_torch_tensorrt(folder, monkeypatch)
    with pytest.raises(UsageError, match="shapes are missing or do not fit: the input a has a free axis"):
        built(folder, replace(ON, shapes={"z": ON.shapes["z"]}))


def test_capabilities_are_of_tensorrt_rtx_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_torch_tensorrt(folder, monkeypatch)
    with pytest.raises(UsageError, match="for the GPU at hand alone"):
        built(folder, replace(ON, capabilities=("SM89",)))


def twice(m: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    y = x.exp()
    return y, y


UNFIT: dict[str, tuple[Callable[[Any, Tensor], object], torch.dtype, str]] = {
    "an input of float64": (lambda m, x: x.float().exp(), torch.float64, "x is float64"),
    "an output of float64": (lambda m, x: x.double().exp(), torch.float32, "exp is float64"),
    "an input returned": (lambda m, x: (x, x.exp()), torch.float32, "x is returned although it is an input"),
    "an output returned twice": (twice, torch.float32, "exp is returned although .* returned twice"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_inputs_and_outputs_that_no_engine_has(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    function, dtype, said = UNFIT[name]
    install_torch_tensorrt(folder, monkeypatch)
    graph = capture_model(Small(function).eval(), [torch.ones(2, 3, dtype=dtype)], None)
    (folder / "model.pt2").write_bytes(program_bytes(graph))
    with pytest.raises(UnsupportedModel, match=f"gave no engine: {said}"):
        built(folder, replace(ON, shapes={"x": ((1, 3), (2, 3), (4, 3))}))


def test_a_process_that_ends(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_torch_tensorrt(folder, monkeypatch, "crashes")
    with pytest.raises(CheckFailed, match="ended with signal 11"):
        built(folder)


def test_a_build_that_takes_too_long(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_torch_tensorrt(folder, monkeypatch, "hangs")
    with pytest.raises(CheckFailed, match="more than 2 s") as failure:
        built(folder, replace(ON, seconds=2))
    assert failure.value.where == "torch_tensorrt"
