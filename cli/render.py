"""The only place that prints: results on standard output, talk and progress on standard error."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table

from normfuse.errors import NormfuseError
from normfuse.progress import Advance

__all__ = ["ShownProgress", "as_json", "error", "table", "talk"]


def as_json(value: Mapping[str, Any] | Sequence[Any]) -> None:
    """Print a value as JSON."""
    print(json.dumps(value, indent=2, sort_keys=False, default=str))


def talk(text: str) -> None:
    """Say something that is no result."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(text, markup=False)


def error(problem: NormfuseError) -> None:
    """Show an error: what, where, expected, what to do."""
    talk(f"error: {problem}")


def line(text: str = "") -> None:
    """Print one line of the result."""
    Console(highlight=False, soft_wrap=True).print(text, markup=False)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table; numbers stand to the right."""
    cells = [[_cell(value) for value in row] for row in rows]
    drawn = Table(title=title, title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        numeric = bool(cells) and all(row[index][:1] in "0123456789-+–" for row in cells if row[index])
        drawn.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in cells:
        drawn.add_row(*row)
    console = Console(highlight=False)
    console.width = max(console.width, 100) if not console.is_terminal else console.width
    console.print(drawn, markup=False)


def _cell(value: object) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class ShownProgress:
    """Draws each task as a bar on standard error."""

    @contextmanager
    def task(self, label: str, total: int | None = None) -> Iterator[Advance]:
        """Show a bar (or a pulse, where the length is unknown) until the context ends."""
        columns = (TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Bars(*columns, console=Console(stderr=True), transient=False) as bars:
            shown = bars.add_task(label, total=total)
            yield lambda steps: bars.advance(shown, steps)
            if total is None:
                bars.update(shown, total=1, completed=1)
