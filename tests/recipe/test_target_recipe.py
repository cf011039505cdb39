"""Recipes for a target with a builder: words that stand for types, round trips, and what no builder takes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from normfuse.errors import UsageError
from normfuse.quant.bits import FLOAT, Bits
from normfuse.recipe import BodyType, EightBits, Recipe, Target, Via


def trt(**options: Any) -> Recipe:
    return Recipe().with_options(**{"target": "trt", **options})


def mixed(**options: Any) -> Recipe:
    return trt(**{"bits": "mixed", "budget": "avg-bits=6", **options})


@pytest.mark.parametrize(
    ("bits", "precision", "body", "eight", "label"),
    [
        (8, Bits(8, 8), BodyType.FP16, EightBits.INT8, "int8"),
        ("fp8", Bits(8, 8), BodyType.FP16, EightBits.FP8, "fp8"),
        (" FP8 ", Bits(8, 8), BodyType.FP16, EightBits.FP8, "fp8"),
        (4, Bits(4, FLOAT), BodyType.FP16, EightBits.INT8, "w4a16"),
        ("w4a16", Bits(4, FLOAT), BodyType.FP16, EightBits.INT8, "w4a16"),
        ("fp16", Bits(FLOAT, FLOAT), BodyType.FP16, EightBits.INT8, "fp16"),
        ("bf16", Bits(FLOAT, FLOAT), BodyType.BF16, EightBits.INT8, "bf16"),
        (32, Bits(FLOAT, FLOAT), BodyType.FP32, EightBits.INT8, "float"),
    ],
)
def test_words_stand_for_bits_body_and_codes(
    bits: object, precision: Bits, body: BodyType, eight: EightBits, label: str
) -> None:
    found = trt(bits=bits)
    assert (found.precision, found.chosen_body, found.eight_bits, found.label) == (precision, body, eight, label)
    assert Recipe.from_toml(found.to_toml()) == found


def test_four_bits_are_what_the_target_runs() -> None:
    for bits in (4, "4", 4.0, " 4 ", "04"):
        assert trt(bits=bits).precision == Bits(4, FLOAT), bits
        assert Recipe().with_options(bits=bits).precision == Bits(4, 8), bits
    assert trt(overrides="up=4 blocks.*.fc2=4,head=8").overrides == "up=w4a16 blocks.*.fc2=w4a16,head=8"
    assert trt(overrides="block4=8").overrides == "block4=8"
    assert Recipe(overrides="up=4").chosen_overrides.bits_for("up") == Bits(4, 8)


@pytest.mark.parametrize(
    "options",
    [
        {"bits": "fp8", "body": "bf16"},
        {"bits": 4, "eight_bits": "fp8"},
        {"bits": 32, "body": "bf16", "build": False},
        {"shapes": "image=1x3x8x8,4x3x8x8,8x3x8x8; mask=1x9", "capability": "12.0", "workspace": 64},
        {"builder_level": 0, "builder_seconds": 1.5, "timing_cache": "/gone/since/then", "version_compatible": True},
        {"bits": "mixed", "budget": "avg-bits=6", "weight_widths": "4 16", "activation_widths": "16"},
        {"overrides": "up=4 head=32", "effort": 2},
        {"bits": 32, "via": "torch-tensorrt", "shapes": "x=1x3", "version_compatible": True},
    ],
)
def test_a_round_trip_through_toml_keeps_every_field(options: dict[str, Any], tmp_path: Path) -> None:
    recipe = trt(**options)
    (tmp_path / "recipe.toml").write_text(recipe.to_toml())
    assert Recipe.read(tmp_path / "recipe.toml") == recipe


def test_options_beside_a_recipe_of_the_target() -> None:
    written = Recipe.from_toml(trt(bits="fp8").to_toml())
    assert written.with_options(bits="fp16", effort=0).label == "fp16"
    assert written.with_options(bits=4).label == "w4a16", "what its eight bits would be says nothing of four"
    assert Recipe.from_toml('target = "trt"\nbits = "bf16"').chosen_body is BodyType.BF16
    assert Recipe(target="trt", bits=4).precision == Bits(4, FLOAT)  # type: ignore[arg-type]


def test_the_body_of_onnx_is_float32() -> None:
    assert Recipe().chosen_body is BodyType.FP32
    assert Recipe().target is Target.ONNX


@pytest.mark.parametrize(
    ("bits", "other", "said"),
    [
        ("fp16", {"body": "bf16"}, "body cannot be bf16"),
        ("bf16", {"body": "fp32"}, "body cannot be fp32"),
    ],
)
def test_a_type_said_twice_is_the_same(bits: str, other: dict[str, str], said: str) -> None:
    assert trt(bits="fp16", body="fp16").label == "fp16"
    assert trt(bits="fp8", eight_bits="fp8").label == "fp8"
    with pytest.raises(UsageError) as caught:
        trt(bits=bits, **other)
    assert caught.value.what == said
    assert caught.value.expected == f"{bits} beside --bits {bits}"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"bits": "fp16"}, "bits cannot be fp16"),
        ({"bits": "bf16"}, "bits cannot be bf16"),
        ({"bits": "fp8"}, "bits cannot be fp8"),
        ({"body": "fp16"}, "body cannot be fp16"),
        ({"eight_bits": "fp8"}, "eight_bits cannot be fp8"),
        ({"build": False}, "build cannot be False"),
        ({"bits": 32, "via": "torch-tensorrt"}, "via cannot be torch-tensorrt"),
        ({"capability": "8.9"}, "capability cannot be 8.9"),
        ({"shapes": "x=1x3"}, "shapes cannot be x=1x3"),
        ({"workspace": 64}, "workspace cannot be 64"),
        ({"builder_level": 5}, "builder_level cannot be 5"),
        ({"builder_seconds": 60}, "builder_seconds cannot be 60"),
        ({"timing_cache": "cache"}, "timing_cache cannot be cache"),
        ({"version_compatible": True}, "version_compatible cannot be True"),
    ],
)
def test_what_is_of_builders_is_refused_without_one(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        Recipe().with_options(**options)
    assert caught.value.what.startswith(said)
    assert "--target trt" in caught.value.expected


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"integer_only": True}, "integer_only cannot be True"),
        ({"activations": "dynamic"}, "activations cannot be dynamic"),
        ({"weights": "asymmetric"}, "weights cannot be asymmetric"),
        ({"table_bits": 4}, "table_bits cannot be 4"),
        ({"bits": "w4a4"}, "bits cannot be w4a4"),
        ({"bits": "w4a8"}, "bits cannot be w4a8"),
        ({"bits": "6"}, "bits cannot be w6a8"),
        ({"bits": "w8a16"}, "bits cannot be w8a16"),
        ({"bits": "w2a16"}, "bits cannot be w2a16"),
        ({"bits": "int8"}, "bits cannot be 'int8'"),
        ({"overrides": "head=w4a8"}, "overrides cannot be head=w4a8"),
        ({"overrides": "*=8 head=w8a16"}, "overrides cannot be head=w8a16"),
        ({"bits": "fp8", "effort": 2}, "effort cannot be 2"),
        ({"bits": "mixed", "budget": "avg-bits=6", "eight_bits": "fp8", "effort": 2}, "effort cannot be 2"),
        ({"bits": "fp8", "levers": "+reconstruction"}, "levers cannot be +reconstruction"),
        ({"bits": "fp8", "levers": "+affine-tuning"}, "levers cannot be +affine-tuning"),
        ({"body": "fp8"}, "body cannot be 'fp8'"),
        ({"eight_bits": "e5m2"}, "eight_bits cannot be 'e5m2'"),
        ({"builder_level": 6}, "builder_level cannot be 6"),
        ({"builder_level": -1}, "builder_level cannot be -1"),
        ({"workspace": 0}, "workspace cannot be 0"),
        ({"builder_seconds": 0}, "builder_seconds cannot be 0"),
        ({"builder_seconds": math.inf}, "builder_seconds cannot be inf"),
        ({"builder_seconds": math.nan}, "builder_seconds cannot be nan"),
        ({"capability": "8"}, "capability cannot be '8'"),
        ({"capability": "abc"}, "capability cannot be 'abc'"),
        ({"capability": "8.6", "bits": "fp8"}, "capability cannot be 8.6"),
        ({"capability": "SM89"}, "capability cannot be 'SM89'"),
        ({"capability": "8.9 "}, "capability cannot be '8.9 '"),
        ({"capability": "8.9,9.0"}, "capability cannot be '8.9,9.0'"),
        ({"shapes": "image"}, "'image' gives no input its shapes"),
        ({"shapes": "image=1x3,2x3"}, "image has 2 shapes"),
        ({"shapes": "image=0x3"}, "'0x3' is no shape"),
        ({"shapes": "image=4x3,1x3,8x3"}, "the shapes of image are not in order at axis 0"),
    ],
)
def test_what_no_builder_takes_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        trt(**options)
    assert caught.value.what.startswith(said)
    assert caught.value.expected


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"weight_widths": "2,8"}, "weight_widths cannot be 2,8"),
        ({"weight_widths": "4,6,8"}, "weight_widths cannot be 4,6,8"),
        ({"activation_widths": "4,8,16"}, "activation_widths cannot be 4,8,16"),
        ({"activation_widths": "8"}, "activation_widths cannot be 8"),
        ({"weight_widths": "4,8", "activation_widths": "16"}, "activation_widths cannot be 16"),
        ({"budget": "latency=0.8x"}, "budget cannot be latency=0.8x"),
    ],
)
def test_mixed_widths_without_kernels_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        mixed(**options)
    assert caught.value.what == said
    assert "beside --target trt" in caught.value.expected


@pytest.mark.parametrize(
    ("options", "beside"),
    [
        ({"bits": 8}, "int8"),
        ({"bits": 4}, "w4a16"),
        ({"bits": "fp8"}, "fp8"),
        ({"bits": "fp16"}, "fp16"),
        ({"bits": "bf16"}, "bf16"),
        ({"bits": 32, "body": "fp16"}, "fp16"),
        ({"bits": "mixed", "budget": "avg-bits=6"}, "mixed"),
        ({"bits": 32, "capability": "8.9"}, "capability 8.9"),
        ({"bits": 32, "timing_cache": "cache"}, "a timing cache"),
    ],
)
def test_what_torch_tensorrt_does_not_take_is_refused(options: dict[str, Any], beside: str) -> None:
    with pytest.raises(UsageError) as caught:
        trt(via="torch-tensorrt", **options)
    assert caught.value.what == f"via cannot be torch-tensorrt beside {beside}"
    assert "leave --via out" in caught.value.hint


def test_torch_tensorrt_takes_float32() -> None:
    assert trt(bits=32).via is Via.ONNX
    assert trt(bits=32, via="torch-tensorrt").via is Via.TORCH_TENSORRT
    assert trt(bits=32, body="fp32", via="torch-tensorrt").label == "float"


def test_mixed_widths_are_those_of_the_target() -> None:
    assert mixed().widths == ((4, 8, FLOAT), (8, FLOAT))
    assert mixed(weight_widths="8").widths == ((8,), (8, FLOAT))
    assert mixed(weight_widths="4,16", activation_widths="16").precision == Bits(8, FLOAT)


def test_a_speed_that_this_machine_does_not_show_is_not_asked_for() -> None:
    assert trt(min_speedup=2).wanted_speedup == 0
    assert Recipe(min_speedup=2).wanted_speedup == 2
