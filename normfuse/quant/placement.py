"""What a target wants quantized, as data; the targets' own values stand in ``normfuse.export.placement``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from normfuse.quant.integer_type import IntegerType

__all__ = ["Placement"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Types and places of quantizers for one target.

    Attributes:
        name: how reports call it.
        activation: codes of activations (per tensor).
        weight: codes of weights (per output channel, symmetric).
        attention_products: whether q k^T and the product with v run in integers.
        convolution_outputs: whether convolutions and the sums behind them write codes, not floats.
        smallest_inner: linear maps with fewer inputs per output stay float: they are too small to gain.
        session_config: onnxruntime session entries that the artifact needs to run as simulated.
        reason: why it is so, for the report.
    """

    name: str
    activation: IntegerType
    weight: IntegerType
    attention_products: bool = False
    convolution_outputs: bool = True
    smallest_inner: int = 8
    session_config: Mapping[str, str] = field(default_factory=dict)
    reason: str = ""
