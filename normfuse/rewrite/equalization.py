"""A tensor's channels scaled (and shifted) where they are made, and back in everything that reads them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from normfuse.graph import Graph, ops, query
from normfuse.graph.affine import AFFINE, IDENTITY, Affine
from normfuse.graph.edit import Editor
from normfuse.report import Reason
from normfuse.rewrite.carry import Carrying
from normfuse.rewrite.changes import Blocked, Changes, Settled
from normfuse.rewrite.linear_map import LINEAR_MAPS, read_linear_map
from normfuse.rewrite.push import push

__all__ = ["Equalization", "Equalized", "Site", "groupings", "read_by_maps"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Equalization:
    """What a tensor shall become: ``affine`` of itself, with positive scales.

    ``how`` says where the numbers come from, ``before`` and ``after`` are the errors that decided. With ``is_product``
    the tensor stays, and a product of it is what its linear maps read.
    """

    affine: Affine
    how: str
    before: float
    after: float
    is_product: bool = False


@dataclass(frozen=True, slots=True)
class Equalized:
    """What changes where a tensor x becomes A(x).

    Attributes:
        makers: new constants of what makes x (none where a norm takes A as its gamma and beta).
        readers: new constants of what reads it.
        carried: by linear map, the affine between what it read and what it reads now: ``before == carried(now)``.
    """

    makers: Settled
    readers: Settled
    carried: dict[fx.Node, Affine]


def read_by_maps(graph: Graph) -> dict[fx.Node, int]:
    """Return the tensors that linear maps read, in graph order, with the axis of their channels."""
    found = dict[fx.Node, int]()
    for node in graph.nodes:
        if query.is_call(node, *LINEAR_MAPS) and (linear := read_linear_map(graph, node)) is not None:
            source = node.args[0]
            if isinstance(source, fx.Node) and not query.is_constant(source):
                found.setdefault(source, linear.input_axis)
    return found


class Site:
    """A tensor with two affines behind it that undo each other: one for what makes it, one for what reads it.

        before   x,                        readers g(x)
        while    x, A(x), A^-1(A(x)),      readers g(A^-1(A(x)))
        after    x' = A(x) in one piece,   readers (g A^-1)(x')

    The first is pushed back, or is gamma and beta of a bare layer or RMS norm; the second is carried forwards, and
    what meets it in a sum is scaled where it is made. ``take`` or ``leave`` ends the site; the graph is then free of
    both, save for the first behind a norm.
    """

    def __init__(self, edit: Editor, node: fx.Node) -> None:
        self._edit, self.node = edit, node
        readers = query.readers(node)
        self._given = self._affine(node, IDENTITY)
        self._back = self._affine(self._given, IDENTITY)
        edit.redirect(node, self._back, only=lambda reader: reader in readers)

    def _affine(self, source: fx.Node, found: Affine) -> fx.Node:
        stem, like = f"{source.name}.equalized", source
        vectors = [self._edit.constant(vector, stem, like=like) for vector in (found.scale, found.shift)]
        return self._edit.call(AFFINE, source, *vectors, found.axis, at=source, after=True)

    def plan(self, wanted: Affine) -> Equalized | Blocked:
        """Return what changes for ``wanted``, or where it ends."""
        graph = self._edit.graph
        if not bool((wanted.scale > 0).all()):
            return Blocked(self.node, Reason.NEGATIVE_SCALE)
        for affine, found in ((self._given, wanted), (self._back, wanted.inverse())):
            for index, vector in ((1, found.scale), (2, found.shift)):
                self._edit.set_constant(affine, index, vector, "")
            self._edit.set_argument(affine, 3, found.axis)
        changes = Changes()
        blocked = None if self._is_free(wanted) else push(graph, self.node, wanted, self._given, changes)
        if blocked is not None:
            return blocked
        carrying = Carrying(graph, self._back, query.readers(self._back), rescales=True)
        if carrying.blocked is not None:
            return carrying.blocked
        return self._joined(changes, carrying.changes)

    def _joined(self, made: Changes, read: Changes) -> Equalized | Blocked:
        """Return both ends' constants, if no map is changed by both and no padding has to be repaired."""
        makers, readers = made.settle(self._edit.graph), read.settle(self._edit.graph)
        if isinstance(makers, Blocked):
            return makers
        if isinstance(readers, Blocked):
            return readers
        if both := makers.maps.keys() & readers.maps.keys():
            return Blocked(min(both), Reason.SHARED)
        if makers.repaired_by or readers.repaired_by:
            return Blocked(self.node, Reason.ZERO_PADDING)
        return Equalized(makers, readers, read.before)

    def take(self, wanted: Affine, found: Equalized) -> None:
        """Write what ``plan`` has returned."""
        found.makers.write(self._edit)
        found.readers.write(self._edit)
        self._edit.redirect(self._back, self._given)
        if not self._is_free(wanted):
            self._edit.redirect(self._given, self.node)
        self._edit.clean()

    def leave(self) -> None:
        """Take both affines away."""
        self._edit.redirect(self._back, self.node)
        self._edit.clean()

    def _is_free(self, wanted: Affine) -> bool:
        """Return whether a norm without gamma and beta in front of the site takes the affine."""
        norm = self.node
        if not query.is_call(norm, ops.LAYER_NORM, ops.RMS_NORM) or len(norm.args[1]) != 1:  # type: ignore[arg-type]
            return False
        is_bare = all(len(norm.args) <= index or norm.args[index] is None for index in ops.ONLINE_NORMS[norm.target])
        has_place = query.is_call(norm, ops.LAYER_NORM) or not bool(wanted.shift.any())
        return is_bare and has_place and wanted.axis == query.rank(norm) - 1


def groupings(site: Site, axis: int, channels: int) -> torch.Tensor | Blocked:
    """Return which channels of a site must share their numbers, as the group of every channel, or why there is no site.

    Each has its own if it can; else those at the same place of every head, or those that a flattened map has side by
    side; of these the finest that can be planned.
    """
    index = torch.arange(channels)
    found = site.plan(_distinct(index, axis))
    if not isinstance(found, Blocked):
        return index
    if found.reason is not Reason.AXIS:
        return found
    for count in (count for count in range(2, channels // 2 + 1) if channels % count == 0):
        for groups in (index % (channels // count), index // count):
            if not isinstance(site.plan(_distinct(groups, axis)), Blocked):
                return groups
    return found


def _distinct(groups: torch.Tensor, axis: int) -> Affine:
    """Return a scaling that tells every group from every other."""
    scale = 1 + groups.double() / groups.numel()
    return Affine(scale, torch.zeros_like(scale), axis)
