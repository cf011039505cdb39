"""Applies rules to a fixpoint, within bounds, and reports what was applied and refused."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Final

from torch import fx

from normfuse.errors import InternalError
from normfuse.graph.edit import Editor
from normfuse.graph.graph import Graph
from normfuse.graph.text import render_node
from normfuse.report import PassReport, Refusal
from normfuse.rewrite.rule import Rule

__all__ = ["apply_rules"]

MAXIMUM_SWEEPS: Final = 16


def apply_rules(graph: Graph, rules: Sequence[Rule[Any]], *, name: str, sweeps: int = MAXIMUM_SWEEPS) -> PassReport:
    """Sweep over the graph until no rule applies.

    Refusals are those of the last sweep: what the final graph still holds and why.

    Raises:
        InternalError: rules keep undoing each other; the message names the last two.
    """
    started = time.perf_counter()
    edit, applied, sites = Editor(graph), list[str](), list[dict[str, str]]()
    for _ in range(sweeps):
        names, refused, told = _sweep(graph, rules, edit)
        edit.finish()
        applied += names
        sites += told
        if not names:
            seconds = time.perf_counter() - started
            counts = PassReport.count(applied)
            return PassReport(name=name, applied=counts, refused=tuple(refused), sites=tuple(sites), seconds=seconds)
    raise InternalError(f"{name} does not come to an end", where=f"rules {' and '.join(sorted(set(applied[-2:])))}")


def _sweep(
    graph: Graph, rules: Sequence[Rule[Any]], edit: Editor
) -> tuple[list[str], list[Refusal], list[dict[str, str]]]:
    applied, refused, sites = list[str](), list[Refusal](), list[dict[str, str]]()
    for node in list(graph.nodes):
        for rule in rules:
            if _is_gone(node) or (match := rule.pattern.match(node)) is None:
                continue
            plan = rule.plan(graph, match)
            if isinstance(plan, Refusal):
                refused.append(plan)
            elif plan is not None:
                sites += [site] if (site := rule.describe(match, plan)) else []
                _rewrite(rule, match, plan, edit)
                applied.append(rule.name)
                break
    return applied, refused, sites


def _rewrite(rule: Rule[Any], match: Any, plan: Any, edit: Editor) -> None:
    line = render_node(match.root)
    try:
        rule.rewrite(match, plan, edit)
    except (RuntimeError, ValueError, TypeError, KeyError, IndexError) as error:
        raise InternalError(f"rule {rule.name} failed: {error}", where=line.strip()) from error


def _is_gone(node: fx.Node) -> bool:
    return bool(node._erased) or (not node.users and node.op == "call_function")
