"""Measures the float and the quantized engine side by side and judges the result."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from normfuse.bench.accuracy import Accuracy, Closeness, Engine, compare_outputs, top_1
from normfuse.bench.comparison import Comparison, Row
from normfuse.bench.timing import EngineSpec, measure_memory, time_engines
from normfuse.data import Samples
from normfuse.progress import Progress
from normfuse.runtime.onnx_session import open_onnx

__all__ = ["Measured", "compare_engines"]

EVALUATION_BATCH = 50
LIMIT_WITHOUT_LABELS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What to measure: engines by label (the first is the baseline), and on which samples."""

    engines: Sequence[EngineSpec]
    evaluation: Samples | None
    fixed_batch: int | None = None
    sizes: Mapping[str, int] = field(default_factory=dict)


def compare_engines(what: Measured, *, batch: int, threads: int, speed: bool, progress: Progress) -> Comparison:
    """Return latency, memory, size and accuracy of every engine, from one run.

    Accuracy is measured for the onnxruntime engines, with the same samples through the same preprocessing; without
    labels their outputs are compared with the first one's.
    """
    batch = what.fixed_batch or batch
    timings = time_engines(what.engines, batch=batch, threads=threads, progress=progress) if speed else {}
    rows = []
    with progress.task("memory and accuracy", len(what.engines)) as advance:
        for engine in what.engines:
            right, near = _accuracy(what, engine, threads=threads)
            rows.append(
                Row(
                    label=engine.label,
                    timing=timings.get(engine.label),
                    peak_bytes=measure_memory(engine, batch=batch, threads=threads) if speed else None,
                    file_bytes=what.sizes.get(engine.label, _size(engine.path)),
                    accuracy=right,
                    closeness=near,
                )
            )
            advance(1)
    return Comparison(rows=tuple(rows), baseline=what.engines[0].label, batch=batch, threads=threads)


def _size(path: Path) -> int:
    data = path.with_name(f"{path.name}.data")
    return path.stat().st_size + (data.stat().st_size if data.exists() else 0)


def _accuracy(what: Measured, spec: EngineSpec, *, threads: int) -> tuple[Accuracy | None, Closeness | None]:
    samples, first = what.evaluation, what.engines[0]
    if samples is None or spec.kind != "onnxruntime":
        return None, None
    engine = _engine(spec, threads)
    if samples.labels is not None:
        return top_1(engine, ((batch.inputs, batch.labels) for batch in _batches(what, samples))), None
    if spec is first:
        return None, None
    limited = samples.first(LIMIT_WITHOUT_LABELS)
    return None, compare_outputs(engine, _engine(first, threads), (batch.inputs for batch in _batches(what, limited)))


def _batches(what: Measured, samples: Samples) -> Iterator[Any]:
    size = what.fixed_batch or EVALUATION_BATCH
    return (batch for batch in samples.batches(size) if what.fixed_batch is None or len(batch) == size)


def _engine(spec: EngineSpec, threads: int) -> Engine:
    session = open_onnx(spec.path, threads=threads, session_config=spec.session_config)
    name = session.outputs[0].name
    return lambda inputs: session.run(dict(inputs))[name]
