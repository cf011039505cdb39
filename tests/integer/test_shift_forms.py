"""Softmax and GELU by shifts: the bits of the published formulas on the codes in front, and what cannot be so."""

from __future__ import annotations

from collections.abc import Callable
from math import erfc, floor, sqrt
from pathlib import Path
from typing import Any

import pytest
import torch
from integer_module import Lowered, build, hold, hold_bits, lower, module, normal
from torch import Tensor, fx, nn
from torch.nn import functional as F

from normfuse.errors import UnsupportedModel
from normfuse.graph import ops, query
from normfuse.graph.quantization import requests
from normfuse.integer.gelu import best_bound
from normfuse.integer.octaves import octaves
from normfuse.integer.roles import is_given, is_masked
from normfuse.kernels.integer_ops import INT_MATMUL, LAMBDA_SHIFT_GELU, SHIFT_GELU, SHIFTMAX
from normfuse.kernels.reference import lambda_shift_gelu, shiftmax
from normfuse.kernels.reference.shift_exponential import shift_exponential
from normfuse.quant.integer_forms import GeluForm, SoftmaxForm
from normfuse.recipe import Recipe
from normfuse.testing import randomized, seeded

TOKENS, WIDTH, HEADS, INNER = 6, 7, 2, 4
SHIFTS = Recipe(integer_only=True, softmax=SoftmaxForm.SHIFTMAX)
LARGEST = 2**31 - 1

ROUNDED = 0.5 + 1e-6
"""Half a code, and what a multiplier of 31 bits is off by on 16-bit codes."""


def parts() -> dict[str, nn.Module]:
    return {**{name: nn.Linear(WIDTH, HEADS * INNER) for name in "qkv"}, "out": nn.Linear(HEADS * INNER, 5)}


def values(lowered: Lowered, *inputs: Tensor) -> dict[fx.Node, Tensor]:
    """Return what every node that ships makes, constants among them."""
    found = {node: query.constant(lowered.graph, node) for node in lowered.graph.nodes if query.is_constant(node)}

    def watch(node: fx.Node, value: Any) -> Any:
        found[node] = value
        return value

    lowered.graph.run_watched(inputs, watch)
    return found


def calls(lowered: Lowered, target: Any) -> list[fx.Node]:
    return [node for node in lowered.graph.nodes if query.is_call(node, target)]


def scale_of(lowered: Lowered, node: fx.Node) -> float:
    """Return what a step of a tensor's calibrated codes stands for, seen through views."""
    while node.name not in lowered.plan.activations:
        node = query.operand(node, 0)
    return float(lowered.plan.activations[node.name].scale)


def assert_published_attention(lowered: Lowered, *inputs: Tensor) -> None:
    """Check every softmax and every product behind it against the formulas, from the codes in front of them."""
    seen, products = values(lowered, *inputs), [node for node in lowered.plan.graph.nodes if of_attention(node)]
    assert products
    for product, node in zip(products, calls(lowered, SHIFTMAX), strict=True):
        scores, extra = scores_of(lowered, product, inputs)
        step, codes = scale_of(lowered, scores), seen[codes_in_front(node)]
        assert codes.dtype == torch.int8
        assert int(codes.abs().max()) <= 127
        added = torch.floor(extra / step + 0.5).clamp(-(2**30), 2**28).to(torch.int32)
        wanted = shiftmax(codes.to(torch.int32) + added, floor(-1 / step), 15, 127)
        assert torch.equal(seen[node], wanted)
        (weighted,) = [reader for reader in query.readers(node) if query.is_call(reader, INT_MATMUL)]
        v = seen[query.operand(weighted, 1)].double()
        exact = (wanted.double() @ v) * scale_of(lowered, query.operand(product, 1))
        params = lowered.plan.activations[rounded(product).name]
        exact = (exact / 128 / float(params.scale) + int(params.zero_point)).clamp(*weighted.args[-2:])  # type: ignore[arg-type]
        assert float((exact - seen[weighted]).abs().max()) <= ROUNDED


def of_attention(node: fx.Node) -> bool:
    return query.is_call(node, ops.MATMUL) and query.is_call(node.args[0], ops.SOFTMAX)


def rounded(product: fx.Node) -> fx.Node:
    """Return what is requested of a product: itself, or the clamp behind it."""
    reader = query.readers(product)[0]
    return reader if query.is_call(reader, ops.RELU) else product


def scores_of(lowered: Lowered, product: fx.Node, inputs: tuple[Tensor, ...]) -> tuple[fx.Node, Tensor]:
    """Return the float product of q and k, and what is added to it before softmax."""
    read, none = query.operand(query.operand(product, 0), 0), torch.zeros(())
    if not query.is_call(read, ops.ADD) and not is_masked(read):
        return query.operand(read, 0), none
    made = dict[str, Any]()
    lowered.plan.graph.run_watched(inputs, lambda node, value: made.setdefault(node.name, value))
    for node in lowered.plan.graph.nodes:
        if query.is_constant(node):
            made[node.name] = query.constant(lowered.plan.graph, node)
    if is_masked(read):
        closed = made[query.operand(read, 0).name].logical_not()
        # In steps of the scores: what masks is taken off codes, not off numbers.
        scores = query.operand(query.operand(read, 1), 0)
        return scores, closed * -(2.0**30) * scale_of(lowered, scores)
    (bias,) = [each for each in read.all_input_nodes if is_given(each)]
    (scores,) = [each for each in read.all_input_nodes if each is not bias]
    return query.operand(scores, 0), made[bias.name].double()


def codes_in_front(node: fx.Node) -> fx.Node:
    """Return the scores' 8-bit codes, behind what is added to them in 32 bits."""
    read = query.operand(node, 0)
    while query.is_call(read, ops.ADD, ops.ATEN._to_copy.default):
        read = query.operand(read, 0)
    return read


def heads(m: Any, x: Tensor, **options: Any) -> Tensor:
    q, k, v = (each(x).reshape(-1, TOKENS, HEADS, INNER).transpose(1, 2) for each in (m.q, m.k, m.v))
    return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2).reshape(-1, TOKENS, HEADS * INNER)


ATTENTION: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "whole": heads,
    "whole, with a scale": lambda m, x: heads(m, x, scale=0.3),
    "whole, with a bias": lambda m, x: heads(m, x, attn_mask=m.bias),
    "whole, with a boolean constant": lambda m, x: heads(m, x, attn_mask=torch.ones(TOKENS, TOKENS).tril() > 0),
    "spelled out": lambda m, x: (m.q(x) @ m.k(x).transpose(1, 2)).softmax(-1) @ m.v(x),
    "scaled": lambda m, x: ((m.q(x) @ m.k(x).transpose(1, 2)) / 2.7).softmax(-1) @ m.v(x),
    "with a bias": lambda m, x: ((m.q(x) @ m.k(x).transpose(1, 2)) / 2.7 + m.bias).softmax(-1) @ m.v(x),
    "a clamp behind it": lambda m, x: ((m.q(x) @ m.k(x).transpose(1, 2)).softmax(-1) @ m.v(x)).relu(),
}


@pytest.mark.slow
@pytest.mark.parametrize("function", ATTENTION.values(), ids=ATTENTION)
def test_shiftmax_between_two_products(function: Callable[[Any, Tensor], Tensor]) -> None:
    network = module(lambda m, x: m.out(function(m, x)), **parts(), bias=torch.zeros(TOKENS, TOKENS))
    lowered = lower(network, (TOKENS, WIDTH), recipe=SHIFTS)
    assert lowered.operators.count("shiftmax") == 1
    assert lowered.operators.count("int_matmul") == 2
    assert "int_attention" not in lowered.operators
    assert_published_attention(lowered, *hold_bits(lowered, (TOKENS, WIDTH)))
    assert_published_attention(lowered, *hold_bits(lowered, 3 * normal(4, TOKENS, WIDTH)))


class Masked(nn.Module):
    """Attention with a mask for every sample."""

    def __init__(self) -> None:
        super().__init__()
        for name, part in parts().items():
            setattr(self, name, part)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.out(heads(self, x, attn_mask=mask[:, None, None, :]))  # type: ignore[no-any-return, operator]


@pytest.mark.slow
def test_a_boolean_mask_that_comes_with_every_sample() -> None:
    mask = torch.arange(TOKENS) < torch.tensor([[2], [4], [TOKENS]])
    lowered = lower(randomized(Masked()), (TOKENS, WIDTH), mask.repeat(6, 1)[:16], recipe=SHIFTS)
    assert lowered.operators.count("shiftmax") == 1
    x = normal(3, TOKENS, WIDTH)
    assert_published_attention(lowered, *hold_bits(lowered, x, mask))
    other = torch.where(mask[:, :, None], x, -7 * x)
    (found,), (same,) = lowered.graph.run(x, mask), lowered.graph.run(other, mask)
    assert torch.equal(found[mask], same[mask])


@pytest.mark.slow
def test_rows_of_many_keys_are_not_cut() -> None:
    """Of 2,048 scores that are all but equal, each at |x0| 2^15, the sum would be cut and more than one be left."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(m.q(x), m.k(x), m.v(x), scale=0.01)

    layers = {name: nn.Linear(3, 2) for name in "qkv"}
    lowered = lower(module(forward, **layers), (2048, 3), count=2, is_written=False, recipe=SHIFTS)
    (node,) = calls(lowered, SHIFTMAX)
    x0, n = (int(each) for each in node.args[1:3])  # type: ignore[call-overload]
    assert 2048 * -x0 * 2**15 > LARGEST >= 2048 * -x0 * 2**n
    assert int(values(lowered, normal(1, 2048, 3))[node].sum(-1, dtype=torch.int64).max()) <= 128


@pytest.mark.parametrize(
    ("x0", "terms", "published", "wanted"),
    [
        *((-1, 1, 15, 15), (-13, 197, 15, 15), (-333, 197, 15, 14), (-100, 1024, 15, 14), (-(10**5), 1823, 15, 3)),
        *((-8, 1, 23, 23), (-255, 1, 23, 23), (-256, 1, 23, 22), (-76_000, 1, 23, 14)),
    ],
)
def test_fewer_octaves_where_a_sum_would_be_cut(x0: int, terms: int, published: int, wanted: int) -> None:
    assert octaves(x0, terms, published=published, where="layer") == wanted
    assert terms * -x0 * 2**wanted <= LARGEST
    assert wanted == published or terms * -x0 * 2 ** (wanted + 1) > LARGEST


def test_fewer_octaves_put_no_exponential_on_its_floor() -> None:
    for terms, published in ((1, 23), (1, 15), (7, 15), (129, 15), (1823, 15), (2048, 15)):
        for x0 in range(-70_000, 0, 7):
            n = octaves(x0, terms, published=published, where="layer")
            assert n == published or n * -x0 > 254 + 254 // 2 - 254 // 16


GELUS: dict[str, Callable[[Tensor], Tensor]] = {"erf": F.gelu, "tanh": lambda x: F.gelu(x, approximate="tanh")}


def by_form(form: GeluForm) -> Recipe:
    return Recipe(integer_only=True, gelu=form)


def lowered_gelu(form: GeluForm, function: Callable[[Tensor], Tensor]) -> Lowered:
    """A GELU whose result has 8 bits, and one whose result has 16."""

    def forward(m: Any, x: Tensor) -> tuple[Tensor, ...]:
        return m.down(function(m.up(x))), function(m.up(x) + 0.5)

    network = module(forward, up=nn.Linear(WIDTH, 12), down=nn.Linear(12, 5))
    return lower(network, (TOKENS, WIDTH), recipe=by_form(form))


def gelus(lowered: Lowered) -> list[fx.Node]:
    return [node for node in lowered.plan.graph.nodes if query.is_call(node, ops.GELU)]


@pytest.mark.parametrize("function", GELUS.values(), ids=GELUS)
def test_the_published_gelu(function: Callable[[Tensor], Tensor]) -> None:
    lowered = lowered_gelu(GeluForm.SHIFT, function)
    assert lowered.operators.count("shift_gelu") == 2
    assert "int_table" not in lowered.operators
    seen = values(lowered, *hold_bits(lowered, (TOKENS, WIDTH)))
    for node, made in zip(gelus(lowered), calls(lowered, SHIFT_GELU), strict=True):
        params = lowered.plan.activations[node.name]
        step, codes = scale_of(lowered, query.operand(query.operand(node, 0), 0)), seen[query.operand(made, 0)]
        assert codes.dtype == torch.int8
        x, x0 = codes.to(torch.int64), floor(-1 / (1.702 * step))
        largest = x.amax(-1, keepdim=True)
        own, other = (shift_exponential(each, x0, 23) for each in (x - largest, -largest))
        gate = own * (LARGEST // (own + other).clamp(max=LARGEST)) >> 24
        exact = (x * gate).double() * step / 128 / float(params.scale) + int(params.zero_point)
        exact = exact.clamp(params.type.minimum, params.type.maximum)
        assert float((exact - seen[made]).abs().max()) <= ROUNDED


@pytest.mark.parametrize("function", GELUS.values(), ids=GELUS)
def test_our_gelu_is_near_for_every_code(function: Callable[[Tensor], Tensor]) -> None:
    lowered = lowered_gelu(GeluForm.LAMBDA_SHIFT, function)
    assert lowered.operators.count("lambda_shift_gelu") == 2
    hold_bits(lowered, (TOKENS, WIDTH))
    for node, made in zip(gelus(lowered), calls(lowered, LAMBDA_SHIFT_GELU), strict=True):
        params = lowered.plan.activations[node.name]
        step = scale_of(lowered, query.operand(query.operand(node, 0), 0))
        x0, bound, *rest = (int(each) for each in made.args[1:])  # type: ignore[call-overload]
        assert x0 == -round(64 / (1.702 * step))
        codes = torch.arange(-127, 128)
        exact = function(codes.double() * step)

        def errors(bound: int) -> Tensor:
            found = lambda_shift_gelu(codes.to(torch.int8), x0, bound, *rest).double()  # noqa: B023 - called at once
            inside = (found > params.type.minimum) & (found < params.type.maximum)  # noqa: B023
            error = (found - int(params.zero_point)) * float(params.scale) - exact  # noqa: B023
            return torch.where(inside, error, 0.0)  # what is beyond the codes was chosen so

        # Beyond the bound x takes the place of x Phi(x); before it, the sigmoid's distance and the exponential's.
        limit = bound * step
        beyond = limit * erfc(limit / sqrt(2)) / 2
        assert float(errors(bound).abs().max()) <= max(beyond, 0.0203 + 0.01) + 0.5 * float(params.scale)
        assert float(errors(bound).square().sum()) == min(float(errors(each).square().sum()) for each in range(128))


def test_the_best_bound_is_the_best_of_all() -> None:
    inside, outside = torch.rand(2, 255, generator=seeded(3), dtype=torch.float64)
    magnitudes = torch.arange(-127, 128).abs()
    sums = [float(torch.where(magnitudes > bound, outside, inside).sum()) for bound in range(128)]
    assert best_bound(inside, outside) == sums.index(min(sums))
    assert best_bound(inside, inside + 1) == 127
    assert best_bound(inside + 1, inside) == 0


def test_other_functions_stay_tables() -> None:
    network = module(lambda m, x: F.silu(m.map(x)), map=nn.Linear(WIDTH, 5))
    for form in GeluForm:
        lowered = lower(network, (3, WIDTH), is_written=False, recipe=by_form(form))
        assert lowered.operators == ["int_linear_table"]
        hold(lowered, (3, WIDTH))


@pytest.mark.slow
@pytest.mark.parametrize("form", [GeluForm.SHIFT, GeluForm.LAMBDA_SHIFT])
def test_what_others_read_too_has_no_zero_point(form: GeluForm) -> None:
    """Zero is the smallest number that is read here, and would be the smallest code."""

    def forward(m: Any, x: Tensor) -> tuple[Tensor, ...]:
        wide = m.map(x).relu()
        pooled = F.max_pool2d(x.relu(), 2)
        return m.down(F.gelu(wide)), m.down(wide), F.gelu(wide) + wide, F.gelu(pooled)

    network = module(forward, map=nn.Linear(WIDTH, 6), down=nn.Linear(6, 5))
    lowered = lower(network, (TOKENS, WIDTH), recipe=by_form(form))
    hold_bits(lowered, (TOKENS, WIDTH))
    for request in requests(lowered.plan.graph):
        if any(query.is_call(reader, ops.GELU) for reader in request.readers):
            assert request.is_symmetric
            assert request.type.bits == 8


class Step(nn.Module):
    """A layer whose name is looked for."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


REFUSED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "a float mask": (lambda x: F.scaled_dot_product_attention(x, x, x, attn_mask=x[:, :, :4]), "spelled out"),
    "softmax of something else": (lambda x: x.softmax(-1), "aten.softmax.int has no integer form"),
    "tiny scores": (lambda x: (x @ (1e-9 * x).mT).softmax(-1) @ x, "a sum of exponentials by shifts"),
}


@pytest.mark.parametrize(("function", "said"), REFUSED.values(), ids=REFUSED)
def test_attention_that_has_no_shiftmax(function: Callable[[Tensor], Tensor], said: str, tmp_path: Path) -> None:
    network = module(lambda m, x: m.step(m.map(x)), map=nn.Linear(7, 6), step=Step(function))
    with pytest.raises(UnsupportedModel) as refusal:
        build(network, normal(9, 4, 7), path=tmp_path / "integers.onnx", recipe=SHIFTS)
    assert said in refusal.value.what
    assert refusal.value.where == "step"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", [GeluForm.SHIFT, GeluForm.LAMBDA_SHIFT])
def test_a_gelu_of_a_constant_for_any_batch(form: GeluForm) -> None:
    """It reads 8 bits of the constant, as products do."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.map(x) + m.step(m.learned.expand(x.shape[0], -1, -1))  # type: ignore[no-any-return]

    network = module(forward, map=nn.Linear(7, 5), step=Step(F.gelu), learned=torch.zeros(1, 4, 5))
    lowered = lower(network, (4, 7), recipe=by_form(form))
    assert form.value.replace("-", "_") in lowered.operators
    hold_bits(lowered, (4, 7))


@pytest.mark.parametrize("form", [GeluForm.SHIFT, GeluForm.LAMBDA_SHIFT])
def test_a_gelu_of_tiny_numbers(form: GeluForm, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"by shifts|lambda-shift-gelu") as refusal:
        build(
            module(lambda m, x: m.step(x), step=Step(F.gelu)),
            1e-9 * normal(9, 4, 7),
            path=tmp_path / "integers.onnx",
            recipe=by_form(form),
        )
    assert refusal.value.where == "step"
