"""``normfuse score``: parse, call, render."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from normfuse.cli.options import calib_options, json_option, model_options, quiet_option, scored_options

__all__ = ["command"]


@click.command("score")
@click.argument("model", type=click.Path(path_type=Path))
@calib_options
@model_options
@click.option(
    "--method",
    "score",
    default="curvature",
    show_default=True,
    help="curvature, kl, sqnr, gradient-error, lrp, lrp-error, fisher, hessian or random.",
)
@scored_options
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), help="Write sensitivity.json here.")
@click.option("--page", type=click.Path(path_type=Path, dir_okay=False), help="Draw the scores on an HTML page.")
@json_option
@quiet_option
def command(model: Path, output: Path | None, page: Path | None, as_json: bool, quiet: bool, **options: Any) -> int:
    """Say what fewer bits of every layer of MODEL cost."""
    from normfuse.atomic import write_file
    from normfuse.checkpoint import remove_checkpoint
    from normfuse.cli import render
    from normfuse.cli.opening import opened_model, opened_samples
    from normfuse.page import render_page
    from normfuse.recipe import MIXED, Recipe
    from normfuse.scoring import score_model
    from normfuse.strict_json import strict_json

    calib, preprocess = (options.pop(name) for name in ("calib", "preprocess"))
    arch, trust, shown = options.pop("arch"), options.pop("trust_pickle"), render.progress(quiet=quiet)
    recipe = Recipe(bits=MIXED, pareto=True).with_options(**options)
    resume = None if output is None else Path(f"{output.absolute()}.resume")
    found = score_model(
        opened_model(model, arch=arch, trust_pickle=trust, progress=shown),
        calibration=opened_samples(calib, preprocess, other=None, progress=shown),
        recipe=recipe,
        known=output,
        resume=resume,
        progress=shown,
    )
    if output is not None and resume is not None:
        write_file(output, strict_json(found).encode())
        remove_checkpoint(resume)
    if page is not None:
        write_file(page, render_page({"sensitivity": found}).encode())
    render.as_json(found) if as_json else render.sensitivity(found)
    return 0
