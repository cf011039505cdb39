"""Typed access to what nodes and modules carry; ``node.meta`` is touched here and in ``edit`` only."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor, fx, nn

__all__ = [
    "attribute",
    "has_value",
    "layer_of",
    "note",
    "noted",
    "provenance",
    "set_attribute",
    "source_line",
    "value_of",
]

PROVENANCE: Final = ("nn_module_stack", "stack_trace")


def has_value(node: fx.Node) -> bool:
    """Return whether the node has a fake value (every node but the output must)."""
    return "val" in node.meta


def value_of(node: fx.Node) -> Any:
    """Return the node's fake value: shape, dtype and device without data."""
    return node.meta["val"]


def layer_of(node: fx.Node) -> str:
    """Return the user's module path, for example ``blocks.3.attn.proj`` (empty at the top level)."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path, _ = list(stack.values())[-1]
    return str(path).removeprefix("L['self']").removeprefix(".")


def source_line(node: fx.Node) -> str:
    """Return ``file.py:line`` of the user's code that made the node, or an empty string."""
    for line in reversed(str(node.meta.get("stack_trace") or "").splitlines()):
        if (stripped := line.strip()).startswith("File "):
            file, _, rest = stripped.removeprefix("File ").partition(", line ")
            return f"{file.strip(chr(34)).rsplit('/', 1)[-1]}:{rest.split(',')[0]}"
    return ""


def provenance(node: fx.Node) -> dict[str, Any]:
    """Return the part of the metadata that tells where the node came from."""
    return {key: node.meta[key] for key in PROVENANCE if key in node.meta}


def note(node: fx.Node, key: str, value: object) -> None:
    """Attach a normfuse fact to the node; copies of the graph keep it."""
    node.meta[f"normfuse.{key}"] = value


def noted(node: fx.Node, key: str) -> object | None:
    """Return the fact attached by ``note``, or None."""
    return node.meta.get(f"normfuse.{key}")


def attribute(module: nn.Module, path: str) -> Tensor:
    """Return the constant tensor at a dotted path of the module."""
    *parents, leaf = path.split(".")
    owner: Any = module
    for name in parents:
        owner = getattr(owner, name)
    tensor = getattr(owner, leaf)
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{path} is no tensor")
    return tensor


def set_attribute(module: nn.Module, path: str, tensor: Tensor) -> None:
    """Store a constant at a dotted path, making the modules on the way."""
    *parents, leaf = path.split(".")
    owner = module
    for name in parents:
        if not hasattr(owner, name):
            owner.add_module(name, nn.Module())
        owner = getattr(owner, name)
    if hasattr(owner, leaf):
        delattr(owner, leaf)
    owner.register_buffer(leaf, tensor)
