"""Relevance through sums: of two branches, of a tensor and a constant, and averages."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from normfuse.graph import ops, query
from normfuse.sensitivity.relevance_call import Call, Shares, added, gradients, operands, ratio, total

__all__ = ["addition", "average", "divided"]


def addition(call: Call, relevance: Tensor) -> Shares:
    """Distribute ``a + alpha b`` or ``a - alpha b``, see ``divided``.

    A constant that varies along two axes or more, such as a table of positions, takes part; one that varies along one
    axis at most is a bias and gets nothing, nor does a number (ours).
    """
    nodes = operands(call.node)
    if (bias := _bias(nodes, call)) is not None:
        nodes.remove(bias)
    if len(nodes) == 1:
        return {nodes[0]: call.fitted(nodes[0], relevance)}
    factor = query.argument(call.node, 2, "alpha", 1) * (-1 if call.node.target is ops.SUB else 1)
    first, second = (call.values[node] for node in nodes)
    shares = divided(call, (first, second if factor == 1 else second * factor), relevance)
    return added((node, call.fitted(node, share)) for node, share in zip(nodes, shares, strict=True))


def divided(call: Call, parts: Sequence[Tensor], relevance: Tensor) -> list[Tensor]:
    """Return what each of the summands of a tensor gets of its relevance, in that tensor's shape.

    Gradient times input, ``a' = a * R / sum(parts)``, scaled in every sample so that a gets the part
    ``|sum a'| / sum over parts |sum a'|`` of all its relevance: the branches' relevances do not cancel. What came to
    elements whose parts sum to 0 goes to the others with that.

    Source: Chefer, Gur, Wolf, "Transformer Interpretability Beyond Attention Visualization" (CVPR 2021), their code;
    there a batch is one sample.
    """
    scaled = ratio(relevance, total(parts))
    shares = [(part * scaled).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0) for part in parts]  # 0 * -inf in masks
    sums = torch.stack([call.samples.sums(call.node, share) for share in shares])  # [parts, n]
    factors = ratio(call.samples.sums(call.node, relevance) * sums.sign(), sums.abs().sum(dim=0))
    return [
        share.mul_(call.samples.spread(call.node, share, factor)) for share, factor in zip(shares, factors, strict=True)
    ]


def average(call: Call, relevance: Tensor) -> Shares:
    """Distribute means, sums, average pools and interpolations by what each element contributed: ``x * dy/dx(R / y)``.

    Where an output is 0 its relevance goes to all elements that it was made from as the operator weighs them (ours).
    """
    (source,) = call.activations
    x, ones = call.values[source].detach().requires_grad_(), torch.ones_like(call.values[source]).requires_grad_()
    with torch.enable_grad():
        output = call.run({source: x})
    (found,) = gradients([output], [x], [ratio(relevance, output.detach())])
    share = x.detach() * found
    unmade = relevance.masked_fill(output.detach() != 0, 0)
    if not bool(unmade.any()):
        return {source: share}
    with torch.enable_grad():
        weights = call.run({source: ones})
    (evenly,) = gradients([weights], [ones], [ratio(unmade, weights.detach())])
    return {source: share + evenly}


def _bias(nodes: Sequence[fx.Node], call: Call) -> fx.Node | None:
    constants = [node for node in nodes if node not in call.activations]
    return constants[0] if constants and _varying_axes(constants[0]) <= 1 else None


def _varying_axes(node: fx.Node) -> int:
    return sum(isinstance(size, int) and size > 1 for size in query.shape(node))
