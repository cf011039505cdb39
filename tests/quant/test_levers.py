"""Levers: what an effort pulls, and how single ones are changed."""

from __future__ import annotations

from dataclasses import fields

import pytest

from normfuse.errors import UsageError
from normfuse.quant.bits import Bits
from normfuse.quant.levers import Effort, Levers


@pytest.mark.parametrize(
    ("effort", "bits", "pulled"),
    [
        (Effort.NEAREST, Bits(4, 4), set()),
        (Effort.CLOSED_FORM, Bits(8, 8), set()),
        (Effort.CLOSED_FORM, Bits(4, 8), {"error_feedback", "bias_correction", "affine_refit"}),
        (Effort.LEARNED, Bits(8, 8), {"error_feedback", "bias_correction", "affine_refit", "reconstruction"}),
    ],
)
def test_an_effort_pulls_its_levers(effort: Effort, bits: Bits, pulled: set[str]) -> None:
    found = Levers.of(effort, bits)
    tried = {"error_feedback", "bias_correction", "affine_refit", "reconstruction"}
    assert {name for name in tried if getattr(found, name)} == pulled
    assert found.affine_tuning is found.foresight is (effort is Effort.LEARNED)


def test_words_change_single_levers() -> None:
    start = Levers.of(Effort.LEARNED, Bits(4, 4))
    found = start.changed("+soft-rounding, -foresight")
    changed = {field.name for field in fields(Levers) if getattr(found, field.name) != getattr(start, field.name)}
    assert changed == {"soft_rounding", "foresight"}
    assert found.soft_rounding
    assert not found.foresight
    assert start.changed(" ") == start


@pytest.mark.parametrize(
    ("text", "needed"),
    [
        ("+soft-rounding", "reconstruction"),
        ("+drop", "reconstruction"),
        ("+coordinate-descent", "error-feedback"),
        ("+curvature", "error-feedback or bias-correction"),
    ],
)
def test_what_does_nothing_is_refused(text: str, needed: str) -> None:
    with pytest.raises(UsageError, match="does nothing here") as caught:
        Levers().changed(text)
    assert needed in str(caught.value)
    pulled = needed.split(" or ", maxsplit=1)[0]
    assert Levers().changed(f"{text} +{pulled}") != Levers()


@pytest.mark.parametrize(
    ("effort", "bits", "text"),
    [
        (Effort.CLOSED_FORM, Bits(8, 8), "-affine-refit"),
        (Effort.NEAREST, Bits(4, 8), "-error-feedback"),
        (Effort.CLOSED_FORM, Bits(4, 8), "-drop"),
        (Effort.LEARNED, Bits(4, 8), "+drop"),
        (Effort.CLOSED_FORM, Bits(4, 8), "-coordinate-descent +error-feedback"),
        (Effort.NEAREST, Bits(4, 8), "-coordinate-descent"),
    ],
)
def test_what_changes_nothing_is_refused(effort: Effort, bits: Bits, text: str) -> None:
    with pytest.raises(UsageError, match="changes nothing"):
        Levers.of(effort, bits).changed(text)


@pytest.mark.parametrize("text", ["foresight", "+forsight", "+", "soft_rounding"])
def test_what_is_no_lever_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="levers cannot have") as caught:
        Levers().changed(text)
    assert "+ or - in front of" in str(caught.value)


def test_a_near_miss_gets_a_suggestion() -> None:
    with pytest.raises(UsageError, match=r"did you mean \+foresight\?"):
        Levers().changed("+forsight")
