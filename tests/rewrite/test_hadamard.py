"""Hadamard matrices are what they claim: entries of one size, orthogonal; other sizes are orthogonal too."""

import pytest
import torch

from normfuse.rewrite.hadamard import hadamard, rotation

KNOWN = [1, 2, 4, 8, 12, 20, 24, 28, 36, 44, 60, 76, 96, 112, 144, 192, 384, 768, 1280]
UNKNOWN = [3, 5, 6, 7, 10, 18, 92]


@pytest.mark.parametrize("size", KNOWN)
def test_every_entry_is_one_size_and_rows_are_orthogonal(size: int) -> None:
    matrix = hadamard(size)
    assert matrix is not None
    assert matrix.shape == (size, size)
    assert matrix.dtype == torch.float64
    signs = matrix * size**0.5
    assert bool((signs.round().abs() == 1).all())
    assert torch.equal(signs.round() @ signs.round().T, size * torch.eye(size, dtype=torch.float64))


@pytest.mark.parametrize("size", UNKNOWN)
def test_none_is_known(size: int) -> None:
    assert hadamard(size) is None


def test_nothing_has_no_matrix() -> None:
    assert hadamard(0) is None


@pytest.mark.parametrize("size", [1, 7, 12, 18, 64])
def test_rotations_are_orthogonal_seeded_and_differ(size: int) -> None:
    matrix = rotation(size, seed=3)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-14)
    assert torch.equal(matrix, rotation(size, seed=3))
    assert size == 1 or not torch.equal(matrix, rotation(size, seed=4))


@pytest.mark.parametrize("size", [12, 64])
def test_one_huge_channel_is_spread_evenly(size: int) -> None:
    x = torch.zeros(size, dtype=torch.float64)
    x[3] = 100.0
    spread = (rotation(size, seed=0) @ x).abs()
    torch.testing.assert_close(spread, torch.full_like(x, 100.0 / size**0.5))
