"""Writes what integers do not know by name as operators that they do."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from normfuse.graph import Graph
from normfuse.pipeline import Fact, Pass
from normfuse.report import PassReport
from normfuse.rewrite import Rule, apply_rules
from normfuse.rewrite.bounds import BOUND_RULES
from normfuse.rewrite.computed_constants import COMPUTED_CONSTANT_RULES
from normfuse.rewrite.masks import MASK_RULES
from normfuse.rewrite.moves import MOVE_RULES
from normfuse.rewrite.one_axis_norms import ONE_AXIS_NORM_RULES
from normfuse.rewrite.spellings import SPELLING_RULES
from normfuse.rewrite.unit_lengths import UNIT_LENGTH_RULES
from normfuse.rewrite.window_means import WINDOW_MEAN_RULES

__all__ = ["RespellForIntegers"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RespellForIntegers(Pass):
    """Write operators without an integer form as their equals that have one.

        before   y = x / max(|x|, eps)                      after   rms_norm(x; gamma = 1 / sqrt(C), eps^2 / C)
        before   y = layer_norm(x; over c, h, w)            after   layer_norm(x as [..., c h w])
        before   y = group_norm(x; G), instance_norm(x)     after   gamma * layer_norm(x as [N, G, ...]) + beta
        before   y = avg_pool2d(x; k)                       after   conv2d(x, 1 / (k k); groups = C)
        before   y = conv1d(x, W), max_pool1d(x)            after   conv2d(x, W), max_pool2d(x) with a height of one
        before   y = clamp(x, a, b), minimum(x, b)          after   hardtanh(x; a, b)
        before   y = x^2, x^3, x^4, sum(x), glu(x), prelu   after   products, C mean(x), sigmoid, relu
        before   y = stack, pixel_shuffle, padding by reflection, repeat_interleave   after   moves

    Exact up to rounding, but for the first: a bound of a length feels like an eps to vectors that are not a thousand
    times as long (``normfuse.rewrite.unit_lengths``). Applies where
    1. sizes that the equal is made of are known (any batch), and weights, slopes and bounds are constants,
    2. the bound of a length is 10^-3 at most, or what is added to it 10^-5.

    A length in front of a product with a layer norm behind it (the patches of a mask transformer) stays: the norm
    would not feel it but for its own eps, which would become eps / |x|^2, another one for every row.
    """

    name: ClassVar[str] = "respell-for-integers"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.CANONICAL})

    def run(self, graph: Graph) -> PassReport:
        """Apply the rules to a fixpoint."""
        # Before their powers, sums and bounds are written otherwise.
        lengths = apply_rules(graph, UNIT_LENGTH_RULES, name=self.name)
        rules: list[Rule[Any]] = [
            *COMPUTED_CONSTANT_RULES,
            *ONE_AXIS_NORM_RULES,
            *WINDOW_MEAN_RULES,
            *BOUND_RULES,
            *SPELLING_RULES,
            *MASK_RULES,
            *MOVE_RULES,
        ]
        rest = apply_rules(graph, rules, name=self.name)
        return replace(rest, applied={**lengths.applied, **rest.applied}, seconds=lengths.seconds + rest.seconds)
