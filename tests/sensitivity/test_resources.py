"""What bits use, resource by resource, by hand; what they do not change is counted once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small_subject import captured, made, placed
from torch import Tensor, nn

from normfuse.graph.quantization import requests
from normfuse.precision.workload import Step, Work, steps_of
from normfuse.quant.allocation import BudgetTooSmall, allocate
from normfuse.quant.bits import FLOAT, Bits
from normfuse.quant.budget import Budget, Limit, Resource
from normfuse.sensitivity.resources import Resources, stored_bits
from normfuse.sensitivity.sensitivity import Sensitivity
from normfuse.sensitivity.units import Member, members_of, options, units
from normfuse.testing import seeded


def work(parameters: int, macs: int) -> Work:
    return Work(layer="layer", parameters=parameters, macs=macs)


STEM = Member(name="stem", maps={"stem": work(40, 400)}, source="", reads="image", fixed=8, tie="image")
PAIR = Member(name="q", maps={"q": work(100, 500), "k": work(20, 100)}, source="y", reads="y", fixed=None, tie="y")
HEAD = Member(name="head", maps={"head": work(40, 40)}, source="z", reads="z", fixed=None, tie="z")
PARTS = Resources(parameters=200, macs=1040)


def test_average_bits_are_those_of_a_weight() -> None:
    """160 weights of 2 bits and 40 of 8: 640 of 200."""
    used = [PARTS.use(STEM, Bits(2, 8)), PARTS.use(PAIR, Bits(2, 3)), PARTS.use(HEAD, Bits(8, 3))]
    assert sum(each["avg-bits"] for each in used) == pytest.approx(640 / 200)
    whole = [PARTS.use(each, Bits(FLOAT, FLOAT)) for each in (STEM, PAIR, HEAD)]
    assert sum(each["avg-bits"] for each in whole) == pytest.approx(32)


def test_products_count_by_both_widths() -> None:
    assert PARTS.use(PAIR, Bits(4, 3))["bops"] == 600 * 4 * 3
    assert PARTS.use(PAIR, Bits(4, FLOAT))["bops"] == 600 * 4 * 32


BYTES = [(2, 60), (3, 60), (4, 60), (5, 120), (7, 120), (8, 120), (FLOAT, 480)]


@pytest.mark.parametrize(("bits", "expected"), BYTES)
def test_bytes_are_those_of_a_file(bits: int, expected: int) -> None:
    """Of 120 weights; a file has codes of four or eight bits, or floats."""
    assert PARTS.use(PAIR, Bits(bits, FLOAT))["bytes"] == expected
    assert stored_bits(bits) * 120 / 8 == expected


SCALES = {"q": {Bits(3, FLOAT): 12, Bits(8, 8): 4}, "k": {Bits(3, FLOAT): 6, Bits(8, 8): 2}}


def test_scales_count_where_the_file_does() -> None:
    """Of 120 weights, in groups or by output, four bytes each."""
    scaled = replace(PARTS, scales=SCALES)
    assert scaled.use(PAIR, Bits(3, FLOAT))["bytes"] == 60 + 18 * 4
    assert scaled.use(PAIR, Bits(8, 8))["bytes"] == 120 + 6 * 4


STEPS = [Step(floats=100.0, codes={"y": 16, "image": 24}), Step(floats=0.0, codes={"y": 16, "z": 40, "sum": 8})]
HELD = replace(PARTS, steps=STEPS, fixed_bits={"sum": 8})
FIRST, SECOND = "activation-bytes at step 0", "activation-bytes at step 1"


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_what_is_held_counts_at_every_step(bits: int) -> None:
    """Codes are held in bytes, however few bits they have."""
    pair, head, stem = HELD.use(PAIR, Bits(8, bits)), HELD.use(HEAD, Bits(8, bits)), HELD.use(STEM, Bits(4, 8))
    assert [pair[FIRST], pair[SECOND]] == [16, 16]
    assert [head[FIRST], head[SECOND]] == [0, 40]
    assert [stem[FIRST], stem[SECOND]] == [24, 0]
    assert [HELD.rest[FIRST], HELD.rest[SECOND]] == [100, 8]


def test_floats_take_four_bytes() -> None:
    """An image that a map of floats reads, too."""
    assert HELD.use(PAIR, Bits(4, FLOAT))[FIRST] == 64
    assert HELD.use(STEM, Bits(FLOAT, FLOAT))[FIRST] == 96


SECONDS = {
    "stem": {Bits(4, 8): 1.0, Bits(FLOAT, FLOAT): 3.0},
    "q": {Bits(4, 8): 2.0, Bits(FLOAT, FLOAT): 5.0},
    "k": {Bits(4, 8): 0.5, Bits(FLOAT, FLOAT): 1.0},
    "head": {Bits(4, 8): 0.25, Bits(FLOAT, FLOAT): 0.5},
}


def test_time_is_that_of_all_maps_and_what_is_between_them() -> None:
    timed = replace(PARTS, seconds=SECONDS, float_seconds=11.0)
    assert timed.use(PAIR, Bits(4, 8))["latency"] == 2.5
    assert timed.rest["latency"] == 11.0 - 9.5
    assert sum(timed.use(each, Bits(FLOAT, FLOAT))["latency"] for each in (STEM, PAIR, HEAD)) + 1.5 == 11


def test_what_is_between_maps_takes_no_less_than_no_time() -> None:
    """Each was measured with calls that the whole has once."""
    assert replace(PARTS, seconds=SECONDS, float_seconds=9.0).rest["latency"] == 0


def test_what_is_not_limited_is_not_there() -> None:
    assert PARTS.use(PAIR, Bits(4, 3)).keys() == {"avg-bits", "bops", "bytes"}
    assert PARTS.rest == {"avg-bits": 0.0, "bops": 0.0, "bytes": 0.0}
    assert replace(PARTS, other_bytes=77).rest["bytes"] == 77


@pytest.mark.parametrize("resources", [PARTS, HELD, replace(HELD, seconds=SECONDS, float_seconds=11.0, other_bytes=7)])
def test_the_rest_has_what_members_use(resources: Resources) -> None:
    assert resources.rest.keys() == resources.use(PAIR, Bits(4, 8)).keys()


WHOLE = replace(HELD, float_bytes=1000, other_bytes=50, seconds=SECONDS, float_seconds=11.0)
"""Floats would hold 100 + 40 * 4 bytes at the first step, 64 * 4 at the second."""

BOUNDS = [
    ("avg-bits=3.5", {"avg-bits": 3.5}),
    ("bytes=700", {"bytes": 700.0}),
    ("bytes=0.5x", {"bytes": 500.0}),
    ("bops=0.25x", {"bops": 1040 * 1024 / 4}),
    ("bops=12k", {"bops": 12000.0}),
    ("activation-bytes=90", {FIRST: 90.0, SECOND: 90.0}),
    ("activation-bytes=0.5x", {FIRST: 130.0, SECOND: 130.0}),
    ("latency=0.5x", {"latency": 5.5}),
    ("latency=3s", {"latency": 3.0}),
    ("drop=0.5", {}),
    ("bytes=0.5x avg-bits=4 drop=1", {"bytes": 500.0, "avg-bits": 4.0}),
]


@pytest.mark.parametrize(("text", "expected"), BOUNDS)
def test_limits_may_be_parts_of_the_float_model(text: str, expected: dict[str, float]) -> None:
    assert WHOLE.bounds(Budget.parse(text).limits) == expected


def test_what_is_told_is_the_most_of_all_steps() -> None:
    amounts = {"bytes": 70.0, "bops": 5.0, FIRST: 9.0, SECOND: 8.0}
    assert WHOLE.told(amounts) == {"bytes": 70.0, "bops": 5.0, "activation-bytes": 9.0}
    assert WHOLE.told({FIRST: 8.0, SECOND: 9.0}) == {"activation-bytes": 9.0}
    assert HELD.told(amounts) == {"bops": 5.0, "activation-bytes": 9.0}, "the rest of the file was not counted"


def branches(m: nn.Module, x: Tensor) -> Tensor:
    y = m.a(x).relu()  # type: ignore[operator]
    return m.d(m.b(y) * m.c(y))  # type: ignore[operator, no-any-return]


X = torch.randn(2, 9, generator=seeded(0))
PARTS_OF = made(a=nn.Linear(9, 7), b=nn.Linear(7, 11), c=nn.Linear(7, 11), d=nn.Linear(11, 3))
SIZES = {"a": 63, "b": 77, "c": 77, "d": 33}


def of_branches() -> tuple[list[Member], Resources]:
    graph = placed(captured(branches, X, parts=PARTS_OF))
    members = members_of(graph, [X])
    chosen = {member.reads for member in members}
    fixed = {each.source.name: each.type.bits for each in requests(graph) if each.source.name not in chosen}
    total = sum(SIZES.values())
    return members, Resources(
        parameters=total, macs=total, float_bytes=1300, other_bytes=40, steps=steps_of(graph, [X]), fixed_bits=fixed
    )


def score_of(members: list[Member], widths: tuple[int, ...]) -> Sensitivity:
    """A bit less costs four times as much, of a weight by its size."""
    weights = {
        name: {bits: each.parameters * 4.0**-bits for bits in widths} for m in members for name, each in m.maps.items()
    }
    activations = {m.source: {bits: 4.0**-bits for bits in widths} for m in members if m.source}
    return Sensitivity(method="by hand", weights=weights, activations=activations)


def test_the_rest_is_counted_once() -> None:
    """Every weight has 8 bits: a byte each, and 40 more that are no weights.

    Most is held while what b and c have written, 11 floats each, is multiplied to 11 codes.
    """
    members, resources = of_branches()
    score = score_of(members, (8,))
    whole = units(members, score, options([8], [8]), use=resources.use, rest=resources.rest)
    used = allocate(whole, {}).use
    assert used["bytes"] == 250 + 40
    assert used["avg-bits"] == pytest.approx(8)
    assert used["bops"] == 250 * 64
    assert resources.told(used)["activation-bytes"] == 2 * 11 * 4 + 11
    assert resources.fixed_bits == {}


def test_a_limit_below_the_rest_is_refused_with_what_is_needed() -> None:
    members, resources = of_branches()
    whole = units(members, score_of(members, (2, 8)), options([2, 8], [8]), use=resources.use, rest=resources.rest)
    with pytest.raises(BudgetTooSmall) as caught:
        allocate(whole, resources.bounds([Limit(Resource.BYTES, 100.0)]))
    assert caught.value.least == {"bytes": 250 / 2 + 40}


def test_limits_hold_for_what_is_chosen() -> None:
    """88 bytes of floats leave no room for 11 more of them."""
    members, resources = of_branches()
    choices = options([2, 4, 8], [3, 8, FLOAT])
    whole = units(members, score_of(members, (2, 3, 4, 8)), choices, use=resources.use, rest=resources.rest)
    bounds = resources.bounds(Budget.parse("avg-bits=5 bops=0.05x activation-bytes=100").limits)
    found = allocate(whole, bounds)
    used, last = found.use, members[-1]
    assert found.bits[last.name].activation == 8, "floats would do no harm"
    assert all(used[name] <= bound * (1 + 1e-12) for name, bound in bounds.items())
    assert used["avg-bits"] > 4, "and are used"
