"""Rules run to a fixpoint, within bounds, and what is left is reported with its reason."""

from typing import Any, ClassVar

import pytest
import torch
from torch import fx

from normfuse.errors import InternalError
from normfuse.graph import Graph, capture, ops, query
from normfuse.graph.edit import Editor
from normfuse.report import Reason, Refusal
from normfuse.rewrite import Match, Rule, apply_rules, call
from normfuse.testing import Small


class _To(Rule[Any]):
    """Replaces its root's operator by ``target``."""

    target: ClassVar[Any]

    def plan(self, graph: Graph, match: Match) -> Any:
        return ()

    def rewrite(self, match: Match, plan: Any, edit: Editor) -> None:
        edit.replace(match.root, self.target, match.root.args[0])


class ReluIsTanh(_To):
    name: ClassVar[str] = "relu-is-tanh"
    pattern = call(ops.RELU)
    target = ops.ATEN.tanh.default


class TanhIsRelu(_To):
    name: ClassVar[str] = "tanh-is-relu"
    pattern = call(ops.ATEN.tanh.default)
    target = ops.RELU


class LeaveRelu(Rule[None]):
    name: ClassVar[str] = "leave-relu"
    pattern = call(ops.RELU)

    def plan(self, graph: Graph, match: Match) -> Refusal:
        return Refusal(match.root.name, Reason.NONLINEAR_READER)

    def rewrite(self, match: Match, plan: None, edit: Editor) -> None:
        raise AssertionError


class Broken(_To):
    name: ClassVar[str] = "broken"
    pattern = call(ops.RELU)
    target = ops.CAT


class Describing(ReluIsTanh):
    def describe(self, graph: Graph, match: Match, plan: Any) -> dict[str, str]:
        return {"site": match.root.name}


def chain() -> Graph:
    return capture(Small(lambda m, x: x.relu().sin().relu()), torch.ones(3, 5))


def calls(graph: Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]


def test_counts_and_sites() -> None:
    graph = chain()
    report = apply_rules(graph, [Describing()], name="p")
    assert report.name == "p"
    assert report.applied == {"relu-is-tanh": 2}
    rule = {"rule": "relu-is-tanh"}
    assert report.sites == ({**rule, "node": "relu", "site": "relu"}, {**rule, "node": "relu_1", "site": "relu_1"})
    assert report.seconds > 0
    assert calls(graph) == ["aten.tanh.default", "aten.sin.default", "aten.tanh.default"]
    assert torch.equal(graph.run(torch.ones(2, 5))[0], torch.ones(2, 5).tanh().sin().tanh())


def test_nothing_to_do_is_no_change() -> None:
    graph = chain()
    before = graph.text()
    report = apply_rules(graph, [TanhIsRelu()], name="p")
    assert not report.changed
    assert graph.text() == before


def test_refusals_are_those_of_the_last_sweep_once_each() -> None:
    report = apply_rules(chain(), [LeaveRelu()], name="p")
    assert [refusal.node for refusal in report.refused] == ["relu", "relu_1"]
    # The same rule refused both relus in the first sweep, before the other took them.
    report = apply_rules(chain(), [LeaveRelu(), ReluIsTanh()], name="p")
    assert report.refused == ()


def test_rules_that_undo_each_other_are_named() -> None:
    with pytest.raises(InternalError, match="p does not come to an end") as caught:
        apply_rules(chain(), [ReluIsTanh(), TanhIsRelu()], name="p", sweeps=5)
    # Both rules, and the line that each of them changed.
    assert "relu-is-tanh: %relu" in caught.value.where
    assert "tanh-is-relu: %" in caught.value.where


class Wrongly(_To):
    """Right for sin, wrong for relu."""

    name: ClassVar[str] = "wrongly"
    pattern = call(ops.RELU, ops.ATEN.sin.default)

    def rewrite(self, match: Match, plan: Any, edit: Editor) -> None:
        target = ops.ATEN.tanh.default if match.root.target is ops.RELU else ops.ATEN.cos.default
        edit.replace(match.root, target, match.root.args[0])


class Watching:
    """Accepts cosines only, and writes down what it was asked."""

    def __init__(self, forbidden: str = "") -> None:
        self.asked, self.forbidden = list[str](), forbidden

    def allows(self, rule: str, node: str) -> bool:
        return node != self.forbidden

    def accepts(self, graph: Graph, rule: str, node: str) -> bool:
        self.asked.append(node)
        graph.run(torch.ones(2, 5))  # what is judged is a whole graph
        return "aten.tanh" not in graph.text()


def test_a_wrong_rewrite_is_undone_and_reported_and_the_rest_is_kept() -> None:
    graph, audit = chain(), Watching()
    report = apply_rules(graph, [Wrongly()], name="p", audit=audit)
    assert report.applied == {"wrongly": 1}
    assert {(refusal.node, refusal.reason) for refusal in report.refused} == {
        ("relu", Reason.WRONG),
        ("relu_1", Reason.WRONG),
    }
    assert calls(graph) == ["aten.relu.default", "aten.cos.default", "aten.relu.default"]
    assert torch.equal(graph.run(torch.ones(2, 5))[0], torch.ones(2, 5).cos())
    assert sorted(audit.asked) == ["relu", "relu_1", "sin"]  # each once


def test_any_number_of_wrong_rewrites_is_undone() -> None:
    def many(m: Any, x: torch.Tensor) -> torch.Tensor:
        for _ in range(20):
            x = x.sin().relu()
        return x

    graph = capture(Small(many), torch.ones(3, 5))
    report = apply_rules(graph, [Wrongly()], name="p", sweeps=3, audit=Watching())
    assert report.applied == {"wrongly": 20}
    assert len(report.refused) == 20
    assert calls(graph) == 20 * ["aten.cos.default", "aten.relu.default"]


def test_what_the_audit_does_not_allow_is_not_tried() -> None:
    graph, audit = chain(), Watching(forbidden="sin")
    report = apply_rules(graph, [Wrongly()], name="p", audit=audit)
    assert report.applied == {}
    assert {refusal.node for refusal in report.refused} == {"relu", "sin", "relu_1"}
    assert "sin" not in audit.asked


def test_a_failing_rule_is_located() -> None:
    with pytest.raises(InternalError, match="rule broken failed") as caught:
        apply_rules(chain(), [Broken()], name="p")
    assert "%relu = aten.relu(%x)" in caught.value.where
    assert caught.value.__cause__ is not None


def test_a_node_that_a_rule_removed_is_not_matched_again() -> None:
    seen: list[str] = []

    class DropBoth(Rule[fx.Node]):
        name: ClassVar[str] = "drop-both"
        pattern = call(ops.ATEN.sin.default)

        def plan(self, graph: Graph, match: Match) -> Any:
            return match.root.args[0]

        def rewrite(self, match: Match, plan: fx.Node, edit: Editor) -> None:
            (after,) = query.readers(match.root)
            edit.redirect(after, plan)

    class Seeing(Rule[None]):
        name: ClassVar[str] = "seeing"
        pattern = call(ops.RELU)

        def plan(self, graph: Graph, match: Match) -> None:
            seen.append(match.root.name)

        def rewrite(self, match: Match, plan: None, edit: Editor) -> None:
            raise AssertionError

    graph = chain()
    apply_rules(graph, [DropBoth(), Seeing()], name="p")
    assert calls(graph) == ["aten.relu.default"]
    assert "relu_1" not in seen


class AcceptAll:
    """An audit that has nothing against any step."""

    def allows(self, rule: str, node: str) -> bool:
        return True

    def accepts(self, graph: Graph, rule: str, node: str) -> bool:
        return True


def test_audited_steps_are_compiled_once_per_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = list[int]()
    compile_graph = fx.GraphModule.recompile

    def counted(self: fx.GraphModule) -> Any:
        compiled[-1] += 1
        return compile_graph(self)

    def many(x: torch.Tensor, steps: int) -> torch.Tensor:
        for _ in range(steps):
            x = x.relu()
        return x

    for steps in (2, 9):
        graph = capture(Small(lambda m, x, steps=steps: many(x, steps)), (torch.ones(2, 3),))
        compiled.append(0)
        with monkeypatch.context() as patched:
            patched.setattr(fx.GraphModule, "recompile", counted)
            report = apply_rules(graph, [ReluIsTanh()], name="trial", audit=AcceptAll())
        assert report.applied == {"relu-is-tanh": steps}
        assert not any(query.is_call(node, ops.RELU) for node in graph.nodes)
    assert compiled[0] == compiled[1]
