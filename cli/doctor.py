"""``normfuse doctor``: what is installed, what this processor can do, and what is missing."""

from __future__ import annotations

import click

from normfuse.cli.options import json_option, quiet_option

__all__ = ["command"]


@click.command("doctor")
@json_option
@quiet_option
def command(as_json: bool, quiet: bool) -> int:
    """Show what is installed, what this processor can do, and what is missing."""
    from normfuse.cli import render
    from normfuse.diagnosis import diagnose

    found = diagnose()
    render.as_json(found) if as_json else render.diagnosis(found)
    return 0 if found["ok"] else 5
