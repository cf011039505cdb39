"""Computes what the graph says, linear maps by the faster of the two kernels that PyTorch holds for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor, fx

from normfuse.graph import ops

__all__ = ["linear", "quickly"]

PLAIN: Final[tuple[Any, ...]] = ("none", [], "")
"""The kernel's last arguments: no function behind the sums."""


def quickly(node: fx.Node, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Compute what the graph says; linear maps are rounded otherwise than by ``node.target``."""
    if node.target is ops.LINEAR and not kwargs:
        return linear(*args)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``x weight^T + bias``, [..., out], with first gradients where they are asked for.

    PyTorch gives float32 products on the CPU to MKL, which on processors of other makers leaves half of AVX-512 idle:
    103 against 223 GFLOPS on one Zen 5 core, 197 rows of a DeiT-S. The kernel of oneDNN is the one that its own
    compiler calls; it is in every build for x86, but has no public name, so everything else stays with MKL.
    """
    takes = (tensor.dtype is torch.float32 and tensor.is_cpu for tensor in (x, weight))
    if _kernel() is None or x.numel() == 0 or not all(takes):
        return torch.nn.functional.linear(x, weight, bias)
    found: Tensor = _Linear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return found


class _Linear(torch.autograd.Function):
    """A linear map whose forward run and whose gradient of the inputs are oneDNN's.

    (For the gradient of the weights, with its long sums, oneDNN gains nothing over MKL.)
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _run(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (gradient,), (x, weight) = gradients, ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        rows = gradient.reshape(-1, gradient.shape[-1])
        return (
            _run(gradient.contiguous(), weight.T.contiguous(), None) if wants_x else None,
            rows.T @ x.reshape(-1, x.shape[-1]) if wants_weight else None,
            rows.sum(dim=0) if wants_bias else None,
        )


def _run(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    kernel = _kernel()
    assert kernel is not None
    found: Tensor = kernel(x, weight, bias, *PLAIN)
    return found


@cache
def _kernel() -> Callable[..., Any] | None:
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return None
    try:
        kernel: Callable[..., Any] = torch.ops.mkldnn._linear_pointwise.default
        computes = _computes(kernel)
    except (AttributeError, RuntimeError, TypeError):  # a build without oneDNN, or one whose kernel takes other things
        return None
    return kernel if computes else None


def _computes(kernel: Callable[..., Any]) -> bool:
    """Return whether it is the linear map; it has no public name, so nobody promises that it stays so."""
    given = ([[1.0, -2.0]], [[3.0, 4.0]], [0.5])
    x, weight, bias = (torch.tensor(values, dtype=torch.float32, device="cpu") for values in given)
    found = kernel(x, weight, bias, *PLAIN)
    without = kernel(x, weight, None, *PLAIN)
    return bool(found.tolist() == [[-4.5]] and without.tolist() == [[-5.0]])
