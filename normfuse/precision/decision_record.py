"""A decision as plain facts and named tensors, and back: how it is written to a file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from torch import Tensor

from normfuse.precision.decision import Quantization
from normfuse.quant import ActivationParams, DynamicParams, IntegerType, LogarithmicParams, QuantParams, RoundedWeight
from normfuse.quant.float_type import code_type
from normfuse.quant.granularity import Granularity, PerChannel, PerGroup, PerTensor

__all__ = ["decision_from_record", "decision_record"]

GRANULARITIES: Final = {kind.__name__: kind for kind in (PerTensor, PerChannel, PerGroup)}


def decision_record(decided: Quantization) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return facts that JSON takes, and the tensors that they name."""
    tensors = dict[str, Tensor]()

    def params(each: ActivationParams, name: str) -> dict[str, Any]:
        if isinstance(each, DynamicParams):
            return {"size": each.size}
        tensors[f"{name}.scale"], kind = each.scale, each.granularity
        logarithm = None
        if isinstance(each, LogarithmicParams):
            logarithm = [each.per_octave, each.top_is_zero]
        else:
            tensors[f"{name}.zero_point"] = each.zero_point
        places = [getattr(kind, place) for place in kind.__slots__]
        return {
            "type": str(each.type),
            "granularity": [type(kind).__name__, *places],
            "logarithm": logarithm,
        }

    activations = {name: params(each, f"activation {name}") for name, each in decided.activations.items()}
    weights = dict[str, Any]()
    for name, weight in decided.weights.items():
        weights[name] = {**params(weight.params, f"weight {name}"), "has_bias": weight.bias is not None}
        tensors[f"weight {name}.codes"] = weight.codes
        if weight.bias is not None:
            tensors[f"weight {name}.bias"] = weight.bias.detach()
    return {"activations": activations, "weights": weights}, tensors


def decision_from_record(facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Quantization:
    """Return the decision that ``decision_record`` was made of."""

    def uniform(each: Mapping[str, Any], name: str) -> QuantParams:
        return QuantParams(
            scale=tensors[f"{name}.scale"],
            zero_point=tensors[f"{name}.zero_point"],
            type=code_type(each["type"]),
            granularity=_granularity(*each["granularity"]),
        )

    def activation(each: Mapping[str, Any], name: str) -> ActivationParams:
        if "size" in each:
            return DynamicParams(size=each["size"])
        if each["logarithm"] is None:
            return uniform(each, name)
        type_ = code_type(each["type"])
        assert isinstance(type_, IntegerType)
        per_octave, top_is_zero = each["logarithm"]
        granularity = _granularity(*each["granularity"])
        assert not isinstance(granularity, PerGroup)
        return LogarithmicParams(
            scale=tensors[f"{name}.scale"],
            type=type_,
            per_octave=per_octave,
            top_is_zero=top_is_zero,
            granularity=granularity,
        )

    def weight(each: Mapping[str, Any], name: str) -> RoundedWeight:
        bias = tensors[f"{name}.bias"] if each["has_bias"] else None
        return RoundedWeight(codes=tensors[f"{name}.codes"], params=uniform(each, name), bias=bias)

    return Quantization(
        activations={name: activation(each, f"activation {name}") for name, each in facts["activations"].items()},
        weights={name: weight(each, f"weight {name}") for name, each in facts["weights"].items()},
    )


def _granularity(name: str, *places: int) -> Granularity:
    return GRANULARITIES[name](*places)
