"""What a target wants quantized, as data; the targets' own values stand in ``normfuse.export.placement``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from normfuse.quant.float_type import CodeType
from normfuse.quant.granularity import dividing_group
from normfuse.quant.integer_type import INT8_NARROW, IntegerType

__all__ = ["Placement"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Types and places of quantizers for one target.

    Attributes:
        name: how reports call it.
        activation: codes of activations (per tensor); None leaves them float, behind weights that are codes.
        symmetric_activations: whether zero points of activations are 0 (their codes are signed then).
        is_dynamic: whether scales of activations are found while the engine runs, one per row and group of the weight
            that reads them. Then only linear maps with groups read codes.
        model_input: codes of what enters the model (images have 8 bits anyway); None: those of activations.
        written: codes of what convolutions and sums write and no product reads: kernels need codes there, but low bits
            save nothing; None: those of activations.
        weight: codes of weights (per output channel).
        weight_is_symmetric: whether their zero points are 0. They always are where nothing but a scale per channel
            stands behind float activations.
        weight_group: the most inputs of a linear map that share a scale; None: all of them.
        several_groups: whether one group alone is none: the target has kernels for two and more.
        biases_stay_float: whether biases are added as floats, behind products of codes.
        table: codes of embedding and position tables: 8 bits, a scale per channel or row, or fewer in groups; None
            leaves them float.
        attention_operands: whether what the products of attention read are codes too.
        head_scales: whether those operands may have one scale per head. For simulation: products of per-tensor codes
            are what kernels run.
        logarithmic_softmax: whether what softmax makes may have codes on a logarithmic scale. For simulation: no
            runtime that normfuse writes for multiplies them.
        convolution_outputs: whether convolutions and the sums behind them write codes, not floats.
        convolution_skips: whether what is added to a convolution's output has codes, the output none.
        quantized_convolutions: whether convolutions compute with codes, as linear maps do.
        smallest_inner: linear maps with fewer inputs per output stay float. Measured with onnxruntime 1.31 on x86
            with VNNI, one thread, 1000 rows to 64 outputs, quantizer included: 1 to 4 inputs run at 0.91 to 0.96 of
            float's speed, 7 and 8 break even, 16 gain 1.2.
        standard_operators: whether the target knows the operators of the ONNX standard alone.
        session_config: onnxruntime session entries that the artifact needs to run as simulated.
        reason: why it is so, for the report.
    """

    name: str
    activation: CodeType | None
    is_dynamic: bool = False
    weight: CodeType
    symmetric_activations: bool = False
    model_input: CodeType | None = None
    written: CodeType | None = None
    weight_is_symmetric: bool = True
    weight_group: int | None = None
    several_groups: bool = False
    biases_stay_float: bool = False
    table: IntegerType | None = INT8_NARROW
    attention_operands: bool = False
    head_scales: bool = False
    logarithmic_softmax: bool = False
    convolution_outputs: bool = True
    convolution_skips: bool = False
    quantized_convolutions: bool = True
    smallest_inner: int = 8
    standard_operators: bool = False
    session_config: Mapping[str, str] = field(default_factory=dict)
    reason: str = ""

    def group_of(self, inputs: int) -> int | None:
        """Return how many of a linear map's inputs share a scale: a power of two that divides them; None: all."""
        if self.weight_group is None:
            return None
        found = dividing_group(inputs, self.weight_group)
        return dividing_group(inputs, inputs // 2) if self.several_groups and found == inputs else found
