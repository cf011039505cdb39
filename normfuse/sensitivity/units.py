"""Which parts of a network share their bits, what each choice is expected to cost, and what it uses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from torch import Tensor, fx

from normfuse.graph import Graph, ops, query
from normfuse.graph.quantization import is_requested, requested_weights, requests
from normfuse.precision.assignment import may_narrow
from normfuse.precision.workload import Work, workload
from normfuse.quant.allocation import Unit
from normfuse.quant.bits import FLOAT, Bits
from normfuse.sensitivity.sensitivity import Sensitivity

__all__ = ["BOPS", "WEIGHT_BITS", "Member", "bits_by_map", "members_of", "options", "units", "use_of"]

WEIGHT_BITS: Final = "weight-bits"
BOPS: Final = "bops"
"""Products of the bits of weight and activation, summed over all multiplications of a sample (methods.md 7.3)."""

UNCHANGED: Final = frozenset({*ops.VIEWS, *ops.POINTWISE_KEEPING, ops.FLATTEN, ops.UNSQUEEZE, ops.RELU})
"""What stands between a tensor and the sum or concatenation that it meets others in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """Linear maps that read one tensor: they have the same bits, so that an engine can compute them as one.

    Attributes:
        name: of its first map.
        maps: by name.
        source: the name of the tensor's node; empty where it has no codes, or codes of a fixed width.
        fixed: the width of the input's codes where it cannot be chosen (images have eight bits), else None.
        tie: members with the same tie read tensors that are added or concatenated: one width of activations.
    """

    name: str
    maps: Mapping[str, Work]
    source: str
    fixed: int | None
    tie: str

    def allowed(self, bits: Bits) -> Bits:
        """Return the bits with the width of activations that the member can have."""
        if self.source or bits.is_float:
            return bits
        return Bits(bits.weight, FLOAT if self.fixed is None else self.fixed)


def members_of(graph: Graph, sample: Sequence[Tensor]) -> list[Member]:
    """Return the members of a placed graph (``place-quantizers``), in graph order; sizes are those of the sample."""
    work, ties, found = workload(graph, sample), _ties(graph), list[Member]()
    read = {reader: request for request in requests(graph) for reader in request.readers}
    groups = dict[object, list[fx.Node]]()
    for node in requested_weights(graph):
        if node.name in work:
            groups.setdefault(read[node].node if node in read else node, []).append(node)
    for nodes in groups.values():
        request = read.get(nodes[0])
        narrows = request is not None and may_narrow(request)
        found.append(
            Member(
                name=nodes[0].name,
                maps={node.name: work[node.name] for node in nodes},
                source=request.source.name if request is not None and narrows else "",
                fixed=request.type.bits if request is not None and not narrows else None,
                tie=ties.get(request.source.name, request.source.name) if request is not None else nodes[0].name,
            )
        )
    return found


def options(weight_widths: Iterable[int], activation_widths: Iterable[int]) -> tuple[Bits, ...]:
    """Return the pairs of widths that a layer can have: floats are read by float weights, or by any."""
    pairs = ((weight, activation) for weight in sorted(weight_widths) for activation in sorted(activation_widths))
    found = [Bits(*pair) for pair in pairs if pair[0] != FLOAT]
    return (*found, Bits(FLOAT, FLOAT)) if FLOAT in set(weight_widths) else tuple(found)


def units(members: Sequence[Member], score: Sensitivity, choices: Sequence[Bits]) -> list[Unit]:
    """Return what the solver chooses for: expected damage, weight bits and BOPs of every member at every choice."""
    return [
        Unit(
            name=member.name,
            damage={bits: _damage(member, score, bits) for bits in _possible(member, choices)},
            use={bits: use_of(member, bits) for bits in _possible(member, choices)},
            tie=member.tie,
        )
        for member in members
    ]


def bits_by_map(members: Iterable[Member], chosen: Mapping[str, Bits]) -> dict[str, Bits]:
    """Return the bits of every linear map, by its name, from those of the members."""
    return {name: chosen[member.name] for member in members for name in member.maps}


def _possible(member: Member, choices: Sequence[Bits]) -> list[Bits]:
    """Return the choices that differ for a member whose input may have no codes, or codes of one width."""
    return list(dict.fromkeys(member.allowed(bits) for bits in choices))


def _damage(member: Member, score: Sensitivity, bits: Bits) -> float:
    if bits.is_float:
        return 0.0
    weights = sum(score.weights[name][bits.weight] for name in member.maps)
    if not member.source or bits.activation == FLOAT:
        return weights
    return weights + score.activations.get(member.source, {}).get(bits.activation, 0.0)


def use_of(member: Member, bits: Bits) -> dict[str, float]:
    """Return what a member uses of the resources that bits alone decide."""
    parameters = sum(work.parameters for work in member.maps.values())
    macs = sum(work.macs for work in member.maps.values())
    return {WEIGHT_BITS: parameters * bits.weight, BOPS: macs * bits.weight * bits.activation}


def _ties(graph: Graph) -> dict[str, str]:
    """Return a common name for requested tensors that are added to each other or concatenated, by their names."""
    root = dict[str, str]()

    def find(name: str) -> str:
        while root.setdefault(name, name) != name:
            name = root[name]
        return name

    for node in graph.nodes:
        if query.is_call(node, ops.ADD, ops.CAT):
            names = [name for source in node.all_input_nodes if (name := _requested_behind(source)) is not None]
            for name in names[1:]:
                root[find(name)] = find(names[0])
    return {name: find(name) for name in list(root)}


def _requested_behind(node: fx.Node) -> str | None:
    """Return the tensor whose codes a node hands on, if it is one."""
    while query.is_call(node, *UNCHANGED):
        node = node.all_input_nodes[0]
    return node.all_input_nodes[0].name if is_requested(node) else None
