"""The refinements that levers stand for, in the order in which they are tried."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from normfuse.precision.attention_codes import scale_heads, take_logarithms
from normfuse.precision.blockwise import Refinement
from normfuse.precision.error_feedback import ErrorFeedback, correct_biases, feed_back_errors, refit_affines
from normfuse.precision.reconstruction import AFFINE_TUNING, Reconstruction, Rounding, reconstruct
from normfuse.quant.levers import Levers
from normfuse.quant.placement import Placement

__all__ = ["refinements", "refinements_at_once"]


def refinements(levers: Levers, *, seed: int, placement: Placement | None = None) -> dict[str, Refinement]:
    """Return what is tried on every block, by name, in order; codes of another kind where the placement has them."""
    found = _other_codes(placement)
    if levers.error_feedback:
        chosen = ErrorFeedback(asymmetric=levers.asymmetric_correction, descends=levers.coordinate_descent)
        found["error feedback"] = partial(feed_back_errors, chosen=chosen)
    if levers.bias_correction:
        found["bias correction"] = correct_biases
    if levers.affine_refit:
        found["affine refit"] = refit_affines
    if levers.reconstruction:
        found["reconstruction"] = partial(reconstruct, chosen=_reconstruction(levers, seed))
    return found


def refinements_at_once(levers: Levers, *, seed: int) -> dict[str, Refinement]:
    """Return what is tried on the whole network after its blocks, by name, in order."""
    if not levers.affine_tuning:
        return {}
    return {"affine tuning": partial(reconstruct, chosen=replace(AFFINE_TUNING, seed=seed))}


def _reconstruction(levers: Levers, seed: int) -> Reconstruction:
    found = Reconstruction(seed=seed)
    if levers.soft_rounding:
        found = replace(found, rounding=Rounding.SOFT)
    return found if levers.drop else replace(found, drop=0.0)


def _other_codes(placement: Placement | None) -> dict[str, Refinement]:
    """Return what may replace one uniform scale per tensor, if the placement has it."""
    found: dict[str, Refinement] = {}
    if placement is not None and placement.head_scales:
        found["head scales"] = scale_heads
    if placement is not None and placement.logarithmic_softmax:
        found["log2 codes"] = partial(take_logarithms, per_octave=1)
        found["log sqrt 2 codes"] = partial(take_logarithms, per_octave=2)
    return found
