"""Looks at what is installed and runs the smallest possible compile's ingredients."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, Final

from normfuse.bench.environment import describe_environment
from normfuse.export.placement import onnx_placement

__all__ = ["diagnose"]

NEEDED: Final = {
    "onnxruntime": "running and measuring engines",
    "onnxscript": "writing ONNX",
    "scipy": "allocating bits",
}
OPTIONAL: Final = {
    "PIL": ("folders of images", "pip install 'normfuse[images]'"),
    "sklearn": ("the zoo's digits", "pip install 'normfuse[zoo]'"),
    "matplotlib": ("the zoo's glyphs", "pip install 'normfuse[zoo]'"),
    "transformers": ("benchmarks on DeiT shapes", "pip install 'normfuse[bench]'"),
}


def diagnose() -> dict[str, Any]:
    """Return the environment, the placement for this processor, and what is missing, as plain data."""
    environment = describe_environment()
    placement = onnx_placement(environment.instruction_set)
    missing = [f"{name}: needed for {use}" for name, use in NEEDED.items() if find_spec(name) is None]
    optional = [f"{name}: {use} ({how})" for name, (use, how) in OPTIONAL.items() if find_spec(name) is None]
    return {
        "ok": not missing,
        "environment": environment.as_dict(),
        "placement": {
            "name": placement.name,
            "activations": str(placement.activation),
            "weights": str(placement.weight),
            "reason": placement.reason,
        },
        "missing": missing,
        "optional_missing": optional,
    }
