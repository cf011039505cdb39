"""Learns weights and steps of one block, so that it answers the quantized network before it as the float one would."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from normfuse.graph import query
from normfuse.graph.quantization import is_requested, requested_weights
from normfuse.graph.segments import plainly
from normfuse.precision.block import Block
from normfuse.precision.decision import Quantization
from normfuse.precision.simulation import call_with, params_of_request
from normfuse.quant import QuantParams, RoundedWeight, quantize, scale_for_bias

__all__ = ["Reconstruction", "reconstruct"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reconstruction:
    """How a block learns.

    Attributes:
        steps: updates, one chunk each.
        drop: the share of activations left float in an update (QDrop, Wei et al. 2022, arXiv 2203.05740).
        weight_rate: in weight steps per update; ``scale_rate`` and ``bias_rate`` relative to size; ``zero_rate`` in
            codes. All fall to zero as a half cosine.
        seed: of the order of the chunks and of what is dropped.
    """

    steps: int = 200
    drop: float = 0.25
    weight_rate: float = 0.01
    scale_rate: float = 0.002
    zero_rate: float = 0.01
    bias_rate: float = 0.002
    seed: int = 0


def reconstruct(block: Block, decided: Quantization, chosen: Reconstruction) -> Quantization:
    """Return the decision with this block's part learned by straight-through gradients (LSQ, arXiv 1902.08153).

    What is minimized is the block's squared output error on the chunks that teach.
    """
    student = _Student(block, decided, chosen)
    generator = torch.Generator().manual_seed(chosen.seed)
    optimizer = torch.optim.Adam(student.groups(), betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / chosen.steps))
    )
    order: list[int] = []
    for _ in range(chosen.steps):
        order = order or torch.randperm(len(block.teaching), generator=generator).tolist()
        optimizer.zero_grad()
        block.loss(block.teaching[order.pop()], student).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return student.decision()


class _Student:
    """A ``Compute`` whose quantizers have gradients."""

    def __init__(self, block: Block, decided: Quantization, chosen: Reconstruction) -> None:
        self._decided, self._chosen = decided, chosen
        self._generator = torch.Generator().manual_seed(chosen.seed)
        maps = requested_weights(block.graph)
        self._activations = {
            node: _LearnedActivation(params)
            for node in block.segment.nodes
            if is_requested(node) and (params := params_of_request(node, decided)) is not None
        }
        self._weights = {
            node: _LearnedWeight(weight, query.constant(block.graph, node.args[1]))  # type: ignore[arg-type]
            for node in block.segment.nodes
            if node in maps and (weight := decided.weights.get(node.name)) is not None
        }

    def groups(self) -> list[dict[str, Any]]:
        """Return what is learned and how fast."""
        chosen, weights, activations = self._chosen, self._weights.values(), self._activations.values()
        scales = [each.log_scale for each in weights] + [each.log_scale for each in activations]
        return [
            {"params": [each.offset for each in weights], "lr": chosen.weight_rate},
            {"params": scales, "lr": chosen.scale_rate},
            {"params": [each.zero for each in activations], "lr": chosen.zero_rate},
            {"params": [each.shift for each in weights if each.shift is not None], "lr": chosen.bias_rate},
        ]

    def __call__(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if (activation := self._activations.get(node)) is not None:
            return self._dropped(args[0], activation(args[0]))
        if (weight := self._weights.get(node)) is not None:
            return call_with(node, args, kwargs, weight.values(), weight.bias())
        return args[0] if is_requested(node) else plainly(node, args, kwargs)

    def _dropped(self, x: Tensor, quantized: Tensor) -> Tensor:
        keeps = torch.rand(x.shape, generator=self._generator) < self._chosen.drop
        return torch.where(keeps, x, quantized)

    def decision(self) -> Quantization:
        """Return the whole decision with what was learned."""
        learned = {_source(node): each.params() for node, each in self._activations.items()}
        activations = {**self._decided.activations, **learned}
        scales = {
            reader: float(activations[_source(node)].scale)
            for node in self._activations
            for reader in query.readers(node)
        }
        weights = {node.name: each.rounded(scales.get(node)) for node, each in self._weights.items()}
        return Quantization(activations=activations, weights={**self._decided.weights, **weights})


class _LearnedActivation:
    """One scale and zero point with gradients; the scale is learned as a logarithm and stays positive."""

    def __init__(self, params: QuantParams) -> None:
        self._start = params
        self.log_scale = params.scale.log().requires_grad_()
        self.zero = params.zero_point.float().requires_grad_()

    def __call__(self, x: Tensor) -> Tensor:
        kind = self._start.type
        scale, zero = self.log_scale.exp(), _rounded(self.zero).clamp(kind.minimum, kind.maximum)
        codes = _rounded((x / scale + zero).clamp(kind.minimum, kind.maximum))
        return (codes - zero) * scale

    def params(self) -> QuantParams:
        kind = self._start.type
        zero = self.zero.detach().round().clamp(kind.minimum, kind.maximum).int()
        return QuantParams(scale=self.log_scale.detach().exp(), zero_point=zero, type=kind)


class _LearnedWeight:
    """A weight that moves in units of its steps, its scales and its bias."""

    def __init__(self, start: RoundedWeight, weight: Tensor) -> None:
        self._start = start
        tail = [1] * (weight.ndim - 1)
        self._step = start.params.scale.reshape(-1, *tail)
        self._weight = weight.detach()
        self.offset = torch.zeros_like(self._weight).requires_grad_()
        self.log_scale = start.params.scale.log().requires_grad_()
        self.shift = None if start.bias is None else torch.zeros_like(start.bias).requires_grad_()

    def values(self) -> Tensor:
        kind = self._start.params.type
        scale = self.log_scale.exp().reshape(self._step.shape)
        moved = (self._weight + self.offset * self._step) / scale
        return _rounded(moved.clamp(kind.minimum, kind.maximum)) * scale

    def bias(self) -> Tensor | None:
        if self._start.bias is None or self.shift is None:
            return None
        return self._start.bias.detach() + self.shift * self._start.bias.detach().abs().mean().clamp(min=1e-3)

    def rounded(self, input_scale: float | None) -> RoundedWeight:
        with torch.no_grad():
            bias, start = self.bias(), self._start.params
            params = QuantParams(
                scale=self.log_scale.exp(),
                zero_point=start.zero_point,
                type=start.type,
                granularity=start.granularity,
            )
            if bias is not None and input_scale is not None:
                params = scale_for_bias(params, input_scale=input_scale, bias=bias)
            moved = self._weight + self.offset * self._step
            return RoundedWeight(codes=quantize(moved, params), params=params, bias=bias)


def _rounded(x: Tensor) -> Tensor:
    """Round; the gradient passes as if it were the identity."""
    return x + (x.round() - x).detach()


def _source(node: fx.Node) -> str:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source.name
