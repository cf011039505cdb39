"""A network of a convolution and three linear maps, compiled to mixed bits, and what its file holds of each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import onnx
import torch
from onnx import TensorProto
from torch import Tensor, nn
from torch.nn import functional as F

import normfuse
from normfuse.built import Built
from normfuse.recipe import Recipe
from normfuse.testing import Small, randomized, seeded

__all__ = ["LAYERS", "QUICKLY", "bits_of", "compiled", "expected", "images", "labelled", "network", "size", "stored"]

LAYERS: Final = {"patch": 64 * 18, "up": 64 * 160, "down": 160 * 33, "head": 33 * 7}
"""The weights' elements: they tell the layers apart in a file."""

QUICKLY: Final = {"effort": 0, "threads": 1, "max_drop": 100.0, "benchmark": False}

HELD: Final = {4: "int4", 8: "int8", 32: "float32"}
"""What weights of some bits are in a file."""

TYPES: Final = {TensorProto.INT4: "int4", TensorProto.INT8: "int8", TensorProto.FLOAT: "float32"}


def forward(m: Any, image: Tensor) -> Tensor:
    x = m.patch(image).flatten(2).transpose(1, 2)  # [batch, 6, 64]
    x = m.down(F.gelu(m.up(x))).mean(dim=1)
    return m.head(F.gelu(x))  # type: ignore[no-any-return]


def network() -> nn.Module:
    """Always the same; it sees every class in about as many images."""
    layers = {"up": nn.Linear(64, 160), "down": nn.Linear(160, 33), "head": nn.Linear(33, 7)}
    found = randomized(Small(forward, patch=nn.Conv2d(2, 64, 3, 3), **layers))
    with torch.no_grad():
        logits = found(torch.from_numpy(images(count=200)))
        found.head.bias -= logits.mean(dim=0)  # type: ignore[union-attr]
    return found


def images(count: int = 24, seed: int = 1) -> Any:
    """Images as an array."""
    return torch.randn(count, 2, 9, 6, generator=seeded(seed)).numpy()


def labelled(count: int = 200, seed: int = 2) -> dict[str, Any]:
    """Images with the classes that the network sees in them: the float engine is always right."""
    found = images(count, seed)
    with torch.no_grad():
        return {"x": found, "label": network()(torch.from_numpy(found)).argmax(dim=1).numpy()}


def compiled(
    *, labels: bool = True, resume: Path | None = None, data: int = 1, bits: str = "mixed", **options: Any
) -> Built:
    """The network compiled: by a score that costs nothing and whatever it loses, unless options say otherwise.

    ``data`` are the calibration samples.
    """
    score = {"score": "random"} if bits == "mixed" else {}
    recipe = Recipe().with_options(bits=bits, **{**QUICKLY, **score, **options})
    evaluation = labelled() if labels else None
    return normfuse.compile(
        network(), calibration={"x": images(seed=data)}, evaluation=evaluation, recipe=recipe, resume=resume
    )


def bits_of(built: Built) -> dict[str, str]:
    """The bits of every layer, as the report says."""
    return {each["layer"]: each["bits"] for each in built.report["mixed"]["layers"]}


def size(built: Built) -> int:
    """The bytes of the engine's file."""
    return built.engine.path.stat().st_size


def stored(path: Path) -> dict[str, str]:
    """What every layer's weight is in a file, by the layer's name."""
    graph, found = onnx.load(path).graph, dict[int, str]()
    for tensor in graph.initializer:
        if tensor.data_type in TYPES and len(tensor.dims) > 1:
            found[math.prod(tensor.dims)] = TYPES[tensor.data_type]
    for node in graph.node:
        if node.op_type == "MatMulNBits":
            held = {each.name: each.i for each in node.attribute}
            found[held["K"] * held["N"]] = f"int{held['bits']}"
    return {layer: found[count] for layer, count in LAYERS.items()}


def expected(bits: Mapping[str, str]) -> dict[str, str]:
    """What files hold of layers with these bits."""
    widths = {layer: 32 if each == "float" else int(each[1 : each.index("a")]) for layer, each in bits.items()}
    return {layer: HELD[width] for layer, width in widths.items()}
