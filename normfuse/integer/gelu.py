"""GELU as its values, or by shifts; which of them, a node carries as a note."""

from __future__ import annotations

import math
from typing import Final, assert_never

import torch
from torch import Tensor, fx

from normfuse.graph import metadata
from normfuse.integer.elementwise import table
from normfuse.integer.lowering import Lowering, largest_code
from normfuse.integer.octaves import octaves
from normfuse.integer.roles import viewed
from normfuse.integer.written import Coded, Written
from normfuse.kernels.integer_ops import LAMBDA_SHIFT_GELU, SHIFT_GELU
from normfuse.kernels.reference.shift_exponential import FRACTION, GATE, PUBLISHED_GATE
from normfuse.quant.dyadic import WIDE, dyadic, require_below
from normfuse.quant.integer_forms import GeluForm

__all__ = ["best_bound", "gelu", "request_form"]

FORM: Final = "gelu_form"

STEEPNESS: Final = 1.702
"""Of the sigmoid that stands for GELU, as published."""

PUBLISHED_OCTAVES: Final = 23
"""n, as published."""

LARGEST_UNIT: Final = 1 << 29
"""What |x0| of ours has to stay below."""

LAST: Final = 127
"""The largest of symmetric codes."""


def request_form(node: fx.Node, form: GeluForm) -> None:
    """Ask that a GELU is written in this form; without it is a table."""
    metadata.note(node, FORM, form)


def gelu(lowering: Lowering, node: fx.Node, written: Written) -> fx.Node:
    """Write GELU in the form that was asked for.

    Raises:
        UnsupportedModel: its input is so small that the exponential of that form would overflow, or a constant.
    """
    form = metadata.noted(node, FORM) or GeluForm.TABLE
    assert isinstance(form, GeluForm)
    match form:
        case GeluForm.TABLE:
            return table(lowering, node, written)
        case GeluForm.SHIFT:
            return _shift_gelu(lowering, node, written)
        case GeluForm.LAMBDA_SHIFT:
            return _lambda_shift_gelu(lowering, node, written)
        case _:
            assert_never(form)


def _shift_gelu(lowering: Lowering, node: fx.Node, written: Written) -> fx.Node:
    """Write the published form: a row is the last axis."""
    x = _symmetric(lowering, node)
    x0 = math.floor(-1 / (STEEPNESS * x.scale))
    # One exponential has to be below 2^31: the sum of two is cut as published, which leaves a gate below 1.
    n = octaves(x0, 1, published=PUBLISHED_OCTAVES, where=lowering.layer(node))
    multiplier, shift = _ratio(lowering, node, x, written, PUBLISHED_GATE)
    arguments = (x0, n, multiplier, shift, *written.ends())
    return lowering.edit.call(SHIFT_GELU, x.node, *arguments, at=node, after=True, name=f"{node.name}_codes")


def _lambda_shift_gelu(lowering: Lowering, node: fx.Node, written: Written) -> fx.Node:
    """Write our form, with the bound that is best for this layer."""
    x = _symmetric(lowering, node)
    x0 = min(-1, -round((1 << FRACTION) / (STEEPNESS * x.scale)))
    require_below(-x0, LARGEST_UNIT, what="the octave of lambda-shift-gelu", where=lowering.layer(node))
    multiplier, shift = _ratio(lowering, node, x, written, GATE)
    codes = torch.arange(-LAST, LAST + 1)

    def values(bound: int) -> Tensor:
        made = LAMBDA_SHIFT_GELU(codes.to(torch.int8), x0, bound, multiplier, shift, *written.ends())
        return (made.double() - written.zero_point) * written.scale  # type: ignore[no-any-return]

    exact = node.target(codes.double() * x.scale, *node.args[1:], **node.kwargs)  # type: ignore[operator]
    bound = best_bound((values(LAST) - exact).square(), (values(0) - exact).square())
    arguments = (x0, bound, multiplier, shift, *written.ends())
    return lowering.edit.call(LAMBDA_SHIFT_GELU, x.node, *arguments, at=node, after=True, name=f"{node.name}_codes")


def best_bound(inside: Tensor, outside: Tensor) -> int:
    """Return the bound for which the errors of all codes have the smallest sum (ours).

    Every code counts the same: the calibrated range has decided already which values are met.

    Args:
        inside: float64 [2 last + 1], squared errors of the codes -last ... last where they are gated.
        outside: the same where they are beyond the bound, and become themselves or 0.
    """
    last = len(inside) // 2
    kept, cut = (each[last:] + each.flip(0)[last:] for each in (inside, outside))  # by magnitude
    return int((kept.cumsum(0) + cut.sum() - cut.cumsum(0)).argmin())


def _symmetric(lowering: Lowering, node: fx.Node) -> Coded:
    found = lowering.operand(viewed(node))
    assert found.zero_point == 0, "place-integers asks for symmetric codes in front of a form by shifts"
    return found


def _ratio(lowering: Lowering, node: fx.Node, x: Coded, written: Written, fraction: int) -> tuple[int, int]:
    """Return multiplier and shift to the result's codes, from codes times gates with so many bits behind the point."""
    ratio = torch.tensor(x.scale * 2.0**-fraction / written.scale, dtype=torch.float64)
    multiplier, shift = dyadic(ratio)
    largest = largest_code(x.node) * float(int(multiplier) << fraction)
    require_below(largest, WIDE, what="a gated code before it is rescaled", where=lowering.layer(node))
    return int(multiplier), shift
