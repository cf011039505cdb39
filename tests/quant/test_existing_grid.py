"""Weights that are on a grid are found there to the last bit, and no others are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from normfuse.quant import INT4, INT8, INT16, IntegerType, WeightClip, quantize, quantize_dequantize, weight_params
from normfuse.quant.existing_grid import existing_steps
from normfuse.quant.integer_type import INT8_NARROW
from normfuse.testing import seeded

TYPES = [IntegerType(2, signed=True), IntegerType(3, signed=True), INT4, IntegerType(5, signed=True), INT8_NARROW]


def on_grid(type_: IntegerType, *shape: int, seed: int = 4) -> tuple[Tensor, Tensor]:
    """Return rows of random codes times steps that are no powers of two, both ends among them, and the steps."""
    codes = torch.randint(type_.minimum, type_.maximum + 1, shape, generator=seeded(seed))
    codes[:, 0], codes[:, 1] = type_.minimum, type_.maximum
    steps = 0.01 + 0.1 * torch.rand(shape[0], generator=seeded(seed + 1))
    return codes.float() * steps[:, None], steps


@pytest.mark.parametrize("type_", TYPES, ids=str)
@pytest.mark.parametrize("width", [2, 7, 129])
def test_every_row_of_codes_is_found_with_its_values(type_: IntegerType, width: int) -> None:
    rows, _ = on_grid(type_, 61, width)
    found = existing_steps(rows, type_)
    codes = (rows / found[:, None]).round()
    assert bool((found > 0).all())
    assert torch.equal(codes * found[:, None], rows)
    assert type_.minimum <= int(codes.min())
    assert int(codes.max()) <= type_.maximum
    assert bool((codes.abs().amax(1) * 2 > type_.maximum).all())


HELD = [
    pytest.param([0.5, -1.0, 0.25], IntegerType(3, signed=True), 0.25, id="all codes used"),
    pytest.param([0.75, -0.5, 0.0], IntegerType(3, signed=True), 0.25, id="none of them is one"),
    pytest.param([0.25, -0.25, 0.0], IntegerType(3, signed=True), 0.125, id="halved once"),
    pytest.param([0.5, -1.0, 0.25], INT8_NARROW, 0.25 / 16, id="halved as often as codes last"),
    pytest.param([0.5, -1.0, 0.25], INT8, 0.25 / 32, id="one code more"),
    pytest.param([0.5, 1.0, 0.25], IntegerType(3, signed=True), 0.0, id="four is no code above zero"),
    pytest.param([0.5, -1.0, 0.125], IntegerType(3, signed=True), 0.0, id="eight is none at all"),
    pytest.param([0.5, -1.0, 0.3], IntegerType(3, signed=True), 0.0, id="between codes"),
    pytest.param([0.0, 0.0, 0.0], IntegerType(3, signed=True), 0.0, id="nothing but zeros"),
    pytest.param([float("nan"), 0.5, 0.25], IntegerType(3, signed=True), 0.0, id="not a number"),
    pytest.param([0.5, -1.0, 0.25], INT16, 0.0, id="a width of no weights"),
]


@pytest.mark.parametrize(("row", "type_", "wanted"), HELD)
def test_steps_worked_out_by_hand(row: list[float], type_: IntegerType, wanted: float) -> None:
    assert existing_steps(torch.tensor([row]), type_).tolist() == [wanted]


def test_one_bit_beside_the_grid_is_beside_it() -> None:
    rows, _ = on_grid(INT4, 5, 9)
    rows[3, 4] = torch.nextafter(rows[3, 0] / 8 * 5, torch.tensor(1.0)) + 1e-6 * rows[3, 0].abs()
    assert (existing_steps(rows, INT4) > 0).tolist() == [True, True, True, False, True]


def test_ordinary_weights_are_on_none() -> None:
    rows = torch.randn(300, 5, generator=seeded(2))
    for type_ in TYPES:
        assert not bool(existing_steps(rows, type_).any())


@pytest.mark.parametrize("type_", TYPES, ids=str)
def test_scales_of_weights_keep_the_grid(type_: IntegerType) -> None:
    rows, steps = on_grid(type_, 9, 33)
    rows[2] /= 2
    beside = torch.randn(3, 33, generator=seeded(8))
    params = weight_params(torch.cat([rows, beside]), 0, type_, clip=WeightClip.MSE)
    assert torch.equal(quantize_dequantize(rows, weight_params(rows, 0, type_, clip=WeightClip.MSE)), rows)
    assert torch.allclose(params.scale[:2], steps[:2], rtol=2**-22)
    alone = weight_params(beside, 0, type_, clip=WeightClip.MSE)
    assert torch.equal(params.scale[9:], alone.scale)
    assert int(quantize(rows, weight_params(rows, 0, type_, clip=WeightClip.MSE)).min()) == type_.minimum
