from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from normfuse.bench.timing import EngineSpec, Schedule, Timing, time_engines, turn_order
from normfuse.errors import CheckFailed, UsageError

SHORT = Schedule(rounds=3, seconds_per_round=0.005, min_runs=2, max_runs=4)


def test_the_order_rotates_and_every_round_has_everybody_once() -> None:
    assert turn_order(["a", "b", "c"], 4) == ["a", "b", "c", "b", "c", "a", "c", "a", "b", "a", "b", "c"]
    assert turn_order(["a", "b"], 3) == ["a", "b", "b", "a", "a", "b"]
    assert turn_order(["a"], 2) == ["a", "a"]
    assert turn_order([], 2) == []
    first = Counter(turn_order(list("abcde"), 10)[::5])
    assert set(first.values()) == {2}


def test_percentiles_are_numpys_over_all_runs() -> None:
    generator = np.random.default_rng(3)
    rounds = [generator.gamma(2.0, 3.0, size).tolist() for size in (7, 11, 4)]
    timing = Timing.of(rounds, batch=8)
    everything = np.concatenate([np.asarray(found) for found in rounds])
    assert (timing.p50, timing.p90, timing.p99) == tuple(np.percentile(everything, [50, 90, 99]))
    assert timing.rounds == tuple(float(np.median(found)) for found in rounds)
    assert timing.runs == 22
    assert timing.throughput == pytest.approx(8 / (np.median(everything) / 1e3), rel=1e-12)
    assert timing.spread == (max(timing.rounds) - min(timing.rounds)) / timing.p50


def test_two_real_engines_are_timed(linear: Path) -> None:
    engines = [EngineSpec("one", "onnxruntime", linear), EngineSpec("two", "onnxruntime", linear)]
    found = time_engines(engines, batch=4, threads=1, schedule=SHORT)
    assert list(found) == ["one", "two"]
    for timing in found.values():
        assert len(timing.rounds) == SHORT.rounds
        assert SHORT.rounds * SHORT.min_runs <= timing.runs <= SHORT.rounds * SHORT.max_runs
        assert 0 < timing.p50 <= timing.p90 <= timing.p99 < math.inf
        assert timing.inputs == {"x": (4, 5)}


@pytest.mark.parametrize(("enough", "rounds"), [(True, 3), (False, 5)])
def test_what_is_not_enough_is_measured_on_with_the_same_processes(linear: Path, enough: bool, rounds: int) -> None:
    asked: list[int] = []

    def is_enough(timings: Mapping[str, Timing]) -> bool:
        asked.extend(len(timing.rounds) for timing in timings.values())
        return enough

    engines = [EngineSpec("one", "onnxruntime", linear), EngineSpec("two", "onnxruntime", linear)]
    found = time_engines(engines, batch=4, threads=1, schedule=replace(SHORT, most_rounds=5, is_enough=is_enough))
    assert [len(timing.rounds) for timing in found.values()] == [rounds, rounds]
    assert asked == [3, 3], "asked once: asking until the answer pleases would make the noise decide"


def test_a_crash_becomes_a_failed_check_that_shows_what_was_written(tmp_path: Path, linear: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no model")
    engines = [EngineSpec("good", "onnxruntime", linear), EngineSpec("broken", "onnxruntime", broken)]
    with pytest.raises(CheckFailed) as caught:
        time_engines(engines, batch=1, threads=1, schedule=SHORT)
    assert caught.value.where == "broken"
    assert "exit code 4" in caught.value.what
    assert "onnxruntime cannot open the model" in caught.value.what


def test_labels_must_differ(linear: Path) -> None:
    with pytest.raises(UsageError, match="same label"):
        time_engines([EngineSpec("a", "onnxruntime", linear)] * 2, batch=1, threads=1)
