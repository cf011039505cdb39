"""Linear maps of 8-bit codes by PyTorch's own products, and networks in which they stand in place of float ones.

With one step for all of ``x`` and one per row of ``W``, both symmetric::

    y = (codes(x) @ codes(W)^T) * (step_x * step_W) + bias,   codes(x) = round(x / step_x), saturated
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

import torch
from torch import Tensor, fx, nn

__all__ = ["Codes", "Float8Linear", "Int8Linear", "Quantized", "Seen", "observe", "quantize", "why_not"]

LARGEST_INT8: Final = 127.0
LARGEST_FLOAT8: Final = torch.finfo(torch.float8_e4m3fn).max
SMALLEST_STEP: Final = torch.finfo(torch.float32).tiny
"""Of a tensor of zeros: any step serves, but one over it has to be a number."""
LINEAR: Final = torch.ops.aten.linear.default


class Codes(Enum):
    """What 8 bits stand for."""

    INT8 = "int8"
    FLOAT8 = "float8_e4m3fn"


class Int8Linear(nn.Module):
    """``torch._int_mm`` between quantization and rescaling in float32, which a compiler fuses with their neighbours.

    Args:
        weight: float [out, in]; each row gets the step that its largest magnitude needs.
        bias: float [out], or none.
        largest: the magnitude of the input that still has a code of its own; beyond it codes saturate.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor
    input_step: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None, *, largest: float) -> None:
        super().__init__()
        weight_step = _steps(weight, LARGEST_INT8)
        input_step = _step(largest, LARGEST_INT8)
        self.register_buffer("weight", _rounded(weight.float() / weight_step, LARGEST_INT8).to(torch.int8))
        self.register_buffer("input_step", input_step)
        self.register_buffer("scale", input_step * weight_step[:, 0])
        self.register_buffer("bias", torch.zeros(len(weight)) if bias is None else bias.float())

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., out) in the type of ``x`` (..., in)."""
        product = torch._int_mm(self.codes(x.flatten(0, -2)), self.weight.t())  # int32; the weight column-major
        y = product.float() * self.scale + self.bias
        return y.to(x.dtype).unflatten(0, x.shape[:-1])

    def codes(self, x: Tensor) -> Tensor:
        """Return the int8 codes of the input."""
        return _rounded(x.float() / self.input_step, LARGEST_INT8).to(torch.int8)


class Float8Linear(nn.Module):
    """``torch._scaled_mm`` with a scale per row of both operands; those of the input are all the same, known before.

    Args:
        weight: float [out, in]; each row gets the step that its largest magnitude needs.
        bias: float [out], or none.
        largest: the magnitude of the input that still has a code of its own; beyond it codes saturate.
        rows: the most rows that an input has.
    """

    weight: Tensor
    weight_step: Tensor
    bias: Tensor
    input_step: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None, *, largest: float, rows: int) -> None:
        super().__init__()
        weight_step = _steps(weight, LARGEST_FLOAT8)
        self.register_buffer("weight", _saturated(weight.float() / weight_step))
        self.register_buffer("weight_step", weight_step.t().contiguous())  # [1, out]
        # Written out for every row: scales by row have to be contiguous, and making them takes a kernel per layer.
        self.register_buffer("input_step", _step(largest, LARGEST_FLOAT8).expand(rows, 1).contiguous())
        self.register_buffer("bias", torch.zeros(len(weight)) if bias is None else bias.float())
        self.bias = self.bias.to(torch.bfloat16)  # the product adds it in the type of its result

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., out) for ``x`` (..., in), both bfloat16: scales by row have no other result everywhere."""
        rows = self.codes(x.flatten(0, -2))
        y = torch._scaled_mm(
            rows,
            self.weight.t(),  # column-major, as it has to be
            scale_a=self.input_step[: rows.shape[0]],
            scale_b=self.weight_step,
            bias=self.bias,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
        return y.unflatten(0, x.shape[:-1])

    def codes(self, x: Tensor) -> Tensor:
        """Return the float8 codes of the input."""
        return _saturated(x.float() / self.input_step[0])


@dataclass(frozen=True, slots=True)
class Seen:
    """A linear map's input in a run: its largest magnitude, and its rows per sample."""

    largest: float
    rows: int


@dataclass(frozen=True, slots=True)
class Quantized:
    """A network with 8-bit maps, their names, and the names of those that stay float, each with the reason."""

    network: fx.GraphModule
    layers: tuple[str, ...]
    left: Mapping[str, str]


def observe(network: fx.GraphModule, images: Tensor) -> dict[str, Seen]:
    """Return what every linear map reads in a run on ``images``, by the name of its node."""
    observer = _Observer(network)
    with torch.no_grad():
        observer.run(images)
    return observer.seen


def quantize(network: fx.GraphModule, seen: Mapping[str, Seen], codes: Codes, *, batch: int) -> Quantized:
    """Return a copy whose linear maps compute with codes wherever the product takes their shape.

    Args:
        network: in float32; the copy computes the rest in bfloat16 (float8) or float16 (int8).
        seen: of a calibration run, as ``observe`` returns it.
        codes: of inputs and weights.
        batch: the most samples that the copy will get.
    """
    own = deepcopy(network).to(torch.bfloat16 if codes is Codes.FLOAT8 else torch.float16)
    layers, left = list[str](), dict[str, str]()
    for node in own.graph.find_nodes(op="call_function", target=LINEAR):
        x, weight, bias = (*node.args, None)[:3]
        name, values = weight.target.removesuffix(".weight"), _constant(network, weight.target)
        if reason := why_not(codes, rows=seen[node.name].rows, shape=values.shape):
            left[name] = reason
            continue
        given = (values, None if bias is None else _constant(network, bias.target))
        largest, rows = seen[node.name].largest, batch * seen[node.name].rows
        is_int8 = codes is Codes.INT8
        linear = Int8Linear(*given, largest=largest) if is_int8 else Float8Linear(*given, largest=largest, rows=rows)
        own.add_submodule(f"quantized.{node.name}", linear)
        with own.graph.inserting_before(node):
            node.replace_all_uses_with(own.graph.call_module(f"quantized.{node.name}", (x,)))
        own.graph.erase_node(node)
        layers.append(name)
    own.graph.eliminate_dead_code()
    own.recompile()
    return Quantized(own, tuple(layers), left)


def why_not(codes: Codes, *, rows: int, shape: tuple[int, ...]) -> str:
    """Return why CUDA's product refuses a map, or nothing: the same answer for every batch and on every device."""
    least, multiple = (17, 8) if codes is Codes.INT8 else (1, 16)
    if rows == 1:
        return "it reads one row per sample"  # left by both kinds of codes, so that they can be compared
    if rows < least:
        return f"{rows} rows per sample, at least {least} needed"
    if any(size % multiple for size in shape):
        return f"{shape[1]} inputs and {shape[0]} outputs, multiples of {multiple} needed"
    return ""


class _Observer(fx.Interpreter):
    """Runs a network and remembers what its linear maps read."""

    def __init__(self, network: fx.GraphModule) -> None:
        super().__init__(network)
        self.seen: dict[str, Seen] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Look at the input of a linear map, then run it as it is."""
        if n.target is LINEAR:
            read: Tensor = self.env[n.args[0]]  # type: ignore[index]  # an argument may be a number, a map's is none
            rows = read[0].numel() // read.shape[-1]
            self.seen[n.name] = Seen(largest=float(read.abs().max()), rows=rows)
        return super().run_node(n)


def _constant(network: fx.GraphModule, path: str) -> Tensor:
    owner, _, name = path.rpartition(".")
    value: Tensor = getattr(network.get_submodule(owner), name)
    return value.detach()


def _steps(weight: Tensor, largest_code: float) -> Tensor:
    """Return the step of every row, [out, 1]."""
    return (weight.float().abs().amax(dim=1, keepdim=True) / largest_code).clamp(min=SMALLEST_STEP)


def _step(largest: float, largest_code: float) -> Tensor:
    return torch.tensor(largest / largest_code, dtype=torch.float32).clamp(min=SMALLEST_STEP)


def _rounded(x: Tensor, largest_code: float) -> Tensor:
    return x.round().clamp(-largest_code, largest_code)


def _saturated(x: Tensor) -> Tensor:
    # The cast alone would make what lies beyond the largest float8 number a NaN.
    return x.clamp(-LARGEST_FLOAT8, LARGEST_FLOAT8).to(torch.float8_e4m3fn)
