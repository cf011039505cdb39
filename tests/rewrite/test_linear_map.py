"""A linear map with an affine folded in is the affine and the map, one after the other."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normfuse.graph.affine import AFFINE, Affine
from normfuse.rewrite.linear_map import LinearMap
from normfuse.testing import seeded

EXACT = 1e-13


def sample(*shape: int, seed: int = 9) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


@dataclass(frozen=True)
class Case:
    """A module and the shape of its input; where it is padded, only the inside is right without a repair."""

    module: Any
    shape: tuple[int, ...]


CASES = [
    pytest.param(Case(nn.Linear(5, 3), (2, 7, 5)), id="linear"),
    pytest.param(Case(nn.Linear(5, 3, bias=False), (2, 5)), id="linear, no bias"),
    pytest.param(Case(nn.Conv1d(4, 6, 3, stride=2), (2, 4, 9)), id="conv1d, strided"),
    pytest.param(Case(nn.Conv1d(6, 4, 2, groups=2), (2, 6, 9)), id="conv1d, grouped"),
    pytest.param(Case(nn.Conv1d(4, 6, 2, groups=2), (4, 9)), id="conv1d, grouped, unbatched"),
    pytest.param(Case(nn.Conv2d(3, 5, 1), (2, 3, 4, 6)), id="conv2d, 1x1"),
    pytest.param(Case(nn.Conv2d(4, 8, (2, 3), groups=4, bias=False), (2, 4, 5, 6)), id="depthwise, no bias"),
    pytest.param(Case(nn.Conv2d(4, 6, (3, 2), dilation=(1, 2), groups=2), (2, 4, 5, 7)), id="conv2d, dilated"),
    pytest.param(Case(nn.Conv3d(4, 2, 2, dilation=(1, 2, 1)), (2, 4, 3, 4, 5)), id="conv3d"),
]
TRANSPOSED = [
    pytest.param(Case(nn.ConvTranspose1d(4, 6, 3, stride=2, groups=2), (2, 4, 5)), id="transposed 1d, grouped"),
    pytest.param(Case(nn.ConvTranspose2d(3, 5, 2, stride=3, bias=False), (2, 3, 4, 2)), id="transposed 2d, gaps"),
    pytest.param(
        Case(nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1, output_padding=1, groups=2), (2, 6, 4, 3)),
        id="transposed 2d, padded",
    ),
    pytest.param(Case(nn.ConvTranspose3d(2, 3, 2, dilation=2), (2, 2, 3, 2, 4)), id="transposed 3d"),
]
PADDED = [
    pytest.param(Case(nn.Conv2d(4, 6, 3, padding=1, groups=2, stride=2), (2, 4, 5, 7)), id="padded, grouped"),
    pytest.param(Case(nn.Conv1d(3, 4, 3, padding=2, dilation=2), (2, 3, 7)), id="padded, dilated"),
]


def described(module: Any, rank: int) -> LinearMap:
    if isinstance(module, nn.Linear):
        return LinearMap(module.weight, module.bias, rank - 1, rank - 1)
    axis = rank - (module.weight.ndim - 1)
    is_transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
    return LinearMap(module.weight, module.bias, axis, axis, groups=module.groups, is_transposed=is_transposed)


def computed(module: Any, new: LinearMap, x: Tensor) -> Tensor:
    state: dict[str, Any] = {"weight": new.weight, "bias": torch.zeros(new.outputs) if new.bias is None else new.bias}
    copy = type(module)(
        *((module.in_features, module.out_features) if isinstance(module, nn.Linear) else _convolution(module)[0]),
        **({} if isinstance(module, nn.Linear) else _convolution(module)[1]),
    ).double()
    copy.load_state_dict(state)
    result: Tensor = copy(x)
    return result


def _convolution(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    names = ["stride", "padding", "dilation", "groups"]
    names += ["output_padding"] if isinstance(module, nn.modules.conv._ConvTransposeNd) else []
    return (module.in_channels, module.out_channels, module.kernel_size), {
        name: getattr(module, name) for name in names
    }


def apply(found: Affine, x: Tensor) -> Tensor:
    result: Tensor = AFFINE(x, found.scale, found.shift, found.axis)
    return result


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("case", [*CASES, *TRANSPOSED, *PADDED])
@torch.no_grad()
def test_behind(case: Case, uniform: bool) -> None:
    module, x = case.module.double(), sample(*case.shape)
    linear = described(module, x.ndim)
    found = Affine(*sample(2, 1 if uniform else linear.outputs), linear.output_axis)
    torch.testing.assert_close(
        computed(module, linear.behind(found), x), apply(found, module(x)), rtol=EXACT, atol=EXACT
    )


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_before(case: Case, uniform: bool) -> None:
    module, x = case.module.double(), sample(*case.shape)
    linear = described(module, x.ndim)
    found = Affine(*sample(2, 1 if uniform else linear.inputs), linear.input_axis)
    torch.testing.assert_close(
        computed(module, linear.before(found), x), module(apply(found, x)), rtol=EXACT, atol=EXACT
    )


@pytest.mark.parametrize("case", [*TRANSPOSED, *PADDED])
@torch.no_grad()
def test_before_a_padded_or_transposed_map_only_a_scale_is_right(case: Case) -> None:
    """The naive fold of a shift is far off; `padding_repair` adds what it misses."""
    module, x = case.module.double(), sample(*case.shape)
    linear = described(module, x.ndim)
    found = Affine(*sample(2, linear.inputs), linear.input_axis)
    scaled = module(apply(found.scaling(), x))
    torch.testing.assert_close(computed(module, linear.before(found.scaling()), x), scaled, rtol=EXACT, atol=EXACT)
    assert float((computed(module, linear.before(found), x) - module(apply(found, x))).abs().max()) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_arithmetic_is_rounded_once(dtype: torch.dtype) -> None:
    weight, bias = sample(4, 3).to(dtype), sample(4, seed=2).to(dtype)
    linear = LinearMap(weight, bias, 1, 1)
    outer, inner = Affine(sample(4) * 3, sample(4) + 1, 1), Affine(sample(3) * 3, sample(3) + 1, 1)
    behind, before = linear.behind(outer), linear.before(inner)
    assert torch.equal(behind.weight, (weight.double() * outer.scale[:, None]).to(dtype))
    assert behind.bias is not None
    assert torch.equal(behind.bias, (bias.double() * outer.scale + outer.shift).to(dtype))
    assert torch.equal(before.weight, (weight.double() * inner.scale).to(dtype))
    exact = bias.double() + weight.double() @ inner.shift
    assert before.bias is not None
    # Half a unit in the last place, and as much again for the order of the sum in float64.
    assert float((before.bias.double() - exact).abs().max()) <= torch.finfo(dtype).eps * float(exact.abs().max())


def test_what_a_type_cannot_hold_is_not_finite() -> None:
    linear = LinearMap(torch.full((2, 3), 4.0).half(), None, 1, 1)
    assert linear.is_finite
    assert not linear.behind(Affine(torch.tensor([6e4]).double(), torch.zeros(1).double(), 1)).is_finite
    assert not linear.before(Affine(torch.ones(1).double(), torch.tensor([3e4]).double(), 1)).is_finite
