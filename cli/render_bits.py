"""Says on the terminal how many bits the layers have, what else they could have, and which layers are sensitive."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple, TypeGuard

__all__ = ["Shown", "front", "mixed", "sensitivity"]

MOST: Final = 20


class Shown(NamedTuple):
    """What ``render.table`` prints."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]


def mixed(found: Mapping[str, Any]) -> list[str]:
    """Return the lines on what the layers got: average and histogram, the score of which, the budget and its use."""
    kinds = [
        f"{_name(kind.get('bits'))} {_plain(kind.get('layers'))} layers ({_plain(kind.get('parameters'))} parameters)"
        for kind in found.get("histogram") or ()
    ]
    average = found.get("average_weight_bits")
    said = [f"{_fixed(average, 2)} on average per weight"] if "average_weight_bits" in found else []
    lines = [f"bits: {'; '.join([*said, ', '.join(kinds)] if kinds else said)}"] if said or kinds else []
    if "score" in found:
        lines.append(f"bits chosen by {_name(found['score'])}{_of_which(found.get('candidates') or ())}")
    if facts := found.get("facts"):
        lines.append("of this score: " + ", ".join(f"{_name(name)} {_plain(value)}" for name, value in facts.items()))
    budget = f"budget {_name(found['budget'])}" if "budget" in found else ""
    used = ", ".join(_use(name, spent) for name, spent in (found.get("used") or {}).items())
    return [*lines, ": ".join(filter(None, (budget, used)))] if budget or used else lines


def _of_which(candidates: Sequence[Mapping[str, Any]]) -> str:
    if not candidates[1:]:
        return ""
    if all(each.get("loss") is None for each in candidates):
        return f", as by {', '.join(_name(each.get('score')) for each in candidates[1:])}"
    losses = (f"{_name(each.get('score'))} {_plain(each.get('loss'))}" for each in candidates)
    return f", by their losses: {', '.join(losses)}"


def _use(name: str, spent: Mapping[str, Any]) -> str:
    amount, limit = spent.get("amount"), spent.get("limit")
    share = f" ({100 * amount / limit:.1f} %)" if _is_number(amount) and _is_number(limit) and limit > 0 else ""
    return f"{_name(name)} {_plain(amount)}{f' of {_plain(limit)}' if 'limit' in spent else ''}{share}"


def front(found: Mapping[str, Any]) -> Shown | None:
    """Return the table of the points, of the columns that have values; nothing where there is no point."""
    points: Sequence[Mapping[str, Any]] = found.get("points") or ()
    metrics = {_name(point["metric"]) for point in points if point.get("metric")}
    # Headings of two lines: twelve columns are as wide as a terminal.
    columns: dict[str, tuple[str, Callable[[Any], object]]] = {
        "#": ("number", _name),
        "budget": ("budget", _name),
        "bits": ("average_weight_bits", lambda bits: _fixed(bits, 2)),
        "file\nMB": ("file_bytes", lambda size: _fixed(size, 2, unit=1e6)),
        "% of\nfloat": ("file", lambda share: _fixed(share, 1, unit=0.01)),
        "p50\nms": ("p50_ms", lambda time: _fixed(time, 3)),
        "speed": ("speedup", lambda ratio: f"{_fixed(ratio, 2)}x"),
        f"{min(metrics) if len(metrics) == 1 else 'score'}\n%": ("score", lambda score: _fixed(score, 2)),
        "lost": ("drop", lambda drop: _fixed(drop, 2)),
        "% like\nfloat": ("agreement", lambda share: _fixed(share, 2)),
        "SQNR\ndB": ("sqnr_db", lambda distance: _fixed(distance, 1)),
        "": ("ships", lambda ships: "ships" if ships else ""),
    }
    return _shown(f"front: {len(points)} points", points, columns) if points else None


def sensitivity(found: Mapping[str, Any]) -> tuple[Shown | None, list[str]]:
    """Return the table of the most sensitive layers, and the lines under it: how they were scored, and the facts."""
    layers: Sequence[Mapping[str, Any]] = found.get("layers") or ()
    largest = sorted(layers, key=lambda layer: -layer["share"] if _is_number(layer.get("share")) else math.inf)
    widths = dict.fromkeys(bits for layer in layers for bits in layer.get("damage") or {})
    columns: dict[str, tuple[str, Callable[[Any], object]]] = {
        "layer": ("layer", _name),
        "kind": ("kind", _name),
        "node": ("node", _name),
        "share %": ("share", lambda share: _fixed(share, 2, unit=0.01)),
    }
    rows = [
        {**layer, **{f"at {bits}": value for bits, value in (layer.get("damage") or {}).items()}}
        for layer in largest[:MOST]
    ]
    columns |= {f"damage at {_name(bits)} bits": (f"at {bits}", _plain) for bits in widths}
    shown = _shown(f"sensitivity: the {len(rows)} largest of {len(layers)}", rows, columns)
    said = [f"by {_name(found['method'])}"] if "method" in found else []
    said += [f"{_plain(found['samples'])} samples"] if "samples" in found else []
    said += [f"{_name(name)} {_plain(value)}" for name, value in (found.get("facts") or {}).items()]
    return shown if rows else None, said


def _shown(
    title: str, rows: Sequence[Mapping[str, Any]], columns: Mapping[str, tuple[str, Callable[[Any], object]]]
) -> Shown:
    kept = {
        heading: column for heading, column in columns.items() if any(row.get(column[0]) is not None for row in rows)
    }
    cells = [[None if row.get(key) is None else show(row[key]) for key, show in kept.values()] for row in rows]
    return Shown(title, list(kept), cells)


def _name(value: object) -> str:
    """Return the text without what a terminal obeys."""
    text = "–" if value is None else str(value)
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


def _plain(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if not isinstance(value, float):
        return _name(value)
    return f"{value:,.0f}" if 1000 <= abs(value) < math.inf else f"{value:.3g}"


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _fixed(value: float | None, digits: int, *, unit: float = 1.0) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value / unit:,.{digits}f}"
