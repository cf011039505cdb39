"""``normfuse fold``: every norm that can fold, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from normfuse.cli.options import fold_options, json_option, model_options, output_option, quiet_option

__all__ = ["command"]


@click.command("fold")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--calib", metavar="DATA", help="Samples to check every step with; else random inputs are made.")
@click.option("--preprocess", metavar="PRESET", help="For image folders: a preset, or mean=..;std=..;size=..")
@fold_options
@model_options
@output_option
@json_option
@quiet_option
def command(model: Path, output: Path, as_json: bool, quiet: bool, **options: Any) -> int:
    """Fold every norm of MODEL that can fold; write the model and its certificate to a folder."""
    from normfuse.artifact import check_output
    from normfuse.cli import render
    from normfuse.cli.opening import opened_fold, opened_model, opened_samples
    from normfuse.folding import fold

    shown = render.progress(quiet=quiet)
    check_output(output)
    samples = opened_samples(options["calib"], options["preprocess"], progress=shown)
    opened = opened_model(model, arch=options["arch"], trust_pickle=options["trust_pickle"], progress=shown)
    folded = fold(opened, calibration=samples, options=opened_fold(options), progress=shown)
    folded.save(output)
    if as_json:
        render.as_json(folded.certificate)
    else:
        render.certificate(folded.certificate)
        render.line(f"written: {output}")
    return 0 if folded.holds else 1
