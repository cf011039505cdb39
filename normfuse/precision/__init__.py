"""Which codes activations and weights get: nearest, by second-order error feedback, or learned block by block."""

from normfuse.precision.blockwise import BlockReport, refine_blockwise
from normfuse.precision.decision import Quantization, round_all_to_nearest
from normfuse.precision.effort import Effort, chunked, foresight, refinements
from normfuse.precision.equalization import choose_equalizations

__all__ = [
    "BlockReport",
    "Effort",
    "Quantization",
    "choose_equalizations",
    "chunked",
    "foresight",
    "refine_blockwise",
    "refinements",
    "round_all_to_nearest",
]
