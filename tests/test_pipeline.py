"""Wrong orders are refused, failures are located, and the last good graph is kept."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

from normfuse.errors import InternalError, UnsupportedModel, UsageError
from normfuse.graph import Graph, capture, ops, query
from normfuse.graph.edit import editing
from normfuse.passes.presets import CANONICAL, FOLD, LOWER
from normfuse.pipeline import Fact, Pass, Phase, Pipeline
from normfuse.report import PassReport
from normfuse.testing import randomized, seeded

X = torch.randn(4, 5, generator=seeded(0))


def small_graph() -> Graph:
    return capture(randomized(nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3), nn.ReLU())), (X,))


@dataclass(frozen=True, slots=True, kw_only=True)
class Nothing(Pass):
    """Changes nothing."""

    name: ClassVar[str] = "nothing"

    def run(self, graph: Graph) -> PassReport:
        return PassReport(name=self.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Negate(Pass):
    """Changes the outputs, correctly built."""

    name: ClassVar[str] = "negate"

    def run(self, graph: Graph) -> PassReport:
        with editing(graph) as edit:
            relu = next(node for node in graph.nodes if query.is_call(node, ops.RELU))
            edit.replace(relu, ops.NEG, relu.args[0])
        return PassReport(name=self.name, applied={"negate": 1})


@dataclass(frozen=True, slots=True, kw_only=True)
class Failing(Pass):
    """Raises what it was given."""

    error: Exception
    name: ClassVar[str] = "failing"

    def run(self, graph: Graph) -> PassReport:
        raise self.error


@dataclass(frozen=True, slots=True, kw_only=True)
class Breaking(Pass):
    """Leaves a broken graph."""

    name: ClassVar[str] = "breaking"

    def run(self, graph: Graph) -> PassReport:
        for node in graph.nodes:
            if query.is_call(node, ops.RELU):
                node.target = ops.ATEN.relu_.default
        return PassReport(name=self.name, applied={"break": 1})


def run_one(step: Pass) -> InternalError:
    with pytest.raises(InternalError) as caught:
        Pipeline(phases=(Phase("first", (Nothing(),)), Phase("second", (step,)))).run(small_graph())
    return caught.value


def test_the_presets_are_in_order() -> None:
    Pipeline(phases=(CANONICAL, FOLD, LOWER)).check()


def test_a_pass_that_stands_too_early_is_refused_before_anything_runs() -> None:
    graph, ran = small_graph(), list[str]()
    before = graph.text()
    with pytest.raises(UsageError, match="pass find-affines stands too early") as caught:
        Pipeline(phases=(FOLD, CANONICAL)).run(graph, progress=ran.append)
    assert caught.value.expected == "CANONICAL before it"
    assert "canonicalize" in caught.value.hint
    assert ran == []
    assert graph.text() == before


def test_a_need_that_nothing_provides_is_refused() -> None:
    with pytest.raises(UsageError, match="stands too early") as caught:
        Pipeline(phases=(LOWER,)).check()
    assert caught.value.hint == "add the pass that provides it"
    Pipeline(phases=(LOWER,), given=frozenset({Fact.AFFINES})).check()


def test_one_report_per_pass_with_its_time() -> None:
    names: list[str] = []
    reports = Pipeline(phases=(CANONICAL, FOLD, LOWER)).run(small_graph(), progress=names.append)
    assert [report.name for report in reports] == names
    assert names[0] == "fold-constants"
    assert names[-1] == "lower-affines"
    assert all(report.seconds > 0 for report in reports)


def test_stop_after() -> None:
    graph = small_graph()
    reports = Pipeline(phases=(CANONICAL, FOLD, LOWER), stop_after="find-affines").run(graph)
    assert reports[-1].name == "find-affines"
    assert "normfuse.affine" in graph.text()


def test_stop_after_a_pass_that_is_not_there() -> None:
    with pytest.raises(UsageError, match="no pass is called fold") as caught:
        Pipeline(phases=(CANONICAL,), stop_after="fold").run(small_graph())
    assert "canonicalize" in caught.value.expected


def test_dump_gets_every_graph() -> None:
    graph, dumps = small_graph(), list[tuple[str, str]]()
    Pipeline(phases=(CANONICAL, FOLD), dump=lambda name, text: dumps.append((name, text))).run(graph)
    assert [name for name, _ in dumps] == [step.name for phase in (CANONICAL, FOLD) for step in phase.passes]
    assert dumps[-1][1] == graph.text()


@pytest.mark.parametrize("error", [ValueError("wrong number"), InternalError("wrong number", where="%relu")])
def test_a_failing_pass_is_located(error: Exception) -> None:
    located = run_one(Failing(error=error))
    assert "a pass failed: wrong number" in located.what
    assert located.where.startswith("pass failing, phase second, after nothing")
    assert located.__cause__ is error
    assert located.__dict__["graph_text"] == small_graph().text()


def test_a_broken_graph_is_located() -> None:
    located = run_one(Breaking())
    assert "a graph is not functional" in str(located)
    assert "pass breaking, phase second" in located.where
    assert "relu_" in located.where
    assert "relu_" not in located.__dict__["graph_text"]


def test_the_users_errors_go_through() -> None:
    error = UnsupportedModel("not this one")
    with pytest.raises(UnsupportedModel) as caught:
        Pipeline(phases=(Phase("only", (Failing(error=error),)),)).run(small_graph())
    assert caught.value is error


def test_bisect_names_the_first_pass_that_breaks_the_outputs() -> None:
    graph = small_graph()
    before, (expected,) = graph.text(), graph.run(X)
    pipeline = Pipeline(phases=(CANONICAL, Phase("wrong", (Nothing(), Negate(), Nothing())), FOLD))

    def is_good(trial: Graph) -> bool:
        return torch.allclose(trial.run(X)[0], expected, atol=1e-4)

    assert pipeline.bisect(graph, is_good) == "negate"
    assert Pipeline(phases=(CANONICAL, FOLD, LOWER)).bisect(graph, is_good) is None
    assert graph.text() == before


def test_every_pass_is_frozen_documented_and_named_in_kebab_case() -> None:
    passes = [step for phase in (CANONICAL, FOLD, LOWER) for step in phase.passes]
    for step in passes:
        assert step.name == step.name.lower().replace("_", "-")
        assert type(step).__doc__
        assert hash(step) == hash(type(step)())
    assert len({step.name for step in passes}) == len(passes)
