"""Which parts of a network share their bits, what each choice is expected to cost, and what it uses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final

from torch import Tensor, fx

from normfuse.errors import UsageError
from normfuse.graph import Graph, ops, query
from normfuse.graph.quantization import is_requested, requested_weights, requests
from normfuse.precision.assignment import may_narrow
from normfuse.precision.workload import Work, workload
from normfuse.quant.allocation import Unit
from normfuse.quant.bits import FLOAT, MOST, Bits
from normfuse.quant.overrides import Overrides
from normfuse.sensitivity.sensitivity import Sensitivity

__all__ = [
    "BOPS",
    "UNTOUCHED",
    "WEIGHT_BITS",
    "Member",
    "UseOf",
    "bits_by_map",
    "members_of",
    "options",
    "overridden",
    "units",
    "use_of",
]

WEIGHT_BITS: Final = "weight-bits"
BOPS: Final = "bops"
"""Products of the bits of weight and activation, summed over all multiplications of a sample (methods.md 7.3)."""

UNTOUCHED: Final = Bits(FLOAT, FLOAT)
"""Bits of what is not quantized."""

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
        reads: the name of the tensor that it reads, if that has codes.
        has_few: whether the target gains from fewer than eight bits of its weights alone; else it gets eight of both.
        may_read_floats: whether codes of a fixed width in front of it go where its weights alone have few bits.
        override: the bits that the user gave one of its maps: then it has these and no choice.
    """

    name: str
    maps: Mapping[str, Work]
    source: str
    fixed: int | None
    tie: str
    override: Bits | None = None
    reads: str = ""
    has_few: bool = True
    may_read_floats: bool = False

    @property
    def parameters(self) -> int:
        """The elements of its weights."""
        return sum(work.parameters for work in self.maps.values())

    @property
    def macs(self) -> int:
        """Its multiplications for one sample."""
        return sum(work.macs for work in self.maps.values())

    def allowed(self, bits: Bits) -> Bits:
        """Return the bits that the member gets where ``bits`` are wanted."""
        bits = bits if self.override is None else self.override
        if bits.is_weight_only and not self.has_few:
            bits = Bits(MOST, MOST)
        may_read_floats = self.may_read_floats or self.override is not None
        if self.source or bits.is_float or (may_read_floats and bits.activation == FLOAT):
            return bits
        return Bits(bits.weight, FLOAT if self.fixed is None else self.fixed)


UseOf = Callable[[Member, Bits], Mapping[str, float]]
"""What a member uses of every resource at some bits."""


def members_of(graph: Graph, sample: Sequence[Tensor]) -> list[Member]:
    """Return the members of a placed graph (``place-quantizers``), in graph order; sizes are those of the sample."""
    work, ties, found = workload(graph, sample), _ties(graph), list[Member]()
    read = {reader: request for request in requests(graph) for reader in request.readers}
    groups = dict[object, list[fx.Node]]()
    for node in requested_weights(graph):
        if node.name in work:
            groups.setdefault(node.args[0], []).append(node)
    for nodes in groups.values():
        request = read.get(nodes[0])
        narrows = request is not None and may_narrow(request)
        found.append(
            Member(
                name=nodes[0].name,
                maps={node.name: work[node.name] for node in nodes},
                source=request.source.name if request is not None and narrows else "",
                reads=request.source.name if request is not None else "",
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


def units(
    members: Sequence[Member],
    score: Sensitivity,
    choices: Sequence[Bits],
    *,
    use: UseOf,
    rest: Mapping[str, float] = MappingProxyType({}),
) -> list[Unit]:
    """Return what the solver chooses for: expected damage, and what is used, of every member at every choice.

    What the rest of the network uses is one unit more, without a choice.
    """
    everything_else = Unit(name="", damage={UNTOUCHED: 0.0}, use={UNTOUCHED: rest})
    return [
        Unit(
            name=member.name,
            damage={bits: _damage(member, score, bits) for bits in _possible(member, choices)},
            use={bits: use(member, bits) for bits in _possible(member, choices)},
            tie=member.tie if member.override is None else None,
        )
        for member in members
    ] + ([everything_else] if rest else [])


def overridden(members: Sequence[Member], overrides: Overrides) -> list[Member]:
    """Return the members with the bits that the user gave their layers.

    Raises:
        UsageError: a pattern fits no layer, or maps that read one tensor have been given different bits.
    """
    overrides.refuse_unused([work.layer for member in members for work in member.maps.values()])
    return [replace(member, override=_override(member, overrides)) for member in members]


def _override(member: Member, overrides: Overrides) -> Bits | None:
    layers = [work.layer for work in member.maps.values()]
    given = {bits: layer for layer in layers if (bits := overrides.bits_for(layer)) is not None}
    if len(given) > 1:
        told = " and ".join(f"{layer}={bits}" for bits, layer in given.items())
        raise UsageError(
            f"overrides cannot have {told}",
            where="recipe",
            expected="the same bits for layers that read the same tensor",
            hint=f"give {', '.join(layers)} one width",
        )
    bits = next(iter(given), None)
    if bits is not None and bits.activation != FLOAT and not member.source and member.fixed is None:
        raise UsageError(
            f"overrides cannot have {given[bits]}={bits}",
            where="recipe",
            expected=f"activations of float: none have codes here, as {given[bits]}=w{bits.weight}a16",
            hint="or bits with codes for activations (--bits, --activation-widths)",
        )
    if bits is not None and member.fixed is not None and bits.activation not in (member.fixed, FLOAT):
        raise UsageError(
            f"overrides cannot have {given[bits]}={bits}",
            where="recipe",
            expected=f"activations of {member.fixed} bits, as {given[bits]}=w{bits.weight}a{member.fixed}: "
            "it reads what enters the model",
        )
    return bits


def bits_by_map(members: Iterable[Member], chosen: Mapping[str, Bits]) -> dict[str, Bits]:
    """Return the bits of every linear map, by its name, from those of the members."""
    return {name: chosen[member.name] for member in members for name in member.maps}


def _possible(member: Member, choices: Sequence[Bits]) -> list[Bits]:
    """Return the choices that differ for a member whose input may have no codes, or codes of one width."""
    return list(dict.fromkeys(member.allowed(bits) for bits in choices))


def _damage(member: Member, score: Sensitivity, bits: Bits) -> float:
    if bits.is_float:
        return 0.0
    # Bits that the user gave may be none that were scored: there is no choice, and nothing to compare.
    weights = sum(score.weights[name].get(bits.weight, 0.0) for name in member.maps)
    if not member.source or bits.activation == FLOAT:
        return weights
    return weights + score.activations.get(member.source, {}).get(bits.activation, 0.0)


def use_of(member: Member, bits: Bits) -> dict[str, float]:
    """Return what a member uses of the resources that bits alone decide."""
    return {WEIGHT_BITS: member.parameters * bits.weight, BOPS: member.macs * bits.weight * bits.activation}


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
