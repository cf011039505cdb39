"""``--target trt``: every kind of bits from the model to the artifact, its engine, and what is told of both."""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch
from standin_tensorrt import VERSION, hide_tensorrt, install_standin
from torch import Tensor, nn
from torch.nn import functional as F

import normfuse
from examples.zoo.data import make
from examples.zoo.train import WEIGHTS
from normfuse import typed_engine
from normfuse.artifact import verify_artifact
from normfuse.built import Built
from normfuse.checks import Check
from normfuse.errors import BadInput, MissingDependency, UnsupportedModel, UsageError
from normfuse.inspection import lint_engine, read_report
from normfuse.recipe import Recipe
from normfuse.runtime.engine_sidecar import check_engine
from normfuse.testing import Small, randomized, seeded

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None,
    reason="tensorrt-rtx is not installed: pip install '.[trt-rtx]'",
)

needs_builder = pytest.mark.skipif(
    not any(importlib.util.find_spec(name) for name in ("tensorrt", "tensorrt_rtx")),
    reason="no TensorRT is installed: pip install '.[tensorrt]', or '.[trt-rtx]'",
)

QUICKLY: Final = {"target": "trt", "effort": 0, "threads": 1, "max_drop": 100.0, "benchmark": False}

UP, DOWN, HEAD = "int4 in blocks of 32 x fp16", "int4 in blocks of 64 x fp16", "fp16"


def forward(m: Any, x: Tensor) -> Tensor:
    x = x + m.down(F.gelu(m.up(m.norm(x))))
    return m.head(x.mean(dim=1))  # type: ignore[no-any-return]


def network() -> nn.Module:
    """Always the same; every layer could have four bits but the head, whose input is one block."""
    parts = {"norm": nn.LayerNorm(64), "up": nn.Linear(64, 128), "down": nn.Linear(128, 64), "head": nn.Linear(64, 7)}
    found = randomized(Small(forward, **parts))
    with torch.no_grad():
        found.head.bias -= found(tokens(200)).mean(dim=0)  # type: ignore[union-attr]
    return found


def tokens(count: int = 16, seed: int = 1) -> Tensor:
    return torch.randn(count, 5, 64, generator=seeded(seed))


def compiled(**options: Any) -> Built:
    recipe = Recipe().with_options(**{**QUICKLY, "build": False, **options})
    return normfuse.compile(network(), calibration=tokens(), recipe=recipe)


@cache
def quickly(bits: str) -> Built:
    """One compile per kind of bits, for several tests."""
    return compiled(bits=bits, **({"budget": "avg-bits=6"} if bits == "mixed" else {}))


def types(built: Built) -> dict[str, str]:
    """The types of the products, by layer."""
    return {each["layer"]: each["type"] for each in built.report["tensorrt"]["products"]}


CODED = ("engine's codes = simulation's", "engine's outputs = simulation's")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bits", "expected", "checks"),
    [
        ("8", {"up": "int8", "down": "int8", "head": "int8"}, (*CODED, "codes behind fp16", "outputs in fp16")),
        ("4", {"up": UP, "down": DOWN, "head": UP}, (CODED[1], "outputs in fp16")),
        ("fp8", {"up": "fp8", "down": "fp8", "head": "fp8"}, (*CODED, "codes behind fp16", "outputs in fp16")),
        ("fp16", {"up": "fp16", "down": "fp16", "head": "fp16"}, ("outputs in fp16",)),
        ("bf16", {"up": "bf16", "down": "bf16", "head": "bf16"}, ("outputs in bf16",)),
        ("32", {"up": "fp32", "down": "fp32", "head": "fp32"}, ()),
    ],
)
def test_every_kind_of_bits(bits: str, expected: dict[str, str], checks: tuple[str, ...]) -> None:
    built = quickly(bits)
    found = built.report["tensorrt"]
    assert types(built) == expected
    assert set(found) == {"lint", "products", "body", "commands", "engine"}
    assert found["lint"] == []
    assert found["engine"] is None
    assert "trtexec --onnx=model.onnx --saveEngine=model.engine" in found["commands"]["build"]
    assert (built.failure, built.files, built.holds) == (None, {}, True)
    body = found["body"]
    assert (body is None) == (bits == "32")
    if body is not None:
        assert body["type"] == ("bf16" if bits == "bf16" else "fp16")
        assert body["usual_float32"]["LayerNormalization"] == 1
        assert body["nodes"] > 0
    names = [check["name"] for check in built.report["checks"]]
    assert all(check["holds"] for check in built.report["checks"])
    for check in checks:
        assert any(name.startswith(check) for name in names), (check, names)
    assert len(names) == 2 + len(checks), "both of the float engine, too"


@pytest.mark.slow
def test_constants_are_counted_as_the_file_has_them() -> None:
    counted = deepcopy(quickly("8").report["quantization"])
    codes, floats = counted["constants_by_type"].pop("int8"), counted["constants_by_type"].pop("float16")
    assert codes >= 2 * 64 * 128 + 64 * 7, "weights, and zero points"
    assert floats >= 2 * 64 + 128 + 64 + 7, "the norm and the biases, and scales"
    assert counted["constants_by_type"] == {}
    assert counted["effective_bits"] == pytest.approx((8 * codes + 16 * floats) / (codes + floats), abs=1e-3)


@pytest.mark.slow
def test_a_body_of_floats_has_the_folds_of_the_float_model_once() -> None:
    names = [(each["name"], str(each)) for each in quickly("fp16").report["passes"]]
    assert len(set(names)) == len(names)
    assert len(names) == len(quickly("32").report["passes"])


@pytest.mark.slow
def test_what_was_decided_on_random_inputs_is_told() -> None:
    recipe = Recipe().with_options(**QUICKLY, build=False, bits="fp16")
    warnings = normfuse.compile(network(), [tokens(2)], recipe=recipe).report["warnings"]
    assert [text for text in warnings if "--calib" in text]
    assert not [text for text in quickly("fp16").report["warnings"] if "--calib" in text]


class Bits(nn.Module):
    """Has an operator that TensorRT does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x) * (x.sum(-1, keepdim=True).long() & 3)


@pytest.mark.slow
def test_a_file_with_errors_that_no_builder_sees_is_a_failure() -> None:
    recipe = Recipe().with_options(**QUICKLY, build=False, bits="fp16")
    built = normfuse.compile(randomized(Bits()), calibration=torch.randn(8, 64, generator=seeded(1)), recipe=recipe)
    assert isinstance(built.failure, UnsupportedModel)
    assert "TensorRT does not know the operator" in built.failure.what
    assert built.report["tensorrt"]["failure"]["try"] == built.failure.hint
    assert [each["rule"] for each in built.report["tensorrt"]["lint"]] == ["unknown-operator"]


@pytest.mark.slow
@pytest.mark.parametrize("target", ["trt", "onnx"])
def test_floats_of_fewer_bits_are_named(target: str) -> None:
    model = randomized(nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64))).half()
    recipe = Recipe().with_options(**{**QUICKLY, "target": target}, bits="32", build=None)
    with pytest.raises(UnsupportedModel, match=r"computes in torch\.float16") as refusal:
        normfuse.compile(model, [torch.randn(2, 64, generator=seeded(1)).half()], recipe=recipe)
    assert "model.float()" in refusal.value.hint


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["8", "fp8", "4"])
@pytest.mark.parametrize("body", ["fp16", "fp32"])
def test_what_stands_behind_a_relu_is_as_simulated(bits: str, body: str) -> None:
    """Onnxruntime drops a Relu in front of a quantizer of 8-bit floats, if it may."""
    model = randomized(nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64), nn.ReLU6(), nn.Linear(64, 5)))
    recipe = Recipe().with_options(**QUICKLY, build=False, bits=bits, body=body)
    data = torch.randn(16, 64, generator=seeded(1))
    built = normfuse.compile(model, calibration=data, recipe=recipe)
    assert all(check["holds"] for check in built.report["checks"]), built.report["checks"]
    assert built.report["verdict"]["verdict"] == "kept"
    shown = built.session(threads=1)(data.numpy())["output"]
    wanted = model(data).detach().numpy()
    assert np.abs(shown - wanted).max() < 0.2 * np.abs(wanted).max(), "dropped, it would be nowhere near"


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "most"), [("8", 0.35), ("4", 0.25), ("fp16", 0.55), ("bf16", 0.55)])
def test_the_file_that_ships_is_the_one_that_is_measured(bits: str, most: float) -> None:
    floating, row = quickly(bits).report["comparison"]["rows"]
    assert row["file_bytes"] == quickly(bits).engine.path.stat().st_size
    weights = 4 * (2 * 64 * 128 + 64 * 7)
    assert row["file_bytes"] < floating["file_bytes"] - (1 - most) * weights


@pytest.mark.slow
def test_mixed_bits_are_those_that_have_kernels() -> None:
    built = quickly("mixed")
    kinds = {row["bits"] for row in built.report["mixed"]["histogram"]}
    assert kinds <= {"w4a16", "w8a8", "float"}
    assert "w4a16" in kinds
    assert set(types(built).values()) <= {UP, DOWN, HEAD, "int8"}
    assert built.report["mixed"]["average_weight_bits"] <= 6
    assert built.report["tensorrt"]["lint"] == []


@pytest.mark.slow
def test_a_front_without_labels_ends_with_the_body_alone() -> None:
    built = compiled(bits="mixed", pareto=True, score="random", benchmark=True)
    points = built.report["pareto"]["points"]
    assert points[-1]["ships"]
    assert all(point["p50_ms"] is None for point in points), "this machine's time says nothing"
    assert points[0]["file_bytes"] < points[-1]["file_bytes"]
    assert set(types(built).values()) == {"fp16"}
    assert (built.report["verdict"]["ships"], built.holds) == ("mixed", True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "first"),
    [
        ({"bits": 4}, UP),
        ({"bits": 4, "overrides": "0=8"}, "int8"),
        ({"bits": "mixed", "budget": "avg-bits=4.5", "score": "random"}, UP),
        ({"bits": "mixed", "budget": "bytes=0.25x", "score": "random", "weight_widths": "4,8"}, UP),
    ],
    ids=["few", "by name", "mixed", "bytes"],
)
def test_few_bits_read_what_enters_the_model_as_floats(options: dict[str, Any], first: str) -> None:
    model, samples = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5)), tokens()[:, 0]
    recipe = Recipe().with_options(**{**QUICKLY, "build": False, **options})
    built = normfuse.compile(randomized(model), calibration=samples, recipe=recipe)
    assert types(built)["0"] == first
    assert set(types(built).values()) <= {UP, "int8"}
    assert built.holds
    assert built.report["tensorrt"]["lint"] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"bits": 4, "overrides": "head=8"}, {"up": UP, "down": DOWN, "head": "int8"}),
        ({"bits": 8, "overrides": "*=4 head=32"}, {"up": UP, "down": DOWN, "head": "fp16"}),
        (
            {"bits": "mixed", "budget": "avg-bits=7", "overrides": "d*n=8 up=4"},
            {"up": UP, "down": "int8"},
        ),
        ({"bits": 4, "eight_bits": "fp8", "overrides": "up=8"}, {"up": "fp8", "down": DOWN, "head": UP}),
    ],
    ids=["one", "pattern", "mixed", "8-bit floats"],
)
def test_bits_by_name_win(options: dict[str, Any], expected: dict[str, str]) -> None:
    built = compiled(**options)
    assert types(built).items() >= expected.items()
    assert built.holds
    assert all(check["holds"] for check in built.report["checks"])
    assert built.report["verdict"]["ships"] == built.recipe.label


def test_a_name_that_is_none_is_refused() -> None:
    with pytest.raises(UsageError, match="no layer that can have bits is called so"):
        compiled(bits=8, overrides="heads=4")


@pytest.mark.slow
def test_blocks_that_cost_too_much_go_back_to_float() -> None:
    samples = tokens(200, seed=3)
    with torch.no_grad():
        labels = network()(samples).argmax(dim=1).numpy()
    recipe = Recipe().with_options(**{**QUICKLY, "bits": 4, "max_drop": 13.0, "build": False})
    built = normfuse.compile(
        network(), calibration=tokens(), evaluation={"x": samples.numpy(), "label": labels}, recipe=recipe
    )
    control = built.report["accuracy_control"]
    assert control["put_back"]
    assert {back["level"] for back in control["put_back"]} == {"float"}
    back = {layer for each in control["put_back"] for layer in each["layers"]}
    found = types(built)
    assert {found[layer] for layer in back} == {"fp16"}
    assert {kind for layer, kind in found.items() if layer not in back} <= {UP, DOWN}
    assert built.report["tensorrt"]["lint"] == []
    assert built.report["verdict"]["ships"] == "w4a16"
    assert built.report["verdict"]["verdict"] == "partly kept"


@pytest.mark.slow
def test_what_falls_back_is_linted_and_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install_standin(tmp_path, monkeypatch)
    failing = Check(name="outputs in fp16 = simulation's", value=1.0, bound=0.5, detail="made up")
    monkeypatch.setattr(typed_engine, "check_typed", lambda *_, **__: (failing,))
    built = compiled(bits=8, build=True)
    assert not built.holds
    assert built.report["verdict"]["ships"] == "float"
    assert "a check failed: outputs in fp16" in built.report["verdict"]["reasons"][0]
    assert set(types(built).values()) == {"fp32"}
    assert built.report["tensorrt"]["lint"] == []
    assert built.report["tensorrt"]["body"] is None
    built.save(tmp_path / "out")
    of_what_ships(tmp_path / "out")


def of_what_ships(folder: Path) -> None:
    """The engine is whole and of the artifact's own file."""
    sidecar = check_engine(
        folder / "model.engine", backend_module="tensorrt", backend_version=VERSION, onnx=folder / "model.onnx"
    )
    assert sidecar is not None
    assert sidecar.shapes == {"x": ((1, 5, 64), (1, 5, 64), (8, 5, 64))}


@pytest.mark.slow
def test_the_artifact_has_the_engine_and_everything_about_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install_standin(tmp_path, monkeypatch)
    built, out = compiled(bits="fp16", build=True), tmp_path / "out"
    built.save(out)
    made = {"model.engine", "model.engine.json", "engine_layers.json"}
    manifest = json.loads((out / "manifest.json").read_text())
    assert made <= set(manifest["files"])
    assert (out / "model.engine").read_bytes() == b"a made up engine"
    assert (out / "model.engine").stat().st_mode & 0o777 == 0o600
    (layer,) = json.loads((out / "engine_layers.json").read_text())
    assert (layer["kind"], layer["inputs"], layer["sources"]) == ("gemm", ["Int8"], ["made up"])
    of_what_ships(out)
    engine = read_report(out)["tensorrt"]["engine"]
    assert (engine["flavour"], engine["version"], engine["bytes"]) == ("tensorrt", VERSION, 16)
    assert engine["audit"]["kernels"] == 1
    assert [each["got"] for each in engine["audit"]["mismatched"]] == [None] * 3
    page = (out / "report.html").read_text()
    assert "Other kernels than asked for" in page
    assert verify_artifact(out) == []
    assert lint_engine(out, "trt")["findings"] == []
    (out / "model.engine").write_bytes(b"a made up engin\xff")
    (problem,) = verify_artifact(out)
    assert "model.engine" in problem


@pytest.mark.slow
def test_what_fails_stands_beside_what_was_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hide_tensorrt(monkeypatch)
    built = compiled(bits="fp16", build=True)
    assert isinstance(built.failure, MissingDependency)
    failure = built.report["tensorrt"]["failure"]
    assert failure["what"] == "tensorrt is not installed"
    assert "normfuse[tensorrt]" in failure["try"]
    assert built.report["tensorrt"]["engine"] is None
    built.save(tmp_path / "out")
    assert verify_artifact(tmp_path / "out") == []
    assert not (tmp_path / "out" / "model.engine").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"shapes": "image=1x5x64"}, "the model has no input image"),
        ({"shapes": "x=1x5x65"}, "do not fit the input x"),
        ({"timing_cache": "missing/folder/cache"}, "the timing cache cannot be written"),
        ({"timing_cache": "."}, "the timing cache cannot be written"),
    ],
)
def test_what_fits_no_build_is_refused_before_the_work(
    options: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def works(*_: object, **__: object) -> None:
        raise AssertionError("work was done")

    monkeypatch.setattr("normfuse.compiler.build_float", works)
    with pytest.raises(UsageError, match=said):
        compiled(bits="fp16", **options)


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["8", "4", "fp8", "fp16", "bf16", "mixed"])
def test_an_artifact_runs_as_before_it_was_saved(bits: str, tmp_path: Path) -> None:
    built, x = quickly(bits), tokens(3, seed=5).numpy()
    expected = built.session(threads=1)(x)["output"]
    built.save(tmp_path / "out")
    found = normfuse.load(tmp_path / "out", threads=1)(x)["output"]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * float(np.abs(expected).max()))


@pytest.mark.slow
def test_a_broken_artifact_in_bfloat16_is_still_refused(tmp_path: Path) -> None:
    replace(quickly("bf16"), resume=None).save(tmp_path / "out")
    with (tmp_path / "out" / "model.onnx").open("ab") as file:
        file.write(b"more")
    with pytest.raises(BadInput, match="damaged"):
        normfuse.load(tmp_path / "out")


ZOO: Final = {
    "4": {"int4": 25, "fp16": 9},
}
"""Products of a ViT of four blocks: six linear maps each, and the patches'; two of attention each, and the pool's."""


@pytest.mark.slow
@needs_rtx
@pytest.mark.parametrize("bits", list(ZOO))
def test_a_trained_model_becomes_the_kernels_that_were_asked_for(bits: str, tmp_path: Path) -> None:
    images, _ = make("digits", "calib", 8, 0)
    recipe = Recipe().with_options(**QUICKLY, bits=bits, capability="8.9")
    built = normfuse.compile(WEIGHTS / "digits_vit_ln.pt2", calibration=images, recipe=recipe)
    assert built.failure is None
    assert built.holds
    found = built.report["tensorrt"]
    assert found["lint"] == []
    assert Counter(each["type"].split(" in ")[0] for each in found["products"]) == ZOO[bits]
    engine = found["engine"]
    assert (engine["flavour"], engine["capabilities"]) == ("tensorrt_rtx", ["SM89"])
    assert engine["audit"]["mismatched"] == []
    assert engine["audit"]["norms"] == engine["audit"]["joined_norms"] == 9
    assert engine["audit"]["alone"] == []
    built.save(tmp_path / "out")
    assert verify_artifact(tmp_path / "out") == []
    assert (tmp_path / "out" / "model.engine").stat().st_size == engine["bytes"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU that PyTorch can use")
@needs_builder
@pytest.mark.parametrize("bits", ["8", "fp16", "32"])
def test_an_engine_runs_on_the_gpu_at_hand(bits: str) -> None:
    built = compiled(bits=bits, build=True, benchmark=True)
    assert built.failure is None
    (found,) = built.report["tensorrt"]["run"]["engines"]
    assert found["output_error"] <= found["allowed_error"]
    assert found["graph"]["gpu_ms"]["median"] > 0
    assert found["plain"]["gpu_ms"]["median"] > 0
