"""What every linear map of a network takes at every choice of bits, each measured alone in onnxruntime on this CPU."""

from __future__ import annotations

import logging
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import Any, Final, TypeVar

import torch
from torch import Tensor, fx, nn

from normfuse.bench.environment import describe_environment
from normfuse.bench.timing import turn_order
from normfuse.calibration import calibrate
from normfuse.errors import BadInput, UnsupportedModel, UsageError
from normfuse.export.onnx import export_onnx
from normfuse.graph import Graph, capture, ops, query
from normfuse.graph.quantization import is_requested, requested_weights, requests
from normfuse.latency_table import Conditions, LatencyTable
from normfuse.passes.insert_quantizers import InsertQuantizers
from normfuse.passes.place_quantizers import PlaceQuantizers
from normfuse.pipeline import Fact, Phase, Pipeline
from normfuse.precision import round_all_to_nearest
from normfuse.precision.assignment import PlacementOf, may_narrow
from normfuse.progress import Progress
from normfuse.quant.bits import FLOAT, Bits
from normfuse.quant.calibration_method import CalibrationMethod
from normfuse.quant.placement import Placement
from normfuse.rewrite.linear_map import read_linear_map
from normfuse.runtime.onnx_session import open_onnx

__all__ = ["Timer", "measure_layers", "time_in_rounds"]

log = logging.getLogger(__name__)

T = TypeVar("T")

IDLE: Final[Mapping[str, str]] = {"session.force_spinning_stop": "1"}
"""All choices of a map are open at once: an idle one must not spin while another is measured."""

ROUNDS: Final = 7
ROUND_SECONDS: Final = 0.02
WARM_UP_RUNS: Final = 3

Run = Callable[[], object]
Timer = Callable[[Mapping[Bits, Run]], Mapping[Bits, Sequence[float]]]
"""Runs everything it is given and returns the seconds of one run, round by round."""


def measure_layers(  # noqa: PLR0913 - what a measurement needs; a bundle of them would be read nowhere else
    graph: Graph,
    sample: Sequence[Tensor],
    choices: Sequence[Bits],
    *,
    placement_of: PlacementOf,
    threads: int,
    batch: int = 1,
    progress: Progress,
    timer: Timer | None = None,
) -> LatencyTable:
    """Return the latency of every linear map that is to be quantized, at every choice of bits.

    Each map becomes an engine of its own, with random weights of its shape, written as a whole network's is and run
    on random numbers; where the target wants codes, quantizers of what it reads, and of what it writes if the graph
    asks for these, are part of it. Maps that differ in nothing that time depends on are measured once. The choices of
    one map are measured in turns, so that drift of the machine falls on all alike.

    A map whose input has codes of a fixed width runs at that width whatever is asked, and is in the table under both.
    A choice that cannot be built, opened or run is left out of the table, with the reason.

    Args:
        graph: a folded float graph with requests (``place-quantizers``) of eight bits; it is not changed.
        sample: one tensor per input, of any number of samples; repeated or cut to the batch. Its sizes count.
        choices: bits of weight and activation.
        placement_of: the target.
        threads: of onnxruntime.
        batch: samples per run.
        progress: shows the maps that differ.
        timer: how runs are timed; None: ``time_in_rounds``.

    Raises:
        UsageError: the graph fixes another batch.
    """
    bench = _Bench(placement_of, threads, timer or time_in_rounds)
    tasks = _tasks(graph, _of_batch(graph, sample, batch), choices)
    measured = dict[_Task, _Measured]()
    with progress.task("measuring linear maps", len(set(tasks.values()))) as advance:
        for name, task in tasks.items():
            if task not in measured:
                measured[task] = bench.measure(task)
                for bits, reason in measured[task].missing.items():
                    log.debug("%s has no latency at %s: %s", name, bits, reason)
                advance(1)
    environment = describe_environment()
    missing = {name: task.as_asked(measured[task].missing) for name, task in tasks.items()}
    return LatencyTable(
        seconds={name: task.as_asked(measured[task].seconds) for name, task in tasks.items()},
        missing={name: row for name, row in missing.items() if row},
        measured_on=Conditions(
            processor=environment.processor,
            instruction_set=environment.instruction_set,
            onnxruntime=environment.packages["onnxruntime"],
            threads=threads,
            batch=batch,
        ),
        spread=max((each.spread for each in measured.values()), default=0.0),
    )


def time_in_rounds(
    runs: Mapping[Bits, Run], *, rounds: int = ROUNDS, seconds: float = ROUND_SECONDS
) -> dict[Bits, list[float]]:
    """Return the median seconds of a run in every round, in which each has its turn of about ``seconds``."""
    by_label, found = {str(bits): bits for bits in runs}, {bits: list[float]() for bits in runs}
    for run in runs.values():
        for _ in range(WARM_UP_RUNS):
            run()
    for label in turn_order(list(by_label), rounds):
        bits = by_label[label]
        runs[bits]()  # the one before has filled the caches
        found[bits].append(_turn(runs[bits], seconds))
    return found


def _turn(run: Run, seconds: float) -> float:
    times, end = list[float](), time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        started = time.perf_counter_ns()
        run()
        times.append((time.perf_counter_ns() - started) / 1e9)
    return median(times)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layer:
    """All of a linear map that time depends on; ``options`` are the arguments behind the bias."""

    operator: Callable[..., Tensor]
    options: tuple[object, ...]
    input: tuple[int, ...]
    weight: tuple[int, ...]
    bias: tuple[int, ...] | None
    writes_codes: bool


@dataclass(frozen=True, slots=True)
class _Task:
    """A layer, and every choice that was asked for beside the one that an engine then runs."""

    layer: _Layer
    choices: tuple[tuple[Bits, Bits], ...]

    def as_asked(self, by_run: Mapping[Bits, T]) -> dict[Bits, T]:
        return {bits: by_run[run] for asked, run in self.choices if run in by_run for bits in (asked, run)}


@dataclass(frozen=True, slots=True)
class _Measured:
    seconds: Mapping[Bits, float]
    missing: Mapping[Bits, str]
    spread: float


def _of_batch(graph: Graph, sample: Sequence[Tensor], batch: int) -> list[Tensor]:
    firsts = [spec.shape[0] for spec in graph.input_specs if spec.shape]
    if firsts and not any(size in (None, batch) for size in firsts):
        raise UsageError(f"the model takes batches of {firsts[0]} only", expected=f"a batch of {batch}")
    return [
        tensor[torch.arange(batch) % len(tensor)] if spec.shape[:1] == (None,) else tensor
        for spec, tensor in zip(graph.input_specs, sample, strict=True)
    ]


def _tasks(graph: Graph, sample: Sequence[Tensor], choices: Sequence[Bits]) -> dict[str, _Task]:
    """Return what is to be measured, by the name of the map, in graph order."""
    sizes = dict[object, tuple[int, ...]]()

    def watch(node: fx.Node, value: Any) -> Any:
        if isinstance(value, Tensor):
            sizes[node] = tuple(value.shape)
        return value

    graph.run_watched(sample, watch)
    fixed = {
        node: request.type.bits for request in requests(graph) if not may_narrow(request) for node in request.readers
    }
    found = dict[str, _Task]()
    for node in requested_weights(graph):
        if (linear := read_linear_map(graph, node)) is None:
            continue
        layer = _Layer(
            operator=node.target,  # type: ignore[arg-type]
            options=_options(node),
            input=sizes[node.args[0]],
            weight=tuple(linear.weight.shape),
            bias=None if linear.bias is None else tuple(linear.bias.shape),
            writes_codes=_writes_codes(node),
        )
        asked = dict.fromkeys(choices)
        found[node.name] = _Task(layer, tuple((bits, _run(bits, fixed.get(node))) for bits in asked))
    return found


def _run(bits: Bits, fixed: int | None) -> Bits:
    return bits if fixed is None or bits.activation == FLOAT else Bits(bits.weight, fixed)


def _options(node: fx.Node) -> tuple[object, ...]:
    arguments = list(enumerate(node.target._schema.arguments))[3:]  # type: ignore[union-attr]
    values = (query.argument(node, index, each.name, each.default_value) for index, each in arguments)
    return tuple(tuple(value) if isinstance(value, (list, tuple)) else value for value in values)


def _writes_codes(node: fx.Node) -> bool:
    """Return whether a convolution has codes asked for what it writes, behind its ReLU; no other map writes any."""
    reader = query.only_reader(node)
    written = reader if reader is not None and query.is_call(reader, ops.RELU) else node
    return query.is_call(node, *ops.CONVOLUTIONS) and any(is_requested(each) for each in query.readers(written))


@dataclass(frozen=True, slots=True)
class _Bench:
    """Builds the engines of a layer and times them beside each other."""

    placement_of: PlacementOf
    threads: int
    timer: Timer

    def measure(self, task: _Task) -> _Measured:
        layer, runs, missing = task.layer, dict[Bits, Run](), dict[Bits, str]()
        x = torch.randn(layer.input, generator=_seeded())
        captured = cache(lambda: capture(_Alone(layer), x))
        with tempfile.TemporaryDirectory(prefix="normfuse-") as folder:
            for bits in dict.fromkeys(run for _, run in task.choices):
                try:
                    wanted = None if bits.is_float else _alone(self.placement_of(bits), layer)
                    runs[bits] = self._opened(captured().copy(), x, wanted, Path(folder) / f"{bits}.onnx")
                except (BadInput, UnsupportedModel, UsageError) as error:
                    missing[bits] = error.what
            times = self.timer(runs) if runs else {}
        middle = {bits: median(rounds) for bits, rounds in times.items()}
        spreads = [abs(each / middle[bits] - 1) for bits, rounds in times.items() for each in rounds]
        return _Measured(middle, missing, max(spreads, default=0.0))

    def _opened(self, graph: Graph, x: Tensor, wanted: Placement | None, path: Path) -> Run:
        """Return a function that runs the engine of a graph on ``x``, after a first run; None: in float."""
        if wanted is not None:
            _quantize(graph, x, wanted)
        export_onnx(graph, path)
        config = {**IDLE, **({} if wanted is None else wanted.session_config)}
        session = open_onnx(path, threads=self.threads, session_config=config)
        (name,) = graph.input_names
        run = partial(session.run, {name: x.numpy()})
        run()
        return run


class _Alone(nn.Module):
    """A linear map with random weights; all of its output is computed, but little of it handed over.

    An engine's maps hand theirs to nobody outside. And an output of the model would stay float; what is cut need not.
    """

    def __init__(self, layer: _Layer) -> None:
        super().__init__()
        generator, inner = _seeded(), math.prod(layer.weight[1:])
        self._layer = layer
        self.register_buffer("weight", torch.randn(layer.weight, generator=generator) / math.sqrt(inner))
        self.register_buffer("bias", None if layer.bias is None else torch.randn(layer.bias, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        """Return the first entries of the output along an axis that is no batch and has several, if there is one."""
        found = self._layer.operator(x, self.weight, self.bias, *self._layer.options)
        axis = max(range(found.ndim), key=lambda axis: (axis > 0 and found.shape[axis] > 1, axis))
        cut: Tensor = ops.SLICE(found, axis, 0, 1)
        return cut


def _alone(placement: Placement, layer: _Layer) -> Placement:
    """Return the placement for a layer alone: its input is no image, its output codes only where the network's are."""
    writes = placement.convolution_outputs and layer.writes_codes
    return replace(placement, model_input=None, convolution_outputs=writes)


def _quantize(graph: Graph, x: Tensor, placement: Placement) -> None:
    """Write the quantizers that a plan would, with ranges of this input and codes rounded to nearest."""
    place = Phase("precision", (PlaceQuantizers(placement=placement),))
    (report,) = Pipeline(phases=(place,), given=frozenset({Fact.FOLDED})).run(graph)
    if not requested_weights(graph):
        reasons = [f"{refusal.reason.value} ({refusal.detail})" for refusal in report.refused]
        raise UnsupportedModel(f"the target keeps it float: {', '.join(reasons)}")
    found = calibrate(graph, lambda: [(x,)], method=CalibrationMethod.MIN_MAX)
    chosen = round_all_to_nearest(graph, found.by_name)
    insert = Phase("precision", (InsertQuantizers(activations=chosen.activations, weights=chosen.weights),))
    Pipeline(phases=(insert,), given=frozenset({Fact.PLACED})).run(graph)


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)
