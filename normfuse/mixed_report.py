"""What a report says about bits per layer: as they were chosen, and as they are in the engine that ships."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from normfuse.graph import Graph
from normfuse.graph.quantization import requested_weights, requests
from normfuse.quant.bits import MOST
from normfuse.quant.budget import Resource
from normfuse.sensitivity.choosing import Choice
from normfuse.sensitivity.resources import Resources
from normfuse.sensitivity.sensitivity import Sensitivity
from normfuse.sensitivity.units import Member

__all__ = ["mixed_report", "realised"]


def mixed_report(
    members: Sequence[Member],
    found: Sequence[Choice],
    score: Sensitivity,
    resources: Resources,
    bounds: Mapping[str, float],
) -> dict[str, Any]:
    """Return the best choice as plain data: candidates, what is used of the budget, and every layer's bits.

    Args:
        members: what got bits.
        found: the best choice first.
        score: that the best is the optimum of.
        resources: what bits use.
        bounds: the limits, by the names of resources.
    """
    best, shares = found[0], _shares(members, score)
    layers = [
        {
            "layer": work.layer,
            "node": name,
            "bits": best.bits[name].spelled,
            "share": shares[name],
            "parameters": work.parameters,
            "macs": work.macs,
            "overridden": member.override is not None,
        }
        for member in members
        for name, work in member.maps.items()
    ]
    use, limits = resources.told(best.allocation.use), resources.told(bounds)
    return {
        "gap": best.allocation.gap,
        "float_bits": resources.float_bits,
        "score": best.method,
        "facts": dict(score.facts),
        "candidates": [{"score": each.method, "loss": each.loss} for each in found],
        "used": {
            name: {"amount": amount, **({"limit": limits[name]} if name in limits else {})}
            for name, amount in use.items()
        },
        "average_weight_bits": use[Resource.AVERAGE_BITS.value],
        "histogram": _histogram(layers),
        "layers": layers,
    }


def realised(report: Mapping[str, Any], graph: Graph) -> dict[str, Any]:
    """Return a report with the bits of a graph with requests: blocks that were put back have others than were chosen.

    What was used of the budget is then no longer told: it was counted for the bits that were chosen.
    """
    if not report:
        return {}
    spelled = _spelled(graph)
    layers = [{**each, "bits": spelled.get(each["node"], "float")} for each in report["layers"]]
    if all(now["bits"] == before["bits"] for now, before in zip(layers, report["layers"], strict=True)):
        return dict(report)
    put_back = [{**now, "chosen": before["bits"]} for now, before in zip(layers, report["layers"], strict=True)]
    total = sum(each["parameters"] for each in put_back)
    bits = sum(each["parameters"] * _weight_bits(each["bits"], report["float_bits"]) for each in put_back)
    return {
        **report,
        "used": {},
        "average_weight_bits": bits / max(total, 1),
        "histogram": _histogram(put_back),
        "layers": put_back,
    }


def _histogram(layers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    counts, parameters = Counter(each["bits"] for each in layers), Counter[str]()
    for each in layers:
        parameters[each["bits"]] += each["parameters"]
    return [{"bits": bits, "layers": count, "parameters": parameters[bits]} for bits, count in counts.most_common()]


def _spelled(graph: Graph) -> dict[str, str]:
    """Return the bits of the maps whose weights are codes, by name; seven-bit weights stand where others have eight."""
    read = {reader: request.type.bits for request in requests(graph) for reader in request.readers}
    found = dict[str, str]()
    for node, asked in requested_weights(graph).items():
        bits = min(MOST, asked.type.bits + (asked.type.bits == MOST - 1))
        found[node.name] = f"w{bits}a{read.get(node, 16)}"
    return found


def _weight_bits(spelled: str, float_bits: int) -> int:
    return float_bits if spelled == "float" else int(spelled[1 : spelled.index("a")])


def _shares(members: Sequence[Member], score: Sensitivity) -> dict[str, float]:
    """Return the part of every map in the expected damage of all at their fewest bits."""
    damage = dict[str, float]()
    for member in members:
        row = score.activations.get(member.source, {})
        for name in member.maps:
            shared = row[min(row)] / len(member.maps) if row else 0.0
            damage[name] = score.weights[name][min(score.weights[name])] + shared
    total = sum(damage.values())
    return {name: amount / total if total > 0 else 0.0 for name, amount in damage.items()}
