"""Bits per layer, the front and the sensitivity on the page: whatever is known of them, and whatever the names are."""

from __future__ import annotations

import re
from typing import Any
from xml.etree import ElementTree

import pytest

from normfuse.page import render_page
from normfuse.page_charts import front_chart, share_chart, shortened

ATTACK = "</text></svg><script>alert('x')</script>\"><img src=x onerror=alert(1)>&amp;\x1b[31m\x00"
LONG = "encoder.layers.the_first_of_many_blocks.attention.output.projection.weight_normed.linear"


def mixed(layers: int = 3) -> dict[str, Any]:
    return {
        "budget": "bytes=0.14x",
        "score": "curvature",
        "candidates": [{"score": "curvature", "loss": 0.0123}, {"score": "lrp", "loss": None}],
        "used": {"weight-bits": {"amount": 1234, "limit": 1300}, "bops": {"amount": 77}},
        "average_weight_bits": 4.31,
        "histogram": [
            {"bits": "w4a8", "layers": 12, "parameters": 30000},
            {"bits": "w8a8", "layers": 1, "parameters": 10000},
        ],
        "layers": [
            {
                "layer": f"blocks.{at}.fc",
                "bits": "w4a8",
                "parameters": 1234,
                "macs": 99,
                "share": 0.12 / (at + 1),
                "overridden": at == 1,
            }
            for at in range(layers)
        ],
    }


def point(number: int, /, **changes: object) -> dict[str, Any]:
    return {
        "number": number,
        "budget": f"avg-bits={3 + number}",
        "average_weight_bits": 2.99 + number,
        "file_bytes": 1_000_000 * number,
        "file": 0.1 * number,
        "p50_ms": 0.25,
        "speedup": 1.25,
        "score": 93.1,
        "metric": "top-1",
        "drop": 2.0 / number,
        "agreement": 99.1,
        "sqnr_db": 20.0 + number,
        "ships": number == 2,
    } | changes


def pareto(points: int = 3) -> dict[str, Any]:
    return {"points": [point(number) for number in range(1, points + 1)]}


def sensitivity(layers: int = 4) -> dict[str, Any]:
    return {
        "method": "lrp",
        "facts": {"conserved": 0.99, "absorbed": 0.2},
        "samples": 64,
        "layers": [
            {
                "layer": f"blocks.{at // 2}.fc",
                "kind": "activation" if at % 2 else "weight",
                "node": f"linear_{at}",
                "damage": {"4": 1e-3, "8": 2e-6},
                "share": 0.1 + at / 1000,
            }
            for at in range(layers)
        ],
    }


SECTIONS = {"mixed": mixed(), "pareto": pareto(), "sensitivity": sensitivity()}


def body(report: dict[str, Any]) -> ElementTree.Element:
    """Return the page's body, which is read as XML: so is every drawing in it."""
    page = render_page(report)
    return ElementTree.fromstring(page[page.index("<body>") : page.index("</body>") + len("</body>")])


def text_of(element: ElementTree.Element) -> str:
    return " ".join(element.itertext())


def labels(element: ElementTree.Element) -> list[str]:
    return [text.text or "" for text in element.iter("text")]


def headings(element: ElementTree.Element) -> list[str]:
    return [head.text or "" for head in element.iter("th")]


def test_bits_per_layer_say_the_budget_the_scores_and_each_layer() -> None:
    found = body({"mixed": mixed()})
    said = text_of(found)
    assert (
        "Budget bytes=0.14x; bits chosen by curvature; 4.31 bits per weight on average; "
        "weight-bits 1,234 of 1,300; bops 77."
    ) in said
    for text in ("Bits per layer", "lrp", "0.0123", "w8a8", "30,000", "blocks.2.fc", "12.00", "yes"):
        assert text in said, text
    bars = [bar.get("style") for bar in found.iter("div") if bar.get("class") == "bar"]
    assert bars == ["width:75.0%", "width:25.0%", "width:100.0%", "width:50.0%", "width:33.3%"]


def test_one_score_has_no_table() -> None:
    found = mixed() | {"candidates": [{"score": "curvature", "loss": None}]}
    assert "loss" not in headings(body({"mixed": found}))
    assert "loss" in headings(body({"mixed": mixed()}))


def test_the_front_is_drawn_by_file_and_points_lost() -> None:
    found = body({"pareto": pareto()})
    drawn = labels(found)
    for text in ("file size, % of float's", "top-1 points lost, less is better", "ships", "1", "2", "3", "20", "0.5"):
        assert text in drawn, text
    assert "number 2, budget avg-bits=5" in text_of(found)
    # The one in the key and the one around the point.
    assert len([ring for ring in found.iter("circle") if ring.get("class") == "ships"]) == 2
    for text in ("top-1 %", "points lost", "SQNR dB", "2.00", "20.0", "0.250", "1.25", "99.10", "yes", "no"):
        assert text in text_of(found), text


def test_the_front_falls_back_to_decibels_and_megabytes() -> None:
    unknown = {"drop": None, "score": None, "metric": None, "file": None}
    found = body({"pareto": {"points": [point(number, **unknown) for number in (1, 2, 3)]}})
    assert {"file size, MB", "SQNR in dB, more is better"} <= set(labels(found))
    assert not {"points lost", "% of float's", "score %"} & set(headings(found))
    assert "file MB" in headings(found)


@pytest.mark.parametrize("unplaced", [{"file": None, "file_bytes": None}, {"drop": None, "sqnr_db": float("inf")}])
def test_points_without_a_place_are_in_the_table_alone(unplaced: dict[str, Any]) -> None:
    found = body({"pareto": {"points": [point(1, **unplaced)]}})
    assert not list(found.iter("svg"))
    assert "avg-bits=4" in text_of(found)
    assert front_chart([]) == ""


def test_only_what_nothing_smaller_beats_is_joined() -> None:
    worse = point(4, file=0.25, drop=1.5)
    drawn = front_chart([point(3), worse, point(1), point(2)])
    joined = re.findall(r'polyline class="front" points="([^"]+)"', drawn)[0].split()
    assert len(joined) == 3
    across, up = zip(*(map(float, each.split(",")) for each in joined), strict=True)
    assert list(across) == sorted(across)
    assert list(up) == sorted(up)  # down the page, to less that is lost


@pytest.mark.parametrize(
    "points",
    [
        [point(1)],
        [point(1, drop=0.0, file=0.0)],
        [point(1), point(1)],
        [point(1, drop=-0.2), point(2, drop=1e-9)],
        [point(1, file=0.5), point(2, file=0.5 + 1e-16)],
        [point(1, drop=1e14), point(2)],
        [point(1, number=None), point(2, number="a long number")],
    ],
    ids=["one", "zero", "twice", "gain", "equal", "large", "names"],
)
def test_any_points_stay_in_the_drawing(points: list[dict[str, Any]]) -> None:
    drawn = ElementTree.fromstring(front_chart(points))
    circles = [each for each in drawn.iter("circle") if each.get("class") == "point"]
    assert len(circles) == len(points)
    for circle in circles:
        assert 76 <= float(circle.get("cx", "nan")) <= 730
        assert 40 <= float(circle.get("cy", "nan")) <= 344
    assert len(labels(drawn)) < 30


def test_sensitivity_is_drawn_in_order_with_a_legend() -> None:
    found = body({"sensitivity": sensitivity()})
    assert "By lrp; 64 samples; conserved 0.99; absorbed 0.2." in text_of(found)
    assert labels(found)[:2] == ["weights", "activations"]
    assert [label for label in labels(found) if label.startswith("blocks")] == [
        f"blocks.{at}.fc" for at in (0, 0, 1, 1)
    ]
    assert "10.30 %" in labels(found)
    assert "blocks.1.fc, activation, linear_3, 4 bits: 0.001, 8 bits: 2e-06" in text_of(found)
    bars = [(bar.get("class"), float(bar.get("width", "nan"))) for bar in list(found.iter("rect"))[2:]]
    assert [kind for kind, _ in bars] == ["weight", "activation"] * 2
    assert [width for _, width in bars] == sorted(width for _, width in bars)


@pytest.mark.parametrize("count", [1, 5, 300])
def test_the_height_grows_with_the_layers(count: int) -> None:
    drawn = ElementTree.fromstring(share_chart(sensitivity(count)["layers"]))
    svg = drawn.find("svg")
    assert svg is not None
    height = float(svg.get("height", "nan"))
    assert height == 40 + 18 * count
    assert max(float(bar.get("y", "nan")) + float(bar.get("height", "nan")) for bar in drawn.iter("rect")) < height
    assert max(float(bar.get("x", "nan")) + float(bar.get("width", "nan")) for bar in drawn.iter("rect")) < 900


@pytest.mark.parametrize("count", [1, 300])
def test_any_number_of_layers_is_a_table(count: int) -> None:
    rows = list(body({"mixed": mixed(count)}).iter("tr"))
    assert len(rows) == 3 + 3 + 1 + count


def test_shares_that_are_not_known_are_dashes() -> None:
    nothing: dict[str, Any] = {"share": None, "kind": None, "damage": None, "layer": None, "node": None}
    found = ElementTree.fromstring(share_chart([nothing, {"layer": "fc", "damage": {"4": None}, "share": 0.0}, {}]))
    assert labels(found) == ["–", "–", "fc", "0.00 %", "–", "–"]
    assert "fc, 4 bits: –" in text_of(found)


@pytest.mark.parametrize(
    ("section", "key"), [(section, key) for section, found in SECTIONS.items() for key in (*found, None)]
)
def test_every_key_may_be_missing_or_unknown(section: str, key: str | None) -> None:
    def without(value: Any) -> Any:
        match value:
            case dict():
                return {name: without(inner) for name, inner in value.items() if name != key}
            case list():
                return [without(inner) for inner in value]
            case _:
                return value if key else None

    body({section: without(SECTIONS[section])})


@pytest.mark.parametrize(
    ("section", "many", "key"),
    [
        (section, many, key)
        for section, found in SECTIONS.items()
        for many, inner in found.items()
        if isinstance(inner, list)
        for key in inner[0]
    ],
)
def test_every_key_of_a_row_may_be_missing_or_unknown(section: str, many: str, key: str) -> None:
    rows: list[dict[str, Any]] = SECTIONS[section][many]
    lacking = [{name: value for name, value in row.items() if name != key} for row in rows]
    for changed in ([row | {key: None} for row in rows], [rows[0] | {key: None}, *rows[1:]], lacking):
        body({section: SECTIONS[section] | {many: changed}})


def test_names_are_escaped_and_lose_what_no_drawing_may_hold() -> None:
    layers = [{**layer, "layer": ATTACK, "node": ATTACK, "kind": ATTACK} for layer in sensitivity()["layers"]]
    attacked = {
        "mixed": mixed() | {"budget": ATTACK, "score": ATTACK, "used": {ATTACK: {"amount": ATTACK, "limit": ATTACK}}},
        "pareto": {"points": [point(1, budget=ATTACK, metric=ATTACK, number=ATTACK)]},
        "sensitivity": {"method": ATTACK, "facts": {ATTACK: ATTACK}, "layers": layers},
    }
    for key in ("layers", "histogram"):
        attacked["mixed"][key] = [{**row, "layer": ATTACK, "bits": ATTACK} for row in attacked["mixed"][key]]
    page = render_page(attacked)
    assert "<script" not in page
    assert "<img" not in page
    drawings = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(drawings) == 2
    for drawn in map(ElementTree.fromstring, drawings):
        assert {each.tag for each in drawn.iter()} <= {
            "svg",
            "g",
            "title",
            "text",
            "rect",
            "circle",
            "line",
            "polyline",
        }
        assert not [name for each in drawn.iter() for name in each.attrib if name.startswith(("on", "href", "src"))]
        assert any(title.text and "<script>alert('x')</script>" in title.text for title in drawn.iter("title"))


def test_long_names_are_cut_and_whole_where_pointed_at() -> None:
    layer = {**sensitivity()["layers"][0], "layer": LONG}
    found = body({"sensitivity": {"layers": [layer]}, "mixed": {"layers": [{"layer": LONG, "bits": "w4a8"}]}})
    assert LONG not in labels(found)
    assert max(map(len, labels(found))) <= 40
    assert any(title.text and LONG in title.text for title in found.iter("title"))
    (span,) = (each for each in found.iter("span") if each.get("title") == LONG)
    assert span.text == shortened(LONG, 60)


@pytest.mark.parametrize(
    ("text", "most", "cut"),
    [
        ("fc1", 3, "fc1"),
        ("abcdefghij", 5, "ab…ij"),
        ("abcdefghij", 6, "abc…ij"),
        ("層層層層", 8, "層層層層"),
        ("層層層層層", 8, "層層…層"),
        ("a\nb\u202ec\x1b", 9, "a\N{REPLACEMENT CHARACTER}b\N{REPLACEMENT CHARACTER}c\N{REPLACEMENT CHARACTER}"),
        ("", 3, ""),
    ],
)
def test_a_text_is_cut_in_the_middle(text: str, most: int, cut: str) -> None:
    assert shortened(text, most) == cut
