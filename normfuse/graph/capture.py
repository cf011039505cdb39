"""From a PyTorch model to a ``Graph``: torch.export, functional, eval mode, batch kept dynamic."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from normfuse.errors import BadInput, UnsupportedModel, UsageError
from normfuse.graph import ops, query
from normfuse.graph.graph import Graph
from normfuse.graph.progression import unfinished_steps
from normfuse.graph.unlift import UNFINISHED, unlift

__all__ = ["capture", "export_program"]

log = logging.getLogger(__name__)

STATIC_BATCH = "the model fixes its batch size, so the engine takes exactly that batch"


def capture(model: nn.Module | ExportedProgram, example_inputs: Sequence[Tensor] | Tensor | None = None) -> Graph:
    """Return the model's graph; the model itself is not changed.

    Args:
        model: a module in any mode (captured in eval mode), a scripted module, or an exported program.
        example_inputs: one tensor per input (a tensor alone for one input), first axis the batch; not needed for an
            exported program.

    Raises:
        UsageError: a module came without example inputs.
        BadInput: an example input is no tensor, or a weight holds NaN.
        UnsupportedModel: torch.export refuses the model, it changes its own state when it runs, or it is random.
    """
    program = model if isinstance(model, ExportedProgram) else export_program(model, example_inputs)
    graph = unlift(_functional(program))
    _refuse_nan(graph)
    _forget_strides(graph)
    return graph if graph.has_dynamic_batch else replace(graph, notes=(*graph.notes, STATIC_BATCH))


def export_program(model: nn.Module, example_inputs: Sequence[Tensor] | Tensor | None) -> ExportedProgram:
    """Return the exported program of ``model`` in eval mode, with a dynamic batch where it has one."""
    if example_inputs is None:
        raise UsageError(
            "this model needs example inputs to be captured",
            hint="give calibration data, or example_inputs=... from Python",
        )
    inputs = _at_least_two((example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs))
    # Not model.train(was_training): parts may be in other modes than the whole (a frozen batch norm, for example).
    # A frozen scripted module has no mode any more: it is in eval mode for good.
    modes = {part: part.training for part in model.modules() if hasattr(part, "training")}
    try:
        if isinstance(model, torch.jit.ScriptModule):
            return _from_torchscript(model, inputs)
        return _export(model.eval(), inputs)
    finally:
        for part, was_training in modes.items():
            part.training = was_training


def _functional(program: ExportedProgram) -> ExportedProgram:
    try:
        with _quiet():
            functional: ExportedProgram = program.run_decompositions({})
            return functional
    except Exception as error:
        raise UnsupportedModel(
            f"torch.export cannot make the model functional: {_first_line(error)}",
            expected="parts whose names do not collide with torch's own (graph, code)",
            hint="make `torch.export.export(model, inputs).run_decompositions({})` pass first",
        ) from error


def _forget_strides(graph: Graph) -> None:
    """Write every view as reshape: the exporter's fake strides are not always those that the operators give."""
    for node in graph.nodes:
        if query.is_call(node, ops.VIEW):
            node.target = ops.RESHAPE
    graph.module.recompile()


def _export(model: nn.Module, inputs: tuple[Tensor, ...]) -> ExportedProgram:
    # AUTO lets torch keep the batch symbolic where the model allows it and fix it where it does not.
    try:
        arguments = inspect.signature(model.forward).bind(*inputs).arguments  # knows *args as one tuple
        dynamic = pytree.tree_map(lambda example: {0: Dim.AUTO} if example.ndim else None, dict(arguments))
        with _quiet():
            return torch.export.export(model, inputs, dynamic_shapes=dynamic, strict=False)
    except Exception as error:
        raise UnsupportedModel(
            f"torch.export cannot capture the model: {_first_line(error)}",
            where=type(model).__name__,
            expected="a model whose forward torch.export accepts in eval mode",
            hint="make `torch.export.export(model, inputs)` pass first; its own message is chained to this one",
        ) from error


def _from_torchscript(model: torch.jit.ScriptModule, inputs: tuple[Tensor, ...]) -> ExportedProgram:
    from torch._export.converter import TS2EPConverter

    _refuse_unfinished(model)
    try:
        with _quiet():
            scripted = torch.jit.freeze(model.eval()) if getattr(model, "training", False) else model
            program = TS2EPConverter(scripted, inputs).convert()
            return _export(program.module(check_guards=False), inputs)
    except UnsupportedModel:
        raise
    except Exception as error:
        raise UnsupportedModel(
            f"the TorchScript model cannot be converted: {_first_line(error)}",
            expected="a scripted or traced model of standard operators",
            hint="export the original module with normfuse.save instead",
        ) from error


def _refuse_unfinished(model: torch.jit.ScriptModule) -> None:
    """The converted program says of no operation which layer it belongs to. (A frozen module holds no counters.)"""
    if steps := unfinished_steps(dict(model.state_dict())):
        raise UnsupportedModel(
            f"{len(steps)} PRepBN layers {UNFINISHED}",
            where=", ".join(steps),
            expected="a TorchScript model whose progressive replacement has ended",
            hint="export the original module with normfuse.save: its other norms can then be told from these",
        )


def _at_least_two(examples: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """torch.export fixes an axis of size 1, so a batch of one sample is repeated; and it takes a view's base along."""
    for example in examples:
        if not isinstance(example, torch.Tensor):
            raise BadInput("an example input is no tensor", expected="torch.Tensor", where=type(example).__name__)
    # An input of size 1 beside larger ones is broadcast: repeated, it would not fit them.
    is_one_sample = all(example.shape[0] == 1 for example in examples if example.ndim)
    copies = 2 if is_one_sample else 1
    return tuple(torch.cat([example] * copies) if example.ndim else example.clone() for example in examples)


def _refuse_nan(graph: Graph) -> None:
    """Infinity is left alone: attention masks hold it."""
    for node in graph.nodes:
        if node.op != "get_attr":
            continue
        tensor = query.constant(graph, node)
        if tensor.is_floating_point() and (count := int(tensor.isnan().sum())):
            raise BadInput(
                f"{node.target} holds NaN: {count} of {tensor.numel()} numbers",
                expected="weights that are numbers",
                hint="take a checkpoint from before the training diverged",
            )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch's deprecation warnings about its own code from the user, and its logs of what it also raises."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.disabled = before
