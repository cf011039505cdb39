"""What decides an integer network: where it rounds, the ranges there, and the codes of its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from normfuse.calibration import ChosenRange, Ranges, calibrate
from normfuse.export.placement import onnx_placement
from normfuse.feeding import Stream, fixed_batch
from normfuse.graph import Graph
from normfuse.graph.edit import Editor
from normfuse.graph.quantization import requests
from normfuse.integer.lowering import Lowering
from normfuse.integer.rules import RULES, refuse_other_floats, refuse_unsupported, refuse_whole_attention
from normfuse.integer.tokens import token_params
from normfuse.passes.find_affines import FindAffines
from normfuse.passes.fold_affine_into_producers import FoldAffineIntoProducers
from normfuse.passes.join_islands import JoinIslands
from normfuse.passes.place_integers import PlaceIntegers
from normfuse.passes.respell_for_integers import RespellForIntegers
from normfuse.passes.spell_out_attention import SpellOutAttention
from normfuse.passes.spell_out_masked_attention import SpellOutMaskedAttention
from normfuse.pipeline import Fact, Phase, Pipeline
from normfuse.planning import refined
from normfuse.precision import BlockReport, Quantization
from normfuse.precision.decision import decide_again
from normfuse.progress import Progress
from normfuse.quant import DynamicParams, LogarithmicParams, QuantParams, Range, RoundedWeight
from normfuse.quant.bits import MOST
from normfuse.quant.integer_forms import SoftmaxForm
from normfuse.quant.integer_type import IntegerType
from normfuse.recipe import Recipe
from normfuse.report import PassReport

__all__ = ["IntegerPlan", "plan_integers"]

PLAIN_PROCESSOR: Final = "avx512_vnni"
"""Integers are the same everywhere: no processor needs narrower codes for its products."""

MARGIN: Final = 1.5
"""How much wider than what was seen 16-bit codes reach: it costs them half a bit, and a sum that ends too early far
more."""

NOTHING: Final = Range(0.0, 2.0**-10)
"""The range of what was always 0: any holds it, and in small steps what is added to it is exact enough."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IntegerPlan:
    """A float graph with requests, and what stands in their place once it is written as integers.

    Attributes:
        graph: the float graph; its requests are where the network rounds.
        ranges: what was chosen, for the report.
        activations: scale and zero point, or that each token finds its own, by the name of what is requested.
        weights: codes by the name of the linear map.
        passes: what was done on the way.
        blocks: what became of every block, where rounding to nearest was not all.
        allows_islands: whether what has no integer form stays float.
    """

    graph: Graph
    ranges: Ranges
    activations: Mapping[str, QuantParams | DynamicParams]
    weights: Mapping[str, RoundedWeight]
    passes: tuple[PassReport, ...]
    blocks: tuple[BlockReport, ...]
    allows_islands: bool = False

    def lowering(self, edit: Editor, weights: Mapping[str, RoundedWeight]) -> Lowering:
        """Return what writes a copy of the graph as integers, with these weights."""
        return Lowering(edit, self.activations, weights, RULES, self.allows_islands)


def plan_integers(folded: Graph, samples: Stream, *, recipe: Recipe, total: int, progress: Progress) -> IntegerPlan:
    """Decide how a folded float graph is written as integers.

    Args:
        folded: the float graph; it is not changed.
        samples: calibration samples.
        recipe: how ranges are chosen.
        total: the number of samples, for the progress bar.
        progress: shows what takes long.

    Raises:
        UnsupportedModel: an operator has no integer form, and may not stay float, or floats are no float32; the message
            names the layer.
    """
    refuse_other_floats(folded)
    graph = folded.copy()
    wanted = onnx_placement(PLAIN_PROCESSOR, recipe.precision)
    assert isinstance(wanted.weight, IntegerType)
    forms = PlaceIntegers(weight=wanted.weight, norm=recipe.norm, softmax=recipe.softmax, gelu=recipe.gelu)
    # Behind the scale of spelled attention comes q's own linear map. A causal mask is a constant by now.
    spelled = (SpellOutAttention(), SpellOutMaskedAttention(), FindAffines(), FoldAffineIntoProducers())
    before = spelled if recipe.softmax is SoftmaxForm.SHIFTMAX else (FindAffines(),)
    behind = (JoinIslands(),) if recipe.allow_float_islands else ()
    place = Phase("integers", (RespellForIntegers(), *before, forms, *behind))
    reports = Pipeline(phases=(place,), given=frozenset({Fact.CANONICAL, Fact.FOLDED})).run(graph)
    if not recipe.allow_float_islands:
        refuse_unsupported(graph)
    if recipe.softmax is SoftmaxForm.SHIFTMAX:
        refuse_whole_attention(graph)
    ranges = _ranges(graph, samples, recipe, total, progress)
    with progress.task("rounding weights"):
        nearest = decide_again(graph, ranges.by_name, _of_tokens(graph))
    chosen, blocks = refined(graph, samples, nearest, recipe, wanted, None, progress)
    return IntegerPlan(
        graph=graph,
        ranges=ranges,
        activations={
            name: each for name, each in chosen.activations.items() if not isinstance(each, LogarithmicParams)
        },
        weights=chosen.weights,
        passes=tuple(reports),
        blocks=tuple(blocks),
        allows_islands=recipe.allow_float_islands,
    )


def _of_tokens(graph: Graph) -> Quantization:
    """Return what is decided before any range is: the codes of tokens."""
    by_token = {each.source.name: each.group for each in requests(graph) if each.group is not None}
    return Quantization(activations={name: token_params(size) for name, size in by_token.items()}, weights={})


def _ranges(graph: Graph, samples: Stream, recipe: Recipe, total: int, progress: Progress) -> Ranges:
    batch = fixed_batch(graph) or 1
    found = calibrate(graph, samples, method=recipe.calibration, total=total // batch, progress=progress)
    wide = {request.source.name for request in requests(graph) if request.type.bits > MOST}
    chosen = {name: _own(each, is_wide=name in wide) for name, each in found.chosen.items()}
    return replace(found, chosen=chosen, samples=found.samples * batch)


def _own(chosen: ChosenRange, *, is_wide: bool) -> ChosenRange:
    """Return the range of 16-bit codes beyond what was seen, and a small one for nothing but 0."""
    low, high = chosen.observed.minimum, chosen.observed.maximum
    if low == high == 0:
        return replace(chosen, range=NOTHING, method="nothing but 0")
    if is_wide:
        return replace(chosen, range=Range(MARGIN * low, MARGIN * high), method="min-max, widened")
    return chosen
