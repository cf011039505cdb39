"""Recipes for mixed bits: what they say, round trips, and refusals that name the field."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from normfuse.errors import UsageError
from normfuse.quant.bits import Bits
from normfuse.quant.budget import Limit, Resource
from normfuse.quant.levers import Effort, Levers
from normfuse.quant.score_method import DEFAULT, ScoreMethod
from normfuse.recipe import POINTS, ActivationCodes, Recipe

BUDGET = "bytes=0.2x"


def mixed(**options: Any) -> Recipe:
    return Recipe().with_options(**{"bits": "mixed", "budget": BUDGET, **options})


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"budget": "latency=2.5ms, avg-bits=4.5 drop=0.5"},
        {"budget": "", "pareto": True, "point": 3},
        {"weight_widths": "2,3,4,8,32", "activation_widths": "4 8 16", "score": "lrp-error"},
        {"overrides": "head=8 blocks.*.fc2=w4a8 patch_embed=32", "refresh": 2, "outputs": "classes"},
    ],
)
def test_a_round_trip_through_toml_keeps_every_field(options: dict[str, Any], tmp_path: Path) -> None:
    recipe = mixed(**options)
    (tmp_path / "recipe.toml").write_text(recipe.to_toml())
    assert Recipe.read(tmp_path / "recipe.toml") == recipe


def test_budgets_are_kept_as_they_are_written_back() -> None:
    recipe = mixed(budget="latency=0.0025s,bytes=3500kB")
    assert recipe.budget == "bytes=3.5MB latency=2.5ms"
    assert recipe.chosen_budget.limits == (Limit(Resource.BYTES, 3.5e6), Limit(Resource.LATENCY, 0.0025))


@pytest.mark.parametrize("bits", ["mixed", "MIXED", " Mixed "])
def test_mixed_is_written_in_any_case(bits: str) -> None:
    recipe = mixed(bits=bits)
    assert (recipe.bits, recipe.label, recipe.is_mixed) == ("mixed", "mixed", True)
    assert not Recipe(bits=8).is_mixed


@pytest.mark.parametrize(
    ("widths", "precision"),
    [
        ({}, Bits(8, 8)),
        ({"weight_widths": "2,4", "activation_widths": "4"}, Bits(8, 8)),
        ({"activation_widths": "16"}, Bits(8, 32)),
        ({"activation_widths": "6,32"}, Bits(8, 8)),
    ],
)
def test_the_widest_codes_are_asked_for_first(widths: dict[str, str], precision: Bits) -> None:
    assert mixed(**widths).precision == precision


def test_widths_are_those_of_the_target_unless_others_are_named() -> None:
    assert mixed().widths == ((4, 8), (8,))
    assert mixed(weight_widths="8, 2 16", activation_widths="8,4,8").widths == ((2, 8, 32), (4, 8))


def test_scores_are_those_that_are_named() -> None:
    assert mixed().chosen_scores == DEFAULT
    assert mixed(score="fisher").chosen_scores == (ScoreMethod.FISHER,)


def test_levers_are_those_of_the_fewest_bits() -> None:
    assert mixed(weight_widths="3,8").chosen_levers == Levers.of(Effort(1), Bits(3, 8))
    assert mixed(weight_widths="3,8", levers="+curvature").chosen_levers.curvature


def test_the_drop_of_a_budget_is_what_may_be_lost() -> None:
    assert mixed(max_drop=1).allowed_drop == 1
    assert mixed(budget="drop=2 bytes=0.2x").allowed_drop == 2
    assert Recipe(max_drop=0.25).allowed_drop == 0.25


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"budget": ""}, "mixed bits need a budget"),
        ({"budget": "bytes"}, "the budget cannot have bytes="),
        ({"budget": "byte=3MB"}, "the budget cannot have 'byte=3MB'"),
        ({"budget": "avg-bits=1"}, "the budget cannot have avg-bits=1"),
        ({"budget": "drop=0.5x"}, "the budget cannot have drop=0.5x"),
        ({"budget": "bytes=1MB bytes=2MB"}, "the budget limits bytes twice"),
        ({"activations": "dynamic"}, "activations cannot be dynamic with mixed bits"),
        ({"score": "hesian"}, "score cannot be 'hesian'"),
        ({"point": 3}, "point cannot be 3"),
        ({"pareto": True, "point": POINTS + 1}, f"point cannot be {POINTS + 1}"),
        ({"pareto": True, "point": -1}, "point cannot be -1"),
        ({"refresh": -1}, "refresh cannot be -1"),
        ({"weight_widths": "32"}, "weight_widths cannot be 32"),
        ({"weight_widths": "4,9"}, "weight_widths cannot be '4,9'"),
        ({"weight_widths": "1,4"}, "weight_widths cannot be '1,4'"),
        ({"weight_widths": "four"}, "weight_widths cannot be 'four'"),
        ({"weight_widths": "²,4"}, "weight_widths cannot be '²,4'"),
        ({"weight_widths": ","}, "weight_widths cannot be ','"),
        ({"activation_widths": "0"}, "activation_widths cannot be '0'"),
        ({"activation_widths": "-8"}, "activation_widths cannot be '-8'"),
        ({"overrides": "head"}, "overrides cannot have 'head'"),
        ({"overrides": "head=99"}, "overrides cannot have 'head=99'"),
        ({"levers": "+speed"}, "levers"),
    ],
)
def test_what_no_compile_can_honour_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        mixed(**options)
    assert said in caught.value.what
    assert (caught.value.where, caught.value.exit_code) == ("recipe", 2)
    assert caught.value.expected


@pytest.mark.parametrize(
    "options",
    [
        {"budget": BUDGET},
        {"weight_widths": "4,8"},
        {"activation_widths": "8"},
        {"refresh": 1},
        {"pareto": True},
        {"point": 1},
        {"score": "kl"},
        {"outputs": "values"},
    ],
)
def test_what_is_of_mixed_bits_is_refused_without_them(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(UsageError, match=f"{name} cannot be") as caught:
        Recipe().with_options(**options)
    assert "unless bits are mixed" in caught.value.expected


def test_close_names_of_scores_and_budgets_are_said() -> None:
    for options, meant in (({"score": "hesian"}, "hessian"), ({"budget": "byte=3MB"}, "bytes=3MB")):
        with pytest.raises(UsageError) as caught:
            mixed(**options)
        assert caught.value.hint == f"did you mean {meant}?"


def test_every_score_that_is_expected_can_be_named() -> None:
    with pytest.raises(UsageError) as caught:
        mixed(score="")
    assert caught.value.expected.split(", ") == ["default", *(method.value for method in ScoreMethod)]
    assert all(mixed(score=name).score == name for name in caught.value.expected.split(", "))


def test_a_front_needs_no_budget_and_may_have_one() -> None:
    assert Recipe(bits="mixed", pareto=True).chosen_budget.limits == ()
    assert mixed(pareto=True, point=POINTS).point == POINTS


def test_overrides_are_of_any_codes_but_not_of_none() -> None:
    assert Recipe(overrides="head=w4a16").chosen_overrides.bits_for("head") == Bits(4, 32)
    with pytest.raises(UsageError, match="overrides cannot be head=8"):
        Recipe(bits=32, overrides="head=8")


def test_overrides_beside_dynamic_activations_are_refused() -> None:
    with pytest.raises(UsageError, match="overrides cannot be head=w4a4") as caught:
        Recipe(activations=ActivationCodes.DYNAMIC, overrides="head=w4a4")
    assert "dynamic" in caught.value.expected
