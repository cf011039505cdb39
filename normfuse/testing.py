"""For authors of passes: seeded randomness, small models, goldens, derived tolerances, the contract of a pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any, Final, TypeVar

import torch
from torch import Tensor, fx, nn

from normfuse.errors import CheckFailed
from normfuse.graph import Graph, ops, query, verify
from normfuse.graph.graph import TensorSpec
from normfuse.graph.quantization import requests
from normfuse.pipeline import Pass
from normfuse.quant import Range
from normfuse.report import PassReport

__all__ = [
    "Golden",
    "Small",
    "check_pass_contract",
    "distance",
    "fold_tolerance",
    "observed_ranges",
    "outputs",
    "picture",
    "randomized",
    "sample",
    "seeded",
]

ModuleT = TypeVar("ModuleT", bound=nn.Module)

NEAR_DEAD: Final = 1e-7
"""A variance far below eps: the scale of such a channel is about gamma / sqrt(eps), some 300 times the others'."""


def seeded(seed: int) -> torch.Generator:
    """Return a fresh generator; nothing global is touched."""
    return torch.Generator().manual_seed(seed)


class Small(nn.Module):
    """``forward(x)`` is ``function(self, x)``; the parts are attributes, so that a test's model is one line."""

    def __init__(self, function: Callable[[Any, Tensor], Any], **parts: nn.Module | Tensor) -> None:
        super().__init__()
        self._function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Any:
        """Return whatever the function returns."""
        return self._function(self, x)


def randomized(module: ModuleT, *, seed: int = 0) -> ModuleT:
    """Give every parameter and statistic a random value, in place; return the module in eval mode.

    Vectors (norm scales, biases, layer scales) have both signs and magnitudes in [0.3, 1.7]; the first channel of
    every running variance is nearly dead and the last entry of every vector of three and more is nearly zero.
    Matrices keep the size of what goes through them.
    """
    generator = seeded(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(_random_parameter(parameter, generator))
        for name, buffer in module.named_buffers():
            if name.endswith("running_var"):
                buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
                buffer.view(-1)[0] = NEAR_DEAD
            elif name.endswith("running_mean"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator))
    return module.eval()


def _random_parameter(parameter: Tensor, generator: torch.Generator) -> Tensor:
    if parameter.ndim > 1:
        fan_in = parameter[0].numel()
        return torch.randn(parameter.shape, generator=generator) / sqrt(fan_in)
    magnitude = torch.rand(parameter.shape, generator=generator) * 1.4 + 0.3
    sign = torch.randint(0, 2, parameter.shape, generator=generator) * 2 - 1
    value = magnitude * sign
    if value.numel() > 2:
        value[-1] *= 1e-3
    return value


def sample(*shape: int) -> Tensor:
    """Return the same normal numbers every time, float64: what a fold is compared on."""
    return torch.randn(shape, generator=seeded(9), dtype=torch.float64)


@torch.no_grad()
def outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Return what a model makes of one input as a list."""
    found = model(x)
    return list(found) if isinstance(found, tuple) else [found]


def observed_ranges(graph: Graph, *inputs: Tensor) -> dict[str, Range]:
    """Return from where to where every tensor goes that a graph has requests for, by the name of its node."""
    found: dict[str, Range] = {}
    sources = {request.node: request.source.name for request in requests(graph)}

    def watch(node: fx.Node, value: Any) -> Any:
        if node in sources:
            found[sources[node]] = Range(float(value.min()), float(value.max()))
        return value

    graph.run_watched(inputs, watch)
    return found


def fold_tolerance(graph: Graph, *inputs: Tensor) -> float:
    """Return how far rounding alone may move an output of ``graph`` when linear maps around it are folded.

    ``4 * eps * calls * largest``: each call rounds by at most ``eps`` of the largest sum ``|W| |x| + |b|`` that any
    linear map adds up (methods 13.7: cancellation makes a tolerance relative to the result wrong), or of the largest
    value anything else makes; 4 is for the gain of what comes behind. ``eps`` is that of the widest-rounding type.
    """
    values: dict[fx.Node, Any] = {}
    largest, calls, eps = 0.0, 0, 0.0

    def watch(node: fx.Node, value: Any) -> Any:
        nonlocal largest, calls, eps
        values[node] = value
        if isinstance(value, Tensor) and value.is_floating_point() and value.numel():
            largest = max(largest, float(_absolute(graph, node, values).max()))
            calls, eps = calls + 1, max(eps, torch.finfo(value.dtype).eps)
        return value

    graph.run_watched(inputs, watch)
    return 4 * eps * calls * largest


def _absolute(graph: Graph, node: fx.Node, values: dict[fx.Node, Any]) -> Tensor:
    """Return ``|W| |x| + |b|`` for a linear map, else the value's magnitude."""
    value: Tensor = values[node]
    if not query.is_call(node, ops.LINEAR, *ops.CONVOLUTIONS):
        return value.double().abs()

    def magnitude(argument: fx.Node) -> Tensor:
        found = query.constant(graph, argument) if query.is_constant(argument) else values[argument]
        return found.abs()

    result: Tensor = node.target(*fx.map_arg(node.args, magnitude), **fx.map_arg(node.kwargs, magnitude))  # type: ignore[operator]
    return result.double()


def distance(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest difference of any output relative to that output's largest magnitude.

    Raises:
        CheckFailed: the outputs differ in number, shape or type, or one is not finite where the other is.
    """
    if [(tuple(t.shape), t.dtype) for t in found] != [(tuple(t.shape), t.dtype) for t in expected]:
        raise CheckFailed("the outputs differ in number, shape or type")
    worst = 0.0
    for ours, reference in zip(found, expected, strict=True):
        reference = reference.detach()
        if not _identical(_infinities(ours), _infinities(reference)):
            raise CheckFailed("an output is finite in one graph only")
        difference = (ours.double() - reference.double()).nan_to_num().abs().amax()
        scale = reference.double().nan_to_num(posinf=0.0, neginf=0.0).abs().amax()
        worst = max(worst, float(difference / scale.clamp_min(torch.finfo(torch.float64).tiny)))
    return worst


def _infinities(tensor: Tensor) -> Tensor:
    """Return the tensor with 0 for every number, so that inf, -inf and nan remain."""
    return torch.where(tensor.isfinite(), 0.0, tensor.double())


def check_pass_contract(step: Pass, graph: Graph, inputs: Sequence[Tensor]) -> PassReport:
    """Run ``step`` on a copy of ``graph`` and check what every pass promises; return the report of its first run.

    The graph it leaves holds the invariants and still runs; inputs and outputs keep names, order, types and shapes;
    the original graph is not touched; ``report.changed`` is true exactly if the text form or a constant changed; a
    second run changes nothing.

    Raises:
        CheckFailed: a promise is broken; the message says which.
        InternalError: an invariant of the graph is broken.
    """
    trial, before, interface = graph.copy(), graph.text(), _interface(graph)
    expected = graph.run(*inputs)
    report = step.run(trial)
    verify(trial)
    after = trial.text()
    _require(report.name == step.name, step, f"its report is called {report.name}")
    _require(_interface(trial) == interface, step, "inputs or outputs changed their names, shapes or types")
    changed = after != before or not _same_constants(trial, graph)
    _require(report.changed == changed, step, f"report.changed is {report.changed}, the graph says otherwise")
    _require([t.shape for t in trial.run(*inputs)] == [t.shape for t in expected], step, "an output changed its shape")
    _require(graph.text() == before, step, "the original of a copy was changed")
    _require(all(map(_identical, graph.run(*inputs), expected)), step, "a constant of the original was changed")
    again = step.run(trial)
    _require(not again.changed and trial.text() == after, step, f"a second run still applies {dict(again.applied)}")
    return report


def _same_constants(found: Graph, expected: Graph) -> bool:
    """Return whether two graphs of one text hold the same tensors under the same names."""
    ours, theirs = dict(found.module.named_buffers()), dict(expected.module.named_buffers())
    return ours.keys() == theirs.keys() and all(_identical(ours[path], theirs[path]) for path in ours)


def _identical(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(found, expected, rtol=0, atol=0, equal_nan=True)


def _interface(graph: Graph) -> list[TensorSpec]:
    return [*graph.input_specs, *graph.output_specs]


def _require(holds: bool, step: Pass, otherwise: str) -> None:
    if not holds:
        raise CheckFailed(f"pass {step.name} breaks its contract: {otherwise}", hint="docs/writing-a-pass.md")


def picture(before: str, after: str) -> str:
    """Return the golden form of a pass at work: the graph before, a blank line, the graph after."""
    return f"before\n{before}\nafter\n{after}"


@dataclass(frozen=True, slots=True)
class Golden:
    """Equal to the text kept in a file; with ``update`` the file is written instead."""

    path: Path
    update: bool = False

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, str):
            return NotImplemented
        if self.update:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(other, encoding="utf-8")
        return other == self.text

    __hash__ = None  # type: ignore[assignment]

    @property
    def text(self) -> str:
        """The kept text, or an empty string."""
        return self.path.read_text(encoding="utf-8") if self.path.exists() else ""
