"""The facade: model and samples in, a measured artifact out; the way of the data as one readable list."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Final

from normfuse.bench.accuracy import check_labels
from normfuse.bench.environment import default_threads
from normfuse.build import build_float
from normfuse.built import Built, Workspace, load
from normfuse.capturing import Examples, Model, capture_model, save
from normfuse.conclusion import FLOAT, conclude
from normfuse.data import Data, Samples, load_samples, survey_calibration, survey_evaluation
from normfuse.errors import CheckFailed, UsageError
from normfuse.feeding import bind, fixed_batch, random_samples, stream
from normfuse.graph import Graph
from normfuse.integer.rules import refuse_other_floats
from normfuse.loading import load_model
from normfuse.measure import Measured, compare_engines
from normfuse.progress import Progress, Silent
from normfuse.quant.target import BodyType, Target
from normfuse.quantizing import Quantizing
from normfuse.recipe import Recipe
from normfuse.target_engine import build_options, with_target_engine
from normfuse.typed_engine import checked_typed, typed

RANDOM: Final = "what stays in float32 was decided on random inputs: --calib decides it on yours"

__all__ = ["Built", "capture_model", "compile", "load", "save"]


def compile(  # noqa: PLR0913 - the facade: what a compile needs, by name
    model: Model,
    example_inputs: Examples | None = None,
    *,
    calibration: Data | None = None,
    evaluation: Data | None = None,
    recipe: Recipe | None = None,
    progress: Progress | None = None,
    resume: str | Path | None = None,
) -> Built:
    """Fold, quantize, verify and measure a model.

    Args:
        model: a module, an exported program, or the path of a model file.
        example_inputs: tensors to capture a module with, in the order of its inputs or by their names; else the first
            calibration sample serves.
        calibration: samples for the ranges; needed for 8 bits. A path as ``--calib`` takes it, an array or tensor, a
            mapping of them by input name, a list of single samples, or a function that returns such.
        evaluation: labelled samples for the accuracy, in the same forms; else the outputs are compared on the
            calibration samples.
        recipe: what to build and how.
        progress: shows what takes long.
        resume: a folder for what is finished of the calibration: a compile of the same model, samples and recipe that
            was killed goes on from there. ``Built.save`` removes it.

    Where the target's builder is missing or fails, ``Built.failure`` says why; nothing is raised, nothing is lost.

    Raises:
        CheckFailed: the folded model does not compute what the model does.
        NormfuseError: see ``normfuse.errors``; nothing is left behind.
    """
    recipe, shown = recipe or Recipe(), progress or Silent()
    threads = default_threads(recipe.threads)
    if isinstance(model, (str, Path)):
        model = load_model(model)
    samples, held = _samples(calibration, "calibration"), _samples(evaluation, "evaluation")
    if samples is None and not recipe.precision.is_float:
        raise UsageError(
            f"{recipe.bits} bits need calibration data",
            expected="samples like those the model will see",
            hint="--calib DATA (in Python: calibration=...), or --bits 32 (Recipe(bits=32)), which only folds",
        )
    with shown.task("capturing the model"):
        original = capture_model(model, example_inputs, samples)
    seen = bind(samples or random_samples(original, seed=recipe.seed), original)
    # Calibration samples have been seen: their labels say nothing about accuracy.
    judged = _bind_evaluation(held, original) if held else replace(seen, labels=None)
    # Shapes that do not fit are refused before minutes of work.
    options = None if recipe.target is Target.ONNX else build_options(recipe, original)
    source = stream(seen, original, limit=recipe.samples)
    used = None if samples is None else seen.first(recipe.samples or len(seen))
    told = [RANDOM] if samples is None and recipe.chosen_body is not BodyType.FP32 else []
    warnings = [*original.notes, *told, *_survey(used, judged if held else None, shown)]
    folder = Workspace()
    with _naming_floats_of_fewer_bits(original, recipe):
        floating = build_float(original, source, folder.model(FLOAT), threads=threads, progress=shown)
    engines, control = {FLOAT: floating}, None
    measured = Measured(engines=[floating.spec(FLOAT)], evaluation=judged, fixed_batch=fixed_batch(original))
    if not recipe.precision.is_float:
        resuming = None if resume is None else Path(resume)
        quantizing = Quantizing(
            recipe=recipe, samples=source, folder=folder, threads=threads, progress=shown, resume=resuming
        )
        total = min(len(seen), recipe.samples or len(seen))
        engine, control = quantizing.run(floating.graph, measured, total)
        engines[recipe.label] = engine
        warnings += engine.notes
    elif recipe.chosen_body is not BodyType.FP32:
        with shown.task("writing the typed engine"):
            engine = typed(replace(floating, checks=(), passes=()), source, recipe.chosen_body, threads=threads)
            engines[recipe.label] = checked_typed(engine, source, threads=threads)
    comparison = compare_engines(
        replace(
            measured,
            engines=[engine.spec(label) for label, engine in engines.items()],
            scores=control.scores if control else {},
        ),
        batch=recipe.batch,
        threads=threads,
        speed=recipe.measures_speed,
        progress=shown,
        min_speedup=recipe.wanted_speedup,
    )
    built = conclude(model, original, engines, comparison, recipe, folder, warnings=warnings, control=control)
    if options is not None:
        built = with_target_engine(built, options, shown)
    return replace(built, resume=resume)


@contextmanager
def _naming_floats_of_fewer_bits(original: Graph, recipe: Recipe) -> Iterator[None]:
    """Say of a model that its floats have fewer bits where these are what fails float32's check."""
    try:
        yield
    except CheckFailed:
        refuse_other_floats(original, "integers" if recipe.integer_only else "float32")
        raise


def _samples(data: Data | None, name: str) -> Samples | None:
    return None if data is None else load_samples(data, name=name)


def _bind_evaluation(samples: Samples, graph: Graph) -> Samples:
    """Bind before minutes of work what is needed after them."""
    bound = bind(samples, graph)
    if bound.labels is not None:
        check_labels(bound.labels, graph.output_specs[0].shape, where=bound.source)
    return bound


def _survey(calibration: Samples | None, evaluation: Samples | None, progress: Progress) -> list[str]:
    """Read all samples once, before minutes of work on them; return warnings."""
    found: list[str] = []
    for samples, survey in ((calibration, survey_calibration), (evaluation, survey_evaluation)):
        if samples is not None:
            with progress.task("reading the samples", len(samples)) as advance:
                found += survey(samples, advance)
    return list(dict.fromkeys(found))
