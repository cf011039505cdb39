"""From a PyTorch model to a ``Graph``: torch.export, functional, eval mode, batch kept dynamic."""

from __future__ import annotations

import logging
import operator
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils import _pytree as pytree

from normfuse.errors import BadInput, UnsupportedModel, UsageError
from normfuse.graph.graph import Graph

__all__ = ["capture", "export_program"]

log = logging.getLogger(__name__)

STATIC_BATCH = "the model fixes its batch size, so the engine takes exactly that batch"


def capture(model: nn.Module | ExportedProgram, example_inputs: Sequence[Tensor] | None = None) -> Graph:
    """Return the model's graph; the model itself is not changed.

    Args:
        model: a module in any mode (captured in eval mode), a scripted module, or an exported program.
        example_inputs: one tensor per input, first axis the batch; not needed for an exported program.

    Raises:
        UsageError: a module came without example inputs.
        UnsupportedModel: torch.export refuses the model, or it changes its own state when it runs.
    """
    program = model if isinstance(model, ExportedProgram) else export_program(model, example_inputs)
    with _quiet():
        graph = _unlift(program.run_decompositions({}))
    return graph if graph.has_dynamic_batch else _with_note(graph, STATIC_BATCH)


def export_program(model: nn.Module, example_inputs: Sequence[Tensor] | None) -> ExportedProgram:
    """Return the exported program of ``model`` in eval mode, with a dynamic batch where it has one."""
    if example_inputs is None:
        raise UsageError(
            "this model needs example inputs to be captured",
            hint="give calibration data, or example_inputs=... from Python",
        )
    inputs = tuple(_at_least_two(example) for example in example_inputs)
    if isinstance(model, torch.jit.ScriptModule):
        return _from_torchscript(model, inputs)
    was_training = model.training
    try:
        return _export(model.eval(), inputs)
    finally:
        model.train(was_training)


def _export(model: nn.Module, inputs: tuple[Tensor, ...]) -> ExportedProgram:
    # AUTO lets torch keep the batch symbolic where the model allows it and fix it where it does not.
    dynamic = tuple({0: Dim.AUTO} if example.ndim else None for example in inputs)
    try:
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

    try:
        with _quiet():
            scripted = torch.jit.freeze(model.eval()) if model.training else model
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


def _unlift(program: ExportedProgram) -> Graph:
    """Turn lifted parameters back into named attributes, one ``get_attr`` node each."""
    signature = program.graph_signature
    _refuse_mutation(program)
    targets = {spec.arg.name: spec for spec in signature.input_specs}
    root, graph, copies = nn.Module(), fx.Graph(), dict[fx.Node, fx.Node]()
    input_names: list[str] = []
    for node in program.graph.nodes:
        if node.op == "output":
            continue
        spec = targets.get(node.name) if node.op == "placeholder" else None
        if spec is None or spec.kind is InputKind.USER_INPUT:
            _refuse_unknown(node)
            copies[node] = graph.node_copy(node, copies.__getitem__)
            input_names += [node.name] if node.op == "placeholder" else []
            continue
        tensor = _constant_of(program, str(spec.target))
        set_attribute(root, str(spec.target), tensor)
        copies[node] = graph.create_node("get_attr", str(spec.target), name=node.name)
        copies[node].meta.update(node.meta)
    results = _user_outputs(program)
    graph.output(tuple(copies[node] for node in results))
    module = fx.GraphModule(root, graph)
    graph.eliminate_dead_code()
    module.recompile()
    return Graph(module, tuple(input_names), _output_names(program, len(results)))


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
            hint="call model.eval() before exporting, and keep counters out of forward",
        )


def _refuse_unknown(node: fx.Node) -> None:
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


def _user_outputs(program: ExportedProgram) -> list[fx.Node]:
    (output,) = [node for node in program.graph.nodes if node.op == "output"]
    kinds = [spec.kind for spec in program.graph_signature.output_specs]
    values = [value for value, kind in zip(output.args[0], kinds, strict=True) if kind is OutputKind.USER_OUTPUT]
    results = [value for value in values if isinstance(value, fx.Node)]
    if not results or len(results) != len([value for value in values if value is not None]):
        raise UnsupportedModel("the model returns something that is no tensor", expected="tensors as outputs")
    return results


def _output_names(program: ExportedProgram, count: int) -> tuple[str, ...]:
    """Return the keys of a dict or dataclass output, ``output`` for a single tensor, else numbers."""
    names = ["output"] if count == 1 else [f"output_{index}" for index in range(count)]
    spec = program.call_spec.out_spec
    if spec is None:
        return tuple(names)
    tree = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    paths = [path for path, leaf in pytree.tree_leaves_with_path(tree)]
    keys = [str(getattr(path[-1], "key", "")) if path else "" for path in paths]
    return tuple(keys) if len(keys) == count and all(keys) and len(set(keys)) == count else tuple(names)


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


def _at_least_two(example: Tensor) -> Tensor:
    """torch.export fixes an axis of size 1, so a batch of one sample is repeated."""
    if not isinstance(example, torch.Tensor):
        raise BadInput("an example input is no tensor", expected="torch.Tensor", where=type(example).__name__)
    return torch.cat([example, example]) if example.ndim and example.shape[0] == 1 else example


def _with_note(graph: Graph, note: str) -> Graph:
    return Graph(graph.module, graph.input_names, graph.output_names, (*graph.notes, note))


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch's deprecation warnings about its own code from the user."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
