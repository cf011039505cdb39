"""What moves codes about: views, class tokens, pooling by the largest, upsampling, look-ups."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from integer_module import hold, hold_all, lower, module
from torch import Tensor, nn
from torch.nn import functional as F

VIEWS: list[Any] = [
    lambda x: x[:, 1:, ::2],
    lambda x: x[:, 2],
    lambda x: x.permute(0, 2, 1),
    lambda x: x.reshape(-1, 2, 10),
    lambda x: x.flatten(1),
    lambda x: torch.roll(x, (1, -2), (1, 2)),
    lambda x: x.flip(1),
    lambda x: x[:, :, None].expand(-1, -1, 3, -1),
    lambda x: x.repeat(1, 2, 3),
    lambda x: x.unsqueeze(2),
    lambda x: x.index_select(1, torch.tensor([2, 0, 1, 1])),
    lambda x: torch.chunk(x, 2, dim=-1)[1],
    lambda x: torch.split(x, [1, 3], dim=1)[1],
    lambda x: torch.unbind(x, dim=1)[3],
]


@pytest.mark.slow
def test_views_move_codes() -> None:
    """16 bits at the end of the network, 8 in front of tables."""

    def forward(m: Any, x: Tensor) -> tuple[Tensor, ...]:
        x = m.map(x)
        narrow = [torch.tanh(view(torch.sigmoid(x))) for view in VIEWS]
        return *narrow, *(view(x) for view in VIEWS)

    lowered = hold_all(module(forward, map=nn.Linear(7, 5)), (4, 7))
    assert set(lowered.operators) == {"int_linear", "int_table", "requantize"}


def class_token(m: Any, x: Tensor) -> Tensor:
    x = torch.cat([m.token.expand(x.shape[0], -1, -1), m.map(x)], dim=1) + m.positions
    return m.head(x)  # type: ignore[no-any-return]


def with_class_token() -> nn.Module:
    tokens = {"token": torch.zeros(1, 1, 5), "positions": torch.zeros(1, 4, 5)}
    return module(class_token, map=nn.Linear(7, 5), head=nn.Linear(5, 2), **tokens)


def test_a_class_token_and_positions() -> None:
    lowered = hold_all(with_class_token(), (3, 7))
    assert "int_add" in lowered.operators
    hold(lowered, (3, 7), count=1)


def test_the_size_of_a_float_is_not_asked_for() -> None:
    """Behind its quantizer nothing reads an input, not even for the batch."""
    lowered = lower(with_class_token(), (3, 7))
    calls = [str(node.target) for node in lowered.graph.nodes if node.op == "call_function"]
    assert "normfuse.request.default" not in calls


POOLS: list[dict[str, Any]] = [
    {"kernel_size": 2},
    {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0)},
    {"kernel_size": 2, "stride": 2, "dilation": 2, "ceil_mode": True},
]


def test_pooling_by_the_largest() -> None:
    def forward(m: Any, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(m.two(F.max_pool2d(m.one(x), **options)) for options in POOLS)

    lowered = hold_all(module(forward, one=nn.Conv2d(2, 5, 1), two=nn.Conv2d(5, 3, 1)), (2, 6, 9))
    assert set(lowered.operators) == {"int_conv2d"}


def test_pooling_by_the_largest_of_16_bits() -> None:
    def forward(m: Any, x: Tensor) -> tuple[Tensor, ...]:
        x = F.max_pool2d(m.one(x), 3, 2, 1)
        return x, x.mean((2, 3)), x + m.two(x)

    hold_all(module(forward, one=nn.Conv2d(2, 5, 1), two=nn.Conv2d(5, 5, 1)), (2, 6, 9))


def test_padding_with_a_number() -> None:
    def forward(m: Any, x: Tensor) -> tuple[Tensor, ...]:
        x, other = m.one(x), m.one(x + 1).relu()
        wide = F.pad(x, (1, 2, 0, 3)), F.pad(x, (0, 1), value=0.3), F.pad(x.mean(2), (2, 1))
        return *wide, m.two(F.pad(other, (1, 0, 2, 1))), m.two(F.pad(other, (0, 2), value=0.7))

    hold_all(module(forward, one=nn.Conv2d(2, 3, 1), two=nn.Conv2d(3, 4, 2)), (2, 5, 7))


BILINEAR: list[dict[str, Any]] = [
    {"scale_factor": 2},
    {"size": (8, 13)},
    {"size": (8, 13), "align_corners": True},
    {"scale_factor": 1.7},
    {"scale_factor": 1.7, "align_corners": True},
    {"scale_factor": (1.7, 2.3), "recompute_scale_factor": True},
    {"size": (3, 4)},
    {"size": (1, 1), "align_corners": True},
]
NEAREST: list[dict[str, Any]] = [
    {"scale_factor": (2, 3)},
    {"size": (8, 13)},
    {"size": (3, 4)},
    # A place that falls on a pixel's border is decided by the last bit of a float32.
    *({"scale_factor": factor} for factor in (1.7, 1.1, 1.3, 2.9, 0.7, 7 / 3)),
]


@pytest.mark.slow
def test_bilinear_upsampling() -> None:
    def forward(m: Any, x: Tensor) -> tuple[Tensor, ...]:
        x, other = m.one(x), m.one(x + 1)
        wide = [F.interpolate(x, mode="bilinear", **options) for options in BILINEAR]
        return *wide, *(m.two(F.interpolate(other, mode="bilinear", **options)) for options in BILINEAR)

    lowered = hold_all(module(forward, one=nn.Conv2d(2, 3, 1), two=nn.Conv2d(3, 4, 1)), (2, 5, 7))
    assert lowered.operators.count("int_interpolate") == 4 * len(BILINEAR)


@pytest.mark.slow
def test_nearest_upsampling_takes_the_pixels_that_torch_takes() -> None:
    def forward(m: Any, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(F.interpolate(m.map(x), mode="nearest", **options) for options in NEAREST)

    assert "int_interpolate" not in hold_all(module(forward, map=nn.Conv2d(2, 3, 1)), (2, 29, 23)).operators


def test_word_vectors() -> None:
    tables: dict[str, Any] = {"words": nn.Embedding(11, 6), "positions": torch.zeros(5, 6)}
    network = module(lambda m, ids: m.head(m.words(ids) + m.positions), **tables, head=nn.Linear(6, 4))
    ids = torch.randint(0, 11, (16, 5), generator=torch.Generator().manual_seed(1))
    hold(lower(network, ids), ids.flip(0))
