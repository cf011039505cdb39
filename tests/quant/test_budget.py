"""Budgets: what is written is read, and written again."""

from __future__ import annotations

from math import inf, nan

import pytest
from hypothesis import given
from hypothesis import strategies as st

from normfuse.errors import UsageError
from normfuse.quant.budget import Budget, Limit, Resource

PARTS = (Resource.BYTES, Resource.BOPS, Resource.ACTIVATION_BYTES, Resource.LATENCY)


@pytest.mark.parametrize(
    ("text", "limit", "canonical"),
    [
        ("bytes=0.14x", Limit(Resource.BYTES, 0.14, True), "bytes=0.14x"),
        ("bytes=3.5MB", Limit(Resource.BYTES, 3.5e6), "bytes=3.5MB"),
        ("bytes=2KiB", Limit(Resource.BYTES, 2048), "bytes=2.048kB"),
        ("bytes=1.5MiB", Limit(Resource.BYTES, 1_572_864), "bytes=1.572864MB"),
        ("bytes=.5GiB", Limit(Resource.BYTES, 2.0**29), "bytes=536.870912MB"),
        ("bytes=999", Limit(Resource.BYTES, 999), "bytes=999"),
        ("avg-bits=4.5", Limit(Resource.AVERAGE_BITS, 4.5), "avg-bits=4.5"),
        ("bops=0.1x", Limit(Resource.BOPS, 0.1, True), "bops=0.1x"),
        ("bops=12G", Limit(Resource.BOPS, 12e9), "bops=12G"),
        ("bops=12000k", Limit(Resource.BOPS, 12e6), "bops=12M"),
        ("bops=1e15", Limit(Resource.BOPS, 1e15), "bops=1000T"),
        ("activation-bytes=2MB", Limit(Resource.ACTIVATION_BYTES, 2e6), "activation-bytes=2MB"),
        ("latency=0.8x", Limit(Resource.LATENCY, 0.8, True), "latency=0.8x"),
        ("latency=2.5ms", Limit(Resource.LATENCY, 0.0025), "latency=2.5ms"),
        ("latency=.3us", Limit(Resource.LATENCY, 3e-7), "latency=0.3us"),
        ("latency=2s", Limit(Resource.LATENCY, 2), "latency=2s"),
        ("drop=0.5", Limit(Resource.DROP, 0.5), "drop=0.5"),
    ],
)
def test_what_is_written_is_read(text: str, limit: Limit, canonical: str) -> None:
    assert Budget.parse(text) == Budget((limit,))
    assert str(Budget.parse(text)) == canonical


def test_words_are_divided_by_blanks_or_commas_and_have_one_order() -> None:
    assert str(Budget.parse(" drop=1,bops=2G  bytes=3kB, ")) == "bytes=3kB bops=2G drop=1"
    assert Budget.parse(" , ") == Budget(()) == Budget.parse("")
    assert str(Budget(())) == ""


def limits_of(resource: Resource) -> st.SearchStrategy[Limit]:
    lowest, highest = (2, 32) if resource is Resource.AVERAGE_BITS else (5e-324, None)
    amounts = st.floats(lowest, highest, allow_nan=False, allow_infinity=False)
    return st.builds(Limit, st.just(resource), amounts, st.booleans() if resource in PARTS else st.just(False))


@given(st.lists(st.sampled_from(Resource), unique=True).flatmap(lambda found: st.tuples(*map(limits_of, found))))
def test_a_budget_survives_its_text(limits: tuple[Limit, ...]) -> None:
    budget = Budget(limits)
    assert Budget.parse(str(budget)) == budget
    assert str(Budget.parse(str(budget))) == str(budget)


@pytest.mark.parametrize(
    "text",
    [
        *("bytes", "bytes=", "bytes=x", "bytes=MB", "bytes==5", "bytes=5 MB", "bytes=1e9999", "bytes=1e308GB"),
        *("bytes=-3MB", "bytes=0", "bytes=0x", "bytes=nan", "bytes=inf", "bytes=infx", "bytes=3.5TB", "bytes=1e-400"),
        *("avg-bits=4x", "avg-bits=1.9", "avg-bits=33", "avg-bits=4k", "bops=12GB", "bops=2KiB"),
        *("latency=2.5", "latency=3h", "drop=0.5x", "drop=0", "drop=-1", "drop=1%", "=5", "5MB", "memory=5MB"),
    ],
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="the budget cannot have") as caught:
        Budget.parse(text)
    assert caught.value.where == "recipe"
    assert caught.value.expected


@pytest.mark.parametrize("amount", [0.0, -1.0, nan, inf])
def test_no_limit_is_impossible(amount: float) -> None:
    with pytest.raises(UsageError, match="the budget cannot have bops="):
        Limit(Resource.BOPS, amount)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("byte=0.5x", "did you mean bytes=0.5x?"),
        ("avg_bits=4", "did you mean avg-bits=4?"),
        ("bytes=3mb", "did you mean bytes=3MB?"),
        ("bytes=3mib", "did you mean bytes=3MiB?"),
        ("bops=0.1X", "did you mean bops=0.1x?"),
        ("latency=3MS", "did you mean latency=3ms?"),
        ("latency=3h", ""),
    ],
)
def test_a_near_miss_gets_a_suggestion(text: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        Budget.parse(text)
    assert caught.value.hint == hint


def test_the_message_says_what_is_written_instead() -> None:
    with pytest.raises(UsageError) as caught:
        Budget.parse("latency=2.5")
    assert str(caught.value).splitlines() == [
        "the budget cannot have latency=2.5",
        "  at        recipe",
        "  expected  0.8x (of the float model) or 2.5ms (s, ms or us)",
    ]


def test_a_resource_is_limited_once() -> None:
    with pytest.raises(UsageError, match="the budget limits bytes twice") as caught:
        Budget.parse("bytes=3MB bops=1G bytes=0.5x")
    assert caught.value.expected == "one of bytes=3MB and bytes=0.5x"
