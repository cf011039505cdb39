"""What Triton's backends are called, read and take; from the server's documentation and the backends' sources."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

__all__ = ["ONNXRUNTIME", "TENSORRT", "Backend"]

DATA_TYPES: Final = {
    "bool": "TYPE_BOOL",
    **{f"{sign}int{bits}": f"TYPE_{sign.upper()}INT{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)},
    "float16": "TYPE_FP16",
    "float32": "TYPE_FP32",
    "float64": "TYPE_FP64",
    "bfloat16": "TYPE_BF16",
}
"""Triton's names of types, by numpy's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """A backend: ``file`` is what it opens in a version's folder, ``kind`` where its instances run.

    ``types`` are Triton's names of the types of inputs and outputs that it takes, by numpy's; ``session_entries``
    the entries of an onnxruntime session that it passes on, as parameters of the same name.
    """

    name: str
    platform: str
    file: str
    kind: str
    types: Mapping[str, str]
    session_entries: frozenset[str] = frozenset()


ONNXRUNTIME: Final = Backend(
    name="onnxruntime",
    platform="onnxruntime_onnx",
    file="model.onnx",
    kind="KIND_CPU",  # where the engine was checked and measured; KIND_AUTO would take a GPU's kernels if there is one
    types={name: text for name, text in DATA_TYPES.items() if name != "bfloat16"},
    session_entries=frozenset({"session.use_device_allocator_for_initializers"}),
)

TENSORRT: Final = Backend(
    name="tensorrt",
    platform="tensorrt_plan",
    file="model.plan",
    kind="KIND_GPU",
    types={
        name: DATA_TYPES[name] for name in ("bool", "uint8", "int8", "int32", "int64", "float16", "float32", "bfloat16")
    },
)
