"""Engines are measured on data: the sizes of real samples, not axes of size 1."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, save

from normfuse.bench import timing
from normfuse.bench.timing import EngineSpec, Schedule
from normfuse.data import Samples
from normfuse.data.samples import Sample
from normfuse.measure import Measured, compare_engines
from normfuse.progress import Silent


def write(path: Path) -> Path:
    """y = -x, with x [batch, length] of any length."""
    graph = helper.make_graph(
        [helper.make_node("Neg", ["x"], ["y"])],
        "negative",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "length"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "length"])],
    )
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


def rows(lengths: list[int]) -> Samples:
    def read() -> list[Sample]:
        return [Sample({"x": np.ones(length, np.float32)}, "row") for length in lengths]

    return Samples(source="rows", names=("x",), count=len(lengths), read=lambda: iter(read()))


@pytest.mark.slow
@pytest.mark.parametrize("lengths", [[7, 7, 7], [7, 9, 7]], ids=["one length", "several lengths"])
def test_engines_run_on_arrays_as_long_as_the_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lengths: list[int]
) -> None:
    quick = Schedule(rounds=2, seconds_per_round=0.0, warm_up_runs=1)
    monkeypatch.setattr(timing, "Schedule", lambda: quick)
    path = write(tmp_path / "model.onnx")
    engines = [EngineSpec(label, "onnxruntime", path) for label in ("float", "int8")]
    what = Measured(engines=engines, evaluation=rows(lengths))
    found = compare_engines(what, batch=2, threads=1, speed=True, progress=Silent())
    for row in found.rows:
        assert row.timing is not None
        assert row.timing.inputs == {"x": (2, 7)}
        assert row.peak_bytes
    assert found.row("int8").closeness is not None
