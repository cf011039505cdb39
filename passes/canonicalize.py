"""One spelling per operation: identities out, views as reshape, transposes as permute."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Final

from normfuse.graph import Graph, ops, query
from normfuse.graph.edit import Editor
from normfuse.pipeline import Fact, Pass
from normfuse.report import PassReport
from normfuse.rewrite import Match, Rule, apply_rules, call
from normfuse.rewrite.products import PRODUCT_RULES
from normfuse.rewrite.views import VIEW_RULES

__all__ = ["Canonicalize"]

ATEN = ops.ATEN

PADDED_BY_WORD: Final = {
    ATEN.conv1d.padding: ops.CONV1D,
    ATEN.conv2d.padding: ops.CONV2D,
    ATEN.conv3d.padding: ops.CONV3D,
}

BY_AXES: Final = {
    1: (ops.CONV1D, ATEN.conv1d.padding, ops.CONV_TRANSPOSE1D),
    2: (ops.CONV2D, ATEN.conv2d.padding, ops.CONV_TRANSPOSE2D),
    3: (ops.CONV3D, ATEN.conv3d.padding, ops.CONV_TRANSPOSE3D),
}
"""Number of spatial axes -> convolution, the same padded by a word, transposed convolution."""

# What torch's own dispatch makes of a batch norm, and where its eps stands.
BATCH_NORMS: Final = {
    ATEN._native_batch_norm_legit_functional.default: 7,
    ATEN.miopen_batch_norm.default: 7,
    ATEN._batch_norm_no_update.default: 6,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Canonicalize(Pass):
    """Give every operation one spelling.

    1. What returns its input in eval mode (dropout, clone, alias, full slice, cast to its own type) goes.
    2. view, flatten, unflatten, unsqueeze and squeeze become reshape, so that no view depends on strides.
    3. transpose and t become permute; permutes merge, reshapes merge, and those that change nothing go.
    4. A matrix product with a constant matrix on the right (one for all of a batch, or repeated), addmm and an einsum
       of a tensor and a matrix become linear; addmm's alpha stays a product behind it.
    5. A linear map's constant bias becomes one number per output; one that differs between rows is added behind it.
    6. A convolution that does not say its number of axes (traced models have them) becomes conv1d, conv2d, conv3d or
       their transpose; every batch norm with given statistics becomes the one that never trains.
    7. A convolution's padding given as a word becomes numbers; what is more on one side is padded in front of it.

    Exact: not one arithmetic operation changes (4 and 5 keep product and sum).
    """

    name: ClassVar[str] = "canonicalize"
    provides: ClassVar[frozenset[Fact]] = frozenset({Fact.CANONICAL})

    def run(self, graph: Graph) -> PassReport:
        """Apply the rules to a fixpoint."""
        return apply_rules(graph, [*VIEW_RULES, *PRODUCT_RULES, *CALL_RULES], name=self.name)


@dataclass(frozen=True, slots=True)
class _Convolution:
    target: Any
    args: list[Any]


class ConvolutionSaysItsAxes(Rule[_Convolution]):
    """convolution(x, W, ...) = conv2d(x, W, ...), or conv_transpose2d, where W has two spatial axes (6)."""

    name: ClassVar[str] = "convolution-says-its-axes"
    pattern = call(ops.CONVOLUTION, ATEN._convolution.default, ATEN._convolution_mode.default)

    def plan(self, graph: Graph, match: Match) -> _Convolution | None:
        """Return the operator and its arguments, a number for every spatial axis."""
        node = match.root
        axes = query.rank(node) - 2
        if axes not in BY_AXES or node.kwargs:
            return None
        plain, by_word, transposed = BY_AXES[axes]
        if node.target is ATEN._convolution_mode.default:
            return _Convolution(by_word, list(node.args))
        x, weight, bias, *sizes = node.args[:9]
        stride, padding, dilation, is_transposed, more, groups = (
            size * axes if isinstance(size, list) and len(size) == 1 else size for size in sizes
        )
        if is_transposed:
            return _Convolution(transposed, [x, weight, bias, stride, padding, more, groups, dilation])
        return _Convolution(plain, [x, weight, bias, stride, padding, dilation, groups])

    def rewrite(self, match: Match, plan: _Convolution, edit: Editor) -> None:
        """Call the operator for this number of axes."""
        edit.replace(match.root, plan.target, *plan.args)


class BatchNormNeverTrains(Rule[list[Any]]):
    """Every batch norm whose statistics are given is ``_native_batch_norm_legit_no_training`` (6)."""

    name: ClassVar[str] = "batch-norm-never-trains"
    pattern = call(ops.GETITEM, args=(call(*BATCH_NORMS, as_="norm"),))

    def plan(self, graph: Graph, match: Match) -> list[Any] | None:
        """Return x, gamma, beta, mean, variance, momentum and eps; the norm must not train."""
        norm = match["norm"]
        eps = BATCH_NORMS[norm.target]
        trains = eps == 7 and norm.args[5]
        statistics = norm.args[3:5]
        if match.root.args[1] != 0 or norm.kwargs or trains or not all(map(query.is_tensor, statistics)):
            return None
        return [*norm.args[:5], *norm.args[eps - 1 : eps + 1]]

    def rewrite(self, match: Match, plan: list[Any], edit: Editor) -> None:
        """Take the normed values from the norm that never trains."""
        edit.replace(match.root, ops.GETITEM, edit.call(ops.BATCH_NORM, *plan, at=match.root), 0)


@dataclass(frozen=True, slots=True)
class _Padding:
    """What both sides of every spatial axis get, and what its end gets besides, one number or none."""

    both: list[int]
    more: list[int]
    dilation: list[int]


class PaddingIsNumbers(Rule[_Padding]):
    """conv(x, padding="same") = conv(x, padding=dilation * (kernel - 1) / 2), an odd zero at the end (7)."""

    name: ClassVar[str] = "padding-is-numbers"
    pattern = call(*PADDED_BY_WORD)

    def plan(self, graph: Graph, match: Match) -> _Padding:
        """Return padding and dilation of every spatial axis."""
        kernel = [int(size) for size in query.shape(match.root.args[1])[2:]]  # type: ignore[arg-type]
        given = [int(step) for step in query.argument(match.root, 5, "dilation", [1])]
        dilation = given * len(kernel) if len(given) == 1 else given
        is_valid = query.argument(match.root, 4, "padding", "valid") == "valid"
        total = [0 if is_valid else step * (size - 1) for step, size in zip(dilation, kernel, strict=True)]
        return _Padding([zeros // 2 for zeros in total], [zeros % 2 for zeros in total], dilation)

    def rewrite(self, match: Match, plan: _Padding, edit: Editor) -> None:
        """Call the overload that takes numbers."""
        node = match.root
        x, weight, bias = *node.args[:2], query.argument(node, 2, "bias")
        if any(plan.more):  # as torch does it, so that not one sum changes
            ends = [number for more in reversed(plan.more) for number in (0, more)]
            x = edit.call(ops.PAD, x, ends, at=node)
        stride = query.argument(node, 3, "stride", [1] * len(plan.both))
        groups = query.argument(node, 6, "groups", 1)
        edit.replace(node, PADDED_BY_WORD[node.target], x, weight, bias, stride, plan.both, plan.dilation, groups)


CALL_RULES: Final[tuple[Rule[Any], ...]] = (
    ConvolutionSaysItsAxes(),
    BatchNormNeverTrains(),
    PaddingIsNumbers(),
)
