"""From a ``Graph`` back to an ``ExportedProgram``, for saving and for the ONNX exporter."""

from __future__ import annotations

import io
import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.exported_program import ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ConstantArgument,
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.utils import _pytree as pytree

from normfuse.graph import metadata
from normfuse.graph.edit import fake_mode
from normfuse.graph.graph import Graph
from normfuse.graph.progression import counters

__all__ = ["program_bytes", "to_module", "to_program"]


def to_module(graph: Graph) -> fx.GraphModule:
    """Return a module of its own that runs the graph, in eval mode: it can be saved, moved, captured and folded again.

    It returns what the model does, nested as it was; a class of the model's own (a dataclass) as a dict by field. The
    weights are buffers, shared with the graph. An input of another size than the graph is of is an AssertionError.
    """
    own: fx.GraphModule = graph.copy().module
    _assert_sizes(graph, own.graph)
    _keep_counters(own)
    (output,) = [node for node in own.graph.nodes if node.op == "output"]
    output.args = (pytree.tree_map_only(int, list(output.args[0]).__getitem__, graph.returned),)
    own.recompile()
    own.eval()
    return own


def _assert_sizes(graph: Graph, checked: fx.Graph) -> None:
    """Let ``checked`` refuse inputs of other sizes: constants made for the graph's own would broadcast against them."""
    inputs = [node for node in checked.nodes if node.op == "placeholder"]
    for spec, node in zip(graph.input_specs, inputs, strict=True):
        with checked.inserting_before(inputs[-1].next):
            for axis, size in ((axis, size) for axis, size in enumerate(spec.shape) if size is not None):
                same = checked.call_function(operator.eq, (checked.call_method("size", (node, axis)), size))
                message = f"axis {axis} of input {spec.name} is not {size}: the model was captured with that size"
                checked.call_function(torch._assert, (same, message))


def _keep_counters(module: fx.GraphModule) -> None:
    """Let the module hold the counters of unfinished layers; what its graph does not name, a copy would drop."""
    first = next(iter(module.graph.nodes))
    for path, counter in counters(module.graph.nodes).items():
        if path not in dict(module.named_buffers()):
            metadata.set_attribute(module, path, counter)
            with module.graph.inserting_before(first):
                module.graph.create_node("get_attr", path)


def to_program(graph: Graph) -> ExportedProgram:
    """Return an exported program with the graph's node names, constants and dynamic axes.

    It returns what the model does, nested as it was; a file knows no classes, so named tuples become dicts by field.
    """
    lifted, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    constants = [node for node in graph.nodes if node.op == "get_attr"]
    for node, name in [(node, f"b_{node.name}") for node in constants] + [
        (node, name) for node, name in zip(graph.inputs, graph.input_names, strict=True)
    ]:
        copies[node] = lifted.placeholder(name)
        copies[node].name = name  # fx would call an input named like a builtin (input, id) something else
        copies[node].meta.update(node.meta)
    for node in graph.nodes:
        if node.op == "call_function":
            copies[node] = lifted.node_copy(node, copies.__getitem__)
    returned = _without_classes(graph.returned)
    numbers = pytree.tree_leaves(returned)
    results = [None if number is None else copies[graph.outputs[number]] for number in numbers]
    lifted.output(tuple(results))
    state: dict[str, Tensor] = {**counters(graph.nodes), **dict(graph.module.named_buffers())}
    return ExportedProgram(
        root=torch.nn.Module(),
        graph=lifted,
        graph_signature=_signature(graph, constants, copies, results),
        state_dict=state,
        range_constraints=_range_constraints(graph),
        module_call_graph=[ModuleCallEntry("", _call_signature(graph, copies, results, returned))],
        example_inputs=None,
        constants={},
    )


def program_bytes(graph: Graph) -> memoryview:
    """Return the graph as a torch.export archive.

    It is made in memory: torch's own writer ends the process where the disk is full.
    """
    archive = io.BytesIO()
    torch.export.save(to_program(graph), archive)
    return archive.getbuffer()


def _signature(
    graph: Graph, constants: list[fx.Node], copies: dict[fx.Node, fx.Node], results: list[fx.Node | None]
) -> ExportGraphSignature:
    inputs = [
        InputSpec(InputKind.BUFFER, TensorArgument(copies[node].name), str(node.target), persistent=True)
        for node in constants
    ]
    inputs += [InputSpec(InputKind.USER_INPUT, TensorArgument(copies[node].name), None) for node in graph.inputs]
    outputs = [OutputSpec(OutputKind.USER_OUTPUT, _argument(node), None) for node in results]
    return ExportGraphSignature(input_specs=inputs, output_specs=outputs)


def _argument(node: fx.Node | None) -> TensorArgument | ConstantArgument:
    return ConstantArgument("", None) if node is None else TensorArgument(node.name)


def _without_classes(value: Any) -> Any:
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, dict):
        return {key: _without_classes(part) for key, part in value.items()}
    return type(value)(map(_without_classes, value)) if isinstance(value, (list, tuple)) else value


def _call_signature(
    graph: Graph, copies: dict[fx.Node, fx.Node], results: list[fx.Node | None], returned: Any
) -> ModuleCallSignature:
    count = len(graph.input_names)
    return ModuleCallSignature(
        inputs=[TensorArgument(copies[node].name) for node in graph.inputs],
        outputs=[_argument(node) for node in results],
        in_spec=pytree.tree_structure((tuple(range(count)), {})),
        out_spec=pytree.tree_structure(returned),
        forward_arg_names=list(graph.input_names),
    )


def _range_constraints(graph: Graph) -> dict[object, object]:
    environment = fake_mode(graph).shape_env
    if environment is None:
        return {}
    symbols = {
        symbol
        for node in graph.inputs
        for size in node.meta["val"].shape
        if isinstance(size, torch.SymInt)
        for symbol in size.node.expr.free_symbols
    }
    return {symbol: environment.var_to_range[symbol] for symbol in symbols}
