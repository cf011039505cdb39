"""Operators without an integer form as their equals that have one: equal, and left alone where they are not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normfuse.graph import Graph, capture
from normfuse.passes.presets import CANONICAL
from normfuse.passes.respell_for_integers import RespellForIntegers
from normfuse.pipeline import Pipeline
from normfuse.testing import Golden, Small, check_pass_contract, distance, outputs, picture, randomized, sample

EXACT = 1e-12
TINY = 1e-7
"""A bound of a length that a vector of length one does not feel in float64: 1e-14 / 2."""

Function = Callable[[Any, Tensor], Any]


def respelled(function: Function, *shape: int, **parts: Any) -> tuple[nn.Module, Graph, Tensor]:
    model, x = randomized(Small(function, **parts).double()), sample(*shape)
    graph = capture(model, (x,))
    Pipeline(phases=(CANONICAL,)).run(graph)
    return model, graph, x


def squares(x: Tensor) -> Tensor:
    return (x * x).sum(-1, keepdim=True)


def length(x: Tensor, axis: int = -1) -> Tensor:
    return x.norm(dim=axis, keepdim=True)


LENGTHS: dict[str, Function] = {
    "normalize": lambda m, x: F.normalize(x, dim=-1, eps=TINY),
    "normalize, another axis": lambda m, x: F.normalize(x, dim=1, eps=TINY),
    "length": lambda m, x: x / length(x),
    "length of linalg": lambda m, x: x / torch.linalg.norm(x, dim=-1, keepdim=True),
    "vector length": lambda m, x: x / torch.linalg.vector_norm(x, dim=-1, keepdim=True),
    "an axis that comes back": lambda m, x: x / x.norm(dim=-1).unsqueeze(-1),
    "bounded": lambda m, x: x / length(x).clamp(min=TINY),
    "bounded by a tensor": lambda m, x: x / torch.maximum(length(x), torch.tensor(TINY, dtype=x.dtype)),
    "raised": lambda m, x: x / (length(x) + 1e-15),
    "squares": lambda m, x: x / squares(x).sqrt(),
    "squares, rsqrt": lambda m, x: x * torch.rsqrt(squares(x) + 0.3),
    "squares, turned around": lambda m, x: (x.square().sum(-1, keepdim=True) + 0.3) ** -0.5 * x,
    "squares, bounded": lambda m, x: x * squares(x).clamp_min(TINY**2).rsqrt(),
    "one over": lambda m, x: x * (1 / length(x)),
    "cosine": lambda m, x: F.cosine_similarity(x, x.flip(1) + 1, dim=-1, eps=TINY),
}


@pytest.mark.parametrize("function", LENGTHS.values(), ids=LENGTHS)
def test_vectors_of_length_one(function: Function) -> None:
    model, graph, x = respelled(function, 3, 7, 5)
    report = check_pass_contract(RespellForIntegers(), graph, (x,))
    RespellForIntegers().run(graph)
    assert report.applied["unit-length-is-rms"] in (1, 2)
    assert "norm.default" not in graph.text().replace("rms_norm.default", "")
    assert distance(graph.run(x), outputs(model, x)) < EXACT


@pytest.mark.parametrize("name", ["normalize", "length", "squares, rsqrt"])
def test_a_vector_of_zeros_stays_zeros(name: str) -> None:
    _, graph, x = respelled(LENGTHS[name], 3, 7, 5)
    RespellForIntegers().run(graph)
    assert not graph.run(torch.zeros_like(x))[0].any()


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_a_bound_is_not_felt_by_vectors_a_thousand_times_as_long(size: float) -> None:
    bound = size * 1e-3 / 1.001
    model, graph, x = respelled(lambda m, x: F.normalize(x, dim=-1, eps=min(bound, 1e-3)), 3, 7, 5)
    RespellForIntegers().run(graph)
    x = size * F.normalize(x, dim=-1)
    assert distance(graph.run(x), outputs(model, x)) < 0.51e-6


ORDINARY: dict[str, tuple[Function, tuple[int, ...], dict[str, Any]]] = {
    "convolution of one axis": (
        lambda m, x: m.conv(x),
        (3, 4, 11),
        {"conv": nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2)},
    ),
    "convolutions of one axis and a bound": (
        lambda m, x: m.two(m.one(x).relu()),
        (3, 4, 11),
        {"one": nn.Conv1d(4, 6, 3), "two": nn.Conv1d(6, 5, 1, bias=False)},
    ),
    "maximum along one axis": (
        lambda m, x: (F.max_pool1d(x, 3), F.max_pool1d(x, 4, stride=2, padding=2, ceil_mode=True)),
        (3, 4, 11),
        {},
    ),
    "maximum along one axis, spread": (lambda m, x: F.max_pool1d(x, 2, dilation=3), (3, 4, 11), {}),
    "windows": (lambda m, x: F.avg_pool2d(x, 3), (3, 4, 9, 7), {}),
    "windows that overlap": (lambda m, x: F.avg_pool2d(x, (3, 2), stride=(2, 1), padding=(1, 0)), (3, 4, 9, 7), {}),
    "windows that count no padding": (
        lambda m, x: F.avg_pool2d(x, 3, stride=2, padding=1, count_include_pad=False),
        (3, 4, 9, 7),
        {},
    ),
    "windows that are cut off": (lambda m, x: F.avg_pool2d(x, 3, stride=2, ceil_mode=True), (3, 4, 8, 6), {}),
    "windows cut off where nothing is": (lambda m, x: F.avg_pool2d(x, 3, 2, ceil_mode=True), (3, 4, 9, 7), {}),
    "windows cut off, padding not counted": (
        lambda m, x: F.avg_pool2d(x, 4, 3, 1, ceil_mode=True, count_include_pad=False),
        (3, 4, 8, 7),
        {},
    ),
    "sums of windows": (lambda m, x: F.avg_pool2d(x, 2, divisor_override=1), (3, 4, 8, 6), {}),
    "windows of one axis": (lambda m, x: F.avg_pool1d(x, 3, 2, 1), (3, 4, 11), {}),
    "windows of one axis, cut off": (lambda m, x: F.avg_pool1d(x, 3, 2, 1, True, False), (3, 4, 10), {}),
    "even parts": (lambda m, x: F.adaptive_avg_pool2d(x, (3, 1)), (3, 4, 9, 7), {}),
    "even parts of one axis": (lambda m, x: F.adaptive_avg_pool1d(x, 4), (3, 4, 8), {}),
    "norm over several axes": (lambda m, x: m.norm(x), (3, 4, 5, 6), {"norm": nn.LayerNorm((5, 6))}),
    "RMS norm over several axes": (lambda m, x: m.norm(x), (3, 5, 6), {"norm": nn.RMSNorm((5, 6), eps=0.1)}),
    "group norm": (lambda m, x: m.norm(x), (3, 6, 5, 4), {"norm": nn.GroupNorm(2, 6, eps=0.1)}),
    "instance norm": (lambda m, x: m.norm(x), (3, 6, 5, 4), {"norm": nn.InstanceNorm2d(6, affine=True)}),
    "instance norm without gamma": (lambda m, x: m.norm(x), (3, 6, 5), {"norm": nn.InstanceNorm1d(6)}),
    "bounds": (lambda m, x: (x.clamp(-0.5, 0.7), x.clamp_min(-0.3), x.clamp(max=0.2), x.clip(0)), (3, 5), {}),
    "bounds of bounds": (lambda m, x: F.relu(x + 1).clamp_max(1.3).clamp(0.2, 3.0), (3, 5), {}),
    "bounds by tensors": (
        lambda m, x: torch.minimum(torch.maximum(x, torch.zeros((), dtype=x.dtype)), torch.tensor([0.5]).to(x)),
        (3, 5),
        {},
    ),
    "powers": (lambda m, x: (x**2, x**3, x**4, x.square()), (3, 5), {}),
    "sums": (lambda m, x: (x.sum(-1), x.sum((1, 2), keepdim=True)), (3, 5, 4), {}),
    "gate": (lambda m, x: (F.glu(x), F.glu(x, 1)), (3, 6, 4), {}),
    "one slope": (lambda m, x: m.act(x), (3, 5, 4), {"act": nn.PReLU()}),
    "slopes": (lambda m, x: m.act(x), (3, 5, 4, 2), {"act": nn.PReLU(5)}),
    "batched product": (lambda m, x: torch.bmm(x, x.mT), (3, 5, 4), {}),
    "stack": (lambda m, x: (torch.stack((x, x + 1), 1), torch.stack((x, x), -1)), (3, 5, 4), {}),
    "shuffles": (lambda m, x: (F.pixel_shuffle(x, 2), F.pixel_unshuffle(x, 2)), (3, 8, 4, 6), {}),
    "reflection": (lambda m, x: F.pad(x, (1, 2, 0, 3), mode="reflect"), (3, 2, 5, 4), {}),
    "repeated borders": (lambda m, x: F.pad(x, (1, 2), mode="replicate"), (3, 2, 5), {}),
    "repetition of each": (lambda m, x: x.repeat_interleave(3, 1), (3, 2, 5), {}),
    "a scale per head": (lambda m, x: (x @ x.mT) * m.scale, (3, 2, 5, 4), {"scale": nn.Parameter(torch.ones(2, 1, 1))}),
    "causal attention": (
        lambda m, x: F.scaled_dot_product_attention(x, x[:, :4], x[:, :4], is_causal=True),
        (3, 5, 4),
        {},
    ),
    "what is made of constants": (
        lambda m, x: x + torch.meshgrid(m.table.sigmoid(), m.table[:4], indexing="ij")[0].flatten()[:5],
        (3, 5),
        {"table": nn.Parameter(torch.ones(6))},
    ),
}


@pytest.mark.parametrize(("function", "shape", "parts"), ORDINARY.values(), ids=ORDINARY)
def test_equal(function: Function, shape: tuple[int, ...], parts: dict[str, Any]) -> None:
    model, graph, x = respelled(function, *shape, **parts)
    assert check_pass_contract(RespellForIntegers(), graph, (x,)).changed
    RespellForIntegers().run(graph)
    assert distance(graph.run(x), outputs(model, x)) < EXACT


OTHER_LENGTHS: dict[str, tuple[Function, tuple[int, ...]]] = {
    "a length over two axes": (lambda m, x: x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True), (3, 5, 4)),
    "another length": (lambda m, x: F.normalize(x, p=1.0, dim=-1), (3, 5)),
    "the length of another tensor": (lambda m, x: x / length(x + 1), (3, 5)),
    "a bound that is felt": (lambda m, x: F.normalize(x, dim=-1, eps=0.1), (3, 5)),
    "much that is added": (lambda m, x: x / (length(x) + 1e-3), (3, 5)),
    "a length of samples": (lambda m, x: x / length(x, 0), (3, 5)),
}


@pytest.mark.parametrize(("function", "shape"), OTHER_LENGTHS.values(), ids=OTHER_LENGTHS)
def test_what_is_no_length_that_a_norm_divides_by(function: Function, shape: tuple[int, ...]) -> None:
    _, graph, _ = respelled(function, *shape)
    assert "unit-length-is-rms" not in RespellForIntegers().run(graph).applied


LEFT: dict[str, tuple[Function, tuple[int, ...]]] = {
    "uneven parts": (lambda m, x: F.adaptive_avg_pool2d(x, (2, 3)), (3, 4, 9, 7)),
    "a mean": (lambda m, x: F.adaptive_avg_pool2d(x, 1), (3, 4, 9, 7)),
    "roots": (lambda m, x: (x.abs() + 1).sqrt() + (x.abs() + 1) ** 0.5, (3, 5)),
    "bounds in the wrong order": (lambda m, x: x.clamp(1.0, -1.0), (3, 5)),
    "two variables": (lambda m, x: torch.maximum(x, x.flip(1)), (3, 5)),
    "a sum over samples": (lambda m, x: x.sum(0), (3, 5)),
    "repeated constants": (lambda m, x: torch.cat((m.token.expand(x.shape[0], -1), x), 1), (3, 5)),
}


@pytest.mark.parametrize(("function", "shape"), LEFT.values(), ids=LEFT)
def test_left_alone(function: Function, shape: tuple[int, ...]) -> None:
    _, graph, _ = respelled(function, *shape, token=nn.Parameter(torch.ones(1, 5)))
    before = graph.text()
    assert not RespellForIntegers().run(graph).changed
    assert graph.text() == before


def test_picture(golden: Golden) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = F.avg_pool2d(m.norm(m.conv(x)).clamp(0, 6), 2)
        return F.normalize(x.flatten(2), dim=1)

    _, graph, _ = respelled(forward, 3, 2, 6, 4, conv=nn.Conv2d(2, 4, 1), norm=nn.GroupNorm(2, 4))
    before = graph.text()
    RespellForIntegers().run(graph)
    assert picture(before, graph.text()) == golden
