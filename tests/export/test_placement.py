"""Placements: what each processor level gets, and that it is what its kernels take."""

from __future__ import annotations

import pytest

from normfuse.export.placement import onnx_placement
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
