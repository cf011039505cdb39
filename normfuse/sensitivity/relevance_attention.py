"""Relevance through scaled dot-product attention, computed as its parts."""

from __future__ import annotations

from math import sqrt
from typing import Any

import torch
from torch import Tensor, fx

from normfuse.graph import query
from normfuse.sensitivity.relevance_call import Call, Shares, added
from normfuse.sensitivity.relevance_products import halves
from normfuse.sensitivity.relevance_sums import divided

__all__ = ["attention"]


def attention(call: Call, relevance: Tensor) -> Shares:
    """Distribute ``softmax(q k^T s + mask) v``: by two products and a sum; what the softmax gets it hands on.

    Query is [..., heads, L, e], key [..., groups, S, e], value [..., groups, S, d]: heads may share keys and values. A
    mask of numbers gets what a summand gets, one of booleans nothing.

    Source: Chefer, Gur, Wolf, "Transformer Interpretability Beyond Attention Visualization" (CVPR 2021), their code.
    """
    q, k, v = call.args[:3]
    heads = q.shape[-3] // k.shape[-3] if query.argument(call.node, 7, "enable_gqa", False) else 1
    k_each, v_each = _repeated(k, heads), _repeated(v, heads)
    scale = query.argument(call.node, 6, "scale")
    scores = (q @ k_each.mT) * (1 / sqrt(q.shape[-1]) if scale is None else scale)
    mask = query.argument(call.node, 3, "attn_mask")
    probabilities = _probabilities(scores, call.values.get(mask), is_causal=_is_causal(call.node))
    to_scores, to_value = halves(probabilities, v_each, relevance)
    shares = list[tuple[fx.Node, Tensor]]()
    if query.is_float(mask):
        to_scores, to_mask = divided(call, (scores, call.values[mask]), to_scores)
        shares.append((mask, call.fitted(mask, to_mask)))
    to_query, to_key = halves(q, k_each.mT, to_scores)
    given = (to_query, _summed(to_key.mT, heads), _summed(to_value, heads))
    return added([*shares, *zip(call.node.args[:3], given, strict=True)])  # type: ignore[list-item]


def _is_causal(node: fx.Node) -> bool:
    return bool(query.argument(node, 5, "is_causal", False))


def _probabilities(scores: Tensor, mask: Any, *, is_causal: bool) -> Tensor:
    """Return what the softmax makes of the scores, [..., L, S]; rows that see nothing are 0, as the operator has it."""
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is None:
        return scores.softmax(dim=-1)
    masked = scores.masked_fill(~mask, -torch.inf) if mask.dtype is torch.bool else scores + mask
    return masked.softmax(dim=-1).nan_to_num_(nan=0.0)


def _repeated(x: Tensor, heads: int) -> Tensor:
    return x.repeat_interleave(heads, dim=-3) if heads > 1 else x


def _summed(share: Tensor, heads: int) -> Tensor:
    return torch.unflatten(share, -3, (-1, heads)).sum(dim=-3) if heads > 1 else share
