"""Draws the charts of the report's page as inline SVG: no scripts, colours from the page's variables."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, Final

__all__ = ["CHART_STYLE", "finite", "front_chart", "share_chart", "shortened"]

Section = Mapping[str, Any]

CHART_STYLE: Final = """
svg { display: block; } svg text { font-size: 12px; font-family: system-ui, sans-serif; fill: var(--ink); }
svg text.name { font-family: ui-monospace, monospace; } svg text.dim { fill: var(--dim); }
svg .weight, svg .point { fill: var(--bar); } svg .activation { fill: var(--other); } svg .unknown { fill: var(--dim); }
svg .grid { stroke: var(--line); } svg .front { stroke: var(--dim); fill: none; }
svg .ships { stroke: var(--good); stroke-width: 3; fill: none; } svg text.on { fill: var(--paper); font-weight: 600; }
"""

KINDS: Final = {"weight": "weights", "activation": "activations"}

FRONT_WIDTH, FRONT_HEIGHT = 760, 400
LEFT, RIGHT, TOP, BOTTOM = 76, 30, 40, 56

BARS_WIDTH, BARS_START, BARS_LENGTH, ROW = 960, 312, 570, 18
NAME_CELLS: Final = 40
"""Of a monospaced font of 12 pixels, which is at most 7.5 pixels wide, 40 fit before ``BARS_START``."""


def front_chart(points: Sequence[Section]) -> str:
    """Return the points by file size and loss, those that no smaller one beats joined; empty where none has both.

    The size is the share of float's file where that is known, else in MB; the loss is in points where that is known,
    else the distance to float in dB.
    """
    in_points = any(finite(point.get("drop")) is not None for point in points)
    loss = "drop" if in_points else "sqnr_db"
    with_loss = [point for point in points if finite(point.get(loss)) is not None]
    is_share = any(finite(point.get("file")) is not None for point in with_loss)
    size, unit = ("file", 0.01) if is_share else ("file_bytes", 1e6)
    placed = [
        _Point(x / unit, y, point.get("number"), bool(point.get("ships")), _words_of_point(point))
        for point in with_loss
        if (x := finite(point.get(size))) is not None and (y := finite(point.get(loss))) is not None
    ]
    metrics = {f"{point['metric']} " for point in with_loss if point.get("metric")}
    size_said = "file size, % of float's" if is_share else "file size, MB"
    loss_said = (
        f"{min(metrics) if len(metrics) == 1 else ''}points lost, less is better"
        if in_points
        else "SQNR in dB, more is better"
    )
    return _front_of(placed, size_said, loss_said, less_is_better=in_points) if placed else ""


def share_chart(layers: Sequence[Section]) -> str:
    """Return one bar per layer, in the order given, as long as its share; the height grows with the layers."""
    if not layers:
        return ""
    largest = max((finite(layer.get("share")) or 0.0 for layer in layers), default=0.0)
    rows = "".join(_bar(layer, 34 + ROW * index, largest) for index, layer in enumerate(layers))
    title = "share of the expected damage by layer, each at its fewest bits"
    return _svg(BARS_WIDTH, 40 + ROW * len(layers), title, _legend(layers) + rows)


def shortened(value: object, most: int) -> str:
    """Return the text as one printable line of at most that many cells, cut in the middle; wide letters take two."""
    text = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in str(value))
    if _cells(text) <= most:
        return text
    head, tail = _fitting(text, most // 2), _fitting(reversed(text), most - 1 - most // 2)
    return f"{head}…{tail[::-1]}"


def finite(value: object) -> float | None:
    """Return the number, or nothing where it is none or has no place on an axis."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if abs(value) < 1e15 else None


@dataclass(frozen=True, slots=True)
class _Point:
    x: float
    y: float
    number: object
    is_shipped: bool
    words: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Axis:
    """Numbers from ``low`` to ``high`` on pixels from ``start`` to ``end``."""

    low: float
    high: float
    start: float
    end: float

    @classmethod
    def over(cls, values: Sequence[float], start: float, end: float) -> _Axis:
        """Return the axis that shows all values with room around them, also where they are one."""
        low, high = min(values), max(values)
        room = 0.08 * (high - low)
        if room <= 1e-9 * max(abs(low), abs(high)):
            room = 0.1 * abs(high) or 1.0
        return cls(low=low - room, high=high + room, start=start, end=end)

    def at(self, value: float) -> float:
        return self.start + (self.end - self.start) * (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[tuple[float, str]]:
        """Return three to seven round numbers, and how each is written."""
        rough = (self.high - self.low) / 7
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= 0.999 * rough)
        numbers = range(math.ceil(self.low / step), math.floor(self.high / step) + 1)
        return [(number * step, f"{number * step:.10g}") for number in numbers]


def _front_of(placed: Sequence[_Point], size_said: str, loss_said: str, *, less_is_better: bool) -> str:
    across = _Axis.over([point.x for point in placed], LEFT, FRONT_WIDTH - RIGHT)
    up = _Axis.over([point.y for point in placed] + [0.0] * less_is_better, FRONT_HEIGHT - BOTTOM, TOP)
    best = _unbeaten(placed, less_is_better=less_is_better)
    joined = " ".join(f"{across.at(point.x):.1f},{up.at(point.y):.1f}" for point in best)
    middle = (TOP + FRONT_HEIGHT - BOTTOM) / 2
    ring = f'<circle class="ships" cx="{LEFT + 8}" cy="18" r="7"/>{_text(LEFT + 22, 22, "ships")}'
    return _svg(
        FRONT_WIDTH,
        FRONT_HEIGHT,
        "file size and loss of each point",
        _grid(across, up)
        + _text(FRONT_WIDTH / 2, FRONT_HEIGHT - 12, size_said, anchor="middle", kind="dim")
        + _text(18, middle, shortened(loss_said, 44), anchor="middle", kind="dim", is_upright=True)
        + (ring if any(point.is_shipped for point in placed) else "")
        + f'<polyline class="front" points="{joined}"/>'
        # What ships is drawn last, on top of its neighbours.
        + "".join(_point(point, across, up) for point in sorted(placed, key=lambda point: point.is_shipped)),
    )


def _unbeaten(points: Iterable[_Point], *, less_is_better: bool) -> list[_Point]:
    sign = 1.0 if less_is_better else -1.0
    best, found = math.inf, list[_Point]()
    for point in sorted(points, key=lambda point: (point.x, sign * point.y)):
        if sign * point.y < best:
            best = sign * point.y
            found.append(point)
    return found


def _grid(across: _Axis, up: _Axis) -> str:
    columns = (
        f'<line class="grid" x1="{across.at(value):.1f}" x2="{across.at(value):.1f}" y1="{up.start}" y2="{up.end}"/>'
        + _text(across.at(value), up.start + 18, label, anchor="middle", kind="dim")
        for value, label in across.ticks()
    )
    rows = (
        f'<line class="grid" x1="{across.start}" x2="{across.end}" y1="{up.at(value):.1f}" y2="{up.at(value):.1f}"/>'
        + _text(across.start - 8, up.at(value) + 4, label, anchor="end", kind="dim")
        for value, label in up.ticks()
    )
    return "".join((*columns, *rows))


def _point(point: _Point, across: _Axis, up: _Axis) -> str:
    x, y = across.at(point.x), up.at(point.y)
    ring = f'<circle class="ships" cx="{x:.1f}" cy="{y:.1f}" r="13"/>' if point.is_shipped else ""
    number = "" if point.number is None else _text(x, y + 4, shortened(point.number, 3), anchor="middle", kind="on")
    return f'<g>{_title(point.words)}{ring}<circle class="point" cx="{x:.1f}" cy="{y:.1f}" r="10"/>{number}</g>'


def _words_of_point(point: Section) -> str:
    return ", ".join(
        f"{name.replace('_', ' ')} {value}" for name in ("number", "budget") if (value := point.get(name)) is not None
    )


def _bar(layer: Section, top: int, largest: float) -> str:
    share, kind = finite(layer.get("share")), str(layer.get("kind"))
    length = BARS_LENGTH * max(share or 0.0, 0.0) / largest if largest > 0 else 0.0
    name = layer.get("layer") or layer.get("node") or "–"
    said = "–" if share is None else f"{100 * share:.2f} %"
    drawn = f'class="{kind if kind in KINDS else "unknown"}" width="{max(length, 1.0):.1f}" height="{ROW - 5}"'
    return (
        f"<g>{_title(_words_of_layer(layer))}"
        + _text(BARS_START - 8, top + 12, shortened(name, NAME_CELLS), anchor="end", kind="name")
        + (f'<rect {drawn} x="{BARS_START}" y="{top + 2}"/>' if share is not None else "")
        + _text(BARS_START + length + 6, top + 12, said, kind="dim")
        + "</g>"
    )


def _words_of_layer(layer: Section) -> str:
    damage = layer.get("damage")
    widths = damage.items() if isinstance(damage, Mapping) else ()
    facts = [layer.get("layer"), layer.get("kind"), layer.get("node")]
    harm = [f"{bits} bits: {_short(value)}" for bits, value in widths]
    return ", ".join(str(fact) for fact in [*facts, *harm] if fact)


def _short(value: object) -> str:
    number = finite(value)
    return "–" if number is None else f"{number:.3g}"


def _legend(layers: Sequence[Section]) -> str:
    kinds = [kind for kind in KINDS if any(layer.get("kind") == kind for layer in layers)]
    return "".join(
        f'<rect class="{kind}" x="{BARS_START + 120 * index}" y="10" width="12" height="12"/>'
        + _text(BARS_START + 120 * index + 18, 20, KINDS[kind])
        for index, kind in enumerate(kinds)
    )


def _svg(width: int, height: int, label: str, content: str) -> str:
    return (
        f'<div class="scroll"><svg role="img" aria-label="{label}" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}">{content}</svg></div>\n'
    )


def _text(x: float, y: float, text: str, *, anchor: str = "start", kind: str = "", is_upright: bool = False) -> str:
    turned = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if is_upright else ""
    place = f'class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{turned}'
    return f"<text {place}>{escape(text, quote=True)}</text>"


def _title(text: str) -> str:
    # A name may be as long as its file: what is pointed at shows that much of it.
    return f"<title>{escape(shortened(text, 2000), quote=True)}</title>"


def _fitting(letters: Iterable[str], most: int) -> str:
    taken = list[str]()
    for letter in letters:
        most -= _cells(letter)
        if most < 0:
            break
        taken.append(letter)
    return "".join(taken)


def _cells(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)
