"""``normfuse benchmark``: artifacts measured again, side by side, and against the model they come from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from normfuse.cli.options import json_option, model_options, quiet_option

__all__ = ["command"]


@click.command("benchmark")
@click.argument("folders", metavar="DIR...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--against", metavar="MODEL", type=click.Path(path_type=Path), help="Measure PyTorch and float of it too."
)
@click.option("--eval", "evaluation", metavar="DATA", help="Labelled samples to measure accuracy on.")
@click.option("--preprocess", metavar="PRESET", help="For image folders.")
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Batch size.")
@click.option("--threads", type=click.IntRange(min=0), default=0, help="Threads (0: the visible cores, two at most).")
@model_options
@json_option
@quiet_option
def command(folders: tuple[Path, ...], against: Path | None, as_json: bool, quiet: bool, **options: Any) -> int:
    """Measure artifacts again, side by side."""
    from normfuse.cli import render
    from normfuse.cli.opening import opened_model, opened_samples
    from normfuse.comparing import compare_artifacts

    shown = render.progress(quiet=quiet)
    evaluation = opened_samples(options.pop("evaluation"), options.pop("preprocess"), progress=shown)
    arch, trust = options.pop("arch"), options.pop("trust_pickle")
    found = compare_artifacts(
        folders,
        against=opened_model(against, arch=arch, trust_pickle=trust, progress=shown) if against else None,
        evaluation=evaluation,
        progress=shown,
        **options,
    )
    render.as_json(found) if as_json else render.comparison(found)
    return 0
