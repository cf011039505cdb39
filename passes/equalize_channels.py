"""Makes the channels of tensors alike before they get one scale for all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final

from normfuse.graph import Graph, metadata, query
from normfuse.graph.edit import editing
from normfuse.pipeline import Fact, Pass
from normfuse.report import PassReport, Refusal
from normfuse.rewrite.changes import Blocked
from normfuse.rewrite.channel_product import ProductSite
from normfuse.rewrite.equalization import Equalization, Site

__all__ = ["EqualizeChannels"]

EQUALIZED: Final = "equalized"
"""Noted of a tensor that has become what was chosen for it."""

STAYS: Final = "a product in front of the quantizer"
"""What a report says of the operator that an equalization leaves in the graph."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EqualizeChannels(Pass):
    """Give tensors that linear maps read the scales (and shifts) per channel that were chosen for them.

        before   x = V z + c,                          y = W x + b
        after    x' = diag(s) (V z + c) + t,           y = W diag(1/s) x' + b - W diag(t / s)

    "SmoothQuant" (Xiao et al., 2022, arXiv 2211.10438) and "RepQ-ViT" (Li et al., 2022, arXiv 2212.08254) behind
    norms, "Data-Free Quantization" (Nagel et al., 2019, arXiv 1906.04721) between convolutions. Exact in real
    arithmetic, for positive s.
    1. x is made by linear maps, tables, constants, or by a layer or RMS norm without gamma and beta, which takes s
       and t as such (`LowerAffines` comes next; an RMS norm has no place for t). ReLU, pooling, views, sums,
       concatenations and products with attention's weights may stand between, for t where they let it pass.
    2. Linear maps alone read it, behind views, pooling, ReLU and sums; what it meets in a sum is scaled where it is
       made, so that a residual stream between frozen norms is scaled as a whole.
    3. No zero padding stands in front of a shift.
    4. Where 1 or 2 fails and a product was chosen, x stays and x' = diag(s) x is computed beside it, for the linear
       maps alone that read x: an operator more, which the report names (rule ``product``). No t, no convolutions.
    """

    name: ClassVar[str] = "equalize-channels"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.FOLDED})
    provides: ClassVar[frozenset[Fact]] = frozenset({Fact.AFFINES})

    chosen: Mapping[str, Equalization]

    def run(self, graph: Graph) -> PassReport:
        """Change every chosen tensor that is not yet what it shall be."""
        applied, refused, sites = list[str](), list[Refusal](), list[dict[str, str]]()
        with editing(graph) as edit:
            for node in [node for node in graph.nodes if node.name in self.chosen]:
                if metadata.noted(node, EQUALIZED):
                    continue
                wanted = self.chosen[node.name]
                site = ProductSite(edit, node) if wanted.is_product else Site(edit, node)
                found = site.plan(wanted.affine)
                if isinstance(found, Blocked):
                    site.leave()
                    refused.append(Refusal(node.name, found.reason, found.where, query.layer_of(node)))
                    continue
                site.take(wanted.affine, found)
                metadata.note(node, EQUALIZED, True)
                rule = "product" if wanted.is_product else "channels"
                applied.append(rule)
                readers = (query.layer_of(reader) or reader.name for reader in found.carried)
                sites.append(
                    {
                        "rule": rule,
                        "node": node.name,
                        "into": ", ".join(dict.fromkeys(readers)),
                        "scales": wanted.how,
                        "error": f"{wanted.before:.3g} to {wanted.after:.3g}",
                        "stays": STAYS if wanted.is_product else "",
                    }
                )
        return PassReport(name=self.name, applied=PassReport.count(applied), refused=tuple(refused), sites=tuple(sites))
