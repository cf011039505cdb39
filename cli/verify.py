"""``normfuse verify``: are an artifact's files the ones that were written?"""

from __future__ import annotations

from pathlib import Path

import click

from normfuse.cli.options import json_option, quiet_option

__all__ = ["command"]


@click.command("verify")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@json_option
@quiet_option
def command(folder: Path, as_json: bool, quiet: bool) -> int:
    """Check that an artifact's files are the ones that were written."""
    from normfuse.artifact import verify_artifact
    from normfuse.cli import render

    problems = verify_artifact(folder)
    if as_json:
        render.as_json({"problems": problems})
    else:
        for text in problems or ["all files are the ones that were written"]:
            render.line(text)
    return 1 if problems else 0
