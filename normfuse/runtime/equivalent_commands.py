"""The commands of trtexec and Polygraphy that do what normfuse does, for whoever wants to check it without normfuse.

Neither comes with the Python packages of TensorRT: trtexec is in NVIDIA's archives and containers,
``pip install polygraphy`` gives the other.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from normfuse.runtime.shapes import Shapes
from normfuse.runtime.tensorrt_build import BuildOptions

__all__ = ["polygraphy_comparison", "polygraphy_rtx_build", "trtexec_build", "trtexec_timing"]

MEBIBYTE: Final = 1 << 20
FIRST_TYPED: Final = 11
"""From this major version on TensorRT knows strongly typed networks alone, and its tools have no option for them."""


def trtexec_build(model: Path, engine: Path, options: BuildOptions, *, version: str) -> str:
    """Return the command that builds the same engine; ``version`` is TensorRT's (``10.13.2.6``)."""
    words = ["trtexec", f"--onnx={model}", f"--saveEngine={engine}"]
    words += ["--stronglyTyped"] * _needs_types(version)
    if options.shapes:
        words += [
            f"--{name}Shapes={_trtexec_shapes({each: shapes[which] for each, shapes in options.shapes.items()})}"
            for which, name in enumerate(("min", "opt", "max"))
        ]
    words += [f"--memPoolSize=workspace:{_size(options.workspace_bytes)}"]
    words += [f"--builderOptimizationLevel={options.level}"]
    if options.timing_cache is not None:
        words += [f"--timingCacheFile={options.timing_cache}"]
    words += ["--versionCompatible", "--excludeLeanRuntime"] * options.version_compatible
    return shlex.join([*words, "--skipInference"])


def trtexec_timing(engine: Path, shapes: Mapping[str, Sequence[int]]) -> str:
    """Return the command that times an engine, each input of the shape given: the GPU alone, without transfers."""
    words = ["trtexec", f"--loadEngine={engine}", "--noDataTransfers", "--useCudaGraph", "--useSpinWait"]
    return shlex.join(words + [f"--shapes={_trtexec_shapes(shapes)}"] * bool(shapes))


def polygraphy_comparison(
    model: Path, options: BuildOptions, *, version: str, atol: float, rtol: float, value_range: tuple[float, float]
) -> str:
    """Return the command that builds an engine and compares its outputs with onnxruntime's, on random inputs.

    Args:
        model: the ONNX file.
        options: how the engine is built; inputs have their usual shapes.
        version: TensorRT's.
        atol: by how much an output may differ, as a number;
        rtol: and as a share of onnxruntime's.
        value_range: the least and the largest value of an input.
    """
    least, most = value_range
    words = ["polygraphy", "run", str(model), "--trt", "--onnxrt", "--atol", str(atol), "--rtol", str(rtol)]
    words += ["--val-range", f"[{least},{most}]"]
    words += ["--strongly-typed"] * _needs_types(version)
    words += _polygraphy_shapes("--input-shapes", options.shapes, 1)
    return shlex.join(words + _polygraphy_options(options))


def polygraphy_rtx_build(model: Path, engine: Path, options: BuildOptions) -> str:
    """Return the command that builds the same engine with TensorRT-RTX."""
    words = ["polygraphy", "convert", str(model), "--convert-to", "trt", "-o", str(engine)]
    if options.capabilities:
        words += ["--compute-capabilities", *(_dotted(name) for name in options.capabilities)]
    words += _polygraphy_options(options)
    words += ["--version-compatible", "--exclude-lean-runtime"] * options.version_compatible
    return f"POLYGRAPHY_USE_TENSORRT_RTX=1 {shlex.join(words)}"


def _needs_types(version: str) -> bool:
    return int(version.partition(".")[0]) < FIRST_TYPED


def _size(size_bytes: int) -> str:
    whole, rest = divmod(size_bytes, MEBIBYTE)
    return f"{size_bytes}B" if rest else f"{whole}M"


def _trtexec_shapes(shapes: Mapping[str, Sequence[int]]) -> str:
    """Names that hold one of trtexec's own signs stand in quotes."""
    names = {name: f"'{name}'" if set(name) & set(":,") else name for name in shapes}
    return ",".join(f"{names[name]}:{'x'.join(str(size) for size in shape)}" for name, shape in shapes.items())


def _polygraphy_options(options: BuildOptions) -> list[str]:
    words = [
        word
        for which, name in enumerate(("min", "opt", "max"))
        for word in _polygraphy_shapes(f"--trt-{name}-shapes", options.shapes, which)
    ]
    words += ["--pool-limit", f"workspace:{options.workspace_bytes}"]
    return [*words, "--builder-optimization-level", str(options.level)]


def _polygraphy_shapes(option: str, shapes: Mapping[str, Shapes], which: int) -> list[str]:
    if not shapes:
        return []
    return [option, *(f"{name}:[{','.join(str(size) for size in each[which])}]" for name, each in shapes.items())]


def _dotted(capability: str) -> str:
    """``SM89`` as ``8.9``, ``SM120`` as ``12.0``."""
    return f"{capability[2:-1]}.{capability[-1]}"
