"""Every trained model of the zoo: folded, it answers every image as it did."""

import pytest
import torch

import normfuse
from examples.zoo.data import make
from examples.zoo.train import WEIGHTS

MODELS = sorted(path.stem for path in WEIGHTS.glob("*.pt2"))
FROZEN = ("bn", "un", "prepbn", "post")
IMAGES = 300


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_folded_model_answers_as_before(name: str) -> None:
    path = WEIGHTS / f"{name}.pt2"
    folded = normfuse.fold(path)
    assert folded.holds
    assert folded.certificate["error"]["float64"] < 1e-12
    assert folded.certificate["affines"]["left"] == 0
    if name.endswith(FROZEN):
        assert folded.certificate["norms"]["after"] == {}
    images, _ = make(name.partition("_")[0], "test", IMAGES, 1)
    original = torch.export.load(str(path)).module()
    with torch.no_grad():
        expected, found = original(images), folded.module(images)
    assert torch.equal(found.argmax(-1), expected.argmax(-1))
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
