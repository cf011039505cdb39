"""From an exported program to a ``Graph``: parameters as attributes, outputs named, what cannot be compiled refused."""

from __future__ import annotations

import itertools
import operator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils import _pytree as pytree

from normfuse.errors import UnsupportedModel
from normfuse.graph import metadata
from normfuse.graph.graph import Graph
from normfuse.graph.progression import mark_unfinished, unfinished_steps

__all__ = ["UNFINISHED", "return_plain", "unlift"]

UNFINISHED = "still mix in layer norm when they train, so eval mode is not what was trained; train until iter is 0"


def unlift(program: ExportedProgram) -> Graph:
    """Return the graph with lifted parameters as named attributes, one ``get_attr`` node each.

    Raises:
        UnsupportedModel: the program changes state, draws random numbers, branches, or takes or returns what is no
            tensor.
    """
    signature = program.graph_signature
    _refuse_mutation(program)
    targets = {spec.arg.name: spec for spec in signature.input_specs}
    root, graph, copies = nn.Module(), fx.Graph(), dict[fx.Node, fx.Node]()
    input_names: list[str] = []
    for node in program.graph.nodes:
        if node.op == "output":
            continue
        spec = targets.get(node.name) if node.op == "placeholder" else None
        if node.op == "placeholder" and _is_fixed(node):
            continue
        if spec is None or spec.kind is InputKind.USER_INPUT:
            _refuse_unknown(node)
            copies[node] = graph.node_copy(node, copies.__getitem__)
            input_names += [node.name] if node.op == "placeholder" else []
            continue
        metadata.set_attribute(root, str(spec.target), _constant_of(program, str(spec.target)))
        copies[node] = graph.create_node("get_attr", str(spec.target), name=node.name)
        copies[node].meta.update(node.meta)
    values = _user_outputs(program)
    graph.output(tuple(copies[value] for value in values if value is not None))
    _drop_dead_code(graph)
    _refuse_randomness(graph)
    _settle_sizes(graph)
    steps = unfinished_steps({**program.constants, **program.state_dict})
    for node in graph.nodes:
        mark_unfinished(node, steps)
    notes = (f"{len(steps)} PRepBN layers {UNFINISHED}: {', '.join(steps)}",) if steps else ()
    module = fx.GraphModule(root, graph)
    returned = _returned(program, values)
    return Graph(module, tuple(input_names), _output_names(returned), notes, returned)


def _is_fixed(node: fx.Node) -> bool:
    """Return whether an input is None, a number or a flag, whose value the exporter has written into the graph."""
    return isinstance(node.meta.get("val"), int | float | str | None) and not node.users


def _drop_dead_code(graph: fx.Graph) -> None:
    # Not eliminate_dead_code: it keeps the tracer's assertions about types, which no engine knows.
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op in ("call_function", "get_attr"):
            graph.erase_node(node)


def _settle_sizes(graph: fx.Graph) -> None:
    """Write the sizes that torch fixed after it had made them symbolic as the numbers they are."""
    for node in graph.nodes:
        if "val" in node.meta:
            node.meta["val"] = pytree.tree_map_only(FakeTensor, _settled, node.meta["val"])


def _settled(value: FakeTensor) -> Tensor:
    shape, stride = ([_number(size) for size in sizes] for sizes in (value.shape, value.stride()))
    if list(map(type, shape)) == list(map(type, value.shape)):
        return value
    with value.fake_mode:
        return torch.empty_strided(shape, stride, dtype=value.dtype, device=value.device)


def _number(size: int | torch.SymInt) -> int | torch.SymInt:
    known = size.node.maybe_as_int() if isinstance(size, torch.SymInt) else size
    return size if known is None else known


def _refuse_mutation(program: ExportedProgram) -> None:
    changed = [
        str(spec.target)
        for spec in program.graph_signature.output_specs
        if spec.kind in (OutputKind.BUFFER_MUTATION, OutputKind.USER_INPUT_MUTATION)
    ]
    if changed:
        raise UnsupportedModel(
            "the model changes its own state or its inputs when it runs",
            where=", ".join(changed),
            expected="a forward that is a pure function of its inputs in eval mode",
            hint="call model.eval() before exporting, keep counters out of forward, clone an input before changing it",
        )


def _refuse_randomness(graph: fx.Graph) -> None:
    for node in graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and _is_random(node, node.target):
            raise UnsupportedModel(
                f"the model draws random numbers when it runs: {node.target}",
                where=metadata.layer_of(node) or node.name,
                expected="the same outputs for the same inputs",
                hint="call model.eval() before exporting, and give F.dropout training=self.training",
            )


def _is_random(node: fx.Node, target: torch._ops.OpOverload) -> bool:
    if torch.Tag.nondeterministic_seeded not in target.tags:
        return False
    given = dict(zip([argument.name for argument in target._schema.arguments], node.args, strict=False))
    given |= node.kwargs
    # Dropout that is switched off, and attention without dropout, carry the tag too.
    switches = [given[name] for name in ("train", "training", "dropout_p") if name in given]
    return any(switches) if switches or target is torch.ops.aten.scaled_dot_product_attention.default else True


def _refuse_unknown(node: fx.Node) -> None:
    if node.op == "get_attr":  # a branch of control flow: the call that reads it says more
        return
    if node.op == "placeholder":
        if not isinstance(node.meta.get("val"), torch.Tensor):
            raise UnsupportedModel("an input is no tensor", where=node.name, expected="tensors as inputs")
        return
    target = node.target
    is_builtin = target is operator.getitem or getattr(target, "__module__", "") in (
        "_operator",
        "math",
        "torch",
    )
    if node.op == "call_function" and (isinstance(target, torch._ops.OpOverload) or is_builtin):
        return
    raise UnsupportedModel(
        f"the model holds control flow or a submodule call that cannot be compiled: {target}",
        where=node.name,
        hint="remove torch.cond, autocast and no_grad blocks from forward",
    )


def _constant_of(program: ExportedProgram, name: str) -> Tensor:
    tensor = program.state_dict[name] if name in program.state_dict else program.constants[name]
    if not isinstance(tensor, torch.Tensor):
        raise UnsupportedModel("the model holds a constant that is no tensor", where=name)
    return tensor.detach()


def _user_outputs(program: ExportedProgram) -> list[fx.Node | None]:
    """Return what the model returns, leaf by leaf; None where it returns None."""
    (output,) = [node for node in program.graph.nodes if node.op == "output"]
    kinds = [spec.kind for spec in program.graph_signature.output_specs]
    values = [value for value, kind in zip(output.args[0], kinds, strict=True) if kind is OutputKind.USER_OUTPUT]
    if all(value is None for value in values) or not all(isinstance(value, fx.Node | None) for value in values):
        raise UnsupportedModel("the model returns something that is no tensor", expected="tensors as outputs")
    return values


def _returned(program: ExportedProgram, values: list[fx.Node | None]) -> Any:
    """Return what the model returns, the number of the output in place of every tensor."""
    numbers = itertools.count()
    leaves = [None if value is None else next(numbers) for value in values]
    spec = program.call_spec.out_spec
    if spec is None or spec.num_leaves != len(leaves):
        return leaves[0] if len(leaves) == 1 else tuple(leaves)
    return _opened(pytree.tree_unflatten(leaves, spec))


def return_plain(program: ExportedProgram) -> None:
    """Let a program return dicts in the place of classes of the model's own, so that any torch can load it."""
    signature, spec = program.module_call_graph[0].signature, program.call_spec.out_spec
    if signature is None or spec is None:
        return
    opened = _opened(pytree.tree_unflatten(range(spec.num_leaves), spec))
    signature.out_spec = pytree.tree_structure(opened)


def _opened(value: Any) -> Any:
    """Return nested tuples (named ones too), lists and dicts; other classes, a dataclass say, as dicts by field."""
    if value is None or isinstance(value, int):
        return value
    fields, _ = pytree.tree_flatten_with_path(value, is_leaf=lambda inner: inner is not value)
    names, parts = [_name_of(path[-1]) for path, _ in fields], [_opened(part) for _, part in fields]
    if isinstance(value, tuple):
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if isinstance(value, list):
        return parts
    return dict(zip(value if isinstance(value, dict) else names, parts, strict=True))


def _output_names(returned: Any) -> tuple[str, ...]:
    """Return the keys of a dict or named tuple, ``output`` for a single tensor, else numbers."""
    paths = [path for path, leaf in pytree.tree_leaves_with_path(returned) if leaf is not None]
    keys = [_name_of(path[-1]) if path else "" for path in paths]
    if all(keys) and len(set(keys)) == len(keys):
        return tuple(keys)
    return ("output",) if len(keys) == 1 else tuple(f"output_{index}" for index in range(len(keys)))


def _name_of(key: object) -> str:
    """Return the name in a step of a path: a mapping's key or an attribute, not an index."""
    found = getattr(key, "key", None) or getattr(key, "name", None)
    return found if isinstance(found, str) else ""
