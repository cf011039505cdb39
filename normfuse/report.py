"""Facts about a compile as values: what each pass applied, what it refused and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum

__all__ = ["PassReport", "Reason", "Refusal"]


class Reason(Enum):
    """Why a match was found and left alone; the value is the sentence that users read."""

    SHARED = "another node reads it"
    NOT_CONSTANT = "the statistic is not constant"
    ONLINE = "its statistics are taken from the current input"
    SEVERAL_AXES = "it normalizes several axes at once, and only one of them holds the stream's channels"
    ZERO_PADDING = "zero padding does not commute with the shift"
    PADDED_VALUE = "padding with a number other than zero does not commute with it"
    NEGATIVE_SCALE = "a negative scale turns a maximum into a minimum"
    ZERO_SCALE = "a scale of zero has no inverse"
    RANGE = "the stream's channels would differ too much in scale"
    UNNORMED_TOKENS = "it meets tokens or channels that it does not hold for"
    NONLINEAR_READER = "a reader is not linear"
    STREAM_READER = "its output is the residual stream"
    FREE = "the norm in front of it applies it at no cost"
    GRAPH_OUTPUT = "it is an output of the model"
    AXIS = "its axis is not the axis of the linear map beside it"
    NO_LINEAR = "no linear map stands in front of what it meets"
    MODEL_INPUT = "it meets an input of the model"
    UNCENTRED = "what is written to the stream cannot be centred"
    EVERY_CHANNEL = "it needs every channel of the stream"
    APART = "its channels are cut apart or moved"
    CHANNEL_SCALE = "a scale per channel does not commute with a rotation"
    WRONG = "the float64 check failed, so the fold was undone"
    TRANSPOSED = "every output position of a transposed convolution sees other taps"
    GROUPED = "a grouped convolution is not added to another one"
    GEOMETRY = "their strides, dilations or kernel centres differ"
    MORE_WORK = "one map would be more work than the two"
    OVERFLOW = "the folded weights do not fit into their type"
    PROGRESSION = "its progressive replacement has not ended"
    UNSUPPORTED_TYPE = "its type cannot be quantized"
    NOT_STATIC = "its shape is not static"
    NO_KERNEL = "the target has no kernel for its codes"
    NO_RANGE = "no range was observed"
    TOO_SMALL = "it is too small for quantization to pay"
    NO_GAIN = "the quantized network would err more"
    NO_INTEGER_FORM = "it has no integer form, so it stays float between codes, as allowed"
    NOT_BY_TOKEN = "its codes keep one scale for the whole tensor"
    UNKNOWN_OPERATOR = "normfuse does not know the operator, so it stays float"


@dataclass(frozen=True, slots=True)
class Refusal:
    """A match that was found and left alone.

    ``node`` is the graph's name, ``layer`` the user's module path.
    """

    node: str
    reason: Reason
    detail: str = ""
    layer: str = ""

    def as_dict(self) -> dict[str, str]:
        """Return the refusal for JSON."""
        return {
            "node": self.node,
            "layer": self.layer,
            "reason": self.reason.name.lower(),
            "because": self.reason.value,
            "detail": self.detail,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class PassReport:
    """What one run of one pass did: counts per rule, refusals, details per site, seconds."""

    name: str
    applied: Mapping[str, int] = field(default_factory=dict)
    refused: tuple[Refusal, ...] = ()
    sites: tuple[Mapping[str, str], ...] = ()
    seconds: float = 0.0

    @property
    def changed(self) -> bool:
        """Whether the graph is different now."""
        return any(self.applied.values())

    def as_dict(self) -> dict[str, object]:
        """Return the report for JSON."""
        return {
            "name": self.name,
            "applied": dict(self.applied),
            "refused": [refusal.as_dict() for refusal in self.refused],
            "sites": [dict(site) for site in self.sites],
            "seconds": round(self.seconds, 3),
        }

    @staticmethod
    def count(rules: Iterable[str]) -> dict[str, int]:
        """Return how often each rule was applied."""
        return dict(Counter(rules))
