"""The vertical on small real models: compile, save, load, run; guards, fallbacks, unknown operators."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

import normfuse
from normfuse.artifact import verify_artifact
from normfuse.data import Samples
from normfuse.data.samples import Sample
from normfuse.errors import BadInput, UsageError
from normfuse.nn import PRepBN, UnifiedNorm
from normfuse.recipe import Recipe
from normfuse.testing import randomized

UNMEASURED = Recipe(benchmark=False, threads=1)


class Mixer(nn.Module):
    """A convolution, frozen norms of two kinds, attention written by the user, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(2, 16, 3, 3)
        self.norm1, self.qkv, self.out = UnifiedNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.norm2, self.up, self.down = PRepBN(16, total_step=0), nn.Linear(16, 32), nn.Linear(32, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patch(image).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        x = x + self.out(torch.softmax(q @ k.transpose(1, 2) * 0.25, dim=-1) @ v)
        x = x + self.down(torch.nn.functional.gelu(self.up(self.norm2(x))))
        return self.head(x.mean(dim=1))


class Residual(nn.Module):
    """A CNN whose sums and ReLUs should never leave the codes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8)
        self.conv, self.norm2 = nn.Conv2d(8, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, image: Tensor) -> Tensor:
        x = self.norm(self.stem(image)).relu()
        x = (self.norm2(self.conv(x)) + x).relu()
        return self.head(x.mean(dim=(2, 3)))


def samples(count: int = 24, *, labels: bool = False, seed: int = 0) -> Samples:
    images = np.random.default_rng(seed).standard_normal((count, 2, 9, 6)).astype(np.float32)
    return Samples(
        source="test",
        names=("image",),
        count=count,
        read=lambda: (Sample({"image": image}, f"sample {index}") for index, image in enumerate(images)),
        labels=np.arange(count) % 5 if labels else None,
    )


@pytest.mark.slow
@pytest.mark.parametrize("model", [Mixer(), Residual()], ids=["transformer", "cnn"])
def test_what_is_saved_runs_as_the_simulation_said(model: nn.Module, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = randomized(model).eval()
    built = normfuse.compile(model, [torch.randn(2, 2, 9, 6)], calibration=samples(), recipe=UNMEASURED)
    built.save(tmp_path / "artifact")

    assert all(check["holds"] for check in built.report["checks"]), built.report["checks"]
    assert built.report["verdict"]["ships"] == "int8"
    assert verify_artifact(tmp_path / "artifact") == []
    session = normfuse.load(tmp_path / "artifact")
    for batch in (1, 3):
        # Seeded: single images may lie far outside the ranges that 24 samples showed.
        image = torch.randn(batch, 2, 9, 6, generator=torch.Generator().manual_seed(batch))
        found = session(image=image.numpy())["output"]
        wanted = model(image).detach().numpy()
        noise = np.square(found - wanted).sum() / np.square(wanted).sum()
        assert noise < 10 ** (-20 / 10), "8 bits keep at least 20 dB on these layers"
    report = json.loads((tmp_path / "artifact" / "report.json").read_text())
    assert report["quantization"]["effective_bits"] < 16


def operators(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


@pytest.mark.slow
def test_no_frozen_norm_is_left_and_the_linear_maps_are_rows(tmp_path: Path) -> None:
    model = randomized(Mixer()).eval()
    built = normfuse.compile(model, [torch.randn(2, 2, 9, 6)], calibration=samples(), recipe=UNMEASURED)
    found = operators(built.engine.path)
    assert found.count("Mul") == 0
    assert "BatchNormalization" not in found
    assert found.count("Gemm") == 7
    assert found.count("Add") == 2, "the residual sums; biases live in Gemm"
    assert not {"Where", "IsNaN", "Shape"} & set(found)


@pytest.mark.slow
def test_an_unknown_operator_stays_float_and_is_named() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(12, 16), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.erf(self.first(x)))

    data = np.random.default_rng(0).standard_normal((8, 12)).astype(np.float32)
    source = Samples(source="test", names=("x",), count=8, read=lambda: (Sample({"x": row}, "row") for row in data))
    built = normfuse.compile(Odd().eval(), [torch.randn(2, 12)], calibration=source, recipe=UNMEASURED)
    refused = [refusal for step in built.report["passes"] for refusal in step["refused"]]
    assert [(r["reason"], r["detail"]) for r in refused] == [("unknown_operator", "aten.erf")]
    assert "Erf" in operators(built.engine.path)


@pytest.mark.slow
def test_a_model_without_quantizable_layers_is_folded_float() -> None:
    built = normfuse.compile(
        randomized(Mixer()).eval(), [torch.randn(2, 2, 9, 6)], recipe=Recipe(bits=32, benchmark=False, threads=1)
    )
    assert built.report["verdict"]["ships"] == "float"
    assert "QuantizeLinear" not in operators(built.engine.path)
    assert built.holds


@pytest.mark.slow
def test_too_large_a_drop_falls_back_to_float_and_says_so(tmp_path: Path) -> None:
    model = randomized(Mixer()).eval()
    recipe = Recipe(threads=1, min_speedup=1000.0)
    built = normfuse.compile(model, [torch.randn(2, 2, 9, 6)], calibration=samples(), recipe=recipe)
    built.save(tmp_path / "artifact")
    assert not built.holds
    assert built.report["verdict"]["verdict"] == "fell back"
    assert built.report["verdict"]["reasons"][0].endswith("1e+03 wanted")
    assert "QuantizeLinear" not in operators(tmp_path / "artifact" / "model.onnx")


def test_eight_bits_need_samples() -> None:
    with pytest.raises(UsageError, match="calibration data") as caught:
        normfuse.compile(Mixer().eval(), [torch.randn(2, 2, 9, 6)])
    assert "calibration=" in caught.value.hint


@pytest.mark.slow
def test_arrays_and_lists_are_samples() -> None:
    images = np.random.default_rng(0).standard_normal((24, 2, 9, 6)).astype(np.float32)
    held = [({"image": torch.from_numpy(image)}, index % 5) for index, image in enumerate(images[:6])]
    built = normfuse.compile(randomized(Mixer()).eval(), calibration=images, evaluation=held, recipe=UNMEASURED)
    assert built.report["quantization"]["samples"] == 24
    assert [row["samples"] for row in built.report["comparison"]["rows"]] == [6, 6]


@pytest.mark.slow
def test_samples_of_another_shape_are_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()).eval()
    with pytest.raises(BadInput, match="image"):
        normfuse.compile(model, [torch.randn(2, 3, 9, 6)], calibration=samples(), recipe=UNMEASURED)


@pytest.mark.slow
def test_saved_models_compile_from_the_file_with_a_dynamic_batch(tmp_path: Path) -> None:
    model = randomized(Mixer()).eval()
    normfuse.save(model, [torch.randn(1, 2, 9, 6)], tmp_path / "model.any")
    graph = normfuse.capture(torch.export.load(tmp_path / "model.any"))
    assert graph.has_dynamic_batch
    assert graph.input_names == ("image",)
    image = torch.randn(4, 2, 9, 6)
    torch.testing.assert_close(graph.run(image)[0], model(image))


def test_an_unfinished_progression_is_a_warning() -> None:
    model = Mixer().eval()
    model.norm2 = PRepBN(16, total_step=9)
    images = torch.randn(2, 2, 9, 9)
    built = normfuse.compile(model, images, recipe=Recipe(bits=32, benchmark=False, threads=1))
    (warning,) = [text for text in built.report["warnings"] if "PRepBN" in text]
    assert "norm2" in warning
    assert "train until iter is 0" in warning
