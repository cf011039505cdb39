"""Applies rules to a fixpoint, within bounds, and reports what was applied and refused."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Final, Protocol

from torch import fx

from normfuse.errors import InternalError
from normfuse.graph import query
from normfuse.graph.edit import Editor
from normfuse.graph.graph import Graph, Snapshot
from normfuse.graph.text import render_node
from normfuse.report import PassReport, Reason, Refusal
from normfuse.rewrite.rule import Rule

__all__ = ["Audit", "apply_rules"]

MAXIMUM_SWEEPS: Final = 16


class Audit(Protocol):
    """Looks over the driver's shoulder: what must not be applied, and whether what was applied is right."""

    def allows(self, rule: str, node: str) -> bool:
        """Return whether ``rule`` may be applied at ``node``."""

    def accepts(self, graph: Graph, rule: str, node: str) -> bool:
        """Return whether ``graph``, just changed by ``rule`` at ``node``, computes what it did; else it is undone."""


def apply_rules(
    graph: Graph, rules: Sequence[Rule[Any]], *, name: str, sweeps: int = MAXIMUM_SWEEPS, audit: Audit | None = None
) -> PassReport:
    """Sweep over the graph until no rule applies; what ``audit`` has undone once is not tried again.

    Refusals are those of the last sweep: what the final graph still holds and why.

    Raises:
        InternalError: rules keep undoing each other; the message names those of the last two sweeps and their nodes.
    """
    started, edit = time.perf_counter(), Editor(graph)
    applied, sites = list[str](), list[dict[str, str]]()
    before, undone = list[str](), set[tuple[str, str]]()
    while sweeps:
        sweep = _Sweep(graph, rules, edit, audit, undone)
        sweeps -= not sweep.undone  # there are as many of those as wrong sites
        edit.finish()
        applied += sweep.applied
        sites += sweep.sites
        if not sweep.applied and not sweep.undone:
            return PassReport(
                name=name,
                applied=PassReport.count(applied),
                refused=tuple(sweep.refused),
                sites=tuple(sites),
                seconds=time.perf_counter() - started,
            )
        before, last = sweep.lines, before
    raise InternalError(f"{name} does not come to an end", where="; ".join(dict.fromkeys([*last, *before])))


class _Sweep:
    """One walk over the nodes; the first rule that matches a node and has a plan is applied."""

    def __init__(
        self,
        graph: Graph,
        rules: Sequence[Rule[Any]],
        edit: Editor,
        audit: Audit | None,
        wrong: set[tuple[str, str]],
    ) -> None:
        self._graph, self._edit, self._audit, self._wrong = graph, edit, audit, wrong
        self.applied, self.refused = list[str](), list[Refusal]()
        self.sites, self.lines = list[dict[str, str]](), list[str]()
        self.undone = False
        for node in list(graph.nodes):
            if any(self._try(rule, node) for rule in rules) and self.undone:
                return  # the nodes are those of the copy now

    def _try(self, rule: Rule[Any], node: fx.Node) -> bool:
        """Return whether the rule was applied (and perhaps undone)."""
        if _is_gone(node) or (match := rule.pattern.match(node)) is None:
            return False
        plan = rule.plan(self._graph, match)
        if plan is None:
            return False
        if isinstance(plan, Refusal):
            self.refused.append(plan)
            return False
        name, line = node.name, f"{rule.name}: {render_node(node).strip()}"
        if self._audit is not None and not self._allows(rule.name, name):
            self.refused.append(Refusal(name, Reason.WRONG, layer=query.layer_of(node)))
            return False
        site = rule.describe(self._graph, match, plan)
        kept = self._graph.snapshot() if self._audit is not None else None
        _rewrite(rule, match, plan, self._edit)
        if self._audit is not None and kept is not None and not self._audited(rule, name, kept):
            return True
        self.applied.append(rule.name)
        self.lines.append(line)
        self.sites += [{"rule": rule.name, "node": name, **site}] if site else []
        return True

    def _allows(self, rule: str, name: str) -> bool:
        assert self._audit is not None
        return (rule, name) not in self._wrong and self._audit.allows(rule, name)

    def _audited(self, rule: Rule[Any], name: str, kept: Snapshot) -> bool:
        assert self._audit is not None
        self._edit.clean()  # an audit walks over the nodes: compiling them at every step would take the most time
        if self._audit.accepts(self._graph, rule.name, name):
            return True
        self._graph.restore(kept)
        self._wrong.add((rule.name, name))
        self.undone = True
        return False


def _rewrite(rule: Rule[Any], match: Any, plan: Any, edit: Editor) -> None:
    line = render_node(match.root)
    try:
        rule.rewrite(match, plan, edit)
    except (RuntimeError, ValueError, TypeError, KeyError, IndexError) as error:
        raise InternalError(f"rule {rule.name} failed: {error}", where=line.strip()) from error


def _is_gone(node: fx.Node) -> bool:
    return bool(node._erased) or (not node.users and node.op == "call_function")
