"""What fewer bits of every layer are expected to cost, as a file: computed once, found again by content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Final

from torch import fx

from normfuse.build import FOLDING
from normfuse.capturing import Examples, Model, capture_model
from normfuse.checkpoint import Checkpoint, calibration_key
from normfuse.data import Data, load_samples
from normfuse.errors import UsageError
from normfuse.export.placement import onnx_placement
from normfuse.feeding import bind, stream
from normfuse.graph import query
from normfuse.loading import load_model
from normfuse.prepare_subject import prepare_subject
from normfuse.progress import Progress, Silent
from normfuse.quant.score_method import DEFAULT_SCORE, ScoreMethod
from normfuse.recipe import Recipe
from normfuse.runtime.instruction_set import detect_instruction_set
from normfuse.sensitivity.keeping import FORGETFUL
from normfuse.sensitivity.methods import scores_of
from normfuse.sensitivity.sensitivity import Kind, Sensitivity
from normfuse.sensitivity.subject import Subject
from normfuse.strict_json import strict_json

__all__ = ["score_model"]

FORMAT: Final = "normfuse sensitivity 1"
SEAL: Final = "sha256"


def score_model(  # noqa: PLR0913 - as ``compile``: what it needs, by name
    model: Model,
    example_inputs: Examples | None = None,
    *,
    calibration: Data | None,
    recipe: Recipe,
    known: Path | None = None,
    resume: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Return the sensitivity of every layer of a model, as plain data (what ``sensitivity.json`` holds).

    Args:
        model: a module, an exported program, or the path of a model file.
        example_inputs: tensors to capture a module with.
        calibration: samples; at most 64 are scored.
        recipe: with mixed bits and one score.
        known: a file that an earlier run may have written: of the same model, samples and choices it is the answer.
        resume: a folder for what is finished of long scores; to be removed when the answer is kept
            (``remove_checkpoint``).
        progress: shows what takes long.

    Raises:
        NormfuseError: see ``normfuse.errors``.
    """
    if calibration is None:
        raise UsageError(
            "a score needs calibration data", expected="samples like those the model will see", hint="--calib DATA"
        )
    if recipe.score == DEFAULT_SCORE:
        names = ", ".join(method.value for method in ScoreMethod)
        raise UsageError("one score is needed", where="recipe", expected=names, hint="--method curvature")
    shown = progress or Silent()
    if isinstance(model, (str, Path)):
        model = load_model(model)
    samples = load_samples(calibration, name="calibration")
    with shown.task("capturing the model"):
        graph = capture_model(model, example_inputs, samples)
    source = stream(bind(samples, graph), graph, limit=recipe.samples)
    with shown.task("folding"):
        FOLDING.run(graph)
    level = detect_instruction_set().value
    key = calibration_key(graph, source, _choices(recipe, level))
    if known is not None and (found := _read(known, key)) is not None:
        return found
    placement_of = partial(onnx_placement, level, weights=recipe.weights)
    ready = prepare_subject(graph, source, recipe=recipe, placement_of=placement_of, progress=shown)
    keeper = FORGETFUL if resume is None else Checkpoint(resume, key)
    (score,) = scores_of(ready.subject, recipe.chosen_scores, seed=recipe.seed, progress=shown, keeper=keeper)
    return _sealed(_as_dict(ready.subject, score, key))


def _choices(recipe: Recipe, level: str) -> dict[str, object]:
    names = ("score", "weights", "calibration", "seed", "rotate", "equalize", "outputs")
    chosen = {name: getattr(recipe, name) for name in names}
    return {"format": FORMAT, "processor": level, "widths": recipe.widths, **chosen}


def _read(path: Path, key: Mapping[str, str]) -> dict[str, Any] | None:
    """Return what a file holds if it has this key and is as it was written."""
    with suppress(OSError, ValueError, AttributeError, RecursionError):
        found = json.loads(path.read_text(encoding="utf-8"))
        rest = {name: value for name, value in found.items() if name != SEAL}
        if found.get("format") == FORMAT and found.get("key") == dict(key) and found == _sealed(rest):
            return dict(found)
    return None


def _sealed(found: dict[str, Any]) -> dict[str, Any]:
    """Return plain data with the SHA-256 of its JSON: of a file that was cut or changed it is another."""
    return {**found, SEAL: hashlib.sha256(strict_json(found).encode()).hexdigest()}


def _layers_of(readers: Sequence[fx.Node]) -> str:
    """Return the layers that read an activation: it has no name of its own that a user knows."""
    return ", ".join(dict.fromkeys(query.layer_of(reader) or reader.name for reader in readers))


def _as_dict(subject: Subject, score: Sensitivity, key: Mapping[str, str]) -> dict[str, Any]:
    layers = {node.name: query.layer_of(node) or node.name for node in subject.maps}
    layers |= {each.source.name: _layers_of(each.readers) for each in subject.activations}
    rows = [(kind, name, row) for kind in Kind for name, row in score.of(kind).items()]
    total = sum(max(row.values(), default=0.0) for *_, row in rows)
    shares = [
        {
            "layer": layers[name],
            "kind": kind.value,
            "node": name,
            "damage": {str(bits): cost for bits, cost in row.items()},
            "share": max(row.values(), default=0.0) / total if total > 0 else 0.0,
        }
        for kind, name, row in rows
    ]
    facts = {"format": FORMAT, "key": dict(key), "method": score.method, "facts": dict(score.facts)}
    return {**facts, "samples": subject.samples, "layers": shares}
