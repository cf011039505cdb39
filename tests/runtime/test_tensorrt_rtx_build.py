"""TensorRT-RTX itself: an engine twice, and what it says of a build that cannot be."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from normfuse.errors import UnsupportedModel, UsageError
from normfuse.runtime.engine_sidecar import check_engine
from normfuse.runtime.onnx_session import open_onnx
from normfuse.runtime.shapes import default_shapes
from normfuse.runtime.tensorrt_build import TENSORRT_RTX, BuildOptions, BuiltEngine, build_engine

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed: pip install '.[trt-rtx]'"
)
ON = BuildOptions(capabilities=("SM89",), seconds=120)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Return a product with a batch of any size."""
    weight = numpy_helper.from_array(np.random.default_rng(0).normal(size=(64, 32)).astype(np.float32), "weight")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "weight"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ("batch", 64))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ("batch", 32))],
        [weight],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(made, tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def built(model: Path, options: BuildOptions, name: str = "model.engine") -> BuiltEngine:
    return build_engine(model, model.with_name(name), TENSORRT_RTX, options)


def with_shapes(model: Path) -> BuildOptions:
    return replace(ON, shapes=default_shapes(open_onnx(model).inputs, 4))


def test_the_same_engine_twice(model: Path) -> None:
    options = with_shapes(model)
    assert options.shapes == {"x": ((1, 64), (4, 64), (8, 64))}
    first, second = built(model, options), built(model, options, "again.engine")
    assert first.sidecar == second.sidecar
    assert first.sidecar.capabilities == ("SM89",)
    found = check_engine(
        model.with_name("again.engine"),
        backend_module="tensorrt_rtx",
        backend_version=first.version,
        capability="SM89",
        onnx=model,
    )
    assert found == second.sidecar


def test_an_engine_of_several_capabilities_that_is_version_compatible(model: Path) -> None:
    options = replace(with_shapes(model), capabilities=("SM86", "SM89"), version_compatible=True)
    assert built(model, options).sidecar.capabilities == ("SM86", "SM89")
    assert built(model, replace(options, capabilities=())).sidecar.capabilities == ()


def test_a_timing_cache_is_not_used(model: Path) -> None:
    cache = model.with_name("timing.cache")
    assert "is not used" in built(model, replace(with_shapes(model), timing_cache=cache)).messages[0]
    assert not cache.exists()


def test_too_little_workspace(model: Path) -> None:
    with pytest.raises(UnsupportedModel, match="out of workspace"):
        built(model, replace(with_shapes(model), workspace_bytes=1))


def test_a_free_axis_without_shapes(model: Path) -> None:
    with pytest.raises(UsageError, match="no optimization profile") as refusal:
        built(model, ON)
    assert "--shapes" in refusal.value.hint


def test_shapes_that_do_not_fit(model: Path) -> None:
    with pytest.raises(UsageError, match="profile 0"):
        built(model, replace(ON, shapes={"x": ((1, 63), (1, 63), (1, 63))}))


def test_a_capability_that_it_does_not_have(model: Path) -> None:
    with pytest.raises(UsageError, match="compute capability") as refusal:
        built(model, replace(with_shapes(model), capabilities=("SM90",)))
    assert "SM89" in refusal.value.expected
