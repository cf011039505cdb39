"""What a compile says of a target with a builder: types of products, the linter, the engine and its kernels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from normfuse.cli.render_bits import Shown

__all__ = ["products", "target"]

MOST: Final = 5


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
    elif failure := found.get("failure"):
        yield f"engine: none, {failure['what']}"
    else:
        yield "engine: none was asked for"
    yield f"  build   {found['commands']['build']}"
    yield f"  or      {found['commands']['build_rtx']}"
    yield f"  time    {found['commands']['time']}"
    if compare := found["commands"].get("compare"):
        yield f"  compare {compare}"


def _engine(engine: Mapping[str, Any]) -> Iterator[str]:
    runs_on = ", ".join(engine["capabilities"]) or "the builder's default"
    yield f"engine: {engine['bytes']:,} bytes by {engine['flavour']} {engine['version']} for {runs_on}"
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


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST} more" if len(names) > MOST else ""
    return ", ".join(names[:MOST]) + more
