"""What a fold would change: collected first, judged as a whole, then written."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor, fx

from normfuse.graph import Graph, ops, query
from normfuse.graph.affine import Affine, along, read_affine
from normfuse.graph.edit import Editor
from normfuse.report import Reason
from normfuse.rewrite.linear_map import LinearMap, read_linear_map, rebind
from normfuse.rewrite.padding_repair import NOTHING, Repair, choose_repair

__all__ = ["Blocked", "Changes", "Settled", "describe_fold", "is_identity"]

KeyT = TypeVar("KeyT")


@dataclass(frozen=True, slots=True)
class Blocked:
    """The node where a fold came to an end, and why."""

    node: fx.Node
    reason: Reason
    detail: str = ""

    @property
    def where(self) -> str:
        """The user's module path of the node, or its name."""
        return self.detail or query.layer_of(self.node) or self.node.name


@dataclass(slots=True)
class Changes:
    """Affines that go into linear maps (``before`` or ``behind`` them), tables, constants and other affines."""

    before: dict[fx.Node, Affine] = field(default_factory=dict)
    behind: dict[fx.Node, Affine] = field(default_factory=dict)
    tables: dict[fx.Node, Affine] = field(default_factory=dict)
    constants: dict[tuple[fx.Node, fx.Node], Affine] = field(default_factory=dict)
    affines: dict[fx.Node, Affine] = field(default_factory=dict)

    def put_behind(self, node: fx.Node, wanted: Affine) -> Reason | None:
        """Note that a linear map's output gets ``wanted``, behind what it gets already."""
        return _compose(self.behind, node, wanted, self.behind.get(node))

    def put_into_table(self, node: fx.Node, wanted: Affine) -> Reason | None:
        """Note that the table of an embedding gets ``wanted``, behind what it gets already."""
        return _compose(self.tables, node, wanted, self.tables.get(node))

    def put_into_constant(self, reader: fx.Node, constant: fx.Node, wanted: Affine) -> Reason | None:
        """Note that ``reader`` reads ``wanted`` of a constant, behind what it gets already."""
        return _compose(self.constants, (reader, constant), wanted, self.constants.get((reader, constant)))

    def put_into_affine(self, graph: Graph, node: fx.Node, wanted: Affine) -> Reason | None:
        """Note that an affine node's output gets ``wanted``."""
        return _compose(self.affines, node, wanted, self.affines.get(node) or read_affine(graph, node))

    def carry_into_affine(self, graph: Graph, node: fx.Node, carried: Affine) -> Reason | None:
        """Note that an affine node's input is carried by ``carried``, which it takes over."""
        own = self.affines.get(node) or read_affine(graph, node)
        return _compose(self.affines, node, own, carried)

    def settle(self, graph: Graph) -> Settled | Blocked:
        """Compute every new constant, or say which one cannot be made."""
        maps: dict[fx.Node, LinearMap] = {}
        repairs: dict[fx.Node, Repair] = {}
        for node in {**self.before, **self.behind}:
            linear = read_linear_map(graph, node)
            assert linear is not None
            if (found := self.before.get(node)) is not None:
                repair = choose_repair(graph, node, linear, found)
                if isinstance(repair, Reason):
                    return Blocked(node, repair)
                repairs[node] = repair
                linear = linear.before(found)
            if (wanted := self.behind.get(node)) is not None:
                linear = linear.behind(wanted)
                repairs[node] = repairs.get(node, NOTHING).scaled(wanted, linear.output_axis)
            if not (linear.is_finite and repairs.get(node, NOTHING).fits(query.dtype(node))):
                return Blocked(node, Reason.OVERFLOW)
            maps[node] = linear
        for node, total in self.affines.items():
            if not total.fits(query.dtype(node)):
                return Blocked(node, Reason.OVERFLOW)
        tables = {
            node: _changed(graph, table, wanted, like=table)
            for node, wanted in self.tables.items()
            if isinstance(table := node.args[0], fx.Node)
        }
        constants = [
            (reader, old, _changed(graph, old, wanted, like=_seen_by(reader, old)))
            for (reader, old), wanted in self.constants.items()
        ]
        for node, tensor in [*tables.items(), *((reader, tensor) for reader, _, tensor in constants)]:
            if not bool(tensor.isfinite().all()):
                return Blocked(node, Reason.OVERFLOW)
        return Settled(maps, repairs, tables, constants, dict(self.affines))


def _compose(into: dict[KeyT, Affine], key: KeyT, outer: Affine, inner: Affine | None) -> Reason | None:
    total = outer if inner is None else outer.after(inner)
    if total is None:
        return Reason.AXIS
    into[key] = total
    return None


def _seen_by(reader: fx.Node, constant: fx.Node) -> fx.Node:
    """Return the node whose rank and type a constant has where it is read: sums and concatenations widen it."""
    return reader if query.is_call(reader, ops.ADD, ops.SUB, ops.CAT) else constant


def _changed(graph: Graph, constant: fx.Node, wanted: Affine, *, like: fx.Node) -> Tensor:
    data, rank = query.constant(graph, constant), query.rank(like)
    wide = data.double().reshape([1] * (rank - data.ndim) + list(data.shape))
    changed = along(wanted.scale, wanted.axis, rank) * wide + along(wanted.shift, wanted.axis, rank)
    return changed.to(query.dtype(like))


@dataclass(frozen=True, slots=True)
class Settled:
    """The new constants of a fold."""

    maps: dict[fx.Node, LinearMap]
    repairs: dict[fx.Node, Repair]
    tables: dict[fx.Node, Tensor]
    constants: list[tuple[fx.Node, fx.Node, Tensor]]
    affines: dict[fx.Node, Affine]

    def write(self, edit: Editor) -> None:
        """Give every node its new constants."""
        for node, linear in self.maps.items():
            rebind(edit, node, linear)
        for node, repair in self.repairs.items():
            repair.write(edit, node)
        for node, table in self.tables.items():
            edit.set_constant(node, 0, table, f"{node.args[0].target}")  # type: ignore[union-attr]
        for reader, old, tensor in self.constants:
            new = edit.constant(tensor, str(old.target), like=old)
            edit.substitute(reader, old, new)
        for node, total in self.affines.items():
            for index, vector in ((1, total.scale), (2, total.shift)):
                edit.set_constant(node, index, vector.double(), f"{query.layer_of(node) or node.name}.affine")
            edit.set_argument(node, 3, total.axis)

    @property
    def taken_by(self) -> list[str]:
        """The layers whose constants change, in the order in which they were met."""
        nodes = [*self.maps, *self.tables, *(reader for reader, _, _ in self.constants), *self.affines]
        return list(dict.fromkeys(query.layer_of(node) or node.name for node in nodes))

    @property
    def repaired_by(self) -> str:
        """How padded convolutions were repaired, in words (empty: none had to be)."""
        return ", ".join(dict.fromkeys(repair.how for repair in self.repairs.values() if repair.how))


def is_identity(found: Affine) -> bool:
    """Return whether an affine changes nothing."""
    return bool(torch.all(found.scale == 1) and torch.all(found.shift == 0))


def describe_fold(graph: Graph, node: fx.Node, settled: Settled, formula: str) -> dict[str, str]:
    """Return what a report says of an affine that is folded: which, into what, how, and how large it is."""
    found = read_affine(graph, node)
    return {
        "affine": query.layer_of(node) or node.name,
        "into": ", ".join(settled.taken_by),
        "formula": formula,
        "repair": settled.repaired_by,
        "scale": _extent(found.scale),
        "shift": _extent(found.shift),
    }


def _extent(vector: Tensor) -> str:
    """Return the smallest and the largest magnitude, and how many entries are negative or zero."""
    size = vector.abs()
    counts = {"negative": int((vector < 0).sum()), "zero": int((vector == 0).sum())}
    words = [f"{count} of {vector.numel()} {word}" for word, count in counts.items() if count]
    return ", ".join([f"{float(size.min()):.3g} to {float(size.max()):.3g}", *words])
