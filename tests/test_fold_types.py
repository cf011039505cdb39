"""A fold in the model's own type: it takes the steps that fit, and numbers stay numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normfuse import fold
from normfuse.graph.affine import AFFINE
from normfuse.nn import UnifiedNorm
from normfuse.passes import rescale_stream
from normfuse.passes.presets import folds
from normfuse.pipeline import Phase
from normfuse.testing import randomized, seeded

EXACT = 1e-12


def sample(*shape: int) -> Tensor:
    return torch.randn(shape, generator=seeded(9))


@torch.no_grad()
def test_float16_takes_only_the_steps_that_fit_and_says_so() -> None:
    """Rescaled streams grow by octaves; float64 has room for all of them, float16 has not."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last, self.norm = nn.Linear(5, 7), nn.Linear(7, 5), UnifiedNorm(5)
            self.norm.weight.copy_(torch.exp2(torch.linspace(-3.0, 3.0, 5)))

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x + self.last(torch.tanh(self.first(x))))  # type: ignore[no-any-return]

    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(5, 5), nn.Tanh(), UnifiedNorm(5), *(Block() for _ in range(4)), nn.Linear(5, 3)
        ).eval()

    x = sample(4, 5)
    wide, narrow = fold(model(), (x,)), fold(model().half(), (x.half(),))
    assert wide.certificate["affines"]["left"] == 0
    assert narrow.holds
    assert not narrow.certificate["undone"]
    left = narrow.certificate["affines"]["left"]
    assert left > 0
    assert {each["reason"] for each in narrow.certificate["left"]} == {"range"}
    assert len(narrow.certificate["left"]) == left
    assert not any(node.target is AFFINE for node in narrow.graph.nodes)
    result = narrow.module(x.half())
    assert result.dtype == torch.float16
    # Half precision: 11 bits, sums of 4 blocks whose scales differ by six octaves.
    torch.testing.assert_close(result.float(), model()(x), atol=0.05, rtol=0.05)


class Shrinking(nn.Module):
    """Post-norm blocks that shrink every channel alike: what is written to a rescaled stream grows with the depth."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(5, 5), nn.Linear(5, 3)
        self.first = nn.ModuleList([nn.Linear(5, 7) for _ in range(6)])
        self.last = nn.ModuleList([nn.Linear(7, 5) for _ in range(6)])

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x)) * 0.02 + 60
        for first, last in zip(self.first, self.last, strict=True):
            x = (x + last(first(x).relu())) * 0.02 + 60
        return self.head(x)  # type: ignore[no-any-return]


def test_a_stream_that_shrinks_stays_within_float16() -> None:
    model, x = randomized(Shrinking()).half(), sample(4, 5).half()
    folded = fold(model, (x,))
    assert folded.holds
    assert folded.certificate["affines"]["left"] > 0
    # Half precision: 11 bits of sums of five terms of size 60.
    torch.testing.assert_close(folded.module(x), model(x), atol=0.6, rtol=0.01)


def test_without_the_rescaled_stream_where_that_overflows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rescale_stream, "RANGES", {})
    model, x = randomized(Shrinking()).half(), sample(4, 5).half()
    folded = fold(model, (x,))
    assert folded.holds
    assert "carry-along-stream" not in {site["rule"] for site in folded.certificate["sites"]}
    assert folded.module(x).isfinite().all()


def always_rescaled(*, rescales: bool, **options: Any) -> Phase:
    return folds(**options)


def test_an_overflow_that_stays_does_not_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rescale_stream, "RANGES", {})
    monkeypatch.setattr("normfuse.folding.folds", always_rescaled)
    folded = fold(randomized(Shrinking()).half(), (sample(4, 5).half(),))
    assert not folded.holds


def test_half_precision() -> None:
    model = randomized(nn.Sequential(nn.Linear(4, 5), UnifiedNorm(5), nn.Linear(5, 3))).half()
    folded = fold(model, (x := sample(2, 4).half(),))
    assert folded.holds
    assert folded.certificate["affines"] == {"found": 1, "folded": 1, "left": 0}
    assert folded.certificate["error"]["float64"] < EXACT
    assert 0 < folded.certificate["error"]["own_type"] < 0.05
    assert folded.module(x).dtype == torch.float16
    assert {tensor.dtype for tensor in folded.module.state_dict().values()} == {torch.float16}


def test_bfloat16_needs_no_numpy() -> None:
    model = randomized(nn.Sequential(nn.Linear(4, 5), UnifiedNorm(5), nn.Linear(5, 3))).bfloat16()
    folded = fold(model, (x := sample(2, 4).bfloat16(),))
    assert folded.holds
    assert folded.certificate["affines"] == {"found": 1, "folded": 1, "left": 0}
    assert folded.certificate["samples"] == {"count": 2, "origin": "random samples, seed 0"}
    assert folded.module(x).dtype == torch.bfloat16


def test_a_padded_convolution_behind_another_keeps_the_batch_free() -> None:
    # Sixteen channels lie in channels-last order, where torch's pad reads a free batch as a number.
    layers = (nn.BatchNorm2d(3), nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 2, padding="same"))
    model = randomized(nn.Sequential(*layers)).double()
    folded = fold(model, (torch.randn(2, 3, 32, 32, dtype=torch.float64),))
    assert folded.certificate["affines"] == {"found": 1, "folded": 1, "left": 0}
    for batch in (1, 5):
        x = torch.randn(batch, 3, 32, 32, dtype=torch.float64)
        torch.testing.assert_close(folded.module(x), model(x))
