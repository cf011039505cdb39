"""Random chains and trees of frozen norms, views and linear maps: folded, each is the model that it was."""

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from torch import Tensor, nn

from normfuse.graph import capture, query, verify
from normfuse.graph.affine import AFFINE
from normfuse.nn import RepBN, UnifiedNorm
from normfuse.passes.presets import CANONICAL, FOLD, LOWER
from normfuse.pipeline import Pipeline
from normfuse.testing import Small, distance, randomized, seeded

EXACT = 1e-10
Build = Callable[[st.DataObject, "Chain"], None]


class Chain(nn.Module):
    """Steps in a row, drawn one by one; ``shape`` is what comes out, without the batch."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.steps = nn.ModuleList()
        self.shape = shape

    def add(self, step: nn.Module, probe: tuple[int, ...]) -> None:
        """Append a step that maps ``self.shape`` to ``probe``."""
        self.steps.append(step)
        self.shape = probe

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(x)
        return x


def linear(data: st.DataObject, chain: Chain) -> None:
    width = data.draw(st.integers(1, 5))
    chain.add(nn.Linear(chain.shape[-1], width, bias=data.draw(st.booleans())), (*chain.shape[:-1], width))


def conv(data: st.DataObject, chain: Chain) -> None:
    if len(chain.shape) < 2:
        return linear(data, chain)
    channels, groups = chain.shape[0], data.draw(st.sampled_from([1, chain.shape[0]]))
    kernel = data.draw(st.integers(1, min(chain.shape[1:])))
    options: dict[str, Any] = {"padding": data.draw(st.sampled_from([0, 0, 1])), "bias": data.draw(st.booleans())}
    wide = channels * data.draw(st.integers(1, 2)) if groups > 1 else data.draw(st.integers(1, 5))
    kind = (nn.Conv1d, nn.Conv2d)[len(chain.shape) - 2]
    size = [length + 2 * options["padding"] - kernel + 1 for length in chain.shape[1:]]
    return chain.add(kind(channels, wide, kernel, groups=groups, **options), (wide, *size))


def batch_norm(data: st.DataObject, chain: Chain) -> None:
    kind = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d)[len(chain.shape) - 1]
    chain.add(kind(chain.shape[0]), chain.shape)


def norm_over_last(data: st.DataObject, chain: Chain) -> None:
    width = chain.shape[-1]
    kinds: list[Callable[[int], nn.Module]] = [UnifiedNorm, RepBN]
    kinds += [nn.LayerNorm] if width > 2 else []
    chain.add(data.draw(st.sampled_from(kinds))(width), chain.shape)


def scale_or_shift(data: st.DataObject, chain: Chain) -> None:
    rank = len(chain.shape)
    axis = data.draw(st.integers(0, rank - 1))
    size = [length if index == axis else 1 for index, length in enumerate(chain.shape)]
    vector = nn.Parameter(torch.ones(size if data.draw(st.booleans()) else [1, *size]))
    operations: list[Callable[[Any, Tensor], Tensor]] = [
        lambda m, x: x * m.v,
        lambda m, x: m.v + x,
        lambda m, x: x - m.v,
        lambda m, x: m.v - x,
        lambda m, x: x / (m.v.abs() + 0.1),
        lambda m, x: 0.25 - x * 3.0,
    ]
    chain.add(Small(data.draw(st.sampled_from(operations)), v=vector), chain.shape)


def view(data: st.DataObject, chain: Chain) -> None:
    shape = chain.shape
    rank = len(shape)
    merged = (*shape[:-2], shape[-1] * shape[-2]) if rank > 1 else shape
    choices: list[tuple[Any, tuple[int, ...]]] = [
        (lambda m, x: x.transpose(1, -1), (shape[-1], *shape[1:-1], shape[0]) if rank > 1 else shape),
        (lambda m, x: x.flatten(-2) if rank > 1 else x.clone(), merged),
        (lambda m, x: x.unsqueeze(1), (1, *shape)),
        (lambda m, x: x.reshape(-1, *shape[::-1]), shape[::-1]),
    ]
    function, after = data.draw(st.sampled_from([choice for choice in choices if len(choice[1]) <= 3]))
    chain.add(Small(function), after)


def select(data: st.DataObject, chain: Chain) -> None:
    shape = chain.shape
    if len(shape) < 2:
        return view(data, chain)
    axis = data.draw(st.integers(0, len(shape) - 1))
    dim = axis + 1 if data.draw(st.booleans()) else axis - len(shape)
    rest = shape[:axis] + shape[axis + 1 :]
    length = len(range(0, shape[axis], 2))
    function, after = data.draw(
        st.sampled_from(
            [
                (lambda m, x: x.select(dim, -1), rest),
                (lambda m, x: x.mean(dim), rest),
                (lambda m, x: x.mean(dim, keepdim=True), (*shape[:axis], 1, *shape[axis + 1 :])),
                (lambda m, x: x.movedim(dim, 1)[:, ::2].movedim(1, dim), (*shape[:axis], length, *shape[axis + 1 :])),
            ]
        )
    )
    return chain.add(Small(function), after)


def nonlinear(data: st.DataObject, chain: Chain) -> None:
    chain.add(data.draw(st.sampled_from([nn.ReLU(), nn.ReLU(inplace=True), nn.Tanh()])), chain.shape)


class Tree(nn.Module):
    """A chain whose output feeds several branches; their sums over all but the batch are added, or all returned."""

    def __init__(self, stem: nn.Module, branches: list[Chain], *, stem_is_output: bool, is_residual: bool) -> None:
        super().__init__()
        self.stem, self.branches = stem, nn.ModuleList(branches)
        self.stem_is_output, self.is_residual = stem_is_output, is_residual

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        stem = self.stem(x.clone())  # a model that changes its input is refused
        ends = [branch(stem.clone()) for branch in self.branches]
        ends = [end + stem if self.is_residual and end.shape == stem.shape else end for end in ends]
        return (stem, *ends) if self.stem_is_output else tuple(ends)


STEPS: list[Build] = [linear, conv, batch_norm, norm_over_last, scale_or_shift, view, select, nonlinear]
AFFINES: list[Build] = [batch_norm, norm_over_last, scale_or_shift]


def grown(data: st.DataObject, shape: tuple[int, ...], steps: list[Build], *, most: int) -> Chain:
    chain = Chain(shape)
    for step in data.draw(st.lists(st.sampled_from(steps), max_size=most)):
        step(data, chain)
    return chain


def tree(data: st.DataObject) -> tuple[nn.Module, tuple[int, ...]]:
    # Equal sizes on purpose: a confused axis then gives wrong numbers instead of an error.
    sizes = st.sampled_from([2, 3, 3, 4])
    shape = tuple(data.draw(st.lists(sizes, min_size=1, max_size=3)))
    stem = grown(data, shape, STEPS, most=4)
    data.draw(st.sampled_from(AFFINES))(data, stem)
    branches = [grown(data, stem.shape, STEPS, most=3) for _ in range(data.draw(st.integers(1, 3)))]
    for branch in branches:
        data.draw(st.sampled_from([linear, conv]))(data, branch)
    flags = {"stem_is_output": data.draw(st.booleans()), "is_residual": data.draw(st.booleans())}
    return randomized(Tree(stem, branches, **flags), seed=data.draw(st.integers(0, 99))).double(), shape


def folded_is_original(data: st.DataObject) -> None:
    model, shape = tree(data)
    x = torch.randn((3, *shape), generator=seeded(1), dtype=torch.float64)
    graph = capture(model, (x,))
    Pipeline(phases=(CANONICAL, FOLD, LOWER)).run(graph)
    verify(graph)
    assert not any(query.is_call(node, AFFINE) for node in graph.nodes)
    for batch in (3, 5) if graph.has_dynamic_batch else (3,):
        x = torch.randn((batch, *shape), generator=seeded(batch), dtype=torch.float64)
        assert distance(graph.run(x), model(x)) < EXACT


def check(*, examples: int, start: int) -> None:
    """Try ``examples`` trees, the same ones in every run."""
    limits = settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    seed(start)(limits(given(data=st.data())(folded_is_original)))()


@pytest.mark.parametrize("part", range(10))
def test_folded_is_original(part: int) -> None:
    check(examples=6, start=part)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(100, 103))
def test_folded_is_original_many_times(part: int) -> None:
    check(examples=40, start=part)
