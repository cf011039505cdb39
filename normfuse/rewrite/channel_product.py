"""A tensor's channels scaled by a product of its own, in front of the linear maps that read it and of nobody else."""

from __future__ import annotations

from torch import fx

from normfuse.graph import ops, query
from normfuse.graph.affine import AFFINE, Affine
from normfuse.graph.edit import Editor
from normfuse.report import Reason
from normfuse.rewrite.changes import Blocked, Changes
from normfuse.rewrite.equalization import Equalized

__all__ = ["ProductSite", "read_by_linears"]


def read_by_linears(node: fx.Node) -> list[fx.Node]:
    """Return the linear maps with a constant weight that read a tensor as it is, in graph order."""
    return [
        reader
        for reader in query.readers(node)
        if query.is_call(reader, ops.LINEAR) and reader.args[0] is node and query.is_constant(reader.args[1])
    ]


class ProductSite:
    """A tensor that nothing can scale where it is made: a product scales it for the linear maps that read it.

        before   x,             readers g(x), h(x) = W x + b
        after    x, x' = s x,   readers g(x), h(x') = W diag(1/s) x' + b

    "SmoothQuant" (Xiao et al., 2022, arXiv 2211.10438, section 4) where no norm absorbs s. The product is computed
    with every sample. What other nodes read stays x, so nothing has to be pushed or carried.
    """

    def __init__(self, edit: Editor, node: fx.Node) -> None:
        self._edit, self.node = edit, node

    def plan(self, wanted: Affine) -> Equalized | Blocked:
        """Return what changes for ``wanted``, or why it cannot be."""
        node, graph, readers = self.node, self._edit.graph, read_by_linears(self.node)
        if not bool((wanted.scale > 0).all()):
            return Blocked(node, Reason.NEGATIVE_SCALE)
        if bool(wanted.shift.any()) or not readers:
            return Blocked(node, Reason.NO_LINEAR)
        if wanted.axis != query.rank(node) - 1:
            return Blocked(node, Reason.AXIS)
        changes = Changes(before=dict.fromkeys(readers, wanted.inverse()))
        made, read = Changes().settle(graph), changes.settle(graph)
        assert not isinstance(made, Blocked)  # nothing that makes the tensor changes
        if isinstance(read, Blocked):
            return read
        if not wanted.fits(query.dtype(node)):
            return Blocked(node, Reason.OVERFLOW)
        return Equalized(made, read, changes.before)

    def take(self, wanted: Affine, found: Equalized) -> None:
        """Write the product and what ``plan`` has returned."""
        found.readers.write(self._edit)
        stem, edit = f"{self.node.name}.equalized", self._edit
        vectors = [edit.constant(vector.double(), stem, like=self.node) for vector in (wanted.scale, wanted.shift)]
        product = edit.call(AFFINE, self.node, *vectors, wanted.axis, at=self.node, after=True)
        edit.redirect(self.node, product, only=lambda reader: reader in found.carried)
        edit.clean()

    def leave(self) -> None:
        """Nothing was written."""
