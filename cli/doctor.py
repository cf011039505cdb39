"""``normfuse doctor``: is what is installed enough, does it work, and what can this processor do?"""

from __future__ import annotations

import click

from normfuse.cli.options import json_option, quiet_option
from normfuse.errors import CheckFailed, MissingDependency

__all__ = ["command"]


@click.command("doctor")
@json_option
@quiet_option
def command(as_json: bool, quiet: bool) -> int:
    """Check what is installed, compile and run a small model, and show what this processor can do."""
    from normfuse.cli import render
    from normfuse.diagnosis import diagnose

    found = diagnose(render.progress(quiet=quiet))
    render.as_json(found) if as_json else render.diagnosis(found)
    if found["missing"]:
        return MissingDependency.exit_code
    return 0 if found["ok"] else CheckFailed.exit_code
