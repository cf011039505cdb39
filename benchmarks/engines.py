"""Sizes and kernels of TensorRT engines: ``python -m benchmarks.engines [--network vit-s] [--bits 8] [-o FILE.json]``.

Builds with what is installed, for one compute capability; with TensorRT-RTX no GPU is needed. Nothing is run or
timed. Weights are random, and codes rounded to nearest: sizes and kernels do not follow from their values.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.engine_networks import NETWORKS, WHOLE, network
from normfuse.compiler import compile as compile_model
from normfuse.recipe import Recipe

BITS = ("32", "fp16", "8", "fp8", "4")


def measured(name: str, bits: str, capability: str) -> dict[str, Any]:
    """Return bytes, kernels and products of the engine of a network."""
    model, samples = network(name)
    recipe = Recipe(target="trt", bits=bits, effort=0, max_drop=100, capability=capability)
    built = compile_model(model, (samples,), calibration={"x": samples.numpy()}, recipe=recipe)
    if built.failure is not None:
        raise built.failure
    engine = built.report["tensorrt"]["engine"]
    return {
        "network": name,
        "bits": bits,
        "capability": capability,
        "builder": f"{engine['flavour']} {engine['version']}",
        "engine_bytes": engine["bytes"],
        "onnx_bytes": built.engine.path.stat().st_size,
        **engine["audit"],
    }


def main() -> None:
    """Build, and print a line each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", nargs="*", default=list(WHOLE), choices=[*NETWORKS, *WHOLE])
    parser.add_argument("--bits", nargs="*", default=BITS)
    parser.add_argument("--capability", default="8.9")
    parser.add_argument("-o", "--output", type=Path, help="JSON of all of them.")
    asked = parser.parse_args()
    found = []
    for name in asked.network:
        base = None
        for bits in asked.bits:
            row = measured(name, bits, asked.capability)
            found.append(row)
            base = base or row["engine_bytes"]
            products = ", ".join(f"{each['got']} of {each['asked']} {kind}" for kind, each in row["products"].items())
            print(
                f"{name:<14} {bits:<5} {row['engine_bytes'] / 1e6:7.1f} MB {row['engine_bytes'] / base:5.2f}"
                f"  {row['kernels']:4} kernels  norms {row['joined_norms']} of {row['norms']}"
                f"  attention {row['joined_attentions']} of {row['attentions']}  {products}",
                flush=True,
            )
    if asked.output:
        asked.output.write_text(json.dumps(found, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
