"""Attention, whole and spelled out, with scales, biases and masks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from integer_module import computed_or_refused, hold, hold_all, lower, module, normal
from torch import Tensor, nn
from torch.nn import functional as F

from normfuse.errors import UnsupportedModel
from normfuse.graph import query
from normfuse.integer.attention import MASKED
from normfuse.testing import randomized

TOKENS, WIDTH, HEADS, INNER = 6, 7, 2, 4


def parts() -> dict[str, nn.Module]:
    return {**{name: nn.Linear(WIDTH, HEADS * INNER) for name in "qkv"}, "out": nn.Linear(HEADS * INNER, 5)}


def heads(m: Any, x: Tensor, **options: Any) -> Tensor:
    q, k, v = (each(x).reshape(-1, TOKENS, HEADS, INNER).transpose(1, 2) for each in (m.q, m.k, m.v))
    return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2).reshape(-1, TOKENS, HEADS * INNER)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"scale": 0.3},
    {"scale": 5.0},
    {"attn_mask": 2 * normal(TOKENS, TOKENS)},
    {"attn_mask": normal(HEADS, TOKENS, TOKENS), "scale": 0.8},
    {"attn_mask": torch.ones(TOKENS, TOKENS).tril() > 0},
    {"attn_mask": torch.full((TOKENS, TOKENS), -torch.inf).triu(3)},
    {"is_causal": True},
]


@pytest.mark.slow
@pytest.mark.parametrize("is_read", [True, False], ids=["8 bits", "16 bits"])
def test_whole_attention(is_read: bool) -> None:
    def forward(m: Any, x: Tensor) -> tuple[Tensor, ...]:
        found = [heads(m, x, **options) for options in OPTIONS]
        return tuple(m.out(each) if is_read else each for each in found)

    lowered = hold_all(module(forward, **parts()), (TOKENS, WIDTH))
    assert lowered.operators.count("int_attention") == len(OPTIONS)
    hold(lowered, 3 * normal(4, TOKENS, WIDTH))


def test_nothing_of_attention_is_written_between() -> None:
    lowered = hold_all(module(lambda m, x: m.out(heads(m, x)), **parts()), (TOKENS, WIDTH), is_written=False)
    assert lowered.operators == [*["int_linear"] * 3, "int_attention", "int_linear"]


class Masked(nn.Module):
    """Attention with a mask for every sample."""

    def __init__(self) -> None:
        super().__init__()
        for name, part in parts().items():
            setattr(self, name, part)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.out(heads(self, x, attn_mask=mask[:, None, None, :]))  # type: ignore[no-any-return, operator]


@pytest.mark.slow
@pytest.mark.parametrize("least", [1, TOKENS], ids=["padding", "no padding"])
def test_a_boolean_mask_that_comes_with_every_sample(least: int) -> None:
    lengths = torch.randint(least, TOKENS + 1, (16, 1), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(TOKENS) < lengths
    lowered = lower(randomized(Masked()), (TOKENS, WIDTH), mask)
    assert lowered.operators.count("int_attention") == 1
    for other in (mask, torch.arange(TOKENS) < 1 + torch.arange(5)[:, None], torch.ones(5, TOKENS) > 0):
        hold(lowered, (TOKENS, WIDTH), other)


def test_what_a_mask_leaves_out_is_not_seen() -> None:
    mask = torch.arange(TOKENS) < torch.tensor([[2], [4], [TOKENS]])
    lowered = lower(randomized(Masked()), (TOKENS, WIDTH), mask.repeat(6, 1)[:16], is_written=False)
    x = normal(3, TOKENS, WIDTH)
    other = torch.where(mask[:, :, None], x, -7 * x)
    (found,), (same,) = lowered.graph.run(x, mask), lowered.graph.run(other, mask)
    assert torch.equal(found[mask], same[mask])


SPELLED: list[Any] = [
    lambda m, x: (m.q(x) @ m.k(x).transpose(1, 2)).softmax(-1) @ m.v(x),
    lambda m, x: ((0.4 * m.q(x)) @ m.k(x).transpose(1, 2)).softmax(-1) @ m.v(x),
    lambda m, x: ((m.q(x) @ m.k(x).transpose(1, 2)) / 2.7).softmax(-1) @ m.v(x),
    lambda m, x: (m.q(x) @ m.k(x).transpose(1, 2) + m.bias).softmax(-1) @ m.v(x),
    lambda m, x: (m.bias + m.k(x) @ m.q(x).transpose(1, 2)).softmax(2) @ m.v(x),
    lambda m, x: ((m.q(x) @ m.k(x).transpose(1, 2)) / 2.7 + m.bias).softmax(-1) @ m.v(x),
    lambda m, x: ((m.q(x) @ m.k(x).transpose(1, 2)).softmax(-1) @ m.v(x)).relu(),
]


@pytest.mark.slow
def test_attention_that_is_spelled_out() -> None:
    def forward(m: Any, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(m.out(function(m, x)) for function in SPELLED)

    lowered = hold_all(module(forward, **parts(), bias=torch.zeros(TOKENS, TOKENS)), (TOKENS, WIDTH))
    assert lowered.operators.count("int_attention") == len(SPELLED)
    hold(lowered, 3 * normal(4, TOKENS, WIDTH))


def test_a_bias_made_of_constants_for_any_batch() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        bias = m.one.expand(x.shape[0], -1, -1) + m.two
        return m.out((m.q(x) @ m.k(x).transpose(1, 2) + bias).softmax(-1) @ m.v(x))  # type: ignore[no-any-return]

    biases = {"one": torch.zeros(1, TOKENS, TOKENS), "two": torch.zeros(TOKENS, TOKENS)}
    assert "int_add" not in hold_all(module(forward, **parts(), **biases), (TOKENS, WIDTH)).operators


PARTS = 7


def with_parts(m: Any, x: Tensor) -> Tensor:
    """Attention whose bias is a sum of constants, more of them than PART leaves room for."""
    bias = m.part_0.expand(x.shape[0], -1, -1)
    for index in range(1, PARTS):
        bias = bias + getattr(m, f"part_{index}")
    return m.out((m.q(x) @ m.k(x).transpose(1, 2) + bias).softmax(-1) @ m.v(x))  # type: ignore[no-any-return]


def of_parts(part: Callable[[int], Tensor]) -> nn.Module:
    held = {f"part_{index}": torch.zeros(TOKENS, TOKENS) for index in range(PARTS)}
    network = module(with_parts, **parts(), **held)
    with torch.no_grad():
        for index in range(PARTS):
            getattr(network, f"part_{index}").copy_(part(index))
    return network


BIASES: dict[str, Callable[[int], Tensor]] = {
    "numbers": lambda index: normal(TOKENS, TOKENS, seed=index),
    "all mask the same": lambda index: torch.full((TOKENS, TOKENS), -torch.inf).triu(2),
    "one masks": lambda index: torch.full((TOKENS, TOKENS), -1e9 if index == 3 else 0.0).triu(2),
}


@pytest.mark.parametrize("part", BIASES.values(), ids=BIASES)
def test_a_bias_of_many_parts(part: Callable[[int], Tensor]) -> None:
    """Their sum and the scores stay within 32 bits: masks are shorter where there are more of them."""
    lowered = hold_all(of_parts(part), (TOKENS, WIDTH), is_written=False)
    biases = [
        query.constant(lowered.graph, node)
        for node in lowered.graph.nodes
        if node.name.endswith("_codes") and "part" in node.name
    ]
    assert len(biases) == PARTS
    assert sum(float(each.double().abs().max()) for each in biases) <= MASKED


def test_a_mask_that_is_too_short_for_the_steps_of_scores() -> None:
    """Queries and keys of 10^-7: 2^28 steps of their products are no octave."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return heads(m, 1e-7 * x, attn_mask=torch.full((TOKENS, TOKENS), -torch.inf).triu(1))

    layers = parts()
    network = module(forward, **layers)
    with torch.no_grad():
        for name in "qk":
            layers[name].bias.zero_()  # type: ignore[union-attr, operator]
    with pytest.raises(UnsupportedModel, match="bias of scores"):
        lower(network, (TOKENS, WIDTH), is_written=False)


def test_more_keys_than_queries_and_other_widths() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(m.q(x)[:, :2], m.k(x), m.v(x))

    layers = {"q": nn.Linear(WIDTH, INNER), "k": nn.Linear(WIDTH, INNER), "v": nn.Linear(WIDTH, 5)}
    hold_all(module(forward, **layers), (11, WIDTH), is_written=False)


def test_an_input_that_attends_to_itself() -> None:
    hold_all(module(lambda m, x: m.out(F.scaled_dot_product_attention(x, x, x)), out=nn.Linear(WIDTH, 5)), (11, WIDTH))


def test_a_long_flat_row_loses_nothing() -> None:
    """Each of 300 weights is 1/300; 8 bits of the row's sum would leave nothing of it."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(m.q(x), m.k(x), m.v(x), scale=1e-4)

    layers = {name: nn.Linear(3, 2) for name in "qkv"}
    lowered, inputs = lower(module(forward, **layers), (300, 3), is_written=False), normal(5, 300, 3, seed=9)
    hold(lowered, inputs)
    (found,), (wanted,) = lowered.graph.run(inputs), lowered.plan.graph.run(inputs)
    assert (found - wanted).abs().max() < 0.05 * wanted.abs().max()


@pytest.mark.parametrize(("which", "is_whole"), [("q", True), ("k", False), ("v", True)])
def test_learned_queries_keys_and_values(which: str, is_whole: bool) -> None:
    """Pooling by attention asks with constants."""

    class Pooling(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if is_whole:
                return F.scaled_dot_product_attention(q, k, v)
            return (q @ k.transpose(1, 2)).softmax(-1) @ v

    def forward(m: Any, x: Tensor) -> Tensor:
        learned = m.learned.expand(x.shape[0], -1, -1)
        found = [learned if name == which else getattr(m, name)(x) for name in "qkv"]
        return m.out(m.pooling(*found))  # type: ignore[no-any-return]

    layers = {**{name: nn.Linear(WIDTH, INNER) for name in "qkv"}, "out": nn.Linear(INNER, 5)}
    network = module(forward, **layers, pooling=Pooling(), learned=torch.zeros(1, TOKENS, INNER))
    computed_or_refused(network, (TOKENS, WIDTH), where="pooling")
