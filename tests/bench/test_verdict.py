from __future__ import annotations

import json
import math
from fractions import Fraction

import numpy as np
import pytest

from normfuse.bench.accuracy import Closeness, Metric, Score
from normfuse.bench.comparison import Comparison, Row
from normfuse.bench.timing import Timing
from normfuse.bench.verdict import Judgement, Verdict, judge
from normfuse.errors import UsageError


def timing(*rounds: float) -> Timing:
    return Timing.of([[value] for value in rounds], batch=4)


def compared(base: Row, other: Row) -> Comparison:
    return Comparison(rows=(base, other), baseline="float", batch=4, threads=1)


def row(
    label: str,
    *,
    rounds: tuple[float, ...] = (2.0, 2.0, 2.0),
    correct: int | None = None,
    metric: Metric = Metric.TOP_1,
    closeness: Closeness | None = None,
    size: int | None = 100,
) -> Row:
    score = None if correct is None else Score(metric, Fraction(correct, 1000), 1000)
    return Row(label=label, timing=timing(*rounds), file_bytes=size, peak_bytes=size, score=score, closeness=closeness)


def verdict_of(base: Row, other: Row, *, max_drop: float = 0.5, min_speedup: float = 1.0) -> Judgement:
    return judge(compared(base, other), "int8", max_drop=max_drop, min_speedup=min_speedup)


def test_ratios_are_taken_round_by_round() -> None:
    # The machine slowed down threefold in the second round, for both; the medians alone would say 3 / 2.
    found = compared(row("float", rounds=(2.0, 6.0, 3.0)), row("int8", rounds=(1.0, 4.0, 2.0), size=30))
    assert found.speedups("int8") == (2.0, 1.5, 1.5)
    ratios = found.ratios("int8")
    assert (ratios["speedup"], ratios["speedup_lowest"], ratios["speedup_highest"]) == (1.5, 1.5, 2.0)
    assert (ratios["file"], ratios["memory"], ratios["drop"]) == (0.3, 0.3, None)
    assert found.ratios("float")["speedup"] == 1.0


def test_what_was_not_measured_is_none_and_json_is_strict() -> None:
    near = Closeness(100.0, math.inf, 3)
    found = compared(Row(label="float"), Row(label="int8", closeness=near)).as_dict()
    text = json.loads(json.dumps(found, allow_nan=False))
    assert text["rows"][1]["sqnr_db"] is None
    assert text["rows"][1]["same_outputs"] is True
    assert set(text["rows"][1]["ratios"].values()) == {None}
    with pytest.raises(UsageError, match="no engine int4"):
        compared(Row(label="float"), Row(label="int8")).speedup("int4")


def test_faster_and_as_accurate_is_kept() -> None:
    found = verdict_of(row("float", correct=912), row("int8", rounds=(1.0, 1.0, 1.0), correct=907))
    assert found.verdict is Verdict.KEPT
    assert found.reasons == (
        "2 times as fast as float (3 rounds: 2 to 2), 1 wanted",
        "top-1 90.70 % after 91.20 % on 1000 samples: 0.50 points lost, a drop of 0.50 is allowed",
    )


@pytest.mark.parametrize(
    ("rounds", "correct", "min_speedup", "says"),
    [
        pytest.param((3.0, 3.0, 3.0), 912, 1.0, "slower than float: 0.667 times", id="slower"),
        pytest.param((1.9, 1.9, 1.9), 912, 1.5, "too little faster: 1.05 times", id="not fast enough"),
        pytest.param((1.0, 1.0, 1.0), 906, 1.0, "accuracy fell too far: top-1 90.60 %", id="less accurate"),
    ],
)
def test_slower_or_less_accurate_falls_back_and_says_why_first(
    rounds: tuple[float, ...], correct: int, min_speedup: float, says: str
) -> None:
    found = verdict_of(row("float", correct=912), row("int8", rounds=rounds, correct=correct), min_speedup=min_speedup)
    assert found.verdict is Verdict.FELL_BACK
    assert found.reasons[0].startswith(says)
    assert len(found.reasons) == 2


def test_the_score_is_called_by_its_name() -> None:
    fast = (1.0, 1.0, 1.0)
    base = row("float", correct=712, metric=Metric.MEAN_IOU)
    other = row("int8", rounds=fast, correct=709, metric=Metric.MEAN_IOU)
    assert verdict_of(base, other).reasons[1] == (
        "mean IoU 70.90 % after 71.20 % on 1000 samples: 0.30 points lost, a drop of 0.50 is allowed"
    )
    assert verdict_of(base, other, max_drop=0.25).verdict is Verdict.FELL_BACK
    found = compared(base, other).as_dict()["rows"]
    assert [(each["mean_iou"], each["top_1"]) for each in found] == [(71.2, None), (70.9, None)]  # type: ignore[attr-defined]
    assert compared(base, other).ratios("int8")["drop"] == 0.3


def test_noise_around_the_limit_is_not_called_slower() -> None:
    rounds = tuple(2.0 / ratio for ratio in (0.976, 0.981, 0.985, 0.987, 0.99, 1.0, 1.03))
    found = verdict_of(row("float", rounds=(2.0,) * 7, correct=9), row("int8", rounds=rounds, correct=9))
    assert found.verdict is Verdict.KEPT
    assert "do not show that it is too slow: 0.987 times" in found.reasons[0]
    assert found.reasons[0].endswith("measure again on a quiet machine")


def test_more_rounds_show_through_their_noise() -> None:
    rounds = tuple(2.0 / ratio for ratio in np.linspace(0.9, 1.01, 21))
    found = verdict_of(row("float", rounds=(2.0,) * 21), row("int8", rounds=rounds))
    assert found.verdict is Verdict.FELL_BACK
    assert found.reasons[0].startswith("slower than float: 0.955 times as fast as float (21 rounds: 0.9 to 1.01)")


@pytest.mark.parametrize(
    ("sqnr", "verdict", "says"),
    [
        (25.0, Verdict.KEPT, "accuracy was not judged, there are no labels"),
        (math.inf, Verdict.KEPT, "accuracy was not judged, there are no labels"),
        (9.9, Verdict.FELL_BACK, "the outputs are not the model's any more"),
        (math.nan, Verdict.FELL_BACK, "the outputs are not the model's any more"),
    ],
)
def test_without_labels_latency_and_sqnr_judge_and_it_is_said(sqnr: float, verdict: Verdict, says: str) -> None:
    found = verdict_of(row("float"), row("int8", rounds=(1.0, 1.0, 1.0), closeness=Closeness(97.5, sqnr, 40)))
    assert found.verdict is verdict
    assert any(says in reason for reason in found.reasons)


def test_nothing_measured_is_kept_and_says_what_is_unknown() -> None:
    found = verdict_of(Row(label="float"), Row(label="int8"))
    assert found == Judgement(
        Verdict.KEPT, ("speed was not measured", "accuracy was not judged: there was nothing to evaluate on")
    )


def test_what_has_exceptions_is_partly_kept_unless_the_rest_fails() -> None:
    fast, slow = row("int8", rounds=(1.0, 1.0, 1.0)), row("int8", rounds=(3.0, 3.0, 3.0))
    told = ("left in float: blocks.0.attn, head",)
    found = judge(compared(row("float"), fast), "int8", max_drop=0.5, exceptions=told)
    assert (found.verdict, found.reasons[0]) == (Verdict.PARTLY_KEPT, "left in float: blocks.0.attn, head")
    assert judge(compared(row("float"), slow), "int8", max_drop=0.5, exceptions=told).verdict is Verdict.FELL_BACK
