"""Post-norm networks with frozen norms become norm-free, exactly, or stay for a documented reason (methods 13.4)."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normfuse.graph import Graph, capture, query
from normfuse.graph.affine import AFFINE
from normfuse.nn import RepBN, UnifiedNorm
from normfuse.passes.find_affines import FindAffines
from normfuse.passes.fold_affine_into_consumers import FoldAffineIntoConsumers
from normfuse.passes.fold_affine_into_producers import FoldAffineIntoProducers
from normfuse.passes.presets import CANONICAL
from normfuse.passes.rescale_stream import RescaleStream
from normfuse.pipeline import Phase, Pipeline
from normfuse.report import PassReport, Reason
from normfuse.testing import Golden, Small, check_pass_contract, distance, picture, randomized, sample, seeded

EXACT = 1e-10
WRONG = 1e-3
Norm = Callable[[int], nn.Module]


def ready(model: nn.Module, x: Tensor) -> Graph:
    graph = capture(model, (x,))
    steps = (FindAffines(), FoldAffineIntoProducers(), FoldAffineIntoConsumers())
    Pipeline(phases=(CANONICAL, Phase("norms", steps))).run(graph)
    return graph


def affines(graph: Graph) -> int:
    return sum(query.is_call(node, AFFINE) for node in graph.nodes)


class Block(nn.Module):
    """``N(x + f(x))``, f with a nonlinearity between its linear maps."""

    def __init__(self, norm: Norm, *, is_branch: bool = False) -> None:
        super().__init__()
        self.first, self.last, self.norm = nn.Linear(5, 7), nn.Linear(7, 5), norm(5)
        self.is_branch = is_branch

    def forward(self, x: Tensor) -> Tensor:
        branch = self.last(torch.tanh(self.first(x)))
        result: Tensor = x + self.norm(branch) if self.is_branch else self.norm(x + branch)
        return result


class PostNorm(nn.Module):
    """Patches, class token and positions, post-norm blocks, a head that reads the class token."""

    def __init__(self, norm: Norm, *, blocks: int, tokens: bool = True, head: bool = True) -> None:
        super().__init__()
        self.patch, self.norm = nn.Linear(4, 5), norm(5)
        self.blocks = nn.ModuleList([Block(norm) for _ in range(blocks)])
        self.cls = nn.Parameter(torch.zeros(1, 1, 5)) if tokens else None
        self.positions = nn.Parameter(torch.zeros(1, 7, 5)) if tokens else None
        self.head = nn.Linear(5, 3) if head else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(torch.tanh(self.patch(x)))  # no producer takes it
        if self.cls is not None and self.positions is not None:
            x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.positions
        for block in self.blocks:
            x = block(x)
        result: Tensor = self.head(x[:, 0])
        return result


def signed(model: nn.Module, *, seed: int = 0, spread: float = 1.0) -> nn.Module:
    """Give every norm scales of both signs that differ by ``spread`` octaves, and any shift."""
    randomized(model, seed=seed)
    size = torch.exp2(spread * torch.linspace(-0.5, 0.5, 5))
    with torch.no_grad():
        for norm in model.modules():
            if isinstance(norm, UnifiedNorm):
                norm.running_var.fill_(1.0)
                norm.weight.copy_(size * torch.tensor([1.0, -1.0, 1.0, -1.0, -1.0]))
    return model.double()


def test_picture(golden: Golden) -> None:
    graph = ready(signed(PostNorm(UnifiedNorm, blocks=1)).float(), sample(2, 6, 4).float())
    before = graph.text()
    report = RescaleStream().run(graph)
    assert report.applied == {"carry-along-stream": 1}
    assert {"blocks.0.last", "cat", "head"} <= set(report.sites[0]["into"].split(", "))
    assert picture(before, graph.text()) == golden


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_numbers_and_contract(seed: int, tokens: bool) -> None:
    model, x = signed(PostNorm(UnifiedNorm, blocks=3, tokens=tokens), seed=seed), sample(2, 6, 4)
    graph = ready(model, x)
    assert check_pass_contract(RescaleStream(), graph, (x,)).applied == {"carry-along-stream": 3}
    RescaleStream().run(graph)
    assert affines(graph) == 0
    assert distance(graph.run(x), [model(x)]) < EXACT


@pytest.mark.parametrize("norm", [UnifiedNorm, RepBN])
def test_random_statistics_with_a_channel_that_is_nearly_dead(norm: Norm) -> None:
    model, x = randomized(PostNorm(norm, blocks=2)).double(), sample(2, 6, 4)
    graph = ready(model, x)
    RescaleStream().run(graph)
    assert affines(graph) == 0
    assert distance(graph.run(x), [model(x)]) < 1e-9  # the last scale is 1e-3 of the others, to the third power


def test_the_division_is_needed() -> None:
    """The naive fold, into the readers alone, is far off."""
    model, x = signed(PostNorm(UnifiedNorm, blocks=1, tokens=False)), sample(2, 6, 4)
    graph = ready(model, x)
    RescaleStream().run(graph)
    constants = dict(graph.module.named_buffers())
    last: Any = model.blocks[0].last  # type: ignore[union-attr, index]
    norm: Any = model.norm
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    torch.testing.assert_close(constants["blocks.0.last.weight"], last.weight / scale[:, None])
    torch.testing.assert_close(constants["blocks.0.last.bias"], last.bias / scale)
    constants["blocks.0.last.weight"].copy_(last.weight)
    constants["blocks.0.last.bias"].copy_(last.bias)
    assert distance(graph.run(x), [model(x)]) > WRONG


def test_a_norm_on_the_branch_folds_into_its_last_linear_map() -> None:
    model = randomized(nn.Sequential(Block(UnifiedNorm, is_branch=True), Block(RepBN, is_branch=True))).double()
    graph = ready(model, x := sample(2, 7, 5))
    assert affines(graph) == 0  # before the stream is looked at
    assert not RescaleStream().run(graph).changed
    assert distance(graph.run(x), [model(x)]) < EXACT


def test_embeddings_and_tied_heads() -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        y = m.block(m.norm(torch.tanh(m.project(m.words(x)))) + m.words(x) + m.positions)
        tied: Tensor = nn.functional.linear(y, m.words.weight)
        return tied

    parts = {"words": nn.Embedding(11, 5), "project": nn.Linear(5, 5), "norm": UnifiedNorm(5)}
    parts |= {"block": Block(UnifiedNorm)}
    model = signed(Small(function, **parts, positions=nn.Parameter(torch.zeros(7, 5))))  # type: ignore[arg-type]
    x = torch.randint(0, 11, (2, 7), generator=seeded(2))
    graph = ready(model, x)
    RescaleStream().run(graph)
    assert distance(graph.run(x), [model(x)]) < EXACT


REFUSALS = [
    pytest.param(lambda m, x: m.n(m.t(x)) + m.g(m.t(x)), {}, Reason.GRAPH_OUTPUT, id="the stream is an output"),
    pytest.param(lambda m, x: m.f(m.n(m.t(x)) + x.sin()), {}, Reason.NO_LINEAR, id="a nonlinearity (1)"),
    pytest.param(lambda m, x: m.f(m.n(m.t(x)) + (y := m.g(x))) + m.f(y), {}, Reason.SHARED, id="read elsewhere (1)"),
    pytest.param(
        lambda m, x: m.f(m.n(m.t(x)) + nn.functional.linear(x, x[0, :1].repeat(5, 1))),
        {},
        Reason.NOT_CONSTANT,
        id="a variable map (1)",
    ),
    pytest.param(lambda m, x: m.f(m.n(m.t(x)) + m.h(x)), {"h": nn.Linear(5, 1)}, Reason.AXIS, id="one for all (1)"),
    pytest.param(lambda m, x: m.f((y := m.n(m.t(x))) + y.relu()), {}, Reason.NONLINEAR_READER, id="another reader"),
    pytest.param(lambda m, x: m.f(m.n(m.t(x)) + m.g(x)), {"zero": torch.ones(1)}, Reason.ZERO_SCALE, id="dead (2)"),
    pytest.param(
        lambda m, x: m.f(torch.cat([m.k.expand(4, 1, 5), m.n(m.t(x))], 1)),
        {"zero": torch.ones(1), "k": torch.ones(1, 1, 5)},
        Reason.ZERO_SCALE,
        id="dead, class token (2)",
    ),
]


@pytest.mark.parametrize(("function", "parts", "reason"), REFUSALS)
def test_refusals(function: Any, parts: dict[str, Any], reason: Reason) -> None:
    maps: dict[str, Any] = {"f": nn.Linear(5, 3), "g": nn.Linear(5, 5), "n": UnifiedNorm(5), "t": nn.Tanh()}
    model: Any = signed(Small(function, **{**maps, **parts}))
    if "zero" in parts:
        with torch.no_grad():
            model.n.weight[2] = 0.0
    graph = ready(model, x := sample(4, 3, 5))
    before = graph.text()
    report = RescaleStream().run(graph)
    assert [refusal.reason for refusal in report.refused] == [reason]
    assert graph.text() == before
    assert distance(graph.run(x), [model(x)]) < EXACT


def folded(model: nn.Module, x: Tensor, largest: float) -> tuple[Graph, PassReport]:
    graph = ready(model, x)
    return graph, RescaleStream(largest_range=largest).run(graph)


def test_beyond_the_range_an_affine_stays_and_the_next_one_starts_anew() -> None:
    model, x = signed(PostNorm(UnifiedNorm, blocks=6), spread=1.5), sample(2, 6, 4)
    graph, report = folded(model, x, largest=4.0)
    assert affines(graph) == 2  # 1.5 + 1.5 octaves three times; the last of the seven norms is the head's
    assert not RescaleStream(largest_range=4.0).run(graph).changed  # what went before is not forgotten
    assert {refusal.reason for refusal in report.refused} == {Reason.RANGE}
    assert len(report.refused) == 2
    assert distance(graph.run(x), [model(x)]) < EXACT
    graph, report = folded(model, x, largest=0.0)  # float64 allows 64 octaves
    assert affines(graph) == 0
    assert report.refused == ()


def test_one_affine_alone_may_be_beyond_the_range() -> None:
    model, x = signed(PostNorm(UnifiedNorm, blocks=0), spread=6.0), sample(2, 6, 4)
    graph, report = folded(model, x, largest=2.0)
    assert affines(graph) == 1
    assert [refusal.reason for refusal in report.refused] == [Reason.RANGE]
    assert affines(folded(model, x, largest=8.0)[0]) == 0


def test_scales_that_shrink_every_channel_alike_are_a_range_too() -> None:
    """Writers are multiplied by the inverse of the product so far: 1 / 0.02 per block."""
    model, x = signed(PostNorm(UnifiedNorm, blocks=4), spread=0.0), sample(2, 6, 4)
    with torch.no_grad():
        for norm in model.modules():
            if isinstance(norm, UnifiedNorm):
                norm.weight.mul_(0.02)
    graph, report = folded(model, x, largest=8.0)
    assert affines(graph) > 0
    assert {refusal.reason for refusal in report.refused} == {Reason.RANGE}
    assert distance(graph.run(x), [model(x)]) < EXACT


@torch.no_grad()
def test_float16_allows_fewer_octaves() -> None:
    model, x = signed(PostNorm(UnifiedNorm, blocks=8), spread=2.0), sample(2, 6, 4)
    wide, _ = folded(model, x, largest=0.0)
    expected = [model(x)]
    narrow, report = folded(model.half(), x.half(), largest=0.0)
    assert affines(wide) == 0 < affines(narrow)
    assert {refusal.reason for refusal in report.refused} == {Reason.RANGE}
    assert narrow.run(x.half())[0].dtype == torch.float16
    reference = [end.half() for end in expected]
    # Rounding alone: eps of float16 times the sums of 9 blocks, amplified by scales of up to 4 per block.
    assert distance(narrow.run(x.half()), reference) < 3 * distance([model(x.half())], reference) + 0.05
