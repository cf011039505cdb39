"""The texts that may stand in a torch.export archive: identifiers, operators, shape arithmetic, tree shapes."""

from __future__ import annotations

import ast
import json
import re
from typing import Final

__all__ = ["is_expression", "is_guard", "is_identifier", "is_operator", "is_plain", "is_tree_specification"]

IDENTIFIER: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)
# Attribute paths, symbol names, versions: nothing that could close a quote, open a call or end a line.
PLAIN: Final = re.compile(r"[\w.\-+:/ ]*", re.ASCII)
# torch also accepts a number written as text for a Float of a shape expression.
NUMBER: Final = re.compile(r"[+-]?[0-9.]+(e[+-]?[0-9]+)?", re.ASCII)

OPERATOR: Final = re.compile(
    r"torch\.ops\.(?P<space>[a-z]\w*)\.(?P<name>[a-z_]\w*)\.(?P<overload>[A-Za-z]\w*)", re.ASCII
)
HIGHER_ORDER: Final = re.compile(r"torch\.ops\.higher_order\.(?P<name>\w+)", re.ASCII)
SPACES: Final = frozenset({"aten", "prims", "quantized_decomposed", "torchvision", "normfuse"})
BITWISE: Final = frozenset({"__and__", "__or__", "__xor__", "__lshift__", "__rshift__"})
OPENS_FILES: Final = frozenset({"from_file", "save"})
CONTROL_FLOW: Final = frozenset(
    {"cond", "while_loop", "scan", "map_impl", "associative_scan", "invoke_subgraph"}
    | {"wrap_with_set_grad_enabled", "wrap_with_autocast", "wrap", "tag_activation_checkpoint"}
)
ARITHMETIC: Final = frozenset(
    [
        f"_operator.{name}"
        for name in ("eq", "ne", "le", "ge", "lt", "gt", "neg", "pos", "mul", "add", "sub", "floordiv")
    ]
    + [f"_operator.{name}" for name in ("mod", "pow", "truediv", "and_", "or_", "lshift", "rshift", "getitem")]
    + [f"torch.sym_{name}" for name in ("not", "int", "float", "ite", "max", "min", "sqrt")]
    + ["math.trunc"]
)

# fmt: off
SHAPE_FUNCTIONS: Final = frozenset({
    "Symbol", "Integer", "Float", "Rational", "Add", "Mul", "Pow", "Max", "Min", "Mod", "Abs", "floor", "ceiling",
    "And", "Or", "Not", "true", "false", "BooleanTrue", "BooleanFalse", "Piecewise", "ExprCondPair", "Where",
    "Equality", "Unequality", "StrictLessThan", "LessThan", "StrictGreaterThan", "GreaterThan",
    "Eq", "Ne", "Lt", "Le", "Gt", "Ge", "FloorDiv", "ModularIndexing", "PythonMod", "CleanDiv", "CeilDiv",
    "CeilToInt", "FloorToInt", "TruncToInt", "RoundToInt", "TruncToFloat", "ToFloat", "RoundDecimal",
    "LShift", "RShift", "PowByNatural", "FloatPow", "FloatTrueDiv", "IntTrueDiv", "Identity",
    "IsNonOverlappingAndDenseIndicator",
})
# fmt: on
SYMBOL: Final = re.compile(r"[a-z]{1,3}[0-9]+", re.ASCII)
# What torch.utils._sympy.printers.PythonPrinter writes.
# fmt: off
GUARD_NAMES: Final = frozenset({
    "L", "math", "torch", "min", "max", "abs", "round",
    "IsNonOverlappingAndDenseIndicator", "cast_symbool_to_symint_guardless",
})
GUARD_ATTRIBUTES: Final = frozenset({
    "size", "stride", "storage_offset", "shape", "isnan", "inf", "nan", "floor", "ceil", "trunc", "log2",
    "sqrt", "pow", "sym_float", "_sym_sqrt",
})
# fmt: on
HARMLESS_NODES: Final = (
    *(ast.Expression, ast.Call, ast.Name, ast.Load, ast.Constant, ast.keyword, ast.Subscript, ast.Attribute, ast.Tuple),
    *(ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.IfExp),
    *(ast.operator, ast.unaryop, ast.boolop, ast.cmpop),
)


def is_identifier(text: str) -> bool:
    """Whether ``text`` is a Python name, or empty."""
    return text == "" or IDENTIFIER.fullmatch(text) is not None


def is_plain(text: str) -> bool:
    """Whether ``text`` stays text wherever code is generated around it."""
    return PLAIN.fullmatch(text) is not None


def is_operator(text: str) -> bool:
    """Whether ``text`` names a standard operator, arithmetic on shapes, or control flow."""
    if found := OPERATOR.fullmatch(text):
        return found["space"] in SPACES and _is_operator_name(found["name"]) and "__" not in found["overload"]
    if found := HIGHER_ORDER.fullmatch(text):
        return found["name"] in CONTROL_FLOW
    return text in ARITHMETIC


def _is_operator_name(name: str) -> bool:
    # Other names with two underscores are attributes of torch's Python objects, not operators.
    return name in BITWISE or not (name.startswith("__") or name in OPENS_FILES)


def is_expression(text: str) -> bool:
    """Whether ``text`` is arithmetic on shape symbols."""
    return _is_harmless(text, names=SHAPE_FUNCTIONS, attributes=frozenset())


def is_guard(text: str) -> bool:
    """Whether ``text`` compares sizes of inputs."""
    return _is_harmless(text, names=GUARD_NAMES, attributes=GUARD_ATTRIBUTES)


def is_tree_specification(text: str) -> bool:
    """Whether ``text`` nests containers that are made without importing anything."""
    try:
        _, tree = json.loads(text)
        return _is_harmless_tree(tree)
    except (ValueError, TypeError, KeyError):
        return False


def _is_harmless(text: str, *, names: frozenset[str], attributes: frozenset[str]) -> bool:
    try:
        nodes = list(ast.walk(ast.parse(text, mode="eval")))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return all(_is_harmless_node(node, names, attributes) for node in nodes)


def _is_harmless_node(node: ast.AST, names: frozenset[str], attributes: frozenset[str]) -> bool:
    if isinstance(node, ast.Name):
        return node.id in names or SYMBOL.fullmatch(node.id) is not None
    if isinstance(node, ast.Attribute):
        return node.attr in attributes
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        # sympy evaluates text again, so it may only be a name or a number.
        return is_identifier(node.value) or NUMBER.fullmatch(node.value) is not None
    return isinstance(node, HARMLESS_NODES)


def _is_harmless_tree(tree: dict[str, object]) -> bool:
    context, children = tree["context"], tree["children_spec"]
    # A defaultdict names a module to import.
    if tree["type"] == "collections.defaultdict" or not isinstance(children, list):
        return False
    decoded = json.loads(context) if isinstance(context, str) and context[:1] in '[{"n' else context
    return _is_harmless_context(decoded) and all(_is_harmless_tree(child) for child in children)


def _is_harmless_context(value: object) -> bool:
    if isinstance(value, dict):
        # An enum member names a module to import.
        return "__enum__" not in value and _is_harmless_context([*value.keys(), *value.values()])
    if isinstance(value, list):
        return all(_is_harmless_context(item) for item in value)
    return not isinstance(value, str) or is_plain(value)
