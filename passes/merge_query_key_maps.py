"""The maps that make queries and keys of an attention become one map per head, which scores are a product with."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Final

import torch
from torch import fx

from normfuse.graph import Graph, metadata, ops, query
from normfuse.graph.edit import Editor
from normfuse.pipeline import Fact, Pass
from normfuse.report import PassReport, Reason, Refusal
from normfuse.rewrite import Match, Rule, apply_rules, call
from normfuse.rewrite.linear_map import LinearMap, read_linear_map

__all__ = ["MergeQueryKeyMaps", "merged_maps"]

BATCH, TOKENS = 2, 3
"""Stand in for sizes that are not known, where views are tried on numbers."""

MERGED: Final = "merged"
"""Noted of scores whose maps are one already: they are no refusal."""

WITH_HEADS: Final = 4
"""The axes of [batch, heads, tokens, channels]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeQueryKeyMaps(Pass):
    """Make one linear map per head of the two that queries and keys come from (methods 10.4).

        before   softmax((Q x + b) (K y + c)^T + mask)
        after    softmax((M x + d) y^T + mask)            M = K^T Q, d = K^T b in every head

    The query-key reparameterization of "OFQ" (Liu et al., 2023, arXiv 2302.02210): codes of Q that oscillate between
    two neighbours while a network is trained make those of K oscillate, and one matrix has no such pair. Published
    drops both biases and needs queries and keys of one tensor. Ours keeps b, as d; c adds the same to all scores of
    a query, so the softmax takes it off again. That makes it exact in real arithmetic, for cross attention too.

    Of h heads of w channels, with n channels in x and y, (h w) (n + n) weights become h n n and a score is a sum of n
    products instead of w: with three heads and more of a joint width of n it is more weights and more work.
    Applies where
    1. the attention is spelled out (``SpellOutAttention``) and its softmax is over the keys; masks may be added,
    2. one linear map of [batch, tokens, channels] each makes the queries and the keys, and views alone cut these into
       heads: no rotary positions, no norms, no keys that heads share,
    3. nothing else reads what the two make,
    4. where views cut heads, the number of tokens is known, or that of the batch,
    5. the new constants fit into their type.
    """

    name: ClassVar[str] = "merge-query-key-maps"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.CANONICAL})

    def run(self, graph: Graph) -> PassReport:
        """Apply the rule wherever it holds and say of every other attention why its maps stay."""
        return apply_rules(graph, [ScoresOfOneMap()], name=self.name)


@dataclass(frozen=True, slots=True)
class _Projection:
    """A linear map of ``x`` and how many heads its channels are; with ``is_cut`` these have an axis of their own."""

    node: fx.Node
    x: fx.Node
    linear: LinearMap
    heads: int
    is_cut: bool


@dataclass(frozen=True, slots=True)
class _Plan:
    queries: _Projection
    keys: _Projection
    merged: LinearMap


class ScoresOfOneMap(Rule[_Plan]):
    """``(Q x + b) (K y)^T = (K^T Q x + K^T b) y^T``."""

    name: ClassVar[str] = "scores-of-one-map"
    pattern = call(ops.MATMUL)

    def plan(self, graph: Graph, match: Match) -> _Plan | Refusal | None:
        """Return the one map, or why these scores keep two; None for products that are no scores (1)."""
        node = match.root
        if not _are_scores(node) or metadata.noted(node, MERGED):
            return None
        queries = _projection(graph, query.operand(node, 0), is_turned=False)
        keys = _projection(graph, query.operand(node, 1), is_turned=True)
        for found, what in ((queries, "queries"), (keys, "keys")):
            if not isinstance(found, _Projection):
                reason, detail = found
                return _refusal(node, reason, f"{what}: {detail}")
        assert isinstance(queries, _Projection)
        assert isinstance(keys, _Projection)
        if queries.heads != keys.heads or queries.is_cut != keys.is_cut:
            return _refusal(node, Reason.APART, f"{queries.heads} heads of queries, {keys.heads} of keys")
        merged = merged_maps(queries.linear, keys.linear, heads=queries.heads)
        return _Plan(queries, keys, merged) if merged.is_finite else _refusal(node, Reason.OVERFLOW, "")

    def rewrite(self, match: Match, plan: _Plan, edit: Editor) -> None:
        """Call the one map and let the scores meet what the keys were made of."""
        node, queries = match.root, plan.queries
        label, given = query.layer_of(queries.node) or queries.node.name, plan.merged.bias
        weight = edit.constant(plan.merged.weight, f"{label}.merged_weight", like=queries.node)
        bias = None if given is None else edit.constant(given, f"{label}.merged_bias", like=queries.node)
        product = edit.call(ops.LINEAR, queries.x, weight, bias, at=node, name=f"{queries.node.name}_merged")
        operands = _heads(edit, node, product, queries), _repeated(edit, node, plan.keys)
        metadata.note(edit.replace(node, ops.MATMUL, *operands), MERGED, True)

    def describe(self, graph: Graph, match: Match, plan: _Plan) -> dict[str, str]:
        """Say which layers became one, and how many weights it has for theirs."""
        both = [query.layer_of(each.node) or each.node.name for each in (plan.queries, plan.keys)]
        weights = sum(each.linear.weight.numel() for each in (plan.queries, plan.keys))
        return {
            "affine": " and ".join(dict.fromkeys(both)),
            "into": query.layer_of(match.root) or match.root.name,
            "formula": f"M = K^T Q in {plan.queries.heads} heads: {plan.merged.weight.numel()} weights for {weights}",
        }


def merged_maps(queries: LinearMap, keys: LinearMap, *, heads: int) -> LinearMap:
    """Return the map of x whose products with y are those of both maps, up to what is the same for all y.

    Args:
        queries: Q [heads * width, n] and b.
        keys: K [heads * width, m]; its bias adds the same number to all products of an x.
        heads: how many.

    Returns:
        M [heads * m, n] and d [heads * m], computed in float64 and rounded once; no bias where b is none.
    """
    of_queries = queries.weight.double().reshape(heads, -1, queries.inputs)
    of_keys = keys.weight.double().reshape(heads, -1, keys.inputs)
    weight = (of_keys.mT @ of_queries).flatten(0, 1).to(queries.weight.dtype)
    if queries.bias is None:
        return replace(queries, weight=weight)
    bias = of_keys.mT @ queries.bias.double().reshape(heads, -1, 1)
    return replace(queries, weight=weight, bias=bias.flatten().to(queries.weight.dtype))


def _are_scores(node: fx.Node) -> bool:
    """Return whether a softmax over the last axis follows, with nothing but sums in between."""
    reader = query.only_reader(node)
    while reader is not None and query.is_call(reader, ops.ADD):
        reader = query.only_reader(reader)
    return reader is not None and query.is_call(reader, ops.SOFTMAX) and reader.args[1] in (-1, query.rank(reader) - 1)


def _projection(graph: Graph, node: fx.Node, *, is_turned: bool) -> _Projection | tuple[Reason, str]:
    """Return the map in front of an operand of scores, or why it cannot be merged (2, 3, 4)."""
    views = list[fx.Node]()
    while query.is_call(node, ops.RESHAPE, ops.PERMUTE):
        views.insert(0, node)
        if query.only_reader(node) is None:
            return Reason.SHARED, node.name
        node = query.operand(node, 0)
    linear = read_linear_map(graph, node) if query.is_call(node, ops.LINEAR) else None
    if linear is None:
        return Reason.NO_LINEAR, f"made by {node.name}"
    if query.only_reader(node) is None:
        return Reason.SHARED, node.name
    if any(map(_has_sizes_of_inputs, views)):
        return Reason.NOT_STATIC, node.name
    if (heads := _cut(node, views, is_turned=is_turned)) is None:
        return Reason.APART, node.name
    is_cut = query.rank(views[-1] if views else node) == WITH_HEADS
    return _Projection(node, query.operand(node, 0), linear, heads, is_cut)


def _cut(node: fx.Node, views: list[fx.Node], *, is_turned: bool) -> int | None:
    """Return into how many heads views cut what a map makes; None if they do anything else.

    Found out by moving numbers: [batch, tokens, heads * width] has to become [batch, heads, tokens, width], or with one
    head stay as it is, ``is_turned`` with the last two axes exchanged.
    """
    if query.rank(node) != WITH_HEADS - 1:
        return None
    sizes = [_known(size, other) for size, other in zip(query.shape(node), (BATCH, TOKENS, 0), strict=True)]
    given = moved = torch.arange(sizes[0] * sizes[1] * sizes[2]).reshape(sizes)
    for view in views:
        moved = view.target(moved, *view.args[1:])  # type: ignore[operator]
    moved = moved.mT if is_turned else moved
    if moved.ndim == given.ndim:
        return 1 if torch.equal(moved, given) else None
    heads = moved.shape[1]
    if moved.ndim != WITH_HEADS or sizes[2] % heads:
        return None
    return heads if torch.equal(moved, given.reshape(*sizes[:2], heads, -1).transpose(1, 2)) else None


def _has_sizes_of_inputs(view: fx.Node) -> bool:
    return any(isinstance(size, fx.Node) for size in view.args[1])  # type: ignore[union-attr]


def _known(size: Any, otherwise: int) -> int:
    return size if isinstance(size, int) else otherwise


def _sizes(node: fx.Node) -> list[int]:
    return [_known(size, -1) for size in query.shape(node)]


def _heads(edit: Editor, at: fx.Node, product: fx.Node, like: _Projection) -> fx.Node:
    """Cut [batch, tokens, heads * channels] into heads, where they have an axis."""
    if not like.is_cut:
        return product
    batch, tokens, channels = _sizes(product)
    cut = edit.call(ops.RESHAPE, product, [batch, tokens, like.heads, channels // like.heads], at=at)
    return edit.call(ops.PERMUTE, cut, [0, 2, 1, 3], at=at)


def _repeated(edit: Editor, at: fx.Node, keys: _Projection) -> fx.Node:
    """Turn [batch, tokens, channels] and give every head the same."""
    turned = edit.call(ops.PERMUTE, keys.x, [0, 2, 1], at=at)
    if not keys.is_cut:
        return turned
    batch, channels, tokens = _sizes(turned)
    beside = edit.call(ops.RESHAPE, turned, [batch, 1, channels, tokens], at=at)
    return edit.call(ops.EXPAND, beside, [-1, keys.heads, -1, -1], at=at)


def _refusal(node: fx.Node, reason: Reason, detail: str) -> Refusal:
    return Refusal(node.name, reason, detail, query.layer_of(node))
