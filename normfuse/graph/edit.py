"""The only writing: new nodes, replaced nodes, new constants, dead code."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.node import map_aggregate
from torch.utils import _pytree as pytree

from normfuse.errors import InternalError
from normfuse.graph import metadata, ops
from normfuse.graph.graph import Graph

__all__ = ["Editor", "converted"]


class Editor:
    """Changes one graph; every new node gets a fake value and the provenance of the node it stands for."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph

    def constant(self, tensor: Tensor, name: str, *, like: fx.Node | None = None) -> fx.Node:
        """Add a constant under ``name`` (made unique) and return its node; nothing is overwritten.

        ``like`` gives the provenance. The node stands before all computation.
        """
        path = self._free_path(name)
        metadata.set_attribute(self.graph.module, path, tensor.detach().contiguous())
        first = next(node for node in self.graph.nodes if node.op != "placeholder")
        with self.graph.module.graph.inserting_before(first):
            node = self.graph.module.graph.create_node("get_attr", path, name=_node_name(path))
        node.meta["val"] = fake_mode(self.graph).from_tensor(tensor.detach(), static_shapes=True)
        node.meta.update(metadata.provenance(like) if like is not None else {})
        return node

    def call(
        self,
        target: Any,
        *args: Any,
        at: fx.Node,
        name: str = "",
        after: bool = False,
        like: fx.Node | None = None,
        **kwargs: Any,
    ) -> fx.Node:
        """Add a call before (or after) ``at`` and return its node; ``like`` (else ``at``) gives the provenance."""
        graph = self.graph.module.graph
        place = graph.inserting_after(at) if after else graph.inserting_before(at)
        with place:
            node = graph.create_node("call_function", target, args, kwargs, name=name or None)
        node.meta["val"] = compute_value(self.graph, node)
        node.meta.update(metadata.provenance(like or at))
        return node

    def replace(self, node: fx.Node, target: Any, *args: Any, name: str = "", **kwargs: Any) -> fx.Node:
        """Put a new call in the place of ``node``; all its readers read the new one."""
        new = self.call(target, *args, at=node, name=name or f"{node.name}_", **kwargs)
        self.redirect(node, new)
        return new

    def substitute(self, node: fx.Node, old: fx.Node, new: fx.Node) -> None:
        """Let one call (or the output) read ``new`` wherever it reads ``old`` and refresh its fake value."""
        node.replace_input_with(old, new)
        if node.op == "call_function":
            node.meta["val"] = compute_value(self.graph, node)

    def redirect(self, old: fx.Node, new: fx.Node, *, only: Callable[[fx.Node], bool] | None = None) -> None:
        """Let the readers of ``old`` (all, or those that ``only`` accepts) read ``new``."""
        kept = dict(new.meta)
        old.replace_all_uses_with(new, delete_user_cb=only or (lambda reader: reader is not new))
        new.meta = kept
        if not old.users and old.op == "call_function":
            self.graph.module.graph.erase_node(old)

    def set_argument(self, node: fx.Node, index: int, value: Any) -> None:
        """Change one positional argument of a call (a keyword one becomes positional) and refresh its fake value."""
        args = list(node.args)
        for argument in node.target._schema.arguments[len(args) : index + 1]:  # type: ignore[union-attr]
            args.append(node.kwargs.get(argument.name, argument.default_value))
            node.kwargs = {key: kept for key, kept in node.kwargs.items() if key != argument.name}
        args[index] = value
        node.args = tuple(args)
        node.meta["val"] = compute_value(self.graph, node)

    def set_constant(self, node: fx.Node, index: int, tensor: Tensor, name: str) -> None:
        """Let a call read ``tensor`` at one position; the old constant keeps its tensor and its other readers.

        A constant that only this call read gives its name to the new one; else ``name`` is used.
        """
        old = node.args[index] if index < len(node.args) else None
        is_own = isinstance(old, fx.Node) and old.op == "get_attr" and list(old.users) == [node]
        if isinstance(old, fx.Node) and is_own and list(node.all_input_nodes).count(old) == 1:
            metadata.set_attribute(self.graph.module, str(old.target), tensor.detach().contiguous())
            old.meta["val"] = fake_mode(self.graph).from_tensor(tensor.detach(), static_shapes=True)
            node.meta["val"] = compute_value(self.graph, node)
            return
        self.set_argument(node, index, self.constant(tensor, name, like=node))

    def resize(self, node: fx.Node, *, arguments: Mapping[int, Any], constants: Mapping[fx.Node, Tensor]) -> None:
        """Change what a call reads all at once, as its inputs have another shape; refresh its fake value last.

        ``arguments`` are positional ones, by index; ``constants`` the new tensors of constants that it reads. A
        constant that only this call reads gives its name to the new one.
        """
        node.args = tuple(arguments.get(index, argument) for index, argument in enumerate(node.args))
        for old, tensor in constants.items():
            if list(old.users) == [node]:
                metadata.set_attribute(self.graph.module, str(old.target), tensor.detach().contiguous())
                old.meta["val"] = fake_mode(self.graph).from_tensor(tensor.detach(), static_shapes=True)
            else:
                node.replace_input_with(old, self.constant(tensor, str(old.target), like=old))
        node.meta["val"] = compute_value(self.graph, node)

    def finish(self) -> None:
        """Remove dead code and dead constants, and recompile."""
        self.clean()
        self.graph.module.recompile()

    def clean(self) -> None:
        """Remove dead code and dead constants; what runs the module itself needs it recompiled, too."""
        graph = self.graph.module.graph
        for node in reversed(list(graph.nodes)):
            if not node.users and node.op in ("call_function", "get_attr"):
                graph.erase_node(node)
        _drop_unread_constants(self.graph)

    def _free_path(self, name: str) -> str:
        buffers = {path for path, _ in self.graph.module.named_buffers(remove_duplicate=False)}
        taken = buffers | {path for path, _ in self.graph.module.named_modules()}
        parents = [name[:index] for index, letter in enumerate(name) if letter == "."]
        if not buffers.isdisjoint(parents):  # a tensor has no attributes
            name = name.replace(".", "_")
        candidates: Iterator[str] = (name if index == 0 else f"{name}_{index}" for index in range(len(taken) + 2))
        return next(candidate for candidate in candidates if candidate not in taken)


def _node_name(path: str) -> str:
    return re.sub(r"\W", "_", path)


def _drop_unread_constants(graph: Graph) -> None:
    read = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    for path, _ in list(graph.module.named_buffers(remove_duplicate=False)):
        if path not in read:
            owner, _, leaf = path.rpartition(".")
            delattr(graph.module.get_submodule(owner), leaf)


def fake_mode(graph: Graph) -> FakeTensorMode:
    """Return the mode that the graph's fake values belong to."""
    for node in graph.nodes:
        mode = getattr(node.meta.get("val"), "fake_mode", None)
        if isinstance(mode, FakeTensorMode):
            return mode
    raise InternalError("the graph has no fake values")


def compute_value(graph: Graph, node: fx.Node) -> Any:
    """Return the fake value of a call from those of its arguments."""

    def value_of(argument: fx.Node) -> Any:
        return argument.meta["val"]

    args: Any = fx.map_arg(node.args, value_of)
    kwargs: Any = fx.map_arg(node.kwargs, value_of)
    with fake_mode(graph), torch.no_grad():
        if node.target is ops.PAD:
            return _padded(args[0], args[1])
        return node.target(*args, **kwargs)  # type: ignore[operator]


def _padded(x: torch.Tensor, amounts: Sequence[int]) -> torch.Tensor:
    """Return what pad makes; torch's own reads a free batch as a number where x lies in channels-last order."""
    sizes = list(x.shape)
    for index, amount in enumerate(amounts):
        sizes[-1 - index // 2] += amount
    return x.new_empty(sizes)


def converted(graph: Graph, dtype: torch.dtype) -> Graph:
    """Return a copy that computes in ``dtype``: floating-point constants, inputs and casts follow it."""

    def follow(argument: Any) -> Any:
        return dtype if isinstance(argument, torch.dtype) and argument.is_floating_point else argument

    def convert(value: Any) -> Any:
        is_floating = isinstance(value, torch.Tensor) and value.is_floating_point()
        return torch.empty_like(value, dtype=dtype) if is_floating else value

    copy = graph.copy()
    mode = fake_mode(copy)
    for path, tensor in list(copy.module.named_buffers()):
        if tensor.is_floating_point():
            metadata.set_attribute(copy.module, path, tensor.to(dtype))
    for node in copy.nodes:
        node.args = map_aggregate(node.args, follow)
        node.kwargs = map_aggregate(node.kwargs, follow)
        if "val" in node.meta:  # not computed again: that may fix sizes which the exporter has left open
            with mode:
                node.meta["val"] = pytree.tree_map(convert, node.meta["val"])
    copy.module.recompile()
    return copy


@contextmanager
def editing(graph: Graph) -> Iterator[Editor]:
    """Edit ``graph`` and clean up behind: ``with editing(graph) as edit: ...``."""
    editor = Editor(graph)
    yield editor
    editor.finish()
