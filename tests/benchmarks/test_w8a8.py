"""Linear maps of 8-bit codes against float64, on shapes and values that show a wrong axis, step or saturation."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from benchmarks.vision import SHAPES, Network, build, colour_images
from benchmarks.w8a8 import Codes, Float8Linear, Int8Linear, Seen, quantize, why_not

NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
NO_FLOAT8 = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="needs float8 products"
)
ON_GPU = pytest.param("cuda", marks=[pytest.mark.gpu, NO_CUDA])
ON_FLOAT8_GPU = pytest.param("cuda", marks=[pytest.mark.gpu, NO_FLOAT8])
SIZES = [((2, 19), 48, 80), ((33,), 112, 16), ((1, 3, 7), 64, 208)]
"""Leading axes, inputs, outputs; CUDA takes them all."""

EPS_FLOAT32 = torch.finfo(torch.float32).eps


@cache
def tiny(norm: str) -> Network:
    return build("tiny", norm)


def drawn(leading: tuple[int, ...], inputs: int, outputs: int, *, device: str) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(inputs)
    x = torch.randn(*leading, inputs, generator=generator)
    # Rows of very different magnitude: one step for all of them, or a step per column, would show.
    weight = torch.randn(outputs, inputs, generator=generator) * torch.logspace(-3, 2, outputs)[:, None]
    return x.to(device), weight.to(device), torch.randn(outputs, generator=generator).to(device)


def int8_result(linear: Int8Linear, x: Tensor) -> Tensor:
    """The definition in float64: codes, their product, the scale, the bias."""
    codes = (x.double() / linear.input_step.double()).round().clamp(-127, 127)
    return (codes @ linear.weight.double().t()) * linear.scale.double() + linear.bias.double()


@pytest.mark.parametrize("device", ["cpu", ON_GPU])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("leading", "inputs", "outputs"), SIZES)
def test_int8_is_its_definition(
    leading: tuple[int, ...], inputs: int, outputs: int, dtype: torch.dtype, device: str
) -> None:
    x, weight, bias = drawn(leading, inputs, outputs, device=device)
    x = x.to(dtype)
    linear = Int8Linear(weight, bias, largest=float(x.abs().max())).to(device)

    y = linear(x)

    assert (y.dtype, y.shape) == (dtype, (*leading, outputs))
    wanted = int8_result(linear, x)
    # A quotient in float32 may fall on the other side of a tie: one code of one input. Else three roundings in float32
    # (product, sum, and the step in the scale) and one in the result's type.
    tie = linear.scale.double() * 127
    rounding = 4 * EPS_FLOAT32 * (wanted.abs() + linear.bias.abs()) + torch.finfo(dtype).eps * wanted.abs()
    assert bool(((y - wanted).abs() <= rounding + tie).all())
    assert float(((y - wanted).abs() <= rounding).double().mean()) > 0.9  # ties are rare


@pytest.mark.parametrize("device", ["cpu", ON_GPU])
@pytest.mark.parametrize(("leading", "inputs", "outputs"), SIZES)
def test_int8_is_as_near_to_float_as_half_steps_allow(
    leading: tuple[int, ...], inputs: int, outputs: int, device: str
) -> None:
    x, weight, bias = drawn(leading, inputs, outputs, device=device)
    y = Int8Linear(weight, bias, largest=float(x.abs().max())).to(device)(x).double()

    x, weight = x.double(), weight.double()
    dx, dw = x.abs().max() / 254, weight.abs().amax(dim=1) / 254  # half a step
    bound = dx * weight.abs().sum(dim=1) + dw * x.abs().sum(dim=-1, keepdim=True) + inputs * dx * dw
    assert bool(((y - (x @ weight.t() + bias)).abs() <= 1.001 * bound).all())


@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 7, 3), (5, 129, 11), (17, 33, 1)])
def test_int8_takes_odd_shapes_on_the_cpu(rows: int, inputs: int, outputs: int) -> None:
    x, weight, bias = drawn((rows,), inputs, outputs, device="cpu")
    linear = Int8Linear(weight, bias, largest=float(x.abs().max()))
    wanted = int8_result(linear, x)
    assert bool(((linear(x) - wanted).abs() <= linear.scale * 127 + 4 * EPS_FLOAT32 * (wanted.abs() + 10)).all())


@pytest.mark.parametrize("device", ["cpu", ON_FLOAT8_GPU])
@pytest.mark.parametrize(("leading", "inputs", "outputs"), SIZES)
def test_float8_is_as_near_to_float_as_its_numbers_allow(
    leading: tuple[int, ...], inputs: int, outputs: int, device: str
) -> None:
    x, weight, bias = drawn(leading, inputs, outputs, device=device)
    x = x.bfloat16()
    largest = float(x.abs().max())
    linear = Float8Linear(weight, bias, largest=largest, rows=x[..., 0].numel() + 2).to(device)

    y = linear(x)

    assert (y.dtype, y.shape) == (torch.bfloat16, (*leading, outputs))
    x, weight, bias = x.double(), weight.double(), bias.bfloat16().double()
    # Three bits behind the point: half of 2^-3 relative, and half a subnormal, 2^-10, of a step.
    dx = x.abs() / 16 + largest / 448 / 1024
    dw = weight.abs() / 16 + weight.abs().amax(dim=1, keepdim=True) / 448 / 1024
    product = x.abs() @ weight.abs().t()
    bound = dx @ weight.abs().t() + x.abs() @ dw.t() + dx @ dw.t()
    # Sums keep at least 13 bits where the fast accumulation is used; the result has 8.
    rounding = 2**-13 * product + 2**-8 * (product + bias.abs())
    assert bool(((y - (x @ weight.t() + bias)).abs() <= bound + rounding).all())


def test_float8_is_its_definition() -> None:
    x, weight, bias = drawn((2, 19), 48, 80, device="cpu")
    linear = Float8Linear(weight, bias, largest=float(x.abs().max()), rows=38)
    codes = linear.codes(x.bfloat16()).double() * linear.input_step[0].double()
    product = codes @ (linear.weight.double() * linear.weight_step.double().t()).t()
    wanted = product + linear.bias.double()

    y = linear(x.bfloat16()).double()

    # The product and the sum with the bias may each be rounded to bfloat16 (half of 2^-7), sums are float32.
    rounding = 2**-8 * (product.abs() + wanted.abs()) + 48 * EPS_FLOAT32 * product.abs().max()
    assert bool(((y - wanted).abs() <= rounding).all())


@pytest.mark.parametrize("codes", list(Codes))
def test_extreme_values_saturate_and_stay_numbers(codes: Codes) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(32, 48, generator=generator)
    weight[0], weight[1], weight[2] = 0.0, weight[1] * 1e-30, weight[2] * 1e20
    bias = torch.arange(32.0)
    given = (weight, bias)
    linear = Int8Linear(*given, largest=2.0) if codes is Codes.INT8 else Float8Linear(*given, largest=2.0, rows=20)
    x = torch.randn(20, 48, generator=generator).bfloat16()
    x[3], x[4], x[5] = 1e30, -1e30, 0.0

    y = linear(x)

    assert bool(y.isfinite().all())
    torch.testing.assert_close(y, linear(x.clamp(-2, 2)), atol=0, rtol=0)
    assert bool((y[:, 0] == 0).all())  # a row of zeros gives its bias
    torch.testing.assert_close(y[5].float(), bias, atol=0, rtol=0)  # and so does an input of zeros
    kept, row = x.clamp(-2, 2).double(), weight[2].double()
    # Float8: 1/16 of either factor and the rounding of the result; int8's half steps are smaller on most of these.
    assert bool(((y[:, 2] - kept @ row - bias[2]).abs() <= 0.14 * (kept.abs() @ row.abs())).all())


@pytest.mark.parametrize("codes", list(Codes))
def test_an_input_that_was_always_zero_has_a_step(codes: Codes) -> None:
    given = (torch.ones(16, 32), None)
    linear = Int8Linear(*given, largest=0.0) if codes is Codes.INT8 else Float8Linear(*given, largest=0.0, rows=18)
    y = linear(torch.zeros(18, 32, dtype=torch.bfloat16))
    assert bool((y == 0).all())


@pytest.mark.parametrize(
    ("codes", "rows", "shape", "told"),
    [
        (Codes.INT8, 17, (8, 24), ""),
        (Codes.INT8, 16, (8, 24), "16 rows per sample, at least 17 needed"),
        (Codes.INT8, 197, (12, 24), "24 inputs and 12 outputs, multiples of 8 needed"),
        (Codes.INT8, 1, (8, 24), "it reads one row per sample"),
        (Codes.FLOAT8, 1, (16, 32), "it reads one row per sample"),
        (Codes.FLOAT8, 3, (16, 32), ""),
        (Codes.FLOAT8, 197, (16, 24), "24 inputs and 16 outputs, multiples of 16 needed"),
    ],
)
def test_what_the_products_refuse_stays_float(codes: Codes, rows: int, shape: tuple[int, int], told: str) -> None:
    assert why_not(codes, rows=rows, shape=shape) == told


@pytest.mark.parametrize("codes", list(Codes))
def test_a_network_gets_codes_in_its_blocks_alone(codes: Codes) -> None:
    network = tiny("UN")
    made = quantize(network.measured, network.seen, codes, batch=5)

    names = [f"blocks.{block}.{name}" for block in range(2) for name in ("attn.qkv", "attn.proj", "fc1", "fc2")]
    assert list(made.layers) == names
    assert made.left == {"head": "it reads one row per sample"}
    assert {seen.rows for seen in network.seen.values()} == {26, 1}
    images = colour_images(5, SHAPES["tiny"].size, seed=9)
    dtype = torch.bfloat16 if codes is Codes.FLOAT8 else torch.float16
    found, wanted = made.network(images.to(dtype)).float(), network.reference(images)
    # Eight maps in a row, each off by 1/16 at most per factor (float8) of which most cancels.
    assert float((found - wanted).norm() / wanted.norm()) < 0.1
    assert all(buffer.dtype is torch.float32 for buffer in network.measured.buffers())  # the original is as it was


def test_steps_come_from_what_calibration_shows() -> None:
    network = tiny("LN")
    sizes = {name: seen.largest for name, seen in network.seen.items()}
    assert len(sizes) == 9
    assert min(sizes.values()) > 0
    half = {name: Seen(seen.largest / 2, seen.rows) for name, seen in network.seen.items()}
    steps = [
        [float(each.input_step) for each in made.network.modules() if isinstance(each, Int8Linear)]
        for made in (quantize(network.measured, seen, Codes.INT8, batch=1) for seen in (network.seen, half))
    ]
    assert steps[0] == pytest.approx([2 * step for step in steps[1]])
