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
@click.option("--lint", metavar="TARGET", help="Hold a folder's or an .onnx file's engine against the rules of trt.")
@fold_options
@model_options
@json_option
@quiet_option
def command(path: Path, as_json: bool, quiet: bool, with_text: bool, lint: str | None, **options: Any) -> int:
    """Show what a model holds and what `normfuse fold` would do with the same options, or what an artifact is.

    With --lint it is an artifact, or anybody's ONNX file; the exit code is 1 where an error is among the findings.
    """
    from normfuse.cli import render
    from normfuse.cli.opening import opened_fold, opened_model, opened_samples
    from normfuse.inspection import inspect_artifact, inspect_model, lint_engine

    shown = render.progress(quiet=quiet)
    if lint is not None:
        found = lint_engine(path, lint)
        render.as_json(found) if as_json else render.lint(found)
        return 1 if any(each["level"] == "error" for each in found["findings"]) else 0
    if path.is_dir():
        found = inspect_artifact(path)
    else:
        samples = opened_samples(options["calib"], options["preprocess"], progress=shown)
        model = opened_model(path, arch=options["arch"], trust_pickle=options["trust_pickle"], progress=shown)
        found = inspect_model(model, samples, options=opened_fold(options), with_text=with_text, progress=shown)
    render.as_json(found) if as_json else render.inspection(found)
    holds = found.get("certificate", {"holds": True})["holds"]
    return 1 if found.get("problems") or not holds else 0
