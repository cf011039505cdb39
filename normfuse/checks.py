"""What must hold before a compile is called done, each with its figure and its bound."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from normfuse.errors import CheckFailed
from normfuse.export.float_tensors import float_tensors
from normfuse.graph import Graph
from normfuse.graph.edit import converted
from normfuse.quant.target import BodyType
from normfuse.runtime.agreement import Agreement, compare_codes, output_error
from normfuse.runtime.onnx_session import open_onnx

__all__ = [
    "Check",
    "check_codes",
    "check_export",
    "check_fold",
    "check_integers",
    "check_islands",
    "check_no_floats",
    "check_typed",
    "require",
    "rounding_allowed",
    "samples_in",
]

FOLD_FLOAT64: Final = 1e-10
"""Folding is exact in real arithmetic: in float64 only rounding is left."""

EXPORT_FLOAT32: Final = 1e-4
"""Float32 against float32 through some hundred operators: eps (6e-8) times depth and width."""

PRODUCT_FLOAT32: Final = 1e-5
"""Float32 sums over some hundred groups of exact integers: eps (6e-8) times their number."""

ONE_CODE: Final = 1
"""Kernels may round the last bit of a float differently, which moves a code by one at most."""

ROUNDING: Final = {BodyType.FP16: 2.0**-12, BodyType.BF16: 2.0**-9}
"""What rounding to a type changes at most, relative to the number."""

ROUNDINGS: Final = 128
"""How many of them, all in one direction, may be in an output, or in what a quantizer reads: some ten layers of some
ten operators round."""

LARGEST_CODE: Final = 127
"""In steps of an int8, which 8-bit floats are compared in, too."""

NAMED: Final = 5
"""Names in a check's detail."""

SIMULATION_FLOAT32: Final = 1e-3
"""Behind quantizers and products simulation and engine compute the same floats; one code there may still differ."""

SHIPPED_FLOAT32: Final = 5e-2
"""Floats that are rounded otherwise move codes at a border in the products behind them, codes that have no name to go
on with. Engine and simulation, run apart, differ by 1.9 % of the largest output at most (the zoo and a random DeiT-S,
onnxruntime 1.31.1 on x86); the file that ships and its watched copy agreed to the last bit there."""


@dataclass(frozen=True, slots=True)
class Check:
    """A figure that must not exceed its bound."""

    name: str
    value: float
    bound: float
    detail: str = ""

    @property
    def holds(self) -> bool:
        """Whether the figure is within the bound (a figure that is not a number never is)."""
        return self.value <= self.bound

    def as_dict(self) -> dict[str, object]:
        """Return the check for JSON."""
        return {
            "name": self.name,
            "value": self.value,
            "bound": self.bound,
            "holds": self.holds,
            "detail": self.detail,
        }


def check_fold(original: Graph, folded_in_float64: Graph, samples: Sequence[Sequence[Tensor]]) -> Check:
    """Compare the model with its fold, both in float64, relative to the output's scale.

    ``folded_in_float64`` went through the same passes as the graph that ships, from float64 constants.
    """
    reference = converted(original, torch.float64)
    errors = []
    for sample in samples:
        wide = [value.double() if value.is_floating_point() else value for value in sample]
        pairs = zip(reference.run(*wide), folded_in_float64.run(*wide), strict=True)
        errors += [output_error(found.numpy(), wanted.numpy()) for wanted, found in pairs]
    return Check("folded model = original, float64", _worst(errors), FOLD_FLOAT64, _samples(samples_in(samples)))


def check_export(original: Graph, path: Path, samples: Sequence[Sequence[Tensor]], *, threads: int) -> Check:
    """Compare the model in PyTorch with the float engine (folded and exported), relative to the output's scale."""
    session = open_onnx(path, threads=threads)
    errors = []
    for sample in samples:
        feeds = {name: value.numpy() for name, value in zip(original.input_names, sample, strict=True)}
        found = session.run(feeds)
        pairs = zip(original.output_names, original.run(*sample), strict=True)
        errors += [output_error(found[name], wanted.numpy()) for name, wanted in pairs]
    return Check("float engine = PyTorch, float32", _worst(errors), EXPORT_FLOAT32, _samples(samples_in(samples)))


def check_codes(
    graph: Graph, path: Path, samples: Sequence[Sequence[Tensor]], *, threads: int, session_config: Mapping[str, str]
) -> list[Check]:
    """Compare the quantized engine with its simulation: codes, products that make codes, if any, and the outputs."""
    found = compare_codes(graph, path, samples, threads=threads, session_config=session_config)
    seen = _samples(samples_in(samples))
    outputs = Check("engine's outputs = simulation's", found.output_error, SIMULATION_FLOAT32, seen)
    checked = [outputs]
    if found.products:
        checked = [*_of_products(found, seen), outputs]
    if not found.tensors and not found.missing:
        return checked
    share = max((tensor.share_different for tensor in found.tensors), default=0.0)
    detail = f"{len(found.tensors)} tensors, {seen}, at most {share:.2%} of a tensor's codes differ"
    largest = float(found.largest_difference)
    if found.missing:
        largest, detail = math.inf, f"not found in the engine: {', '.join(found.missing)}; {detail}"
    return [Check("engine's codes = simulation's", largest, float(ONE_CODE), detail), *checked]


def rounding_allowed(body: BodyType) -> float:
    """Return by how much outputs in a narrower type may differ from float32's, relative to the largest."""
    return ROUNDINGS * ROUNDING[body]


def check_typed(
    graph: Graph,
    path: Path,
    samples: Sequence[Sequence[Tensor]],
    body: BodyType,
    *,
    threads: int,
    session_config: Mapping[str, str],
) -> list[Check]:
    """Compare an engine whose floats are narrower with its simulation in float32, segment by segment."""
    found = compare_codes(graph, path, samples, threads=threads, session_config=session_config)
    share = max((tensor.share_different for tensor in found.tensors), default=0.0)
    detail = f"{len(found.tensors)} tensors, {_samples(samples_in(samples))}, at most {share:.2%} of a tensor's differ"
    largest = math.inf if found.missing else float(found.largest_difference)
    rounding = rounding_allowed(body)
    most = float(math.ceil(rounding * LARGEST_CODE))
    codes = Check(f"codes behind {body.value} = simulation's", largest, most, detail)
    outputs = Check(
        f"outputs in {body.value} = simulation's", found.output_error, rounding, _samples(samples_in(samples))
    )
    return [codes, outputs] if found.tensors or found.missing else [outputs]


def check_integers(graph: Graph, path: Path, samples: Sequence[Sequence[Tensor]], *, threads: int) -> Check:
    """Compare an engine without floats with its reference: the outputs are the same bits, or they are not."""
    session = open_onnx(path, threads=threads)
    different = 0
    for sample in samples:
        feeds = {name: value.numpy() for name, value in zip(graph.input_names, sample, strict=True)}
        found = session.run(feeds)
        pairs = zip(graph.output_names, graph.run(*sample), strict=True)
        different += sum(int((found[name] != wanted.numpy()).sum()) for name, wanted in pairs)
    return Check("engine's outputs = reference's, values that differ", different, 0, _samples(samples_in(samples)))


def check_islands(
    graph: Graph, path: Path, samples: Sequence[Sequence[Tensor]], *, threads: int
) -> tuple[Check, Check]:
    """Compare an engine of integers and float islands with its reference.

    Codes that are made of floats may be one apart. Given the engine's, everything behind them is the same bits.
    """
    found = compare_codes(graph, path, samples, threads=threads)
    share = max((tensor.share_different for tensor in found.tensors), default=0.0)
    detail = f"{len(found.tensors)} tensors, {_samples(samples_in(samples))}, at most {share:.2%} of a tensor's differ"
    largest = math.inf if found.missing else float(found.largest_difference)
    return (
        Check("codes behind floats = reference's", largest, float(ONE_CODE), detail),
        Check("engine's outputs = reference's, given these codes", found.output_error, 0.0, detail),
    )


def check_no_floats(path: Path) -> Check:
    """Count the float tensors between the quantized inputs and the outputs."""
    found = float_tensors(path)
    return Check("float tensors inside the engine", len(found), 0, ", ".join(found[:NAMED]))


def _of_products(found: Agreement, seen: str) -> list[Check]:
    count = f"{len(found.products)} products that make codes"
    given = f"{count}, each given the engine's input, {seen}"
    read = f"what {count} read, from the engine's values in front, {seen}"
    shipped = f"the file that ships, run without watching its {count}, {seen}"
    return [
        Check("engine's products = simulation's", found.largest_product_error, PRODUCT_FLOAT32, given),
        Check("engine's floats between products = simulation's", found.largest_input_error, SIMULATION_FLOAT32, read),
        Check("shipped file's outputs = simulation's", found.shipped_error, SHIPPED_FLOAT32, shipped),
    ]


def require(checks: Iterable[Check]) -> None:
    """Refuse to go on where a check does not hold.

    Raises:
        CheckFailed: one or more do not; the message has their figures.
    """
    failed = [check for check in checks if not check.holds]
    if failed:
        figures = "; ".join(f"{check.name}: {check.value:.3g} ({check.detail})" for check in failed)
        raise CheckFailed(
            f"a check failed: {figures}",
            where="verification",
            expected="; ".join(f"{check.name}: {check.bound:.3g} at most" for check in failed),
            hint="see that the model's outputs are finite on these samples, then report it with the model if you can",
        )


def samples_in(batches: Iterable[Sequence[Tensor]]) -> int:
    """Return the number of samples in batches of one tensor per input (an input of size 1 is shared by a batch)."""
    return sum(max((len(value) for value in batch if value.ndim), default=1) for batch in batches)


def _worst(errors: Sequence[float]) -> float:
    """Return the largest error; infinite where nothing was compared, which proves nothing."""
    return max(errors, default=math.inf)


def _samples(count: int) -> str:
    return f"{count} sample{'' if count == 1 else 's'}"
