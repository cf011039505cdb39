"""torch.export archives: checked as data first, then loaded, then refused if captured in training mode."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import torch
from torch import fx
from torch.export import ExportedProgram

from normfuse.errors import BadInput, UnsupportedModel
from normfuse.loading.content import ARCHIVE_HINT
from normfuse.loading.quiet import quiet_torch
from normfuse.loading.vetting import vet_archive

__all__ = ["read"]

# Operator -> the argument that switches training on.
TRAINING_ARGUMENT: Final = {
    "aten::dropout": "train",
    "aten::feature_dropout": "train",
    "aten::alpha_dropout": "train",
    "aten::feature_alpha_dropout": "train",
    "aten::native_dropout": "train",
    "aten::batch_norm": "training",
    "aten::native_batch_norm": "training",
    "aten::_native_batch_norm_legit": "training",
    "aten::_native_batch_norm_legit_functional": "training",
    "aten::scaled_dot_product_attention": "dropout_p",
}


def read(path: Path, *, trust: bool) -> ExportedProgram:
    """Return the exported program.

    Raises:
        BadInput: the archive is broken, of another version, or would run code and ``trust`` is false.
        UnsupportedModel: it was exported in training mode.
    """
    # One open file for both steps: what was checked is what is loaded.
    with path.open("rb") as file, quiet_torch():
        try:
            if not trust:
                vet_archive(file, path)
                file.seek(0)
            program = torch.export.load(file)
        except BadInput:
            raise
        # torch's reader raises whatever its own code meets in a broken archive: KeyError, AssertionError, ...
        except Exception as error:
            raise BadInput(
                f"the torch.export archive cannot be loaded: {_last_line(error)}",
                where=str(path),
                expected=f"a complete archive that torch {torch.__version__} can read, with tensors for this machine",
                hint=ARCHIVE_HINT,
            ) from error
    _refuse_training(program, path)
    return program


def _last_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1].strip()}" if lines else type(error).__name__


def _refuse_training(program: ExportedProgram, path: Path) -> None:
    for node in _all_nodes(program.graph_module):
        if _is_training(node):
            layer = list(node.meta.get("nn_module_stack", {}).values())
            raise UnsupportedModel(
                f"the model was exported in training mode: {node.target} takes its statistics or noise anew",
                where=f"{path}: {layer[-1][0] if layer else ''} ({node.name})",
                expected="a model exported in eval mode",
                hint="torch.export.export(model.eval(), inputs), or normfuse.save(model, inputs, path)",
            )


def _all_nodes(module: torch.nn.Module) -> Iterator[fx.Node]:
    for part in module.modules():
        if isinstance(part, fx.GraphModule):
            yield from part.graph.nodes


def _is_training(node: fx.Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    switch = TRAINING_ARGUMENT.get(node.target._schema.name)
    if switch is None or not _argument(node, switch):
        return False
    if switch == "training":
        # A batch norm without running statistics takes them from the batch in eval mode too.
        return _argument(node, "running_mean") is not None
    probability = _argument(node, "p")
    return probability is None or bool(probability > 0)


def _argument(node: fx.Node, name: str) -> Any:
    arguments = node.target._schema.arguments  # type: ignore[union-attr]  # an OpOverload by the caller's check
    for position, argument in enumerate(arguments):
        if argument.name == name:
            default = argument.default_value if argument.has_default_value() else None
            given = node.args[position] if position < len(node.args) else default
            return node.kwargs.get(name, given)
    return None
