"""What every operator hands on, in numbers worked out by hand or by another formula."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normfuse.graph import Graph, capture, ops, query
from normfuse.graph.affine import Affine, write_affine
from normfuse.graph.edit import Editor
from normfuse.sensitivity.relevance import Relevance, relevance
from normfuse.testing import Small, randomized, seeded

EPS = torch.finfo(torch.float64).eps


class Several(Small):
    """``Small`` with several inputs."""

    def forward(self, *inputs: Tensor) -> Any:
        return self._function(self, *inputs)


def wide(*rows: object) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def captured(function: Callable[..., Any], *inputs: Tensor, **parts: nn.Module | Tensor) -> Graph:
    """The graph of a function of samples; these are one sample each."""
    return capture(Several(function, **parts), tuple(torch.stack([each, each]) for each in inputs))


def found_in(graph: Graph, inputs: tuple[Tensor, ...], given: Tensor) -> Relevance:
    one = [each[None] for each in inputs]
    return relevance(graph, one, target=lambda outputs: [given.reshape(outputs[0].shape)], keep=graph.inputs)


def shares(function: Callable[..., Any], *inputs: Tensor, given: Tensor, **parts: Any) -> list[Tensor]:
    """The relevance of the inputs, for one sample."""
    graph = captured(function, *inputs, **parts)
    found = found_in(graph, inputs, given)
    return [found.kept[node][0] for node in graph.inputs if node in found.kept]


def close(found: Tensor, expected: Tensor) -> None:
    """Equal but for the rounding of some ten operations on numbers about 1."""
    torch.testing.assert_close(found, expected, atol=16 * EPS, rtol=0)


X = wide(1.0, -2.0, 3.0)
GIVEN = wide(0.5, -0.25, 2.0)

HAND_ON: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "relu": lambda m, x: x.relu(),
    "gelu": lambda m, x: F.gelu(x),
    "softmax": lambda m, x: x.softmax(-1),
    "layer-norm": lambda m, x: F.layer_norm(x, (3,), m.v, m.v),
    "times-constant": lambda m, x: x * m.v,
    "over-constant": lambda m, x: x / m.v,
    "constant-over": lambda m, x: m.v / x,
    "minus": lambda m, x: -x,
    "times-number": lambda m, x: 3 * x,
    "number-less": lambda m, x: 3 - x,
    "plus-number": lambda m, x: x + 2,
    "plus-bias": lambda m, x: x + m.v,
    "bias-less": lambda m, x: m.v - x,
    "square": lambda m, x: x**2,
    "cast": lambda m, x: x.float().double(),
    "masked-by-itself": lambda m, x: x * (x > -5).double(),
}


@pytest.mark.parametrize("name", HAND_ON)
def test_all_is_handed_on(name: str) -> None:
    (found,) = shares(HAND_ON[name], X, given=GIVEN, v=wide(2.0, 0.5, -1.0))
    close(found, GIVEN)


def test_an_affine_hands_on() -> None:
    graph = captured(lambda m, x: x.relu(), X)
    (node,) = (node for node in graph.nodes if query.is_call(node, ops.RELU))
    write_affine(Editor(graph), node, graph.inputs[0], Affine(wide(2.0, 0.5, -1.0), wide(1.0, 1.0, 1.0), 1))
    close(found_in(graph, (X,), GIVEN).kept[graph.inputs[0]][0], GIVEN)


GRID = wide([1.0, 2.0, 3.0], [4.0, 5.0, 6.0])

MOVES: dict[str, tuple[Callable[[Any, Tensor], Any], Tensor]] = {
    "transpose": (lambda m, x: x.transpose(1, 2), GRID.T),
    "flip": (lambda m, x: x.flip(2), GRID.flip(1)),
    "roll": (lambda m, x: x.roll(1, 2), GRID.roll(1, 1)),
    "flatten": (lambda m, x: x.flatten(1), GRID.flatten()),
    "stack": (lambda m, x: torch.stack([x[:, 1], x[:, 0]], 1), GRID.flip(0)),
    "cat": (lambda m, x: torch.cat([x[:, :, 2:], x[:, :, :2]], 2), GRID.roll(1, 1)),
    "chunk": (lambda m, x: torch.cat(x.chunk(3, 2)[::-1], 2), GRID.flip(1)),
    "unbind": (lambda m, x: torch.stack(x.unbind(2)[::-1], 2), GRID.flip(1)),
    "pick": (lambda m, x: x.index_select(2, torch.tensor([2, 0, 1])), GRID.roll(1, 1)),
    "index": (lambda m, x: x[:, :, torch.tensor([2, 0, 1])], GRID.roll(1, 1)),
    "sort": (lambda m, x: x.sort(2, descending=True)[0], GRID.flip(1)),
}


@pytest.mark.parametrize("name", MOVES)
def test_elements_that_move_take_their_relevance_along(name: str) -> None:
    function, given = MOVES[name]
    (found,) = shares(function, GRID / 7, given=given)
    assert torch.equal(found, GRID)


FEWER_OR_MORE: dict[str, tuple[Callable[[Any, Tensor], Any], Tensor, Tensor]] = {
    "select": (lambda m, x: x[:, 1], wide(5.0), wide(0.0, 5.0, 0.0)),
    "slice": (lambda m, x: x[:, 1:], wide(5.0, 7.0), wide(0.0, 5.0, 7.0)),
    "one-part-read": (lambda m, x: torch.split(x, [1, 2], 1)[1], wide(5.0, 7.0), wide(0.0, 5.0, 7.0)),
    "pad": (lambda m, x: F.pad(x, (1, 0)), wide(4.0, 5.0, 6.0, 7.0), wide(5.0, 6.0, 7.0)),
    "expand": (lambda m, x: x[:, None].expand(-1, 2, -1), wide([1.0, 2.0, 3.0], [4.0, 5.0, 6.0]), wide(5.0, 7.0, 9.0)),
    "repeat": (lambda m, x: x.repeat(1, 2), wide(1.0, 2.0, 3.0, 4.0, 5.0, 6.0), wide(5.0, 7.0, 9.0)),
    "where": (lambda m, x: torch.where(x > 0, x, 0.5), wide(5.0, 6.0, 7.0), wide(5.0, 0.0, 7.0)),
    "fill": (lambda m, x: x.masked_fill(x < 0, 2.0), wide(5.0, 6.0, 7.0), wide(5.0, 0.0, 7.0)),
    "largest": (lambda m, x: x.amax(1), wide(5.0), wide(0.0, 0.0, 5.0)),
    "largest-with-place": (lambda m, x: x.max(1)[0], wide(5.0), wide(0.0, 0.0, 5.0)),
    "max-pool": (lambda m, x: F.max_pool1d(x[:, None], 2, 1), wide(5.0, 6.0), wide(5.0, 0.0, 6.0)),
    "mean": (lambda m, x: x.mean(1), wide(6.0), wide(3.0, -6.0, 9.0)),
    "sum": (lambda m, x: x.sum(1), wide(6.0), wide(3.0, -6.0, 9.0)),
    # (1 - 2, -2 + 3) / 2: of R the first two get -1 and 2 times 6, the last two -2 and 3 times 8.
    "average-pool": (lambda m, x: F.avg_pool1d(x[:, None], 2, 1), wide(6.0, 8.0), wide(-6.0, 12.0 - 16.0, 24.0)),
    "adaptive-pool": (lambda m, x: F.adaptive_avg_pool1d(x[:, None], 1), wide(6.0), wide(3.0, -6.0, 9.0)),
    "nearest": (
        lambda m, x: F.interpolate(x[:, None], scale_factor=2.0),
        wide(1.0, 2.0, 3.0, 4.0, 5.0, 6.0),
        wide(3.0, 7.0, 11.0),
    ),
}


@pytest.mark.parametrize("name", FEWER_OR_MORE)
def test_elements_that_are_left_or_come(name: str) -> None:
    function, given, expected = FEWER_OR_MORE[name]
    (found,) = shares(function, X, given=given)
    close(found, expected)


def test_a_mean_of_zero_goes_to_all_alike() -> None:
    """The mean of (2, -2, 0) is 0, the mean of (1, 2, 3) is not."""
    x = wide([2.0, -2.0, 0.0], [1.0, 2.0, 3.0])
    (found,) = shares(lambda m, x: x.mean(2), x, given=wide(6.0, 6.0))
    close(found, wide([2.0, 2.0, 2.0], [1.0, 2.0, 3.0]))


TWO: dict[str, tuple[Callable[[Any, Tensor, Tensor], Tensor], Tensor, Tensor, Tensor]] = {
    "gate": (lambda m, a, b: a * b.sigmoid(), wide(1.0, 2.0), wide(0.5, 1.0), wide(0.5, 1.0)),
    "broadcast-gate": (lambda m, a, b: a * b[:, :1], wide(1.0, 2.0), wide(0.5, 1.0), wide(1.5, 0.0)),
    "quotient": (lambda m, a, b: a / b, wide(1.0, 2.0), wide(1.0, 2.0), wide(0.0, 0.0)),
    # (3 - 1, 3 - 1): the first gets 3 of 2, the second -1 of 2 in every element: parts of 3/4 and 1/4.
    "difference": (lambda m, a, b: a - b, wide(1.0, 2.0), wide(0.75, 1.5), wide(0.25, 0.5)),
    # 3 + 2 * 1 in each: 3/5 and 2/5.
    "multiple": (lambda m, a, b: torch.add(a, b, alpha=2), wide(1.0, 2.0), wide(0.6, 1.2), wide(0.4, 0.8)),
    "joined": (lambda m, a, b: torch.cat([a, b], 1), wide(1.0, 2.0, 3.0, 4.0), wide(1.0, 2.0), wide(3.0, 4.0)),
    "chosen": (lambda m, a, b: torch.where(b > a, b, a), wide(1.0, 2.0), wide(1.0, 2.0), wide(0.0, 0.0)),
    "larger": (lambda m, a, b: torch.maximum(a, b), wide(1.0, 2.0), wide(1.0, 2.0), wide(0.0, 0.0)),
}


@pytest.mark.parametrize("name", TWO)
def test_two_activations(name: str) -> None:
    function, given, to_first, to_second = TWO[name]
    first, second = shares(function, wide(3.0, 3.0), wide(1.0, 1.0), given=given)
    close(first, to_first)
    close(second, to_second)


def test_a_table_of_positions_takes_its_part() -> None:
    """x = 1, table = 3 everywhere: a quarter and three quarters."""
    graph = captured(lambda m, x: x + m.table, torch.ones(2, 3).double(), table=torch.full((1, 2, 3), 3.0).double())
    found = found_in(graph, (torch.ones(2, 3).double(),), torch.full((2, 3), 1 / 6).double())
    close(found.kept[graph.inputs[0]][0], torch.full((2, 3), 1 / 24).double())
    close(found.absorbed, wide(0.75))
    close(found.conserved, wide(1.0))


def test_a_table_that_is_looked_up_takes_all() -> None:
    """Words [n, 4], the last one masked: what is read of a word comes from the table; the mask of integers is none."""

    def model(m: Any, words: Tensor) -> Any:
        scores = m.table(words) @ m.table(words).transpose(1, 2)
        mask = (1 - (words != 0).double()) * torch.finfo(torch.float64).min
        return m.head(((scores + mask[:, None]).softmax(-1) @ m.table(words)).mean(1))

    parts = {"table": nn.Embedding(5, 7), "head": nn.Linear(7, 3, bias=False)}
    parts = {name: randomized(part).double() for name, part in parts.items()}
    words = torch.tensor([[1, 2, 3, 0], [4, 1, 0, 0]])
    graph = capture(Several(model, **parts), (words,))
    found = relevance(graph, [words])
    torch.testing.assert_close(found.absorbed, found.conserved, atol=0, rtol=0)
    torch.testing.assert_close(found.conserved, wide(1.0, 1.0), atol=1e-12, rtol=0)
    looked_up = [node for node in graph.nodes if query.is_call(node, ops.EMBEDDING)]
    assert all(bool((found.absolute[node] > 0).all()) for node in looked_up)


PRODUCTS: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "matmul": lambda m, a, b: a @ b,
    "bmm": lambda m, a, b: torch.bmm(a, b),
    "einsum": lambda m, a, b: torch.einsum("nij,njk->nik", a, b),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_gives_both_a_half(name: str) -> None:
    """(1, 2) times columns (3, 1) and (2, 1): 5 and 4; S = (1/5, 1/2)."""
    first, second = shares(PRODUCTS[name], wide([1.0, 2.0]), wide([3.0, 2.0], [1.0, 1.0]), given=wide(1.0, 2.0))
    close(first, wide([(3 / 5 + 2 / 2) / 2, 2 * (1 / 5 + 1 / 2) / 2]))
    close(second, wide([3 / 10, 2 / 4], [2 / 10, 2 / 4]))


def test_a_product_with_itself_conserves() -> None:
    """(1, 2) (1, 2)^T = 5: 1 of it comes from the first element, 4 from the second."""
    (found,) = shares(lambda m, x: x @ x.transpose(1, 2), wide([1.0, 2.0]), given=wide(1.0))
    close(found, wide([0.2, 0.8]))


CONSTANT: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "linear": lambda m, x: F.linear(x, m.w, m.b),
    "right": lambda m, x: x @ m.w.T + m.b,
    "left": lambda m, x: (m.w @ x.transpose(1, 2)).transpose(1, 2) + m.b,
    "addmm": lambda m, x: torch.addmm(m.b, x[:, 0], m.w.T),
    "einsum": lambda m, x: torch.einsum("nti,oi->nto", x, m.w),
}


@pytest.mark.parametrize("name", CONSTANT)
def test_a_product_with_a_constant_is_a_linear_map(name: str) -> None:
    """x = (2, -1): 2 * 1 + -1 * -1 of 3; and 2 * 2 of 4, as -1 * 1 is negative."""
    x, weight = wide([2.0, -1.0]), wide([1.0, -1.0], [2.0, 1.0])
    (found,) = shares(CONSTANT[name], x, given=wide(0.5, 0.5), w=weight, b=wide(1.0, -1.0))
    close(found, wide([5 / 6, 1 / 6]))


CONVOLUTIONS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "plain": (nn.Conv2d(3, 4, 3), (3, 5, 6)),
    "padded": (nn.Conv2d(3, 4, 3, stride=2, padding=1), (3, 5, 6)),
    "same": (nn.Conv2d(3, 4, (3, 2), padding="same"), (3, 5, 6)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2, dilation=2), (4, 5, 6)),
    "depthwise": (nn.Conv1d(4, 4, 3, groups=4), (4, 7)),
    "three-axes": (nn.Conv3d(2, 3, 2), (2, 3, 4, 3)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (4, 3, 2)),
}


def by_dense_matrix(layer: nn.Module, x: Tensor, given: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The rule with the map written as one matrix: parts ``x - low`` and ``x - high``."""
    zero = layer(torch.zeros_like(x)).flatten()
    columns = [layer(unit.reshape(x.shape)).flatten() - zero for unit in torch.eye(x.numel(), dtype=x.dtype)]
    dense = torch.stack(columns, dim=1)  # [out, in]
    parts = (x - low).flatten() * dense.clamp(min=0) + (x - high).flatten() * dense.clamp(max=0)
    sums = parts.sum(dim=1, keepdim=True)
    shared = torch.where(sums == 0, 0, given.flatten()[:, None] * parts / sums)
    return shared.sum(dim=0).reshape(x.shape)


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("reads_image", [False, True])
@torch.no_grad()
def test_convolutions(name: str, reads_image: bool) -> None:
    """Behind other layers by what contributes positively; behind an image by how far pixels are from their bounds."""
    layer, shape = CONVOLUTIONS[name]
    layer = randomized(layer).double()
    x = torch.randn(2, *shape, generator=seeded(4), dtype=torch.float64)
    function: Callable[..., Tensor] = (lambda m, x: m.layer(x)) if reads_image else (lambda m, x: m.layer(x.tanh()))
    graph = capture(Several(function, layer=layer), (x,))
    (output,) = graph.run(x)
    given = torch.rand(output.shape, generator=seeded(5), dtype=torch.float64)
    found = relevance(graph, [x], target=lambda outputs: [given], keep=graph.inputs).kept[graph.inputs[0]]
    for at in range(2):
        read = x[at : at + 1] if reads_image else x[at : at + 1].tanh()
        low, high = (read.min(), read.max()) if reads_image else (read.clamp(min=0), read.clamp(max=0))
        low, high = (low, high) if reads_image else (high, low)  # x - x- = x+, x - x+ = x-
        expected = by_dense_matrix(layer, read, given[at], low, high)
        torch.testing.assert_close(found[at : at + 1], expected, atol=1000 * EPS, rtol=0)


def test_the_box_of_an_image() -> None:
    """Pixels (0, 1, 2, 4), weights (1, -1, 1, 1): contributions 0, (1 - 4) * -1, 2 and 4, of 9.

    The other image's are three times as large, and so are its bounds: its relevance is the same.
    """
    x = wide([0.0, 1.0], [2.0, 4.0])[None]
    layer = nn.Conv2d(1, 1, 2, dtype=torch.float64)
    layer.weight.data = wide([1.0, -1.0], [1.0, 1.0])[None, None]
    graph = captured(lambda m, x: m.layer(x), x, layer=layer)
    found = relevance(graph, [torch.stack([x, 3 * x])], target=lambda outputs: [torch.ones_like(outputs[0])])
    assert found.conserved.tolist() == pytest.approx([1.0, 1.0], abs=8 * EPS)
    close(found_in(graph, (x,), wide(9.0)).kept[graph.inputs[0]][0], wide([[0.0, 3.0], [2.0, 4.0]]))


def test_patches_that_a_linear_map_reads_are_an_image() -> None:
    x = wide([0.0, 1.0], [2.0, 4.0])[None]
    layer = nn.Linear(4, 1, dtype=torch.float64)
    layer.weight.data = wide([1.0, -1.0, 1.0, 1.0])
    (found,) = shares(lambda m, x: m.layer((x - 1).reshape(-1, 4)), x, given=wide(9.0), layer=layer)
    close(found, wide([[0.0, 3.0], [2.0, 4.0]]))


OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "causal": {"is_causal": True},
    "scaled": {"scale": 0.3},
    "booleans": {"attn_mask": torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [1, 1, 1, 1]]).bool()},
    "numbers": {"attn_mask": wide([1.0, 0.5, -1.0, -torch.inf], [0.0, 2.0, 1.0, 1.0], [-1.0, 1.0, 0.0, 0.5])},
}


def spelled_out(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Any:
    scale, mask = options.get("scale", q.shape[-1] ** -0.5), options.get("attn_mask")
    if options.get("is_causal"):
        mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
    scores = q @ k.transpose(-2, -1) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype is torch.bool else scores + mask
    return scores.softmax(-1) @ v


@pytest.mark.parametrize("name", OPTIONS)
def test_attention_is_what_its_parts_are(name: str) -> None:
    options = OPTIONS[name]
    q, k, v = (torch.randn(2, size, 5, generator=seeded(at), dtype=torch.float64) for at, size in enumerate((3, 4, 4)))
    given = torch.rand(2, 3, 5, generator=seeded(6), dtype=torch.float64)
    fused = captured(lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v, **options), q, k, v)
    parts = captured(lambda m, q, k, v: spelled_out(q, k, v, options), q, k, v)
    first, second = (found_in(graph, (q, k, v), given) for graph in (fused, parts))
    for one, other in zip(fused.inputs, parts.inputs, strict=True):
        torch.testing.assert_close(first.kept[one], second.kept[other], atol=0, rtol=1e4 * EPS)
    torch.testing.assert_close(first.absorbed, second.absorbed, atol=EPS, rtol=1e4 * EPS)
    torch.testing.assert_close(first.conserved, second.conserved, atol=0, rtol=1e4 * EPS)


def test_heads_that_share_keys_and_values() -> None:
    q = torch.randn(4, 3, 5, generator=seeded(0), dtype=torch.float64)
    k, v = (torch.randn(2, 6, 5, generator=seeded(at), dtype=torch.float64) for at in (1, 2))
    attend = partial(F.scaled_dot_product_attention, enable_gqa=True)
    shared = shares(lambda m, q, k, v: attend(q, k, v), q, k, v, given=torch.ones(4, 3, 5).double())
    each = [x.repeat_interleave(2, dim=0) for x in (k, v)]
    to_q, *to_each = shares(lambda m, q, k, v: spelled_out(q, k, v, {}), q, *each, given=torch.ones(4, 3, 5).double())
    summed = [to_q, *(x.reshape(2, 2, 6, 5).sum(dim=1) for x in to_each)]
    for one, other in zip(shared, summed, strict=True):
        torch.testing.assert_close(one, other, atol=1e4 * EPS, rtol=1e4 * EPS)


UNKNOWN: dict[str, tuple[Callable[[Any, Tensor], Any], Tensor, Tensor]] = {
    # Sums (1, -1, 2): R / y = (1, -1, 1/2), their sums from each on (1/2, -1/2, 1/2) times x.
    "cumsum": (lambda m, x: x.cumsum(1), wide(1.0, 1.0, 1.0), wide(0.5, 1.0, 1.5)),
    "no-gradient": (lambda m, x: x.sign(), wide(1.0, 2.0, 3.0), wide(2.0, 2.0, 2.0)),
    "length": (lambda m, x: torch.linalg.vector_norm(x, dim=1), wide(14.0), wide(1.0, 4.0, 9.0)),
    "with-places": (lambda m, x: x.median(1)[0], wide(4.0), wide(4.0, 0.0, 0.0)),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_operator_conserves_and_is_named(name: str) -> None:
    function, given, expected = UNKNOWN[name]
    graph = captured(function, X)
    found = found_in(graph, (X,), given)
    assert len(found.defaulted) == 1
    close(found.kept[graph.inputs[0]][0], expected)


@torch.library.custom_op("normfuse_tests::halved", mutates_args=())
def halved(x: Tensor) -> Tensor:
    return x / 2


@halved.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def test_an_operator_without_a_gradient_gives_all_elements_the_same() -> None:
    """And that sample by sample."""
    x = torch.rand(2, 4, generator=seeded(0), dtype=torch.float64)
    graph = capture(Several(lambda m, x: halved(x)), (x,))
    given = wide([1.0, 2.0, 3.0, 2.0], [0.0, 0.0, -4.0, 0.0])
    found = relevance(graph, [x], target=lambda outputs: [given], keep=graph.inputs)
    assert [str(node.target) for node in found.defaulted] == ["normfuse_tests.halved.default"]
    close(found.kept[graph.inputs[0]], wide([2.0] * 4, [-1.0] * 4))
