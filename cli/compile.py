"""``normfuse compile``: parse, call, render."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from normfuse.cli.options import (
    data_options,
    engine_options,
    json_option,
    model_options,
    output_option,
    quiet_option,
    scored_options,
)

__all__ = ["command"]


@click.command("compile")
@click.argument("model", type=click.Path(path_type=Path))
@data_options
@model_options
@output_option
@click.option("--recipe", "recipe_file", type=click.Path(path_type=Path), help="TOML file; options here override it.")
@click.option("--target", help="Where it runs: onnx (onnxruntime) or trt (TensorRT).")
@click.option(
    "--bits",
    help="8: W8A8; 4: weights of 4 bits; w4a4, w4a16 ...; mixed: --budget; 32: folded float; of trt: fp8, fp16, bf16.",
)
@engine_options
@click.option(
    "--budget",
    help="Of mixed bits: bytes=0.14x, avg-bits=4.5, bops=0.1x, activation-bytes=2MB, latency=0.8x, drop=0.5.",
)
@click.option("--score", help="Of mixed bits: what fewer bits of a layer cost, as in `normfuse score --method`.")
@click.option("--overrides", help="Bits of layers by name, as in 'head=8 blocks.*.fc2=w4a8'; they always win.")
@click.option("--refresh", type=int, help="Score mixed bits again on the quantized network, so many times.")
@click.option("--pareto/--no-pareto", default=None, help="Build and measure the whole front of mixed bits.")
@click.option("--point", type=int, help="Which point of the front ships (0: the smallest that is kept).")
@click.option(
    "--activations", help="Scales of activations: static (from calibration) or dynamic (per row, as it runs)."
)
@click.option("--table-bits", type=int, help="Embedding and position tables: 8 (default) or 4 (in groups).")
@click.option("--effort", type=int, help="0: seconds; 1: minutes (default); 2: tens of minutes, learns block by block.")
@click.option("--levers", help="Parts of an effort pulled or let go, as in '+soft-rounding -foresight'.")
@click.option(
    "--integer-only/--no-integer-only", default=None, help="Compute everything between inputs and outputs in integers."
)
@click.option(
    "--allow-float-islands/--no-float-islands",
    default=None,
    help="Beside --integer-only: leave in float what has no integer form.",
)
@click.option("--norm", help="Of integers alone: per-tensor (the default) or per-token codes behind norms.")
@click.option("--softmax", help="Of integers alone: table (ours, the default) or shiftmax (published).")
@click.option("--gelu", help="Of integers alone: table (the default), shift-gelu (published) or lambda-shift-gelu.")
@click.option("--threads", type=int, help="Threads to verify and measure with (0: the visible cores, two at most).")
@click.option("--batch", type=int, help="Batch size to measure at.")
@click.option(
    "--max-drop", type=float, help="Largest drop of the score (top-1, mean IoU), in points, that counts as kept."
)
@click.option("--min-speedup", type=float, help="Smallest speed-up over float that counts as kept.")
@click.option("--benchmark/--no-benchmark", default=None, help="Measure speed and memory.")
@scored_options
@json_option
@quiet_option
def command(model: Path, output: Path, recipe_file: Path | None, as_json: bool, quiet: bool, **options: Any) -> int:
    """Fold, quantize, verify and measure MODEL; write the artifact to a folder."""
    from normfuse.artifact import check_output
    from normfuse.cli import render
    from normfuse.cli.opening import opened_model, opened_samples
    from normfuse.compiler import compile as compile_model
    from normfuse.recipe import Recipe

    calib, evaluation, preprocess = (options.pop(name) for name in ("calib", "evaluation", "preprocess"))
    arch, trust, shown = options.pop("arch"), options.pop("trust_pickle"), render.progress(quiet=quiet)
    recipe = (Recipe.read(recipe_file) if recipe_file else Recipe()).with_options(**options)
    check_output(output)
    resume = Path(f"{output.absolute()}.resume")
    if resume.is_dir():
        render.talk(f"{resume.name} is there: what it holds of this model, data and recipe is not computed again")
    try:
        built = compile_model(
            opened_model(model, arch=arch, trust_pickle=trust, progress=shown),
            calibration=opened_samples(calib, preprocess, other=evaluation, progress=shown),
            evaluation=opened_samples(evaluation, preprocess, other=calib, progress=shown),
            recipe=recipe,
            progress=shown,
            resume=resume,
        )
    except (KeyboardInterrupt, SystemExit):
        if resume.is_dir():
            render.talk(f"{resume.name} holds what is finished: the same command goes on from there")
        raise
    built.save(output)
    render.as_json(built.report) if as_json else render.report(built.report, output)
    if built.failure is not None:  # what was made is kept
        raise built.failure
    return 0 if built.holds else 1
