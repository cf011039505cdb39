"""Which types the products of an ONNX file have, layer by layer: what a builder is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import onnx_ir as ir
from onnx_ir.passes.common import LiftConstantsToInitializersPass, ShapeInferencePass

from normfuse.export.lint.reading import block_size, code_type, constant, is_of_weights, unmoved

__all__ = ["ProductType", "product_types"]

PRODUCTS: Final = ("MatMul", "Gemm", "Conv", "ConvTranspose")

NAMES: Final = {
    ir.DataType.INT8: "int8",
    ir.DataType.UINT8: "uint8",
    ir.DataType.INT4: "int4",
    ir.DataType.FLOAT8E4M3FN: "fp8",
    ir.DataType.FLOAT: "fp32",
    ir.DataType.FLOAT16: "fp16",
    ir.DataType.BFLOAT16: "bf16",
}


@dataclass(frozen=True, slots=True)
class ProductType:
    """The types of what a product, a node of that name, reads: ``left x right``.

    The right one has ``block`` neighbours per scale, if any.
    """

    node: str
    layer: str
    operator: str
    left: str
    right: str
    has_weight: bool
    block: int = 0

    @property
    def spelled(self) -> str:
        """One word: ``int8`` where both are, ``int4 in blocks of 128 x fp16``."""
        blocks = f" in blocks of {self.block}" if self.block else ""
        return self.left if self.left == self.right else f"{self.right}{blocks} x {self.left}"

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {"layer": self.layer, "operator": self.operator, "type": self.spelled, "has_weight": self.has_weight}


def product_types(path: Path) -> tuple[ProductType, ...]:
    """Return the products and convolutions of a file of standard operators, in its order."""
    model = ir.load(path)
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    ShapeInferencePass(data_prop=False)(model)
    return tuple(_read(node) for node in model.graph if node.op_type in PRODUCTS)


def _read(node: ir.Node) -> ProductType:
    left, right = node.inputs[0], node.inputs[1]
    assert left is not None
    assert right is not None
    made = _dequantizer(right)
    return ProductType(
        node=node.name or "",
        layer=node.metadata_props.get("normfuse.layer") or node.name or "",
        operator=node.op_type,
        left=_type(left),
        right=_type(right),
        has_weight=constant(unmoved(right)) is not None if made is None else is_of_weights(made),
        block=0 if made is None else block_size(made),
    )


def _dequantizer(value: ir.Value) -> ir.Node | None:
    """Return what makes the values of codes, before they were moved."""
    source = unmoved(value)
    made = None if source is None else source.producer()
    return made if made is not None and made.op_type == "DequantizeLinear" else None


def _type(value: ir.Value) -> str:
    """Return the type of a tensor, or of the codes that it stands for."""
    made = _dequantizer(value)
    found = value.dtype if made is None else code_type(made)
    if found is None and value.const_value is not None:
        found = value.const_value.dtype
    return NAMES.get(found, str(found).lower()) if found is not None else "unknown"
