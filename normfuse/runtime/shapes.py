"""The sizes that an engine is built for: as the command line writes them, and for what a model leaves open."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, Protocol

from normfuse.errors import UsageError

__all__ = ["Shapes", "check_shapes", "default_shapes", "parse_shapes"]

Shapes = tuple[Sequence[int], Sequence[int], Sequence[int]]
"""The smallest, the usual and the largest shape of an input."""

Sizes = tuple[int, int, int]
"""The smallest, the usual and the largest size of an axis."""

EXAMPLE: Final = "image=1x3x224x224,8x3x224x224,32x3x224x224"
FORM: Final = f"NAME=SMALLEST,USUAL,LARGEST, or NAME=SHAPE; several inputs apart by ;, as in {EXAMPLE}"
SHAPE: Final = re.compile(r"[1-9][0-9]*(x[1-9][0-9]*)*")
LARGEST_SIZE: Final = 2**31 - 1
USUAL_LARGEST_BATCH: Final = 8


class Input(Protocol):
    """An input of a model: an axis of any size is None or a name."""

    @property
    def name(self) -> str:
        """Its name in the file."""

    @property
    def shape(self) -> Sequence[int | str | None]:
        """Its sizes."""


def parse_shapes(text: str) -> dict[str, Shapes]:
    """Return the shapes by input of ``"image=1x3x8x8,4x3x8x8,8x3x8x8; mask=1x9,4x9,8x9"``.

    One shape alone is the smallest, the usual and the largest.

    Raises:
        UsageError: the text has another form, or the shapes are not in order.
    """
    found: dict[str, Shapes] = {}
    for part in text.split(";"):
        name, equals, shapes = (piece.strip() for piece in part.rpartition("="))
        if not (name and equals):
            raise UsageError(f"{part.strip()!r} gives no input its shapes", where=text, expected=FORM)
        if name in found:
            raise UsageError(f"the shapes of {name} are given twice", where=text, expected=FORM)
        found[name] = _three([_shape(each.strip(), text) for each in shapes.split(",")], name, text)
        check_shapes(name, found[name])
    return found


def check_shapes(name: str, shapes: Shapes) -> None:
    """Refuse shapes that no profile can have.

    Raises:
        UsageError: a size is less than 1 or more than 2^31 - 1, the ranks differ, or an axis is not in order.
    """
    if not all(1 <= size <= LARGEST_SIZE for shape in shapes for size in shape):
        raise UsageError(f"a size of {name} is out of range", where=_text(shapes), expected=f"1 to {LARGEST_SIZE}")
    if len({len(shape) for shape in shapes}) > 1:
        raise UsageError(
            f"the shapes of {name} have different numbers of axes",
            where=_text(shapes),
            expected="the smallest, the usual and the largest shape of one input",
        )
    wrong = [axis for axis, (least, usual, most) in enumerate(zip(*shapes, strict=True)) if not least <= usual <= most]
    if wrong:
        raise UsageError(
            f"the shapes of {name} are not in order at axis {wrong[0]}",
            where=_text(shapes),
            expected="smallest <= usual <= largest on every axis",
        )


def default_shapes(inputs: Iterable[Input], batch: int, given: Mapping[str, Shapes] | None = None) -> dict[str, Shapes]:
    """Return the shapes of every input with a free axis: those given, else what is known of its axes.

    Axes of one name have one size, and the first axis of an input is the batch: that of the shapes given for another
    input, else (1, batch, max(batch, 8)).

    Raises:
        UsageError: the batch is less than 1; a given name is no input, or its shapes do not fit it; two inputs give an
            axis of one name other sizes; or an axis other than the first is free and nothing says its size.
    """
    if batch < 1:
        raise UsageError(f"the batch is {batch}", expected="1 or more")
    given, known = given or {}, {each.name: each for each in inputs}
    if strangers := sorted(set(given) - set(known)):
        raise UsageError(
            f"the model has no input {strangers[0]}", where="--shapes", expected=f"some of {', '.join(sorted(known))}"
        )
    for name, shapes in given.items():
        check_shapes(name, shapes)
        _refuse_misfit(known[name], shapes)
    named = _named_sizes(given, known)
    batches = [_sizes(shapes, 0) for name, shapes in given.items() if not isinstance(known[name].shape[0], int)]
    first = batches[0] if batches else (1, batch, max(batch, USUAL_LARGEST_BATCH))
    free = [each for each in known.values() if not all(isinstance(size, int) for size in each.shape)]
    return {each.name: given.get(each.name) or _of_axes(each, first, named) for each in free}


def _sizes(shapes: Shapes, axis: int) -> Sizes:
    least, usual, most = shapes
    return least[axis], usual[axis], most[axis]


def _named_sizes(given: Mapping[str, Shapes], known: Mapping[str, Input]) -> dict[str, Sizes]:
    """Return the sizes of axes by their names, which inputs share."""
    found = dict[str, tuple[str, Sizes]]()
    for name, shapes in given.items():
        for axis, size in enumerate(known[name].shape):
            if not isinstance(size, str) or not size:
                continue
            other, sizes = found.setdefault(size, (name, _sizes(shapes, axis)))
            if sizes != _sizes(shapes, axis):
                raise UsageError(
                    f"the axis {size} has other sizes in {name} than in {other}",
                    where=f"--shapes {name}={_text(shapes)}",
                    expected=f"{', '.join(map(str, sizes))} (smallest, usual, largest)",
                )
    return {axis: sizes for axis, (_, sizes) in found.items()}


def _three(shapes: list[tuple[int, ...]], name: str, text: str) -> Shapes:
    if len(shapes) == 1:
        return shapes[0], shapes[0], shapes[0]
    if len(shapes) != 3:
        raise UsageError(f"{name} has {len(shapes)} shapes", where=text, expected=FORM)
    return shapes[0], shapes[1], shapes[2]


def _shape(text: str, whole: str) -> tuple[int, ...]:
    if SHAPE.fullmatch(text) is None:
        raise UsageError(f"{text!r} is no shape", where=whole, expected=FORM)
    if any(len(size) > 10 for size in text.split("x")):  # no int of thousands of digits
        raise UsageError("a size is out of range", where=whole, expected=f"1 to {LARGEST_SIZE}")
    return tuple(int(size) for size in text.split("x"))


def _refuse_misfit(port: Input, shapes: Shapes) -> None:
    fits = all(
        len(shape) == len(port.shape)
        and all(not isinstance(wanted, int) or size == wanted for size, wanted in zip(shape, port.shape, strict=True))
        for shape in shapes
    )
    if not fits:
        raise UsageError(
            f"the shapes given do not fit the input {port.name}", where=_text(shapes), expected=_open_text(port)
        )


def _of_axes(port: Input, first: Sizes, named: Mapping[str, Sizes]) -> Shapes:
    sizes = list[Sizes]()
    for axis, size in enumerate(port.shape):
        if isinstance(size, int):
            sizes.append((size, size, size))
        elif size is not None and size in named:
            sizes.append(named[size])
        elif axis == 0:
            sizes.append(first)
        else:
            raise UsageError(
                f"axis {axis} of the input {port.name} has any size",
                where=_open_text(port),
                expected="the smallest, the usual and the largest shape of it",
                hint=f"--shapes {port.name}=...,...,... (as in {EXAMPLE})",
            )
    least, usual, most = zip(*sizes, strict=True)
    return least, usual, most


def _text(shapes: Shapes) -> str:
    return ",".join("x".join(str(size) for size in shape) for shape in shapes)


def _open_text(port: Input) -> str:
    return "x".join(str(size) if isinstance(size, int) else (size or "any") for size in port.shape)
