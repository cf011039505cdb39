"""Random networks of frozen norms, linear maps and what stands between: folded, each is the model that it was."""

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from torch import Tensor, nn

from normfuse.folding import FoldOptions, fold
from normfuse.graph import capture, query, verify
from normfuse.graph.affine import AFFINE
from normfuse.nn import RepBN, UnifiedNorm
from normfuse.passes.presets import CANONICAL, FOLD, LOWER, LayerNorms
from normfuse.pipeline import Pipeline
from normfuse.testing import Small, distance, randomized, seeded

EXACT = 1e-9
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
    options: dict[str, Any] = {"padding": data.draw(st.integers(0, 2)), "bias": data.draw(st.booleans())}
    wide = channels * data.draw(st.integers(1, 2)) if groups > 1 else data.draw(st.integers(1, 5))
    options |= {"stride": data.draw(st.sampled_from([1, 1, 2]))}
    kinds: list[list[Any]] = [[nn.Conv1d, nn.Conv2d], [nn.ConvTranspose1d, nn.ConvTranspose2d]]
    kind = kinds[is_transposed := data.draw(st.sampled_from([0, 0, 1]))][len(chain.shape) - 2]
    options["padding"] = min(options["padding"], kernel - 1)
    step, pad = options["stride"], options["padding"]
    if is_transposed:
        size = [(length - 1) * step - 2 * pad + kernel for length in chain.shape[1:]]
    else:
        size = [(length + 2 * pad - kernel) // step + 1 for length in chain.shape[1:]]
    if min(size) < 1 or max(size) > 9:
        return linear(data, chain)
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


def pool(data: st.DataObject, chain: Chain) -> None:
    if len(chain.shape) < 2 or min(chain.shape[1:]) < 2:
        return select(data, chain)
    dims = len(chain.shape) - 1
    average: Any = (nn.functional.avg_pool1d, nn.functional.avg_pool2d)[dims - 1]
    maximum: Any = (nn.functional.max_pool1d, nn.functional.max_pool2d)[dims - 1]
    functions: list[tuple[Any, Callable[[int], int]]] = [
        (lambda m, x: average(x, 2, 1), lambda length: length - 1),
        (lambda m, x: average(x, 2, 1, padding=1), lambda length: length + 1),
        (lambda m, x: average(x, 2, 1, padding=1, count_include_pad=False), lambda length: length + 1),
        (lambda m, x: maximum(x, 2, 1), lambda length: length - 1),
        (lambda m, x: nn.functional.interpolate(x, scale_factor=2), lambda length: 2 * length),
        (lambda m, x: nn.functional.pad(x, (1, 1) * dims), lambda length: length + 2),
        (lambda m, x: nn.functional.pad(x, (1, 1) * dims, mode="replicate"), lambda length: length + 2),
        (lambda m, x: x.roll(1, -1), lambda length: length),
    ]
    function, after = data.draw(st.sampled_from(functions))
    if max(chain.shape[1:]) > 5:
        return select(data, chain)
    return chain.add(Small(function), (chain.shape[0], *map(after, chain.shape[1:])))


def residual(data: st.DataObject, chain: Chain) -> None:
    """Pre-norm, post-norm, a norm on the branch, or none; the branch is linear or not."""
    width = chain.shape[-1]
    parts: dict[str, Any] = {"f": nn.Linear(width, 3), "g": nn.Linear(3, width), "n": UnifiedNorm(width)}
    branch: Any = data.draw(st.sampled_from([lambda m, x: m.g(m.f(x)), lambda m, x: m.g(torch.tanh(m.f(x)))]))
    functions: list[Any] = [
        lambda m, x: x + branch(m, m.n(x)),
        lambda m, x: m.n(x + branch(m, x)),
        lambda m, x: m.n(branch(m, x)) - x,
        lambda m, x: (y := m.n(x)) + branch(m, y),
        lambda m, x: x - branch(m, x),
        lambda m, x: m.f(y := m.n(x)) @ m.f(torch.tanh(y)).mT @ m.g(m.f(y)) if x.ndim > 2 else m.g(m.f(m.n(x))),
    ]
    chain.add(Small(data.draw(st.sampled_from(functions)), **parts), chain.shape)


def concatenation(data: st.DataObject, chain: Chain) -> None:
    """Channels or tokens of one, two or three sources, one after the other."""
    *rest, width = chain.shape
    parts: dict[str, Any] = {
        "f": nn.Linear(width, width),
        "n": UnifiedNorm(width),
        "t": nn.Parameter(torch.ones(width)),
    }
    choices: list[tuple[Any, tuple[int, ...]]] = [
        (lambda m, x: torch.cat([x, m.f(x)], -1), (*rest, 2 * width)),
        (lambda m, x: torch.cat([m.n(x), x, m.f(x)], -1), (*rest, 3 * width)),
    ]
    if rest:
        choices += [
            (lambda m, x: torch.cat([x, m.f(x)], -2), (*rest[:-1], 2 * rest[-1], width)),
            (lambda m, x: torch.cat([m.t.expand(*x.shape[:-2], 1, width), x], -2), (*rest[:-1], rest[-1] + 1, width)),
            (lambda m, x: torch.cat([m.n(x), m.n(m.f(x))], -2), (*rest[:-1], 2 * rest[-1], width)),
        ]
    function, after = data.draw(st.sampled_from([choice for choice in choices if max(choice[1]) < 13]))
    chain.add(Small(function, **parts), after)


def split(data: st.DataObject, chain: Chain) -> None:
    """The channels in two parts, each with its own way."""
    width = chain.shape[-1]
    if width < 2:
        return linear(data, chain)
    cut = data.draw(st.integers(1, width - 1))
    parts: dict[str, Any] = {"n": UnifiedNorm(cut), "p": RepBN(width - cut), "f": nn.Linear(width - cut, cut)}
    choices: list[tuple[Any, tuple[int, ...]]] = [
        (lambda m, x: torch.cat([m.n(x[..., :cut]), x[..., cut:]], -1), chain.shape),
        (lambda m, x: torch.cat([(y := x.split([cut, width - cut], -1))[0], m.p(y[1])], -1), chain.shape),
        (lambda m, x: m.n(x[..., :cut]) + m.f(m.p(x[..., cut:])), (*chain.shape[:-1], cut)),
        (lambda m, x: x[..., :cut] * m.f(x.split([cut, width - cut], -1)[1]), (*chain.shape[:-1], cut)),
    ]
    function, after = data.draw(st.sampled_from(choices))
    return chain.add(Small(function, **parts), after)


def spoiled(data: st.DataObject, model: nn.Module) -> nn.Module:
    """Give some norms channels that are dead, nearly dead, negative or huge."""
    with torch.no_grad():
        for norm in model.modules():
            weight = getattr(norm, "weight", None)
            if not isinstance(norm, (UnifiedNorm, nn.BatchNorm1d, nn.BatchNorm2d)) or not isinstance(weight, Tensor):
                continue
            weight[data.draw(st.integers(0, len(weight) - 1))] = data.draw(st.sampled_from([0.0, 1e-6, -1.0, 50.0]))
            assert isinstance(norm.running_var, Tensor)
            norm.running_var[0] = data.draw(st.sampled_from([0.0, 1.0, 1e6]))
    return model


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


STEPS: list[Build] = [linear, conv, conv, batch_norm, norm_over_last, scale_or_shift, view, select, nonlinear]
STEPS += [pool, residual, residual, concatenation, split]
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
    stem = grown(data, shape, STEPS, most=3)
    data.draw(st.sampled_from(AFFINES))(data, stem)
    branches = [grown(data, stem.shape, STEPS, most=2) for _ in range(data.draw(st.integers(1, 2)))]
    for branch in branches:
        data.draw(st.sampled_from([linear, conv]))(data, branch)
    flags = {"stem_is_output": data.draw(st.booleans()), "is_residual": data.draw(st.booleans())}
    model = randomized(Tree(stem, branches, **flags), seed=data.draw(st.integers(0, 99))).double()
    return spoiled(data, model), shape


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


def fold_holds(data: st.DataObject) -> None:
    """What users call: every step audited, layer norm recentred."""
    model, shape = tree(data)
    options = FoldOptions(layer_norms=data.draw(st.sampled_from([LayerNorms.RMS, LayerNorms.CRMS])), samples=1)
    x = torch.randn((3, *shape), generator=seeded(1), dtype=torch.float64)
    folded = fold(model, (x,), options=options)
    assert folded.holds, folded.certificate
    for batch in (3, 5) if folded.graph.has_dynamic_batch else (3,):
        x = torch.randn((batch, *shape), generator=seeded(batch), dtype=torch.float64)
        assert distance(folded.graph.run(x), model(x)) < EXACT


def check(*, examples: int, start: int, holds: Callable[[st.DataObject], None] = folded_is_original) -> None:
    """Try ``examples`` trees, the same ones in every run."""
    limits = settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    seed(start)(limits(given(data=st.data())(holds)))()


@pytest.mark.parametrize("part", range(10))
def test_folded_is_original(part: int) -> None:
    check(examples=31, start=part)


@pytest.mark.parametrize("part", range(200, 206))
def test_fold_holds(part: int) -> None:
    check(examples=10, start=part, holds=fold_holds)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(100, 103))
def test_folded_is_original_many_times(part: int) -> None:
    check(examples=40, start=part)
