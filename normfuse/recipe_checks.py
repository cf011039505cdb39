"""Which recipes are refused, and how: values out of range, and what does not go together."""

from __future__ import annotations

import math
import re
from dataclasses import fields
from enum import Enum
from typing import TYPE_CHECKING, Final

from normfuse.errors import UsageError
from normfuse.quant.bits import FLOAT, MOST, MOST_GROUPED, Bits
from normfuse.quant.budget import Resource
from normfuse.quant.code_kinds import ActivationCodes, WeightCodes
from normfuse.quant.integer_forms import NormForm
from normfuse.quant.output_kind import OutputKind
from normfuse.quant.score_method import DEFAULT_SCORE
from normfuse.quant.target import BodyType, EightBits, Target, Via
from normfuse.runtime.shapes import parse_shapes

if TYPE_CHECKING:
    from normfuse.recipe import Recipe

__all__ = ["POINTS", "check", "check_recipe", "shown"]

POINTS: Final = 8
"""Points of a front at most."""

BUDGETS: Final = "--budget bytes=0.14x, avg-bits=4.5, bops=0.1x, activation-bytes=0.5x, latency=0.8x or drop=0.5"

OF_BUILDERS: Final = frozenset(
    {
        *("body", "eight_bits", "build", "via", "capability", "shapes", "workspace"),
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


def check_recipe(recipe: Recipe) -> None:
    """Refuse values that no compile can honour, and what does not go together.

    Raises:
        UsageError: the message names the field.
    """
    _check_target(recipe)
    _check_mixed(recipe)
    _check_codes(recipe)
    _check_integers(recipe)
    check(recipe.table_bits in (8, 4), "table_bits", recipe.table_bits, "8 or 4")
    check(
        recipe.table_bits == MOST or not recipe.precision.is_float,
        "table_bits",
        recipe.table_bits,
        "8 (the default) beside --bits 32, which keeps tables in float",
    )
    check(recipe.effort in (0, 1, 2), "effort", recipe.effort, "0 (seconds), 1 (minutes) or 2 (tens of minutes)")
    recipe.chosen_levers  # noqa: B018 - refuses words that are none
    check(recipe.samples >= 0, "samples", recipe.samples, "0 (all) or a positive number")
    check(recipe.threads >= 0, "threads", recipe.threads, "0 (automatic) or a positive number")
    check(recipe.batch > 0, "batch", recipe.batch, "a positive number")
    # TOML and JSON files with an infinity could not be read again.
    check(0 <= recipe.max_drop < math.inf, "max_drop", recipe.max_drop, "accuracy points, 0 or more (100 allows any)")
    check(0 <= recipe.min_speedup < math.inf, "min_speedup", recipe.min_speedup, "a ratio, 0 or more")


def _check_mixed(recipe: Recipe) -> None:
    """Refuse mixed bits without a budget, and what is of mixed bits without them."""
    if recipe.is_mixed:
        recipe.widths  # noqa: B018 - refuses what is none
        if not (recipe.budget or recipe.pareto):
            raise UsageError(
                "mixed bits need a budget", where="recipe", expected="how much they may take", hint=BUDGETS
            )
        if recipe.activations is ActivationCodes.DYNAMIC:
            raise UsageError(
                "activations cannot be dynamic with mixed bits",
                where="recipe",
                expected="static activations",
                hint="--activations static, or one width, as --bits w4a8",
            )
        check(recipe.refresh >= 0, "refresh", recipe.refresh, "rounds, 0 or more")
        check(0 <= recipe.point <= POINTS, "point", recipe.point, f"1 to {POINTS}, or 0 for the smallest that is kept")
        check(recipe.pareto or not recipe.point, "point", recipe.point, "0 unless the front is asked for (--pareto)")
        return
    for name in ("budget", "weight_widths", "activation_widths", "refresh", "pareto", "point"):
        check(not getattr(recipe, name), name, getattr(recipe, name), "empty unless bits are mixed")
    check(recipe.outputs is OutputKind.AUTO, "outputs", recipe.outputs.value, "auto unless bits are mixed")
    check(recipe.score == DEFAULT_SCORE, "score", recipe.score, f"{DEFAULT_SCORE} unless bits are mixed")
    is_dynamic = recipe.activations is ActivationCodes.DYNAMIC
    none = "empty beside 32 bits and beside dynamic activations"
    check(not recipe.overrides or not (is_dynamic or recipe.precision.is_float), "overrides", recipe.overrides, none)


def _check_codes(recipe: Recipe) -> None:
    """Refuse kinds of codes that onnxruntime does not run; what of them TensorRT does not, ``check_target`` has."""
    bits = recipe.precision
    if recipe.activations is ActivationCodes.DYNAMIC and bits.activation != MOST:
        raise UsageError(
            f"activations cannot be dynamic with {recipe.bits} bits",
            where="recipe",
            expected="activations of 8 bits: its kernel for them makes no others",
            hint=f"--bits w{min(bits.weight, MOST)}a8, or --activations static",
        )
    is_grouped = recipe.activations is ActivationCodes.DYNAMIC or bits.weight <= MOST_GROUPED
    if recipe.weights is WeightCodes.ASYMMETRIC and (bits.is_float or (bits.is_weight_only and not is_grouped)):
        raise UsageError(
            f"weights cannot be asymmetric with {recipe.bits} bits",
            where="recipe",
            expected="weights of 4 bits or fewer behind float activations, or activations of 8 bits or fewer",
            hint="--weights symmetric",
        )


def _check_integers(recipe: Recipe) -> None:
    """Refuse beside integers what they do not have, and without them what only they have."""
    if not recipe.integer_only:
        check(not recipe.allow_float_islands, "allow_float_islands", True, "false without integer_only")
        for field in [each for each in fields(recipe) if each.name in ("norm", "softmax", "gelu")]:
            form, usual = getattr(recipe, field.name), f"{field.default.value} (the default) without integer_only"
            check(form is field.default, field.name, form.value, usual)
        return
    is_by_tensor = recipe.norm is NormForm.PER_TENSOR or not recipe.allow_float_islands
    check(is_by_tensor, "norm", recipe.norm.value, "per-tensor (the default) beside allow_float_islands")
    plain = {
        "bits": recipe.precision.weight <= MOST and recipe.precision.activation == MOST and not recipe.is_mixed,
        "activations": recipe.activations is ActivationCodes.STATIC,
        "weights": recipe.weights is WeightCodes.SYMMETRIC,
        "overrides": not recipe.overrides,
        "table_bits": recipe.table_bits == MOST,
        "rotate": not recipe.rotate,
        "equalize": not recipe.equalize,
    }
    wanted = {"bits": "8, or w2a8 to w7a8", "activations": "static", "weights": "symmetric", "table_bits": "8"}
    for name, holds in plain.items():
        check(holds, name, shown(getattr(recipe, name)), f"{wanted.get(name, 'the default')} beside integer_only")


def _check_target(recipe: Recipe) -> None:
    """Refuse what the target has no kernels for, and what is of another target."""
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
    if recipe.via is Via.TORCH_TENSORRT:
        _check_torch_tensorrt(recipe)


def _check_torch_tensorrt(recipe: Recipe) -> None:
    """Refuse what torch-tensorrt takes from no program (codes without NVIDIA's modelopt, other floats), and files."""
    is_plain = not recipe.is_mixed and recipe.precision.is_float and recipe.chosen_body is BodyType.FP32
    reason = "32 bits: it knows no codes without NVIDIA's modelopt, and narrows no floats of a whole program"
    for holds, beside, expected in (
        (is_plain, recipe.label, reason),
        (not recipe.capability, f"capability {recipe.capability}", "the GPU at hand: TensorRT takes no capability"),
        (not recipe.timing_cache, "a timing cache", "none: it replaces a file that is none"),
    ):
        if not holds:
            raise UsageError(
                f"via cannot be {recipe.via.value} beside {beside}",
                where="recipe",
                expected=expected,
                hint="leave --via out: the engine is then built from the ONNX file",
            )
