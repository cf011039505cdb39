"""The examples of docs/integer-ops.md run as they stand and give what stands beside them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "docs" / "integer-ops.md"


def statements(page: str) -> Iterator[tuple[str, bool, str]]:
    """Yield every statement of the page, whether it is an expression, and the result that is written behind it."""
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        lines = block.splitlines()
        for each in ast.parse(block).body:
            assert each.end_lineno is not None
            source = "\n".join(lines[each.lineno - 1 : each.end_lineno])
            yield source, isinstance(each, ast.Expr), source.rpartition("  # ")[2]


def test_every_example() -> None:
    names = dict[str, Any]()
    compared = 0
    for source, is_expression, result in statements(PAGE.read_text(encoding="utf-8")):
        if is_expression:
            assert eval(source, names).tolist() == ast.literal_eval(result), source
            compared += 1
        else:
            exec(source, names)
    assert compared > 20
