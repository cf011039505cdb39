"""Shapes as the command line writes them, and those that a model's free batch gets."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from normfuse.errors import UsageError
from normfuse.runtime.shapes import Shapes, default_shapes, parse_shapes


@dataclass(frozen=True)
class Port:
    name: str
    shape: tuple[int | str | None, ...]


IMAGE = Port("image", (None, 3, 8, 7))
TOKENS = Port("tokens", ("batch", "length"))
SCALE = Port("scale", (1, 5))
TOKEN_SHAPES: Shapes = ((1, 2), (3, 4), (5, 6))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x=1x3,4x3,8x3", {"x": ((1, 3), (4, 3), (8, 3))}),
        ("x=4x3", {"x": ((4, 3), (4, 3), (4, 3))}),
        (" x = 1x3, 4x3, 8x3 ; y=7", {"x": ((1, 3), (4, 3), (8, 3)), "y": ((7,), (7,), (7,))}),
        ("a=b:0=2", {"a=b:0": ((2,), (2,), (2,))}),
    ],
)
def test_shapes_of_the_command_line(text: str, expected: dict[str, Shapes]) -> None:
    assert parse_shapes(text) == expected


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "gives no input its shapes"),
        ("1x3", "gives no input its shapes"),
        ("=1x3", "gives no input its shapes"),
        ("x=1x3;", "gives no input its shapes"),
        ("x=", "'' is no shape"),
        ("x=1x3,4x3", "x has 2 shapes"),
        ("x=1x3,2x3,3x3,4x3", "x has 4 shapes"),
        ("x=1x3;x=1x3", "given twice"),
        ("x=0x3", "'0x3' is no shape"),
        ("x=-1x3", "'-1x3' is no shape"),
        ("x=1X3", "'1X3' is no shape"),
        ("x=1x", "'1x' is no shape"),
        ("x=٣", "is no shape"),
        ("x=1x3,4x3,8", "different numbers of axes"),
        ("x=1x3,4x3,2x3", "not in order at axis 0"),
        ("x=1x3,1x2,1x3", "not in order at axis 1"),
        (f"x={2**31}", "out of range"),
        (f"x={'9' * 5000}", "out of range"),
    ],
)
def test_text_of_another_form(text: str, what: str) -> None:
    with pytest.raises(UsageError, match=what) as refusal:
        parse_shapes(text)
    assert refusal.value.expected


def test_a_free_batch() -> None:
    expected = ((1, 3, 8, 7), (4, 3, 8, 7), (8, 3, 8, 7))
    assert default_shapes([IMAGE, SCALE], 4) == {"image": expected}
    assert default_shapes([IMAGE], 32)["image"][2] == (32, 3, 8, 7)
    assert default_shapes([SCALE], 4) == {}
    assert default_shapes([Port("n", (None,))], 1) == {"n": ((1,), (1,), (8,))}


def test_shapes_that_are_given() -> None:
    found = default_shapes([IMAGE, TOKENS, SCALE], 4, {"tokens": TOKEN_SHAPES, "scale": ((1, 5), (1, 5), (1, 5))})
    assert found["tokens"] == TOKEN_SHAPES
    assert set(found) == {"image", "tokens"}, "what has no free axis needs no shapes"


def test_another_free_axis_needs_shapes() -> None:
    with pytest.raises(UsageError, match="axis 1 of the input tokens has any size") as refusal:
        default_shapes([IMAGE, TOKENS], 4)
    assert refusal.value.where == "batchxlength"
    assert "--shapes tokens=" in refusal.value.hint


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ({"picture": ((1,), (1,), (1,))}, "no input picture"),
        ({"image": ((1, 3, 8), (1, 3, 8), (1, 3, 8))}, "do not fit the input image"),
        ({"image": ((1, 3, 8, 6), (1, 3, 8, 7), (1, 3, 8, 7))}, "do not fit the input image"),
        ({"scale": ((2, 5), (2, 5), (2, 5))}, "do not fit the input scale"),
        ({"image": ((2, 3, 8, 7), (1, 3, 8, 7), (1, 3, 8, 7))}, "not in order"),
    ],
)
def test_given_shapes_that_do_not_fit(given: dict[str, Shapes], what: str) -> None:
    with pytest.raises(UsageError, match=what):
        default_shapes([IMAGE, SCALE], 4, given)


def test_a_batch_of_none() -> None:
    with pytest.raises(UsageError, match="the batch is 0"):
        default_shapes([IMAGE], 0)


def test_inputs_share_their_batch_and_axes_of_one_name() -> None:
    mask, ids = Port("mask", ("size_1", "length")), Port("ids", ("batch", "length"))
    found = default_shapes([mask, ids, IMAGE], 2, {"ids": ((1, 5), (4, 9), (16, 20))})
    assert found["mask"] == ((1, 5), (4, 9), (16, 20)), "of another name, but its batch all the same"
    assert found["image"] == ((1, 3, 8, 7), (4, 3, 8, 7), (16, 3, 8, 7))


def test_an_axis_that_two_inputs_give_other_sizes() -> None:
    left, right = Port("left", ("batch", 3)), Port("right", ("batch", 5))
    given: dict[str, Shapes] = {"left": ((1, 3), (2, 3), (4, 3)), "right": ((1, 5), (2, 5), (8, 5))}
    with pytest.raises(UsageError, match="the axis batch has other sizes in right than in left") as refusal:
        default_shapes([left, right], 4, given)
    assert refusal.value.expected == "1, 2, 4 (smallest, usual, largest)"
