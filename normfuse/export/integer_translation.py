"""How the integer operators become calls of the ONNX functions of their names."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Final

import onnx_ir as ir
import torch
from onnx.defs import OpSchema
from onnxscript.values import Op, Opset

from normfuse.kernels.integer_ops import INTEGER_OPERATORS
from normfuse.kernels.onnx_functions import DOMAIN, FUNCTIONS, VERSION, onnx_functions
from normfuse.kernels.reference.rescaling import codes_type

__all__ = ["add_functions", "integer_call", "integer_translations"]

NAMES: Final = {"stride": "strides", "padding": "pads", "dilation": "dilations", "groups": "group"}
"""What ONNX calls the options of a convolution."""

_TYPES: Final = {torch.int8: ir.DataType.INT8, torch.int16: ir.DataType.INT16}


def integer_call(operator: Any, arguments: Mapping[str, Any]) -> tuple[str, list[Any], dict[str, Any]]:
    """Return the function that computes a call, its inputs, and its attributes.

    Args:
        operator: one of ``INTEGER_OPERATORS``.
        arguments: by the names of the operator's schema.
    """
    name = operator._schema.name.partition("::")[2]
    inputs, attributes = list[Any](), dict[str, Any]()
    for each in operator._schema.arguments:
        value = arguments[each.name]
        if "Tensor" in str(each.type):
            if value is not None:
                inputs.append(value)
        elif each.name == "padding":
            attributes["pads"] = [*value, *value]
        else:
            attributes[NAMES.get(each.name, each.name)] = (
                list(value) if isinstance(value, (list, tuple)) else int(value)
            )
    if "maximum" in attributes:
        attributes["to"] = int(_TYPES[codes_type(attributes.get("minimum", 0), attributes["maximum"])])
    return f"{name}_bias" if arguments.get("bias") is not None and name == "int_attention" else name, inputs, attributes


def integer_translations() -> dict[Any, Callable[..., Any]]:
    """Return the ``custom_translation_table`` of the integer operators."""
    return {operator: _translation(operator) for operator in INTEGER_OPERATORS.values()}


def add_functions(model: ir.Model) -> None:
    """Give a model the functions that its nodes call, so that it runs where nobody knows ours."""
    called = {node.op_type for node in model.graph if node.domain == DOMAIN}
    for function in onnx_functions(called):
        model.functions[function.identifier()] = function
    if called:
        model.graph.opset_imports[DOMAIN] = VERSION


def _translation(operator: Any) -> Callable[..., Any]:
    names = [each.name for each in operator._schema.arguments]

    def translate(*given: Any, **named: Any) -> Any:
        arguments = {**dict(zip(names, given, strict=False)), **named}
        name, inputs, attributes = integer_call(operator, arguments)
        return _OPERATORS[name](*inputs, **attributes)

    # The exporter reads the signature to tell tensors from numbers.
    parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
    translate.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return translate


def _operator(name: str) -> Op:
    """Return an operator of our domain, whose schema onnx does not know."""
    function = FUNCTIONS[name].to_function_proto()
    lists = {"strides", "pads", "dilations", "axes"}
    schema = OpSchema(
        name,
        DOMAIN,
        VERSION,
        inputs=[OpSchema.FormalParameter(each, f"T{index}") for index, each in enumerate(function.input)],
        outputs=[OpSchema.FormalParameter("codes", "T")],
        type_constraints=[
            (kind, ["tensor(int8)", "tensor(int16)", "tensor(int32)"], "codes")
            for kind in ("T", *(f"T{index}" for index in range(len(function.input))))
        ],
        attributes=[
            OpSchema.Attribute(each, OpSchema.AttrType.INTS if each in lists else OpSchema.AttrType.INT)
            for each in function.attribute
        ],
    )
    return Op(Opset(DOMAIN, VERSION), name, schema)


_OPERATORS: Final = {name: _operator(name) for name in (*(INTEGER_OPERATORS), "int_attention_bias")}
