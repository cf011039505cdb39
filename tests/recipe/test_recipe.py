"""The recipe: round trip, checks and messages."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from normfuse.errors import UsageError
from normfuse.quant.integer_forms import GeluForm, NormForm, SoftmaxForm
from normfuse.recipe import ActivationCodes, CalibrationMethod, Recipe, WeightCodes


def test_toml_round_trip_keeps_every_field() -> None:
    recipe = Recipe(bits=32, calibration=CalibrationMethod.ENTROPY, samples=7, max_drop=0.25, benchmark=False)
    assert Recipe.from_toml(recipe.to_toml()) == recipe


def test_options_left_out_keep_the_recipe() -> None:
    assert Recipe(seed=5).with_options(bits=None, calibration="mse") == Recipe(
        seed=5, calibration=CalibrationMethod.MSE
    )


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"bits": 9}, "bits"),
        ({"bits": True}, "bits"),
        ({"samples": -1}, "samples"),
        ({"calibration": "best"}, "calibration"),
        ({"target": "tpu"}, "target"),
        ({"benchmark": "yes"}, "benchmark"),
        ({"max_drop": -0.1}, "max_drop"),
        ({"max_drop": math.inf}, "max_drop"),
        ({"max_drop": math.nan}, "max_drop"),
        ({"min_speedup": math.inf}, "min_speedup"),
        ({"bits": 8.9}, "bits"),
        ({"bits": math.inf}, "bits"),
        ({"samples": True}, "samples"),
        ({"max_drop": True}, "max_drop"),
        ({"benchmark": 1}, "benchmark"),
    ],
)
def test_wrong_values_are_named(options: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        Recipe().with_options(**options)


def test_conversions_that_lose_nothing_are_made() -> None:
    found = Recipe().with_options(bits=32.0, max_drop=1, samples="7")
    assert (found.bits, found.max_drop, found.samples) == ("32", 1.0, 7)
    assert isinstance(found.max_drop, float)


def test_unknown_option_gets_a_suggestion() -> None:
    with pytest.raises(UsageError) as caught:
        Recipe().with_options(bitz=8)
    assert "did you mean bits?" in str(caught.value)


def test_unreadable_recipe_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read: No such file or directory") as caught:
        Recipe.read(tmp_path / "missing.toml")
    assert caught.value.hint == "check the path"
    (tmp_path / "broken.toml").write_text("bits = = 8")
    with pytest.raises(UsageError, match="no TOML"):
        Recipe.read(tmp_path / "broken.toml")


@pytest.mark.parametrize("bits", ["4", "w2a8", "8"])
@pytest.mark.parametrize("weights", ["symmetric", "asymmetric"])
def test_dynamic_activations_have_eight_bits(bits: str, weights: str) -> None:
    recipe = Recipe().with_options(bits=bits, activations="dynamic", weights=weights)
    assert (recipe.activations, recipe.weights.value) == (ActivationCodes.DYNAMIC, weights)
    assert Recipe.from_toml(recipe.to_toml()) == recipe


@pytest.mark.parametrize("bits", ["w4a4", "w4a6", "w4a16", "w8a16", "32"])
def test_other_dynamic_activations_are_refused(bits: str) -> None:
    with pytest.raises(UsageError, match="activations cannot be dynamic") as caught:
        Recipe(bits=bits, activations=ActivationCodes.DYNAMIC)
    assert "8 bits" in str(caught.value)


@pytest.mark.parametrize("bits", ["w5a16", "w8a16", "32"])
def test_zero_points_without_a_kernel_are_refused(bits: str) -> None:
    with pytest.raises(UsageError, match="weights cannot be asymmetric"):
        Recipe(bits=bits, weights=WeightCodes.ASYMMETRIC)


@pytest.mark.parametrize("bits", ["w4a16", "w2a16", "8", "w4a4"])
def test_zero_points_that_run_are_taken(bits: str) -> None:
    assert Recipe(bits=bits).with_options(weights="asymmetric").weights is WeightCodes.ASYMMETRIC


def test_tables_have_eight_bits_or_four() -> None:
    recipe = Recipe().with_options(table_bits="4")
    assert recipe.table_bits == 4
    assert Recipe.from_toml(recipe.to_toml()) == recipe
    for wrong in ({"table_bits": 6}, {"table_bits": 4, "bits": "32"}):
        with pytest.raises(UsageError, match="table_bits cannot be"):
            Recipe().with_options(**wrong)


def test_words_do_as_well_as_what_they_stand_for() -> None:
    chosen = Recipe(integer_only=True, norm="per-token", softmax="shiftmax", gelu="shift-gelu", calibration="mse")  # type: ignore[arg-type]
    assert (chosen.norm, chosen.softmax, chosen.gelu) == (NormForm.PER_TOKEN, SoftmaxForm.SHIFTMAX, GeluForm.SHIFT)
    assert chosen.calibration is CalibrationMethod.MSE
    with pytest.raises(UsageError) as refusal:
        Recipe(softmax="soft")  # type: ignore[arg-type]
    assert refusal.value.what == "softmax cannot be 'soft'"
    assert refusal.value.expected == "table, shiftmax"
