"""Holds the kernels of an engine against the file that it was built from: what was asked for, and what became of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import onnx_ir as ir

from normfuse.export.product_types import ProductType, product_types
from normfuse.runtime.engine_layers import EngineLayer

__all__ = ["FusionAudit", "audit"]

TYPES: Final = {
    **{"int8": "Int8", "int4": "Int4", "fp8": "FP8"},
    **{"fp32": "Float", "fp16": "Half", "bf16": "BFloat16"},
}
"""What TensorRT's list of kernels calls the types of products."""

CODES: Final = frozenset({"Int8", "FP8"})

OF_FLOATS: Final = frozenset({"runtime_fusion"})
"""Kinds of kernels that TensorRT-RTX puts together of single operations (1.7.1); its products of codes are others."""

NORMS: Final = frozenset({"LayerNormalization", "RMSNormalization", "GroupNormalization", "InstanceNormalization"})

MOVES: Final = frozenset({"Cast", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity"})
"""What a kernel may do beside a quantizer and still be nothing else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FusionAudit:
    """What became of a file's nodes.

    Attributes:
        kernels: how many the engine has.
        products: with the types of what the kernel reads (None: no kernel names the product), and whether they are
            those that the file asks for.
        norms: how many the file has.
        attentions: how many softmaxes the file has that a product reads.
        joined_attentions: how many share their kernel with the product in front and the product behind.
        joined_norms: how many share their kernel with a sum in front of them or the quantizer behind them.
        alone: quantizers and dequantizers, by name, whose kernel does nothing else.
    """

    kernels: int
    products: tuple[tuple[ProductType, tuple[str, ...] | None, bool], ...]
    norms: int
    joined_norms: int
    attentions: int
    joined_attentions: int
    alone: tuple[str, ...]

    @property
    def mismatched(self) -> list[tuple[ProductType, tuple[str, ...] | None]]:
        """The products whose kernel has other types than the file asks for, or that no kernel names."""
        return [(product, found) for product, found, is_kept in self.products if not is_kept]

    def as_dict(self) -> dict[str, Any]:
        """Return the audit for JSON."""
        asked = dict[str, dict[str, int]]()
        for product, _, is_kept in self.products:
            row = asked.setdefault(product.spelled, {"asked": 0, "got": 0})
            row["asked"] += 1
            row["got"] += is_kept
        return {
            "kernels": self.kernels,
            "products": asked,
            "mismatched": [
                {"layer": product.layer, "asked": product.spelled, "got": None if found is None else list(found)}
                for product, found in self.mismatched
            ],
            "norms": self.norms,
            "joined_norms": self.joined_norms,
            "attentions": self.attentions,
            "joined_attentions": self.joined_attentions,
            "alone": list(self.alone),
        }


def audit(model: Path, layers: Sequence[EngineLayer]) -> FusionAudit:
    """Return what became of a typed file's products, norms and quantizers (ours).

    Args:
        model: the ONNX file that the engine was built from.
        layers: the engine's kernels, whose sources are names of its nodes.
    """
    read = ir.load(model)
    kinds = {node.name: node.op_type for node in read.graph if node.name}
    by_source = dict[str, list[EngineLayer]]()
    for layer in layers:
        for source in layer.sources:
            by_source.setdefault(source, []).append(layer)
    products = tuple((each, *_fate(each, by_source.get(each.node, []))) for each in product_types(model))
    norms = [name for name, kind in kinds.items() if kind in NORMS]
    joined = [name for name in norms if any(_joins(layer, kinds) for layer in by_source.get(name, ()))]
    softmaxes = [node.name or "" for node in read.graph if node.op_type == "Softmax" and _is_multiplied(node)]
    attending = [name for name in softmaxes if any(_attends(layer, kinds) for layer in by_source.get(name, ()))]
    alone = {name: None for layer in layers if (names := _only_quantizes(layer, kinds)) for name in names}
    return FusionAudit(
        kernels=len(layers),
        products=products,
        norms=len(norms),
        joined_norms=len(joined),
        attentions=len(softmaxes),
        joined_attentions=len(attending),
        alone=tuple(alone),
    )


def _fate(product: ProductType, layers: Sequence[EngineLayer]) -> tuple[tuple[str, ...] | None, bool]:
    """Return the types of what a product's kernel reads, constants last, and whether they are those asked for.

    A kernel that only prepares its input may name it too, so one of the types asked for is it.
    """
    kept = next((layer for layer in layers if _computes(product, layer)), None)
    found = kept or next(iter(layers), None)
    return (None if found is None else (*found.inputs, *found.constants)), kept is not None


def _computes(product: ProductType, layer: EngineLayer) -> bool:
    """Return whether a kernel multiplies the operands in their types: codes by codes, or what it makes floats of.

    It reads the left one, and the right one beside it or as a constant. A kernel that is put together of single
    operations multiplies floats: 8-bit operands it makes floats of first.
    """
    left, right = TYPES.get(product.left), TYPES.get(product.right)
    if left in CODES and layer.kind in OF_FLOATS:
        return False
    beside = list(layer.inputs)
    if left in beside:
        beside.remove(left)
        return right in layer.constants or right in beside
    return False


def _joins(layer: EngineLayer, kinds: Mapping[str, str]) -> bool:
    beside = {kinds.get(source) for source in layer.sources}
    return bool(beside & {"Add", "QuantizeLinear"}) or bool({"Int8", "FP8"} & set(layer.outputs))


def _is_multiplied(node: ir.Node) -> bool:
    """Return whether a product reads what a node makes, as it is, in other types, moved or masked."""
    readers = [reader for value in node.outputs for reader in value.consumers()]
    passing = MOVES | {"QuantizeLinear", "DequantizeLinear", "Where"}
    return any(each.op_type == "MatMul" or (each.op_type in passing and _is_multiplied(each)) for each in readers)


def _attends(layer: EngineLayer, kinds: Mapping[str, str]) -> bool:
    return sum(kinds.get(source) == "MatMul" for source in set(layer.sources)) > 1


def _only_quantizes(layer: EngineLayer, kinds: Mapping[str, str]) -> list[str]:
    """Return the quantizers of a kernel that does nothing but quantize or dequantize what is computed."""
    found = [source for source in layer.sources if kinds.get(source) in ("QuantizeLinear", "DequantizeLinear")]
    is_alone = all(source in found or kinds.get(source) in MOVES for source in layer.sources)
    # Codes alone are moved, not computed; and of constants nothing is left when the engine runs.
    changes = bool(layer.inputs) and set(layer.inputs) != set(layer.outputs)
    return found if found and is_alone and changes else []
