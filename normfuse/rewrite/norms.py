"""Rules that write what is constant in a norm as an affine: all of it, or gamma and beta."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import torch
from torch import fx

from normfuse.graph import Graph, ops, query
from normfuse.graph.affine import IDENTITY, Affine, write_affine
from normfuse.graph.edit import Editor
from normfuse.graph.progression import steps_left
from normfuse.report import Reason, Refusal
from normfuse.rewrite.pattern import Match, call
from normfuse.rewrite.rule import Rule

__all__ = ["NORM_RULES"]


class BatchNormIsAffine(Rule[Affine]):
    """gamma * (x - mean) / sqrt(var + eps) + beta along axis 1 (methods: BatchNorm, EstBN, RepBN's half)."""

    name: ClassVar[str] = "batch-norm-is-affine"
    pattern = call(ops.GETITEM, args=(call(ops.BATCH_NORM, as_="norm"),))

    def plan(self, graph: Graph, match: Match) -> Affine | Refusal:
        """Return the affine in float64; eps stands inside the root."""
        norm = match["norm"]
        if left := steps_left(norm):
            detail = f"{left} training forwards are left; train until iter is 0"
            return Refusal(match.root.name, Reason.PROGRESSION, detail, query.layer_of(norm))
        return _frozen_statistics(graph, match.root, norm.args[1:5], float(norm.args[6]))  # type: ignore[arg-type]

    def rewrite(self, match: Match, plan: Affine, edit: Editor) -> None:
        """Replace the norm's first result."""
        write_affine(edit, match.root, match["norm"].args[0], plan)  # type: ignore[arg-type]


def _frozen_statistics(graph: Graph, node: fx.Node, parameters: Sequence[Any], eps: float) -> Affine | Refusal:
    """Return the affine of gamma, beta, mean and variance (the first two may be None)."""
    given = [parameter for parameter in parameters if isinstance(parameter, fx.Node)]
    if not all(query.is_constant(parameter) for parameter in given):
        return Refusal(node.name, Reason.NOT_CONSTANT, layer=query.layer_of(node))
    gamma, beta, mean, variance = (
        query.constant(graph, parameter).double() if isinstance(parameter, fx.Node) else None
        for parameter in parameters
    )
    assert mean is not None
    assert variance is not None
    scale = torch.rsqrt(variance + eps) * (1.0 if gamma is None else gamma)
    found = Affine(scale, -mean * scale + (0.0 if beta is None else beta), 1)
    fits = found.fits(query.dtype(node))
    return found if fits else Refusal(node.name, Reason.OVERFLOW, layer=query.layer_of(node))


@dataclass(frozen=True, slots=True)
class _Ending:
    """gamma and beta of a norm, and where the norm's call has them."""

    affine: Affine
    positions: tuple[int, ...]


class NormEndsInAffine(Rule[_Ending]):
    """norm(x; gamma, beta) = gamma * norm(x) + beta, along the last axis (layer, RMS) or axis 1 (group, instance)."""

    name: ClassVar[str] = "norm-ends-in-affine"
    pattern = call(*ops.ONLINE_NORMS)

    def plan(self, graph: Graph, match: Match) -> _Ending | None:
        """Return gamma and beta."""
        node, positions = match.root, ops.ONLINE_NORMS[match.root.target]
        parameters = [
            query.argument(node, index, name) for index, name in zip(positions, ("weight", "bias"), strict=False)
        ]
        given = [parameter for parameter in parameters if parameter is not None]
        over_last = node.target in (ops.LAYER_NORM, ops.RMS_NORM)
        if not given or not all(query.is_constant(parameter) for parameter in given) or _is_frozen(node):
            return None
        if over_last and len(node.args[1]) != 1:  # type: ignore[arg-type]
            return None
        gamma, beta = [*parameters, None][:2]
        scale = query.constant(graph, gamma).double() if gamma is not None else IDENTITY.scale
        shift = query.constant(graph, beta).double() if beta is not None else IDENTITY.shift
        return _Ending(Affine(scale, shift, query.rank(node) - 1 if over_last else 1).spread(), positions)

    def rewrite(self, match: Match, plan: _Ending, edit: Editor) -> None:
        """Split the norm in two."""
        node = match.root
        bare = edit.call(node.target, *node.args, at=node, **node.kwargs)  # type: ignore[arg-type]
        for position in plan.positions:
            edit.set_argument(bare, position, None)
        write_affine(edit, node, bare, plan.affine)


def _is_frozen(node: fx.Node) -> bool:
    """Return whether an instance norm uses the statistics it has kept."""
    return node.target is ops.INSTANCE_NORM and not query.argument(node, 5, "use_input_stats")


class FrozenInstanceNormIsAffine(Rule[Affine]):
    """An instance norm that uses the statistics it has kept is a batch norm."""

    name: ClassVar[str] = "frozen-instance-norm-is-affine"
    pattern = call(ops.INSTANCE_NORM)

    def plan(self, graph: Graph, match: Match) -> Affine | Refusal | None:
        """Return the affine in float64; eps stands inside the root."""
        node = match.root
        if not _is_frozen(node):
            return None
        return _frozen_statistics(graph, node, node.args[1:5], float(node.args[7]))  # type: ignore[arg-type]

    def rewrite(self, match: Match, plan: Affine, edit: Editor) -> None:
        """Replace the norm."""
        write_affine(edit, match.root, match.root.args[0], plan)  # type: ignore[arg-type]


NORM_RULES: Final[tuple[Rule[Any], ...]] = (BatchNormIsAffine(), FrozenInstanceNormIsAffine(), NormEndsInAffine())
