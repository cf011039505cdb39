"""Draws the report as one self-contained HTML page: no scripts, nothing loaded from elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any, Final

from normfuse.page_charts import CHART_STYLE, finite, front_chart, share_chart, shortened
from normfuse.page_target import target_parts

__all__ = ["render_page"]

Section = Mapping[str, Any]
Column = tuple[str, Callable[[Any], object]]
"""What a row calls the value, and how a value that is there is shown."""

STYLE: Final = """
:root { color-scheme: light dark; --ink: #1c1e21; --dim: #667; --line: #d8dbe0; --paper: #fff; --shade: #f4f5f7;
  --good: #11733b; --fair: #8a5a00; --bad: #b3261e; --bar: #4a7bd0; --other: #c07a12; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e7ea; --dim: #9aa0aa; --line: #3a3e45; --paper: #16181c;
  --shade: #1f2227; --good: #62c98a; --fair: #e0ad4a; --bad: #ff8a80; --bar: #6c9bea;
  --other: #e0ad4a; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 2rem auto;
  max-width: 70rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--dim); padding: .3rem 0; }
th, td { text-align: left; padding: .3rem .7rem; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--dim); font-weight: 600; white-space: nowrap; } td.number { text-align: right; white-space: nowrap; }
tbody tr:nth-child(even) { background: var(--shade); }
pre { background: var(--shade); padding: .7rem 1rem; overflow-x: auto; }
.good { color: var(--good); } .fair { color: var(--fair); } .bad { color: var(--bad); } .dim { color: var(--dim); }
.verdict { border-left: .4rem solid; padding: .2rem 1rem; background: var(--shade); }
.verdict p, .verdict li { color: var(--ink); } .verdict strong { font-size: 1.2rem; }
.bar { background: var(--bar); height: .8rem; min-width: 1px; } .track { min-width: 8rem; }
"""

TONES: Final = {"kept": "good", "partly kept": "fair", "fell back": "bad"}
ABSENT: Final = "–"


def render_page(report: Mapping[str, Any]) -> str:
    """Return the page; sections that the report lacks are left out.

    Args:
        report: plain data (what ``report.json`` holds).
            ``model``, ``environment``: facts by name.
            ``recipe``: TOML text, or options by name.
            ``passes``: ``PassReport.as_dict()`` each.
            ``quantization``: ``kinds`` (how many activations and weights have which codes), ``constants_by_type``
            (elements by type), ``effective_bits``, ``samples``, and ``tensors`` by name: ``layer``, ``range``,
            ``observed``, ``method``, ``relative_errors``.
            ``checks``: ``name``, ``value``, ``bound``, ``holds``, ``detail`` each.
            ``accuracy_control``: ``allowed``, ``holds``, ``put_back`` (``layers``, ``level``, ``effect`` each), and
            ``trials`` (``put_back``, ``level``, ``drop`` each).
            ``warnings``: sentences.
            ``comparison``: ``Comparison.as_dict()``.
            ``pareto``: ``points`` (``number``, ``budget``, ``average_weight_bits``, ``file_bytes``, ``file`` as a share
            of float's, ``p50_ms``, ``speedup``, ``score``, ``metric``, ``drop``, ``agreement``, ``sqnr_db``, ``ships``
            each).
            ``mixed``: ``budget``, ``score``, its ``facts``, ``candidates`` (``score``, ``loss`` each), ``used``
            (``amount`` and ``limit`` by name), ``average_weight_bits``, ``histogram`` (``bits``, ``layers``,
            ``parameters`` each), and ``layers`` (``layer``, ``bits``, ``parameters``, ``macs``, ``share``,
            ``overridden`` each).
            ``sensitivity``: ``method``, ``facts``, ``samples``, and ``layers`` in the network's order (``layer``,
            ``kind``, ``node``, ``damage`` by width, ``share`` each).
            ``tensorrt``: ``products``, ``body``, ``lint``, ``engine`` (with its ``audit``), ``failure``, ``commands``.
            ``verdict``: ``verdict``, ``reasons`` and what ``ships``.
    """
    sections: dict[str, Callable[[Any], str]] = {
        "verdict": _verdict,
        "warnings": _warnings,
        "comparison": _comparison,
        "pareto": _front,
        "accuracy_control": _accuracy_control,
        "checks": _checks,
        "passes": _passes,
        "quantization": _quantization,
        "mixed": _mixed,
        "tensorrt": lambda found: "".join(
            _heading(part.heading) + _table(part.columns, part.rows) for part in target_parts(found)
        ),
        "sensitivity": _sensitivity,
        "model": lambda facts: _heading("Model") + _facts(facts),
        "recipe": _recipe,
        "environment": lambda facts: _heading("Environment") + _facts(facts),
    }
    body = "\n".join(draw(report[name]) for name, draw in sections.items() if report.get(name))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>normfuse report</title>\n<style>{STYLE}{CHART_STYLE}</style>\n</head>\n"
        f"<body>\n<h1>normfuse report</h1>\n{body}\n</body>\n</html>\n"
    )


def _verdict(verdict: Section) -> str:
    said = str(verdict.get("verdict", ""))
    ships = f"<p>Ships: {_text(verdict['ships'])}</p>" if verdict.get("ships") else ""
    reasons = "".join(f"<li>{_text(reason)}</li>" for reason in verdict.get("reasons", ()))
    tone = TONES.get(said, "dim")
    return f'<div class="verdict {tone}"><strong>{_text(said)}</strong>{ships}<ul>{reasons}</ul></div>'


def _warnings(warnings: Sequence[str]) -> str:
    return f'<ul class="fair">{"".join(f"<li>Warning: {_text(warning)}</li>" for warning in warnings)}</ul>'


def _comparison(comparison: Section) -> str:
    columns: dict[str, Callable[[Section], object]] = {
        "engine": lambda row: row.get("label"),
        "p50 ms": lambda row: _fixed(row.get("p50_ms"), 3),
        "p90 ms": lambda row: _fixed(row.get("p90_ms"), 3),
        "p99 ms": lambda row: _fixed(row.get("p99_ms"), 3),
        "samples/s": lambda row: _fixed(row.get("samples_per_second"), 1),
        "speed-up": _speedup,
        "memory MB": lambda row: _fixed(row.get("peak_bytes"), 1, unit=1e6),
        "file MB": lambda row: _fixed(row.get("file_bytes"), 2, unit=1e6),
        "top-1 %": lambda row: _fixed(row.get("top_1"), 2),
        "mean IoU %": lambda row: _fixed(row.get("mean_iou"), 2),
        "like baseline %": lambda row: _fixed(row.get("agreement"), 2),
        "SQNR dB": lambda row: "same" if row.get("same_outputs") else _fixed(row.get("sqnr_db"), 1),
    }
    rows = [[cell(row) for cell in columns.values()] for row in comparison.get("rows", ())]
    kept = [index for index in range(len(columns)) if index == 0 or any(row[index] is not None for row in rows)]
    caption = (
        f"batch {comparison.get('batch')}, {comparison.get('threads')} threads, against {comparison.get('baseline')}; "
        "engines in processes of their own, measured in turns; speed-up: median of the rounds (lowest to highest)"
    )
    names = list(columns)
    return _heading("Comparison") + _table(
        [names[index] for index in kept], ([row[index] for index in kept] for row in rows), caption
    )


def _speedup(row: Section) -> str | None:
    ratios = row.get("ratios") or {}
    low, high = (_fixed(ratios.get(f"speedup_{end}"), 2) for end in ("lowest", "highest"))
    middle = _fixed(row.get("speedup"), 2)
    return f"{middle}× ({low} to {high})" if middle and low and high else middle and f"{middle}×"


def _front(found: Section) -> str:
    rows = [{key: value for key, value in point.items() if value is not None} for point in found.get("points", ())]
    metrics = {shortened(row["metric"], 30) for row in rows if "metric" in row}
    columns: dict[str, Column] = {
        "point": ("number", str),
        "budget": ("budget", _name),
        "bits per weight": ("average_weight_bits", lambda bits: _fixed(bits, 2)),
        "file MB": ("file_bytes", lambda size: _fixed(size, 2, unit=1e6)),
        "% of float's": ("file", lambda share: _fixed(share, 1, unit=0.01)),
        "p50 ms": ("p50_ms", lambda time: _fixed(time, 3)),
        "speed-up ×": ("speedup", lambda ratio: _fixed(ratio, 2)),
        f"{min(metrics) if len(metrics) == 1 else 'score'} %": ("score", lambda score: _fixed(score, 2)),
        "points lost": ("drop", lambda drop: _fixed(drop, 2)),
        "like float %": ("agreement", lambda share: _fixed(share, 2)),
        "SQNR dB": ("sqnr_db", lambda distance: _fixed(distance, 1)),
        "ships": ("ships", _plain),
    }
    return _heading("Front") + front_chart(rows) + _listed(rows, columns) if rows else ""


def _accuracy_control(found: Section) -> str:
    """Draw what was put back, where something was tried."""
    if not found["trials"][1:]:
        return ""
    backs = [[", ".join(back["layers"]), back["level"], f"{back['effect']:.2e}"] for back in found["put_back"]]
    trials = [[str(trial["put_back"]), trial["level"], f"{trial['drop']:.2f}"] for trial in found["trials"]]
    state = "holds" if found["holds"] else "does not hold"
    return (
        _heading(f"Accuracy control {state}: {found['allowed']:.2f} points allowed")
        + _table(("put back", "to", "output error that went with it"), backs)
        + _table(("blocks put back", "to", "points lost"), trials)
    )


def _checks(checks: Sequence[Section]) -> str:
    drawn = [
        [
            _Html('<span class="good">holds</span>' if check.get("holds") else '<span class="bad">FAILS</span>'),
            check.get("name"),
            check.get("value"),
            check.get("bound"),
            check.get("detail"),
        ]
        for check in checks
    ]
    return _heading("Checks") + _table(["", "check", "value", "bound", "of"], drawn)


def _passes(passes: Sequence[Section]) -> str:
    sites = [site for step in passes for site in step.get("sites", ())]
    scaled = [site for site in sites if "stays" in site]
    folded = [site for site in sites if "affine" in site]
    turned = [site for site in sites if "turned" in site]
    refused = [
        [refusal.get("layer") or refusal.get("node"), refusal.get("because"), refusal.get("detail"), step.get("name")]
        for step in passes
        for refusal in step.get("refused", ())
    ]
    steps = [
        [step.get("name"), ", ".join(f"{rule} {count}" for rule, count in step.get("applied", {}).items()) or "nothing"]
        for step in passes
    ]
    left = _table(["where", "because", "detail", "pass"], refused) if refused else ""
    return (
        _heading(f"Folded: {len(folded)}")
        + _sites(folded)
        + (_heading(f"Rotated: {len(turned)}") + _sites(turned) if turned else "")
        + (_heading(f"Equalized: {len(scaled)}") + _sites(scaled) if scaled else "")
        + _heading(f"Left alone: {len(refused)}")
        + left
        + _heading("Passes, in order")
        + _table(["pass", "applied"], steps)
    )


def _sites(sites: Sequence[Section]) -> str:
    names = list(dict.fromkeys(name for site in sites for name in site))
    return _table(names, ([site.get(name) for name in names] for site in sites)) if sites else ""


def _quantization(quantization: Section) -> str:
    counts: Mapping[str, int] = quantization.get("constants_by_type", {})
    total = sum(counts.values()) or 1
    bars = [[kind, f"{count:,}", _bar(count, total)] for kind, count in counts.items()]
    bits = quantization.get("effective_bits")
    caption = f"{_fixed(bits, 2)} bits per constant on average" if bits is not None else ""
    tensors: Mapping[str, Section] = quantization.get("tensors", {})
    ranges = [
        [
            name,
            tensor.get("layer"),
            _interval(tensor.get("range")),
            _interval(tensor.get("observed")),
            tensor.get("method"),
            ", ".join(f"{method} {_number(error)}" for method, error in tensor.get("relative_errors", {}).items()),
        ]
        for name, tensor in tensors.items()
    ]
    columns = ["tensor", "layer", "range", "observed", "method", "output error of each method, relative to the best"]
    kinds: Mapping[str, int] = quantization.get("kinds", {})
    drawn = (
        _heading("Kinds of codes") + _facts({kind: count for kind, count in kinds.items() if count}) if kinds else ""
    )
    drawn += _heading("Constants by type") + _table(["type", "elements", "share"], bars, caption) if counts else ""
    if ranges:
        drawn += _heading(f"Quantized activations: {len(ranges)}")
        drawn += _table(columns, ranges, f"from {quantization.get('samples', 'unknown')} samples")
    return drawn


def _mixed(found: Section) -> str:
    candidates: Sequence[Section] = found.get("candidates") or ()
    histogram: Sequence[Section] = found.get("histogram") or ()
    layers: Sequence[Section] = found.get("layers") or ()
    parameters = sum(finite(kind.get("parameters")) or 0.0 for kind in histogram)
    largest = max((finite(layer.get("share")) or 0.0 for layer in layers), default=0.0)
    scores: dict[str, Column] = {"score": ("score", _name), "loss": ("loss", _number)}
    kinds: dict[str, Column] = {
        "bits": ("bits", _name),
        "layers": ("layers", _number),
        "parameters": ("parameters", _number),
        "share": ("parameters", lambda count: _bar(count, parameters)),
    }
    columns: dict[str, Column] = {
        "layer": ("layer", _name),
        "bits": ("bits", _name),
        "parameters": ("parameters", _number),
        "multiply-adds": ("macs", _number),
        "damage %": ("share", lambda share: _fixed(share, 2, unit=0.01)),
        "share of the expected damage at the fewest bits": ("share", lambda share: _bar(share, largest)),
        "set by hand": ("overridden", _plain),
    }
    return (
        _heading("Bits per layer")
        + _paragraph(_bits_said(found))
        + (_listed(candidates, scores) if candidates[1:] else "")
        + _listed(histogram, kinds)
        + _listed(layers, columns)
    )


def _bits_said(found: Section) -> list[str]:
    said = [
        f"{words} {_plain(found[key])}"
        for key, words in (("budget", "budget"), ("score", "bits chosen by"))
        if key in found
    ]
    said += [f"{name} {_plain(value)}" for name, value in (found.get("facts") or {}).items()]
    if "average_weight_bits" in found:
        said.append(f"{_fixed(found['average_weight_bits'], 2) or ABSENT} bits per weight on average")
    for name, spent in (found.get("used") or {}).items():
        limit = f" of {_plain(spent['limit'])}" if "limit" in spent else ""
        said.append(f"{name} {_plain(spent.get('amount'))}{limit}")
    return said


def _sensitivity(found: Section) -> str:
    said = [f"by {_plain(found['method'])}"] if "method" in found else []
    said += [f"{_plain(found['samples'])} samples"] if "samples" in found else []
    said += [f"{name} {_plain(value)}" for name, value in (found.get("facts") or {}).items()]
    return _heading("Sensitivity") + _paragraph(said) + share_chart(found.get("layers") or ())


def _recipe(recipe: Section | str) -> str:
    shown = f"<pre>{_text(recipe)}</pre>" if isinstance(recipe, str) else _facts(recipe)
    return _heading("Recipe") + shown


class _Html(str):
    """Text that is markup already; made here alone, from constants, numbers and escaped text."""

    __slots__ = ()


def _heading(text: str) -> str:
    return f"\n<h2>{_text(text)}</h2>\n"


def _facts(facts: Section) -> str:
    return _table(["fact", "value"], ([name.replace("_", " "), value] for name, value in facts.items()))


def _paragraph(clauses: Sequence[str]) -> str:
    said = "; ".join(clauses)
    return f"<p>{_text(said[:1].upper() + said[1:])}.</p>\n" if said else ""


def _listed(rows: Sequence[Section], columns: Mapping[str, Column]) -> str:
    """Draw the columns that some row has."""
    kept = {heading: column for heading, column in columns.items() if any(column[0] in row for row in rows)}
    cells = ([None if row.get(key) is None else show(row[key]) for key, show in kept.values()] for row in rows)
    return _table(list(kept), cells) if kept else ""


def _table(columns: Sequence[str], rows: Iterable[Sequence[object]], caption: str = "") -> str:
    head = "".join(f"<th>{_text(column)}</th>" for column in columns)
    body = "\n".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    title = f"<caption>{_text(caption)}</caption>" if caption else ""
    return (
        f'<div class="scroll"><table>{title}<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>\n'
    )


def _bar(value: object, whole: float) -> _Html:
    share = max(finite(value) or 0.0, 0.0) / whole if whole > 0 else 0.0
    return _Html(f'<div class="track"><div class="bar" style="width:{100 * share:.1f}%"></div></div>')


def _name(value: object) -> _Html:
    return _Html(f'<span title="{_text(value)}">{_text(shortened(value, 60))}</span>')


def _cell(value: object) -> str:
    text = value if isinstance(value, _Html) else _text(_plain(value))
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    looks_so = isinstance(value, str) and value[:1].isdigit() and value.replace(",", "").replace(".", "").isdigit()
    return f'<td class="number">{text}</td>' if is_number or looks_so else f"<td>{text}</td>"


def _plain(value: object) -> str:
    """Return any JSON value as one readable line."""
    if value is None or value == "":
        return ABSENT
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)):
        return _number(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_plain(inner)}" for name, inner in value.items()) or ABSENT
    if isinstance(value, (list, tuple)):
        return f"[{', '.join('any' if inner is None else _plain(inner) for inner in value)}]"
    return str(value)


def _number(value: object) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    if not isinstance(value, float):
        return _plain(value)
    return f"{value:,.0f}" if 1000 <= abs(value) < math.inf else f"{value:.4g}"


def _interval(ends: Sequence[float] | None) -> str | None:
    return f"{_number(ends[0])} to {_number(ends[1])}" if ends else None


def _fixed(value: float | None, digits: int, *, unit: float = 1.0) -> str | None:
    return None if value is None or not math.isfinite(value) else f"{value / unit:,.{digits}f}"


def _text(value: object) -> str:
    return escape(str(value), quote=True)
