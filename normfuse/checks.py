"""What must hold before a compile is called done, each with its figure and its bound."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from normfuse.graph import Graph
from normfuse.graph.edit import converted
from normfuse.runtime.agreement import compare_codes, output_error
from normfuse.runtime.onnx_session import open_onnx

__all__ = ["Check", "check_codes", "check_export", "check_fold"]

FOLD_FLOAT64: Final = 1e-10
"""Folding is exact in real arithmetic: in float64 only rounding is left."""

EXPORT_FLOAT32: Final = 1e-4
"""Float32 against float32 through some hundred operators: eps (6e-8) times depth and width."""

ONE_CODE: Final = 1
"""Kernels may round the last bit of a float differently, which moves a code by one at most."""

SIMULATION_FLOAT32: Final = 1e-3
"""Behind the last quantizer simulation and engine compute the same floats; one code there may still differ."""


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
    worst = 0.0
    for sample in samples:
        wide = [value.double() if value.is_floating_point() else value for value in sample]
        pairs = zip(reference.run(*wide), folded_in_float64.run(*wide), strict=True)
        worst = max([worst, *(output_error(found.numpy(), wanted.numpy()) for wanted, found in pairs)])
    return Check("folded model = original, float64", worst, FOLD_FLOAT64, f"{len(samples)} samples")


def check_export(original: Graph, path: Path, samples: Sequence[Sequence[Tensor]], *, threads: int) -> Check:
    """Compare the model in PyTorch with the float engine (folded and exported), relative to the output's scale."""
    session = open_onnx(path, threads=threads)
    worst = 0.0
    for sample in samples:
        feeds = {name: value.numpy() for name, value in zip(original.input_names, sample, strict=True)}
        found = session.run(feeds)
        pairs = zip(original.output_names, original.run(*sample), strict=True)
        worst = max([worst, *(output_error(found[name], wanted.numpy()) for name, wanted in pairs)])
    return Check("float engine = PyTorch, float32", worst, EXPORT_FLOAT32, f"{len(samples)} samples")


def check_codes(
    graph: Graph, path: Path, samples: Iterable[Sequence[Tensor]], *, threads: int, session_config: Mapping[str, str]
) -> list[Check]:
    """Compare the quantized engine with its simulation: codes of every quantizer, and the outputs."""
    found = compare_codes(graph, path, samples, threads=threads, session_config=session_config)
    share = max((tensor.share_different for tensor in found.tensors), default=0.0)
    detail = f"{len(found.tensors)} tensors, {found.samples} samples, at most {share:.2%} of a tensor's codes differ"
    return [
        Check("engine's codes = simulation's", float(found.largest_difference), float(ONE_CODE), detail),
        Check("engine's outputs = simulation's", found.output_error, SIMULATION_FLOAT32, f"{found.samples} samples"),
    ]
