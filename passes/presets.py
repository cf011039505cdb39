"""The one ordered list of passes, a reason per line; nothing else decides order."""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from normfuse.passes.canonicalize import Canonicalize
from normfuse.passes.compress_stream import CompressStream
from normfuse.passes.find_affines import FindAffines
from normfuse.passes.fold_affine_into_consumers import FoldAffineIntoConsumers
from normfuse.passes.fold_affine_into_producers import FoldAffineIntoProducers
from normfuse.passes.fold_constants import FoldConstants
from normfuse.passes.lower_affines import LowerAffines
from normfuse.passes.merge_linear_maps import MergeLinearMaps
from normfuse.passes.recentre_stream import RecentreStream
from normfuse.passes.recognize_norms import RecognizeNorms
from normfuse.passes.rescale_stream import RescaleStream
from normfuse.passes.rotate_heads import RotateHeads
from normfuse.passes.rotate_stream import RotateStream
from normfuse.passes.spell_out_attention import SpellOutAttention
from normfuse.passes.split_joint_projections import SplitJointProjections
from normfuse.pipeline import Pass, Phase
from normfuse.rewrite import Audit

__all__ = ["AFFINES", "CANONICAL", "FOLD", "LOWER", "PLAIN", "LayerNorms", "folds", "rotations"]

PLAIN: Final = Phase(
    "canonical",
    (
        FoldConstants(),  # gamma / sqrt(var + eps) becomes one constant, and x @ W.T a product with one
        Canonicalize(),  # rules below know one spelling per operation
        RecognizeNorms(),  # before the sums and products it is spelled with are taken for affines
    ),
)
"""For PyTorch, which has a kernel for whole attention."""

CANONICAL: Final = Phase(
    "canonical",
    (
        *PLAIN.passes,
        SplitJointProjections(),  # before attention is spelled out: its scale then meets q's own linear map
        SpellOutAttention(),  # constants first: a mask that is all true goes; its scale is an affine of q
    ),
)
"""For engines."""

AFFINES: Final = Phase("affines", (FindAffines(),))  # every affine is one node before any fold looks for it


class LayerNorms(StrEnum):
    """What becomes of the layer norms whose stream can be centred."""

    KEEP = "keep"  # layer norms, without gamma and beta
    RMS = "rms"
    CRMS = "crms"  # RMS norms of a stream without its last channel


def folds(*, audit: Audit | None = None, rescales: bool = True, layer_norms: LayerNorms = LayerNorms.KEEP) -> Phase:
    """Return the folds in order, each step looked over by ``audit``.

    ``rescales`` carries affines along the residual stream; ``layer_norms`` says what becomes of those whose
    stream can be centred.
    """
    passes: list[Pass] = [
        FoldAffineIntoProducers(audit=audit),  # always exact, so before the consumers get their chance
        FoldAffineIntoConsumers(audit=audit),  # what no producer took
    ]
    if rescales:
        passes.append(RescaleStream(audit=audit))  # the one that divides, so the last of these three
    passes.append(MergeLinearMaps(audit=audit))  # adapters have taken in their factor by now
    if layer_norms != LayerNorms.KEEP:
        passes.append(RecentreStream(audit=audit))  # reads bare norms: their gamma and beta have gone
    if layer_norms == LayerNorms.CRMS:
        passes.append(CompressStream(audit=audit))  # of what sums to zero one channel says nothing new
    return Phase("norms", tuple(passes))


FOLD: Final = Phase("norms", (*AFFINES.passes, *folds().passes))


def rotations(seed: int) -> Phase:
    """Return the rotations for activations of few bits; the order of the two does not matter."""
    streams = RotateStream(seed=seed)  # behind all folds: it reads streams without gammas
    return Phase("rotations", (streams, RotateHeads(seed=seed)))  # heads of attention spelled out


LOWER: Final = Phase("lower", (LowerAffines(),))  # the exporter knows no affine
