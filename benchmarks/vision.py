"""ViTs of published shapes with random weights, as they are and folded, for measurements with PyTorch alone.

The architecture is the zoo's, for colour images: one joint projection to q, k and v, and attention without a mask, for
which PyTorch has its fastest kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Final

import torch
from torch import Tensor, fx, nn

from benchmarks.deit import NORMS
from benchmarks.random_weights import randomized_norms
from benchmarks.w8a8 import Seen, observe
from examples.zoo.models import VisionShape, VisionTransformer
from normfuse.errors import CheckFailed
from normfuse.folding import fold
from normfuse.graph import capture
from normfuse.graph.program import to_module

__all__ = ["SHAPES", "Network", "build", "colour_images", "shape_of"]

COLOURS: Final = 3
CALIBRATION: Final = 8
"""Images that the steps of 8-bit activations come from."""

SHAPES: Final = {
    "vit-s": VisionShape(size=224, patch=16, classes=1000, width=384, depth=12, heads=6),
    "vit-b": VisionShape(size=224, patch=16, classes=1000, width=768, depth=12, heads=12),
    "tiny": VisionShape(size=40, patch=8, classes=24, width=48, depth=2, heads=3),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """One network in float32: unfolded, which is the reference, and as it is measured.

    What is measured is a graph of ATen operators for every kind of norm, so that nothing but the norms differs: layer
    norms as they are, all others folded away. ``seen`` is what its linear maps read from the calibration images.
    """

    norm: str
    reference: nn.Module
    measured: fx.GraphModule
    seen: dict[str, Seen]


def build(name: str, norm: str, *, seed: int = 0) -> Network:
    """Return a network with random weights and random statistics of its norms.

    Raises:
        CheckFailed: a norm is left after folding, or the folded network is not the one that was folded.
    """
    torch.manual_seed(seed)
    shape, factory = SHAPES[name], NORMS[norm]
    reference = randomized_norms(_vision_transformer(shape, factory or nn.LayerNorm), seed=seed)
    for parameter in reference.parameters():
        parameter.requires_grad_(False)
    example = colour_images(2, shape.size, seed=seed)
    measured = _folded(reference, example) if factory else to_module(capture(reference, [example]))
    calibration = colour_images(CALIBRATION, shape.size, seed=seed + 1)
    return Network(norm=norm, reference=reference, measured=measured, seen=observe(measured, calibration))


def shape_of(name: str) -> dict[str, Any]:
    """Return a shape for JSON."""
    shape = asdict(SHAPES[name])
    return {"name": name, **{key: value for key, value in shape.items() if not isinstance(value, bool)}}


def colour_images(count: int, size: int, *, seed: int) -> Tensor:
    """Return random images, normal and not zero: products of zeros draw less power and run faster."""
    return torch.randn(count, COLOURS, size, size, generator=torch.Generator().manual_seed(seed))


def _vision_transformer(shape: VisionShape, norm: Callable[[int], nn.Module]) -> VisionTransformer:
    model = VisionTransformer(shape, norm)
    model.patch = nn.Conv2d(COLOURS, shape.width, shape.patch, shape.patch)
    return model


def _folded(reference: nn.Module, example: Tensor) -> fx.GraphModule:
    folded = fold(reference, example)
    left = folded.certificate["norms"]["after"] or folded.certificate["affines"]["left"]
    if left or not folded.holds:
        raise CheckFailed("the norms of this network do not fold", expected="a certificate that holds and nothing left")
    return to_module(folded.graph)
