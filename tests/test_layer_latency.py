"""The table of latencies: every map and choice, equal maps measured once, read back only if it is whole."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normfuse import layer_latency
from normfuse.errors import BadInput, UnsupportedModel, UsageError
from normfuse.export.placement import onnx_placement
from normfuse.graph import Graph, capture
from normfuse.kernels.ops import DEQUANTIZE, GROUPED_LINEAR, QUANTIZE, UNPACK
from normfuse.layer_latency import Run, measure_layers, time_in_rounds
from normfuse.passes.place_quantizers import PlaceQuantizers
from normfuse.progress import Silent
from normfuse.quant.bits import Bits
from normfuse.quant.placement import Placement
from normfuse.testing import Small, randomized, sample

FLOAT, INT8, W4A8, W4A4 = Bits(32, 32), Bits(8, 8), Bits(4, 8), Bits(4, 4)
W4A16, W8A16 = Bits(4, 32), Bits(8, 32)
QUICKLY = partial(time_in_rounds, rounds=2, seconds=0.0)

placement_of = partial(onnx_placement, "avx512-vnni")


def forward(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x).relu().flatten(2)  # [1, 7, 32]
    return m.one(y) - m.other(y.tanh())  # type: ignore[no-any-return]


def placed(function: Any = forward, size: Sequence[int] = (1, 3, 6, 10), **parts: nn.Module) -> Graph:
    usual = {"conv": nn.Conv2d(3, 7, 3), "one": nn.Linear(32, 13), "other": nn.Linear(32, 13)}
    model = randomized(Small(function, **(parts or usual)))
    graph = capture(model, (sample(*size).float(),))
    PlaceQuantizers(placement=placement_of(INT8)).run(graph)
    return graph


measure = partial(measure_layers, placement_of=placement_of, threads=1, progress=Silent())
IMAGE = (sample(1, 3, 6, 10).float(),)


class FakeTimer:
    """Says 1, 2, 3, ... seconds, one figure after the other, and remembers what it was given."""

    def __init__(self) -> None:
        self.calls = list[Mapping[Bits, Run]]()
        self._told = 0

    def __call__(self, runs: Mapping[Bits, Run]) -> dict[Bits, list[float]]:
        self.calls.append(runs)
        found = dict[Bits, list[float]]()
        for bits, run in runs.items():
            run()
            self._told += 1
            found[bits] = [0.9 * self._told, float(self._told), 1.2 * self._told]
        return found


class Nothing:
    """Stands for an open engine; it makes nothing of whatever it is fed."""

    def __init__(self) -> None:
        self.fed = list[tuple[int, ...]]()

    def run(self, feeds: Mapping[str, Any]) -> None:
        self.fed += [array.shape for array in feeds.values()]


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[Graph]:
    """The graphs that would have been written: nothing is, and what is opened runs nothing."""
    graphs = list[Graph]()
    monkeypatch.setattr(layer_latency, "export_onnx", lambda graph, path: graphs.append(graph))
    monkeypatch.setattr(layer_latency, "open_onnx", lambda *given, **options: Nothing())
    return graphs


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary folders are made."""
    here = SimpleNamespace(TemporaryDirectory=partial(tempfile.TemporaryDirectory, dir=tmp_path))
    monkeypatch.setattr(layer_latency, "tempfile", here)  # this module's alone: torch keeps caches there
    return tmp_path


def targets(graph: Graph) -> list[object]:
    ours = (QUANTIZE, DEQUANTIZE, GROUPED_LINEAR, UNPACK)
    return [node.target for node in graph.nodes if node.target in ours]


def test_every_map_and_choice_is_there_and_equal_maps_are_measured_once(written: list[Graph]) -> None:
    timer, graph = FakeTimer(), placed()
    before = graph.text()
    table = measure(graph, IMAGE, [FLOAT, INT8, W4A16, INT8], timer=timer)
    assert graph.text() == before
    assert [list(call) for call in timer.calls] == [[FLOAT, INT8, W4A16]] * 2, "a convolution, and two equal linears"
    assert len(written) == 6
    assert table.seconds == {
        "conv2d": {FLOAT: 1.0, INT8: 2.0, W4A16: 3.0},
        "linear": {FLOAT: 4.0, INT8: 5.0, W4A16: 6.0},
        "linear_1": {FLOAT: 4.0, INT8: 5.0, W4A16: 6.0},
    }
    assert table.missing == {}
    assert table.spread == pytest.approx(0.2)
    assert (table.measured_on.threads, table.measured_on.batch) == (1, 1)


@pytest.mark.parametrize(
    "changed",
    [
        {"other": nn.Linear(32, 13, bias=False)},
        {"other": nn.Linear(32, 17)},
        {"other": nn.Sequential(nn.Flatten(0, 1), nn.Linear(32, 13))},
        {"one": nn.Conv1d(7, 7, 3, padding=1), "other": nn.Conv1d(7, 7, 3, padding=1, padding_mode="zeros", groups=1)},
        {"one": nn.Conv1d(7, 7, 3, padding=1), "other": nn.Conv1d(7, 7, 3, padding=2, dilation=2)},
    ],
    ids=["bias", "outputs", "rank", "equal", "dilation"],
)
def test_maps_differ_by_what_time_depends_on(
    changed: dict[str, nn.Module], written: list[Graph], request: pytest.FixtureRequest
) -> None:
    def function(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        return m.one(x), m.other(x.tanh())

    timer = FakeTimer()
    graph = placed(function, (1, 7, 32), **{"one": nn.Linear(32, 13), **changed})
    table = measure(graph, (sample(1, 7, 32).float(),), [FLOAT], timer=timer)
    assert len(table.seconds) == 2
    assert len(timer.calls) == (1 if "equal" in request.node.callspec.id else 2)


def test_layers_have_the_quantizers_of_the_network(written: list[Graph]) -> None:
    """A convolution that wrote floats behind codes would run in float: no engine has an integer kernel for it."""
    measure(placed(), IMAGE, [FLOAT, INT8, W4A16, W8A16], timer=FakeTimer())
    pair = [QUANTIZE, DEQUANTIZE]
    constants = [DEQUANTIZE] * 2
    assert [targets(graph) for graph in written] == [
        *([], [*pair, *constants, *pair], [UNPACK], [UNPACK]),
        *([], [QUANTIZE, *constants, DEQUANTIZE], [GROUPED_LINEAR], [UNPACK]),
    ]


def test_a_convolution_that_writes_floats_does_so_alone(written: list[Graph]) -> None:
    graph = placed(lambda m, x: m.conv(x), conv=nn.Conv2d(3, 7, 3))
    measure(graph, IMAGE, [INT8], timer=FakeTimer())
    assert targets(written[0]).count(QUANTIZE) == 1


def test_an_image_keeps_its_eight_bits(written: list[Graph]) -> None:
    graph = placed(lambda m, x: m.conv(x), conv=nn.Conv2d(3, 7, 3))
    table = measure(graph, IMAGE, [W4A4, W4A16], timer=(timer := FakeTimer()))
    assert [list(call) for call in timer.calls] == [[W4A8, W4A16]]
    assert table.seconds["conv2d"] == {W4A4: 1.0, W4A8: 1.0, W4A16: 2.0}


def test_elsewhere_four_bits_are_four_bits(written: list[Graph]) -> None:
    graph = placed(lambda m, x: m.a(x.tanh()), (1, 5, 17), a=nn.Linear(17, 3))
    measure(graph, (sample(1, 5, 17).float(),), [W4A4, W4A8], timer=FakeTimer())
    assert [{node.args[-1] for node in graph.nodes if node.target is QUANTIZE} for graph in written] == [{15}, {255}]


def test_a_choice_that_cannot_be_built_or_opened_is_missing(
    written: list[Graph], monkeypatch: pytest.MonkeyPatch
) -> None:
    def placement(bits: Bits) -> Placement:
        if bits == W4A8:
            raise UsageError("four bits are not for this target")
        return placement_of(bits)

    def opened(path: Path, **options: object) -> Nothing:
        if path.stem == "8":
            raise BadInput("onnxruntime cannot open the model", where=str(path))
        return Nothing()

    monkeypatch.setattr(layer_latency, "open_onnx", opened)
    table = measure(placed(), IMAGE, [FLOAT, INT8, W4A8], placement_of=placement, timer=FakeTimer())
    assert [set(row) for row in table.seconds.values()] == [{FLOAT}] * 3
    why = {INT8: "onnxruntime cannot open the model", W4A8: "four bits are not for this target"}
    assert table.missing == dict.fromkeys(("conv2d", "linear", "linear_1"), why)


def test_what_the_target_keeps_in_float_is_no_figure_of_codes(written: list[Graph]) -> None:
    def choosy(bits: Bits) -> Placement:
        return replace(placement_of(bits), smallest_inner=30)

    table = measure(placed(), IMAGE, [FLOAT, INT8], placement_of=choosy, timer=FakeTimer())
    assert set(table.seconds["conv2d"]) == {FLOAT}
    assert "27 inputs per output" in table.missing["conv2d"][INT8]
    assert set(table.seconds["linear"]) == {FLOAT, INT8}


def test_nothing_can_be_built(written: list[Graph], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(graph: Graph, path: Path) -> None:
        raise UnsupportedModel("no")

    monkeypatch.setattr(layer_latency, "export_onnx", refuse)
    table = measure(placed(), IMAGE, [FLOAT], timer=(timer := FakeTimer()))
    assert (timer.calls, table.spread) == ([], 0.0)
    assert table.seconds == {"conv2d": {}, "linear": {}, "linear_1": {}}
    assert table.missing == {name: {FLOAT: "no"} for name in table.seconds}


def test_the_batch_is_what_engines_are_fed(written: list[Graph], monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Nothing()
    monkeypatch.setattr(layer_latency, "open_onnx", lambda *given, **options: engine)
    table = measure(placed(), IMAGE, [FLOAT], batch=5, timer=FakeTimer())
    assert set(engine.fed) == {(5, 3, 6, 10), (5, 7, 32)}
    assert table.measured_on.batch == 5


def test_of_several_samples_only_the_batch_is_taken() -> None:
    graph = placed(lambda m, x: m.a(x), (1, 5, 17), a=nn.Linear(17, 3))
    tasks = layer_latency._tasks(graph, layer_latency._of_batch(graph, [torch.ones(4, 5, 17)], 3), [FLOAT])
    assert [task.layer.input for task in tasks.values()] == [(3, 5, 17)]


def test_a_fixed_batch_is_the_only_one(written: list[Graph]) -> None:
    graph = placed(lambda m, x: m.a(x.reshape(4, 16)), (2, 32), a=nn.Linear(16, 5))
    assert list(measure(graph, (sample(2, 32).float(),), [FLOAT], batch=2, timer=FakeTimer()).seconds) == ["linear"]
    with pytest.raises(UsageError, match="batches of 2 only"):
        measure(graph, (sample(2, 32).float(),), [FLOAT], batch=3, timer=FakeTimer())


def test_every_round_has_a_turn_for_each_and_figures_are_positive() -> None:
    ran = list[Bits]()
    found = time_in_rounds({bits: partial(ran.append, bits) for bits in (FLOAT, INT8)}, rounds=3, seconds=0.0)
    assert {bits: len(rounds) for bits, rounds in found.items()} == {FLOAT: 3, INT8: 3}
    assert all(0 < seconds < math.inf for rounds in found.values() for seconds in rounds)
    turns = ran[6:]  # behind the warm-up: a run that is not timed, and one that is
    assert turns == [*[FLOAT] * 2, *[INT8] * 2, *[INT8] * 2, *[FLOAT] * 2, *[FLOAT] * 2, *[INT8] * 2]


def test_a_turn_lasts_as_long_as_it_should() -> None:
    ran = list[int]()
    time_in_rounds({FLOAT: lambda: ran.append(1)}, rounds=1, seconds=0.002)
    assert len(ran) > 10, "an append takes far less than 200 us"


@pytest.mark.slow
def test_real_engines_of_every_choice_are_timed(folder: Path) -> None:
    choices = [FLOAT, INT8, W4A8, W4A4, W4A16, W8A16]
    table = measure(placed(), IMAGE, choices, timer=QUICKLY)
    assert table.missing == {}
    assert list(table.seconds) == ["conv2d", "linear", "linear_1"]
    assert all(set(row) == set(choices) for row in table.seconds.values())
    assert all(0 < seconds < math.inf for row in table.seconds.values() for seconds in row.values())
    assert table.seconds["linear"] == table.seconds["linear_1"]
    assert list(folder.iterdir()) == [], "temporary files are removed"


def test_a_real_engine_is_timed_and_its_files_are_removed(folder: Path) -> None:
    graph = placed(lambda m, x: m.a(x), (1, 5, 17), a=nn.Linear(17, 3))
    table = measure(graph, (sample(1, 5, 17).float(),), [INT8], timer=QUICKLY)
    assert table.missing == {}
    assert table.seconds["linear"][INT8] > 0
    assert list(folder.iterdir()) == []


def test_the_layer_module_computes_what_the_map_would() -> None:
    """What is measured has the size of the real thing before it is cut."""
    layer = layer_latency._Layer(
        operator=torch.ops.aten.conv2d.default,
        options=((2, 1), (0, 1), (1, 1), 3),
        input=(2, 6, 9, 7),
        weight=(15, 2, 3, 3),
        bias=(15,),
        writes_codes=False,
    )
    assert layer_latency._Alone(layer)(torch.randn(layer.input)).shape == (2, 15, 4, 1)
