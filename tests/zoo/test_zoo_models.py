"""The zoo's models, their training, and the archives that are committed."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from examples.zoo import train
from examples.zoo.blocks import PostNormBlock
from examples.zoo.data import make
from examples.zoo.models import MODELS, BatchNormTokens, VisionTransformer
from normfuse.nn import PRepBN, UnifiedNorm

NAMES = sorted(MODELS)
PREPBN_NAMES = [name for name in NAMES if name.endswith("_prepbn")]
SHAPES = {"glyphs": (62,), "digits": (10,), "glyph-scenes": (9, 64, 64)}
NORMS = {"ln": nn.LayerNorm, "bn": BatchNormTokens, "un": UnifiedNorm, "prepbn": PRepBN}


def stated() -> dict[str, float]:
    """Return the score that the table beside the weights states for each model."""
    rows = re.findall(r"^\| `(\w+)` \| ([\d.]+) %", (train.WEIGHTS / "README.md").read_text(), flags=re.MULTILINE)
    return {name: float(percent) / 100 for name, percent in rows}


@pytest.mark.parametrize("name", NAMES)
def test_models_have_the_sizes_they_should(name: str) -> None:
    entry = MODELS[name]
    model = entry.build(entry.steps).eval()
    images, _ = make(entry.task, "calib", 3, 0)
    assert model(images).shape == (3, *SHAPES[entry.task])
    assert 5e4 < sum(parameter.numel() for parameter in model.parameters()) < 1.3e6


@pytest.mark.parametrize("kind", NORMS)
def test_vision_transformers_have_one_kind_of_norm(kind: str) -> None:
    model = MODELS[f"glyphs_vit_{kind}"].build(100)
    assert isinstance(model, VisionTransformer)
    norms = [model.norm, *(norm for block in model.blocks for norm in (block.norm1, block.norm2))]
    assert len(norms) == 11
    assert {type(norm) for norm in norms} == {NORMS[kind]}


def test_the_post_norm_transformer_normalizes_behind_every_sum() -> None:
    model = MODELS["glyphs_vit_un_post"].build(100)
    assert isinstance(model, VisionTransformer)
    assert len([module for module in model.modules() if isinstance(module, UnifiedNorm)]) == 2 * len(model.blocks)
    block = model.blocks[0]
    assert isinstance(block, PostNormBlock)
    called: list[str] = []
    for name, part in block.named_children():
        part.register_forward_hook(lambda part, given, found, name=name: called.append(name))
    result: Tensor = block.eval()(torch.randn(2, 17, 96))
    assert called == ["attn", "norm1", "fc1", "fc2", "norm2"]
    assert isinstance(block.norm2, UnifiedNorm)
    with torch.no_grad():
        block.norm2.weight.zero_()
        block.norm2.bias.fill_(3.0)
        assert bool((block(result) == 3.0).all())  # nothing goes around the norm


@pytest.mark.parametrize("name", PREPBN_NAMES)
def test_the_way_to_repbn_ends_before_training_does(name: str) -> None:
    entry = MODELS[name]
    norms = [module for module in entry.build(entry.steps).modules() if isinstance(module, PRepBN)]
    assert norms
    assert all(int(norm.warm) + int(norm.total_step) <= 0.75 * entry.steps for norm in norms)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["digits_vit_ln", "glyphs_vit_un", "glyphs_vit_un_post", "scenes_segmenter_ln", *PREPBN_NAMES]
)
def test_training_repeats(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = (train.train(name, device="cpu", steps=6) for _ in range(2))
    for one, other in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    assert not first.training
    assert all(int(norm.iter) == 0 for norm in first.modules() if isinstance(norm, PRepBN))
    assert f"{name} step 6/6 loss" in capsys.readouterr().out


@pytest.mark.slow
def test_states_become_archives(tmp_path: Path) -> None:
    entry = MODELS["digits_vit_ln"]
    model = entry.build(entry.steps).eval()
    path = train.export("digits_vit_ln", model.state_dict(), tmp_path)
    images, _ = make("digits", "test", 5, 0)
    torch.testing.assert_close(torch.export.load(path).module()(images), model(images), rtol=0, atol=0)
    with zipfile.ZipFile(path) as archive:
        text = b"".join(archive.read(part) for part in archive.namelist())
    assert b"examples/zoo/models.py" in text
    assert str(train.REPOSITORY).encode() not in text


@pytest.mark.parametrize("name", NAMES)
def test_committed_archives_load_with_any_batch(name: str) -> None:
    program = torch.export.load(train.WEIGHTS / f"{name}.pt2")
    assert list(program.graph_signature.user_inputs) == ["image"]
    assert not [key for key, value in program.state_dict.items() if value.dtype is torch.float64]
    images, _ = make(MODELS[name].task, "calib", 3, 0)
    model = program.module()
    three, one = model(images), model(images[:1])
    # Another batch size may take another order of summation: a few units in the last place of logits of up to 20.
    torch.testing.assert_close(one, three[:1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", PREPBN_NAMES)
def test_committed_archives_came_to_the_end_of_the_way_to_repbn(name: str) -> None:
    state = torch.export.load(train.WEIGHTS / f"{name}.pt2").state_dict
    left = [int(value) for key, value in state.items() if key.endswith(".iter")]
    assert left
    assert not any(left)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_committed_archives_are_as_accurate_as_stated(name: str) -> None:
    task, share = MODELS[name].task, stated()[name]
    # Pixels of one scene are no independent successes: scenes are measured whole, as stated.
    count = train.TEST_COUNT[task] if task == "glyph-scenes" else 360
    model = torch.export.load(train.WEIGHTS / f"{name}.pt2").module()
    found = train.evaluate(model, task, count)
    # Four standard deviations of a count of 360 independent successes; digits has exactly these 360.
    spread = 4 * (share * (1 - share) / count) ** 0.5
    assert abs(found.percent / 100 - share) < (spread if task == "glyphs" else 0.0051)


def test_the_archives_are_small() -> None:
    sizes = [path.stat().st_size for path in train.WEIGHTS.glob("*.pt2")]
    assert sum(sizes) < 30e6
    assert sorted(path.stem for path in train.WEIGHTS.glob("*.pt2")) == NAMES


def test_the_bars_that_the_zoo_sets_itself() -> None:
    glyphs = {name: share for name, share in stated().items() if name.startswith("glyphs")}
    assert 0.88 <= glyphs["glyphs_vit_ln"] <= 0.95
    assert all(share >= glyphs["glyphs_vit_ln"] - 0.04 for share in glyphs.values())
    assert stated()["digits_vit_ln"] > 0.90
    assert 0.60 <= stated()["scenes_segmenter_ln"] <= 0.85
