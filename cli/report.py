"""``normfuse report``: an artifact's report as it was printed, or a Triton model repository that serves it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from normfuse.cli.options import json_option, quiet_option
from normfuse.errors import UsageError

__all__ = ["command"]


@click.command("report")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "--triton-repository",
    "repository",
    metavar="OUT",
    type=click.Path(path_type=Path, file_okay=False),
    help="Write OUT/NAME for Triton Inference Server instead.",
)
@click.option("--name", help="The model's name (default: the folder's).")
@click.option(
    "--max-batch",
    "largest_batch",
    type=click.IntRange(min=0),
    help="Put requests together up to this batch (default: 8 where all tensors share a free first axis; 0: never).",
)
@click.option("--instances", type=click.IntRange(min=1), help="Instances of the model (default: 1).")
@click.option("--engine/--no-engine", default=None, help="Serve model.engine (default: where Triton can).")
@click.option("--trust-engine", is_flag=True, default=None, help="Serve an engine that was built elsewhere, too.")
@json_option
@quiet_option
def command(folder: Path, repository: Path | None, as_json: bool, quiet: bool, **options: Any) -> int:
    """Show an artifact's report again, after every file was checked, or write a Triton model repository."""
    from normfuse.cli import render
    from normfuse.inspection import read_report
    from normfuse.triton_repository import Serving, write_repository

    given = {name: value for name, value in options.items() if value is not None}
    if repository is None:
        if given:
            raise UsageError(
                "--name, --max-batch, --instances, --engine and --trust-engine say how to serve a model",
                where="normfuse report",
                expected="--triton-repository OUT with them",
            )
        found = read_report(folder)
        render.as_json(found) if as_json else render.written_report(found, folder)
        return 0
    found = write_repository(folder, repository, Serving(**given)).as_dict()
    render.as_json(found) if as_json else render.repository(found)
    return 0
