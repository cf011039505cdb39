"""Rules that write layer norm over several axes, group norm and instance norm as layer norm over one axis."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Final

from torch import fx

from normfuse.graph import Graph, ops, query
from normfuse.graph.edit import Editor
from normfuse.rewrite.pattern import Match, call
from normfuse.rewrite.rule import Rule

__all__ = ["ONE_AXIS_NORM_RULES"]


class SeveralAxesAreOne(Rule[list[int]]):
    """layer_norm(x; over c, h, w) = layer_norm(x as [..., c h w]), and the same for RMS norm."""

    name: ClassVar[str] = "several-axes-are-one"
    pattern = call(ops.LAYER_NORM, ops.RMS_NORM)

    def plan(self, graph: Graph, match: Match) -> list[int] | None:
        """Return the joint shape; one size at most may be unknown, and gamma and beta are constants."""
        node = match.root
        over = list(node.args[1])  # type: ignore[arg-type]
        parameters = [query.argument(node, 2, "weight")]
        parameters += [query.argument(node, 3, "bias")] if node.target is ops.LAYER_NORM else []
        if len(over) < 2 or not all(each is None or query.is_constant(each) for each in parameters):
            return None
        sizes = _known(query.shape(node))
        joint = [*sizes[: -len(over)], math.prod(sizes[-len(over) :])]
        return joint if sizes.count(-1) <= 1 and joint[-1] > 0 else None

    def rewrite(self, match: Match, plan: list[int], edit: Editor) -> None:
        """Join the axes, normalize, and part them."""
        node = match.root
        parameters = [_joint(edit, each) for each in node.args[2:]]
        words = {name: _joint(edit, each) for name, each in node.kwargs.items()}
        joint = edit.call(ops.RESHAPE, node.args[0], plan, at=node)
        norm = edit.call(node.target, joint, plan[-1:], *parameters, at=node, **words)
        edit.replace(node, ops.RESHAPE, norm, _known(query.shape(node)))


def _joint(edit: Editor, argument: Any) -> Any:
    """Return an argument of the norm over one axis; a constant is a vector there."""
    if not isinstance(argument, fx.Node):
        return argument
    return edit.constant(query.constant(edit.graph, argument).reshape(-1), f"{argument.target}_joint", like=argument)


@dataclass(frozen=True, slots=True)
class _Groups:
    """Samples as ``[batch, groups, numbers]``, gamma and beta along axis 1, and eps."""

    joint: list[int]
    parameters: tuple[fx.Node | None, fx.Node | None]
    eps: float


class GroupsAreRows(Rule[_Groups]):
    """group_norm(x; G) = gamma * layer_norm(x as [N, G, numbers of a group]) + beta; of instance norm, G = C."""

    name: ClassVar[str] = "groups-are-rows"
    pattern = call(ops.GROUP_NORM, ops.INSTANCE_NORM)

    def plan(self, graph: Graph, match: Match) -> _Groups | None:
        """Return the groups; all sizes but the batch are known and gamma and beta are constants."""
        node = match.root
        _, channels, *others = sizes = _known(query.shape(node))
        is_group = node.target is ops.GROUP_NORM
        if not is_group and not query.argument(node, 5, "use_input_stats"):  # an affine, and found as one
            return None
        if -1 in sizes[1:]:
            return None
        gamma, beta = (query.argument(node, index + is_group, name) for index, name in ((1, "weight"), (2, "bias")))
        if not all(each is None or query.is_constant(each) for each in (gamma, beta)):
            return None
        groups = int(node.args[1]) if is_group else channels  # type: ignore[arg-type]
        eps = float(query.argument(node, 4 if is_group else 7, "eps", 1e-5))
        return _Groups([sizes[0], groups, channels // groups * math.prod(others)], (gamma, beta), eps)

    def rewrite(self, match: Match, plan: _Groups, edit: Editor) -> None:
        """Normalize rows; gamma and beta become a product and a sum."""
        node = match.root
        rows = edit.call(ops.RESHAPE, node.args[0], plan.joint, at=node)
        norm = edit.call(ops.LAYER_NORM, rows, plan.joint[-1:], None, None, plan.eps, at=node)
        found = edit.call(ops.RESHAPE, norm, _known(query.shape(node)), at=node)
        for target, each in zip((ops.MUL, ops.ADD), plan.parameters, strict=True):
            if each is not None:
                along = query.constant(edit.graph, each).reshape(-1, *[1] * (query.rank(node) - 2))
                vector = edit.constant(along, f"{each.target}_along", like=each)
                found = edit.call(target, found, vector, at=node)
        edit.redirect(node, found)


def _known(sizes: Any) -> list[int]:
    """Return sizes with -1 for those that are not known."""
    return [size if isinstance(size, int) else -1 for size in sizes]


ONE_AXIS_NORM_RULES: Final[tuple[Rule[Any], ...]] = (SeveralAxesAreOne(), GroupsAreRows())
