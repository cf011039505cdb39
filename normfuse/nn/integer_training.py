"""Fine-tunes a network on the very integers that it will ship as."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, fx, nn

from normfuse.atomic import write_file
from normfuse.build import FOLDING
from normfuse.capturing import Examples, Model, capture_model
from normfuse.data import Data, load_samples
from normfuse.errors import UsageError
from normfuse.feeding import bind, stream
from normfuse.graph import Graph, query
from normfuse.graph.edit import editing
from normfuse.graph.program import program_bytes
from normfuse.graph.quantization import is_requested, requests, withdraw
from normfuse.graph.quickly import quickly
from normfuse.integer.written import Coded
from normfuse.integer_plan import IntegerPlan, plan_integers
from normfuse.nn.weight_rounding import WeightRounding, distance_to_border
from normfuse.passes.lower_affines import LowerAffines
from normfuse.passes.merge_query_key_maps import MergeQueryKeyMaps
from normfuse.pipeline import Fact, Phase, Pipeline
from normfuse.precision.decision import input_scales
from normfuse.precision.straight_through import straight_through
from normfuse.progress import Silent
from normfuse.quant import DynamicParams, QuantParams, RoundedWeight
from normfuse.quant.levers import Effort
from normfuse.recipe import Recipe
from normfuse.report import PassReport
from normfuse.rewrite.linear_map import read_linear_map
from normfuse.rewrite.window_means import is_average

__all__ = ["IntegerTraining", "prepare_qat"]

BIAS, WEIGHT = 2, 1
"""Arguments of a linear map."""

LARGEST_DISTANCE: Final = 0.5
"""Of a code from the nearest border."""


def prepare_qat(  # noqa: PLR0913 - its options, which are keywords
    model: Model | Graph,
    samples: Data,
    example_inputs: Examples | None = None,
    *,
    recipe: Recipe | None = None,
    free_within: float | None = None,
    scales_follow: bool = False,
    merges_queries_and_keys: bool = False,
) -> IntegerTraining:
    """Return a module to fine-tune: it computes what the integer engine would, and has gradients.

    The last three are the remedies of "OFQ" (Liu et al., 2023, arXiv 2302.02210) against weights that oscillate between
    two codes; any of them go together.

    Args:
        model: anything that ``normfuse.compile`` takes, or a graph that is folded already.
        samples: calibration samples, in the forms that ``normfuse.compile`` takes.
        example_inputs: to capture a module with; else the first sample serves.
        recipe: how ranges are chosen, how many samples choose them, and the bits of weights. Whatever its effort,
            weights are rounded to nearest: training does better than what else an effort tries.
        free_within: confidence-guided freezing: only weights that are no farther than this from the border between two
            codes, in codes, still move; published is 0.005, for the end of a training. None: all weights move.
        scales_follow: the scales of weights are statistical: they follow the mean magnitude of their channel at every
            step (``WeightRounding``). Else they stay as calibrated.
        merges_queries_and_keys: query-key reparameterization: trained, and shipped, is one matrix per head in place of
            the queries' and the keys' (``MergeQueryKeyMaps``, which says where). It is more weights and more work as
            soon as there are three heads. ``IntegerTraining.merged`` says where it was done, and why not elsewhere.

    Raises:
        UnsupportedModel: the model cannot be written as integers.
        UsageError: ``free_within`` is no distance from a border, or there are no queries and keys to merge.
    """
    if free_within is not None and not 0 < free_within <= LARGEST_DISTANCE:
        raise UsageError(f"free_within cannot be {free_within}", expected="above 0, at most 0.5, or None")
    chosen = replace(recipe or Recipe(integer_only=True), effort=int(Effort.NEAREST))
    given = load_samples(samples, name="calibration")
    if isinstance(model, Graph):
        folded = model
    else:
        folded = capture_model(model, example_inputs, given)
        FOLDING.run(folded)
    merged = None
    if merges_queries_and_keys:
        folded, merged = _merged(folded)
    bound = bind(given, folded)
    total = min(len(bound), chosen.samples or len(bound))
    source = stream(bound, folded, limit=chosen.samples)
    plan = plan_integers(folded, source, recipe=chosen, total=total, progress=Silent())
    return IntegerTraining(plan, free_within=free_within, scales_follow=scales_follow, merged=merged)


def _merged(folded: Graph) -> tuple[Graph, PassReport]:
    """Return a copy with queries and keys merged, and the report.

    Raises:
        UsageError: there are none that could be; the message says why.
    """
    graph = folded.copy()
    merge = Phase("training", (MergeQueryKeyMaps(),))
    (report,) = Pipeline(phases=(merge,), given=frozenset({Fact.CANONICAL, Fact.FOLDED})).run(graph)
    if not report.changed:
        left = [f"{each.layer or each.node}: {each.reason.value} ({each.detail})" for each in report.refused]
        raise UsageError(
            "no queries and keys can be merged",
            where="; ".join(left),
            expected="softmax(q k^T) with q and k from one linear map each, cut into heads by views alone",
            hint="leave merges_queries_and_keys away",
        )
    return graph, report


class IntegerTraining(nn.Module):
    """A network whose outputs are those of its integer engine, and whose gradients are those of its float graph.

    Every step writes the weights as integers and runs them (``torch.ops.normfuse.*``, the arithmetic that ships). The
    float graph then goes through the values that the integers stand for, and lends them its gradients: wherever
    something is rounded, the gradient passes straight through, and stops where codes have ended.

    Trained are weights and biases of linear maps and convolutions (``parameters()``); scales of activations stay as
    they were calibrated, and those of weights unless they follow. ``save`` writes the tuned model for ``normfuse
    compile --integer-only``.

    Attributes:
        weights: the weights that are trained, by the name of the linear map's node, in float.
        biases: their biases; 0 where the model had none.
        merged: which queries and keys were merged, and why not the rest; None if that was not asked for.
    """

    def __init__(
        self,
        plan: IntegerPlan,
        *,
        free_within: float | None = None,
        scales_follow: bool = False,
        merged: PassReport | None = None,
    ) -> None:
        super().__init__()
        self._plan, self.merged = plan, merged
        self._rounding = dict[str, WeightRounding]()
        scales = input_scales(plan.graph, plan.activations)
        self.weights, self.biases = nn.ParameterDict(), nn.ParameterDict()
        for node in plan.graph.nodes:
            linear = read_linear_map(plan.graph, node) if node.name in plan.weights else None
            if linear is None or is_average(node):
                continue
            key = node.name
            self.weights[key] = nn.Parameter(linear.weight.detach().clone())
            self.biases[key] = nn.Parameter(_bias(linear.bias, linear.outputs, linear.weight))
            self._rounding[key] = WeightRounding.of(
                plan.weights[key], linear.weight, input_scale=scales[node], follows=scales_follow
            )
            if free_within is not None:
                self.weights[key].register_hook(self._freeze(key, free_within))

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Return what the integer engine returns, with gradients."""
        integers = self._integers(inputs)
        found = self._plan.graph.run_as(inputs, lambda node, args, kwargs: self._compute(node, args, kwargs, integers))
        return found[0] if len(found) == 1 else found

    def tuned(self) -> Graph:
        """Return the float graph with biases as they are now, and of weights what their codes stand for.

        Not the weights that are trained: these are wherever training has left them between two borders, and whatever
        rounded them anew, on other scales or with another weighing of errors, would make another network of them. What
        is on a grid already is left there by ``normfuse compile``.

        It is the graph that was written as integers: what they do not know by name is spelled as they do.
        """
        graph = self._plan.graph.copy()
        with editing(graph) as edit:
            for request in reversed(requests(graph)):  # 8 bits that are made of 16 before these
                withdraw(edit, request)
            for node in [node for node in graph.nodes if node.name in self.weights]:
                label = query.layer_of(node) or node.name
                values = self._rounded(node.name).values.to(self.weights[node.name].dtype)
                edit.set_constant(node, WEIGHT, values, f"{label}.weight")
                edit.set_constant(node, BIAS, self.biases[node.name].detach().clone(), f"{label}.bias")
        Pipeline(phases=(Phase("tuned", (LowerAffines(),)),), given=frozenset({Fact.AFFINES})).run(graph)
        return graph

    def save(self, path: str | Path) -> None:
        """Write the tuned model as a file that ``normfuse compile`` reads; whole or not at all.

        Raises:
            BadInput: the file cannot be written.
        """
        write_file(Path(path), program_bytes(self.tuned()))

    @torch.no_grad()
    def _integers(self, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """Return the value of every request in the integer network, by its name."""
        graph, plan = self._plan.graph.copy(), self._plan
        with editing(graph) as edit:
            trained = {name: self._rounded(name) for name in self.weights}
            lowering = plan.lowering(edit, {**plan.weights, **trained})
            lowering.run()
            coded = {request.name: found for request, found in lowering.coded_requests()}
        wanted = {each.name for found in coded.values() for each in (found.node, found.factors) if each is not None}
        seen = dict[str, Tensor]()

        def watch(node: fx.Node, value: Any) -> Any:
            if node.name in wanted:
                seen[node.name] = value
            return value

        graph.run_watched(inputs, watch)
        return {name: _value(found, seen) for name, found in coded.items() if found.node.name in seen}

    def _rounded(self, name: str) -> RoundedWeight:
        return self._rounding[name].rounded(self.weights[name], self.biases[name])

    def _compute(
        self, node: fx.Node, args: tuple[Any, ...], kwargs: Mapping[str, Any], integers: Mapping[str, Tensor]
    ) -> Any:
        if is_requested(node):
            params = self._plan.activations[query.operand(node, 0).name]
            if isinstance(params, DynamicParams):  # no number is beyond the codes
                return straight_through(args[0], integers[node.name])
            return _passed(args[0], integers[node.name], params)
        if node.name in self.weights:
            weight = self.weights[node.name]
            moved = straight_through(weight, self._rounded(node.name).values.to(weight.dtype))
            rest = args[BIAS + 1 :]
            return quickly(node, (args[0], moved, self.biases[node.name], *rest), _without_bias(kwargs))
        return quickly(node, args, kwargs)

    def _freeze(self, name: str, free_within: float) -> Any:
        def freeze(gradient: Tensor) -> Tensor:
            params = self._rounding[name].params(self.weights[name], self.biases[name])
            to_border = distance_to_border(self.weights[name], params)
            return torch.where(to_border <= free_within, gradient, torch.zeros_like(gradient))

        return freeze


def _value(found: Coded, seen: Mapping[str, Tensor]) -> Tensor:
    """Return what codes stand for, float32."""
    codes = seen[found.node.name]
    scale = torch.tensor(found.scale, dtype=torch.float32, device=codes.device)
    factors = scale if found.factors is None else seen[found.factors.name].to(torch.float32) * scale
    return (codes.to(torch.int32) - found.zero_point).to(torch.float32) * factors


def _passed(x: Tensor, value: Tensor, params: QuantParams) -> Tensor:
    """Return the value that integers stand for; the gradient goes to x where it lies between the ends of the codes."""
    inside = (x >= params.smallest.to(x.dtype)) & (x <= params.largest.to(x.dtype))
    return torch.where(inside, straight_through(x, value), value)


def _bias(bias: Tensor | None, outputs: int, like: Tensor) -> Tensor:
    return like.new_zeros(outputs) if bias is None else bias.detach().clone()


def _without_bias(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if name != "bias"}
