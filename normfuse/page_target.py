"""Tables about what a target with a builder was given and made of it, for the HTML page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

__all__ = ["Part", "target_parts"]

Row = Sequence[object]

FIGURES: Final = (("gpu_ms", "median"), ("gpu_ms", "p99"), ("enqueue_ms", "median"), ("host_ms", "median"))
"""Of a run: what trtexec calls GPU compute and enqueue, and an inference alone by the host's clock."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A table under its heading."""

    heading: str
    columns: tuple[str, ...]
    rows: list[Row]


def target_parts(found: Mapping[str, Any]) -> Iterator[Part]:
    """Yield the types of products, the linter's findings, the engine and its kernels, and the commands.

    What was not found out is left out.
    """
    if products := found.get("products"):
        yield _products(products, (found.get("engine") or {}).get("audit") or {})
    yield from _body(found.get("body") or {})
    if "lint" in found:
        yield _lint(found["lint"])
    yield from _engine(found)
    if commands := found.get("commands"):
        yield Part(heading="Commands", columns=("to", "command"), rows=list(commands.items()))


def _products(products: Sequence[Mapping[str, Any]], audit: Mapping[str, Any]) -> Part:
    counts = Counter(each["type"] for each in products)
    layers = {
        kind: dict.fromkeys(each["layer"] or each["operator"] for each in products if each["type"] == kind)
        for kind in counts
    }
    kept = {kind: row["got"] for kind, row in audit.get("products", {}).items()}
    columns = ("types", "asked for", "in the engine", "layers")
    rows: list[Row] = [(kind, count, kept.get(kind), ", ".join(layers[kind])) for kind, count in counts.items()]
    return Part(heading="Products", columns=columns, rows=rows)


def _body(body: Mapping[str, Any]) -> Iterator[Part]:
    if stay := body.get("float32"):
        rows: list[Row] = [(each["layer"], each["operator"], each["reason"]) for each in stay]
        heading = f"Float32 beside a body of {body['type']}"
        yield Part(heading=heading, columns=("layer", "operator", "because"), rows=rows)


def _lint(findings: Sequence[Mapping[str, Any]]) -> Part:
    names = ("level", "rule", "layer", "says", "mend")
    rows: list[Row] = [[each.get(name) for name in names] for each in findings]
    told = f"{len(rows)} finding{'s' * (len(rows) > 1)}" if rows else "no findings"
    return Part(heading=f"Linter: {told}", columns=("", "rule", "where", "says", "try"), rows=rows)


def _engine(found: Mapping[str, Any]) -> Iterator[Part]:
    if failure := found.get("failure"):
        yield Part(heading="Engine: none", columns=("what", "at", "try"), rows=[list(failure.values())])
    engine = found.get("engine")
    if not engine:
        return
    facts = {name: engine.get(name) for name in ("flavour", "version", "via", "capabilities", "bytes", "messages")}
    audit = engine.get("audit")
    if audit:
        facts["kernels"] = audit["kernels"]
        facts["norms that share a kernel"] = f"{audit['joined_norms']} of {audit['norms']}"
        facts["attentions that are one kernel"] = f"{audit['joined_attentions']} of {audit['attentions']}"
        facts["quantizers with a kernel of their own"] = ", ".join(audit["alone"])
    yield Part(heading="Engine", columns=("fact", "value"), rows=list(facts.items()))
    yield from _run(found.get("run") or {})
    if audit and audit["mismatched"]:
        rows: list[Row] = [(each["layer"], each["asked"], _read(each["got"])) for each in audit["mismatched"]]
        yield Part(heading="Other kernels than asked for", columns=("layer", "asked for", "kernel reads"), rows=rows)


def _run(found: Mapping[str, Any]) -> Iterator[Part]:
    """Yield the times of the engine, in trtexec's terms, and how far its outputs are from onnxruntime's."""
    rows: list[Row] = [
        (way, *(each[way][kind][name] for kind, name in FIGURES), each[way]["throughput_qps"], each["output_error"])
        for each in found.get("engines") or ()
        for way in ("graph", "plain")
        if each[way]
    ]
    if rows:
        columns = ("", *(f"{kind} {name}" for kind, name in FIGURES), "inferences/s", "output error")
        yield Part(heading=f"Run on {found['device']['name'] or found['device']['type']}", columns=columns, rows=rows)
    elif reason := found.get("reason"):
        yield Part(heading="Not run", columns=("because",), rows=[(reason,)])


def _read(types: Sequence[str] | None) -> str:
    return "no kernel names it" if types is None else ", ".join(types)
