"""The end of a compile: judge what was measured, choose the engine that ships, write the report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from normfuse.accuracy_control import Control
from normfuse.bench.comparison import Comparison
from normfuse.bench.environment import describe_environment
from normfuse.bench.verdict import Judgement, Verdict, judge
from normfuse.build import Engine
from normfuse.built import Built, Workspace
from normfuse.capturing import Model
from normfuse.export.packing import is_packed
from normfuse.graph import Graph, query
from normfuse.loading import LoadedModel
from normfuse.precision.put_back import quantized_blocks
from normfuse.quant.bits import MOST
from normfuse.quant.budget import Limit, Resource
from normfuse.quant.target import BodyType
from normfuse.recipe import Recipe
from normfuse.report import Reason

__all__ = ["FLOAT", "conclude"]

FLOAT: Final = "float"

STAYED_FLOAT: Final = frozenset({Reason.NOT_CONSTANT, Reason.UNSUPPORTED_TYPE, Reason.NO_RANGE, Reason.NO_INTEGER_FORM})
"""Why a linear map that the target would run in integers runs in float (too small ones are left on purpose)."""


def conclude(  # noqa: PLR0913 - all that a report tells; a bundle of them would be read nowhere else
    model: Model,
    original: Graph,
    engines: Mapping[str, Engine],
    comparison: Comparison,
    recipe: Recipe,
    folder: Workspace,
    *,
    warnings: Sequence[str] = (),
    control: Control | None = None,
) -> Built:
    """Return the finished compile: the quantized engine if all that was promised holds, else the float one."""
    judgement = Judgement(Verdict.KEPT, ("folded float model, as asked",))
    label = recipe.label
    quantized = engines[label] if label != FLOAT else None
    if quantized is not None:
        judgement = _judge(quantized, comparison, recipe, control)
    kept = judgement.verdict is not Verdict.FELL_BACK
    ships = label if kept else FLOAT
    report = {
        "model": _describe(model, original),
        "recipe": recipe.to_toml(),
        "passes": [report.as_dict() for engine in engines.values() for report in engine.passes],
        "quantization": _quantization(quantized),
        "mixed": {} if quantized is None else dict(quantized.mixed),
        "pareto": {"points": list(quantized.front)} if quantized is not None and quantized.front else {},
        "accuracy_control": None if control is None else control.as_dict(),
        "checks": [check.as_dict() for engine in engines.values() for check in engine.checks],
        "warnings": [*warnings, *_told_by(control, recipe)],
        "comparison": comparison.as_dict(),
        "verdict": {**judgement.as_dict(), "ships": ships},
        "environment": describe_environment().as_dict(),
    }
    return Built(recipe=recipe, report=report, engine=engines[ships], holds=kept, folder=folder)


def _judge(engine: Engine, comparison: Comparison, recipe: Recipe, control: Control | None) -> Judgement:
    # Integers need no weights, and mixed bits may all be those of a typed body.
    is_asked = recipe.integer_only or recipe.precision.is_float or (recipe.is_mixed and engine.body is not None)
    if not (engine.quantized_weights or is_asked):
        return Judgement(Verdict.FELL_BACK, ("nothing in the model can be quantized",))
    judgement = judge(
        comparison,
        recipe.label,
        max_drop=recipe.allowed_drop,
        min_speedup=recipe.wanted_speedup,
        exceptions=[*_left_float(engine), *_put_back(control), *_over_budget(comparison, recipe)],
    )
    failed = tuple(f"a check failed: {check.name}" for check in engine.checks if not check.holds)
    return Judgement(Verdict.FELL_BACK, (*failed, *judgement.reasons)) if failed else judgement


def _left_float(engine: Engine) -> list[str]:
    refused = [refusal for step in engine.passes for refusal in step.refused if refusal.reason in STAYED_FLOAT]
    layers = [refusal.layer or refusal.node for refusal in refused]
    return [f"left in float: {', '.join(layers)}"] if layers else []


def _over_budget(comparison: Comparison, recipe: Recipe) -> list[str]:
    """Return what of a budget the finished engine does not keep: the bits were chosen by what it was expected to take.

    Blocks that accuracy control has put back have more bits than that.
    """
    base, row = comparison.row(comparison.baseline), comparison.row(recipe.label)
    taken = {
        Resource.BYTES: (row.file_bytes, base.file_bytes),
        Resource.LATENCY: tuple(each.timing.p50 / 1e3 if each.timing else None for each in (row, base)),
    }
    found = []
    for limit in recipe.chosen_budget.limits:
        amount, whole = taken.get(limit.resource, (None, None))
        if amount is not None and whole and amount > limit.amount * (whole if limit.is_relative else 1):
            told = Limit(limit.resource, float(f"{amount:.6g}"))
            found.append(f"over the budget {limit}: measured {told}, {amount / whole:.3g}x")
        if amount is None and limit.resource in taken:
            found.append(f"the budget {limit} was not held against the engine: it was not measured")
    return found


def _told_by(control: Control | None, recipe: Recipe) -> list[str]:
    """Return what the search for a smaller drop says about the bits that were asked for."""
    if control is None or not control.chosen.backs:
        return []
    found = list[str]()
    if len(control.chosen.backs) == len(quantized_blocks(control.trials[0].plan.graph)):
        asked = "mixed bits" if recipe.is_mixed else recipe.bits
        found.append(f"every block was put back: no block has the {asked} that were asked for; ask for more bits")
    if recipe.table_bits < MOST:
        found.append(
            f"tables keep {recipe.table_bits} bits whatever is put back; --table-bits 8 may be what is missing"
        )
    return found


def _put_back(control: Control | None) -> list[str]:
    return [f"put back for accuracy: {back}" for back in control.chosen.backs] if control else []


def _describe(model: Model, original: Graph) -> dict[str, Any]:
    known = {"kind": model.kind.value, "sha256": model.sha256} if isinstance(model, LoadedModel) else {}
    return {
        **known,
        "inputs": [_port(spec) for spec in original.input_specs],
        "outputs": [_port(spec) for spec in original.output_specs],
        "constant_bytes": original.constant_bytes(),
        "notes": list(original.notes),
    }


def _port(spec: Any) -> dict[str, Any]:
    return {"name": spec.name, "shape": list(spec.shape), "dtype": str(spec.dtype).removeprefix("torch.")}


def _stored(constant: Tensor, body: BodyType) -> tuple[str, int]:
    """Return the type and the bits that a constant's numbers have in the file."""
    if is_packed(constant):
        return "int4", 4
    if constant.dtype is torch.float32 and body is not BodyType.FP32:
        return {BodyType.FP16: "float16", BodyType.BF16: "bfloat16"}[body], 16
    return str(constant.dtype).removeprefix("torch."), 8 * constant.element_size()


def _quantization(engine: Engine | None) -> dict[str, Any]:
    if engine is None or engine.ranges is None:
        return {}
    read = {
        str(node.target): query.constant(engine.graph, node) for node in engine.graph.nodes if query.is_constant(node)
    }
    elements: Counter[str] = Counter()
    bits = 0
    for tensor in read.values():
        kind, size = _stored(tensor, BodyType.FP32 if engine.body is None else engine.body.body)
        elements[kind] += tensor.numel()
        bits += tensor.numel() * size
    effective = round(bits / max(elements.total(), 1), 3)
    blocks = [block.as_dict() for block in engine.blocks]
    sizes = {"kinds": dict(engine.kinds), "constants_by_type": dict(elements), "effective_bits": effective}
    return {**sizes, "blocks": blocks, **engine.ranges.as_dict()}
