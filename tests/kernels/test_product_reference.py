"""Linear maps, products of matrices and convolutions are exact, up to their one rounding."""

from __future__ import annotations

import pytest
import torch
from integer_calls import ENDS, WINDOWS, Arguments, any_codes, any_numbers, codes_of, limits, odd
from onnx_calls import torch_result
from torch import Tensor
from torch.nn import functional


@limits
@odd
@pytest.mark.parametrize("role", ["rows", "inner", "outer"])
def test_linear_maps_are_exact(ends: Arguments, size: int, role: str) -> None:
    """Multipliers of 22 bits keep every product below 2^52, so float64 is exact up to its one rounding."""
    sizes = {"rows": 3, "inner": 5, "outer": 2} | {role: size}
    x, weight = any_codes(sizes["rows"], sizes["inner"]), any_codes(sizes["outer"], sizes["inner"], seed=2)
    bias, multiplier = any_numbers(sizes["outer"], limit=2**20), any_numbers(sizes["outer"], limit=2**22, seed=2)
    call = {"x": x, "weight": weight, "bias": bias, "multiplier": multiplier, "shift": 30}
    sums = torch.einsum("ri,oi->ro", x.double(), weight.double()) + bias
    value = sums * multiplier / 2**30
    found = torch_result("int_linear", call | ends)
    assert torch.equal(found, nearest(value, ends))
    side = any_codes(sizes["rows"], sizes["outer"], seed=3, dtype=torch.int16)
    with_side = torch_result("int_linear_add", call | {"residual": side, "residual_multiplier": -(2**29) - 3} | ends)
    assert torch.equal(with_side, nearest(value + side.double() * (-(2**29) - 3) / 2**30, ends))
    table = any_codes(256, seed=4, dtype=torch.int16)
    looked_up = torch_result("int_linear_table", call | {"table": table, "zero_point": -5})
    assert torch.equal(looked_up, table[nearest(value, ENDS["int8"]).long() + 128])
    factors = {"x": x, "y": weight.mT, "multiplier": -(2**22), "shift": 30}
    assert torch.equal(torch_result("int_matmul", factors | ends), nearest((sums - bias) * -(2**22) / 2**30, ends))


def nearest(value: Tensor, ends: Arguments) -> Tensor:
    found = torch.floor(value + 0.5) + ends["zero_point"]
    return found.clamp(ends["minimum"], ends["maximum"]).to(codes_of(ends))


def test_sums_reach_the_end_of_int32() -> None:
    ones = torch.ones(1, 2**17 - 1, dtype=torch.int8)
    vectors = {"bias": torch.tensor([2**14 - 1], dtype=torch.int32), "multiplier": torch.ones(1, dtype=torch.int32)}
    call = {"x": -128 * ones, "weight": -128 * ones, **vectors, "shift": 17} | ENDS["int16"]
    assert int(torch_result("int_linear", call)) == 2**14 + 300  # (2^31 - 1) / 2^17 is just below


def float_convolution(x: Tensor, weight: Tensor, options: Arguments) -> Tensor:
    """Return the convolution tap by tap: one product per place of the kernel."""
    (s0, s1), (p0, p1), (d0, d1) = options["stride"], options["padding"], options["dilation"]
    padded, groups = functional.pad(x, (p1, p1, p0, p0)), options["groups"]
    (out, per_group, k0, k1), total = weight.shape, torch.zeros(())
    rows, columns = (
        (size - d * (k - 1) - 1) // s + 1
        for size, d, k, s in zip(padded.shape[2:], (d0, d1), (k0, k1), (s0, s1), strict=True)
    )
    grouped = padded.unflatten(1, (groups, per_group))
    kernels = weight.unflatten(0, (groups, out // groups))
    for i in range(k0):
        for j in range(k1):
            seen = grouped[
                ..., i * d0 : i * d0 + (rows - 1) * s0 + 1 : s0, j * d1 : j * d1 + (columns - 1) * s1 + 1 : s1
            ]
            total = total + torch.einsum("bgchw,goc->bgohw", seen, kernels[..., i, j])
    return total.flatten(1, 2)


@limits
@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS.keys())
@pytest.mark.parametrize("zero", [-128, 0, 77])
def test_convolutions_are_exact(ends: Arguments, window: Arguments, zero: int) -> None:
    """As for linear maps, float64 is exact; what is padded counts nothing."""
    x, weight = any_codes(2, 4, 9, 7), any_codes(8, 4 // window["groups"], 3, 2, seed=2)
    bias, multiplier = any_numbers(8, limit=2**20), any_numbers(8, limit=2**22, seed=2)
    call = {
        "x": x,
        "weight": weight,
        "bias": bias,
        "multiplier": multiplier,
        "x_zero_point": zero,
        "shift": 30,
        **window,
    }
    sums = float_convolution(x.double() - zero, weight.double(), window)
    value = (sums + bias[:, None, None]) * multiplier[:, None, None] / 2**30
    assert torch.equal(torch_result("int_conv2d", call | ends), nearest(value, ends))
    side = any_codes(*value.shape, seed=3)
    with_side = torch_result("int_conv2d_add", call | {"residual": side, "residual_multiplier": 2**31 + 5} | ends)
    assert torch.equal(with_side, nearest(value + side.double() * (2**31 + 5) / 2**30, ends))
