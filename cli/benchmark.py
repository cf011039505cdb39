"""``normfuse benchmark``: artifacts measured again, side by side, and against the model they come from."""

from __future__ import annotations

from collections.abc import Sequence
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
@click.option("--batch", type=click.IntRange(min=1), help="Batch size (1; with --engine that of its usual shape).")
@click.option("--engine", is_flag=True, help="Run the artifacts' TensorRT engines on a GPU, and nothing else.")
@click.option("--trust-engine", is_flag=True, help="Run engines that were built elsewhere: they are native code.")
@click.option("--threads", type=click.IntRange(min=0), default=0, help="Threads (0: the visible cores, two at most).")
@model_options
@json_option
@quiet_option
@click.pass_context
def command(
    context: click.Context,
    /,
    folders: tuple[Path, ...],
    against: Path | None,
    engine: bool,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> int:
    """Measure artifacts again, side by side."""
    trust_engine, batch = options.pop("trust_engine"), options.pop("batch")
    _refuse_misplaced(context, engine)
    if engine:
        return _engines(folders, batch=batch, trust=trust_engine, as_json=as_json, quiet=quiet)
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
        batch=batch or 1,
        progress=shown,
        **options,
    )
    render.as_json(found) if as_json else render.comparison(found)
    return 0


def _refuse_misplaced(context: click.Context, engine: bool) -> None:
    """Refuse options that mean nothing: engines are timed on random inputs, beside the first of them."""
    from normfuse.errors import UsageError

    allowed = {"folders", "engine", "trust_engine", "batch", "as_json", "quiet"}
    given = [
        parameter.opts[0]
        for parameter in context.command.params
        if context.get_parameter_source(parameter.name or "") is click.core.ParameterSource.COMMANDLINE
        and (parameter.name not in allowed if engine else parameter.name == "trust_engine")
    ]
    if given:
        raise UsageError(
            f"{' and '.join(given)} cannot stand {'beside' if engine else 'without'} --engine",
            where="normfuse benchmark",
            expected="artifacts whose engines are measured, the first of which the others are held against",
            hint="another artifact, compiled with --bits 32, in place of --against" if engine else "--engine",
        )


def _engines(folders: Sequence[Path], *, batch: int | None, trust: bool, as_json: bool, quiet: bool) -> int:
    from normfuse.cli import render
    from normfuse.comparing import compare_built_engines
    from normfuse.running_engines import differing_outputs

    found = compare_built_engines(folders, batch=batch, trust=trust, progress=render.progress(quiet=quiet))
    render.as_json(found) if as_json else render.engine_runs(found)
    if (differing := differing_outputs(found)) is not None:
        raise differing
    return 0
