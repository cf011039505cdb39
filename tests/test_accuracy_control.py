"""The search for the blocks that must be put back, with engines whose drop is known."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normfuse
from normfuse.accuracy_control import AccuracyControl, Control
from normfuse.export.placement import onnx_placement
from normfuse.graph import capture
from normfuse.graph.quantization import requested_weights
from normfuse.planning import Plan, plan_quantization
from normfuse.precision.put_back import output_error
from normfuse.progress import Silent
from normfuse.quant.bits import Bits
from normfuse.recipe import Recipe
from normfuse.testing import Small, randomized, seeded

LAYERS = ("first", "second", "third", "fourth", "fifth")


def network(m: Any, x: Tensor) -> Tensor:
    for layer in LAYERS:
        x = x + torch.tanh(getattr(m, layer)(x))
    return x


def model() -> nn.Module:
    return randomized(Small(network, **{name: nn.Linear(12, 12) for name in LAYERS}))


def plan(bits: str) -> Plan:
    graph, x = capture(model(), (torch.zeros(2, 12),)), torch.randn(48, 12, generator=seeded(1))
    precision = Bits.parse(bits)
    return plan_quantization(
        graph,
        lambda: ([row[None]] for row in x),
        recipe=Recipe(bits=bits, effort=0),
        placement=onnx_placement("avx512_vnni", precision),
        total=48,
        progress=Silent(),
    )


@dataclass
class Scored:
    """Drops by how many of the maps have more than three bits; every build is counted."""

    drops: dict[int, float]
    built: list[int] = field(default_factory=list)

    def build(self, plan: Plan) -> Any:
        weights = plan.decided.quantization.weights.values()
        low = sum(weight.params.type.bits == 3 for weight in weights)
        self.built.append(len(LAYERS) - low)
        return SimpleNamespace(raised=len(LAYERS) - low, quantized=len(weights))

    def drop_of(self, engine: Any) -> float:
        return self.drops[engine.raised]


def control(scored: Scored, *, allowed: float, levels: Any = None, bits: str = "w3a8") -> Control:
    levels = {"8": onnx_placement("avx512_vnni"), "float": None} if levels is None else levels
    search: Any = {"build": scored.build, "drop_of": scored.drop_of}
    found = AccuracyControl(levels=levels, allowed=allowed, progress=Silent(), **search)
    return found.run(plan(bits), lambda: ([row[None]] for row in torch.randn(40, 12, generator=seeded(2))))


def test_nothing_is_put_back_where_the_drop_is_allowed() -> None:
    scored = Scored({0: 0.5})
    found = control(scored, allowed=0.5)
    assert scored.built == [0]
    assert found.chosen.backs == ()
    assert found.as_dict()["holds"] is True


@pytest.mark.parametrize("needed", [1, 2, 3, 4, 5])
def test_the_fewest_blocks_that_are_enough(needed: int) -> None:
    scored = Scored({count: 3.0 - count if count >= needed else 9.0 - count for count in range(6)})
    found = control(scored, allowed=3.0 - needed)
    assert len(found.chosen.backs) == needed
    assert found.chosen.drop == 3.0 - needed
    assert len(scored.built) <= 2 + math.ceil(math.log2(5))
    assert {back.level for back in found.chosen.backs} == {"8"}


def test_blocks_come_back_in_the_order_of_what_they_mend() -> None:
    found = control(Scored({count: 5.0 - count for count in range(6)}), allowed=0.0)
    effects = [back.effect for back in found.chosen.backs]
    assert effects == sorted(effects, reverse=True)
    assert effects[0] > 0
    assert sorted(layer for back in found.chosen.backs for layer in back.layers) == sorted(LAYERS)


def test_float_is_next_where_eight_bits_are_not_enough() -> None:
    drops = {0: 9.0, 5: 4.0}

    class OfFloats(Scored):
        def drop_of(self, engine: Any) -> float:
            return self.drops[engine.raised] if engine.quantized == 5 else engine.quantized / 2

    found = control(OfFloats(drops), allowed=1.2)
    levels = [back.level for back in found.chosen.backs]
    assert levels == ["8", "8", "float", "float", "float"]
    layers = [layer for back in found.chosen.backs for layer in back.layers]
    assert sorted(layers) == sorted(LAYERS), "no block is told twice"


def test_the_best_that_was_found_where_nothing_is_enough() -> None:
    scored = Scored({0: 9.0, 4: 2.5, 5: 3.0})
    found = control(scored, allowed=1.0, levels={"8": onnx_placement("avx512_vnni")})
    assert found.chosen.drop == 3.0
    assert found.as_dict()["holds"] is False


def test_eight_bits_go_back_to_float() -> None:
    class OfFloats(Scored):
        def drop_of(self, engine: Any) -> float:
            return 4.0 if engine.quantized > 3 else 0.25

    found = control(OfFloats({}), allowed=1.0, bits="8", levels={"float": None})
    assert [back.level for back in found.chosen.backs] == ["float", "float"]
    assert len(requested_weights(found.chosen.plan.graph)) == 3


def labelled(model: nn.Module, count: int) -> dict[str, Any]:
    x = torch.randn(count, 12, generator=seeded(3))
    with torch.no_grad():
        return {"x": x.numpy(), "label": model(x).argmax(1).numpy()}


@pytest.mark.slow
def test_a_compile_reports_what_was_put_back() -> None:
    exact = model()
    built = normfuse.compile(
        exact,
        [torch.zeros(2, 12)],
        calibration=torch.randn(64, 12, generator=seeded(1)).numpy(),
        evaluation=labelled(exact, 500),
        recipe=Recipe(bits="w2a8", effort=0, max_drop=2.0, benchmark=False, threads=1),
    )
    found = built.report["accuracy_control"]
    assert found["trials"][0]["drop"] > 2.0
    assert found["drop"] <= 2.0
    assert found["put_back"]
    assert built.report["verdict"]["verdict"] == "partly kept"
    assert built.report["verdict"]["reasons"][0].startswith("put back for accuracy: ")
    assert built.report["verdict"]["ships"] == "w2a8"
    assert built.holds
    (row,) = [row for row in built.report["comparison"]["rows"] if row["label"] == "w2a8"]
    assert 100.0 - row["top_1"] == pytest.approx(found["drop"])


@pytest.mark.slow
def test_what_cannot_be_reached_falls_back() -> None:
    """One linear map is one block: eight bits are not enough, and in float nothing would be quantized."""
    exact = randomized(nn.Linear(12, 12))
    built = normfuse.compile(
        exact,
        [torch.zeros(2, 12)],
        calibration={"input": torch.randn(64, 12, generator=seeded(1)).numpy()},
        evaluation={"input": (given := labelled(exact, 500))["x"], "label": given["label"]},
        recipe=Recipe(bits="w2a8", effort=0, max_drop=0.0, benchmark=False, threads=1),
    )
    assert not built.holds
    assert built.report["accuracy_control"]["holds"] is False
    assert [len(built.report["accuracy_control"][name]) for name in ("put_back", "trials")] == [1, 2]
    assert built.report["verdict"]["ships"] == "float"


def test_activations_that_get_more_bits_get_ranges_for_them() -> None:
    """Ranges for three bits are clipped far too much for eight."""
    scored = Scored({**dict.fromkeys(range(5), 9.0), 5: 0.0})
    found = control(scored, allowed=0.0, levels={"8": onnx_placement("avx512_vnni")}, bits="w3a3")
    everything = found.trials[1].plan.decided
    assert {weight.params.type.bits for weight in everything.quantization.weights.values()} == {8}
    chunks = [(torch.randn(64, 12, generator=seeded(3)),)]
    wanted = [everything.graph.run(*chunks[0])]
    errors = [output_error(each, chunks, wanted) for each in (everything, plan("8").decided)]
    assert errors[0] <= 1.1 * errors[1]
