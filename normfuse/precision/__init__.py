"""Which codes activations and weights get: nearest, by second-order error feedback, or learned block by block."""

from normfuse.precision.decision import Quantization, round_all_to_nearest

__all__ = ["Quantization", "round_all_to_nearest"]
