"""Linear maps and convolutions, with what they take in: ReLU, a sum, a table; products of two activations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from integer_module import computed_or_refused, hold, hold_all, lower, module, normal
from torch import Tensor, nn
from torch.nn import functional as F

from normfuse.integer.products import CODES
from normfuse.quant.dyadic import ACCUMULATOR

CONVOLUTIONS: list[dict[str, Any]] = [
    {"kernel_size": (3, 2)},
    {"kernel_size": (2, 3), "bias": False},
    {"kernel_size": 3, "stride": (2, 3)},
    {"kernel_size": (3, 5), "padding": (1, 2)},
    {"kernel_size": (2, 3), "dilation": (3, 2)},
    {"kernel_size": 3, "groups": 3},
    {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 2), "dilation": (1, 2), "groups": 3},
    {"kernel_size": (3, 5), "padding": "same"},
]
BOUNDS: list[Any] = [F.relu, F.relu6, F.hardtanh, lambda x: F.hardtanh(x, -0.3, 0.2)]
ENDS = [(-1.0, 0.0), (-1.0, 1e-4), (0.01, 0.7), (-1e-3, 1e-3)]


def test_linear() -> None:
    layers = {"one": nn.Linear(7, 5), "two": nn.Linear(7, 6, bias=False)}
    lowered = hold_all(module(lambda m, x: (m.one(x), m.two(x)), **layers), (3, 7))
    assert lowered.operators == ["int_linear"] * 2
    hold(lowered, 3 * normal(4, 3, 7))  # codes end


def test_linear_behind_a_zero_point() -> None:
    network = module(lambda m, x: m.two(m.one(x).relu()), one=nn.Linear(7, 11), two=nn.Linear(11, 5))
    lowered = hold_all(network, (3, 7))
    assert lowered.operators == ["int_linear"] * 2, "a ReLU is where codes end"
    assert lowered.plan.activations["relu"].zero_point == -128
    hold(lowered, normal(4, 3, 7) + 2)


def test_convolutions_behind_a_zero_point() -> None:
    def forward(m: Any, x: Tensor) -> tuple[Tensor, ...]:
        x = m.stem(x).relu()
        return tuple(each(x) for each in m.convolutions)

    convolutions = nn.ModuleList(nn.Conv2d(6, 9, **options) for options in CONVOLUTIONS)
    lowered = hold_all(module(forward, stem=nn.Conv2d(2, 6, 1), convolutions=convolutions), (2, 11, 8))
    assert lowered.operators == ["int_conv2d"] * (1 + len(CONVOLUTIONS))


def test_bounds_behind_products_are_where_their_codes_end() -> None:
    def forward(m: Any, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(m.head(bound(factor * m.conv(x))) for factor, bound in enumerate(BOUNDS, start=1))

    lowered = hold_all(module(forward, conv=nn.Conv2d(3, 5, (2, 3)), head=nn.Conv2d(5, 4, 1)), (3, 6, 7))
    assert lowered.operators.count("int_table") == 0
    hold(lowered, 3 * normal(4, 3, 6, 7))


def test_a_bound_behind_a_product_costs_nothing() -> None:
    network = module(lambda m, x: m.two(F.relu6(m.one(x))), one=nn.Conv2d(3, 5, (2, 3)), two=nn.Conv2d(5, 4, 1))
    assert hold_all(network, (3, 6, 7), is_written=False).operators == ["int_conv2d"] * 2


def test_bounds_of_16_bits() -> None:
    def forward(m: Any, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(F.hardtanh(each(x), *ends) for each, ends in zip(m.maps, ENDS, strict=True))

    lowered = hold_all(module(forward, maps=nn.ModuleList(nn.Linear(7, 5) for _ in ENDS)), (3, 7))
    assert lowered.operators == ["int_linear"] * len(ENDS)
    hold(lowered, 3 * normal(4, 3, 7))


@pytest.mark.parametrize("count", [1, 16])
def test_a_table_behind_a_bound_does_not_lose_it(count: int) -> None:
    """From few samples codes reach further than what was seen, here further than the bound."""
    parts = {"one": nn.Linear(7, 11), "two": nn.Linear(11, 5)}
    network = module(lambda m, x: m.two(F.gelu(F.hardtanh(m.one(x), -0.5, 0.3))), **parts)
    hold_all(network, (3, 7), count=count, is_written=False)


def test_a_table_is_part_of_the_linear_map_in_front_of_it() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.three(torch.tanh(m.two(F.gelu(m.one(x)))))  # type: ignore[no-any-return]

    layers = {"one": nn.Linear(7, 11), "two": nn.Linear(11, 6), "three": nn.Linear(6, 5)}
    lowered = hold_all(module(forward, **layers), (3, 7))
    assert lowered.operators == ["int_linear_table", "int_linear_table", "int_linear"]


def test_a_linear_map_that_others_read_keeps_its_table_apart() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.one(x)
        return m.two(F.gelu(h)) + m.two(torch.tanh(h))  # type: ignore[no-any-return]

    lowered = hold_all(module(forward, one=nn.Linear(7, 11), two=nn.Linear(11, 5)), (3, 7), is_written=False)
    assert lowered.operators.count("int_table") == 2
    assert "int_linear_table" not in lowered.operators


def test_convolution_plus_convolution_behind_relu() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = (m.two(m.one(x).relu()) + m.short(x)).relu()
        return m.head(x)  # type: ignore[no-any-return]

    convolutions = {"one": nn.Conv2d(3, 7, 3, 2, 1), "two": nn.Conv2d(7, 5, 3, 1, 1), "short": nn.Conv2d(3, 5, 1, 2)}
    lowered = hold_all(module(forward, **convolutions, head=nn.Conv2d(5, 2, (1, 4))), (3, 9, 8))
    assert lowered.operators.count("int_conv2d_add") == 1
    assert lowered.operators.count("int_conv2d") == 3
    assert "requantize" not in lowered.operators
    hold(lowered, 3 * normal(4, 3, 9, 8))


def test_an_input_plus_a_linear_map() -> None:
    network = module(lambda m, x: x + m.down(F.gelu(m.up(x))), up=nn.Linear(7, 11), down=nn.Linear(11, 7))
    lowered = hold_all(network, (3, 7))
    assert lowered.operators == ["requantize", "int_linear_table", "int_linear_add"], "x has 16 bits and 8"
    hold(lowered, 3 * normal(4, 3, 7))


def test_a_linear_map_plus_what_is_broadcast() -> None:
    network = module(lambda m, x: m.one(x) + m.two(x[:, :1]), one=nn.Linear(7, 5), two=nn.Linear(7, 5))
    assert sorted(hold_all(network, (3, 7)).operators) == ["int_linear", "int_linear_add"]


def test_a_linear_map_plus_a_constant() -> None:
    network = module(lambda m, x: m.table + m.map(x), map=nn.Linear(7, 5), table=torch.zeros(3, 5))
    assert hold_all(network, (3, 7)).operators == ["int_linear_add"]


def test_a_linear_map_plus_itself() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h: Tensor = m.map(x)
        return h + h

    hold_all(module(forward, map=nn.Linear(7, 5)), (3, 7), is_written=False)


def test_a_batch_norm_that_nothing_takes_in() -> None:
    """Scale and shift for every channel behind a stream that others read: pre-activation residual blocks."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        return m.conv(m.norm(x).relu()) + x  # type: ignore[no-any-return]

    parts = {"stem": nn.Conv2d(3, 5, 1), "norm": nn.BatchNorm2d(5), "conv": nn.Conv2d(5, 5, 3, padding=1)}
    lowered = hold_all(module(forward, **parts), (3, 8, 6))
    assert "requantize" in lowered.operators
    assert lowered.operators[-1] == "int_conv2d_add"


def test_products_of_two_activations() -> None:
    def forward(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        found = m.one(x).transpose(1, 2) @ m.two(x)
        return m.head(found.relu()), m.two(x) @ found.transpose(1, 2)

    layers = {"one": nn.Linear(7, 11), "two": nn.Linear(7, 5), "head": nn.Linear(5, 2)}
    assert hold_all(module(forward, **layers), (3, 7)).operators.count("int_matmul") == 2


def test_the_product_of_an_activation_with_itself() -> None:
    hold_all(module(lambda m, x: m.head(x @ x.transpose(1, 2)), head=nn.Linear(4, 3)), (4, 7))


CONSTANTS: dict[str, tuple[Any, dict[str, Tensor]]] = {
    "on the left": (lambda m, x: m.table @ m.map(x), {"table": torch.zeros(4, 3)}),
    "on the right, one for each of a batch of heads": (
        lambda m, x: m.map(x)[:, None] @ m.table,
        {"table": torch.zeros(2, 5, 4)},
    ),
}


@pytest.mark.parametrize(("function", "parts"), CONSTANTS.values(), ids=CONSTANTS)
def test_a_matrix_product_with_a_constant(function: Any, parts: dict[str, Tensor]) -> None:
    computed_or_refused(module(function, map=nn.Linear(7, 5), **parts), (3, 7), where="matmul")


class Generated(nn.Module):
    """A linear map whose weight is an activation."""

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight[0])


def test_a_linear_map_with_an_activation_as_its_weight() -> None:
    parts = {"one": nn.Linear(7, 5), "two": nn.Linear(7, 5), "generated": Generated()}
    network = module(lambda m, x: m.generated(m.one(x), m.two(x)), **parts)
    computed_or_refused(network, (3, 7), where="generated")


def test_the_longest_sums_that_are_allowed_are_exact() -> None:
    """131,000 products of the largest codes are 1 % below what 32 bits hold; a batch of all ones reaches it."""
    width = 131_000
    assert 0.97 * ACCUMULATOR < width * CODES * (CODES - 1) < ACCUMULATOR
    wide = nn.Linear(width, 2)
    with torch.no_grad():
        wide.weight.fill_(0.01)
        wide.weight[1].neg_()
    samples = normal(4, width).sign()
    samples[0] = 1.0
    samples[1] = -1.0
    lowered = lower(wide.eval(), samples)
    hold(lowered, samples)
    hold(lowered, 5 * samples)
