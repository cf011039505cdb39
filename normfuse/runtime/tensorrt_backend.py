"""The libraries that build engines, and which of them is installed."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Final

from normfuse.errors import MissingDependency
from normfuse.quant.target import Via

__all__ = ["TENSORRT", "TENSORRT_RTX", "TORCH_TENSORRT", "Backend", "backend_of", "installed_backend"]


@dataclass(frozen=True, slots=True)
class Backend:
    """A library that builds engines: its module, how to get it, and what it builds them from."""

    module: str
    install: str
    via: Via = Via.ONNX

    @property
    def flavour(self) -> str:
        """The module of the library that runs its engines."""
        return TENSORRT.module if self.via is Via.TORCH_TENSORRT else self.module


TENSORRT: Final = Backend("tensorrt", "pip install 'normfuse[tensorrt]'")
TENSORRT_RTX: Final = Backend("tensorrt_rtx", "pip install 'normfuse[trt-rtx]'")
TORCH_TENSORRT: Final = Backend("torch_tensorrt", "pip install 'normfuse[torch-tensorrt]'", Via.TORCH_TENSORRT)

BACKENDS: Final = (TENSORRT, TENSORRT_RTX, TORCH_TENSORRT)
"""In the order in which they are taken."""


def backend_of(flavour: str) -> Backend:
    """Return the library that a sidecar names, if it is one that runs engines; else the one that is installed.

    Raises:
        MissingDependency: it is none of them, and neither is installed.
    """
    # Never the module by its name alone: the name may come from a stranger.
    known = {backend.module: backend for backend in (TENSORRT, TENSORRT_RTX)}
    return known.get(flavour) or installed_backend()


def installed_backend(via: Via = Via.ONNX) -> Backend:
    """Return the library for one way: of the ONNX file TensorRT, or TensorRT-RTX where that alone is installed.

    Nothing is imported.

    Raises:
        MissingDependency: none is installed.
    """
    backends = [backend for backend in BACKENDS if backend.via is via]
    for backend in backends:
        if importlib.util.find_spec(backend.module) is not None:
            return backend
    installs = ", or ".join(backend.install for backend in backends)
    raise MissingDependency(backends[0].module, needed_for="building engines", install=installs)
