"""Relevance through products: linear maps, and products of two activations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, fx

from normfuse.graph import ops, query
from normfuse.graph.affine import AFFINE
from normfuse.graph.quantization import REQUEST
from normfuse.graph.quickly import linear
from normfuse.sensitivity.relevance_call import Call, Shares, gradients, operands, ratio, times_gradient, total

__all__ = ["halves", "linear_map", "product", "product_and_bias"]

IMAGE_RANK: Final = 4
"""Axes of an image: samples, channels, height, width."""

KEEPS_IMAGE: Final = frozenset(
    {
        *ops.VIEWS,
        *ops.POINTWISE_KEEPING,
        *(ops.FLATTEN, ops.UNSQUEEZE, ops.PAD, ops.ADD, ops.SUB, ops.MUL, ops.DIV, AFFINE, REQUEST),
    }
)
"""What may stand between the image and the first map: another order, zeros around it, the data's mean and deviation."""

Parts = Sequence[tuple[Tensor, Tensor]]
"""Parts of an input, in its shape, each with the part of the weight that it meets, in the weight's shape."""


def linear_map(call: Call, relevance: Tensor) -> Shares:
    """Distribute what a linear map or convolution returned; its bias gets nothing.

    The first map behind an image goes by ``_within_box``, all others by ``_positive``.
    """
    source, weight = call.node.args[0], call.args[1]
    assert isinstance(source, fx.Node)
    x: Tensor = call.values[source]
    parts = _within_box(call, source, weight) if _reads_image(call.node) else _positive(x, weight)
    return {source: _distributed(_without_bias(call), parts, x, relevance)}


def product(call: Call, relevance: Tensor) -> Shares:
    """Distribute a product of two tensors: by gradient times input a half to each; as a linear map beside a constant.

    With ``Z = A B`` and ``S = R / Z``: ``R_A = A * (S B^T) / 2``, ``R_B = B * (A^T S) / 2``.

    Source: as ``_positive``; products of more than two (einsum) are ours: an equal part to each.
    """
    return _multiplied(call, operands(call.node), {}, relevance)


def product_and_bias(call: Call, relevance: Tensor) -> Shares:
    """Distribute ``bias + A B`` (addmm) as ``product`` does; the bias gets nothing, unless all else is constant."""
    bias, *factors = operands(call.node)
    if call.activations == (bias,):
        return {bias: call.fitted(bias, relevance)}
    return _multiplied(call, factors, {bias: torch.zeros_like(call.values[bias])}, relevance)


def halves(first: Tensor, second: Tensor, relevance: Tensor) -> tuple[Tensor, Tensor]:
    """Return the relevance of both factors of a matrix product, see ``product``."""
    to_first, to_second = times_gradient(torch.matmul, (first, second), relevance)
    return to_first / 2, to_second / 2


def _multiplied(call: Call, factors: Sequence[fx.Node], zeros: Mapping[fx.Node, Tensor], relevance: Tensor) -> Shares:
    """Distribute a product; ``factors`` names one that stands in two places twice."""
    varying = [node for node in call.activations if node in factors]

    def compute(*given: Tensor) -> Any:
        return call.run({**zeros, **dict(zip((*varying, *constants), given, strict=False))})

    constants = [node for node in factors if node not in varying]
    if len(constants) == 1 and len(factors) == 2:
        x: Tensor = call.values[varying[0]]
        return {varying[0]: _distributed(compute, _positive(x, call.values[constants[0]]), x, relevance)}
    shares = times_gradient(compute, [call.values[node] for node in varying], relevance)
    count = len(factors) - len(constants)
    return {node: share / count for node, share in zip(varying, shares, strict=True)}


def _positive(x: Tensor, weight: Tensor) -> Parts:
    """Return ``(x+, W+), (x-, W-)``, what contributes positively: LRP's rule with alpha 1.

    ``Z = x+ W+^T + x- W-^T``, ``S = R / Z``, ``R_x = x+ * (S W+) + x- * (S W-)``.

    Source: Chefer, Gur, Wolf, "Transformer Interpretability Beyond Attention Visualization" (CVPR 2021), their code.
    """
    least, largest = (float(end) for end in x.aminmax())
    parts = list[tuple[Tensor, Tensor]]()
    if largest > 0:
        parts.append((x.clamp(min=0), weight.clamp(min=0)))
    if least < 0:  # behind a ReLU there is no second half to compute
        parts.append((x.clamp(max=0), weight.clamp(max=0)))
    return parts


def _within_box(call: Call, source: fx.Node, weight: Tensor) -> Parts:
    """Return ``(x - l, W+), (x - h, W-)`` with the least and the largest number l and h of every sample: the rule z^B.

    ``Z = x W^T - l W+^T - h W-^T`` in other words, without cancellation; zeros around an image contribute nothing.

    Source: Montavon et al., "Explaining NonLinear Classification Decisions with Deep Taylor Decomposition" (2017).
    """
    x: Tensor = call.values[source]
    least, largest = call.samples.extremes(source, x)
    return (x - least, weight.clamp(min=0)), (x - largest, weight.clamp(max=0))


def _distributed(compute: Callable[[Tensor, Tensor], Tensor], parts: Parts, x: Tensor, relevance: Tensor) -> Tensor:
    """Return the relevance of x: for ``Z = sum compute(part, W)`` each part times its gradient for ``R / Z``."""
    if not parts:
        return torch.zeros_like(x)
    leaves = [part.requires_grad_() for part, _ in parts]
    with torch.enable_grad():
        outputs = [compute(leaf, weight) for leaf, (_, weight) in zip(leaves, parts, strict=True)]
    scaled = ratio(relevance, total([output.detach() for output in outputs]))
    found = gradients(outputs, leaves, [scaled] * len(outputs))
    return total([leaf.detach() * gradient for leaf, gradient in zip(leaves, found, strict=True)])


def _without_bias(call: Call) -> Callable[[Tensor, Tensor], Tensor]:
    target: Any = call.node.target
    if target is ops.LINEAR:
        return linear
    rest, options = call.args[3:], {key: value for key, value in call.node.kwargs.items() if key != "bias"}
    return lambda x, weight: target(x, weight, None, *rest, **options)


def _reads_image(node: fx.Node) -> bool:
    """Return whether nothing but what ``KEEPS_IMAGE``, with constants, stands between a map and an image.

    An image is an input of four axes or more; what a convolution reads is one with fewer, too (sound).
    """
    source = query.argument(node, 0, "input")
    while query.is_call(source, *KEEPS_IMAGE) and all(query.is_constant(each) for each in source.all_input_nodes[1:]):
        source = query.argument(source, 0, "input")
    if not isinstance(source, fx.Node) or source.op != "placeholder":
        return False
    return node.target is not ops.LINEAR or query.rank(source) >= IMAGE_RANK
