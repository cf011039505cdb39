"""JSON that every reader takes: floats that it does not have (NaN, infinite) are written as null."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

__all__ = ["strict_json"]


def strict_json(value: object) -> str:
    """Return the value as JSON, on lines of its own."""
    return json.dumps(_strict(value), indent=1, allow_nan=False) + "\n"


def _strict(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _strict(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(inner) for inner in value]
    return value
