"""Placements: what each processor level gets, and that it is what its kernels take."""

from __future__ import annotations

from dataclasses import replace

import pytest

from normfuse.export.placement import onnx_placement, tensorrt_placement
from normfuse.quant import IntegerType
from normfuse.quant.bits import Bits
from normfuse.quant.float_type import FLOAT8
from normfuse.quant.target import EightBits
from normfuse.runtime.instruction_set import InstructionSet


@pytest.mark.parametrize("level", list(InstructionSet))
def test_every_level_has_a_placement(level: InstructionSet) -> None:
    placement = onnx_placement(level.value)
    assert placement.weight.signed
    assert placement.weight.minimum == -placement.weight.maximum, "symmetric: zero points of weights cost time"
    assert placement.reason


@pytest.mark.parametrize("level", [InstructionSet.AVX2, InstructionSet.PORTABLE])
def test_without_vnni_two_products_fit_sixteen_bits(level: InstructionSet) -> None:
    placement = onnx_placement(level.value)
    assert 2 * placement.activation.maximum * placement.weight.maximum < 2**15


@pytest.mark.parametrize("level", [InstructionSet.AMX, InstructionSet.AVX512_VNNI, InstructionSet.AVX_VNNI])
def test_with_vnni_weights_keep_eight_bits(level: InstructionSet) -> None:
    placement = onnx_placement(level.value)
    assert (placement.weight.bits, placement.activation.signed) == (8, False)


def test_arm_takes_signed_activations() -> None:
    placement = onnx_placement(InstructionSet.NEON_DOT.value)
    assert placement.activation.signed
    assert placement.session_config == {"session.qdqisint8allowed": "1"}


@pytest.mark.parametrize("eight", list(EightBits))
@pytest.mark.parametrize("bits", ["8", "w8a16", "w4a16", "w2a16"])
def test_tensorrt_takes_symmetric_codes_of_eight_bits_or_blocks_behind_floats(bits: str, eight: EightBits) -> None:
    precision = Bits.parse(bits)
    placement = tensorrt_placement(precision, eight)
    assert placement.symmetric_activations
    assert placement.standard_operators
    assert placement.biases_stay_float
    assert placement.table is None
    assert (placement.activation is None) == precision.is_weight_only
    assert (placement.weight_group is None) == (precision.weight == 8)
    kind = FLOAT8 if eight is EightBits.FP8 else IntegerType(8, signed=True, narrow=True)
    assert placement.weight == (kind if precision.weight == 8 else IntegerType(precision.weight, signed=True))
    assert placement.quantized_convolutions == (eight is EightBits.INT8)
    assert placement.convolution_skips == (eight is EightBits.INT8)


@pytest.mark.parametrize(
    ("inputs", "one", "several"),
    [
        (384, 128, 128), (256, 128, 128), (128, 128, 64), (96, 32, 32), (64, 64, 32), (48, 16, 16), (32, 32, 16),
        (16, 16, None), (8, None, None), (24, None, None), (129, None, None), (1, None, None), (1000, None, None),
    ],
)  # fmt: skip
def test_groups_divide_the_inputs_and_are_several_where_the_target_wants_so(
    inputs: int, one: int | None, several: int | None
) -> None:
    placement = replace(onnx_placement("portable"), weight_group=128)
    assert placement.group_of(inputs) == one
    assert replace(placement, several_groups=True).group_of(inputs) == several
    assert replace(placement, weight_group=None, several_groups=True).group_of(inputs) is None
