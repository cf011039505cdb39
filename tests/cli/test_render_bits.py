"""Bits, the front and the sensitivity on the terminal: whatever is known of them, and whatever the names are."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from normfuse.cli import render, render_bits

ATTACK = "[/x]<script>\x1b[31m\x07"
MIXED: dict[str, Any] = {
    "budget": "bytes=0.14x",
    "score": "curvature",
    "candidates": [{"score": "curvature", "loss": 0.0123}, {"score": "lrp", "loss": None}],
    "used": {"weight-bits": {"amount": 1235, "limit": 1300}, "bops": {"amount": 77}},
    "average_weight_bits": 4.31,
    "histogram": [{"bits": "w4a8", "layers": 12, "parameters": 30000}, {"bits": "w8a8", "layers": 1, "parameters": 99}],
    "layers": [{"layer": "fc", "bits": "w4a8", "parameters": 9, "macs": 9, "share": 0.1, "overridden": False}],
}
POINT: dict[str, Any] = {
    "number": 1,
    "budget": "avg-bits=4.5",
    "average_weight_bits": 4.49,
    "file_bytes": 1_234_567,
    "file": 0.15,
    "p50_ms": 0.2,
    "speedup": 1.3,
    "score": 93.1,
    "metric": "top-1",
    "drop": 0.12,
    "agreement": 99.1,
    "sqnr_db": 30.1,
    "ships": True,
}
LAYER: dict[str, Any] = {
    "layer": "blocks.0.fc",
    "kind": "weight",
    "node": "linear",
    "damage": {"4": 1e-3, "8": 2e-6},
    "share": 0.1,
}


def sensitivity(count: int) -> dict[str, Any]:
    layers = [{**LAYER, "layer": f"blocks.{at}.fc", "share": at / 1000} for at in range(count)]
    return {"method": "lrp", "facts": {"conserved": 0.99, "absorbed": 0.2}, "samples": 64, "layers": layers}


def test_what_the_layers_got_is_said_in_three_lines() -> None:
    assert render_bits.mixed(MIXED) == [
        "bits: 4.31 on average per weight; w4a8 12 layers (30,000 parameters), w8a8 1 layers (99 parameters)",
        "bits chosen by curvature, by their losses: curvature 0.0123, lrp –",
        "budget bytes=0.14x: weight-bits 1,235 of 1,300 (95.0 %), bops 77",
    ]


@pytest.mark.parametrize("key", list(MIXED))
def test_every_key_of_the_bits_may_be_missing_or_unknown(key: str) -> None:
    assert len(render_bits.mixed({name: value for name, value in MIXED.items() if name != key})) in (2, 3)
    assert len(render_bits.mixed(MIXED | {key: None})) == 3
    assert render_bits.mixed({}) == []


def test_one_score_is_not_compared() -> None:
    found = render_bits.mixed({"score": "lrp", "candidates": [{"score": "lrp", "loss": None}]})
    assert found == ["bits chosen by lrp"]


def test_the_front_has_a_row_per_point(capsys: pytest.CaptureFixture[str]) -> None:
    shown = render_bits.front({"points": [POINT, POINT | {"number": 2, "ships": False, "sqnr_db": None}]})
    assert shown is not None
    render.table(*shown)
    printed = capsys.readouterr().out
    for text in ("front: 2 points", "avg-bits=4.5", "4.49", "1.23", "15.0", "1.30x", "top-1", "93.10", "0.12", "ships"):
        assert text in printed, text
    assert shown.rows[1][-2:] == [None, ""]


@pytest.mark.parametrize("key", list(POINT))
def test_a_column_without_a_figure_is_left_out(key: str) -> None:
    whole = render_bits.front({"points": [POINT]})
    for point in (POINT | {key: None}, {name: value for name, value in POINT.items() if name != key}):
        shown = render_bits.front({"points": [point]})
        assert whole is not None
        assert shown is not None
        assert len(shown.columns) == len(whole.columns) - (key != "metric")
        assert all(len(row) == len(shown.columns) for row in shown.rows)


@pytest.mark.parametrize(
    ("amount", "shown"),
    [(872_345.6, "872,346"), (1000.0, "1,000"), (999.4, "999"), (0.01234, "0.0123"), (3, "3"), (math.inf, "inf")],
)
def test_large_amounts_are_written_out(amount: float, shown: str) -> None:
    assert render_bits.mixed({"budget": "b", "used": {"bytes": {"amount": amount}}}) == [f"budget b: bytes {shown}"]


def test_no_points_are_no_table() -> None:
    assert render_bits.front({}) is None
    assert render_bits.front({"points": []}) is None


@pytest.mark.parametrize(("count", "rows"), [(1, 1), (300, 20)])
def test_the_largest_shares_come_first(count: int, rows: int, capsys: pytest.CaptureFixture[str]) -> None:
    found = sensitivity(count)
    shown, _ = render_bits.sensitivity(found)
    assert shown is not None
    assert [row[0] for row in shown.rows] == [f"blocks.{at}.fc" for at in range(count - 1, count - 1 - rows, -1)]
    render.sensitivity(found)
    printed = capsys.readouterr().out
    assert f"the {rows} largest of {count}" in printed
    assert "by lrp; 64 samples; conserved 0.99; absorbed 0.2" in printed
    if count == 300:
        assert "29.90" in printed
        assert "2e-06" in printed


def test_no_layers_are_no_table(capsys: pytest.CaptureFixture[str]) -> None:
    render.sensitivity(sensitivity(0))
    assert capsys.readouterr().out == "by lrp; 64 samples; conserved 0.99; absorbed 0.2\n"


def test_layers_of_one_share_keep_the_networks_order() -> None:
    layers = [{**LAYER, "layer": name} for name in "cab"] + [{**LAYER, "layer": "first", "share": 0.2}]
    shown, _ = render_bits.sensitivity({"layers": [{**LAYER, "layer": "unknown", "share": None}, *layers]})
    assert shown is not None
    assert [row[0] for row in shown.rows] == ["first", "c", "a", "b", "unknown"]


@pytest.mark.parametrize("key", list(LAYER))
def test_every_key_of_a_layer_may_be_missing_or_unknown(key: str, capsys: pytest.CaptureFixture[str]) -> None:
    lacking = {name: value for name, value in LAYER.items() if name != key}
    render.sensitivity({"layers": [LAYER | {key: None}, LAYER]})
    assert "–" in capsys.readouterr().out
    render.sensitivity({"layers": [lacking]})
    render.sensitivity({})


def test_names_are_no_markup_and_no_commands_to_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    layer = {**LAYER, "layer": ATTACK, "kind": ATTACK, "node": ATTACK, "damage": {ATTACK: ATTACK}}
    render.sensitivity({"method": ATTACK, "facts": {ATTACK: ATTACK}, "layers": [layer]})
    front = render_bits.front({"points": [POINT | {"budget": ATTACK, "metric": ATTACK, "number": ATTACK}]})
    assert front is not None
    render.table(*front)
    used = {ATTACK: {"amount": ATTACK, "limit": ATTACK}}
    for text in render_bits.mixed(MIXED | {"budget": ATTACK, "score": ATTACK, "used": used}):
        render.line(text)
    printed = capsys.readouterr().out
    assert "[/x]" in printed
    assert not {"\x1b", "\x07"} & set(printed)


def test_a_report_shows_them_between_its_other_parts(capsys: pytest.CaptureFixture[str]) -> None:
    row = {"label": "int8", "peak_bytes": None, "file_bytes": 4, "agreement": None}
    found: dict[str, Any] = {
        "passes": [],
        "quantization": {},
        "checks": [],
        "accuracy_control": None,
        "comparison": {"batch": 1, "threads": 1, "baseline": "int8", "rows": [row]},
        "verdict": {"verdict": "kept", "reasons": [], "ships": "int8"},
    }
    render.report(found, Path("out"))
    plain = capsys.readouterr().out
    render.report(found | {"mixed": MIXED, "pareto": {"points": [POINT]}}, Path("out"))
    printed = capsys.readouterr().out
    assert "budget bytes=0.14x" in printed
    assert "front: 1 points" in printed
    assert set(plain.splitlines()) <= set(printed.splitlines())
