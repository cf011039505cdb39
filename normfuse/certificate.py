"""The proof of a fold: every step checked in float64 when it is made, undone where it is wrong, written down."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, fx

from normfuse.graph import Graph

__all__ = ["TOLERANCE", "Certifier", "Remembered", "SiteCheck", "Step", "difference"]

TOLERANCE: Final = 1e-9
"""Largest error of a right fold, relative to the tensor's largest magnitude: float64 rounds at 1e-16, and a channel
that is nearly dead loses up to seven digits."""

Values = dict[str, Any]
Signature = tuple[Any, ...]
Step = tuple[str, str]
"""A rule and the node it was applied at."""


@dataclass(frozen=True, slots=True)
class SiteCheck:
    """What the float64 run said of one step: largest differences where the change dies out."""

    rule: str
    node: str
    absolute: float
    relative: float
    compared: tuple[str, ...]
    holds: bool


@dataclass(slots=True)
class _Seen:
    """Values of one sample at every node, by name."""

    inputs: tuple[Tensor, ...]
    values: Values = field(default_factory=dict)


class Certifier:
    """Audits rules on a float64 graph (`rewrite.Audit`).

    After each step only what it changed is run again, up to the nodes where the old value comes back: a fold is right
    if its change dies out before or at the outputs, and wrong if it does not.
    """

    def __init__(
        self,
        graph: Graph,
        samples: Sequence[Sequence[Tensor]],
        *,
        only: frozenset[Step] | None = None,
        tolerance: float = TOLERANCE,
    ) -> None:
        self._only, self._tolerance = only, tolerance
        self._seen = [_Seen(tuple(_wide(value) for value in sample)) for sample in samples]
        self._signatures: dict[str, Signature] = {}
        self.checks: list[SiteCheck] = []
        self._undone: set[Step] = set()
        self.start(graph)

    @property
    def undone(self) -> frozenset[Step]:
        """Rule and node of every step that was wrong."""
        return frozenset(self._undone)

    @property
    def kept(self) -> frozenset[Step]:
        """Rule and node of every step that was right."""
        return frozenset((check.rule, check.node) for check in self.checks if check.holds)

    def start(self, graph: Graph) -> None:
        """Take the graph as it is for right and remember its values."""
        for seen in self._seen:
            seen.values = {}
            _run(graph, seen.inputs, seen.values, {}, self._tolerance)
        self._signatures = _signatures(graph)

    def allows(self, rule: str, node: str) -> bool:
        """Return whether this step is among those asked for and has not been found wrong."""
        step = (rule, node)
        return step not in self._undone and (self._only is None or step in self._only)

    def accepts(self, graph: Graph, rule: str, node: str) -> bool:
        """Run what changed and say whether the graph still computes the same."""
        results, fresh = [], []
        for seen in self._seen:
            values = dict(seen.values)
            results.append(_run(graph, seen.inputs, values, self._signatures, self._tolerance))
            fresh.append(values)
        absolute = max(result.absolute for result in results)
        relative = max(result.relative for result in results)
        holds = relative <= self._tolerance
        compared = tuple(dict.fromkeys(name for result in results for name in result.compared))
        self.checks.append(SiteCheck(rule, node, absolute, relative, compared, holds))
        if holds:
            self._signatures = _signatures(graph)
            for seen, values in zip(self._seen, fresh, strict=True):
                seen.values = values
        else:
            self._undone.add((rule, node))
        return holds


class Remembered:
    """Takes only the steps that a certifier kept, on the same graph in another type, and notes which it took."""

    def __init__(self, kept: frozenset[Step]) -> None:
        self._kept, self._taken = kept, set[Step]()

    @property
    def taken(self) -> frozenset[Step]:
        """Rule and node of every step taken: a narrow type holds fewer folded constants than float64."""
        return frozenset(self._taken)

    def allows(self, rule: str, node: str) -> bool:
        """Return whether the certifier kept this step."""
        return (rule, node) in self._kept

    def accepts(self, graph: Graph, rule: str, node: str) -> bool:
        """Accept: the float64 run has decided."""
        self._taken.add((rule, node))
        return True


@dataclass(slots=True)
class _Outcome:
    absolute: float = 0.0
    relative: float = 0.0
    compared: list[str] = field(default_factory=list)


def _wide(value: Tensor) -> Tensor:
    return value.double() if value.is_floating_point() else value


def _signatures(graph: Graph) -> dict[str, Signature]:
    return {node.name: _signature(graph, node) for node in graph.nodes}


def _signature(graph: Graph, node: fx.Node) -> Signature:
    if node.op == "get_attr":
        return ("constant", id(graph.module.get_buffer(str(node.target))))
    return (node.op, node.target, repr(node.args), repr(node.kwargs))


def _run(
    graph: Graph, inputs: tuple[Tensor, ...], values: Values, known: dict[str, Signature], tolerance: float
) -> _Outcome:
    """Bring ``values`` up to date with the graph; ``known`` are the signatures that they belong to."""
    outcome, changed, old = _Outcome(), set[str](), dict(values)
    waiting = iter(inputs)
    with torch.no_grad():
        for node in graph.nodes:
            if node.op == "placeholder":
                values[node.name] = next(waiting)
                continue
            sources = [source.name for source in node.all_input_nodes]
            same = node.name in old and known.get(node.name) == _signature(graph, node)
            if same and changed.isdisjoint(sources) and node.op != "output":
                continue
            if node.op == "output":
                _compare_outputs(node, values, old, outcome)
                continue
            value = _compute(graph, node, values)
            if node.op == "call_function" and _comes_back(node.name, value, old, tolerance, outcome):
                continue  # the old value stays: errors do not add up over the steps
            values[node.name] = value
            changed.add(node.name)
    return outcome


def _compute(graph: Graph, node: fx.Node, values: Values) -> Any:
    if node.op == "get_attr":
        return graph.module.get_buffer(str(node.target))
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: values[source.name])
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _comes_back(name: str, value: Any, old: Values, tolerance: float, outcome: _Outcome) -> bool:
    if name not in old or not isinstance(value, Tensor):
        return False
    absolute, relative = difference(value, old[name])
    if relative > tolerance:
        return False
    _note(outcome, name, absolute, relative)
    return True


def _compare_outputs(node: fx.Node, values: Values, old: Values, outcome: _Outcome) -> None:
    """Compare what the graph returns with what it returned: by position, as outputs may be other nodes now."""
    found = [values[source.name] for source in node.args[0]]  # type: ignore[union-attr, index]
    expected = old.get("", found)
    values[""] = found if not old else expected
    for index, (ours, reference) in enumerate(zip(found, expected, strict=True)):
        if ours is not reference:
            _note(outcome, f"output {index}", *difference(ours, reference))


def _note(outcome: _Outcome, name: str, absolute: float, relative: float) -> None:
    outcome.compared.append(name)
    outcome.absolute, outcome.relative = max(outcome.absolute, absolute), max(outcome.relative, relative)


def difference(value: Tensor, reference: Any) -> tuple[float, float]:
    """Return the largest difference, absolute and relative to the reference's largest magnitude (inf: none).

    Not channel by channel: a channel of small numbers may be the difference of large ones, and carries their rounding.
    What is wrong in a channel 1e9 times smaller than another is therefore not seen.
    """
    if not isinstance(reference, Tensor) or value.shape != reference.shape:
        return float("inf"), float("inf")
    if not value.is_floating_point():
        same = torch.equal(value, reference)
        return (0.0, 0.0) if same else (float("inf"), float("inf"))
    if not value.numel() or torch.equal(value, reference):
        return 0.0, 0.0
    equal = (value == reference) | (value.isnan() & reference.isnan())
    difference = torch.where(equal, 0.0, (value - reference).abs()).nan_to_num(nan=float("inf")).max()
    scale = reference.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).abs().max()
    absolute = float(difference)
    return absolute, absolute / max(float(scale), torch.finfo(torch.float64).tiny)
