"""What every operator is in an integer network: a view of codes, something that rounds, or part of what rounds."""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from torch import fx

from normfuse.graph import Graph, ops, query
from normfuse.graph.affine import AFFINE
from normfuse.graph.quantization import is_requested
from normfuse.rewrite.masks import CLOSED, MASK

__all__ = [
    "CLAMPS",
    "MEANS",
    "POINTWISE",
    "PRODUCTS",
    "VIEWS",
    "absorbed",
    "attention_scores",
    "is_given",
    "is_masked",
    "is_view",
    "padding",
    "viewed",
]

PRODUCTS: Final = frozenset({ops.LINEAR, ops.CONV2D})
"""Products with constant weights; what follows them is part of their last step."""

CLAMPS: Final = frozenset({ops.RELU, ops.ATEN.hardtanh.default, ops.ATEN.relu6.default})
"""Where codes end; they cost nothing."""

POINTWISE: Final = frozenset(
    {
        *(ops.GELU, ops.ATEN.silu.default, ops.ATEN.tanh.default, ops.ATEN.sigmoid.default),
        *(ops.ATEN.hardswish.default, ops.ATEN.hardsigmoid.default, ops.ATEN.leaky_relu.default, ops.ATEN.elu.default),
        *(ops.ATEN.mish.default, ops.ATEN.softplus.default, ops.ATEN.erf.default, ops.ATEN.exp.default, ops.NEG),
        *(ops.ATEN.abs.default, ops.ATEN.selu.default, ops.ATEN.celu.default, ops.ATEN.log_sigmoid.default),
    }
)
"""Functions of one number: tables."""

MEANS: Final = {ops.MEAN: 0, ops.ATEN.adaptive_avg_pool1d.default: 1, ops.ATEN.adaptive_avg_pool2d.default: 2}
"""Means over axes, or over so many last ones."""

VIEWS: Final = frozenset(
    {
        *(ops.RESHAPE, ops.PERMUTE, ops.SELECT, ops.SLICE, ops.EXPAND, ops.UNSQUEEZE, ops.ROLL, ops.FLIP, ops.REPEAT),
        *(ops.INDEX_SELECT, ops.GETITEM, ops.CLONE, ops.DROPOUT, ops.ATEN.squeeze.dim, ops.ATEN.squeeze.dims),
        *(ops.VIEW, ops.TRANSPOSE, ops.FLATTEN, ops.ATEN.alias.default, ops.ATEN.contiguous.default),
        *(*ops.SPLITS, ops.ATEN.unbind.int, ops.ATEN.upsample_nearest2d.vec, ops.ATEN.upsample_bilinear2d.vec),
        *(*ops.MAXIMUM_POOLS, ops.EMBEDDING, ops.PAD),
    }
)
"""What moves, looks up or repeats values, or takes the largest, or one between two: the same on codes."""


def is_view(node: object) -> bool:
    """Return whether a node hands on its first argument's values.

    One of several results does if these are views, and padding if it is with 0.
    """
    if not isinstance(node, fx.Node) or not query.is_call(node, *VIEWS):
        return False
    if query.is_call(node, ops.GETITEM):
        return is_view(viewed(node))
    return not query.is_call(node, ops.PAD) or padding(node) == 0


def padding(node: fx.Node) -> float | None:
    """Return the number that a tensor is padded with; None where it is made of the tensor itself."""
    is_number = query.argument(node, 2, "mode", "constant") == "constant"
    return float(query.argument(node, 3, "value") or 0.0) if is_number else None


def viewed(node: fx.Node) -> fx.Node:
    """Return what a view looks at."""
    return query.operand(node, 0)


def is_given(node: object) -> bool:
    """Return whether a value is made of constants alone, by views and sums: the bias of scores, for any batch."""
    if not isinstance(node, fx.Node):
        return False
    is_sum = query.is_call(node, ops.ADD) and "alpha" not in node.kwargs
    is_made = is_view(node) or is_sum
    return query.is_constant(node) or (is_made and all(is_given(each) for each in _values(node)))


def is_masked(node: object) -> bool:
    """Return whether a node masks scores, as ``normfuse.rewrite.masks`` writes it."""
    return isinstance(node, fx.Node) and query.is_call(node, MASK) and node.args[2:] == (CLOSED,)


def _values(node: fx.Node) -> list[fx.Node]:
    """Return the tensors that a node reads; sizes are none."""
    return [each for each in node.all_input_nodes if query.is_tensor(each)]


def _given_parts(node: object) -> set[fx.Node]:
    if not isinstance(node, fx.Node) or query.is_constant(node) or not is_given(node):
        return set()
    return {node}.union(*(_given_parts(each) for each in _values(node)))


def absorbed(graph: Graph) -> set[fx.Node]:
    """Return the nodes whose values are never written: the node that reads each computes both in one.

    A clamp takes in what it bounds, a sum one of the products that it adds, a scale per channel the norm in front of
    it, and the second product of attention everything from the scores on.
    """
    found = set[fx.Node]()
    for node in graph.nodes:
        if query.is_call(node, *CLAMPS, AFFINE):
            source = viewed(node)
            wanted = ops.ONLINE_NORMS if node.target is AFFINE else (*PRODUCTS, ops.ADD, *ops.ONLINE_NORMS, ops.MATMUL)
            is_along = node.target is not AFFINE or _is_along_channels(node)
            if query.is_call(source, *wanted) and query.only_reader(source) is node and is_along:
                found.add(source)
        elif query.is_call(node, ops.ADD):
            found.update(_added_product(node, found))
        elif query.is_call(node, ops.MATMUL):
            found.update(_scores(node))
        elif query.is_call(node, ops.ATTENTION):
            found.update(_given_parts(query.argument(node, 3, "attn_mask")))
    return found


def attention_scores(graph: Graph) -> set[fx.Node]:
    """Return the first products of all attention that is spelled out."""
    parts = set[fx.Node]().union(*(_scores(node) for node in graph.nodes if query.is_call(node, ops.MATMUL)))
    return {node for node in parts if query.is_call(node, ops.MATMUL)}


def _is_along_channels(node: fx.Node) -> bool:
    """Return whether an affine is along the last axis, as a norm's own, or the same everywhere."""
    is_last = node.args[3] == query.rank(node) - 1
    return bool(is_last) or query.shape(query.operand(node, 1)) == (1,)


def _added_product(node: fx.Node, known: Collection[fx.Node]) -> list[fx.Node]:
    """Return the product that a sum takes in: the last, if no other step stands between."""
    if node.kwargs.get("alpha", 1) != 1 or node.args[0] is node.args[1]:
        return []
    products = [
        each
        for each in node.args[:2]
        if query.is_call(each, *PRODUCTS)
        and each not in known
        and query.only_reader(each) is node  # type: ignore[arg-type]
        and query.shape(each) == query.shape(node)  # type: ignore[arg-type]
    ]
    return sorted(products)[-1:]  # type: ignore[return-value, type-var]


def _scores(node: fx.Node) -> list[fx.Node]:
    """Return scores, their bias and softmax of attention, whose second product is ``node``; nothing elsewhere."""
    softmax = node.args[0]
    if not query.is_call(softmax, ops.SOFTMAX) or query.only_reader(softmax) is not node:  # type: ignore[arg-type]
        return []
    assert isinstance(softmax, fx.Node)
    if softmax.args[1] not in (-1, query.rank(softmax) - 1):
        return []
    scores, found = viewed(softmax), [softmax]
    given = set[fx.Node]()
    if is_masked(scores):
        found.append(scores)
        scores = query.operand(scores, 1)
    elif query.is_call(scores, ops.ADD) and any(is_given(each) for each in scores.args[:2]):
        found.append(scores)
        bias, scores = sorted((query.operand(scores, 0), query.operand(scores, 1)), key=lambda each: not is_given(each))
        given = _given_parts(bias)
    is_whole = query.is_call(scores, ops.MATMUL) and not is_requested(scores)
    found.append(scores)
    return [*found, *given] if is_whole and all(query.only_reader(each) is not None for each in found) else []
