from __future__ import annotations

import json
from fractions import Fraction
from html.parser import HTMLParser
from typing import Any

import pytest

from normfuse.bench.accuracy import Closeness, Metric, Score
from normfuse.bench.comparison import Comparison, Row
from normfuse.bench.environment import describe_environment
from normfuse.bench.timing import Timing
from normfuse.bench.verdict import judge
from normfuse.page import render_page
from normfuse.report import PassReport, Reason, Refusal

VOID = {"meta", "br", "hr", "img", "link", "input"}


class Reader(HTMLParser):
    """Checks that tags nest and collects text, tags and attributes."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == []
    return reader


def report() -> dict[str, Any]:
    def timing(*rounds: float) -> Timing:
        return Timing.of([[value] for value in rounds], batch=2)

    rows = (
        Row(
            label="float",
            timing=timing(4.0, 4.0),
            peak_bytes=80_000_000,
            file_bytes=4_000_000,
            score=Score(Metric.TOP_1, Fraction(96, 100), 100),
        ),
        Row(
            label="int8",
            timing=timing(2.0, 1.0),
            peak_bytes=70_000_000,
            file_bytes=1_250_000,
            score=Score(Metric.TOP_1, Fraction(95, 100), 100),
        ),
    )
    comparison = Comparison(rows=rows, baseline="float", batch=2, threads=1)
    passes = (
        PassReport(
            name="fold-affine",
            applied={"into-producer": 1},
            refused=(Refusal("mul_3", Reason.STREAM_READER, "head", layer="blocks.1.norm"),),
            sites=({"affine": "norm1", "into": "qkv", "formula": "W * a"},),
        ),
    )
    return {
        "model": {"kind": "module", "inputs": [{"name": "image", "shape": [None, 3], "dtype": "float32"}], "notes": []},
        "recipe": "bits = 8\n",
        "passes": [found.as_dict() for found in passes],
        "quantization": {
            "constants_by_type": {"int8": 750, "float32": 250},
            "effective_bits": 14.0,
            "samples": 128,
            "tensors": {
                "relu": {
                    "layer": "patch.1",
                    "range": [0.0, 2.13],
                    "observed": [0.0, 2.43],
                    "method": "mse",
                    "relative_errors": {"min-max": 1.2311, "mse": 1.0},
                },
            },
        },
        "checks": [
            {"name": "fold", "value": 4e-16, "bound": 1e-10, "holds": True, "detail": "8 samples"},
            {"name": "codes", "value": None, "bound": 1.0, "holds": False, "detail": ""},
        ],
        "comparison": comparison.as_dict(),
        "verdict": {**judge(comparison, "int8", max_drop=2.0).as_dict(), "ships": "int8"},
        "environment": describe_environment().as_dict(),
    }


def test_everything_that_was_found_is_on_the_page() -> None:
    found = read(render_page(json.loads(json.dumps(report(), allow_nan=False)))).text
    for text in (
        "kept", "Ships: int8", "3 times as fast", "3.00× (2.00 to 4.00)", "80.0", "1.25", "96.00",
        "Folded: 1", "norm1", "W * a", "Left alone: 1", "blocks.1.norm", Reason.STREAM_READER.value,
        "int8", "750", "14.00 bits", "patch.1", "0 to 2.13", "min-max 1.231", "holds", "FAILS", "4e-16", "bits = 8",
        "[any, 3]", "torch",
    ):  # fmt: skip
        assert text in found, text


def test_columns_without_a_figure_are_left_out() -> None:
    found = report()
    assert "SQNR" not in read(render_page(found)).text
    row = Row(label="int8", closeness=Closeness(99.0, 31.25, 10))
    rows = (Row(label="float"), row)
    found["comparison"] = Comparison(rows=rows, baseline="float", batch=2, threads=1).as_dict()
    text = read(render_page(found)).text
    assert "31.2" in text
    assert "p50 ms" not in text


def test_the_score_stands_under_its_name() -> None:
    found = report()
    row = Row(label="float", score=Score(Metric.MEAN_IOU, Fraction(717, 1000), 40))
    found["comparison"] = Comparison(rows=(row,), baseline="float", batch=2, threads=1).as_dict()
    del found["verdict"]
    text = read(render_page(found)).text
    assert "mean IoU %" in text
    assert "71.70" in text
    assert "top-1" not in text


@pytest.mark.parametrize("left_out", list(report()))
def test_every_section_is_optional(left_out: str) -> None:
    found = report()
    del found[left_out]
    read(render_page(found))
    read(render_page({left_out: report()[left_out]}))


@pytest.mark.parametrize("empty", [{}, {name: {} for name in report()}, {name: [] for name in report()}])
def test_an_empty_report_is_a_page(empty: dict[str, Any]) -> None:
    assert "normfuse report" in read(render_page(empty)).text


ATTACK = "<script>alert('x')</script>\"><img src=x onerror=alert(1)>&amp;"


def poisoned(value: Any) -> Any:
    """Return the value with the attack in every text and every name that is not the schema's."""
    match value:
        case dict():
            return {name: poisoned(inner) for name, inner in value.items()} | {f"{ATTACK}1": ATTACK}
        case list():
            return [poisoned(inner) for inner in value]
        case str():
            return value + ATTACK
        case _:
            return value


def test_names_and_texts_are_escaped_everywhere() -> None:
    attacked = poisoned(report())
    attacked["passes"][0]["applied"][f"{ATTACK}1"] = 1
    attacked["quantization"]["constants_by_type"][f"{ATTACK}1"] = 1
    attacked["quantization"]["tensors"][f"{ATTACK}1"] = {"layer": ATTACK, "relative_errors": {ATTACK: 1.0}}
    page = render_page(attacked)
    found = read(page)
    assert not found.tags & {"script", "img", "link", "iframe"}
    assert all(not name.startswith("on") for name, _ in found.attributes)
    # Read back as text it is what it was: once escaped, not twice.
    assert found.text.count(ATTACK) > 30
    assert "<script" not in page


def test_nothing_is_loaded_from_elsewhere() -> None:
    page = render_page(report())
    names = {name for name, _ in read(page).attributes}
    assert not names & {"src", "href", "srcset", "data"}
    assert "url(" not in page
    assert "@import" not in page
    assert "prefers-color-scheme: dark" in page
