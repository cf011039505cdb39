"""Bits that the user gives to layers by name win, whatever the others get."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mixed_network import LAYERS, bits_of, compiled, expected, images, network, stored

from normfuse.built import Built
from normfuse.errors import UsageError
from normfuse.graph import query
from normfuse.graph.quantization import requested_weights, requests
from normfuse.kernels.ops import QUANTIZE
from normfuse.planning import Plan
from normfuse.quant.allocation import BudgetTooSmall
from normfuse.quantizing import Quantizing


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    """The plans whose engines are written, in order."""
    found, real = list[Plan](), Quantizing._write

    def watched(self: Quantizing, plan: Plan) -> Any:
        found.append(plan)
        return real(self, plan)

    monkeypatch.setattr(Quantizing, "_write", watched)
    return found


def requested(plan: Plan) -> dict[str, tuple[int, int | None]]:
    """The bits of every layer's weight, and of the codes that it reads (None: floats), in the graph with requests."""
    read = {reader: request.type.bits for request in requests(plan.graph) for reader in request.readers}
    return {
        query.layer_of(node) or node.name: (request.type.bits, read.get(node))
        for node, request in requested_weights(plan.graph).items()
    }


def read_codes(plan: Plan) -> list[int]:
    """How many codes activations have in the simulation, in its order."""
    graph, _ = plan.simulated()
    return [int(node.args[-1]) + 1 for node in graph.nodes if node.target is QUANTIZE]  # type: ignore[arg-type]


def simulation_is_what_runs(built: Built) -> None:
    assert all(check["holds"] for check in built.report["checks"]), built.report["checks"]
    assert built.report["verdict"]["ships"] != "float"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bits", "overrides", "wanted"),
    [
        ("8", "up=w4a8 head=32", {"patch": (8, 8), "up": (4, 8), "down": (8, 8)}),
        ("w4a4", "*=8 down=w3a6", {"patch": (8, 8), "up": (8, 8), "down": (3, 6), "head": (8, 8)}),
        ("w4a8", "d*=w8a16 patch=w6a8", {"patch": (6, 8), "up": (4, 8), "down": (8, None), "head": (4, 8)}),
        ("w4a16", "head=32 up=w8a16", {"patch": (4, None), "up": (8, None), "down": (4, None)}),
    ],
    ids=["8", "w4a4", "w4a8", "w4a16"],
)
def test_overrides_win_over_one_width(
    bits: str, overrides: str, wanted: dict[str, tuple[int, int | None]], plans: list[Plan]
) -> None:
    built = compiled(bits=bits, overrides=overrides)
    simulation_is_what_runs(built)
    assert requested(plans[-1]) == wanted
    held = {layer: "float" if layer not in wanted else f"w{4 if wanted[layer][0] <= 4 else 8}a8" for layer in LAYERS}
    assert stored(built.engine.path) == expected(held)
    codes = [width for _, width in wanted.values() if width is not None]
    written = [8] if bits != "w4a16" else []  # by the convolution
    assert sorted(read_codes(plans[-1])) == sorted(1 << width for width in (*codes, *written))


@pytest.mark.slow
def test_overrides_win_over_mixed_bits(plans: list[Plan]) -> None:
    built = compiled(budget="avg-bits=8", overrides="up=w4a8 *ad=32 patch=w3a8", activation_widths="4,8")
    simulation_is_what_runs(built)
    layers = {each["layer"]: each for each in built.report["mixed"]["layers"]}
    assert {layer: each["overridden"] for layer, each in layers.items()} == {
        "patch": True,
        "up": True,
        "down": False,
        "head": True,
    }
    assert {layer: each["bits"] for layer, each in layers.items() if each["overridden"]} == {
        "patch": "w3a8",
        "up": "w4a8",
        "head": "float",
    }
    assert requested(plans[-1]) == {"patch": (3, 8), "up": (4, 8), "down": (8, 8)}
    held = {"patch": "w4a8", "up": "w4a8", "down": layers["down"]["bits"], "head": "float"}
    assert stored(built.engine.path) == expected(held)
    used = built.report["mixed"]["used"]["avg-bits"]["amount"]
    bits = {"patch": 3, "up": 4, "down": 8, "head": 32}
    assert used == pytest.approx(sum(LAYERS[layer] * bits[layer] for layer in LAYERS) / sum(LAYERS.values()))


@pytest.mark.slow
def test_what_is_given_counts_towards_the_budget() -> None:
    built = compiled(budget="avg-bits=6.5", overrides="up=8")
    assert {layer: bits_of(built)[layer] for layer in ("patch", "up", "down")} == {
        "patch": "w4a8",
        "up": "w8a8",
        "down": "w4a8",
    }
    with pytest.raises(BudgetTooSmall, match=r"the budget avg-bits=6 cannot be met: the least is avg-bits=6\.4"):
        compiled(budget="avg-bits=6", overrides="up=8")


@pytest.mark.slow
def test_only_weights_are_given_bits_where_activations_are_float(plans: list[Plan]) -> None:
    built = compiled(budget="avg-bits=22", activation_widths="16", overrides="up=32 down=w3a16")
    simulation_is_what_runs(built)
    assert (bits_of(built)["up"], bits_of(built)["down"]) == ("float", "w3a16")
    assert "up" not in requested(plans[-1])
    assert requested(plans[-1])["down"] == (3, None)
    assert stored(built.engine.path)["up"] == "float32"


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"bits": "8"}, {"budget": "avg-bits=6"}])
@pytest.mark.parametrize(
    ("overrides", "said", "hint"),
    [
        ("heed=8", "overrides cannot have heed: no layer ", "did you mean head?"),
        ("up=8 own=4", "overrides cannot have own: no layer ", "did you mean *own*?"),
        ("zzz=8", "overrides cannot have zzz: no layer ", ""),
    ],
)
def test_a_name_of_no_layer_is_refused_with_one_that_is_near(
    options: dict[str, Any], overrides: str, said: str, hint: str
) -> None:
    with pytest.raises(UsageError) as caught:
        compiled(overrides=overrides, **options)
    assert caught.value.what.startswith(said)
    assert caught.value.hint == hint
    assert caught.value.expected == "names such as down, head, patch, up"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "overrides", "expected"),
    [
        ({"bits": "8"}, "patch=w8a4", "patch=w8a8"),
        ({"bits": "w4a16"}, "up=8", "up=w8a16"),
        ({"budget": "avg-bits=6", "activation_widths": "16"}, "d*=w4a4", "down=w4a16"),
    ],
    ids=["an image", "one width", "mixed"],
)
def test_activations_that_have_no_such_codes_are_refused_with_what_they_may_have(
    options: dict[str, Any], overrides: str, expected: str
) -> None:
    with pytest.raises(UsageError, match="overrides cannot have") as caught:
        compiled(overrides=overrides, **options)
    assert expected in caught.value.expected


@pytest.mark.slow
def test_what_is_given_runs() -> None:
    built = compiled(bits="8", overrides="up=32 down=32", effort=1)
    given = images(32, seed=5)
    (found,) = built.session()(x=given).values()
    with torch.no_grad():
        wanted = network()(torch.from_numpy(given))
    assert (torch.from_numpy(found) - wanted).square().sum() < 0.01 * wanted.square().sum()
