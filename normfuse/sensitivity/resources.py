"""What bits use, in the units in which budgets are given, and what of it no bits change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from normfuse.precision.workload import Step
from normfuse.quant.bits import FLOAT, MOST, Bits
from normfuse.quant.budget import Limit, Resource
from normfuse.sensitivity.units import Member

__all__ = ["Resources", "stored_bits"]

BYTE = 8
BYTES: Final = Resource.BYTES.value


def stored_bits(width: int, float_bits: int = FLOAT) -> int:
    """Return the bits that a file has for a weight: four, eight, or those of floats."""
    return next(each for each in (4, MOST, float_bits) if width <= each)


def held_bits(width: int, float_bits: int = FLOAT) -> int:
    """Return the bits that an engine holds for an activation: its codes have eight, whatever their width."""
    return MOST if width <= MOST else float_bits


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """What a network of some bits takes.

    Attributes:
        parameters: the weights of all members.
        macs: the multiplications of all members.
        float_bits: of what computes in float: less than 32 where a target's body has fewer.
        float_bytes: of the file of the float model.
        other_bytes: of a quantized file, what is no weight of a member; 0 where files are not limited.
        scales: of every map at all bits, how many scales are stored; empty where files are not limited.
        steps: what is held in memory; none where that is not limited.
        fixed_bits: of codes whose width is not chosen.
        seconds: of every map at all bits; empty where time is not limited.
        float_seconds: of the whole float model.
    """

    parameters: int
    macs: int
    float_bits: int = FLOAT
    float_bytes: int = 0
    other_bytes: int = 0
    scales: Mapping[str, Mapping[Bits, int]] = field(default_factory=dict)
    steps: Sequence[Step] = ()
    fixed_bits: Mapping[str, int] = field(default_factory=dict)
    seconds: Mapping[str, Mapping[Bits, float]] = field(default_factory=dict)
    float_seconds: float = 0.0

    def use(self, member: Member, bits: Bits) -> dict[str, float]:
        """Return what a member takes of every resource."""
        weight, activation = (min(each, self.float_bits) for each in (bits.weight, bits.activation))
        stored = stored_bits(weight, self.float_bits)
        scales = sum(self.scales[name][bits] for name in member.maps if self.scales)
        found = {
            Resource.AVERAGE_BITS.value: member.parameters * weight / self.parameters,
            Resource.BOPS.value: float(member.macs * weight * activation),
            Resource.BYTES.value: (member.parameters * stored + scales * self.float_bits) / BYTE,
        }
        for number, step in enumerate(self.steps):
            found[_step(number)] = step.codes.get(member.reads, 0) * held_bits(bits.activation, self.float_bits) / BYTE
        if self.seconds:
            found[Resource.LATENCY.value] = sum(self.seconds[name][bits] for name in member.maps)
        return found

    @property
    def rest(self) -> dict[str, float]:
        """What is taken whatever the members' bits."""
        names = [Resource.AVERAGE_BITS.value, Resource.BOPS.value, *(_step(at) for at in range(len(self.steps)))]
        found = dict.fromkeys(names, 0.0) | {Resource.BYTES.value: float(self.other_bytes)}
        for number, step in enumerate(self.steps):
            known = {name: count for name, count in step.codes.items() if name in self.fixed_bits}
            fixed = (held_bits(self.fixed_bits[name], self.float_bits) * count for name, count in known.items())
            found[_step(number)] = step.floats + sum(fixed) / BYTE
        if self.seconds:
            in_maps = sum(row[Bits(FLOAT, FLOAT)] for row in self.seconds.values())
            found[Resource.LATENCY.value] = max(self.float_seconds - in_maps, 0.0)
        return found

    def bounds(self, limits: Sequence[Limit]) -> dict[str, float]:
        """Return the largest amounts by the names that ``use`` gives resources; that of the drop is measured later."""
        found = dict[str, float]()
        for limit in limits:
            amount = limit.amount * (self._whole(limit.resource) if limit.is_relative else 1.0)
            if limit.resource is Resource.ACTIVATION_BYTES:
                found |= {_step(number): amount for number in range(len(self.steps))}
            elif limit.resource is not Resource.DROP:
                found[limit.resource.value] = amount
        return found

    def told(self, amounts: Mapping[str, float]) -> dict[str, float]:
        """Return amounts by resource: of what steps hold the most, and bytes only where the whole file was counted."""
        found = dict[str, float]()
        for name, amount in amounts.items():
            word = name.partition(" ")[0]
            found[word] = max(found.get(word, 0.0), amount)
        return found if self.other_bytes else {name: amount for name, amount in found.items() if name != BYTES}

    def _whole(self, resource: Resource) -> float:
        """Return what the float model takes."""
        if resource is Resource.BOPS:
            return float(self.macs * FLOAT * FLOAT)
        if resource is Resource.ACTIVATION_BYTES:
            return max(step.floats + sum(step.codes.values()) * FLOAT / BYTE for step in self.steps)
        return float(self.float_bytes) if resource is Resource.BYTES else self.float_seconds


def _step(number: int) -> str:
    return f"{Resource.ACTIVATION_BYTES.value} at step {number}"
