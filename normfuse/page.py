"""Draws the report as one self-contained HTML page."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from typing import Any

__all__ = ["render_page"]


def render_page(report: Mapping[str, Any]) -> str:
    """Return the page."""
    return f"<!doctype html><pre>{escape(json.dumps(report, indent=1))}</pre>"
