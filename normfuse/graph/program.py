"""From a ``Graph`` back to an ``ExportedProgram``, for saving and for the ONNX exporter."""

from __future__ import annotations

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.exported_program import ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.utils import _pytree as pytree

from normfuse.graph.edit import fake_mode
from normfuse.graph.graph import Graph

__all__ = ["to_module", "to_program"]


def to_module(graph: Graph) -> fx.GraphModule:
    """Return a module of its own that runs the graph, in eval mode: it can be saved, moved, captured and folded again.

    A single tensor is returned bare, several as a tuple, named ones (a dict, a dataclass) as a dict. The weights are
    buffers, shared with the graph.
    """
    own: fx.GraphModule = graph.copy().module
    (output,) = [node for node in own.graph.nodes if node.op == "output"]
    results = list(output.args[0])
    numbered = tuple(f"output_{index}" for index in range(len(results)))
    if graph.output_names == ("output",):
        output.args = (results[0],)
    elif graph.output_names != numbered:
        output.args = (dict(zip(graph.output_names, results, strict=True)),)
    own.recompile()
    own.eval()
    return own


def to_program(graph: Graph) -> ExportedProgram:
    """Return an exported program with the graph's node names, constants and dynamic axes.

    A single output without a name of its own is returned bare, others as a dict by output name.
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
    results = [copies[node] for node in graph.outputs]
    lifted.output(tuple(results))
    state: dict[str, Tensor] = dict(graph.module.named_buffers())
    return ExportedProgram(
        root=torch.nn.Module(),
        graph=lifted,
        graph_signature=_signature(graph, constants, copies, results),
        state_dict=state,
        range_constraints=_range_constraints(graph),
        module_call_graph=[ModuleCallEntry("", _call_signature(graph, copies, results))],
        example_inputs=None,
        constants={},
    )


def _signature(
    graph: Graph, constants: list[fx.Node], copies: dict[fx.Node, fx.Node], results: list[fx.Node]
) -> ExportGraphSignature:
    inputs = [
        InputSpec(InputKind.BUFFER, TensorArgument(copies[node].name), str(node.target), persistent=True)
        for node in constants
    ]
    inputs += [InputSpec(InputKind.USER_INPUT, TensorArgument(copies[node].name), None) for node in graph.inputs]
    outputs = [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(node.name), None) for node in results]
    return ExportGraphSignature(input_specs=inputs, output_specs=outputs)


def _call_signature(graph: Graph, copies: dict[fx.Node, fx.Node], results: list[fx.Node]) -> ModuleCallSignature:
    count = len(graph.input_names)
    returned = 0 if graph.output_names == ("output",) else dict.fromkeys(graph.output_names, 0)
    return ModuleCallSignature(
        inputs=[TensorArgument(copies[node].name) for node in graph.inputs],
        outputs=[TensorArgument(node.name) for node in results],
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
