"""Measures the float and the quantized engine side by side and judges the result."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from normfuse.bench.accuracy import Array, Closeness, Engine, Score, compare_outputs, score
from normfuse.bench.comparison import Comparison, Row, round_ratios
from normfuse.bench.confidence import median_interval
from normfuse.bench.inputs import write_inputs
from normfuse.bench.timing import EngineSpec, Schedule, Timing, measure_memory, time_engines
from normfuse.bench.worker_process import Load
from normfuse.data import Batch, Samples
from normfuse.progress import Progress
from normfuse.runtime.onnx_session import OnnxSession, open_onnx

__all__ = ["Measured", "accuracy", "compare_engines", "file_bytes"]

EVALUATION_BATCH = 50
LIMIT_WITHOUT_LABELS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What to measure: engines by label (the first is the baseline), and on which samples.

    ``scores`` are those that have been measured already, by label.
    Without samples the engines run on random arrays in which every axis of any size, but the batch, is of size 1.
    """

    engines: Sequence[EngineSpec]
    evaluation: Samples | None
    fixed_batch: int | None = None
    scores: Mapping[str, Score] = field(default_factory=dict)


def compare_engines(
    what: Measured,
    *,
    batch: int,
    threads: int,
    speed: bool,
    progress: Progress,
    min_speedup: float | None = None,
) -> Comparison:
    """Return latency, memory, size and accuracy of every engine, from one run.

    All engines are timed on the first samples, so that sizes and values are those of real data. Accuracy is measured
    for the onnxruntime engines, with the same samples through the same preprocessing; without labels their outputs
    are compared with the first one's. With ``min_speedup`` the engines are measured for longer where the first rounds
    do not show whether they are that much faster than the first one.
    """
    batch = what.fixed_batch or batch
    with tempfile.TemporaryDirectory(prefix="normfuse-") as folder:
        inputs = None
        if what.evaluation is not None:
            inputs = write_inputs(Path(folder) / "inputs.npz", what.evaluation, batch=batch)
        load = Load(batch=batch, threads=threads, inputs=inputs)
        timings, peaks = _speed(what, load, _schedule(what, min_speedup), progress) if speed else ({}, {})
    rows = []
    with progress.task("measuring accuracy", len(what.engines)) as advance:
        for engine in what.engines:
            known = what.scores.get(engine.label)
            found, near = (known, None) if known else accuracy(what, engine, threads=threads)
            rows.append(
                Row(
                    label=engine.label,
                    timing=timings.get(engine.label),
                    peak_bytes=peaks.get(engine.label),
                    file_bytes=file_bytes(engine.ships or engine.path),
                    score=found,
                    closeness=near,
                )
            )
            advance(1)
    return Comparison(rows=tuple(rows), baseline=what.engines[0].label, batch=batch, threads=threads)


def _schedule(what: Measured, min_speedup: float | None) -> Schedule | None:
    if min_speedup is None:
        return None
    base, *others = (engine.label for engine in what.engines)

    def is_enough(timings: Mapping[str, Timing]) -> bool:
        found = [median_interval(round_ratios(timings[base], timings[label])) for label in others]
        return not any(low < min_speedup <= high for low, high in found)

    return Schedule(is_enough=is_enough)


def _speed(
    what: Measured, load: Load, schedule: Schedule | None, progress: Progress
) -> tuple[dict[str, Timing], dict[str, int]]:
    """Return timing and peak memory by label."""
    timings = time_engines(
        what.engines,
        batch=load.batch,
        threads=load.threads,
        inputs=load.inputs,
        schedule=schedule,
        progress=progress,
    )
    peaks = {}
    with progress.task("measuring memory", len(what.engines)) as advance:
        for engine in what.engines:
            peaks[engine.label] = measure_memory(engine, batch=load.batch, threads=load.threads, inputs=load.inputs)
            advance(1)
    return timings, peaks


def file_bytes(path: Path) -> int:
    """Return the size of a model's file, external data with it."""
    data = path.with_name(f"{path.name}.data")
    return path.stat().st_size + (data.stat().st_size if data.exists() else 0)


def accuracy(what: Measured, spec: EngineSpec, *, threads: int) -> tuple[Score | None, Closeness | None]:
    """Return an engine's score; where there are no labels, how close it is to the first engine."""
    samples, first = what.evaluation, what.engines[0]
    if samples is None or spec.kind != "onnxruntime":
        return None, None
    session = _open(spec, threads)
    if samples.labels is not None:
        return score(_first_output(session), _labelled(_batches(what, session, samples))), None
    if spec is first:
        return None, None
    batches = _batches(what, session, samples.first(LIMIT_WITHOUT_LABELS))
    reference = _first_output(_open(first, threads))
    return None, compare_outputs(_first_output(session), reference, (batch.inputs for batch in batches))


def _batches(what: Measured, session: OnnxSession, samples: Samples) -> Iterator[Batch]:
    if what.fixed_batch is not None:
        return (batch for batch in samples.batches(what.fixed_batch) if len(batch) == what.fixed_batch)
    # Samples of several sizes do not fit into one batch.
    has_free_sizes = any(None in port.shape[1:] for port in session.inputs)
    return samples.batches(1 if has_free_sizes else EVALUATION_BATCH)


def _labelled(batches: Iterable[Batch]) -> Iterator[tuple[dict[str, Array], Array]]:
    return ((batch.inputs, batch.labels) for batch in batches if batch.labels is not None)


def _open(spec: EngineSpec, threads: int) -> OnnxSession:
    return open_onnx(spec.path, threads=threads, session_config=spec.session_config)


def _first_output(session: OnnxSession) -> Engine:
    name = session.outputs[0].name
    return lambda inputs: session.run(dict(inputs))[name]
