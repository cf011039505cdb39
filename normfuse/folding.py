"""``fold``: every norm that can fold, folded and certified; the result is a model that PyTorch runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from normfuse.artifact import ArtifactWriter
from normfuse.bench.environment import describe_environment
from normfuse.capturing import Examples, Model, capture_model
from normfuse.certificate import TOLERANCE, Certifier, Remembered, SiteCheck, Step, difference
from normfuse.data import Samples, load_samples
from normfuse.errors import UsageError
from normfuse.feeding import bind, random_inputs, stream
from normfuse.graph import Graph, metadata, query
from normfuse.graph.affine import AFFINE
from normfuse.graph.edit import converted
from normfuse.graph.program import program_bytes, to_module
from normfuse.graph.text import operator_name
from normfuse.manifest import CERTIFICATE, FOLDED, FOLDED_MODEL
from normfuse.passes.presets import AFFINES, LOWER, PLAIN, LayerNorms, folds
from normfuse.pipeline import Fact, Pipeline
from normfuse.progress import Progress, Silent
from normfuse.refresh import refresh_norms
from normfuse.report import PassReport, Reason
from normfuse.rewrite.streams import CRMS_NORM

__all__ = ["FoldOptions", "Folded", "fold", "fold_captured", "fold_graph"]

FORMAT: Final = "normfuse certificate"
SCHEMA: Final = 1
CHECKED_SAMPLES: Final = 2
"""Samples that every step is checked with: each holds thousands of positions, and all values of each are kept."""

READY: Final = frozenset({Fact.CANONICAL, Fact.AFFINES})
NORMS: Final = ("batch_norm", "layer_norm", "rms_norm", "group_norm", "instance_norm")


@dataclass(frozen=True, slots=True)
class Folded:
    """A folded model: its graph, and what was folded into what, with the proof, as plain data."""

    graph: Graph
    certificate: dict[str, Any]

    @property
    def holds(self) -> bool:
        """Whether the whole model is what it was, no fold had to be undone, and no number became an infinity."""
        return bool(self.certificate["holds"])

    @property
    def module(self) -> nn.Module:
        """The folded model as a module in eval mode.

        It takes tensors as the original does and returns what it does: a tensor, or tuples, lists and dicts of them; a
        class of the original's own (a dataclass) is a dict by field. It can be saved, moved, compiled, exported and
        folded again.
        """
        return to_module(self.graph)

    def save(self, target: str | Path) -> None:
        """Write ``model.pt2`` (a torch.export archive) and ``certificate.json`` to a folder, whole or not at all.

        Raises:
            UsageError: the folder exists and is no artifact.
            BadInput: it cannot be written.
        """
        with ArtifactWriter(Path(target)) as writer:
            writer.add_bytes(FOLDED_MODEL, program_bytes(self.graph))
            writer.add_json(CERTIFICATE, self.certificate)
            writer.finish({"kind": FOLDED, "environment": describe_environment().as_dict()})


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldOptions:
    """How to fold.

    ``refresh_norms`` estimates batch norms' statistics again from all calibration samples before anything is folded;
    ``layer_norms`` says what becomes of those whose stream can be centred; every step is checked with ``samples``
    samples; ``seed`` is that of the random inputs where there are no samples.
    """

    refresh_norms: bool = False
    layer_norms: LayerNorms = LayerNorms.RMS
    samples: int = CHECKED_SAMPLES
    seed: int = 0


def fold(
    model: Model,
    example_inputs: Examples | None = None,
    *,
    calibration: Samples | str | Path | None = None,
    options: FoldOptions | None = None,
    progress: Progress | None = None,
) -> Folded:
    """Fold every norm that can fold, exactly, and certify each step in float64.

    Args:
        model: a module, an exported program, or the path of a model file; it is not changed.
        example_inputs: what to capture a module with: tensors in the order of ``forward``, one alone, or by name; else
            the first calibration sample serves.
        calibration: samples to check with (and to refresh with); else random inputs are made.
        options: what to fold and how to check it.
        progress: shows what takes long.

    Raises:
        UsageError: statistics are to be refreshed without calibration samples, or no sample is to be checked with.
        NormfuseError: see ``normfuse.errors``.
    """
    shown = progress or Silent()
    given = calibration if isinstance(calibration, Samples) or calibration is None else load_samples(calibration)
    _refuse_impossible(options or FoldOptions(), given)
    with shown.task("capturing the model"):
        original = capture_model(model, example_inputs, given)
    return fold_captured(original, given, options=options or FoldOptions(), progress=shown)


def fold_captured(original: Graph, given: Samples | None, *, options: FoldOptions, progress: Progress) -> Folded:
    """Fold a captured model; refreshed statistics are written into it, as the certificate is of the refreshed model.

    Raises:
        UsageError: as for `fold`.
        NormfuseError: see ``normfuse.errors``.
    """
    _refuse_impossible(options, given)
    if given is None:
        made = random_inputs(original, count=options.samples, seed=options.seed)
        return fold_graph(
            original, made, options=options, origin=f"random samples, seed {options.seed}", progress=progress
        )
    bound, refreshed = bind(given, original), 0
    if options.refresh_norms:
        refreshed = refresh_norms(original, stream(bound, original), total=len(bound), progress=progress)
    seen = list(islice(stream(bound, original)(), options.samples))
    folded = fold_graph(original, seen, options=options, origin=bound.source, progress=progress)
    folded.certificate["refreshed"] = refreshed
    return folded


def _refuse_impossible(options: FoldOptions, given: Samples | None) -> None:
    if options.samples < 1:
        raise UsageError(f"{options.samples} samples cannot check a fold", expected="FoldOptions(samples=1) or more")
    if options.refresh_norms and given is None:
        raise UsageError("norms cannot be refreshed without data", expected="calibration samples", hint="--calib DATA")


def fold_graph(
    original: Graph, samples: Sequence[Sequence[Tensor]], *, options: FoldOptions, origin: str, progress: Progress
) -> Folded:
    """Fold a graph: in float64, every step checked on the samples, and in the model's own type the same steps.

    Args:
        original: the captured model; it is not changed.
        samples: inputs to check with, in the order of the graph's inputs.
        options: what becomes of layer norms.
        origin: where the samples come from, for the certificate.
        progress: shows what takes long.
    """
    with progress.task("folding and checking every step"):
        graph = original.copy()
        reports = list(Pipeline(phases=(PLAIN,)).run(graph))
        before = _norms(graph)  # not of the original: norms written out by hand are recognized by now
        reports += Pipeline(phases=(AFFINES,), given=frozenset({Fact.CANONICAL})).run(graph)
        wide = converted(original, torch.float64)
        Pipeline(phases=(PLAIN, AFFINES)).run(wide)
        found = _affines(graph)
        folded = _fold_both(graph, wide, samples, layer_norms=options.layer_norms)
        if not _stays_finite(original, folded.own, samples):  # float16 ends at 65504, and a rescaled stream grows
            folded = _fold_both(graph, wide, samples, layer_norms=options.layer_norms, rescales=False)
        left, reasons = _affines(folded.own), folded.left(reports)
        Pipeline(phases=(LOWER,), given=READY).run(folded.own)
    with progress.task("comparing the models"):
        wide_samples = [[_wide(value) for value in sample] for sample in samples]
        error = _error(converted(original, torch.float64), folded.wide, wide_samples)
        own = _error(original, folded.own, samples)
    certificate = {
        "format": FORMAT,
        "schema": SCHEMA,
        "holds": bool(error <= TOLERANCE and not folded.undone and _stays_finite(original, folded.own, samples)),
        "samples": {"count": len(samples), "origin": origin},
        "tolerance": TOLERANCE,
        "error": {"float64": error, "own_type": own},
        "notes": list(original.notes),
        "norms": {"before": before, "after": _norms(folded.own)},
        "affines": {"found": found, "folded": found - left, "left": left},
        "sites": folded.sites(),
        "left": reasons,
        "refreshed": 0,
        "undone": [{"rule": rule, "node": node} for rule, node in sorted(folded.undone)],
    }
    # Training may go on with the original, in place: what is certified must not follow it.
    return Folded(folded.own.copy(with_constants=True), certificate)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Both:
    """The same steps taken in the model's own type and, checked, in float64."""

    own: Graph
    wide: Graph
    made: Sequence[PassReport]
    audited: Sequence[PassReport]
    checks: Sequence[SiteCheck]
    undone: frozenset[Step]

    def sites(self) -> list[dict[str, Any]]:
        """Join what the rules say of their steps with what the check said of them."""
        kept = {(check.rule, check.node): check for check in self.checks if check.holds}
        sites: list[dict[str, Any]] = []
        for site in (site for report in self.audited for site in report.sites):
            check = kept[(site["rule"], site["node"])]
            compared = list(check.compared)
            sites.append({**site, "absolute": check.absolute, "relative": check.relative, "compared": compared})
        return sites

    def left(self, before: Sequence[PassReport]) -> list[dict[str, str]]:
        """Return the last reason for every affine and norm that a pass left alone and no later one took."""
        still = {node.name: "affine" if query.is_call(node, AFFINE) else "norm" for node in self.own.nodes}
        wrong = {node for _, node in self.undone}
        others = {refusal.node: refusal for report in self.audited for refusal in report.refused}
        last = {refusal.node: refusal for report in (*before, *self.made) for refusal in report.refused}
        reasons = [
            # What was not asked for in the model's own type was refused in float64, and that reason counts.
            others.get(node, refusal) if refusal.reason is Reason.WRONG and node not in wrong else refusal
            for node, refusal in last.items()
            if node in still
        ]
        return [
            {"what": still[each.node], **replace(each, layer=each.layer or each.node).as_dict()} for each in reasons
        ]


def _fold_both(
    own: Graph, wide: Graph, samples: Sequence[Sequence[Tensor]], *, layer_norms: LayerNorms, rescales: bool = True
) -> _Both:
    """Fold in float64, every step checked, then take those steps in the model's own type, until both take the same.

    Float16 may take fewer steps, as its constants end at 65504; every round asks for fewer, so there is a last one.
    """
    undone, only = frozenset[Step](), None
    while True:
        trial, trial_wide = own.copy(), wide.copy()
        certifier = Certifier(trial_wide, samples, only=only)
        chosen = partial(folds, rescales=rescales, layer_norms=layer_norms)
        audited = Pipeline(phases=(chosen(audit=certifier),), given=READY).run(trial_wide)
        remembered = Remembered(certifier.kept)
        made = Pipeline(phases=(chosen(audit=remembered),), given=READY).run(trial)
        undone |= certifier.undone
        if remembered.taken == certifier.kept:
            return _Both(own=trial, wide=trial_wide, made=made, audited=audited, checks=certifier.checks, undone=undone)
        only = remembered.taken


def _wide(value: Tensor) -> Tensor:
    return value.double() if value.is_floating_point() else value


def _affines(graph: Graph) -> int:
    return sum(query.is_call(node, AFFINE) for node in graph.nodes)


def _norms(graph: Graph) -> dict[str, int]:
    """Return how many norms of each kind a graph computes."""
    names = Counter(operator_name(node.target) for node in graph.nodes if node.op == "call_function")
    found = {kind: sum(count for name, count in names.items() if kind in name) for kind in NORMS}
    found[CRMS_NORM] = sum(metadata.noted(node, CRMS_NORM) is not None for node in graph.nodes)
    return {kind: count for kind, count in found.items() if count}


def _error(expected: Graph, found: Graph, samples: Sequence[Sequence[Tensor]]) -> float:
    """Return the largest difference of any output, relative to its largest magnitude (inf: not comparable)."""
    worst = 0.0
    for sample in samples:
        for ours, reference in zip(found.run(*sample), expected.run(*sample), strict=True):
            worst = max(worst, difference(ours, reference)[1])
    return worst


def _stays_finite(expected: Graph, found: Graph, samples: Sequence[Sequence[Tensor]]) -> bool:
    """Return whether every number that the original returns is a number in the folded model too."""
    pairs = [zip(found.run(*sample), expected.run(*sample), strict=True) for sample in samples]
    return all(bool((ours.isfinite() | ~reference.isfinite()).all()) for pair in pairs for ours, reference in pair)
