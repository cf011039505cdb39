"""What a compile says of a target with a builder: types of products, the linter, the engine and its kernels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from normfuse.cli.render_bits import Shown

__all__ = ["closeness", "products", "runs", "target"]

MOST: Final = 5

UNUSED_CACHE: Final = "the timing cache is not used"
"""How the message begins of a library that times nothing; the rest of what builders say is in the report."""

COMMANDS: Final = {
    "build": "build with TensorRT 11",
    "build_before_11": "build with TensorRT 10",
    "build_rtx": "build with TensorRT-RTX",
    "time": "time with TensorRT",
    "compare": "compare with TensorRT",
}
"""What the commands of a report are for."""


def products(found: Mapping[str, Any]) -> Shown | None:
    """Return a table of the types that products have, with the layers of each."""
    if not found.get("products"):
        return None
    layers = dict[str, list[str]]()
    for product in found["products"]:
        layers.setdefault(product["type"], []).append(product["layer"] or product["operator"])
    rows: list[tuple[object, ...]] = [
        (kind, len(names), _some(list(dict.fromkeys(names)))) for kind, names in layers.items()
    ]
    return Shown("products", ("types", "how many", "layers"), rows)


def target(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield lines about body, linter, engine and commands."""
    if body := found["body"]:
        usual = ", ".join(f"{name} {count}" for name, count in body["usual_float32"].items())
        yield f"body: {body['nodes']} nodes in {body['type']}" + (f"; in float32: {usual}" if usual else "")
        for each in body["float32"]:
            yield f"  {each['layer']} ({each['operator']}) stays in float32: {each['reason']}"
    levels = Counter(finding["level"] for finding in found["lint"])
    told = ", ".join(f"{count} {level}{'s' * (count > 1)}" for level, count in levels.items()) or "no findings"
    yield f"lint: {told}"
    for finding in found["lint"][:MOST]:
        yield f"  {finding['rule']} at {finding['layer']}: {finding['says']}; {finding['mend']}"
    if len(found["lint"]) > MOST:
        yield f"  and {len(found['lint']) - MOST} more: normfuse inspect --lint trt names them"
    if engine := found["engine"]:
        yield from _engine(engine)
        if run := found.get("run"):  # none in the reports of earlier versions
            yield from _run(run)
    elif failure := found.get("failure"):
        yield f"engine: none, {failure['what']}"
    else:
        yield "engine: none was asked for"
    for name, label in COMMANDS.items():
        if command := found["commands"].get(name):
            yield f"  {label}: {command}"


def _engine(engine: Mapping[str, Any]) -> Iterator[str]:
    is_rtx = engine["flavour"] == "tensorrt_rtx"
    runs_on = ", ".join(engine["capabilities"]) or ("RTX GPUs from Ampere on" if is_rtx else "the GPU it was built on")
    built_by = f"{engine['flavour']} {engine['version']} via {engine['via']}"
    yield f"engine: {engine['bytes']:,} bytes by {built_by} for {runs_on}"
    yield from (f"  {text}" for text in engine["messages"] if text.startswith(UNUSED_CACHE))
    found = engine["audit"]
    if found is None:
        yield "  the builder listed no kernels: nothing is known of what it fused"
        return
    kept = ", ".join(f"{row['got']} of {row['asked']} in {kind}" for kind, row in found["products"].items())
    yield f"  {found['kernels']} kernel{'s' * (found['kernels'] != 1)}; products: {kept}"
    if found["norms"]:
        yield f"  norms: {found['joined_norms']} of {found['norms']} share a kernel with a sum or a quantizer"
    if found["attentions"]:
        yield f"  attention: {found['joined_attentions']} of {found['attentions']} are one kernel"
    if found["alone"]:
        yield f"  quantizers with a kernel of their own: {_some(found['alone'])}"
    for each in found["mismatched"][:MOST]:
        got = "no kernel names it" if each["got"] is None else f"its kernel reads {', '.join(each['got'])}"
        yield f"  {each['layer']}: {each['asked']} was asked for, {got}"


def runs(found: Mapping[str, Any]) -> Shown:
    """Return a table of engines that ran, in trtexec's terms: recorded as a CUDA graph, and plain."""
    ways = ("graph", "plain")
    columns = ("engine", *(f"{way} {what}" for way in ways for what in ("median ms", "p99 ms")))
    rows: list[tuple[object, ...]] = [
        (
            each["label"],
            *(_time(each[way], name) for way in ways for name in ("median", "p99")),
            f"{each['plain']['enqueue_ms']['median']:.3f}",
            f"{(each['graph'] or each['plain'])['throughput_qps']:,.0f}",
            "" if each["against_first"] is None else f"{each['against_first']:.2f}x",
        )
        for each in found["engines"]
    ]
    return Shown(f"GPU compute on {_device(found)}", (*columns, "enqueue ms", "inferences/s", "speed"), rows)


def closeness(each: Mapping[str, Any]) -> Iterator[str]:
    """Yield what an engine was run on, how far its outputs are from onnxruntime's, and why it has no CUDA graph."""
    inputs = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in each["inputs"].items())
    allowed = f"(at most {each['allowed_error']:.2g})"
    yield f"  {inputs}: outputs differ from onnxruntime's by {each['output_error']:.2g} of the largest {allowed}"
    if each["no_graph"]:
        yield f"  no CUDA graph: {each['no_graph']}"


def _run(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield what running the engine that was just built showed."""
    if "engines" not in found:
        yield f"  not run: {found['reason']}"
        return
    (each,) = found["engines"]
    for way, name in (("graph", "as a CUDA graph"), ("plain", "plain")):
        if each[way]:
            median, p99 = (_time(each[way], figure) for figure in ("median", "p99"))
            yield f"  GPU compute on {_device(found)}, {name}: median {median} ms, p99 {p99} ms"
    yield from closeness(each)


def _device(found: Mapping[str, Any]) -> str:
    return str(found["device"]["name"] or found["device"]["type"])


def _time(way: Mapping[str, Any] | None, name: str) -> str:
    return "" if way is None else f"{way['gpu_ms'][name]:.3f}"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST} more" if len(names) > MOST else ""
    return ", ".join(names[:MOST]) + more
