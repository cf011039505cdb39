"""Every step of a fold is checked in float64: a wrong one is undone and named, and nothing else suffers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, fx, nn

from normfuse.certificate import TOLERANCE, Certifier, Remembered, difference
from normfuse.folding import Folded, FoldOptions, fold_graph
from normfuse.graph import Graph, capture, ops, query
from normfuse.graph.affine import AFFINE, read_affine
from normfuse.graph.edit import Editor
from normfuse.nn import UnifiedNorm
from normfuse.passes.find_affines import FindAffines
from normfuse.passes.presets import CANONICAL
from normfuse.pipeline import Phase, Pipeline
from normfuse.progress import Silent
from normfuse.report import PassReport, Reason
from normfuse.rewrite import Match, Rule, apply_rules, call
from normfuse.rewrite.linear_map import LinearMap, read_linear_map, rebind
from normfuse.rewrite.padding_repair import Repair
from normfuse.testing import Small, distance, randomized, sample

EXACT = 1e-10

# A right fold moves the sums of a few dozen terms of size one: some roundings of float64 and not more.
ROUNDING = 1e-13


def lively(model: nn.Module) -> nn.Module:
    """Random parameters without a nearly dead channel: its scale of 300 would saturate every tanh."""
    randomized(model)
    for name, buffer in model.named_buffers():
        if name.endswith("running_var"):
            buffer.fill_(1.0)
    return model.double()


def ready(model: nn.Module, x: Tensor) -> Graph:
    graph = capture(lively(model), (x,))
    Pipeline(phases=(CANONICAL, Phase("affines", (FindAffines(),)))).run(graph)
    return graph


def affines(graph: Graph) -> list[str]:
    return [query.layer_of(node) for node in graph.nodes if query.is_call(node, AFFINE)]


@dataclass(frozen=True, slots=True)
class _Plan:
    linear: LinearMap
    node: fx.Node


class FoldIntoReader(Rule[_Plan]):
    """An affine into the one linear map that reads it, spoiled for some layers."""

    name: ClassVar[str] = "fold-into-reader"
    pattern = call(AFFINE)

    def __init__(self, spoil: dict[str, Callable[[LinearMap], LinearMap]]) -> None:
        self.spoil = spoil

    def plan(self, graph: Graph, match: Match) -> _Plan | None:
        reader = query.only_reader(match.root)
        linear = None if reader is None else read_linear_map(graph, reader)
        if reader is None or linear is None:
            return None
        right = linear.before(read_affine(graph, match.root))
        return _Plan(self.spoil.get(query.layer_of(match.root), lambda same: same)(right), reader)

    def rewrite(self, match: Match, plan: _Plan, edit: Editor) -> None:
        edit.substitute(plan.node, match.root, match.root.args[0])  # type: ignore[arg-type]
        rebind(edit, plan.node, plan.linear)

    def describe(self, graph: Graph, match: Match, plan: _Plan) -> dict[str, str]:
        return {"affine": query.layer_of(match.root), "into": query.layer_of(plan.node)}


def biased(linear: LinearMap) -> LinearMap:
    assert linear.bias is not None
    return replace(linear, bias=linear.bias + 1e-6 * linear.bias.abs().max())


def scaled(linear: LinearMap) -> LinearMap:
    return replace(linear, weight=linear.weight * (1 + 1e-6))


def infinite(linear: LinearMap) -> LinearMap:
    return replace(linear, weight=linear.weight * torch.inf)


def no_number(linear: LinearMap) -> LinearMap:
    return replace(linear, weight=linear.weight * torch.nan)


def chain(*, ends: bool = False) -> nn.Module:
    """Three norms, each in front of a linear map; the last map is the output or not."""
    stages = [nn.Sequential(nn.Tanh(), UnifiedNorm(5), nn.Linear(5, 5)) for _ in range(3)]
    return nn.Sequential(*stages, *([] if ends else [nn.Tanh()]))


def folded(graph: Graph, x: Tensor, rule: Rule[Any]) -> tuple[PassReport, Certifier]:
    certifier = Certifier(graph, [(x,)])
    return apply_rules(graph, [rule], name="trial", audit=certifier), certifier


@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("place", ["0.1", "1.1", "2.1"])
@pytest.mark.parametrize("spoil", [biased, scaled, infinite, no_number])
def test_a_wrong_fold_is_undone_and_the_others_stay(
    spoil: Callable[[LinearMap], LinearMap], place: str, ends: bool
) -> None:
    graph = ready(chain(ends=ends), x := sample(4, 5))
    expected = graph.run(x)
    report, certifier = folded(graph, x, FoldIntoReader({place: spoil}))
    assert affines(graph) == [place]
    assert report.applied == {"fold-into-reader": 2}
    assert {site["affine"] for site in report.sites} == {"0.1", "1.1", "2.1"} - {place}
    assert [refusal.reason for refusal in report.refused] == [Reason.WRONG]
    ((rule, _),) = certifier.undone
    assert rule == "fold-into-reader"
    assert sorted(check.holds for check in certifier.checks) == [False, True, True]
    assert distance(graph.run(x), expected) < EXACT


def test_several_wrong_folds_are_each_undone() -> None:
    graph = ready(chain(), x := sample(4, 5))
    expected = graph.run(x)
    report, certifier = folded(graph, x, FoldIntoReader({"0.1": biased, "1.1": scaled, "2.1": biased}))
    assert len(certifier.undone) == 3
    assert len(report.refused) == 3
    assert not report.changed
    assert all(torch.equal(found, old) for found, old in zip(graph.run(x), expected, strict=True))


def test_a_right_fold_is_accepted_where_its_change_dies_out() -> None:
    graph = ready(chain(), x := sample(4, 5))
    expected = graph.run(x)
    report, certifier = folded(graph, x, FoldIntoReader({}))
    assert report.applied == {"fold-into-reader": 3}
    assert not certifier.undone
    assert affines(graph) == []
    for check in certifier.checks:
        assert check.holds
        assert check.relative < ROUNDING
        assert len(check.compared) == 1, "the linear map returns what it did, and nothing behind it is run"
        assert check.compared[0].startswith("linear")
    assert distance(graph.run(x), expected) < ROUNDING


def test_errors_do_not_add_up_over_the_steps() -> None:
    """What comes back keeps its old value: the last of many steps is as exact as the first."""
    stages = [part for _ in range(12) for part in (nn.Tanh(), UnifiedNorm(5), nn.Linear(5, 5))]
    graph = ready(nn.Sequential(*stages), x := sample(4, 5))
    _, certifier = folded(graph, x, FoldIntoReader({}))
    assert len(certifier.checks) == 12
    assert max(check.relative for check in certifier.checks) < ROUNDING


def test_the_memory_is_right_behind_an_undone_step() -> None:
    """The second rule changes what the undone one had changed: it is compared with the values before both."""
    graph = ready(chain(), x := sample(4, 5))
    expected = graph.run(x)
    certifier = Certifier(graph, [(x,)])
    apply_rules(graph, [FoldIntoReader({"0.1": scaled, "1.1": scaled})], name="trial", audit=certifier)
    assert affines(graph) == ["0.1", "1.1"]

    class AnotherName(FoldIntoReader):
        name: ClassVar[str] = "another-name"

    report = apply_rules(graph, [AnotherName({"1.1": scaled})], name="again", audit=certifier)
    assert report.applied == {"another-name": 1}
    assert affines(graph) == ["1.1"]
    assert certifier.checks[-1].holds is False
    assert [check.holds for check in certifier.checks if check.rule == "another-name"] == [True, False]
    assert distance(graph.run(x), expected) < EXACT


class DropCall(Rule[fx.Node]):
    """A wrong rule for anything: the readers read the argument."""

    name: ClassVar[str] = "drop"

    def __init__(self, *targets: Any) -> None:
        self.pattern = call(*targets)  # type: ignore[misc]

    def plan(self, graph: Graph, match: Match) -> fx.Node:
        source = match.root.args[0]
        assert isinstance(source, fx.Node)
        return source

    def rewrite(self, match: Match, plan: fx.Node, edit: Editor) -> None:
        edit.redirect(match.root, plan)


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda m, x: -x, id="the output itself"),
        pytest.param(lambda m, x: (x.sin(), -x), id="the second of two outputs"),
        pytest.param(lambda m, x: (-x, -x), id="the same node twice"),
        pytest.param(lambda m, x: (-x).argmax(-1), id="a number of integers"),
        pytest.param(lambda m, x: (-x) > 0.3, id="truth values"),
        pytest.param(lambda m, x: (x.relu() * 0).log() * -x, id="infinities of other signs"),
    ],
)
def test_outputs_of_any_kind_are_compared(function: Callable[[Any, Tensor], Any]) -> None:
    graph = capture(Small(function), (x := sample(4, 5),))
    before = graph.text()
    report, certifier = folded(graph, x, DropCall(ops.NEG))
    assert not report.changed
    assert len(certifier.undone) >= 1
    assert graph.text() == before


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda m, x: torch.abs(-(x.abs())) * 3, id="dies out"),
        pytest.param(lambda m, x: torch.cos(-x).argmax(-1), id="integers"),
        pytest.param(lambda m, x: (torch.cos(-x), torch.abs(-x)), id="several outputs"),
        pytest.param(lambda m, x: torch.abs(-(x * 0).log()), id="infinities"),
        pytest.param(lambda m, x: torch.abs(-(x.abs() - 10).log()), id="no numbers"),
        pytest.param(lambda m, x: torch.abs(-x)[:, :0], id="nothing"),
    ],
)
def test_what_comes_back_is_accepted(function: Callable[[Any, Tensor], Any]) -> None:
    graph = capture(Small(function), (x := sample(4, 5),))
    report, certifier = folded(graph, x, DropCall(ops.NEG))
    assert report.changed
    assert not certifier.undone
    assert all(check.relative == check.absolute == 0.0 for check in certifier.checks)


def test_the_worst_sample_decides() -> None:
    """Dropping a rectifier is right for the first sample only."""
    graph = capture(Small(lambda m, x: x.relu() + 1), (sample(4, 5),))
    certifier = Certifier(graph, [(sample(4, 5).abs(),), (sample(3, 5),)])
    report = apply_rules(graph, [DropCall(torch.ops.aten.relu.default)], name="trial", audit=certifier)
    assert not report.changed
    assert certifier.checks[0].relative > TOLERANCE


def test_a_fold_whose_node_is_the_output() -> None:
    graph = ready(nn.Sequential(UnifiedNorm(5), nn.Linear(5, 3)), x := sample(4, 5))
    expected = graph.run(x)
    report, certifier = folded(graph, x, FoldIntoReader({}))
    assert report.applied == {"fold-into-reader": 1}
    assert certifier.checks[0].compared == ("linear",)
    assert distance(graph.run(x), expected) < ROUNDING


def test_what_is_remembered_is_decided_the_same_way() -> None:
    graph = ready(chain(), x := sample(4, 5))
    twin = graph.copy()
    _, certifier = folded(graph, x, FoldIntoReader({"1.1": biased}))
    report = apply_rules(twin, [FoldIntoReader({"1.1": biased})], name="t", audit=(same := Remembered(certifier.kept)))
    assert twin.text() == graph.text()
    assert same.taken == certifier.kept
    assert [refusal.reason for refusal in report.refused] == [Reason.WRONG]


DIFFERENCES = [
    ([1.0, 2.0], [1.0, 2.0], 0.0, 0.0),
    ([1.0, 2.0], [1.0, 4.0], 2.0, 0.5),
    ([1.0, torch.nan], [1.0, torch.nan], 0.0, 0.0),
    ([1.0, torch.inf], [1.0, torch.inf], 0.0, 0.0),
    ([1.5, torch.inf], [1.0, torch.inf], 0.5, 0.5),
    ([], [], 0.0, 0.0),
]


@pytest.mark.parametrize(("found", "expected", "absolute", "relative"), DIFFERENCES)
def test_difference(found: list[float], expected: list[float], absolute: float, relative: float) -> None:
    assert difference(torch.tensor(found), torch.tensor(expected)) == (absolute, relative)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (torch.tensor([1.0, torch.nan]), torch.tensor([1.0, 2.0])),
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, torch.nan])),
        (torch.tensor([torch.inf]), torch.tensor([-torch.inf])),
        (torch.tensor([torch.inf]), torch.tensor([torch.nan])),
        (torch.tensor([1.0, 2.0]), torch.tensor([[1.0, 2.0]])),
        (torch.tensor([1, 2]), torch.tensor([1, 3])),
        (torch.tensor([True]), torch.tensor([False])),
        (torch.tensor([1e-300], dtype=torch.float64), torch.tensor([0.0], dtype=torch.float64)),
        (torch.tensor([1.0]), None),
    ],
)
def test_what_cannot_be_right(found: Tensor, expected: Any) -> None:
    assert difference(found, expected)[1] > 1.0


def certified(model: nn.Module, x: Tensor) -> Folded:
    graph = capture(lively(model), (x,))
    return fold_graph(graph, [[x]], options=FoldOptions(), origin="the test", progress=Silent())


def padded() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 3, 1), nn.Tanh(), nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1))


def test_a_wrong_border_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    x = sample(2, 2, 5, 7)
    assert certified(padded(), x).certificate["sites"][0]["repair"], "this fold needs a repair"

    def nothing(self: Repair, edit: Editor, node: fx.Node) -> None:
        """Leave the border as it is: the naive fold."""

    monkeypatch.setattr(Repair, "write", nothing)
    wrong = certified(padded(), x)
    assert not wrong.holds
    assert "fold-before-linear" in {each["rule"] for each in wrong.certificate["undone"]}
    assert wrong.certificate["affines"] == {"found": 1, "folded": 0, "left": 1}
    assert [each["reason"] for each in wrong.certificate["left"]] == ["wrong"]
    assert wrong.certificate["error"]["float64"] < ROUNDING
    assert distance(wrong.graph.run(x), [lively(padded())(x)]) < EXACT


def test_one_wrong_fold_of_several_leaves_a_right_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """``behind`` is wrong by 1e-6, ``before`` is right: the second norm folds into its reader."""
    right = LinearMap.behind

    def wrong(self: LinearMap, found: Any) -> LinearMap:
        return scaled(right(self, found))

    def model() -> nn.Module:
        first = [nn.Linear(4, 5), UnifiedNorm(5), nn.Tanh()]
        return nn.Sequential(*first, UnifiedNorm(5), nn.Linear(5, 3))

    monkeypatch.setattr(LinearMap, "behind", wrong)
    x = sample(6, 4)
    made = certified(model(), x)
    assert not made.holds
    assert {each["rule"] for each in made.certificate["undone"]} == {"fold-behind-linear"}
    assert [site["affine"] for site in made.certificate["sites"]] == ["3"]
    assert distance(made.graph.run(x), [lively(model())(x)]) < EXACT
