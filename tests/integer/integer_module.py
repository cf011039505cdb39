"""A module as integers, as ``build_integers`` makes them, and every code beside the number that it stands for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from normfuse.build import FOLDING, Engine
from normfuse.errors import UnsupportedModel
from normfuse.feeding import Stream, fixed_batch
from normfuse.graph import Graph, capture, ops, query
from normfuse.graph.affine import AFFINE, read_affine
from normfuse.graph.edit import Editor, converted
from normfuse.graph.quantization import is_requested
from normfuse.integer.roles import CLAMPS, POINTWISE, PRODUCTS, is_given
from normfuse.integer.written import Coded
from normfuse.integer_engine import build_integers
from normfuse.integer_plan import IntegerPlan, plan_integers
from normfuse.kernels.reference import norms
from normfuse.passes.lower_to_integers import LowerToIntegers
from normfuse.pipeline import Fact, Phase, Pipeline
from normfuse.progress import Silent
from normfuse.recipe import Recipe
from normfuse.runtime.onnx_session import OnnxSession, open_onnx
from normfuse.testing import Small, distance, randomized, seeded

__all__ = [
    "Lowered",
    "build",
    "computed_or_refused",
    "folded",
    "hold",
    "hold_all",
    "hold_bits",
    "lower",
    "module",
    "normal",
]

FLOAT32: Final = 1e-4
"""Float32 against float32 through a few operators, folded and not: what ``check_export`` allows."""

SAMPLES: Final = 16
FRESH: Final = 5
"""How many samples calibrate, and how many others are compared; both are no size of anything else."""

RECIPE: Final = Recipe(integer_only=True)
INTERPOLATION: Final = ops.ATEN.upsample_bilinear2d.vec
EIGHT_BITS: Final = (*PRODUCTS, *POINTWISE, ops.GELU, ops.MATMUL, ops.ATTENTION, *ops.MAXIMUM_POOLS)
ROUNDING: Final = (INTERPOLATION, ops.EMBEDDING, ops.PAD)
"""Views that round: between two codes, rows of 8 bits, the number that is padded with."""

Shape = Sequence[int] | Tensor
"""The shape of a sample, whose numbers are normal then, or samples along the first axis."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lowered:
    """A module and its integers.

    Attributes:
        original: what was lowered.
        plan: the float graph with requests, and what they get.
        steps: the integers before tables become part of products; float nodes are in it, too.
        codes: what makes codes in ``steps``, by the name of the float node that is rounded.
        operands: the 8 bits that products read of constants and of rows of tables, which have 16 elsewhere.
        graph: what ships, in torch.
        session: what ships, in onnxruntime, if it was asked for.
    """

    original: nn.Module | ExportedProgram
    plan: IntegerPlan
    steps: Graph
    codes: Mapping[str, Coded]
    operands: Mapping[str, Coded]
    graph: Graph
    session: OnnxSession | None

    @property
    def operators(self) -> list[str]:
        """The names of our operators that ship, in order; those of both ends are left out."""
        calls = [str(node.target) for node in self.graph.nodes if node.op == "call_function"]
        ours = [call.split(".")[1] for call in calls if call.startswith("normfuse.")]
        return [name for name in ours if name not in ("quantize", "dequantize", "request")]

    def distances(self, *inputs: Tensor) -> dict[str, tuple[float, float]]:
        """Return by how many codes the integers are away from the exact number, and by how many they may be.

        By the name of what is rounded, where it is worst. Every operator is computed in float64 from what the codes in
        front of it stand for, so the distance is that of one operator alone.
        """
        trial = _Trial(self, self._recorded(inputs))
        wide = converted(self.plan.graph, torch.float64)
        with torch.no_grad():
            exact = wide.run_as([each.double() if each.is_floating_point() else each for each in inputs], trial.compute)
        for ours, each in zip(self.graph.run(*inputs), exact, strict=True):
            # A constant that is returned is 16 bits wide; everything else is what its codes stand for.
            tolerance = 2.0**-16 * float(each.double().abs().max()) if each.numel() else 0.0
            torch.testing.assert_close(ours.double(), each.double(), rtol=0, atol=tolerance)
        return trial.found

    def _recorded(self, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return what every node of ``steps`` makes; they return what ships does."""
        recorded = dict[str, Tensor]()

        def watch(node: fx.Node, value: Any) -> Any:
            recorded[node.name] = value
            return value

        outputs = self.steps.run_watched(inputs, watch)
        for ours, theirs in zip(outputs, self.graph.run(*inputs), strict=True):
            assert torch.equal(ours, theirs), "joining operators changed what they compute"
        for node in self.steps.nodes:
            if query.is_constant(node):
                recorded[node.name] = query.constant(self.steps, node)
        return recorded


@dataclass(slots=True)
class _Trial:
    """One float64 run beside the integers.

    Attributes:
        lowered: the module.
        recorded: what integer nodes made, by name.
        found: distance and what is allowed, by the name of what is rounded.
        softmax: what 8-bit weights of attention may do to its result, by the product's name.
    """

    lowered: Lowered
    recorded: Mapping[str, Tensor]
    found: dict[str, tuple[float, float]] = field(default_factory=dict)
    softmax: dict[str, Tensor] = field(default_factory=dict)

    def compute(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute a node in float64; what is rounded goes on as its integer codes stand for it."""
        args = self._with_operands(node, args)
        value = node.target(*self._with_codes(node, args), **kwargs)  # type: ignore[operator]
        if query.is_call(node, ops.ATTENTION) or _is_weighted_sum(node):
            self.softmax[node.name] = self._of_weights(node, args, kwargs, value)
        if (coded := self.lowered.codes.get(node.name)) is None:
            return value
        codes, unit = self.recorded[coded.node.name].double(), self._unit(coded)
        exact = (value / unit + coded.zero_point).clamp(*self._ends(node, codes))
        assert exact.shape == codes.shape
        far = (exact - codes).abs()
        allowed = self._allowed(node, unit, codes).expand(far.shape)
        worst = int((far - allowed).argmax())
        self.found[node.name] = float(far.flatten()[worst]), float(allowed.flatten()[worst])
        return (codes - coded.zero_point) * unit

    def _unit(self, coded: Coded) -> Tensor:
        """Return what a step of codes stands for: one number, or one of each token; a token of nothing has any."""
        scale = torch.tensor(coded.scale, dtype=torch.float64)
        if coded.factors is None:
            return scale
        return scale * self.recorded[coded.factors.name].double().clamp(min=1)

    def _with_operands(self, node: fx.Node, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return the arguments of what reads 8 bits, with the values that those stand for."""
        if not query.is_call(node, *EIGHT_BITS):
            return args
        found = [self.lowered.operands.get(each.name) if isinstance(each, fx.Node) else None for each in node.args]
        values = [
            each if coded is None else (self.recorded[coded.node.name].double() - coded.zero_point) * coded.scale
            for each, coded in zip(args, found, strict=True)
        ]
        return tuple(values)

    def _with_codes(self, node: fx.Node, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return the arguments of a call with its weight, or its table, as 8-bit codes stand for it."""
        if query.is_call(node, ops.RMS_NORM) and len(args) < 4:  # the default is that of the type
            return *args, *[None] * (3 - len(args)), torch.finfo(torch.float32).eps
        if query.is_call(node, ops.EMBEDDING):
            scale = args[0].abs().amax(0) / 127
            return torch.floor(args[0] / scale + 0.5) * scale, *args[1:]
        if (weight := self.lowered.plan.weights.get(node.name)) is None:
            return args
        scale = weight.params.scale.double().reshape(-1, *[1] * (weight.codes.ndim - 1))
        return args[0], weight.codes.double() * scale, None if weight.bias is None else weight.bias.double(), *args[3:]

    def _ends(self, node: fx.Node, codes: Tensor) -> tuple[int, int]:
        if not is_requested(node):
            return int(codes.min()), int(codes.max())
        type_ = self.lowered.plan.activations[query.operand(node, 0).name].type
        return type_.minimum, type_.maximum

    def _allowed(self, node: fx.Node, unit: Tensor, codes: Tensor) -> Tensor:
        """Return half a code for rounding, and what constants may do.

        Half a code; half a step of the sums in front, which is what a bias is held in; what a softmax may do. An
        interpolation rounds twice, and its two weights have 14 bits behind the point.
        """
        if query.is_call(node, INTERPOLATION):
            return torch.tensor(1 + 2.0**-14 * float(codes.max() - codes.min()))
        source = query.operand(node, 0)
        rounded = 0.5 + 0.5 * (self._step(source) / unit).clamp(min=1.0)
        while query.is_call(source, *CLAMPS):
            source = query.operand(source, 0)
        return rounded + self.softmax.get(source.name, torch.tensor(0.0)) / unit

    def _step(self, node: fx.Node) -> float:
        """Return the largest step of the sums, or of what is normalized, that a value is made of."""
        if node.name in self.lowered.codes or node.op != "call_function":
            return 0.0
        own = 0.0
        if (weight := self.lowered.plan.weights.get(node.name)) is not None:
            own = self._scale_of(query.operand(node, 0)) * float(weight.params.scale.max())
        elif query.is_call(node, AFFINE):  # what is added is held in steps of what is scaled
            read, gain = query.operand(node, 0), read_affine(self.lowered.plan.graph, node).scale
            own = 0.0 if _is_norm(read) else self._scale_of(read) * float(gain.abs().max())
        elif _is_norm(node):
            gamma = query.argument(node, 2, "weight")
            largest = 1.0 if gamma is None else float(query.constant(self.lowered.plan.graph, gamma).abs().max())
            own = largest * 2.0**-norms.FRACTION
        return max([own, *(self._step(each) for each in node.all_input_nodes)])

    def _scale_of(self, node: fx.Node) -> float:
        known = {**self.lowered.codes, **self.lowered.operands}
        while node.name not in known:
            node = query.operand(node, 0)
        return known[node.name].scale

    def _of_weights(self, node: fx.Node, args: tuple[Any, ...], kwargs: Mapping[str, Any], value: Tensor) -> Tensor:
        """Return how far weights of 8 bits may move a weighted sum.

        A weight of ``w`` (255 for the row's largest) is rounded by half, and its exponent by half of 2^-8 octaves, and
        by half a step of the scores where these have a bias. The sum moves by the weights' errors times the values'
        distances from it, over the sum of the weights.
        """
        if node.target is ops.ATTENTION:
            q, k, v = args[:3]
            identity = torch.eye(v.shape[-2], dtype=v.dtype).expand(*v.shape[:-1], v.shape[-2])
            shares = node.target(q, k, identity, *args[3:], **kwargs)
            step = 0.0
        else:
            shares, v = args
            step = self._step_of_scores(node)
        weights = 255 * shares / shares.amax(-1, keepdim=True)
        errors = 0.5 + weights * (2.0**-9 * 0.7 + 0.5 * step + 1e-4)
        reach = (v[..., None, :, :] - value[..., :, None, :]).abs()  # [..., queries, keys, values]
        moved: Tensor = (errors[..., None] * reach).sum(-2).div(weights.sum(-1, True) - errors.sum(-1, True))
        return moved

    def _step_of_scores(self, node: fx.Node) -> float:
        """Return the step of scores that have a bias, of which every part is held in it."""
        scores = query.operand(query.operand(node, 0), 0)
        if not query.is_call(scores, ops.ADD):
            return 0.0
        (product,) = [each for each in scores.all_input_nodes if not is_given(each)]
        parts = sum(_constants(each) for each in scores.all_input_nodes if is_given(each))
        return parts * self._scale_of(query.operand(product, 0)) * self._scale_of(query.operand(product, 1))


def _is_norm(node: fx.Node) -> bool:
    return query.is_call(node, ops.LAYER_NORM, ops.RMS_NORM)


def _constants(node: fx.Node) -> int:
    return 1 if query.is_constant(node) else sum(map(_constants, node.all_input_nodes))


def _is_weighted_sum(node: fx.Node) -> bool:
    return query.is_call(node, ops.MATMUL) and query.is_call(node.args[0], ops.SOFTMAX)


def module(function: Any, **parts: nn.Module | Tensor) -> nn.Module:
    """Return ``Small`` with random parameters; float tensors among its parts are parameters, random too."""
    held = {name: _held(part) for name, part in parts.items()}
    found: nn.Module = randomized(Small(function, **held))
    return found


def _held(part: nn.Module | Tensor) -> nn.Module | Tensor:
    return nn.Parameter(part) if isinstance(part, Tensor) and part.is_floating_point() else part


def normal(count: int, *shape: int, seed: int = 0) -> Tensor:
    """Return the same normal numbers every time."""
    return torch.randn(count, *shape, generator=seeded(seed))


def folded(original: nn.Module | ExportedProgram, *samples: Tensor) -> tuple[Graph, Stream]:
    """Return the float graph of a model, and its samples as it takes them.

    Args:
        original: the model.
        samples: for every input, samples along the first axis.
    """
    is_program = isinstance(original, ExportedProgram)
    graph = capture(original) if is_program else capture(original, [each[:3] for each in samples])
    FOLDING.run(graph)
    size, total = fixed_batch(graph) or 1, max(len(each) for each in samples)
    starts = range(0, total - size + 1, size)
    return graph, lambda: ([each[at : at + size] for each in samples] for at in starts)


def build(original: nn.Module | ExportedProgram, *samples: Tensor, path: Path, recipe: Recipe = RECIPE) -> Engine:
    """Fold a model and write its integers to a file."""
    graph, stream = folded(original, *samples)
    return build_integers(graph, stream, path, recipe=recipe, total=len(samples[0]), threads=1, progress=Silent())


def lower(
    original: nn.Module | ExportedProgram,
    *shapes: Shape,
    count: int = SAMPLES,
    is_written: bool = True,
    recipe: Recipe = RECIPE,
) -> Lowered:
    """Make a module integers, calibrated on ``count`` samples of every input.

    Without ``is_written`` there is no file, which takes twice as long as everything else.
    """
    samples = _inputs(shapes, count, seed=1)
    graph, stream = folded(original, *samples)
    plan = plan_integers(graph, stream, recipe=recipe, total=count, progress=Silent())
    ships, session = _written(graph, stream, recipe) if is_written else (_lowered(plan), None)
    steps = plan.graph.copy()
    # Requests of outputs will be gone when all is written.
    asked = [node for node in steps.nodes if is_requested(node) or query.is_call(node, *ROUNDING)]
    lowering = plan.lowering(Editor(steps), plan.weights)
    lowering.run()
    codes = {node.name: lowering.coded(node) for node in asked if lowering.is_coded(node)}
    operands = {node.name: each for node, each in lowering.operands.items() if each is not lowering.coded(node)}
    return Lowered(
        original=original, plan=plan, steps=steps, codes=codes, operands=operands, graph=ships, session=session
    )


def _written(graph: Graph, stream: Stream, recipe: Recipe) -> tuple[Graph, OnnxSession]:
    with TemporaryDirectory(prefix="normfuse-test-") as folder:
        path = Path(folder) / "integers.onnx"
        engine = build_integers(graph, stream, path, recipe=recipe, total=SAMPLES, threads=1, progress=Silent())
        return engine.graph, open_onnx(path, threads=1)


def _lowered(plan: IntegerPlan) -> Graph:
    graph = plan.graph.copy()
    lower = LowerToIntegers(activations=plan.activations, weights=plan.weights, allows_islands=plan.allows_islands)
    Pipeline(phases=(Phase("integers", (lower,)),), given=frozenset({Fact.PLACED})).run(graph)
    return graph


def hold(lowered: Lowered, *shapes: Shape, count: int = FRESH) -> None:
    """Check a module's integers on ``count`` samples that it was not calibrated with, in one batch.

    The float graph computes what the module does; every code is near enough to the exact number
    (``Lowered.distances``); the graph that ships computes the same codes; onnxruntime computes the same bits.
    """
    inputs = hold_bits(lowered, *shapes, count=count)
    distances = lowered.distances(*inputs)
    assert distances
    assert all(far <= allowed for far, allowed in distances.values()), distances


def hold_bits(lowered: Lowered, *shapes: Shape, count: int = FRESH) -> list[Tensor]:
    """Check that the float graph computes what the module does and onnxruntime the reference's bits; return samples.

    For forms that are not meant to be near to their function, this is all that can be held.
    """
    inputs = _inputs(shapes, count, seed=101)
    _hold_float(lowered, inputs)
    if lowered.session is not None:
        made = lowered.session.run(
            {name: each.numpy() for name, each in zip(lowered.graph.input_names, inputs, strict=True)}
        )
        for name, each in zip(lowered.graph.output_names, lowered.graph.run(*inputs), strict=True):
            assert torch.equal(torch.from_numpy(made[name]), each), f"onnxruntime has other bits in {name}"
    return inputs


def hold_all(original: nn.Module, *shapes: Shape, count: int = SAMPLES, is_written: bool = True) -> Lowered:
    """Make a module integers, check them on fresh samples, return them."""
    lowered = lower(original, *shapes, count=count, is_written=is_written)
    hold(lowered, *shapes)
    return lowered


def computed_or_refused(original: nn.Module, *shapes: Shape, where: str) -> None:
    """Check that a module's integers are right, or that it is refused by a layer's name."""
    try:
        lowered = lower(original, *shapes)
    except UnsupportedModel as refusal:
        found = refusal.where
    else:
        found = where
        hold(lowered, *shapes)
    assert found == where


def _hold_float(lowered: Lowered, inputs: Sequence[Tensor]) -> None:
    original = lowered.original
    called = original.module() if isinstance(original, ExportedProgram) else original
    with torch.no_grad():
        wanted = called(*inputs)
    listed = list(wanted) if isinstance(wanted, (tuple, list)) else [wanted]
    assert distance(lowered.plan.graph.run(*inputs), listed) < FLOAT32


def _inputs(shapes: Sequence[Shape], count: int, *, seed: int) -> list[Tensor]:
    return [
        each[:count] if isinstance(each, Tensor) else normal(count, *each, seed=seed + index)
        for index, each in enumerate(shapes)
    ]
