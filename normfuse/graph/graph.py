"""``Graph``: a functional, eval-mode ATen graph with its constants, inputs and outputs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from normfuse.graph import metadata, text

__all__ = ["Graph", "Snapshot", "TensorSpec"]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A named input or output; ``None`` in ``shape`` is a dynamic axis."""

    name: str
    shape: tuple[int | None, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a graph was: its nodes, and its constants by path. It costs far less than a copy, which is compiled."""

    nodes: fx.Graph
    constants: dict[str, Tensor]


@dataclass(slots=True)
class Graph:
    """The one IR. Constants are attributes of ``module``, one ``get_attr`` node each.

    Read it through ``normfuse.graph.query`` and change it through ``normfuse.graph.edit`` only.
    ``input_names`` and ``output_names`` are the names that users see, in the order of the model's
    signature; ``notes`` are facts about the capture that a report should repeat. ``returned`` is what the model
    returns: tuples, lists and dicts with the number of an output in place of every tensor.
    """

    module: fx.GraphModule
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    notes: tuple[str, ...] = ()
    returned: Any = 0

    @property
    def nodes(self) -> Iterator[fx.Node]:
        """The nodes in topological order."""
        return iter(self.module.graph.nodes)

    @property
    def inputs(self) -> list[fx.Node]:
        """The placeholder nodes, in the order of ``input_names``."""
        return [node for node in self.nodes if node.op == "placeholder"]

    @property
    def outputs(self) -> list[fx.Node]:
        """The nodes whose values are returned, in the order of ``output_names``."""
        (output,) = [node for node in self.nodes if node.op == "output"]
        return [node for node in output.args[0] if isinstance(node, fx.Node)]  # type: ignore[union-attr]

    @property
    def input_specs(self) -> list[TensorSpec]:
        """Names, shapes and dtypes of the inputs."""
        return [_spec(name, node) for name, node in zip(self.input_names, self.inputs, strict=True)]

    @property
    def output_specs(self) -> list[TensorSpec]:
        """Names, shapes and dtypes of the outputs."""
        return [_spec(name, node) for name, node in zip(self.output_names, self.outputs, strict=True)]

    @property
    def has_dynamic_batch(self) -> bool:
        """Whether every input's first axis may take any size."""
        return all(spec.shape[:1] == (None,) for spec in self.input_specs)

    def constant_bytes(self) -> int:
        """Return the size of all constants that some node reads, in bytes."""
        names = {str(node.target) for node in self.nodes if node.op == "get_attr"}
        tensors = [metadata.attribute(self.module, name) for name in sorted(names)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def run(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs for ``inputs`` (in the order of ``input_names``), without gradients."""
        with torch.no_grad():
            return tuple(self.module(*inputs))

    def run_watched(self, inputs: Sequence[Tensor], watch: Callable[[fx.Node, Any], Any]) -> tuple[Tensor, ...]:
        """Run node by node; what ``watch(node, value)`` returns goes on in place of the value."""
        with torch.no_grad():
            return tuple(_Watched(self.module, watch).run(*inputs))

    def run_as(
        self, inputs: Sequence[Tensor], compute: Callable[[fx.Node, tuple[Any, ...], dict[str, Any]], Any]
    ) -> tuple[Tensor, ...]:
        """Run node by node with ``compute`` in place of every call, with gradients; what nobody reads any more goes."""
        return tuple(_Computed(self.module, compute).run(*inputs))

    def copy(self, *, with_constants: bool = False) -> Graph:
        """Return an independent graph that shares no nodes; constants are shared until replaced, or copied too."""
        shared = () if with_constants else (*self.module.parameters(), *self.module.buffers())
        memo: dict[int, Any] = {id(tensor): tensor for tensor in shared}
        return replace(self, module=copy.deepcopy(self.module, memo))

    def snapshot(self) -> Snapshot:
        """Return what ``restore`` brings back; constants are shared, as they are replaced and never changed."""
        constants = dict(self.module.named_buffers(remove_duplicate=False))
        return Snapshot(copy.deepcopy(self.module.graph), constants)

    def restore(self, kept: Snapshot) -> None:
        """Be again what the graph was; nodes held from before are no part of it any more."""
        root = nn.Module()
        for path, tensor in kept.constants.items():
            metadata.set_attribute(root, path, tensor)
        self.module = fx.GraphModule(root, kept.nodes)

    def text(self) -> str:
        """Return the stable text form (no addresses, no values)."""
        return text.render(self.module.graph)


class _Watched(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, watch: Callable[[fx.Node, Any], Any]) -> None:
        super().__init__(module)
        self._watch = watch

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        return value if n.op in ("get_attr", "output") else self._watch(n, value)


class _Computed(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, compute: Callable[..., Any]) -> None:
        super().__init__(module)
        self._compute = compute

    def run_node(self, n: fx.Node) -> Any:
        if n.op != "call_function":
            return super().run_node(n)
        return self._compute(n, *self.fetch_args_kwargs_from_env(n))


def _spec(name: str, node: fx.Node) -> TensorSpec:
    value = metadata.value_of(node)
    shape = tuple(size if isinstance(size, int) else None for size in value.shape)
    return TensorSpec(name, shape, value.dtype)
