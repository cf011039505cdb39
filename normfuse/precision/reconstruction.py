"""Learns weights and steps of one block, so that it answers the quantized network before it as the float one would."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

import torch
from torch import Tensor, fx

from normfuse.graph import query
from normfuse.graph.quantization import is_requested, requested_weights, requests
from normfuse.graph.quickly import quickly
from normfuse.precision.block import Block
from normfuse.precision.decision import Quantization, scale_for_maps
from normfuse.precision.learned_activation import learned_activation
from normfuse.precision.learned_weight import KeptCodes, LearnedWeight, MovedWeight
from normfuse.precision.simulation import call_with, params_of_request, source_of_request
from normfuse.precision.soft_rounding import SoftlyRounded
from normfuse.precision.straight_through import straight_through
from normfuse.quant import DynamicParams, RoundedWeight, snap

__all__ = ["AFFINE_TUNING", "Reconstruction", "Rounding", "reconstruct"]

WARM_UP: Final = 0.2
"""The share of the updates before soft rounding has to decide."""

SHARPNESS: Final = (20.0, 2.0)
"""The exponent of its penalty, from then to the end."""


class Rounding(Enum):
    """How the codes of weights are learned."""

    STRAIGHT_THROUGH = "the weight moves, rounding has the gradient of the identity"
    SOFT = "every weight decides between down and up (AdaRound)"
    KEPT = "codes stay"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reconstruction:
    """How a block learns.

    Attributes:
        steps: updates, one chunk each.
        drop: the share of activations left float in an update (QDrop, Wei et al. 2022, arXiv 2203.05740).
        rounding: how codes of weights are learned.
        soft_rate: of what soft rounding learns, per update, in units of its sigmoid's argument.
        decide: the weight of soft rounding's penalty, beside the relative squared error.
        weight_rate: in weight steps per update; ``scale_rate`` and ``bias_rate`` relative to size; ``zero_rate`` in
            codes. All fall to zero as a half cosine.
        seed: of the order of the chunks and of what is dropped.
    """

    steps: int = 200
    drop: float = 0.25
    rounding: Rounding = Rounding.STRAIGHT_THROUGH
    soft_rate: float = 0.03
    decide: float = 0.3
    weight_rate: float = 0.01
    scale_rate: float = 0.002
    zero_rate: float = 0.01
    bias_rate: float = 0.002
    seed: int = 0


KINDS: Final[Mapping[Rounding, Callable[[RoundedWeight, Tensor], LearnedWeight]]] = {
    Rounding.STRAIGHT_THROUGH: MovedWeight,
    Rounding.SOFT: SoftlyRounded,
    Rounding.KEPT: KeptCodes,
}

AFFINE_TUNING: Final = Reconstruction(
    steps=300, drop=0.0, rounding=Rounding.KEPT, scale_rate=0.005, zero_rate=0.02, bias_rate=0.01
)
"""Codes stay; the affine of every output in its dequantization and the ranges of activations move.

What is left to tune of norms once they are folded ("Beacon", arXiv 2508.20293, and "SandwichQuant", 2026, tune gamma
and beta). Few numbers learn, so that few samples are enough for a whole network at once.
"""


def reconstruct(block: Block, decided: Quantization, chosen: Reconstruction) -> Quantization:
    """Return the decision with this block's part learned by straight-through gradients (LSQ, arXiv 1902.08153).

    What is minimized is the block's loss (``Block.loss``) on the chunks that teach.

    Args:
        block: its maps and quantizers learn.
        decided: where learning starts; what stands before the block stays.
        chosen: how long, how fast and what.
    """
    student = _Student(block, decided, chosen)
    generator = torch.Generator().manual_seed(chosen.seed)
    optimizer = torch.optim.Adam(student.groups(), betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / chosen.steps))
    )
    order: list[int] = []
    for step in range(chosen.steps):
        order = order or torch.randperm(len(block.split.teaching), generator=generator).tolist()
        optimizer.zero_grad()
        loss = block.loss(block.split.teaching[order.pop()], student) + student.penalty(step / chosen.steps)
        loss.backward()
        optimizer.step()
        schedule.step()
    return student.decision()


class _Student:
    """A ``Compute`` whose quantizers have gradients."""

    def __init__(self, block: Block, decided: Quantization, chosen: Reconstruction) -> None:
        self._decided, self._chosen = decided, chosen
        self._generator = torch.Generator().manual_seed(chosen.seed)
        maps, asked = requested_weights(block.graph), {request.node: request for request in requests(block.graph)}
        requested = [node for node in block.segment.nodes if node in asked]
        known = {node: params for node in requested if (params := params_of_request(node, decided)) is not None}
        self._dynamic = {node: params for node, params in known.items() if isinstance(params, DynamicParams)}
        self._activations = {
            node: learned_activation(params, is_symmetric=asked[node].is_symmetric)
            for node, params in known.items()
            if not isinstance(params, DynamicParams)
        }
        kind = KINDS[chosen.rounding]
        self._weights: Mapping[fx.Node, LearnedWeight] = {
            node: kind(weight, query.constant(block.graph, node.args[1]))  # type: ignore[arg-type]
            for node in block.segment.nodes
            if node in maps and (weight := decided.weights.get(node.name)) is not None
        }

    def groups(self) -> list[dict[str, Any]]:
        """Return what is learned and how fast."""
        chosen, weights, activations = self._chosen, self._weights.values(), self._activations.values()
        weight_rate = chosen.weight_rate if chosen.rounding is Rounding.STRAIGHT_THROUGH else chosen.soft_rate
        scales = [each.log_scale for each in weights] + [each.log_scale for each in activations]
        return [
            {"params": [each.offset for each in weights if each.offset is not None], "lr": weight_rate},
            {"params": scales, "lr": chosen.scale_rate},
            {"params": [each.zero for each in activations if each.zero is not None], "lr": chosen.zero_rate},
            {"params": [each.shift for each in weights if each.shift is not None], "lr": chosen.bias_rate},
        ]

    def __call__(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if (activation := self._activations.get(node)) is not None:
            return self._dropped(args[0], activation(args[0]))
        if (dynamic := self._dynamic.get(node)) is not None:
            return self._dropped(args[0], straight_through(args[0], snap(args[0], dynamic)))
        if (weight := self._weights.get(node)) is not None:
            return call_with(node, args, kwargs, weight.values(), weight.bias())
        return args[0] if is_requested(node) else quickly(node, args, kwargs)

    def penalty(self, share: float) -> Tensor | float:
        """Return what is added to the loss after this share of the updates, so that soft rounding decides."""
        soft = [each for each in self._weights.values() if isinstance(each, SoftlyRounded)]
        if not soft or share < WARM_UP:
            return 0.0
        first, last = SHARPNESS
        sharpness = first + (last - first) * (share - WARM_UP) / (1 - WARM_UP)
        return self._chosen.decide * torch.stack([each.undecided(sharpness) for each in soft]).mean()

    def _dropped(self, x: Tensor, quantized: Tensor) -> Tensor:
        keeps = torch.rand(x.shape, generator=self._generator) < self._chosen.drop
        return torch.where(keeps, x, quantized)

    def decision(self) -> Quantization:
        """Return the whole decision with what was learned."""
        learned = {source_of_request(node): each.params() for node, each in self._activations.items()}
        activations = {**self._decided.activations, **learned}
        scales = {
            reader: scale_for_maps(activations[source_of_request(node)])
            for node in self._activations
            for reader in query.readers(node)
            if reader in self._weights
        }
        weights = {node.name: each.rounded(scales.get(node)) for node, each in self._weights.items()}
        return self._decided.changed(activations=learned, weights=weights)
