"""The user's choices as frozen values; every option of ``normfuse compile`` is a field here."""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from dataclasses import dataclass, fields, replace
from enum import Enum
from pathlib import Path
from typing import Any, Final, Self

from normfuse.errors import UsageError
from normfuse.quant.bits import FLOAT, MOST, Bits
from normfuse.quant.budget import Budget, Resource
from normfuse.quant.calibration_method import CalibrationMethod
from normfuse.quant.code_kinds import ActivationCodes, WeightCodes
from normfuse.quant.integer_forms import GeluForm, NormForm, SoftmaxForm
from normfuse.quant.levers import Effort, Levers
from normfuse.quant.output_kind import OutputKind
from normfuse.quant.overrides import Overrides
from normfuse.quant.score_method import DEFAULT_SCORE, ScoreMethod, scores_called
from normfuse.quant.target import BodyType, EightBits, Target, Via
from normfuse.quant.widths import parse_widths
from normfuse.recipe_checks import POINTS, check, check_recipe, shown

__all__ = [
    "MIXED",
    "POINTS",
    "ActivationCodes",
    "BodyType",
    "CalibrationMethod",
    "EightBits",
    "Recipe",
    "Target",
    "Via",
    "WeightCodes",
]

MIXED: Final = "mixed"

TYPES: Final = {"fp16": ("32", "body"), "bf16": ("32", "body"), "fp8": ("8", "eight_bits")}
"""Types that stand for bits, and the field that has them."""

FEW_OF_TENSORRT: Final = str(Bits(4, FLOAT))
"""What four bits are where TensorRT runs them."""

FOUR: Final = re.compile(r"=0*4(?=[\s,]|$)")


WEIGHT_WIDTHS: Final = {Target.ONNX: "4,8", Target.TRT: "4,8,16"}
ACTIVATION_WIDTHS: Final = {Target.ONNX: "8", Target.TRT: "8,16"}
"""What each target gains from: fewer bits make no smaller file or no faster engine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What to build and how.

    ``bits`` 8 is W8A8, 4 has weights of 4 bits, ``w4a4`` also activations, 32 keeps float (folds only); see
    ``precision``. ``mixed`` gives every layer its own, within ``budget`` (see ``Budget``), among ``weight_widths``
    and ``activation_widths`` (empty: those that the target gains from), by ``score`` (see ``ScoreMethod``;
    ``default``: the best of several), by what ``outputs`` are (see ``OutputKind``). ``refresh`` scores again that
    often on the quantized network, and takes what it bears better. ``pareto`` builds and measures the whole front
    of average bits, of which ``point`` ships (1: the smallest; 0: the smallest whose drop is kept). ``overrides``
    gives layers bits by name (see ``Overrides``), whatever ``bits`` says. ``activations`` says whether the scales
    of their codes are known from calibration (``static``) or found for every row while the engine runs
    (``dynamic``), ``weights`` whether zero points of weights are 0 (``symmetric``) or chosen per channel or group
    (``asymmetric``). ``table_bits`` 8 or 4 is the width of embedding and position tables. ``effort`` 0 rounds to
    nearest, 1 feeds errors back and corrects outputs below eight bits, 2 also learns block by block; ``levers``
    pulls or lets go single parts of that (see ``Levers``). ``rotate`` turns residual streams and heads, exactly, if
    the quantized network errs less for it (see ``RotateStream``). ``equalize`` scales channels, exactly, where that
    makes quantized blocks better (see ``EqualizeChannels``). ``integer_only`` computes everything between the
    quantized inputs and the outputs in integers (see ``LowerToIntegers``); ``allow_float_islands`` leaves in float
    what has no integer form, ``norm``, ``softmax`` and ``gelu`` say in which form these are (see ``NormForm``,
    ``SoftmaxForm`` and ``GeluForm``). For ``target`` TensorRT, ``body`` is what computes where nothing is quantized
    (float16 unless said otherwise), ``eight_bits`` whether eight bits are integers or floats; ``bits`` ``fp16``,
    ``bf16`` and ``fp8`` are short for these. ``build`` builds an engine, if a builder is installed, ``via`` the ONNX
    file or torch-tensorrt (32 bits alone), for the ``capability`` (as ``8.9``; empty: the GPU at hand, of TensorRT-RTX
    any from Ampere on) and the ``shapes`` of inputs (``name=min,usual,max``), with ``workspace`` MiB at most,
    ``builder_level`` of effort (0 to 5), given up after ``builder_seconds``; ``timing_cache`` is a file that it goes on
    from, ``version_compatible`` engines run in later releases.
    ``samples`` limits the calibration samples (0: all). ``threads`` 0 takes the visible cores, two at most.
    ``max_drop`` is the largest drop of the score (top-1 accuracy, or mean IoU where pixels are labelled), in points,
    that still counts as kept (a drop in the budget takes its place); ``min_speedup`` the smallest speed-up over float,
    which is not asked of integers.
    """

    target: Target = Target.ONNX
    bits: int | str = 8
    body: BodyType = BodyType.AUTO
    eight_bits: EightBits = EightBits.INT8
    build: bool = True
    via: Via = Via.ONNX
    capability: str = ""
    shapes: str = ""
    workspace: int = 4096
    builder_level: int = 3
    builder_seconds: float = 3600.0
    timing_cache: str = ""
    version_compatible: bool = False
    budget: str = ""
    score: str = DEFAULT_SCORE
    outputs: OutputKind = OutputKind.AUTO
    overrides: str = ""
    weight_widths: str = ""
    activation_widths: str = ""
    refresh: int = 0
    pareto: bool = False
    point: int = 0
    activations: ActivationCodes = ActivationCodes.STATIC
    weights: WeightCodes = WeightCodes.SYMMETRIC
    table_bits: int = 8
    effort: int = 1
    levers: str = ""
    rotate: bool = False
    equalize: bool = False
    integer_only: bool = False
    allow_float_islands: bool = False
    norm: NormForm = NormForm.PER_TENSOR
    softmax: SoftmaxForm = SoftmaxForm.TABLE
    gelu: GeluForm = GeluForm.TABLE
    calibration: CalibrationMethod = CalibrationMethod.AUTO
    samples: int = 0
    seed: int = 0
    threads: int = 0
    batch: int = 1
    max_drop: float = 0.5
    min_speedup: float = 1.0
    benchmark: bool = True

    def __post_init__(self) -> None:
        """Refuse values that no compile can honour.

        Raises:
            UsageError: a field is out of range; the message names it.
        """
        self._spell_out_bits()
        for field in fields(self):
            if isinstance(field.default, Enum):  # words do as well
                chosen = _parse(type(field.default), field.name, getattr(self, field.name))
                object.__setattr__(self, field.name, chosen)
        for name in ("budget", "score", "overrides", "weight_widths", "activation_widths", "levers"):
            value = getattr(self, name)
            check(isinstance(value, str), name, repr(value), "text, as the command line takes it")
        object.__setattr__(self, "budget", str(Budget.parse(self.budget)))
        for refuses_what_is_none in ("chosen_overrides", "chosen_scores"):
            getattr(self, refuses_what_is_none)
        check_recipe(self)

    def _spell_out_bits(self) -> None:
        """Let ``bits`` be widths, where they name a type or what the target makes of four bits."""
        word = str(self.bits).strip().lower()
        bits, name = TYPES.get(word, (self.bits, ""))
        if name:
            is_known = self.target in (Target.TRT, Target.TRT.value)
            check(is_known, "bits", word, "8, 4, w4a4, mixed, 32 ...: this type is one of --target trt")
            given, usual = shown(getattr(self, name)), {"body": BodyType.AUTO, "eight_bits": EightBits.INT8}[name]
            check(given in (word, usual.value), name, given, f"{word} beside --bits {word}")
            object.__setattr__(self, name, word)
        written = _written_bits(bits)
        if self.target in (Target.TRT, Target.TRT.value):
            is_plain = written == str(Bits(4, MOST)) and not word.startswith("w")
            written = FEW_OF_TENSORRT if is_plain else written
            if isinstance(self.overrides, str):
                object.__setattr__(self, "overrides", FOUR.sub(f"={FEW_OF_TENSORRT}", self.overrides))
        object.__setattr__(self, "bits", written)

    @property
    def wanted_speedup(self) -> float:
        """``min_speedup``, or none where the engine is for other machines than the one that measures."""
        return 0.0 if self.integer_only or self.target is Target.TRT else self.min_speedup

    @property
    def measures_speed(self) -> bool:
        """``benchmark``, where the machine that measures is the one that runs the engine."""
        return self.benchmark and self.target is Target.ONNX

    @property
    def is_mixed(self) -> bool:
        """Whether every layer gets its own bits."""
        return self.bits == MIXED

    @property
    def label(self) -> str:
        """How reports call the engine."""
        if self.integer_only:
            return "integers"
        if self.is_mixed:
            return MIXED
        if self.precision.is_float:
            return "float" if self.chosen_body is BodyType.FP32 else self.chosen_body.value
        is_fp8 = self.eight_bits is EightBits.FP8 and self.precision.activation == MOST
        return "fp8" if is_fp8 else self.precision.label

    @property
    def chosen_body(self) -> BodyType:
        """What computes where nothing is quantized."""
        if self.body is not BodyType.AUTO:
            return self.body
        return BodyType.FP32 if self.target is Target.ONNX or str(self.bits) == str(FLOAT) else BodyType.FP16

    @property
    def precision(self) -> Bits:
        """``bits`` as numbers; of mixed ones the widest codes, which are asked for before any are narrowed."""
        if not self.is_mixed:
            return Bits.parse(self.bits)
        return Bits(MOST, MOST if min(self.widths[1]) <= MOST else FLOAT)

    @property
    def widths(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The widths that weights and activations may have where bits are mixed, fewest first."""
        weights = parse_widths(self.weight_widths or WEIGHT_WIDTHS[self.target], name="weight_widths")
        activations = parse_widths(self.activation_widths or ACTIVATION_WIDTHS[self.target], name="activation_widths")
        check(weights != (FLOAT,), "weight_widths", self.weight_widths, "a width of codes among them")
        return weights, activations

    @property
    def chosen_budget(self) -> Budget:
        """``budget`` as limits."""
        return Budget.parse(self.budget)

    @property
    def allowed_drop(self) -> float:
        """``max_drop``, or the budget's drop: what it allows is not too much."""
        drops = (limit.amount for limit in self.chosen_budget.limits if limit.resource is Resource.DROP)
        return next(drops, self.max_drop)

    @property
    def chosen_scores(self) -> tuple[ScoreMethod, ...]:
        """The scores of ``score``."""
        return scores_called(self.score)

    @property
    def chosen_overrides(self) -> Overrides:
        """``overrides`` as patterns with bits."""
        return Overrides.parse(self.overrides)

    @property
    def chosen_levers(self) -> Levers:
        """The levers of ``effort``, changed as ``levers`` says."""
        given = [self.precision, *(bits for _, bits in self.chosen_overrides.patterns)]
        weights, activations = [each.weight for each in given], [each.activation for each in given]
        if self.is_mixed:
            weights, activations = [*weights, *self.widths[0]], [*activations, *self.widths[1]]
        return Levers.of(Effort(self.effort), Bits(min(weights), min(activations))).changed(self.levers)

    def with_options(self, **options: Any) -> Self:
        """Return the recipe with those options changed that are not None (as text, number or enum)."""
        known = {field.name for field in fields(self)}
        given = {name: value for name, value in options.items() if value is not None}
        for name in given.keys() - known:
            close = difflib.get_close_matches(name, known, n=1)
            raise UsageError(
                f"unknown option {name}",
                where="recipe",
                expected=", ".join(sorted(known)),
                hint=f"did you mean {close[0]}?" if close else "",
            )
        if "bits" in given:  # they say anew what is computed, and in which type
            given = {"body": BodyType.AUTO, "eight_bits": EightBits.INT8, **given}
        return replace(self, **{name: _parse(type(getattr(self, name)), name, value) for name, value in given.items()})

    def to_toml(self) -> str:
        """Return the recipe as TOML that ``from_toml`` reads back."""
        lines = []
        for field in fields(self):
            value = getattr(self, field.name)
            lines.append(f"{field.name} = {json.dumps(value.value if isinstance(value, Enum) else value)}")
        return "\n".join(lines) + "\n"

    @classmethod
    def from_toml(cls, text: str, *, where: str = "recipe") -> Self:
        """Return the recipe that TOML text describes; fields left out keep their defaults.

        Raises:
            UsageError: the text is no TOML, names an unknown field or holds a wrong value.
        """
        try:
            table = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise UsageError(f"the recipe is no TOML: {error}", where=where) from error
        return cls().with_options(**table)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Return the recipe in a file.

        Raises:
            UsageError: the file cannot be read or holds no recipe.
        """
        try:
            return cls.from_toml(path.read_text(encoding="utf-8"), where=str(path))
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UsageError(
                f"the recipe cannot be read: {reason}",
                where=str(path),
                expected="a TOML file (recipe.toml of an artifact is one)",
                hint="check the path",
            ) from error


def _parse(kind: type[Any], name: str, value: Any) -> Any:
    """Return the value as the field's type; nothing is rounded, and no truth value is a number."""
    if name == "bits":
        return value  # what 4 stands for is the target's to say
    expected = ", ".join(member.value for member in kind) if issubclass(kind, Enum) else kind.__name__
    if isinstance(value, bool) is not (kind is bool):
        raise UsageError(f"{name} cannot be {value!r}", where="recipe", expected=expected)
    try:
        parsed = kind(value)
        if isinstance(value, (int, float)) and parsed != value:
            raise ValueError(value)
    except (ValueError, TypeError, OverflowError) as error:
        raise UsageError(f"{name} cannot be {value!r}", where="recipe", expected=expected) from error
    return parsed


def _written_bits(value: object) -> str:
    return MIXED if str(value).strip().lower() == MIXED else str(Bits.parse(value))
