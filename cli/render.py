"""The only place that prints: results on standard output, talk and progress on standard error."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table

from normfuse.cli import render_bits, render_engine
from normfuse.errors import NormfuseError
from normfuse.progress import Advance, Progress, Silent

__all__ = [
    "ShownProgress",
    "as_json",
    "certificate",
    "comparison",
    "diagnosis",
    "error",
    "inspection",
    "line",
    "progress",
    "report",
    "repository",
    "sensitivity",
    "table",
    "talk",
    "written_report",
]

MOST_NAMES: Final = 5

SCORES: Final = {"top_1": "top-1 %", "mean_iou": "mean IoU %"}


def as_json(value: Mapping[str, Any] | Sequence[Any]) -> None:
    """Print a value as JSON."""
    try:
        print(json.dumps(value, indent=2, sort_keys=False, default=str), flush=True)
    except BrokenPipeError:
        _silence(sys.stdout)


def talk(text: str) -> None:
    """Say something that is no result."""
    _Console(stderr=True, highlight=False, soft_wrap=True).print(text, markup=False)


def error(problem: NormfuseError) -> None:
    """Show an error: what, where, expected, what to do."""
    talk(f"error: {problem}")


def line(text: str = "") -> None:
    """Print one line of the result."""
    _Console(highlight=False, soft_wrap=True).print(text, markup=False)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table; numbers stand to the right."""
    cells = [[_cell(value) for value in row] for row in rows]
    drawn = Table(title=title, title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        numeric = bool(cells) and all(row[index][:1] in "0123456789-+–" for row in cells if row[index])
        drawn.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in cells:
        drawn.add_row(*row)
    console = _Console(highlight=False)
    console.width = max(console.width, 100) if not console.is_terminal else console.width
    console.print(drawn, markup=False)


class _Console(Console):
    """A console whose reader may leave: the work goes on, and the exit code stays the command's own."""

    def on_broken_pipe(self) -> None:
        """Print nothing from here on."""
        self.quiet = True
        _silence(self.file)


def _silence(stream: IO[str]) -> None:
    # The descriptor is replaced, so that flushing what is left of the output does not fail at the end.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def _cell(value: object) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class ShownProgress:
    """Draws each task as a bar on standard error."""

    @contextmanager
    def task(self, label: str, total: int | None = None) -> Iterator[Advance]:
        """Show a bar (or a pulse, where the length is unknown) until the context ends."""
        columns = (TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Bars(*columns, console=_Console(stderr=True), transient=False) as bars:
            shown = bars.add_task(label, total=total)
            yield lambda steps: bars.advance(shown, steps)
            if total is None:
                bars.update(shown, total=1, completed=1)


def progress(*, quiet: bool) -> Progress:
    """Return bars on standard error, or nothing."""
    return Silent() if quiet else ShownProgress()


def report(found: Mapping[str, Any], output: Path) -> None:
    """Show what a compile did: folds, quantization, checks, comparison, verdict."""
    _folds(found["passes"])
    _kinds(found)
    if ranges := found["quantization"].get("tensors"):
        methods = Counter(tensor["method"] for tensor in ranges.values())
        chosen = ", ".join(f"{method} {count}" for method, count in methods.most_common())
        kinds = ", ".join(f"{kind} {count:,}" for kind, count in found["quantization"]["constants_by_type"].items())
        line(f"ranges: {len(ranges)} tensors from {found['quantization']['samples']} samples ({chosen})")
        line(f"constants: {kinds}; {found['quantization']['effective_bits']:.2f} bits each on average")
    for text in render_bits.mixed(found.get("mixed") or {}):
        line(text)
    rows = [
        (
            "holds" if check["holds"] else "FAILS",
            check["name"],
            _figure(check["value"]),
            _figure(check["bound"]),
            check["detail"],
        )
        for check in found["checks"]
    ]
    table("checks", ("", "check", "value", "bound", "of"), rows)
    _accuracy_control(found["accuracy_control"])
    comparison(found)
    if shown := render_bits.front(found.get("pareto") or {}):
        table(*shown)
    if (builder := found.get("tensorrt")) is not None:
        if shown := render_engine.products(builder):
            table(*shown)
        for text in render_engine.target(builder):
            line(text)
    verdict = found["verdict"]
    line(f"verdict: {verdict['verdict']}, ships {verdict['ships']}")
    for reason in verdict["reasons"]:
        line(f"  {reason}")
    line(f"artifact: {output}")


def written_report(found: Mapping[str, Any], folder: Path) -> None:
    """Show a report, or a certificate, as the command that wrote the folder did."""
    if found.get("format") != "normfuse certificate":
        report(found, folder)
        return
    certificate(found)
    line(f"written: {folder}")


def repository(found: Mapping[str, Any]) -> None:
    """Show what was written for Triton, and what to know before it is served."""
    batch = found["max_batch_size"]
    batches = f"batches of up to {batch}" if batch else "requests as they come"
    line(f"{found['backend']} backend, {batches}, instances: {found['instances']}")
    for text in found["notes"]:
        line(f"note: {text}")
    for text in found["warnings"]:
        line(f"warning: {text}")
    for name in found["files"]:
        line(f"written: {Path(found['folder']) / name}")


def _kinds(found: Mapping[str, Any]) -> None:
    """Show how many activations and weights have which kind of codes."""
    if kinds := found.get("quantization", {}).get("kinds"):
        line(f"codes: {', '.join(f'{kind} {count}' for kind, count in kinds.items() if count)}")


def _accuracy_control(found: Mapping[str, Any] | None) -> None:
    """Show which blocks were put back, where the drop was not allowed as it was."""
    if found is None or not found["trials"][1:]:
        return
    rows = [(", ".join(back["layers"]), back["level"], f"{back['effect']:.2e}") for back in found["put_back"]]
    table(f"put back: {len(rows)} blocks", ("layers", "to", "output error that went with it"), rows)
    trials = ", ".join(f"{trial['drop']:.2f} ({trial['put_back']})" for trial in found["trials"])
    state = "holds" if found["holds"] else "does NOT hold"
    line(f"accuracy control {state}: {found['allowed']:.2f} points allowed; points lost (blocks put back): {trials}")


def _folds(passes: Sequence[Mapping[str, Any]]) -> None:
    sites = [site for step in passes for site in step["sites"]]
    if rows := [(site["affine"], site["into"], site["formula"]) for site in sites if "affine" in site]:
        table(f"folded: {len(rows)} affines", ("affine", "into", "formula"), rows)
    if turned := [(site["node"], site["turned"]) for site in sites if "turned" in site]:
        table(f"rotated: {len(turned)}", ("layers", "judged by"), turned)
    if scaled := [(site["node"], site["into"], site["error"], site["stays"]) for site in sites if "stays" in site]:
        table(f"equalized: {len(scaled)} tensors", ("tensor", "read by", "error of its maps", "what stays"), scaled)
    left = [
        (refusal["layer"] or refusal["node"], refusal["because"], refusal["detail"])
        for step in passes
        for refusal in step["refused"]
    ]
    if left:
        table(f"left: {len(left)}", ("where", "because", "detail"), left)


def certificate(found: Mapping[str, Any]) -> None:
    """Show what was folded into what, what stays and why, and the proof."""
    for note in found["notes"]:
        line(f"note: {note}")
    rows = [
        (
            site["affine"],
            site["into"],
            "; ".join(filter(None, (site["formula"], site.get("repair", "")))),
            site.get("scale", ""),
            f"{site['relative']:.1e}",
        )
        for site in found["sites"]
    ]
    table(f"folds: {len(rows)}", ("what", "into", "formula", "scale", "float64 error"), rows)
    for what in ("affine", "norm"):
        left = [(each["layer"], each["because"], each["detail"]) for each in found["left"] if each["what"] == what]
        if left:
            table(f"{what}s left: {len(left)}", ("where", "because", "detail"), left)
    for each in found["undone"]:
        line(f"UNDONE: {each['rule']} at {each['node']}: its float64 check failed")
    before, after = (", ".join(f"{kind} {n}" for kind, n in found["norms"][key].items()) for key in ("before", "after"))
    affines = found["affines"]
    line(f"norms: {before or 'none'}; after folding: {after or 'none'}")
    line(f"affines: {affines['found']} found, {affines['folded']} folded, {affines['left']} left")
    error = found["error"]
    line(
        f"folded model = original on {found['samples']['count']} samples ({found['samples']['origin']}): "
        f"error {error['float64']:.1e} in float64, {error['own_type']:.1e} in its own type"
    )


def comparison(found: Mapping[str, Any]) -> None:
    """Show engines side by side."""
    measured = found["comparison"]
    scores = [key for key in SCORES if any(row.get(key) is not None for row in measured["rows"])]
    columns = (
        "engine",
        "p50 ms",
        "p90 ms",
        "p99 ms",
        "samples/s",
        "speed",
        "memory MB",
        "file MB",
        *(SCORES[key] for key in scores),
        "like float",
    )
    rows = [
        (
            row["label"],
            *(_fixed(row.get(key), digits) for key, digits in (("p50_ms", 3), ("p90_ms", 3), ("p99_ms", 3))),
            _fixed(row.get("samples_per_second"), 1),
            _fixed(row.get("speedup"), 2, unit="x"),
            _fixed(row["peak_bytes"] and row["peak_bytes"] / 1e6, 1),
            _fixed(row["file_bytes"] and row["file_bytes"] / 1e6, 2),
            *(_fixed(row.get(key), 2) for key in scores),
            _fixed(row["agreement"], 2, unit=" %"),
        )
        for row in measured["rows"]
    ]
    table(f"batch {measured['batch']}, {measured['threads']} threads, against {measured['baseline']}", columns, rows)
    for text in found.get("warnings", ()):
        line(f"warning: {text}")


def engine_runs(found: Mapping[str, Any]) -> None:
    """Show engines that ran on a GPU, side by side."""
    table(*render_engine.runs(found))
    for each in found["engines"]:
        line(each["label"])
        for text in render_engine.closeness(each):
            line(text)


def sensitivity(found: Mapping[str, Any]) -> None:
    """Show the most sensitive layers, and how they were scored."""
    shown, said = render_bits.sensitivity(found)
    if shown:
        table(*shown)
    if said:
        line("; ".join(said))


def lint(found: Mapping[str, Any]) -> None:
    """Show what an engine breaks of a target's rules, a paragraph per rule."""
    findings = found["findings"]
    line(f"{found['rules']} rules of {found['target']}, {len(findings)} finding{'s' * (len(findings) != 1)}")
    for name in dict.fromkeys(each["rule"] for each in findings):
        same = [each for each in findings if each["rule"] == name]
        first = same[0]
        line(f"{first['level']}: {first['says']} ({name})")
        line(f"  at   {_first([' '.join(filter(None, (each['layer'], each['detail']))) for each in same])}")
        line(f"  try  {first['mend']}")


def _first(names: Sequence[str]) -> str:
    """Return the first names, and that there are more."""
    return ", ".join([*names[:MOST_NAMES], *["..."] * (len(names) > MOST_NAMES)])


def inspection(found: Mapping[str, Any]) -> None:
    """Show a model, or an artifact."""
    if "manifest" in found:
        for problem in found["problems"]:
            line(f"PROBLEM: {problem}")
        files = [(name, digest[:16]) for name, digest in found["manifest"]["files"].items()]
        table("files", ("file", "sha256"), files)
        if not found["problems"] and found["report"].get("format") == "normfuse certificate":
            certificate(found["report"])
            return
        if found["problems"] or not {"comparison", "verdict"} <= found["report"].keys():
            line("the report is not shown: it is of the files that were written")
            return
        _kinds(found["report"])
        if "float_tensors" in found:
            names = found["float_tensors"]
            line(f"float tensors between inputs and outputs: {len(names)} {_first(names)}".rstrip())
        comparison(found["report"])
        line(f"verdict: {found['report']['verdict']['verdict']}")
        return
    line(f"{found['kind']}, {found['constant_bytes'] / 1e6:.2f} MB of constants")
    for note in found["notes"]:
        line(f"note: {note}")
    table("interface", ("", "tensor"), [("in", x) for x in found["inputs"]] + [("out", x) for x in found["outputs"]])
    names = list(dict.fromkeys([*found["operators"], *found["operators_folded"]]))
    counts = [(name, found["operators"].get(name, 0), found["operators_folded"].get(name, 0)) for name in names]
    table("operators", ("operator", "as given", "folded"), counts)
    certificate(found["certificate"])
    if "text" in found:
        line(found["text"])


def diagnosis(found: Mapping[str, Any]) -> None:
    """Show the environment, what is installed, and how the trial ended."""
    facts = {name: value for name, value in found["environment"].items() if name != "packages"}
    table("environment", ("fact", "value"), list(facts.items()))
    rows = [(each["name"], each["found"], each["least"], each["extra"]) for each in found["packages"]]
    table("packages", ("package", "installed", "at least", "only for"), rows)
    if placement := found["placement"]:
        line(f"8-bit placement: {placement['name']} ({placement['reason']})")
    line("engines: " + ", ".join(f"{name} {value or 'none'}" for name, value in found["engines"].items()))
    for text in found["missing"]:
        line(f"missing: {text}")
    for text in found["optional_missing"]:
        line(f"not installed: {text}")
    line(f"trial: {'ok' if found['trial']['ok'] else 'FAILED'}: {found['trial']['detail']}")


def _figure(value: float | None) -> str:
    """Return a figure; JSON has none for what is not finite, so a report that was read has null there."""
    return "–" if value is None else f"{value:.3g}"


def _fixed(value: float | None, digits: int, *, unit: str = "") -> str | None:
    return None if value is None else f"{value:,.{digits}f}{unit}"
