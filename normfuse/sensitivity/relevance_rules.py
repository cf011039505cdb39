"""The rule of every operator that relevance propagation knows, and the one for those that it does not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor, fx

from normfuse.graph import ops
from normfuse.graph.affine import AFFINE
from normfuse.graph.quantization import REQUEST
from normfuse.rewrite.linear_map import LINEAR_MAPS
from normfuse.sensitivity.relevance_attention import attention
from normfuse.sensitivity.relevance_call import ByShape, Call, Rule, Shares, added, gradients, operands, ratio
from normfuse.sensitivity.relevance_products import linear_map, product, product_and_bias
from normfuse.sensitivity.relevance_sums import addition, average

__all__ = ["RULES", "gradient_times_input"]

ATEN: Final = ops.ATEN

CANCELLED: Final = 1e-3
"""Of the sum of their magnitudes: shares that sum to less cancel each other, and scaling them would blow them up."""


def gradient_times_input(call: Call, relevance: Tensor) -> Shares:
    """Distribute what an operator without a rule returned: ``x * dy/dx(R / y)``, scaled in every sample to keep sums.

    Where that says nothing, because there is no gradient or the shares cancel each other, all elements of a sample get
    the same (ours).
    """
    samples, shares = call.samples, _tried(call)
    wanted = torch.stack([samples.sums(call.node, each) for each in call.relevances.values()]).sum(dim=0)
    given = torch.stack([samples.sums(node, share) for node, share in shares.items()]).sum(dim=0)
    magnitude = torch.stack([samples.sums(node, share.abs()) for node, share in shares.items()]).sum(dim=0)
    is_telling = given.abs() > CANCELLED * magnitude
    factor = ratio(wanted, given) * is_telling
    evenly = wanted * ~is_telling * samples.count / sum(share.numel() for share in shares.values())
    return {
        node: share * samples.spread(node, share, factor) + samples.spread(node, share, evenly)
        for node, share in shares.items()
    }


def handed_on(call: Call, relevance: Tensor) -> Shares:
    """Give all to the first activation: norms, functions of one element, softmax, numerators."""
    source = call.activations[0]
    return {source: call.fitted(source, relevance)}


def gated(call: Call, relevance: Tensor) -> Shares:
    """Give both factors of an elementwise product a half; beside a constant or a number, all."""
    count = len(call.activations)
    return {node: call.fitted(node, relevance / count if count > 1 else relevance) for node in call.activations}


def reshaped(call: Call, relevance: Tensor) -> Shares:
    """Give the same elements back in the argument's shape."""
    (source,) = call.activations
    return {source: relevance.reshape(call.values[source].shape)}


def moved(call: Call, relevance: Tensor) -> Shares:
    """Give every element's relevance to the one that it was copied from; one that was copied often gets the sum."""
    nothing = relevance.new_zeros(())
    return _routed(call, {node: nothing.expand(call.values[node].shape) for node in call.activations})


def picked(call: Call, relevance: Tensor) -> Shares:
    """Give every element's relevance to the one that won; several that did share it."""
    return _routed(call, {node: call.values[node].detach() for node in call.activations})


def joined(call: Call, relevance: Tensor) -> Shares:
    """Cut relevance up as the parts were joined (cat)."""
    parts, axis = _parts(call.node)
    return added(
        zip(parts, torch.split(relevance, [call.values[part].shape[axis] for part in parts], axis), strict=True)
    )


def stacked(call: Call, relevance: Tensor) -> Shares:
    """Cut relevance up as the parts were stacked on a new axis."""
    parts, axis = _parts(call.node)
    return added(zip(parts, relevance.unbind(axis), strict=True))


def chosen(call: Call, relevance: Tensor) -> Shares:
    """Give every element's relevance to the one of two tensors that it was taken from (where)."""
    is_first: Tensor = call.args[0]
    given = (relevance.masked_fill(~is_first, 0), relevance.masked_fill(is_first, 0))
    pairs = zip(call.node.args[1:], given, strict=True)
    return added((node, call.fitted(node, share)) for node, share in pairs if isinstance(node, fx.Node))


def unmasked(call: Call, relevance: Tensor) -> Shares:
    """Give back what was not filled over; what a constant was written to is lost."""
    source = call.activations[0]
    return {source: call.fitted(source, relevance.masked_fill(call.args[1], 0))}


def _tried(call: Call) -> dict[fx.Node, Tensor]:
    """Return ``x * dy/dx(R / y)`` for every activation x; 0 where the operator has no gradient."""
    leaves = {node: call.values[node].detach().requires_grad_() for node in call.activations}
    try:
        with torch.enable_grad():
            outputs = _results(call.run(leaves))
        told = {at: each for at, each in call.relevances.items() if outputs[at].requires_grad}
        scaled = [ratio(each, outputs[at].detach()) for at, each in told.items()]
        found = gradients([outputs[at] for at in told], list(leaves.values()), scaled) if told else ()
    except RuntimeError:  # what torch raises for an operator that has no gradient
        found = ()
    if not found:
        return {node: torch.zeros_like(leaf) for node, leaf in leaves.items()}
    shares = (leaf.detach() * gradient for leaf, gradient in zip(leaves.values(), found, strict=True))
    return {node: share.nan_to_num_(0.0, 0.0, 0.0) for node, share in zip(leaves, shares, strict=True)}


def _routed(call: Call, points: Mapping[fx.Node, Tensor]) -> Shares:
    """Return the gradient of ``sum(outputs * R)`` at these arguments: exact where elements are only copied."""
    leaves = [point.requires_grad_() for point in points.values()]
    with torch.enable_grad():
        outputs = _results(call.run(dict(zip(points, leaves, strict=True))))
    found = gradients([outputs[at] for at in call.relevances], leaves, list(call.relevances.values()))
    return dict(zip(points, found, strict=True))


def _results(output: Any) -> tuple[Tensor, ...]:
    return (output,) if isinstance(output, torch.Tensor) else tuple(output)


def _parts(node: fx.Node) -> tuple[list[fx.Node], int]:
    """Return what is joined, and along which axis."""
    axis = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    assert isinstance(axis, int)
    return operands(node), axis


NORMS: Final = (
    *(ops.BATCH_NORM, *ops.ONLINE_NORMS, ATEN.batch_norm.default),
    *(ATEN.native_layer_norm.default, ATEN.native_group_norm.default),
)

ELEMENTWISE: Final = (
    *ops.POINTWISE_KEEPING,
    *(ops.RELU, ops.GELU, ops.NEG, ops.DIV, ops.RSUB, ops.SOFTMAX, AFFINE, REQUEST),
    *(ATEN.log_softmax.int, ATEN.add.Scalar, ATEN.sub.Scalar, ATEN.mul.Scalar, ATEN.div.Scalar),
    *(ATEN.tanh.default, ATEN.sigmoid.default, ATEN.silu.default, ATEN.mish.default, ATEN.softplus.default),
    *(ATEN.hardtanh.default, ATEN.hardswish.default, ATEN.hardsigmoid.default, ATEN.relu6.default),
    *(ATEN.leaky_relu.default, ATEN.prelu.default, ATEN.elu.default, ATEN.selu.default, ATEN.celu.default),
    *(ATEN.clamp.default, ATEN.clamp_min.default, ATEN.clamp_max.default, ATEN.abs.default, ATEN.erf.default),
    *(ATEN.exp.default, ATEN.log.default, ATEN.sqrt.default, ATEN.rsqrt.default, ATEN.reciprocal.default),
    *(ATEN.pow.Tensor_Scalar, ATEN.square.default, ATEN.sin.default, ATEN.cos.default),
    *(ATEN._to_copy.default, ATEN.to.dtype, ATEN.type_as.default),
)

RESHAPES: Final = (
    *(ops.RESHAPE, ops.VIEW, ops.FLATTEN, ops.UNSQUEEZE, ATEN.unflatten.int, ATEN._unsafe_view.default),
    *(ATEN.squeeze.default, ATEN.squeeze.dim, ATEN.squeeze.dims),
)

MOVES: Final = (
    *(ops.PERMUTE, ops.TRANSPOSE, ops.T, ATEN.mT.default, ATEN.movedim.int, ATEN.movedim.intlist),
    *(ops.SELECT, ops.SLICE, ops.EXPAND, ops.REPEAT, ops.ROLL, ops.FLIP, ops.PAD, ATEN.constant_pad_nd.default),
    *(ops.INDEX_SELECT, ATEN.index.Tensor, ATEN.gather.default, ATEN.repeat_interleave.self_int),
    *(*ops.SPLITS, ATEN.split.sizes, ATEN.unbind.int, ATEN.narrow.default, ATEN.tril.default, ATEN.triu.default),
    *(ATEN.pixel_shuffle.default, ATEN.pixel_unshuffle.default, ATEN.channel_shuffle.default, ATEN.unfold.default),
    *(ATEN.im2col.default, ATEN.expand_as.default, ATEN.diagonal.default),
)

PICKS: Final = (
    *(*ops.MAXIMUM_POOLS, ATEN.max_pool2d_with_indices.default, ATEN.adaptive_max_pool2d.default),
    *(ATEN.amax.default, ATEN.amin.default, ATEN.max.dim, ATEN.min.dim, ATEN.max.default, ATEN.min.default),
    *(ATEN.maximum.default, ATEN.minimum.default, ATEN.topk.default, ATEN.sort.default),
)

AVERAGES: Final = (
    *(ops.MEAN, ATEN.mean.default, ATEN.sum.default, ATEN.sum.dim_IntList),
    *(*ops.AVERAGE_POOLS, *ops.ADAPTIVE_AVERAGE_POOLS, *ops.UPSAMPLINGS),
)

RULES: Final[Mapping[Any, Rule]] = {
    **dict.fromkeys((*NORMS, *ELEMENTWISE), ByShape(handed_on)),
    **dict.fromkeys(RESHAPES, ByShape(reshaped)),
    **dict.fromkeys(MOVES, ByShape(moved)),
    **dict.fromkeys(PICKS, picked),
    **dict.fromkeys(AVERAGES, average),
    **dict.fromkeys((*LINEAR_MAPS, ops.CONVOLUTION, ATEN.conv1d.padding, ATEN.conv2d.padding), linear_map),
    **dict.fromkeys((ops.MATMUL, ATEN.bmm.default, ATEN.mm.default, ATEN.einsum.default), product),
    **dict.fromkeys((ATEN.addmm.default, ATEN.baddbmm.default), product_and_bias),
    **dict.fromkeys((ops.ADD, ops.SUB), addition),
    ops.MUL: ByShape(gated),
    ops.ATTENTION: attention,
    ops.CAT: ByShape(joined),
    ATEN.stack.default: ByShape(stacked),
    **dict.fromkeys((ATEN.where.self, ATEN.where.ScalarOther, ATEN.where.ScalarSelf), ByShape(chosen)),
    **dict.fromkeys((ATEN.masked_fill.Scalar, ATEN.masked_fill.Tensor), ByShape(unmasked)),
}
"""By operator its rule; any other goes by ``gradient_times_input``. Integers and booleans carry no relevance.

A call of constants and integers alone, such as an embedding, absorbs what it gets.
"""
