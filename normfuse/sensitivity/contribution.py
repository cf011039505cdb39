"""How much of the relevance passes every layer, and what that makes of its bits."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from normfuse.precision.chunks import samples_in
from normfuse.progress import Progress
from normfuse.sensitivity.relevance import relevance
from normfuse.sensitivity.sensitivity import Kind, Sensitivity, Tally
from normfuse.sensitivity.squared_errors import squared_errors
from normfuse.sensitivity.subject import Subject

__all__ = ["contributions", "relevance_score", "relevance_times_error"]


def contributions(subject: Subject, *, progress: Progress) -> tuple[dict[str, float], dict[str, float]]:
    """Return the share of every linear map in the relevance at the outputs of all, the mean over samples, and facts.

    Shares are taken sample by sample before they are averaged, since samples lose relevance unequally. Facts: the mean
    share that was conserved, and that constants took, and how many operators had no rule of their own. (Ours where
    LRP-QViT leaves it open: methods.md 5.5.)
    """
    total = torch.zeros(len(subject.maps), dtype=torch.float64)
    conserved = absorbed = 0.0
    defaulted = set[str]()
    with progress.task("propagating relevance", len(subject.chunks)) as advance:
        for chunk in subject.chunks:
            found = relevance(subject.graph, chunk, target=subject.target)
            none = torch.zeros_like(found.conserved)  # a map of constants alone has no relevance
            at_maps = torch.stack([found.absolute.get(node, none) for node in subject.maps])  # [maps, samples or 1]
            shares = at_maps / at_maps.sum(dim=0).clamp(min=torch.finfo(torch.float64).tiny)
            weight = samples_in(chunk) / shares.shape[1]
            total += weight * shares.sum(dim=1)
            conserved += weight * float(found.conserved.sum())
            absorbed += weight * float(found.absorbed.sum())
            defaulted |= {node.name for node in found.defaulted}
            advance(1)
    share = dict(zip((node.name for node in subject.maps), (total / subject.samples).tolist(), strict=True))
    facts = {"conserved": conserved / subject.samples, "absorbed": absorbed / subject.samples}
    return share, {**facts, "without_rule": float(len(defaulted))}


def relevance_score(subject: Subject, *, progress: Progress) -> Sensitivity:
    """Return a layer's share of the relevance times ``4^-bits``, the power of uniform rounding noise (methods.md 5.5).

    Weights and the activation that a map reads have its share; what several maps read has the mean of theirs.
    """
    share, facts = contributions(subject, progress=progress)
    tally = Tally()
    for name, amount in share.items():
        for bits in subject.weight_widths:
            tally.add(Kind.WEIGHT, name, bits, amount * 4.0**-bits)
    for name, amount in _of_activations(subject, share).items():
        for bits in subject.activation_widths:
            tally.add(Kind.ACTIVATION, name, bits, amount * 4.0**-bits)
    return tally.sensitivity("lrp", **facts)


def relevance_times_error(subject: Subject, *, progress: Progress) -> Sensitivity:
    """Return a layer's share of the relevance times the relative error that rounding leaves at its output (ours)."""
    share, facts = contributions(subject, progress=progress)
    errors, tally = squared_errors(subject, progress=progress), Tally()
    shares = {Kind.WEIGHT: share, Kind.ACTIVATION: _of_activations(subject, share)}
    for kind in Kind:
        for name, row in errors.relative[kind].items():
            for bits, error in row.items():
                tally.add(kind, name, bits, shares[kind][name] * error)
    return tally.sensitivity("lrp-error", **facts)


def _of_activations(subject: Subject, share: Mapping[str, float]) -> dict[str, float]:
    found = dict[str, float]()
    for request in subject.activations:
        shares = [share[reader.name] for reader in request.readers if reader.name in share]
        found[request.source.name] = sum(shares) / len(shares)
    return found
