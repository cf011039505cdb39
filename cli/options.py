"""The options that commands share, spelled once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

__all__ = ["json_option", "model_options", "quiet_option"]

Command = TypeVar("Command", bound=Callable[..., Any])

json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on standard output.")
quiet_option = click.option("--quiet", "-q", is_flag=True, help="No progress bars and no talk on standard error.")


def model_options(command: Command) -> Command:
    """Add what is needed to read a model file."""
    arch = click.option("--arch", metavar="PACKAGE.MODULE:FACTORY", help="Builds the module for a state dict.")
    trust = click.option("--trust-pickle", is_flag=True, help="Unpickle MODEL although that runs code from it.")
    return arch(trust(command))


def data_options(command: Command) -> Command:
    """Add calibration and evaluation data."""
    calib = click.option(
        "--calib", metavar="DATA", help="Calibration samples: .npz, folder, or package.module:callable."
    )
    evaluate = click.option("--eval", "evaluation", metavar="DATA", help="Labelled samples to measure accuracy on.")
    preprocess = click.option(
        "--preprocess", metavar="PRESET", help="For image folders: a preset, or mean=..;std=..;size=.."
    )
    return calib(evaluate(preprocess(command)))


def output_option(command: Command) -> Command:
    """Add the output folder."""
    option = click.option(
        "-o", "--output", type=click.Path(path_type=Path, file_okay=False), required=True, help="The artifact's folder."
    )
    return option(command)
