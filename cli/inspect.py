"""``normfuse inspect``: what a model holds and what would be folded, or what an artifact is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from normfuse.cli.options import fold_options, json_option, model_options, quiet_option

__all__ = ["command"]


@click.command("inspect")
@click.argument("path", metavar="MODEL|DIR", type=click.Path(path_type=Path))
@click.option("--calib", metavar="DATA", help="Samples to capture and to check with; exported programs need none.")
@click.option("--preprocess", metavar="PRESET", help="For image folders.")
@click.option("--text", "with_text", is_flag=True, help="Print the folded graph too.")
@fold_options
@model_options
@json_option
@quiet_option
def command(path: Path, as_json: bool, quiet: bool, with_text: bool, **options: Any) -> int:
    """Show what a model holds and what `normfuse fold` would do with the same options, or what an artifact is."""
    from normfuse.cli import render
    from normfuse.cli.opening import opened_fold, opened_model, opened_samples
    from normfuse.inspection import inspect_artifact, inspect_model

    shown = render.progress(quiet=quiet)
    if path.is_dir():
        found = inspect_artifact(path)
    else:
        samples = opened_samples(options["calib"], options["preprocess"], progress=shown)
        model = opened_model(path, arch=options["arch"], trust_pickle=options["trust_pickle"], progress=shown)
        found = inspect_model(model, samples, options=opened_fold(options), with_text=with_text, progress=shown)
    render.as_json(found) if as_json else render.inspection(found)
    holds = found.get("certificate", {"holds": True})["holds"]
    return 1 if found.get("problems") or not holds else 0
