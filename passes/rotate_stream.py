"""The residual stream is turned by a random orthogonal matrix, so that no channel stands out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from normfuse.graph import Graph, metadata
from normfuse.graph.edit import Editor
from normfuse.pipeline import Fact, Pass
from normfuse.report import PassReport, Refusal
from normfuse.rewrite import Audit, Match, Rule, apply_rules, call
from normfuse.rewrite.linear_map import LINEAR_MAPS, read_linear_map
from normfuse.rewrite.rotation import ROTATED, Rotated, randomly_rotated
from normfuse.rewrite.stream_walk import follow

__all__ = ["RotateStream"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RotateStream(Pass):
    """Multiply every residual stream by a random orthogonal matrix M, in its writers and its readers (methods 12).

        before   x = W f(...) + b + ...;        y = V norm(x)
        after    x = M W f(...) + M b + ...;    y = V M^T norm(x),    M = Hadamard * random signs / sqrt(channels)

    "QuaRot" (Ashkboos et al., 2024, arXiv 2404.00456). Exact in real arithmetic, and nothing is computed at run time.
    One huge channel becomes a little of each, which a quantizer with one scale for all channels can hold.
    1. A stream is what linear maps write and a sum of two tensors joins. It has 8 channels or more.
    2. Everything written to it is made by linear maps, tables or constants with their channels on one axis: not by a
       nonlinearity, a grouped convolution, an input of the model.
    3. Every reader is a linear map over the channels, an RMS norm over them without gamma, or hands the stream on:
       sums, views, selections and concatenations of other axes, means, average pooling, interpolation, padding with
       zeros, products with one number. Not nonlinearities, maxima, grouped convolutions, outputs of the model.
    4. Whole vectors may be joined side by side (Swin's patch merging) and read together; cut apart they may not be.
    5. No other norm takes its statistics from it, and no scale per channel stands on it: fold them before.
    """

    name: ClassVar[str] = "rotate-stream"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.AFFINES, Fact.FOLDED})
    seed: int = 0
    audit: Audit | None = None

    def run(self, graph: Graph) -> PassReport:
        """Apply the rule wherever it holds and say of every stream left why it stays."""
        return apply_rules(graph, [StreamTurns(self.seed)], name=self.name, audit=self.audit)


class StreamTurns(Rule[Rotated]):
    """A whole stream, found at the first linear map that writes it."""

    name: ClassVar[str] = "stream-turns"
    pattern = call(*LINEAR_MAPS)

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def plan(self, graph: Graph, match: Match) -> Rotated | Refusal | None:
        """Return the stream's new constants, or what does not turn with it; None where there is no stream."""
        node, linear = match.root, read_linear_map(graph, match.root)
        if linear is None or metadata.noted(node, ROTATED):
            return None
        stream = follow(graph, node, linear.output_axis, linear.outputs)
        if not stream.sums or node is not min(stream.writers, default=None):
            return None
        return randomly_rotated(graph, stream, node, self._seed)

    def rewrite(self, match: Match, plan: Rotated, edit: Editor) -> None:
        """Write the turned constants."""
        plan.write(edit)

    def describe(self, graph: Graph, match: Match, plan: Rotated) -> dict[str, str]:
        """Say how wide the stream is and which layers write and read it."""
        return {
            "affine": f"{plan.stream.block} channels",
            "into": plan.taken_by,
            "formula": "x' = M x: writers M W and M b, readers W M^T",
        }
