"""Bits of every layer under budgets, from the samples to the finished file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mixed_network import LAYERS, bits_of, compiled, expected, images, network, size, stored
from torch import Tensor, nn

import normfuse
from normfuse import count_resources, mixing
from normfuse.bench.timing import Timing
from normfuse.errors import UsageError
from normfuse.graph import Graph
from normfuse.graph.quantization import requested_weights
from normfuse.latency_table import Conditions, LatencyTable
from normfuse.quant.allocation import BudgetTooSmall
from normfuse.quant.bits import Bits
from normfuse.quant.budget import Limit
from normfuse.recipe import Recipe
from normfuse.testing import Small, randomized

WEIGHTS = sum(LAYERS.values())


def weight_bits(built: normfuse.Built) -> float:
    """The average bits per weight, from the report's layers."""
    widths = {"w4a8": 4, "w8a8": 8, "w4a16": 4, "w8a16": 8, "float": 32}
    return sum(LAYERS[layer] * widths[bits] for layer, bits in bits_of(built).items()) / WEIGHTS


def least_of(budget: str, **options: Any) -> Limit:
    """The least that a budget must allow, as the refusal tells it."""
    with pytest.raises(BudgetTooSmall) as caught:
        compiled(budget=budget, **options)
    return Limit.parse(caught.value.what.rpartition(" ")[2])


@pytest.mark.slow
@pytest.mark.parametrize("budget", ["bytes=24kB", "bytes=0.37x"])
def test_a_file_is_no_larger_than_its_budget_and_holds_what_the_report_says(budget: str) -> None:
    built = compiled(budget=budget)
    used = built.report["mixed"]["used"]["bytes"]
    assert size(built) <= used["amount"] <= used["limit"] < 27_000
    assert used["amount"] - size(built) < 0.05 * size(built), "what is no weight was read off a file"
    assert set(bits_of(built).values()) == {"w4a8", "w8a8"}
    assert stored(built.engine.path) == expected(bits_of(built))
    assert (built.holds, built.report["verdict"]["ships"]) == (True, "mixed")
    assert all(check["holds"] for check in built.report["checks"]), built.report["checks"]
    assert (built.report["mixed"]["budget"], built.report["mixed"]["score"]) == (budget, "random")


@pytest.mark.slow
@pytest.mark.parametrize(
    "widths",
    [
        {},
        {"activation_widths": "16"},
        {"activation_widths": "8,16"},
        {"weight_widths": "2,3,4,5,8,32", "activation_widths": "3,8"},
    ],
    ids=["target", "weights alone", "floats beside codes", "all"],
)
def test_the_least_that_a_refusal_tells_can_be_built(widths: Mapping[str, Any]) -> None:
    least = least_of("bytes=1kB", **widths)
    built = compiled(budget=str(least), **widths)
    assert size(built) <= least.amount
    assert least_of("bytes=10kB", **widths) == least


@pytest.mark.slow
@pytest.mark.parametrize(
    ("widths", "average"),
    [
        ({}, 6),
        ({"weight_widths": "4,8,32"}, 12),
        ({"weight_widths": "4,8,32", "activation_widths": "16"}, 5),
        ({"activation_widths": "8,16"}, 5),
    ],
    ids=["target", "floats", "weights alone", "floats beside codes"],
)
def test_average_bits_are_counted_over_all_weights(widths: Mapping[str, Any], average: int) -> None:
    built = compiled(budget=f"avg-bits={average}", **widths)
    found = built.report["mixed"]
    assert found["used"]["avg-bits"] == {"amount": pytest.approx(weight_bits(built)), "limit": average}
    assert 4 < weight_bits(built) <= average
    assert found["average_weight_bits"] == found["used"]["avg-bits"]["amount"]
    assert stored(built.engine.path) == expected(bits_of(built))
    assert sum(each["parameters"] for each in found["histogram"]) == WEIGHTS
    assert {each["bits"]: each["layers"] for each in found["histogram"]} == {
        bits: [*bits_of(built).values()].count(bits) for bits in bits_of(built).values()
    }
    if "activation_widths" in widths:
        assert any(bits.endswith("a16") for bits in bits_of(built).values())
    if "weight_widths" in widths:
        assert "float" in bits_of(built).values()


@pytest.mark.slow
def test_bops_count_both_widths_and_an_image_keeps_eight_bits() -> None:
    built = compiled(budget="bops=0.03x", weight_widths="2,4,8", activation_widths="4,8")
    layers = {each["layer"]: each for each in built.report["mixed"]["layers"]}
    assert layers["patch"]["bits"].endswith("a8")
    assert {layer: each["macs"] for layer, each in layers.items()} == {
        **{layer: 6 * LAYERS[layer] for layer in ("patch", "up", "down")},
        "head": LAYERS["head"],
    }
    bops = sum(each["macs"] * int(each["bits"][1]) * int(each["bits"][3]) for each in layers.values())
    whole = sum(each["macs"] for each in layers.values()) * 32 * 32
    used = built.report["mixed"]["used"]["bops"]
    assert used == {"amount": bops, "limit": pytest.approx(0.03 * whole)}
    assert bops <= 0.03 * whole
    assert any(each["bits"].endswith("a4") for each in layers.values())


@pytest.mark.slow
def test_activation_bytes_are_told_once_and_narrow_what_is_held() -> None:
    wide = compiled(budget="activation-bytes=1x", activation_widths="8,16")
    held = wide.report["mixed"]["used"]["activation-bytes"]
    least = least_of("activation-bytes=1", activation_widths="8,16")
    assert least.amount < held["amount"] <= held["limit"]
    narrow = compiled(budget=str(least), activation_widths="8,16")
    used = narrow.report["mixed"]["used"]
    assert set(used) == {"avg-bits", "bops", "activation-bytes"}
    assert used["activation-bytes"]["amount"] <= used["activation-bytes"]["limit"] == least.amount
    codes = [sum(bits.endswith("a8") for bits in bits_of(built).values()) for built in (wide, narrow)]
    assert codes[0] < codes[1]


@pytest.mark.slow
def test_a_drop_is_kept_by_fewer_bits_than_all_and_nothing_is_put_back() -> None:
    built = compiled(budget="drop=20", max_drop=0.5)
    assert built.report["accuracy_control"]["put_back"] == []
    (row,) = [each for each in built.report["comparison"]["rows"] if each["label"] == "mixed"]
    assert row["ratios"]["drop"] <= 20
    assert 4 <= weight_bits(built) < 8
    assert built.holds
    assert "a drop of 20.00 is allowed" in " ".join(built.report["verdict"]["reasons"])


@pytest.mark.slow
def test_a_drop_is_refused_without_labels_and_where_nothing_keeps_it() -> None:
    with pytest.raises(UsageError, match="the budget drop=20 needs labelled samples"):
        compiled(budget="drop=20", labels=False)
    with pytest.raises(BudgetTooSmall, match=r"the budget drop=0\.001 cannot be met: the least is drop="):
        compiled(budget="drop=0.001", weight_widths="2")


@pytest.mark.slow
@pytest.mark.parametrize("budget", ["bytes=1kB", "avg-bits=3", "bops=1", "activation-bytes=1", "avg-bits=4 bytes=16kB"])
def test_what_cannot_be_met_is_refused_before_anything_is_scored(
    budget: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    scored = list[object]()
    monkeypatch.setattr(mixing, "scores_of", lambda *given, **options: scored.append(given))
    with pytest.raises(BudgetTooSmall) as caught:
        compiled(budget=budget, resume=tmp_path / "work")
    assert (caught.value.exit_code, scored) == (2, [])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_two_budgets_are_both_kept() -> None:
    alone = compiled(budget="avg-bits=7.5")
    built = compiled(budget="bytes=23kB avg-bits=7.5")
    used = built.report["mixed"]["used"]
    assert size(alone) > 23_000 >= used["bytes"]["amount"] >= size(built)
    assert weight_bits(built) < weight_bits(alone) <= used["avg-bits"]["limit"] == 7.5
    assert built.report["mixed"]["budget"] == "bytes=23kB avg-bits=7.5"


@pytest.mark.slow
def test_the_default_judges_several_scores() -> None:
    built = compiled(budget="avg-bits=6", score="default")
    losses = [each["loss"] for each in built.report["mixed"]["candidates"]]
    assert {each["score"] for each in built.report["mixed"]["candidates"]} == {"curvature", "kl", "sqnr", "uniform"}
    assert built.report["mixed"]["score"] == built.report["mixed"]["candidates"][0]["score"]
    assert losses == sorted(losses, key=lambda loss: loss or 0.0)
    assert sum(each["share"] for each in built.report["mixed"]["layers"]) == pytest.approx(1)


class FakeClock:
    """Layers and engines take what their bits and names say; what is asked for is remembered."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, whole: float = 10e-3) -> None:
        self.batches, self.shapes = list[int](), list[tuple[int, ...]]()
        self._whole = whole
        monkeypatch.setattr(count_resources, "measure_layers", self.layers)
        monkeypatch.setattr(count_resources, "time_engines", self.engines)

    def layers(
        self, graph: Graph, sample: Sequence[Tensor], choices: Sequence[Bits], *, batch: int, **_: Any
    ) -> LatencyTable:
        self.batches.append(batch)
        self.shapes.append(tuple(sample[0].shape))
        seconds = {node.name: {bits: bits.weight * 50e-6 for bits in choices} for node in requested_weights(graph)}
        here = Conditions(processor="", instruction_set="", onnxruntime="", threads=1, batch=batch)
        return LatencyTable(seconds=seconds, measured_on=here, spread=0.0)

    def engines(self, engines: Sequence[Any], *, batch: int, inputs: Any, **_: Any) -> dict[str, Timing]:
        self.batches.append(batch)
        with np.load(inputs) as arrays:
            self.shapes += [array.shape for array in arrays.values()]
        return {each.label: Timing.of([[self._whole * 1e3]], batch=batch) for each in engines}


@pytest.mark.slow
def test_a_latency_is_that_of_all_layers_and_what_is_beside_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four layers of 1.6 ms in float, 0.4 ms at 8 bits and 0.2 ms at 4; 10 ms for all, so 3.6 ms beside them."""
    clock = FakeClock(monkeypatch)
    built = compiled(budget="latency=0.48x")
    used = built.report["mixed"]["used"]["latency"]
    assert used["limit"] == pytest.approx(4.8e-3)
    assert used["amount"] == pytest.approx(4.8e-3)
    assert sorted(bits_of(built).values()) == ["w4a8", "w4a8", "w8a8", "w8a8"]
    assert (clock.batches, clock.shapes) == ([1, 1], [(1, 2, 9, 6)] * 2)


@pytest.mark.slow
def test_a_latency_below_the_least_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeClock(monkeypatch)
    with pytest.raises(BudgetTooSmall, match=r"the budget latency=4\.3ms cannot be met: the least is latency=4\.4ms"):
        compiled(budget="latency=4.3ms")


@pytest.mark.slow
def test_layers_that_take_longer_than_the_engine_share_their_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """The float layers take 6.4 ms, the engine 4.8 ms: each layer has a call of 0.4 ms too much."""
    FakeClock(monkeypatch, whole=4.8e-3)
    built = compiled(budget="latency=1us", weight_widths="4,8")
    assert built.report["mixed"]["used"]["latency"]["amount"] == pytest.approx(0.0)


@pytest.mark.slow
def test_a_layer_that_cannot_be_measured_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeClock(monkeypatch)

    def without(*given: Any, **options: Any) -> LatencyTable:
        table = clock.layers(*given, **options)
        missing = {next(iter(table.seconds)): {Bits(4, 8): "no kernel"}}
        return LatencyTable(seconds=table.seconds, missing=missing, measured_on=table.measured_on, spread=0.0)

    monkeypatch.setattr(count_resources, "measure_layers", without)
    with pytest.raises(UsageError, match=r"the latency cannot be limited: .* was not measured with w4a8") as caught:
        compiled(budget="latency=0.8x")
    assert "no kernel" in caught.value.expected


@pytest.mark.slow
def test_a_fixed_batch_is_what_latencies_are_measured_at(monkeypatch: pytest.MonkeyPatch) -> None:
    def fixed(m: Any, image: Tensor) -> Tensor:
        x = m.patch(image).reshape(4, 64, 6).mean(dim=2)
        return m.head(x)  # type: ignore[no-any-return]

    clock = FakeClock(monkeypatch)
    model = randomized(Small(fixed, patch=nn.Conv2d(2, 64, 3, 3), head=nn.Linear(64, 5)))
    recipe = Recipe(bits="mixed", budget="latency=0.8x", score="random", effort=0, threads=1, benchmark=False)
    built = normfuse.compile(
        model, [torch.randn(4, 2, 9, 6)], calibration={"x": images()}, recipe=recipe.with_options(max_drop=100)
    )
    assert clock.batches == [4, 4]
    assert clock.shapes == [(4, 2, 9, 6)] * 2
    assert built.report["mixed"]["used"]["latency"]["limit"] == pytest.approx(8e-3)


@pytest.mark.slow
def test_more_samples_than_are_scored_in_one_batch() -> None:
    """A batch may be larger than what is scored and what judges together: then it does both."""

    def fixed(m: Any, image: Tensor) -> Tensor:
        return m.head(m.patch(image).reshape(130, 64, 6).mean(dim=2))  # type: ignore[no-any-return]

    model = randomized(Small(fixed, patch=nn.Conv2d(2, 64, 3, 3), head=nn.Linear(64, 5)))
    recipe = Recipe(bits="mixed", budget="avg-bits=6", effort=0, threads=1, benchmark=False)
    built = normfuse.compile(
        model, [torch.randn(130, 2, 9, 6)], calibration={"x": images(130)}, recipe=recipe.with_options(max_drop=100)
    )
    assert built.report["mixed"]["average_weight_bits"] <= 6


@pytest.mark.slow
def test_what_is_saved_computes_what_the_network_does(tmp_path: Path) -> None:
    built = compiled(budget="avg-bits=7", effort=1, score="curvature")
    built.save(tmp_path / "artifact")
    given = images(64, seed=5)
    found = normfuse.load(tmp_path / "artifact")(x=given)
    (output,) = [torch.from_numpy(each) for each in found.values()]
    with torch.no_grad():
        wanted = network()(torch.from_numpy(given))
    assert (output - wanted).square().sum() < 0.05 * wanted.square().sum()
    assert Recipe.read(tmp_path / "artifact" / "recipe.toml") == built.recipe
