"""What each target wants quantized, as data, and why."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from normfuse.quant import INT8_NARROW, UINT8, IntegerType
from normfuse.quant.bits import MOST_GROUPED, Bits
from normfuse.quant.code_kinds import ActivationCodes, WeightCodes
from normfuse.quant.float_type import FLOAT8
from normfuse.quant.placement import Placement
from normfuse.quant.target import EightBits
from normfuse.runtime.onnx_session import AS_WRITTEN

__all__ = ["ARM", "TENSORRT", "X86_VNNI", "X86_WITHOUT_VNNI", "onnx_placement", "tensorrt_placement", "with_bits"]

EIGHT: Final = Bits(8, 8)
SYMMETRIC_8: Final = IntegerType(8, signed=True, narrow=True)
SYMMETRIC_7: Final = IntegerType(7, signed=True, narrow=True)

PACKED_TABLE: Final = IntegerType(4, signed=True)

WEIGHT_GROUP: Final = 128
"""The more inputs share a scale the smaller the file; the fewer the nearer the weights."""

X86_VNNI: Final = Placement(
    name="onnxruntime, x86 with VNNI or AMX",
    activation=UINT8,
    weight=SYMMETRIC_8,
    reason="onnxruntime's fast integer kernels on x86 take unsigned activations and signed weights",
)

X86_WITHOUT_VNNI: Final = Placement(
    name="onnxruntime, x86 without VNNI",
    activation=UINT8,
    weight=SYMMETRIC_7,
    reason="without VNNI two 8-bit products saturate in 16 bits; 7-bit weights cannot",
)

ARM: Final = Placement(
    name="onnxruntime, ARM",
    activation=IntegerType(8, signed=True),
    weight=SYMMETRIC_8,
    session_config={"session.qdqisint8allowed": "1"},
    reason="ARM's dot product takes signed activations",
)


TENSORRT: Final = Placement(
    name="TensorRT",
    activation=IntegerType(8, signed=True),
    symmetric_activations=True,
    weight=SYMMETRIC_8,
    biases_stay_float=True,
    table=None,
    standard_operators=True,
    session_config=AS_WRITTEN,  # onnxruntime checks the file, and shall compute what it says
    convolution_outputs=False,
    convolution_skips=True,
    reason="TensorRT takes signed codes about a zero point of 0, one static scale per activation, and no other codes",
)

TENSORRT_FLOAT8: Final = replace(
    TENSORRT,
    name="TensorRT, 8-bit floats",
    activation=FLOAT8,
    weight=FLOAT8,
    attention_operands=True,
    convolution_skips=False,
    quantized_convolutions=False,
    reason="products of 8-bit floats, those of attention too; TensorRT makes no convolutions of them",
)


def onnx_placement(
    instruction_set: str,
    bits: Bits = EIGHT,
    *,
    activations: ActivationCodes = ActivationCodes.STATIC,
    weights: WeightCodes = WeightCodes.SYMMETRIC,
    table_bits: int = EIGHT.weight,
) -> Placement:
    """Return the placement for a processor's level (the names of ``InstructionSet``, lower case), widths and kinds."""
    found = with_bits(_of_level(instruction_set), bits, activations=activations, weights=weights)
    return replace(found, table=PACKED_TABLE) if table_bits == PACKED_TABLE.bits else found


def with_bits(
    widest: Placement,
    bits: Bits,
    *,
    activations: ActivationCodes = ActivationCodes.STATIC,
    weights: WeightCodes = WeightCodes.SYMMETRIC,
) -> Placement:
    """Return a placement of eight bits with other widths and kinds."""
    assert isinstance(widest.activation, IntegerType)
    assert isinstance(widest.weight, IntegerType)
    is_dynamic = activations is ActivationCodes.DYNAMIC
    activation = None if bits.is_weight_only else replace(widest.activation, bits=bits.activation)
    if is_dynamic:
        activation = INT8_NARROW
    weight = widest.weight
    if bits.weight < weight.bits:  # every level counts where there are few: the smallest code is used too
        weight = IntegerType(bits.weight, signed=True)
    is_symmetric = weights is WeightCodes.SYMMETRIC
    if not is_symmetric:
        weight = replace(weight, narrow=False)
    # onnxruntime's product of floats and packed codes knows groups; every other one has a scale per channel.
    has_groups = is_dynamic or (bits.is_weight_only and bits.weight <= MOST_GROUPED)
    eight = widest.activation
    return replace(
        widest,
        activation=activation,
        is_dynamic=is_dynamic,
        weight=weight,
        weight_is_symmetric=is_symmetric,
        weight_group=WEIGHT_GROUP if has_groups else None,
        model_input=eight,
        written=eight,
    )


def tensorrt_placement(bits: Bits, eight: EightBits = EightBits.INT8) -> Placement:
    """Return TensorRT's placement: eight bits are integers or floats, fewer are weights in blocks behind floats."""
    widest = TENSORRT if eight is EightBits.INT8 else TENSORRT_FLOAT8
    few = bits.weight < EIGHT.weight
    return replace(
        widest,
        activation=None if bits.is_weight_only else widest.activation,
        weight=IntegerType(bits.weight, signed=True) if few else widest.weight,
        weight_group=WEIGHT_GROUP if few else None,
        several_groups=True,
    )


def _of_level(instruction_set: str) -> Placement:
    if instruction_set.startswith("neon"):
        return ARM
    return X86_WITHOUT_VNNI if instruction_set in ("avx2", "portable") else X86_VNNI
