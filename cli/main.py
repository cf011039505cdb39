"""``normfuse``: the group of commands and the edge where errors become messages and exit codes."""

from __future__ import annotations

import os
import signal
import sys
from typing import Final

import click

from normfuse import __version__
from normfuse.errors import InternalError, NormfuseError

__all__ = ["cli", "main"]

INTERRUPTED: Final = 130
TERMINATED: Final = 143

COMMANDS: Final = {
    "compile": "Fold, quantize, verify and measure MODEL; write the artifact to a folder.",
    "fold": "Fold every norm of MODEL that can fold; write the model and its certificate to a folder.",
    "score": "Say what fewer bits of every layer of MODEL cost.",
    "benchmark": "Measure artifacts again, side by side.",
    "inspect": "Show what a model holds and what would be folded, or what an artifact is.",
    "verify": "Check that an artifact's files are the ones that were written.",
    "report": "Show an artifact's report again, or write a Triton model repository that serves it.",
    "doctor": "Check what is installed, compile and run a small model, and show what this processor can do.",
}


class LazyGroup(click.Group):
    """A group that imports a command when it is called, so that ``--help`` is instant."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order of the work."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the file of the command."""
        if cmd_name not in COMMANDS:
            return None
        from importlib import import_module

        command: click.Command = import_module(f"normfuse.cli.{cmd_name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="normfuse")
def cli() -> None:
    """From a trained PyTorch model to a smaller, faster, measured inference engine."""


def main() -> None:
    """Run the command line and exit with architecture's codes (0, 1, 2, 3, 4, 5, 70, 130, 143)."""
    from normfuse.cli import render

    stdout = sys.stdout
    signal.signal(signal.SIGTERM, _terminate)
    try:
        code = cli.main(standalone_mode=False)
    except NormfuseError as error:
        render.error(error)
        code = error.exit_code
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        render.talk("interrupted")
        code = INTERRUPTED
    except SystemExit:
        # Where the reader of its help is gone, click replaces the stream and exits; render looks after the rest.
        if sys.stdout is stdout:
            raise
        code = 0
    except Exception as error:
        if os.environ.get("NORMFUSE_TRACEBACK"):
            raise
        render.error(InternalError(f"{type(error).__name__}: {error}", where="set NORMFUSE_TRACEBACK=1 to see it all"))
        code = InternalError.exit_code
    sys.exit(code or 0)


def _terminate(*_: object) -> None:
    """End as schedulers, ``timeout`` and containers ask for, but with what was left on the way removed."""
    sys.exit(TERMINATED)


if __name__ == "__main__":
    main()
