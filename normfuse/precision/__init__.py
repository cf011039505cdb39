"""Which codes activations and weights get: nearest, by second-order error feedback, or learned block by block."""

from normfuse.precision.blockwise import BlockReport, refine_blockwise
from normfuse.precision.chunks import chunk_size, chunked, samples_in, split
from normfuse.precision.decision import Quantization, round_all_to_nearest
from normfuse.precision.equalization import choose_equalizations
from normfuse.precision.refinements import refinements, refinements_at_once

__all__ = [
    "BlockReport",
    "Quantization",
    "choose_equalizations",
    "chunk_size",
    "chunked",
    "refine_blockwise",
    "refinements",
    "refinements_at_once",
    "round_all_to_nearest",
    "samples_in",
    "split",
]
