"""The bits that a target has kernels for, and the layers that it has them for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from normfuse.graph import Graph
from normfuse.graph.quantization import requested_weights
from normfuse.precision.assignment import PlacementOf, wanted_weight
from normfuse.quant.bits import FLOAT, MOST, Bits
from normfuse.quant.target import Target
from normfuse.recipe import Recipe
from normfuse.sensitivity.units import Member, options

__all__ = ["FEW", "bits_of_target", "fewest_of_target", "has_few_by_layer", "members_of_target"]

FEW = Bits(4, FLOAT)
"""Weights in blocks of four bits behind floats."""


def has_few_by_layer(recipe: Recipe) -> bool:
    """Return whether the recipe's few bits are for those layers alone that the target has kernels for."""
    return recipe.target is Target.TRT and recipe.precision.is_weight_only


def bits_of_target(recipe: Recipe) -> tuple[Bits, ...]:
    """Return the bits that layers may have where they are mixed.

    TensorRT multiplies codes of eight bits with each other, and floats with blocks of four bits; nothing else.
    """
    found = options(*recipe.widths)
    if recipe.target is not Target.TRT:
        return found
    return tuple(each for each in found if each.is_float or each.is_weight_only == (each.weight < MOST))


def fewest_of_target(recipe: Recipe, weight: int) -> Bits:
    """Return the fewest bits of mixed ones, with weights of so many where codes meet weights of any width."""
    return bits_of_target(recipe)[0] if recipe.target is Target.TRT else Bits(weight, min(recipe.widths[1]))


def members_of_target(
    members: Sequence[Member], graph: Graph, recipe: Recipe, placement_of: PlacementOf
) -> list[Member]:
    """Return the members with what they can have: TensorRT has few bits for linear maps of several whole blocks.

    They are multiplied with floats, even where what enters the model would have codes.
    """
    if recipe.target is not Target.TRT:
        return list(members)
    wanted = placement_of(FEW)
    has_few = {node.name: wanted_weight(node, wanted).group is not None for node in requested_weights(graph)}
    return [replace(each, has_few=all(has_few[name] for name in each.maps), may_read_floats=True) for each in members]
