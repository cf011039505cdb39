"""One spelling per operation: identities out, views as reshape, transposes as permute."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Final

from torch import Tensor, fx

from normfuse.graph import Graph, ops, query
from normfuse.graph.edit import Editor
from normfuse.pipeline import Fact, Pass
from normfuse.report import PassReport
from normfuse.rewrite import Match, Rule, apply_rules, call
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
    4. A matrix product with a constant 2-D right side, and addmm, become linear.
    5. A linear map's constant bias becomes one number per output; one that differs between rows is added behind it.
    6. A convolution that does not say its number of axes (traced models have them) becomes conv1d, conv2d, conv3d or
       their transpose; every batch norm with given statistics becomes the one that never trains.
    7. A convolution's padding given as a word becomes numbers; padding that is not the same on both sides stays.

    Exact: not one arithmetic operation changes (4 and 5 keep product and sum).
    """

    name: ClassVar[str] = "canonicalize"
    provides: ClassVar[frozenset[Fact]] = frozenset({Fact.CANONICAL})

    def run(self, graph: Graph) -> PassReport:
        """Apply the rules to a fixpoint."""
        return apply_rules(graph, [*VIEW_RULES, *ARITHMETIC_RULES], name=self.name)


@dataclass(frozen=True, slots=True)
class _Linear:
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None


class ProductIsLinear(Rule[_Linear]):
    """A product with a constant matrix on the right is a linear map (4)."""

    name: ClassVar[str] = "product-is-linear"
    pattern = call(ATEN.matmul.default, ATEN.mm.default, ATEN.addmm.default)

    def plan(self, graph: Graph, match: Match) -> _Linear | None:
        """Return the operands; the product must be floating point and unscaled."""
        node = match.root
        bias, x, weight = node.args[:3] if node.target is ATEN.addmm.default else (None, *node.args[:2])
        if node.kwargs or not query.is_tensor(x) or not query.is_constant(weight):
            return None
        assert isinstance(x, fx.Node)
        assert isinstance(weight, fx.Node)
        is_plain = query.rank(weight) == 2 and query.rank(x) >= 2 and query.dtype(x).is_floating_point
        if not is_plain or query.is_constant(x):
            return None
        if bias is not None and not (query.is_constant(bias) and query.rank(bias) == 1):  # type: ignore[arg-type]
            return None
        return _Linear(x, weight, bias)  # type: ignore[arg-type]

    def rewrite(self, match: Match, plan: _Linear, edit: Editor) -> None:
        """Transpose the matrix once and call linear."""
        matrix = query.constant(edit.graph, plan.weight)
        weight = edit.constant(matrix.mT, f"{plan.weight.target}_transposed", like=plan.weight)
        edit.replace(match.root, ops.LINEAR, plan.x, weight, plan.bias)


@dataclass(frozen=True, slots=True)
class _Bias:
    """The bias with one number per output, or None where it differs between rows."""

    per_output: Tensor | None


class BiasIsOnePerOutput(Rule[_Bias]):
    """A bias that is broadcast, linear(x, W, b), is written out, or is a sum behind linear(x, W) (5)."""

    name: ClassVar[str] = "bias-is-one-per-output"
    pattern = call(ops.LINEAR)

    def plan(self, graph: Graph, match: Match) -> _Bias | None:
        """Return the new bias."""
        node = match.root
        weight, bias = node.args[1], query.argument(node, 2, "bias")
        if not query.is_constant(bias) or query.rank(weight) != 2:  # type: ignore[arg-type]
            return None
        shape, outputs = tuple(query.shape(bias)), query.shape(weight)[0]  # type: ignore[arg-type]
        if shape == (outputs,):
            return None
        is_one_row = all(size == 1 for size in shape[:-1])
        return _Bias(query.constant(graph, bias).reshape(-1).expand(int(outputs)) if is_one_row else None)

    def rewrite(self, match: Match, plan: _Bias, edit: Editor) -> None:
        """Call linear with the new bias, or add the bias as it is."""
        node = match.root
        x, weight, bias = *node.args[:2], query.argument(node, 2, "bias")
        if plan.per_output is None:
            edit.replace(node, ops.ADD, edit.call(ops.LINEAR, x, weight, at=node), bias)
            return
        edit.replace(node, ops.LINEAR, x, weight, edit.constant(plan.per_output, f"{bias.target}_expanded", like=bias))


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
    padding: list[int]
    dilation: list[int]


class PaddingIsNumbers(Rule[_Padding]):
    """conv(x, padding="same") = conv(x, padding=dilation * (kernel - 1) / 2) (7)."""

    name: ClassVar[str] = "padding-is-numbers"
    pattern = call(*PADDED_BY_WORD)

    def plan(self, graph: Graph, match: Match) -> _Padding | None:
        """Return padding and dilation of every spatial axis, where both sides get the same padding."""
        kernel = [int(size) for size in query.shape(match.root.args[1])[2:]]  # type: ignore[arg-type]
        given = [int(step) for step in query.argument(match.root, 5, "dilation", [1])]
        dilation = given * len(kernel) if len(given) == 1 else given
        if query.argument(match.root, 4, "padding", "valid") == "valid":
            return _Padding([0] * len(kernel), dilation)
        total = [step * (size - 1) for step, size in zip(dilation, kernel, strict=True)]
        return _Padding([both // 2 for both in total], dilation) if all(both % 2 == 0 for both in total) else None

    def rewrite(self, match: Match, plan: _Padding, edit: Editor) -> None:
        """Call the overload that takes numbers."""
        node = match.root
        x, weight, bias = *node.args[:2], query.argument(node, 2, "bias")
        stride = query.argument(node, 3, "stride", [1] * len(plan.padding))
        groups = query.argument(node, 6, "groups", 1)
        target = PADDED_BY_WORD[node.target]
        edit.replace(node, target, x, weight, bias, stride, plan.padding, plan.dilation, groups)


ARITHMETIC_RULES: Final[tuple[Rule[Any], ...]] = (
    ProductIsLinear(),
    BiasIsOnePerOutput(),
    ConvolutionSaysItsAxes(),
    BatchNormNeverTrains(),
    PaddingIsNumbers(),
)
