"""The engine in the type that its target computes in, held against its simulation in float32."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Final

from normfuse.build import CHECKED_BATCHES, Engine
from normfuse.checks import check_typed
from normfuse.export.body import write_body
from normfuse.export.largest_values import largest_values
from normfuse.export.widened import write_widened
from normfuse.feeding import Stream
from normfuse.quant.target import BodyType

__all__ = ["checked_typed", "typed"]

WATCHED: Final = 256
"""Samples, or batches where the model fixes one, that say how large tensors become."""


def typed(engine: Engine, samples: Stream, body: BodyType, *, threads: int) -> Engine:
    """Return the engine with a file whose floats have the body's type; the float32 one stays as ``exact``.

    Args:
        engine: of standard operators, in float32.
        samples: say how large tensors become (``write_body``).
        body: the type; float32 leaves the engine as it is.
        threads: onnxruntime's.
    """
    if body is BodyType.FP32:
        return engine
    path = _beside(engine.path, "typed")
    found = write_body(engine.path, path, body, largest_values(engine.path, _feeds(engine, samples), threads=threads))
    runs = _beside(engine.path, "rounded")
    write_widened(path, runs, rounds=True)
    return replace(engine, path=path, exact=engine.path, runs=runs, body=found)


def checked_typed(engine: Engine, samples: Stream, *, threads: int) -> Engine:
    """Return the engine with its typed file compared with the simulation, code by code, and its outputs."""
    if engine.body is None:
        return engine
    seen = list(islice(samples(), CHECKED_BATCHES))
    checks = check_typed(
        engine.graph,
        engine.runs or engine.path,
        seen,
        engine.body.body,
        threads=threads,
        session_config=engine.session_config,
    )
    return replace(engine, checks=(*engine.checks, *checks))


def _beside(path: Path, name: str) -> Path:
    place = path.with_name(name) / path.name
    place.parent.mkdir(exist_ok=True)
    return place


def _feeds(engine: Engine, samples: Stream) -> Iterator[Mapping[str, Any]]:
    for sample in islice(samples(), WATCHED):
        yield {name: value.numpy() for name, value in zip(engine.graph.input_names, sample, strict=True)}
