"""Takes back codes between two operators that both stay float."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from normfuse.graph import Graph, query
from normfuse.graph.edit import editing
from normfuse.graph.quantization import requests, withdraw
from normfuse.integer.roles import is_view
from normfuse.integer.rules import has_integer_form
from normfuse.pipeline import Fact, Pass
from normfuse.report import PassReport

__all__ = ["JoinIslands"]


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinIslands(Pass):
    """Make one float island of neighbours that have no integer form.

        before   y = request(sort(request(cumsum(request(x)))))
        after    y = request(sort(cumsum(request(x))))

    Exact: a request passes its input on (ours).
    """

    name: ClassVar[str] = "join-islands"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.PLACED})
    provides: ClassVar[frozenset[Fact]] = frozenset()

    def run(self, graph: Graph) -> PassReport:
        """Edit the graph."""
        applied = list[str]()
        with editing(graph) as edit:
            for request in requests(graph):
                if not has_integer_form(request.source) and all(map(_stays_float, _readers(request.node))):
                    withdraw(edit, request)
                    applied.append("joined")
        return PassReport(name=self.name, applied=PassReport.count(applied))


def _stays_float(reader: fx.Node) -> bool:
    return reader.op == "call_function" and not has_integer_form(reader)


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    for reader in query.readers(node):
        if is_view(reader):
            yield from _readers(reader)
        else:
            yield reader
