"""Rules that write products with a constant matrix as linear, with one number per output as its bias."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from normfuse.graph import Graph, ops, query
from normfuse.graph.edit import Editor
from normfuse.rewrite.pattern import Match, call
from normfuse.rewrite.rule import Rule

__all__ = ["PRODUCT_RULES"]

ATEN = ops.ATEN


@dataclass(frozen=True, slots=True)
class _Product:
    """``alpha * (x @ matrix) + beta * bias``; ``source`` is the constant that holds the matrix."""

    x: fx.Node
    source: fx.Node
    matrix: Tensor
    bias: fx.Node | None
    alpha: float
    beta: float


class ProductIsLinear(Rule[_Product]):
    """A product with a constant matrix on the right is a linear map, also where the matrix is repeated."""

    name: ClassVar[str] = "product-is-linear"
    pattern = call(ATEN.matmul.default, ATEN.mm.default, ATEN.bmm.default, ATEN.addmm.default)

    def plan(self, graph: Graph, match: Match) -> _Product | None:
        """Return the operands; the product must be floating point."""
        node = match.root
        bias, x, right = node.args[:3] if node.target is ATEN.addmm.default else (None, *node.args[:2])
        source = _repeated(right)
        if not query.is_tensor(x) or query.is_constant(x) or source is None or not _is_row_by_row(x, node):  # type: ignore[arg-type]
            return None
        if bias is not None and not (query.is_constant(bias) and query.rank(bias) == 1):  # type: ignore[arg-type]
            return None
        matrix = _the_one_matrix(query.constant(graph, source))
        if matrix is None:
            return None
        alpha, beta = (float(node.kwargs.get(name, 1)) for name in ("alpha", "beta"))  # type: ignore[arg-type]
        return _Product(x, source, matrix, bias, alpha, beta)  # type: ignore[arg-type]

    def rewrite(self, match: Match, plan: _Product, edit: Editor) -> None:
        """Transpose the matrix once and call linear; alpha stands behind it, beta goes into the bias."""
        weight, bias = edit.constant(plan.matrix.mT, f"{plan.source.target}_transposed", like=plan.source), plan.bias
        if bias is not None and plan.beta != 1:
            bias = edit.constant(query.constant(edit.graph, bias) * plan.beta, f"{bias.target}_scaled", like=bias)
        if plan.alpha == 1:
            edit.replace(match.root, ops.LINEAR, plan.x, weight, bias)
            return
        product = edit.call(ops.LINEAR, plan.x, weight, at=match.root)
        edit.replace(match.root, ops.ADD, edit.call(ops.MUL, product, plan.alpha, at=match.root), bias)


def _repeated(right: object) -> fx.Node | None:
    """Return the constant of at least two axes that ``right`` is, or repeats along leading axes."""
    if not isinstance(right, fx.Node):
        return None
    source = right.args[0] if query.is_call(right, ops.EXPAND) else right
    if not isinstance(source, fx.Node) or not query.is_constant(source) or query.rank(source) < 2:
        return None
    is_whole = _are_equal(query.shape(source)[-2:], query.shape(right)[-2:])
    return source if is_whole and query.dtype(source).is_floating_point else None


def _are_equal(sizes: Sequence[Any], others: Sequence[Any]) -> bool:
    pairs = zip(sizes, others, strict=False)
    return len(sizes) == len(others) and all(statically_known_true(one == other) for one, other in pairs)


def _is_row_by_row(x: fx.Node, product: fx.Node) -> bool:
    """Return whether every row of ``x`` makes one row of the product: x is neither a vector nor broadcast."""
    return query.rank(x) > 1 and _are_equal(query.shape(x)[:-1], query.shape(product)[:-1])


def _the_one_matrix(data: Tensor) -> Tensor | None:
    """Return the matrix that stands at every position of the leading axes, or None."""
    matrices = data.flatten(0, -3) if data.ndim > 2 else data[None]
    return matrices[0] if bool((matrices == matrices[:1]).all()) else None


@dataclass(frozen=True, slots=True)
class _Contraction:
    """``x`` with its axes in ``order`` (the contracted one last), the matrix, and the order of the result's axes."""

    x: fx.Node
    source: fx.Node
    order: list[int]
    is_transposed: bool
    back: list[int]


class EinsumIsLinear(Rule[_Contraction]):
    """einsum("bnc,oc->bno", x, W) = linear(x, W), with permutes where c or o is not the last axis."""

    name: ClassVar[str] = "einsum-is-linear"
    pattern = call(ATEN.einsum.default)

    def plan(self, graph: Graph, match: Match) -> _Contraction | None:
        """Return the axes; W must be a constant matrix with one axis of x, which goes, and one of the result."""
        node = match.root
        left, arrow, result = str(node.args[0]).replace(" ", "").partition("->")
        terms, operands = left.split(","), list(node.args[1])  # type: ignore[arg-type]
        if not arrow or len(operands) != 2 or query.is_constant(operands[0]) == query.is_constant(operands[1]):
            return None
        first = int(query.is_constant(operands[0]))
        x, source, letters, own = operands[first], operands[1 - first], terms[first], terms[1 - first]
        if "..." in own or not query.dtype(node).is_floating_point:
            return None
        spread = SPARE[: query.rank(x) - len(letters.replace("...", ""))]
        letters, result = letters.replace("...", spread), result.replace("...", spread)
        gone, new = set(letters) - set(result), set(result) - set(letters)
        is_matrix = len(own) == 2 and len(gone) == len(new) == 1 and set(own) == gone | new
        if not is_matrix or len(set(letters)) < len(letters) or len(set(result)) < len(result):
            return None
        made = "".join(letter for letter in letters if letter not in gone) + new.pop()
        order = [letters.index(letter) for letter in (*made[:-1], *gone)]
        return _Contraction(x, source, order, own[0] in gone, [made.index(letter) for letter in result])

    def rewrite(self, match: Match, plan: _Contraction, edit: Editor) -> None:
        """Turn the axis to the end, call linear, and turn the result's axis to its place."""
        matrix = query.constant(edit.graph, plan.source)
        weight = plan.source
        if plan.is_transposed:
            weight = edit.constant(matrix.mT, f"{plan.source.target}_transposed", like=plan.source)
        x = edit.call(ops.PERMUTE, plan.x, plan.order, at=match.root)
        edit.replace(match.root, ops.PERMUTE, edit.call(ops.LINEAR, x, weight, at=match.root), plan.back)


SPARE: Final = "0123456789"
"""What stands for the axes of an ellipsis: no letter of an equation."""


@dataclass(frozen=True, slots=True)
class _Bias:
    """The bias with one number per output, or None where it differs between rows."""

    per_output: Tensor | None


class BiasIsOnePerOutput(Rule[_Bias]):
    """A bias that is broadcast, linear(x, W, b), is written out, or is a sum behind linear(x, W)."""

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


PRODUCT_RULES: Final[tuple[Rule[Any], ...]] = (ProductIsLinear(), EinsumIsLinear(), BiasIsOnePerOutput())
