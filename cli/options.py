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
    evaluate = click.option("--eval", "evaluation", metavar="DATA", help="Labelled samples to measure accuracy on.")
    return calib_options(evaluate(command))


def calib_options(command: Command) -> Command:
    """Add calibration data alone."""
    calib = click.option(
        "--calib", metavar="DATA", help="Calibration samples: .npz, folder, or package.module:callable."
    )
    preprocess = click.option(
        "--preprocess", metavar="PRESET", help="For image folders: a preset, or mean=..;std=..;size=.."
    )
    return calib(preprocess(command))


def fold_options(command: Command) -> Command:
    """Add what to fold and how to check it; `opened_fold` reads them."""
    refresh = click.option(
        "--refresh-norms", is_flag=True, help="Estimate batch norms again from all samples before folding."
    )
    layer_norm = click.option(
        "--layer-norm",
        type=click.Choice(["rms", "keep", "crms"]),
        default="rms",
        show_default=True,
        help="rms: layer norm becomes RMS norm where everything written to its stream can be centred; "
        "crms: such a stream then loses its last channel, too.",
    )
    samples = click.option(
        "--samples", type=click.IntRange(min=1), default=2, show_default=True, help="Samples to check with."
    )
    seed = click.option("--seed", type=int, default=0, show_default=True, help="Seed of the random inputs.")
    return refresh(layer_norm(samples(seed(command))))


def scored_options(command: Command) -> Command:
    """Add what decides which network is scored, and quantized."""
    options = (
        click.option("--outputs", help="What outputs are for scores: auto (by their shape), classes, or values."),
        click.option(
            "--weight-widths", help="Of mixed bits: what weights may have (default: what the target gains from)."
        ),
        click.option("--activation-widths", help="Of mixed bits: what activations may have."),
        click.option("--weights", help="Codes of weights: symmetric or asymmetric (zero points per channel or group)."),
        click.option(
            "--rotate/--no-rotate",
            default=None,
            help="Turn streams and heads, exactly, where outputs gain (default: no).",
        ),
        click.option(
            "--equalize/--no-equalize",
            default=None,
            help="Scale channels, exactly, where quantized blocks gain (default: no).",
        ),
        click.option("--calibration", help="How ranges are chosen: auto, min-max, percentile, mse or entropy."),
        click.option("--samples", type=int, help="Use at most this many calibration samples (0: all)."),
        click.option("--seed", type=int, help="Seed of everything random."),
    )
    for option in reversed(options):
        command = option(command)
    return command


def engine_options(command: Command) -> Command:
    """Add how a target's engine is built."""
    options = (
        click.option("--body", help="Of trt: what computes where nothing is quantized: fp16 (default), bf16 or fp32."),
        click.option("--eight-bits", help="Of trt: whether eight bits are int8 (default) or fp8."),
        click.option("--build/--no-build", default=None, help="Of trt: build the engine (default), or the file alone."),
        click.option(
            "--via", help="Of trt: what the engine is built from: onnx (the file, default) or torch-tensorrt (32 bits)."
        ),
        click.option("--capability", help="Of TensorRT-RTX: what the engine runs on, as 8.9 (default: Ampere and on)."),
        click.option(
            "--shapes", help="Of trt: smallest, usual and largest shapes, as 'image=1x3x8x8,4x3x8x8,8x3x8x8; mask=...'."
        ),
        click.option("--workspace", type=int, help="Of trt: MiB that kernels may use (default: 4096)."),
        click.option("--builder-level", type=int, help="Of trt: the builder's effort, 0 to 5 (default: 3)."),
        click.option("--builder-seconds", type=float, help="Of trt: after which a build is given up (default: 3600)."),
        click.option("--timing-cache", help="Of trt: a file of kernels timed before, which the build adds to."),
        click.option(
            "--version-compatible/--no-version-compatible",
            default=None,
            help="Of trt: an engine for later releases too (default: no).",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def output_option(command: Command) -> Command:
    """Add the output folder."""
    option = click.option(
        "-o", "--output", type=click.Path(path_type=Path, file_okay=False), required=True, help="The artifact's folder."
    )
    return option(command)
