"""Every rule of TensorRT finds the file that breaks it and leaves the other alone; TensorRT-RTX is asked, too."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import onnx
import pytest
from lint_models import PAIRS, Draft, model
from onnx import TensorProto as T

from normfuse.errors import BadInput, CheckFailed, UnsupportedModel
from normfuse.export.lint import TENSORRT_RULES, Level, lint
from normfuse.runtime.tensorrt_build import TENSORRT_RTX, BuildOptions, BuiltEngine, build_engine

has_builder = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed: pip install '.[trt-rtx]'"
)
ON = BuildOptions(capabilities=("SM89",), seconds=120)


def written(draft: Draft, folder: Path) -> Path:
    onnx.save(model(draft), folder / "model.onnx")
    return folder / "model.onnx"


def broken(draft: Draft, folder: Path) -> set[str]:
    return {each.rule.name for each in lint(written(draft, folder), TENSORRT_RULES)}


def built(draft: Draft, folder: Path) -> BuiltEngine:
    return build_engine(written(draft, folder), folder / "model.engine", TENSORRT_RTX, ON)


def test_every_rule_has_its_pair() -> None:
    assert [rule.name for rule in TENSORRT_RULES] == list(PAIRS)


def test_the_page_lists_every_rule() -> None:
    page = (Path(__file__).parents[2] / "docs" / "tensorrt.md").read_text(encoding="utf-8")
    for rule in TENSORRT_RULES:
        assert f"| `{rule.name}` | {rule.level.value} | {rule.says} | {rule.mend} |" in page
    assert f"{len(TENSORRT_RULES)} rules of trt" in page


@pytest.mark.parametrize("name", PAIRS)
def test_a_rule_finds_what_breaks_it_and_nothing_else(name: str, tmp_path: Path) -> None:
    kept, breaks = PAIRS[name]
    assert broken(kept(), tmp_path) == set()
    assert name in broken(breaks(), tmp_path)


@pytest.mark.parametrize("name", PAIRS)
def test_a_finding_names_the_layer_and_the_mend(name: str, tmp_path: Path) -> None:
    found = [each for each in lint(written(PAIRS[name][1](), tmp_path), TENSORRT_RULES) if each.rule.name == name]
    assert found
    assert all(each.layer for each in found)
    assert all(each.as_dict()["mend"] for each in found)
    levels = [each.rule.level for each in lint(tmp_path / "model.onnx", TENSORRT_RULES)]
    assert levels == sorted(levels, key=lambda level: level is Level.WARNING)


@has_builder
@pytest.mark.parametrize("name", PAIRS)
def test_the_builder_builds_what_keeps_a_rule(name: str, tmp_path: Path) -> None:
    assert built(PAIRS[name][0](), tmp_path).layers


ASK = {"zero-point", "code-type", "codes-by-hand", "unknown-operator", "mixed-types", "float32-attention"} | {
    "norm-statistics",
    "float4",
}
"""What TensorRT-RTX refuses, too; the other errors are TensorRT's, or engines that compute something else."""


@has_builder
@pytest.mark.parametrize("name", sorted(ASK))
def test_the_builder_refuses_what_breaks_a_rule(name: str, tmp_path: Path) -> None:
    with pytest.raises((UnsupportedModel, CheckFailed)):
        built(PAIRS[name][1](), tmp_path)
    assert not (tmp_path / "model.engine").exists()


def test_what_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"not a model at all")
    with pytest.raises(BadInput, match="cannot be read as ONNX"):
        lint(tmp_path / "model.onnx", TENSORRT_RULES)


@pytest.mark.parametrize("is_turned", [False, True])
@pytest.mark.parametrize("axis", [0, 1, -1, -2])
@pytest.mark.parametrize("operator", ["MatMul", "Gemm", "Gemm of turned"])
def test_the_axis_of_scales_of_weights(operator: str, axis: int, is_turned: bool, tmp_path: Path) -> None:
    """Weights are [inputs, outputs] where a product reads them as they are; a Transpose or Gemm's own turn them."""
    draft = Draft(inputs=(4, 64))
    turns = is_turned != (operator == "Gemm of turned")
    shape = (48, 64) if turns else (64, 48)
    codes = draft.constant(np.ones(shape), T.INT8)
    weight = draft.call("DequantizeLinear", codes, draft.constant(np.full(shape[axis], 0.01)), axis=axis)
    weight = draft.call("Transpose", weight, perm=[1, 0]) if is_turned else weight
    options = {"transB": 1} if operator == "Gemm of turned" else {}
    draft.call(operator.split(maxsplit=1)[0], draft.codes("x"), weight, **options)
    found = {each.rule.name for each in lint(written(draft, tmp_path), TENSORRT_RULES)}
    inputs = 1 if turns else 0
    assert ("scale-along-inputs" in found) == (axis % 2 == inputs)


@pytest.mark.parametrize(("operator", "shape"), [("Conv", (8, 4, 3, 3)), ("ConvTranspose", (4, 8, 3, 3))])
@pytest.mark.parametrize("axis", [0, 1])
def test_the_axis_of_scales_of_filters(operator: str, shape: tuple[int, ...], axis: int, tmp_path: Path) -> None:
    draft = Draft(inputs=(2, 4, 9, 9))
    codes = draft.constant(np.ones(shape), T.INT8)
    weight = draft.call("DequantizeLinear", codes, draft.constant(np.full(shape[axis], 0.01)), axis=axis)
    draft.call(operator, draft.codes("x"), weight)
    found = {each.rule.name for each in lint(written(draft, tmp_path), TENSORRT_RULES)}
    assert ("scale-along-inputs" in found) == (shape[axis] == 4)
