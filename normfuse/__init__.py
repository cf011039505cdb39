"""normfuse: from a trained PyTorch model to a smaller, faster, measured inference engine."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, Final

from normfuse.errors import NormfuseError

if TYPE_CHECKING:
    from normfuse.calibration import calibrate
    from normfuse.compiler import compile, load, save
    from normfuse.data import Samples
    from normfuse.folding import FoldOptions, fold
    from normfuse.graph import capture
    from normfuse.passes.presets import LayerNorms
    from normfuse.pipeline import Pass, Pipeline
    from normfuse.recipe import Recipe
    from normfuse.report import PassReport

__all__ = [
    "FoldOptions",
    "LayerNorms",
    "NormfuseError",
    "Pass",
    "PassReport",
    "Pipeline",
    "Recipe",
    "Samples",
    "__version__",
    "calibrate",
    "capture",
    "compile",
    "fold",
    "load",
    "save",
]

try:
    __version__ = version("normfuse")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0+unknown"

_HOMES: Final = {
    "FoldOptions": "normfuse.folding",
    "LayerNorms": "normfuse.passes.presets",
    "Pass": "normfuse.pipeline",
    "PassReport": "normfuse.report",
    "Pipeline": "normfuse.pipeline",
    "Recipe": "normfuse.recipe",
    "Samples": "normfuse.data",
    "calibrate": "normfuse.calibration",
    "capture": "normfuse.graph",
    "compile": "normfuse.compiler",
    "fold": "normfuse.folding",
    "load": "normfuse.compiler",
    "save": "normfuse.compiler",
}


def __getattr__(name: str) -> Any:
    """Import the heavy parts (torch, onnxruntime) when they are first asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module 'normfuse' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
