"""How a recipe is refused, and what one for a target cannot have."""

from __future__ import annotations

import math
import re
from dataclasses import fields
from enum import Enum
from typing import TYPE_CHECKING, Final

from normfuse.errors import UsageError
from normfuse.quant.bits import FLOAT, MOST, Bits
from normfuse.quant.budget import Resource
from normfuse.quant.code_kinds import ActivationCodes, WeightCodes
from normfuse.quant.target import EightBits, Target
from normfuse.runtime.shapes import parse_shapes

if TYPE_CHECKING:
    from normfuse.recipe import Recipe

__all__ = ["check", "check_target", "shown"]

OF_BUILDERS: Final = frozenset(
    {
        *("body", "eight_bits", "build", "capability", "shapes", "workspace"),
        *("builder_level", "builder_seconds", "timing_cache", "version_compatible"),
    }
)
"""Fields that only a target with a builder has."""

OF_TENSORRT: Final = (Bits(8, 8), Bits(4, FLOAT))
"""Codes that TensorRT multiplies: both of eight bits, or blocks of four behind floats."""

CAPABILITY: Final = re.compile(r"[1-9][0-9]?\.[0-9]")

FIRST_FLOAT8: Final = (8, 9)
"""The compute capability that products of 8-bit floats came with."""


def check(holds: bool, name: str, value: object, expected: str) -> None:
    """Refuse a field's value unless something holds.

    Raises:
        UsageError: it does not.
    """
    if not holds:
        raise UsageError(f"{name} cannot be {value}", where="recipe", expected=expected)


def shown(value: object) -> object:
    """Return a value as the user writes it."""
    return value.value if isinstance(value, Enum) else value


def check_target(recipe: Recipe) -> None:
    """Refuse what the target has no kernels for, and what is of another target.

    Raises:
        UsageError: the message names the field.
    """
    if recipe.target is Target.ONNX:
        for field in fields(recipe):
            if field.name in OF_BUILDERS:
                value = getattr(recipe, field.name)
                check(value == field.default, field.name, shown(value), "the default without --target trt")
        return
    plain = {
        "integer_only": not recipe.integer_only,
        "activations": recipe.activations is ActivationCodes.STATIC,
        "weights": recipe.weights is WeightCodes.SYMMETRIC,
        "table_bits": recipe.table_bits == MOST,
    }
    for name, holds in plain.items():
        check(holds, name, shown(getattr(recipe, name)), "the default beside --target trt")
    if recipe.is_mixed:
        _check_widths(recipe)
    else:
        is_known = recipe.precision.is_float or recipe.precision in OF_TENSORRT
        known = "8, 4 (w4a16), fp8, fp16, bf16, 32 or mixed beside --target trt"
        check(is_known, "bits", recipe.precision.spelled, known)
    for pattern, bits in recipe.chosen_overrides.patterns:
        is_known = bits.is_float or bits in OF_TENSORRT
        check(is_known, "overrides", f"{pattern}={bits}", "bits of 8, 4 (w4a16) or 32 beside --target trt")
    if recipe.eight_bits is EightBits.FP8:
        check(recipe.effort < 2, "effort", recipe.effort, "0 or 1 beside 8-bit floats: learned codes are integers")
        is_learned = recipe.chosen_levers.reconstruction or recipe.chosen_levers.affine_tuning
        check(not is_learned, "levers", recipe.levers, "none that learn beside 8-bit floats: such codes are integers")
    _check_builder(recipe)


def _check_widths(recipe: Recipe) -> None:
    """Refuse widths that TensorRT has no kernels for, and some that are only there beside others."""
    weights, activations = recipe.widths
    of_weights = set(weights) <= {4, MOST, FLOAT}
    check(of_weights, "weight_widths", recipe.weight_widths, "some of 4, 8 and 16 beside --target trt")
    needed = {FLOAT if width != MOST else MOST for width in weights}
    holds = needed <= set(activations) <= {MOST, FLOAT}
    reason = "8 for weights of 8 bits and 16 for others, beside --target trt"
    check(holds, "activation_widths", recipe.activation_widths or "the default", reason)
    is_told = all(limit.resource is not Resource.LATENCY for limit in recipe.chosen_budget.limits)
    check(is_told, "budget", recipe.budget, "no latency beside --target trt, where nothing runs the engine")


def _check_builder(recipe: Recipe) -> None:
    """Refuse what no builder takes; whether a file is there is for the compile to see."""
    check(0 <= recipe.builder_level <= 5, "builder_level", recipe.builder_level, "0 to 5")
    check(recipe.workspace > 0, "workspace", recipe.workspace, "MiB, a positive number")
    check(0 < recipe.builder_seconds < math.inf, "builder_seconds", recipe.builder_seconds, "seconds, more than 0")
    for name in ("capability", "shapes", "timing_cache"):
        value = getattr(recipe, name)
        check(isinstance(value, str), name, repr(value), "text, as the command line takes it")
    is_capability = not recipe.capability or CAPABILITY.fullmatch(recipe.capability) is not None
    check(is_capability, "capability", repr(recipe.capability), "a compute capability, as 8.9 or 12.0")
    has_float8 = not recipe.capability or tuple(map(int, recipe.capability.split("."))) >= FIRST_FLOAT8
    is_served = recipe.eight_bits is EightBits.INT8 or has_float8
    check(is_served, "capability", recipe.capability, "8.9 or newer beside 8-bit floats, which older GPUs lack")
    if recipe.shapes:
        parse_shapes(recipe.shapes)
