"""From any kind of model to its graph, or to the file that is safe to load; samples serve as example inputs."""

from __future__ import annotations

import inspect
import io
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from normfuse.atomic import write_file
from normfuse.data import Samples
from normfuse.data.samples import Array
from normfuse.errors import BadInput, UnsupportedModel
from normfuse.graph import Graph, capture
from normfuse.graph.capture import export_program
from normfuse.loading import LoadedModel, load_model

__all__ = ["Model", "capture_model", "save"]

Model = nn.Module | ExportedProgram | LoadedModel | str | Path


def capture_model(
    model: Model, example_inputs: Sequence[Tensor] | None = None, samples: Samples | None = None
) -> Graph:
    """Return the graph of any kind of model; a module is captured with the first sample where nothing else is given.

    Raises:
        BadInput: the file is no model, or the samples are not what the module's ``forward`` takes.
        NormfuseError: the model cannot be captured.
    """
    if isinstance(model, (str, Path)):
        model = load_model(model)
    inner = model.model if isinstance(model, LoadedModel) else model
    if example_inputs is not None or samples is None or isinstance(inner, ExportedProgram):
        return capture(inner, example_inputs)
    examples = _first_sample(inner, samples)
    try:
        return capture(inner, examples)
    except UnsupportedModel:
        # Whose fault is it? If the module cannot even run on the sample, it is no matter of capturing.
        _refuse_misfit(inner, examples, samples)
        raise


def save(model: nn.Module, example_inputs: Sequence[Tensor], path: str | Path) -> None:
    """Write a module as a torch.export archive in eval mode: the safe form that ``normfuse compile`` reads.

    The batch axis (the first of every input) stays dynamic where the model allows it. The file is written whole or
    not at all.

    Raises:
        UnsupportedModel: torch.export cannot capture it.
        BadInput: the file cannot be written.
    """
    archive = io.BytesIO()  # torch's own writer ends the process where the disk is full
    torch.export.save(export_program(model, example_inputs), archive)
    write_file(Path(path), archive.getbuffer())


def _first_sample(model: nn.Module, samples: Samples) -> list[Tensor]:
    """Return a batch of one for each parameter of ``forward``, in its order, floats in the module's own type."""
    first = next(samples.batches(1)).inputs
    constants = chain(model.parameters(), model.buffers())
    floating = next((tensor.dtype for tensor in constants if tensor.is_floating_point()), torch.get_default_dtype())
    return [_tensor(first[name], floating, f"{samples.source}, array {name!r}") for name in _order(model, samples)]


def _tensor(array: Array, floating: torch.dtype, where: str) -> Tensor:
    try:
        if np.issubdtype(array.dtype, np.floating):
            return torch.from_numpy(array.astype(np.float64)).to(floating)
        return torch.from_numpy(array)
    except TypeError as error:
        raise BadInput(f"the array is {array.dtype}", where=where, expected="numbers that torch knows") from error


def _order(model: nn.Module, samples: Samples) -> list[str]:
    """Return the names of the arrays that ``forward`` takes, in the order of its parameters."""
    required, optional = _parameters(model)
    given = set(samples.names)
    taken = [name for name in (*required, *optional) if name in given]
    if required and given.issuperset(required) and taken == [*required, *optional][: len(taken)]:
        return taken
    if len(samples.names) == 1 and len(required) <= 1:
        return list(samples.names)
    raise BadInput(
        f"the samples have the arrays {', '.join(samples.names)}",
        where=samples.source,
        expected=f"one array for each input of the model: {', '.join((*required, *optional)) or 'unknown'}",
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
