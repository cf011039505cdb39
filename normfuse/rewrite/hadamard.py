"""Orthogonal matrices that spread one channel over all: Hadamard's where one is known, else a random one."""

from __future__ import annotations

from math import isqrt, sqrt

import torch
from torch import Tensor

__all__ = ["hadamard", "rotation"]


def hadamard(size: int) -> Tensor | None:
    """Return an orthogonal float64 matrix whose entries are all ``+-1 / sqrt(size)``, or None where none is known.

    ``size`` is ``m * 2^k``: Sylvester's doubling of ``m`` = 1 or of a matrix by Paley ("On orthogonal matrices", 1933):
    m = q + 1 for a prime q = 3 mod 4 (12, 20, 24, 44, ...), m = 2 (q + 1) for a prime q = 1 mod 4 (12, 28, 36, ...).
    Powers of primes, and the orders beyond Paley (92), are left out.
    """
    smallest = size // (size & -size) if size > 0 else 0
    orders = [smallest << power for power in range(max(size, 1).bit_length()) if smallest << power <= size]
    found = next((matrix for order in orders if (matrix := _of_order(order)) is not None), None)
    if found is None:
        return None
    while found.shape[0] < size:
        found = torch.cat([torch.cat([found, found], 1), torch.cat([found, -found], 1)])
    return found / sqrt(size)


def rotation(size: int, seed: int) -> Tensor:
    """Return a random orthogonal float64 matrix: a Hadamard matrix behind random signs (QuIP#, 2024; QuaRot, 2024).

    Where no Hadamard matrix is known, an orthogonal matrix drawn evenly: it spreads a channel a little less well.
    """
    generator = torch.Generator().manual_seed(seed)
    matrix = hadamard(size)
    if matrix is not None:
        return matrix * (torch.randint(0, 2, (size,), generator=generator).double() * 2 - 1)
    orthogonal, triangle = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    result: Tensor = orthogonal * triangle.diagonal().sign()  # else the draw is not even (Mezzadri, 2007)
    return result


def _of_order(order: int) -> Tensor | None:
    """Return a matrix of +-1 that is no doubling of a smaller one, or None."""
    if order == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if order % 4 == 0 and (order - 1) % 4 == 3 and _is_prime(order - 1):
        return _bordered(order - 1, -1.0) + torch.eye(order, dtype=torch.float64)
    if order % 4 == 0 and (order // 2 - 1) % 4 == 1 and _is_prime(order // 2 - 1):
        ones = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        diagonal = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        conference = _bordered(order // 2 - 1, 1.0)
        return torch.kron(conference, ones) + torch.kron(torch.eye(order // 2, dtype=torch.float64), diagonal)
    return None


def _bordered(prime: int, left: float) -> Tensor:
    """Return the quadratic characters of all differences mod ``prime``, with a border of ones (``left`` down)."""
    positions = torch.arange(prime)
    squares = set((positions[1:] ** 2 % prime).tolist())
    character = torch.tensor([0.0 if i == 0 else 1.0 if i in squares else -1.0 for i in range(prime)])
    matrix = torch.zeros(prime + 1, prime + 1, dtype=torch.float64)
    matrix[0, 1:], matrix[1:, 0] = 1.0, left
    matrix[1:, 1:] = character.double()[(positions[:, None] - positions) % prime]
    return matrix


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, isqrt(number) + 1))
