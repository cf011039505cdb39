"""From any kind of model to its graph, or to the file that is safe to load; samples serve as example inputs."""

from __future__ import annotations

import inspect
import io
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from normfuse.atomic import write_file
from normfuse.data import Samples
from normfuse.data.samples import Array
from normfuse.errors import BadInput, UnsupportedModel, UsageError
from normfuse.graph import Graph, capture
from normfuse.graph.capture import export_program
from normfuse.graph.unlift import return_plain
from normfuse.loading import LoadedModel, load_model

__all__ = ["Examples", "Model", "capture_model", "save"]

Model = nn.Module | ExportedProgram | LoadedModel | str | Path
Examples = Sequence[Tensor] | Tensor | Mapping[str, Tensor]
"""What to capture a module with: tensors in the order of ``forward``, one alone, or by the names of its parameters."""


def capture_model(model: Model, example_inputs: Examples | None = None, samples: Samples | None = None) -> Graph:
    """Return the graph of any kind of model; a module is captured with the first sample where nothing else is given.

    Raises:
        UsageError: the model is none, or there is nothing to capture a module with.
        BadInput: the file is no model, or the samples are not what the module's ``forward`` takes.
        NormfuseError: the model cannot be captured.
    """
    if isinstance(model, (str, Path)):
        model = load_model(model)
    inner = model.model if isinstance(model, LoadedModel) else model
    if isinstance(inner, ExportedProgram):
        return capture(inner)
    _refuse_no_module(inner)
    if example_inputs is not None:
        return capture(inner, _in_order(inner, example_inputs))
    if samples is None:
        raise UsageError(
            "this model must be run once to be captured",
            where=str(model.path) if isinstance(model, LoadedModel) else type(inner).__name__,
            expected="inputs to run it on",
            hint="--calib DATA; in Python calibration=... or example_inputs=...; files of normfuse.save need none",
        )
    examples = _first_sample(inner, samples)
    try:
        return capture(inner, examples)
    except UnsupportedModel:
        # Whose fault is it? If the module cannot even run on the sample, it is no matter of capturing.
        _refuse_misfit(inner, examples, samples)
        raise


def save(model: nn.Module, example_inputs: Examples, path: str | Path) -> None:
    """Write a module as a torch.export archive in eval mode: the safe form that ``normfuse compile`` reads.

    The batch axis (the first of every input) stays dynamic where the model allows it. What a model returns as a class
    of its own (``transformers`` does) is a dict in the file. The file is written whole or not at all.

    Raises:
        UsageError: the model is no module.
        UnsupportedModel: torch.export cannot capture it.
        BadInput: the example inputs are not what ``forward`` takes, or the file cannot be written.
    """
    _refuse_no_module(model)
    archive = io.BytesIO()  # torch's own writer ends the process where the disk is full
    program = export_program(model, _in_order(model, example_inputs))
    return_plain(program)
    torch.export.save(program, archive)
    write_file(Path(path), archive.getbuffer())


def _refuse_no_module(model: object) -> None:
    if isinstance(model, nn.Module):
        return
    is_weights = isinstance(model, Mapping)
    raise UsageError(
        f"the model is a {type(model).__name__}{': weights without their network' if is_weights else ''}",
        expected="a torch.nn.Module",
        hint="build the module, load the weights into it (load_state_dict), give the module" if is_weights else "",
    )


def _in_order(model: nn.Module, examples: Examples | None) -> Sequence[Tensor] | Tensor | None:
    """Return example inputs in the order of ``forward``'s parameters."""
    if not isinstance(examples, Mapping):
        return examples
    order = _order(model, tuple(examples), "example_inputs")
    if len(order) < len(examples):
        raise _wrong_names(tuple(examples), "example_inputs", [name for each in _parameters(model) for name in each])
    return [examples[name] for name in order]


def _first_sample(model: nn.Module, samples: Samples) -> list[Tensor]:
    """Return a batch of one for each parameter of ``forward``, in its order, floats in the module's own type."""
    first = next(samples.batches(1)).inputs
    constants = chain(model.parameters(), model.buffers())
    floating = next((tensor.dtype for tensor in constants if tensor.is_floating_point()), torch.get_default_dtype())
    order = _order(model, samples.names, samples.source)
    return [_tensor(first[name], floating, f"{samples.source}, array {name!r}") for name in order]


def _tensor(array: Array, floating: torch.dtype, where: str) -> Tensor:
    try:
        if np.issubdtype(array.dtype, np.floating):
            return torch.from_numpy(array.astype(np.float64)).to(floating)
        return torch.from_numpy(array)
    except TypeError as error:
        raise BadInput(f"the array is {array.dtype}", where=where, expected="numbers that torch knows") from error


def _order(model: nn.Module, names: Sequence[str], source: str) -> list[str]:
    """Return the names of the arrays that ``forward`` takes, in the order of its parameters."""
    required, optional = _parameters(model)
    given = set(names)
    taken = [name for name in (*required, *optional) if name in given]
    if required and given.issuperset(required) and taken == [*required, *optional][: len(taken)]:
        return taken
    if len(names) == 1 and len(required) <= 1:
        return list(names)
    raise _wrong_names(names, source, [*required, *optional])


def _wrong_names(names: Sequence[str], source: str, parameters: Sequence[str]) -> BadInput:
    return BadInput(
        f"the arrays are called {', '.join(names)}",
        where=source,
        expected=f"one array for each input of the model: {', '.join(parameters) or 'unknown'}",
        hint="name the arrays after the parameters of forward, or export the model with normfuse.save",
    )


def _parameters(model: nn.Module) -> tuple[list[str], list[str]]:
    """Return the names that ``forward`` takes by position: those it needs, and those with a default."""
    if isinstance(model, torch.jit.ScriptModule):
        _, *scripted = getattr(model, "forward").schema.arguments  # noqa: B009 - torch's types know no schema here
        needed = [argument.name for argument in scripted if not argument.has_default_value()]
        return needed, [argument.name for argument in scripted if argument.has_default_value()]
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    found = [each for each in inspect.signature(model.forward).parameters.values() if each.kind in positional]
    needed = [each.name for each in found if each.default is each.empty]
    return needed, [each.name for each in found if each.default is not each.empty]


def _refuse_misfit(model: nn.Module, examples: Sequence[Tensor], samples: Samples) -> None:
    modes = {part: part.training for part in model.modules()}
    try:
        with torch.no_grad():
            model.eval()(*examples)
    except Exception as error:  # whatever the user's forward raises
        sizes = ", ".join(f"{str(each.dtype).removeprefix('torch.')}{list(each.shape)}" for each in examples)
        lines = str(error).strip().splitlines()
        raise BadInput(
            f"the model cannot run on the first sample: {lines[0] if lines else type(error).__name__}",
            where=samples.source,
            expected=f"samples that {type(model).__name__}.forward takes; with the batch axis they are {sizes}",
            hint="check axes, sizes and types; a batch axis is added to every sample",
        ) from error
    finally:
        for part, was_training in modes.items():
            part.training = was_training
