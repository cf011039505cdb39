"""The account of a fold: which norms there were, what is left, what it is called and why it stays."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from normfuse import fold
from normfuse.testing import Small, randomized, seeded


def sample(*shape: int) -> Tensor:
    return torch.randn(shape, generator=seeded(9))


def test_what_has_no_layer_has_the_name_of_its_node() -> None:
    model = Small(lambda m, x: torch.tanh(torch.tanh(x) * 2.0 + m.shift), shift=nn.Parameter(torch.ones(5)))
    (left,) = fold(randomized(model), (sample(2, 5),)).certificate["left"]
    assert left["layer"] == left["node"] != ""


def test_norms_written_out_by_hand_are_norms_before() -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        y = m.f(x)
        y = y - y.mean(-1, keepdim=True)
        return m.g(y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-5))  # type: ignore[no-any-return]

    model = randomized(Small(function, f=nn.Linear(5, 7), g=nn.Linear(7, 3)))
    norms = fold(model, (sample(2, 5),)).certificate["norms"]
    assert norms == {"before": {"layer_norm": 1}, "after": {"rms_norm": 1}}


def test_a_norm_over_several_axes_stays_for_that() -> None:
    model = randomized(nn.Sequential(nn.Linear(5, 5), nn.LayerNorm((7, 5)), nn.Linear(5, 3)))
    left = fold(model, (sample(2, 7, 5),)).certificate["left"]
    assert ("norm", "several_axes") in {(each["what"], each["reason"]) for each in left}
