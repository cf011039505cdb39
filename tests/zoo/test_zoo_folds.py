"""Every trained model of the zoo: folded, it answers every image as it did."""

import pytest
import torch

import normfuse
from examples.zoo.data import make
from examples.zoo.models import MODELS
from examples.zoo.train import WEIGHTS

NAMES = sorted(path.stem for path in WEIGHTS.glob("*.pt2"))
FROZEN = ("bn", "un", "prepbn", "post")
IMAGES = 300


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_folded_model_answers_as_before(name: str) -> None:
    path = WEIGHTS / f"{name}.pt2"
    folded = normfuse.fold(path)
    assert folded.holds
    assert folded.certificate["error"]["float64"] < 1e-12
    assert folded.certificate["affines"]["left"] == 0
    if name.endswith(FROZEN):
        assert folded.certificate["norms"]["after"] == {}
    images, _ = make(MODELS[name].task, "test", IMAGES, 1)
    original = torch.export.load(str(path)).module()
    with torch.no_grad():
        expected, found = original(images), folded.module(images)
    # Of a million pixels a few have two classes that are equally likely to the last place.
    flipped = (found.argmax(1) != expected.argmax(1)).double().mean()
    assert flipped <= (1e-5 if MODELS[name].task == "glyph-scenes" else 0)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
