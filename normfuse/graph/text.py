"""The stable text form of a graph, for tests, dumps and messages."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any, Final

import torch
from torch import fx

__all__ = ["render", "render_node"]

SHORT_TYPES: Final = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "b1",
}


def render(graph: fx.Graph) -> str:
    """Return one line per node; constants are written where they are read."""
    symbols: dict[str, str] = {}
    lines = [(_left(node), _value(node, symbols)) for node in graph.nodes if node.op != "get_attr"]
    width = max(len(left) for left, _ in lines)
    return "\n".join(f"{left:<{width}}{value}" if value else left for left, value in lines) + "\n"


def render_node(node: fx.Node) -> str:
    """Return the node's line alone, for messages."""
    return _left(node) + _value(node, {})


def _left(node: fx.Node) -> str:
    if node.op == "output":
        return f"return {', '.join(_argument(argument) for argument in node.args[0])}"  # type: ignore[union-attr]
    if node.op == "placeholder":
        return f"%{node.name} = input"
    if node.op == "get_attr":
        return f"%{node.name} = constant {node.target}"
    arguments = [_argument(argument) for argument in node.args]
    arguments += [f"{key}={_argument(value)}" for key, value in sorted(node.kwargs.items())]
    return f"%{node.name} = {operator_name(node.target)}({', '.join(arguments)})"


def operator_name(target: Any) -> str:
    """Return ``aten.linear`` for an ATen overload, the function's name for a builtin."""
    if isinstance(target, torch._ops.OpOverload):
        namespace, name = target._schema.name.split("::")
        overload = target._overloadname
        return f"{namespace}.{name}" if overload in ("default", "Tensor") else f"{namespace}.{name}.{overload}"
    if target is operator.getitem:
        return "getitem"
    return str(getattr(target, "__name__", target))


def _argument(value: Any) -> str:
    if isinstance(value, fx.Node):
        return f"%{value.target}" if value.op == "get_attr" else f"%{value.name}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_argument(item) for item in value)}]"
    if isinstance(value, torch.dtype):
        return SHORT_TYPES.get(value, str(value))
    return repr(value) if not isinstance(value, float) else f"{value:.9g}"


def _value(node: fx.Node, symbols: dict[str, str]) -> str:
    value = node.meta.get("val")
    if value is None:
        return ""
    if isinstance(value, (list, tuple)):
        return " : " + ", ".join(_tensor(item, symbols) for item in value)
    return f" : {_tensor(value, symbols)}"


def _tensor(value: Any, symbols: dict[str, str]) -> str:
    if not isinstance(value, torch.Tensor):
        return type(value).__name__.lower()
    return f"{SHORT_TYPES.get(value.dtype, str(value.dtype))}[{', '.join(_sizes(value.shape, symbols))}]"


def _sizes(shape: Iterable[Any], symbols: dict[str, str]) -> list[str]:
    # Symbol names depend on the session that traced the model; the order of appearance does not.
    return [str(size) if isinstance(size, int) else symbols.setdefault(str(size), f"s{len(symbols)}") for size in shape]
