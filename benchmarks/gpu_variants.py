"""The baselines of one network: in which type or codes it computes, compiled or not, ready to run."""

from __future__ import annotations

import gc
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Final

import torch
from torch import Tensor

from benchmarks.vision import Network
from benchmarks.w8a8 import Codes, Quantized, quantize
from normfuse.bench.cuda_graph import recorded
from normfuse.bench.gpu_device import FLOAT8_CAPABILITY, capability
from normfuse.bench.gpu_timing import synchronize

__all__ = ["COMPILE_MODE", "VARIANTS", "Engine", "Skipped", "Variant", "prepare", "release"]

COMPILE_MODE: Final = "max-autotune-no-cudagraphs"
"""Every kernel is chosen by measuring; the CUDA graph is recorded here, so that it holds for every variant alike."""


class Skipped(Exception):
    """A variant that this device cannot have; the text says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A baseline: the type of what is not quantized, codes of the linear maps, and whether it is compiled."""

    name: str
    dtype: torch.dtype
    is_compiled: bool = False
    codes: Codes | None = None


VARIANTS: Final = (
    Variant(name="eager fp32", dtype=torch.float32),
    Variant(name="eager fp16", dtype=torch.float16),
    Variant(name="eager bf16", dtype=torch.bfloat16),
    Variant(name="compiled fp16", dtype=torch.float16, is_compiled=True),
    Variant(name="compiled bf16", dtype=torch.bfloat16, is_compiled=True),
    Variant(name="compiled fp8 W8A8", dtype=torch.bfloat16, is_compiled=True, codes=Codes.FLOAT8),
    Variant(name="compiled int8 W8A8", dtype=torch.float16, is_compiled=True, codes=Codes.INT8),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """A variant ready to run on ``image``, its one input; ``run`` enqueues an inference and returns its output."""

    run: Callable[[], Tensor]
    image: Tensor
    is_compiled: bool = False
    is_graph: bool = False
    compile_s: float | None = None
    layers: tuple[str, ...] = ()
    left: dict[str, str] = field(default_factory=dict)

    def predict(self, images: Tensor) -> Tensor:
        """Return float64 logits on the host for any number of images, batch by batch; the last one is filled up."""
        kept, batch = self.image.clone(), len(self.image)
        found = []
        for part in torch.split(images, batch):
            self.image[: len(part)].copy_(part)
            found.append(self.run()[: len(part)].double().cpu())  # the copy waits for the device
        self.image.copy_(kept)
        return torch.cat(found)

    def describe(self) -> dict[str, Any]:
        """Return how it runs, for JSON."""
        return {
            "compiled": self.is_compiled,
            "cuda_graph": self.is_graph,
            "compile_s": self.compile_s,
            "quantized": list(self.layers),
            "left": dict(self.left),
        }


def prepare(variant: Variant, network: Network, images: Tensor, device: torch.device, *, compiles: bool) -> Engine:
    """Return the engine of a variant for the batch of ``images``.

    Args:
        variant: what to build; where it is compiled, its inferences are also one CUDA graph (on a GPU).
        network: stays as it is, on the host.
        images: float32 on the host; the engine gets them in the type that it computes in.
        device: where to run.
        compiles: whether ``torch.compile`` is called at all.

    Raises:
        Skipped: the device cannot compute it.
        Exception: whatever PyTorch fails with: no memory, a compiler's error.
    """
    made = _in_codes(variant, network, len(images), device)
    model, image = made.network.to(device), images.to(device, variant.dtype)
    if not variant.is_compiled:
        return Engine(run=lambda: _tensor(model(image)), image=image)
    call, seconds = _compiled(model, image, device) if compiles else (model, None)
    is_graph = device.type == "cuda"
    run = recorded(lambda: _tensor(call(image))) if is_graph else lambda: _tensor(call(image))
    return Engine(
        run=run,
        image=image,
        is_compiled=compiles,
        is_graph=is_graph,
        compile_s=seconds,
        layers=made.layers,
        left=dict(made.left),
    )


def release(device: torch.device) -> None:
    """Give back what engines that nobody holds any more have taken."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _in_codes(variant: Variant, network: Network, batch: int, device: torch.device) -> Quantized:
    if variant.codes is None:
        return Quantized(deepcopy(network.measured).to(variant.dtype), (), {})
    found = capability(device)
    if variant.codes is Codes.FLOAT8 and found is not None and found < FLOAT8_CAPABILITY:
        have, need = (".".join(map(str, pair)) for pair in (found, FLOAT8_CAPABILITY))
        raise Skipped(f"products of float8 need compute capability {need}, this GPU has {have}")
    return quantize(network.measured, network.seen, variant.codes, batch=batch)


def _compiled(model: torch.nn.Module, image: Tensor, device: torch.device) -> tuple[Callable[[Tensor], Any], float]:
    """Return the compiled model after its first run, in which it is compiled, and how many seconds that took."""
    # Its own forward and not the module: calls of all modules share code, and the compiler limits versions of one code.
    call = torch.compile(model.forward, mode=COMPILE_MODE, fullgraph=True, dynamic=False)
    began = perf_counter()
    call(image)
    synchronize(device)
    return call, perf_counter() - began


def _tensor(found: Any) -> Tensor:
    assert isinstance(found, Tensor)
    return found
