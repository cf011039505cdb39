"""The commands of trtexec and Polygraphy, as a shell takes them."""

from __future__ import annotations

import shlex
from pathlib import Path

from normfuse.runtime.equivalent_commands import (
    polygraphy_comparison,
    polygraphy_rtx_build,
    trtexec_build,
    trtexec_timing,
)
from normfuse.runtime.tensorrt_build import BuildOptions

MODEL, ENGINE = Path("model.onnx"), Path("model.engine")
OPTIONS = BuildOptions(
    shapes={"image": ((1, 3), (4, 3), (8, 3)), "mask": ((1, 9), (4, 9), (8, 9))},
    workspace_bytes=256 << 20,
    level=5,
)


def test_a_build_of_trtexec() -> None:
    assert trtexec_build(MODEL, ENGINE, OPTIONS, version="11.4.0.106") == (
        "trtexec --onnx=model.onnx --saveEngine=model.engine"
        " --minShapes=image:1x3,mask:1x9 --optShapes=image:4x3,mask:4x9 --maxShapes=image:8x3,mask:8x9"
        " --memPoolSize=workspace:256M --builderOptimizationLevel=5 --skipInference"
    )


def test_trtexec_10_is_told_that_types_are_strong() -> None:
    assert " --stronglyTyped " in trtexec_build(MODEL, ENGINE, OPTIONS, version="10.13.2.6")


def test_every_option_of_a_build() -> None:
    options = BuildOptions(workspace_bytes=1000, timing_cache=Path("my timings"), version_compatible=True)
    assert trtexec_build(Path("it's.onnx"), ENGINE, options, version="11.4") == (
        """trtexec '--onnx=it'"'"'s.onnx' --saveEngine=model.engine --memPoolSize=workspace:1000B"""
        " --builderOptimizationLevel=3 '--timingCacheFile=my timings'"
        " --versionCompatible --excludeLeanRuntime --skipInference"
    )


def test_the_timing_of_trtexec() -> None:
    fixed = "trtexec --loadEngine=model.engine --noDataTransfers --useCudaGraph --useSpinWait"
    assert trtexec_timing(ENGINE, {}) == fixed
    assert trtexec_timing(ENGINE, {"image": (4, 3)}) == f"{fixed} --shapes=image:4x3"


def test_names_with_signs_of_trtexec_stand_in_quotes() -> None:
    command = trtexec_timing(ENGINE, {"in:0": (4, 3)})
    assert shlex.split(command)[-1] == "--shapes='in:0':4x3"


def test_a_comparison_of_polygraphy() -> None:
    command = polygraphy_comparison(
        MODEL, OPTIONS, version="10.16.1.11", atol=0.01, rtol=0.001, value_range=(-2.0, 2.0)
    )
    assert shlex.split(command) == [
        *("polygraphy", "run", "model.onnx", "--trt", "--onnxrt", "--atol", "0.01", "--rtol", "0.001"),
        *("--val-range", "[-2.0,2.0]", "--strongly-typed"),
        *("--input-shapes", "image:[4,3]", "mask:[4,9]"),
        *("--trt-min-shapes", "image:[1,3]", "mask:[1,9]"),
        *("--trt-opt-shapes", "image:[4,3]", "mask:[4,9]"),
        *("--trt-max-shapes", "image:[8,3]", "mask:[8,9]"),
        *("--pool-limit", "workspace:268435456", "--builder-optimization-level", "5"),
    ]


def test_a_build_of_polygraphy_with_tensorrt_rtx() -> None:
    options = BuildOptions(capabilities=("SM89", "SM120"), version_compatible=True, workspace_bytes=1 << 20)
    assert polygraphy_rtx_build(MODEL, ENGINE, options) == (
        "POLYGRAPHY_USE_TENSORRT_RTX=1 polygraphy convert model.onnx --convert-to trt -o model.engine"
        " --compute-capabilities 8.9 12.0 --pool-limit workspace:1048576 --builder-optimization-level 3"
        " --version-compatible --exclude-lean-runtime"
    )
