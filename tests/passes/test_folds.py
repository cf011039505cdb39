"""Every way a frozen norm stands in a model: folded, it is the same model, in float64 and in float32."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normfuse.graph import Graph, capture, query
from normfuse.graph.affine import AFFINE
from normfuse.nn import RepBN, UnifiedNorm
from normfuse.passes.presets import CANONICAL, FOLD, LOWER
from normfuse.pipeline import Pipeline
from normfuse.report import PassReport
from normfuse.testing import Small, distance, fold_tolerance, outputs, randomized, seeded

Function = Callable[[Any, Tensor], Any]
EXACT = 1e-10
"""Of the output's scale in float64: 5e5 rounding errors of eps; a near-dead channel amplifies by 300 at most."""


@dataclass(frozen=True)
class Case:
    """A model, its input, how many folds go each way or along the stream, and how many affines stay."""

    function: Function
    shape: tuple[int, ...]
    parts: Callable[[], dict[str, nn.Module | Tensor]]
    after: int = 0
    before: int = 0
    along: int = 0
    left: int = 0


def vector(*shape: int, seed: int = 3) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=seeded(seed)))


def statistic(size: int) -> Tensor:
    return torch.rand(size, generator=seeded(5)) + 0.2


def positive(size: int) -> nn.Parameter:
    # randomized() would make it negative, so variances that are parameters are given as exponents.
    return nn.Parameter(torch.zeros(size))


def folded(graph: Graph) -> list[PassReport]:
    return Pipeline(phases=(CANONICAL, FOLD)).run(graph)


def affines(graph: Graph) -> int:
    return sum(query.is_call(node, AFFINE) for node in graph.nodes)


CASES = {
    "bn1d on (B, C), behind a linear": Case(
        lambda m, x: m.n(m.f(x)), (4, 5), lambda: {"f": nn.Linear(5, 3), "n": nn.BatchNorm1d(3)}, after=1
    ),
    "bn1d on (B, C), before a linear": Case(
        lambda m, x: m.f(m.n(x)), (4, 5), lambda: {"f": nn.Linear(5, 3), "n": nn.BatchNorm1d(5)}, before=1
    ),
    "bn1d on (B, C, N), behind a conv": Case(
        lambda m, x: m.n(m.f(x)), (4, 5, 7), lambda: {"f": nn.Conv1d(5, 3, 2), "n": nn.BatchNorm1d(3)}, after=1
    ),
    "bn1d on (B, C, N), before a linear on N": Case(
        lambda m, x: m.f(m.n(x)), (4, 5, 7), lambda: {"f": nn.Linear(7, 3), "n": nn.BatchNorm1d(5)}, left=1
    ),
    "bn1d where N equals C, before a linear on N": Case(
        lambda m, x: m.f(m.n(x)), (4, 5, 5), lambda: {"f": nn.Linear(5, 3), "n": nn.BatchNorm1d(5)}, left=1
    ),
    "bn1d where N equals C, behind a linear": Case(
        lambda m, x: m.n(m.f(x)), (4, 3, 5), lambda: {"f": nn.Linear(5, 3), "n": nn.BatchNorm1d(3)}, left=1
    ),
    "bn1d on transposed (B, N, C), before a linear": Case(
        lambda m, x: m.f(m.n(x.transpose(1, 2)).transpose(1, 2)),
        (4, 7, 5),
        lambda: {"f": nn.Linear(5, 3), "n": nn.BatchNorm1d(5)},
        before=1,
    ),
    "bn1d on transposed (B, N, C), behind a linear": Case(
        lambda m, x: m.n(m.f(x).transpose(-1, -2)).mT,
        (4, 7, 5),
        lambda: {"f": nn.Linear(5, 3), "n": nn.BatchNorm1d(3)},
        after=1,
    ),
    "bn1d on (B, N, C) flattened to (B * N, C), where B * N equals C": Case(
        lambda m, x: m.f(m.n(x.reshape(-1, 6)).reshape(x.shape)),
        (2, 3, 6),
        lambda: {"f": nn.Linear(6, 5), "n": nn.BatchNorm1d(6)},
        before=1,
    ),
    "bn without gamma and beta": Case(
        lambda m, x: m.f(m.n(x)), (4, 5), lambda: {"f": nn.Linear(5, 3), "n": nn.BatchNorm1d(5, affine=False)}, before=1
    ),
    "bn2d behind a conv: stride, groups, dilation, padding": Case(
        lambda m, x: m.n(m.f(x)),
        (2, 6, 9, 8),
        lambda: {"f": nn.Conv2d(6, 4, 3, stride=2, groups=2, dilation=2, padding=1), "n": nn.BatchNorm2d(4)},
        after=1,
    ),
    "bn2d behind a conv with padding given as a word": Case(
        lambda m, x: m.n(m.f(x)),
        (2, 3, 6, 5),
        lambda: {"f": nn.Conv2d(3, 4, 3, padding="same", bias=False), "n": nn.BatchNorm2d(4)},
        after=1,
    ),
    "bn2d behind a conv padded more at the end": Case(
        lambda m, x: m.n(m.f(x)),
        (2, 3, 6, 5),
        lambda: {"f": nn.Conv2d(3, 4, (3, 4), padding="same"), "n": nn.BatchNorm2d(4)},
        after=1,
    ),
    "bn2d before a conv padded more at the end": Case(
        lambda m, x: m.f(m.n(x)),
        (2, 3, 6, 5),
        lambda: {"f": nn.Conv2d(3, 4, (3, 4), padding="same"), "n": nn.BatchNorm2d(3)},
        left=1,
    ),
    "bn2d behind a conv with reflected padding": Case(
        lambda m, x: m.n(m.f(x)),
        (2, 3, 6, 5),
        lambda: {"f": nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), "n": nn.BatchNorm2d(4)},
        after=1,
    ),
    "bn2d before a conv: stride and dilation": Case(
        lambda m, x: m.f(m.n(x)),
        (2, 3, 9, 8),
        lambda: {"f": nn.Conv2d(3, 4, (3, 2), stride=2, dilation=(2, 1)), "n": nn.BatchNorm2d(3)},
        before=1,
    ),
    "bn2d before a grouped conv": Case(
        lambda m, x: m.f(m.n(x)),
        (2, 6, 5, 4),
        lambda: {"f": nn.Conv2d(6, 9, 3, groups=3), "n": nn.BatchNorm2d(6)},
        before=1,
    ),
    "bn2d before a depthwise conv": Case(
        lambda m, x: m.f(m.n(x)),
        (2, 5, 6, 4),
        lambda: {"f": nn.Conv2d(5, 10, 3, groups=5, bias=False), "n": nn.BatchNorm2d(5)},
        before=1,
    ),
    "bn2d behind a depthwise conv": Case(
        lambda m, x: m.n(m.f(x)),
        (2, 5, 6, 4),
        lambda: {"f": nn.Conv2d(5, 5, 3, groups=5, padding=1), "n": nn.BatchNorm2d(5)},
        after=1,
    ),
    "bn2d before a padded conv": Case(
        lambda m, x: m.f(m.n(x)),
        (2, 3, 6, 5),
        lambda: {"f": nn.Conv2d(3, 4, 3, padding=1), "n": nn.BatchNorm2d(3)},
        before=1,
    ),
    "bn2d before a conv padded by a word": Case(
        lambda m, x: m.f(m.n(x)),
        (2, 3, 6, 5),
        lambda: {"f": nn.Conv2d(3, 4, 3, padding="same"), "n": nn.BatchNorm2d(3)},
        before=1,
    ),
    "bn2d before a conv padded by a word that means nothing": Case(
        lambda m, x: m.f(m.n(x)),
        (2, 3, 6, 5),
        lambda: {"f": nn.Conv2d(3, 4, 3, padding="valid"), "n": nn.BatchNorm2d(3)},
        before=1,
    ),
    "a scale without shift before a padded conv": Case(
        lambda m, x: m.f(x * m.s),
        (2, 3, 6, 5),
        lambda: {"f": nn.Conv2d(3, 4, 3, padding=1), "s": vector(3, 1, 1)},
        before=1,
    ),
    "bn3d between convs": Case(
        lambda m, x: m.g(m.n(m.f(x))),
        (2, 2, 4, 5, 3),
        lambda: {"f": nn.Conv3d(2, 4, 2), "n": nn.BatchNorm3d(4), "g": nn.Conv3d(4, 3, 1)},
        after=1,
    ),
    "bn2d before a transposed conv": Case(
        lambda m, x: m.f(m.n(x)),
        (2, 3, 4, 5),
        lambda: {"f": nn.ConvTranspose2d(3, 4, 2), "n": nn.BatchNorm2d(3)},
        before=1,
    ),
    "bn2d behind a transposed conv": Case(
        lambda m, x: m.n(m.f(x)),
        (2, 3, 4, 5),
        lambda: {"f": nn.ConvTranspose2d(3, 4, 2), "n": nn.BatchNorm2d(4)},
        after=1,
    ),
    "un, scale first": Case(
        lambda m, x: m.f(x * (m.w / torch.sqrt(m.v + 1e-5)) + m.b),
        (4, 7, 5),
        lambda: {"f": nn.Linear(5, 3), "w": vector(5), "b": vector(5, seed=4), "v": statistic(5)},
        before=1,
    ),
    "un, quotient first": Case(
        lambda m, x: m.f(x / torch.sqrt(m.v + 1e-5) * m.w + m.b),
        (4, 7, 5),
        lambda: {"f": nn.Linear(5, 3), "w": vector(5), "b": vector(5, seed=4), "v": statistic(5)},
        before=1,
    ),
    "un by its class, behind and before": Case(
        lambda m, x: m.g(torch.relu(m.n(m.f(m.n2(x))))),
        (4, 7, 5),
        lambda: {"f": nn.Linear(5, 3), "n": UnifiedNorm(3), "n2": UnifiedNorm(5), "g": nn.Linear(3, 2)},
        after=1,
        before=1,
    ),
    "repbn behind a conv with bias": Case(
        lambda m, x: m.n(m.f(x).flatten(2).transpose(1, 2)),
        (2, 3, 6, 4),
        lambda: {"f": nn.Conv2d(3, 5, 2, stride=2), "n": RepBN(5)},
        after=1,
    ),
    "repbn before q, k and v": Case(
        lambda m, x: m.q(y := m.n(x)) * m.k(y) + m.v(y),
        (2, 7, 5),
        lambda: {"n": RepBN(5), "q": nn.Linear(5, 3), "k": nn.Linear(5, 3, bias=False), "v": nn.Linear(5, 3)},
        before=1,
    ),
    "layer scale behind a linear, with a residual": Case(
        lambda m, x: x + m.s * m.f(x), (2, 7, 5), lambda: {"f": nn.Linear(5, 5), "s": vector(5)}, after=1
    ),
    "layer scale of a conv, (C, 1, 1)": Case(
        lambda m, x: x + m.f(x) * m.s,
        (2, 3, 5, 4),
        lambda: {"f": nn.Conv2d(3, 3, 3, padding=1), "s": vector(3, 1, 1)},
        after=1,
    ),
    "input mean and std before a patch convolution": Case(
        lambda m, x: m.f((x - m.mean) / m.std),
        (2, 3, 8, 4),
        lambda: {"f": nn.Conv2d(3, 5, 4, stride=4), "mean": vector(1, 3, 1, 1), "std": statistic(3).view(3, 1, 1)},
        before=1,
    ),
    "pixels to [-1, 1] before a padded convolution": Case(
        lambda m, x: m.f(x / 127.5 - 1.0), (2, 3, 6, 5), lambda: {"f": nn.Conv2d(3, 4, 3, padding=1)}, before=1
    ),
    "layer norm before q, k and v": Case(
        lambda m, x: torch.softmax(m.q(y := m.n(x)) @ m.k(y).mT, -1) @ m.v(y),
        (2, 7, 5),
        lambda: {"n": nn.LayerNorm(5), "q": nn.Linear(5, 3), "k": nn.Linear(5, 3), "v": nn.Linear(5, 3)},
        before=1,
    ),
    "layer norm without beta": Case(
        lambda m, x: m.f(m.n(x)), (2, 7, 5), lambda: {"n": nn.LayerNorm(5, bias=False), "f": nn.Linear(5, 3)}, before=1
    ),
    "layer norm over two axes": Case(
        lambda m, x: m.f(m.n(x)), (2, 7, 5), lambda: {"n": nn.LayerNorm((7, 5)), "f": nn.Linear(5, 3)}
    ),
    "final norm, token, head": Case(
        lambda m, x: m.f(m.n(x)[:, 0]), (2, 7, 5), lambda: {"n": nn.LayerNorm(5), "f": nn.Linear(5, 3)}, before=1
    ),
    "final norm, every second token from the second, head": Case(
        lambda m, x: m.f(m.n(x)[:, 1::2]), (2, 7, 5), lambda: {"n": UnifiedNorm(5), "f": nn.Linear(5, 3)}, before=1
    ),
    "final norm, mean pooling, head": Case(
        lambda m, x: m.f(m.n(x).mean(1)), (2, 7, 5), lambda: {"n": UnifiedNorm(5), "f": nn.Linear(5, 3)}, before=1
    ),
    "final norm on images, mean of negative axes, head": Case(
        lambda m, x: m.f(m.n(x).mean((-2, -1))),
        (2, 5, 3, 4),
        lambda: {"n": nn.BatchNorm2d(5), "f": nn.Linear(5, 3)},
        before=1,
    ),
    "final norm on images, mean keeping axes, flatten, head": Case(
        lambda m, x: m.f(m.n(x).mean((2, 3), keepdim=True).flatten(1)),
        (2, 5, 3, 4),
        lambda: {"n": nn.BatchNorm2d(5), "f": nn.Linear(5, 3)},
        before=1,
    ),
    "a channel selected, then a linear over the tokens": Case(
        lambda m, x: m.f(m.n(x)[..., 1]), (2, 7, 5), lambda: {"n": UnifiedNorm(5), "f": nn.Linear(7, 3)}, before=1
    ),
    "half of the channels, then a linear": Case(
        lambda m, x: m.f(m.n(x)[..., :3]), (2, 7, 5), lambda: {"n": UnifiedNorm(5), "f": nn.Linear(3, 2)}, before=1
    ),
    "mean over the channels": Case(
        lambda m, x: m.f(m.n(x).mean(-1)), (2, 7, 5), lambda: {"n": UnifiedNorm(5), "f": nn.Linear(7, 3)}, left=1
    ),
    "heads split behind the linear, scale per head width": Case(
        lambda m, x: (m.f(x).unflatten(-1, (2, 3)) * m.s).flatten(-2),
        (2, 7, 5),
        lambda: {"f": nn.Linear(5, 6), "s": vector(3)},
        after=1,
    ),
    "conv, flatten, transpose, norm": Case(
        lambda m, x: m.n(m.f(x).flatten(2).transpose(1, 2)),
        (2, 3, 6, 4),
        lambda: {"f": nn.Conv2d(3, 5, 2, stride=2, bias=False), "n": UnifiedNorm(5)},
        after=1,
    ),
    "conv, flatten, transpose, norm, where the tokens are as many as the channels": Case(
        lambda m, x: m.n(m.f(x).flatten(2).transpose(1, 2)),
        (2, 3, 6, 4),
        lambda: {"f": nn.Conv2d(3, 6, 2, stride=2, bias=False), "n": UnifiedNorm(6)},
        after=1,
    ),
    "the norm is an output too": Case(
        lambda m, x: (y := m.n(x), m.f(y)),
        (4, 5),
        lambda: {"n": nn.BatchNorm1d(5), "f": nn.Linear(5, 3)},
        before=1,
        left=1,
    ),
    "the linear before the norm is an output too": Case(
        lambda m, x: (y := m.f(x), m.n(y)), (4, 5), lambda: {"f": nn.Linear(5, 3), "n": nn.BatchNorm1d(3)}, left=1
    ),
    "a view of the norm is an output": Case(
        lambda m, x: (y := m.n(x), m.f(y), y.mT)[1:],
        (2, 7, 5),
        lambda: {"n": UnifiedNorm(5), "f": nn.Linear(5, 3)},
        before=1,
        left=1,
    ),
    "the stream reads the norm": Case(
        lambda m, x: (y := m.n(x)) + m.f(y).relu(),
        (2, 7, 5),
        lambda: {"n": UnifiedNorm(5), "f": nn.Linear(5, 5)},
        before=1,
        left=1,
    ),
    "pre-norm residual block": Case(
        lambda m, x: x + m.g(torch.relu(m.f(m.n(x)))),
        (2, 7, 5),
        lambda: {"n": UnifiedNorm(5), "f": nn.Linear(5, 9), "g": nn.Linear(9, 5)},
        before=1,
    ),
    "one weight behind the norm and elsewhere": Case(
        lambda m, x: m.f(m.n(x)) * m.f(x), (4, 5), lambda: {"n": nn.BatchNorm1d(5), "f": nn.Linear(5, 3)}, before=1
    ),
    "one weight before the norm and elsewhere": Case(
        lambda m, x: m.n(m.f(x)) * m.f(-x),
        (4, 5),
        lambda: {"f": nn.Linear(5, 3), "n": nn.BatchNorm1d(3)},
        after=1,
        before=1,
    ),
    "one weight behind two norms": Case(
        lambda m, x: m.f(m.n(x)) * m.f(m.n2(x)),
        (4, 5),
        lambda: {"n": nn.BatchNorm1d(5), "n2": UnifiedNorm(5), "f": nn.Linear(5, 3)},
        before=2,
    ),
    "one weight twice behind one norm": Case(
        lambda m, x: m.f(y := m.n(x)) * m.f(y.relu() - y.relu() + y),
        (4, 5),
        lambda: {"n": nn.BatchNorm1d(5), "f": nn.Linear(5, 3)},
        before=1,
        left=1,
    ),
    "one weight reads a norm and its transposed self": Case(
        lambda m, x: m.f(y := m.n(x)) * m.f(y[:, ::2].mean(1, keepdim=True)),
        (2, 7, 5),
        lambda: {"n": UnifiedNorm(5), "f": nn.Linear(5, 3)},
        before=1,
    ),
    "one layer reads twice": Case(
        lambda m, x: nn.functional.linear(y := m.n(x), y), (4, 5), lambda: {"n": nn.BatchNorm1d(5)}, left=1
    ),
    "the norm times itself": Case(lambda m, x: (y := m.n(x)) @ y.mT, (4, 5), lambda: {"n": nn.BatchNorm1d(5)}, left=1),
    "zero and negative scales": Case(
        lambda m, x: m.g(x * torch.tensor([0.0, -1.0, 2.0, 0.0, -0.5], dtype=x.dtype)),
        (4, 5),
        lambda: {"g": nn.Linear(5, 3)},
        before=1,
    ),
    "one over the root of the width, into q": Case(
        lambda m, x: (m.q(x) * 3**-0.5) @ m.k(x).mT,
        (2, 7, 5),
        lambda: {"q": nn.Linear(5, 3), "k": nn.Linear(5, 3)},
        after=1,
    ),
    "the scores divided by the root of the width": Case(
        lambda m, x: m.q(x) @ m.k(x).mT / 3**0.5,
        (2, 7, 5),
        lambda: {"q": nn.Linear(5, 3), "k": nn.Linear(5, 3)},
        after=1,
    ),
    "a uniform scale into q, through the heads": Case(
        lambda m, x: (m.q(x).unflatten(-1, (2, 3)).transpose(1, 2) * 3**-0.5).mT,
        (2, 7, 5),
        lambda: {"q": nn.Linear(5, 6)},
        after=1,
    ),
    "constants of every rank": Case(
        lambda m, x: m.f(((x * m.a + m.b) * m.c - m.d) / m.e),
        (2, 7, 5),
        lambda: {
            "f": nn.Linear(5, 3),
            **{"a": vector(5), "b": vector(1, 5, seed=4), "c": vector(1, 1, 5), "d": vector(1), "e": vector(1, 1, 1)},
        },
        before=1,
    ),
    "constants along the tokens": Case(
        lambda m, x: m.f(x * m.t + m.u),
        (2, 5, 5),
        lambda: {"f": nn.Linear(5, 3), "t": vector(5, 1), "u": vector(1, 5, 1, seed=4)},
        left=1,
    ),
    "a constant that makes the tensor larger": Case(
        lambda m, x: m.f(x * m.s), (2, 7, 1), lambda: {"f": nn.Linear(5, 3), "s": vector(5)}
    ),
    "a constant of more axes than the tensor": Case(
        lambda m, x: m.f(x * m.s), (2, 5), lambda: {"f": nn.Linear(5, 3), "s": vector(1, 1, 5)}
    ),
    "alpha in sums and differences": Case(
        lambda m, x: m.f(torch.sub(torch.add(x, m.a, alpha=2), m.b, alpha=-3)),
        (2, 7, 5),
        lambda: {"f": nn.Linear(5, 3), "a": vector(5), "b": vector(5, seed=4)},
    ),
    "a constant minus the tensor": Case(
        lambda m, x: m.f(m.a - x) + m.f(1 - x) + m.f(-x),
        (2, 7, 5),
        lambda: {"f": nn.Linear(5, 3), "a": vector(5)},
        before=3,
    ),
    "a constant over the tensor": Case(
        lambda m, x: m.f(m.a / (x * x + 1)), (2, 7, 5), lambda: {"f": nn.Linear(5, 3), "a": vector(5)}, left=1
    ),
    "chains on both sides of views": Case(
        lambda m, x: m.f((m.n(x.mT) * m.s).mT + m.a),
        (2, 7, 5),
        lambda: {"n": nn.BatchNorm1d(5), "s": vector(5, 1), "a": vector(5, seed=4), "f": nn.Linear(5, 3)},
        before=1,
    ),
    "chains along two axes": Case(
        lambda m, x: m.f(x * m.c * m.t),
        (2, 7, 5),
        lambda: {"f": nn.Linear(5, 3), "c": vector(5), "t": vector(7, 1)},
        left=2,
    ),
    "one channel": Case(
        lambda m, x: m.f(m.n(x)), (2, 1, 5), lambda: {"n": nn.BatchNorm1d(1), "f": nn.Linear(5, 3)}, before=1
    ),
    "the product written as matmul": Case(
        lambda m, x: m.n(x) @ m.w, (4, 5), lambda: {"n": nn.BatchNorm1d(5), "w": vector(5, 3)}, before=1
    ),
    "the product with a transposed matrix": Case(
        lambda m, x: m.n(x) @ m.w.T, (4, 5), lambda: {"n": nn.BatchNorm1d(5), "w": vector(3, 5)}, before=1
    ),
    "the product with a matrix repeated": Case(
        lambda m, x: m.n(x) @ m.w.T.expand(x.shape[0], 7, 3),
        (4, 5, 7),
        lambda: {"n": nn.LayerNorm(7), "w": vector(3, 7)},
        before=1,
    ),
    "the product written as einsum": Case(
        lambda m, x: m.n(torch.einsum("bcn,oc->bon", x, m.w)),
        (4, 5, 7),
        lambda: {"n": nn.BatchNorm1d(3), "w": vector(3, 5)},
        after=1,
    ),
    "addmm with one bias for all": Case(
        lambda m, x: m.n(torch.addmm(m.b, x, m.w)),
        (4, 5),
        lambda: {"n": nn.BatchNorm1d(3), "w": vector(5, 3), "b": vector(1)},
        after=1,
    ),
    "addmm with factors": Case(
        lambda m, x: m.n(torch.addmm(m.b, x, m.w, beta=0.5, alpha=2)),
        (4, 5),
        lambda: {"n": nn.BatchNorm1d(3), "w": vector(5, 3), "b": vector(3)},
        after=1,
    ),
    "an unbatched convolution": Case(
        lambda m, x: m.f(x[0] * m.s), (1, 3, 9), lambda: {"f": nn.Conv1d(3, 4, 2), "s": vector(3, 1)}, before=1
    ),
    "the tensor and its affine, added": Case(
        lambda m, x: m.f(x + m.s * x), (2, 7, 5), lambda: {"f": nn.Linear(5, 3), "s": vector(5)}, before=1
    ),
    "an affine twice in a sum": Case(
        lambda m, x: m.f((y := m.s * x) + y), (2, 7, 5), lambda: {"f": nn.Linear(5, 3), "s": vector(5)}, before=1
    ),
    "an affine and an affine of it, added": Case(
        lambda m, x: m.f((y := m.s * x) + (y * m.t + 1)),
        (2, 7, 5),
        lambda: {"f": nn.Linear(5, 3), "s": vector(5), "t": vector(5, seed=4)},
        before=1,
    ),
    "affines of two tensors, added": Case(
        lambda m, x: m.f(m.s * x + m.t * x.relu()),
        (2, 7, 5),
        lambda: {"f": nn.Linear(5, 3), "s": vector(5), "t": vector(5, seed=4)},
        along=1,
        left=1,
    ),
}


def model_of(case: Case) -> nn.Module:
    return randomized(Small(case.function, **case.parts()))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_folded_is_original(case: Case) -> None:
    model = model_of(case).double()
    x = torch.randn(case.shape, generator=seeded(9), dtype=torch.float64)
    graph = capture(model, (x,))

    reports = {report.name: report for report in folded(graph)}

    assert sum(reports["fold-affine-into-producers"].applied.values()) == case.after
    assert sum(reports["fold-affine-into-consumers"].applied.values()) == case.before
    assert sum(reports["rescale-stream"].applied.values()) == case.along
    assert affines(graph) == case.left == len(reports["rescale-stream"].refused)
    assert distance(graph.run(x), outputs(model, x)) < EXACT
    Pipeline(phases=(LOWER,), given=frozenset(FOLD.passes[0].provides)).run(graph)
    assert affines(graph) == 0
    if case.shape[0] > 1:
        x = torch.randn((case.shape[0] + 3, *case.shape[1:]), generator=seeded(10), dtype=torch.float64)
    assert distance(graph.run(x), outputs(model, x)) < EXACT


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_folded_is_original_in_float32(case: Case) -> None:
    model, x = model_of(case), torch.randn(case.shape, generator=seeded(9))
    graph = capture(model, (x,))
    tolerance = fold_tolerance(graph, x)

    Pipeline(phases=(CANONICAL, FOLD, LOWER)).run(graph)

    for found, expected in zip(graph.run(x), outputs(model, x), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    "name",
    [
        "bn2d behind a conv: stride, groups, dilation, padding",
        "bn2d before a depthwise conv",
        "un by its class, behind and before",
        "layer norm before q, k and v",
        "constants of every rank",
        "one weight behind the norm and elsewhere",
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_half_precision(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    model, x = model_of(case).to(dtype), torch.randn(case.shape, generator=seeded(9)).to(dtype)
    graph = capture(model, (x,))
    tolerance = fold_tolerance(graph, x)

    Pipeline(phases=(CANONICAL, FOLD, LOWER)).run(graph)

    (found,), (expected,) = graph.run(x), outputs(model, x)
    assert found.dtype == dtype
    assert "f64" not in graph.text()
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


def dead_norm() -> nn.Module:
    norm = nn.BatchNorm1d(3, eps=1e-12)
    assert isinstance(norm.running_var, Tensor)
    norm.running_var.zero_()
    return norm


@pytest.mark.parametrize(
    ("function", "size"),
    [
        pytest.param(lambda m, x: m.f(x) * 3e4, 6e-6, id="behind"),
        pytest.param(lambda m, x: m.f(x * 3e4), 6e-6, id="before"),
        pytest.param(lambda m, x: x * 1e3 * 1e3, 6e-6, id="two scales"),
        pytest.param(lambda m, x: (y := x * 6e4) + y, 6e-6, id="a sum"),
        pytest.param(lambda m, x: x / 1e4 / 1e4, 6e4, id="two quotients"),
        pytest.param(lambda m, x: m.n(m.f(x)), 6e-6, id="batch norm"),
    ],
)
def test_constants_that_do_not_fit_into_half_precision_are_not_made(function: Function, size: float) -> None:
    """The inputs go through the original without overflow; infinite constants would make inf or nan of them."""
    linear = nn.Linear(5, 3, bias=False)
    with torch.no_grad():
        linear.weight.fill_(4.0)
    model = Small(function, f=linear, n=dead_norm()).half().eval().requires_grad_(False)
    x = torch.full((4, 5), size).half()
    x[0] = 0.0
    graph = capture(model, (x,))
    expected = outputs(model, x)
    assert bool(expected[0].isfinite().all())
    assert bool(expected[0].any())

    Pipeline(phases=(CANONICAL, FOLD, LOWER)).run(graph)

    # At its ends float16 has few digits, but wrong constants make inf, nan or zero.
    assert distance(graph.run(x), expected) < 0.05
