"""The two libraries that build engines, and which of them is installed."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Final

from normfuse.errors import MissingDependency

__all__ = ["TENSORRT", "TENSORRT_RTX", "Backend", "backend_of", "installed_backend"]


@dataclass(frozen=True, slots=True)
class Backend:
    """A library that builds engines: its module, and how to get it."""

    module: str
    install: str


TENSORRT: Final = Backend("tensorrt", "pip install 'normfuse[tensorrt]'")
TENSORRT_RTX: Final = Backend("tensorrt_rtx", "pip install 'normfuse[trt-rtx]'")


def backend_of(flavour: str) -> Backend:
    """Return the library that a sidecar names, if it is one of the two; else the one that is installed.

    Raises:
        MissingDependency: it is none of them, and neither is installed.
    """
    # Never the module by its name alone: the name may come from a stranger.
    known = {backend.module: backend for backend in (TENSORRT, TENSORRT_RTX)}
    return known.get(flavour) or installed_backend()


def installed_backend() -> Backend:
    """Return TensorRT, or TensorRT-RTX where that alone is installed; nothing is imported.

    Raises:
        MissingDependency: neither is.
    """
    for backend in (TENSORRT, TENSORRT_RTX):
        if importlib.util.find_spec(backend.module) is not None:
            return backend
    raise MissingDependency(
        "tensorrt", needed_for="building engines", install=f"{TENSORRT.install}, or {TENSORRT_RTX.install}"
    )
