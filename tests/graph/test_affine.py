"""The algebra of affines: what it composes is what the operators compute one after the other."""

import pytest
import torch
from torch import Tensor

from normfuse.graph.affine import AFFINE, IDENTITY, Affine, along
from normfuse.testing import seeded

X = torch.randn(2, 3, 5, generator=seeded(0), dtype=torch.float64)


def affine(size: int, axis: int, *, seed: int) -> Affine:
    generator = seeded(seed)
    vectors = torch.randn(2, size, generator=generator, dtype=torch.float64)
    return Affine(vectors[0], vectors[1], axis)


def apply(found: Affine, x: Tensor) -> Tensor:
    result: Tensor = AFFINE(x, found.scale, found.shift, found.axis)
    return result


PAIRS = [
    pytest.param(affine(5, 2, seed=1), affine(5, 2, seed=2), True, id="one axis"),
    pytest.param(affine(5, 2, seed=1), affine(1, 0, seed=2), True, id="uniform after"),
    pytest.param(affine(1, 0, seed=1), affine(3, 1, seed=2), True, id="uniform before"),
    pytest.param(affine(1, 0, seed=1), affine(1, 2, seed=2), True, id="both uniform"),
    pytest.param(affine(5, 2, seed=1), affine(3, 1, seed=2), False, id="two axes"),
    pytest.param(IDENTITY, affine(3, 1, seed=2), True, id="identity"),
]


@pytest.mark.parametrize(("inner", "outer", "composes"), PAIRS)
def test_composition(inner: Affine, outer: Affine, composes: bool) -> None:
    total = outer.after(inner)
    assert (total is not None) == composes
    if total is not None:
        torch.testing.assert_close(apply(total, X), apply(outer, apply(inner, X)), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(("first", "second", "adds"), PAIRS)
def test_sum(first: Affine, second: Affine, adds: bool) -> None:
    total = first.plus(second)
    assert (total is not None) == adds
    if total is not None:
        torch.testing.assert_close(apply(total, X), apply(first, X) + apply(second, X), rtol=1e-14, atol=1e-14)


def test_spread_vectors_are_of_one_size_and_of_their_own() -> None:
    found = Affine(torch.tensor([2.0]), torch.zeros(3), 1).spread()
    found.scale[0] = 5.0
    assert found.scale.tolist() == [5.0, 2.0, 2.0]


@pytest.mark.parametrize(
    ("scale", "shift", "dtype", "fits"),
    [
        pytest.param([1.0, -2.0], [0.0, 0.5], torch.float16, True, id="ordinary"),
        pytest.param([1.0, 7e4], [0.0, 0.0], torch.float16, False, id="scale too large"),
        pytest.param([1.0, 1.0], [0.0, 7e4], torch.float16, False, id="shift too large"),
        pytest.param([1e-9, 2e-9], [0.0, 0.0], torch.float16, False, id="scale too small"),
        pytest.param([1.0, 1e-9], [0.0, 1e-9], torch.float16, True, id="one dead channel"),
        pytest.param([0.0, 0.0], [0.0, 0.0], torch.float16, True, id="zero"),
        pytest.param([1.0, 7e4], [7e4, 0.0], torch.bfloat16, True, id="bfloat16 has the range of float32"),
        pytest.param([1e300, 1.0], [0.0, 0.0], torch.float32, False, id="float32 ends too"),
        pytest.param([1.0, 1.0], [0.0, float("-inf")], torch.float64, False, id="a mask"),
        pytest.param([float("nan"), 1.0], [0.0, 0.0], torch.float64, False, id="nan"),
    ],
)
def test_what_a_type_can_hold(scale: list[float], shift: list[float], dtype: torch.dtype, fits: bool) -> None:
    vectors = [torch.tensor(values, dtype=torch.float64) for values in (scale, shift)]
    assert Affine(vectors[0], vectors[1], 0).fits(dtype) == fits


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_the_operator_is_its_formula_in_its_own_type(axis: int, dtype: torch.dtype) -> None:
    found, x = affine(X.shape[axis], axis, seed=3), X.to(dtype)
    scale, shift = (along(vector.to(dtype), axis, 3) for vector in (found.scale, found.shift))
    assert torch.equal(apply(found, x), x * scale + shift)
    assert apply(found, x).dtype == dtype


def test_the_operator_keeps_torchs_rules_for_operators() -> None:
    found = affine(5, 2, seed=1)
    torch.library.opcheck(AFFINE, (X, found.scale, found.shift, 2), test_utils=("test_schema", "test_faketensor"))
    turned = X.transpose(0, 2)
    torch.library.opcheck(AFFINE, (turned, found.scale, found.shift, 0), test_utils=("test_schema", "test_faketensor"))
