"""How images become tensors: resize, crop, scale; as the model was trained."""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import Enum
from typing import Final, Self

from normfuse.errors import UsageError

__all__ = ["Interpolation", "Preprocess"]

FORM: Final = (
    "a preset (imagenet, vit), or mean=0.5,0.5,0.5;std=0.5,0.5,0.5;size=224 or 224x320;resize=256;interpolation=bicubic"
)


class Interpolation(Enum):
    """How pixels are resampled."""

    NEAREST = "nearest"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    LANCZOS = "lanczos"


@dataclass(frozen=True, slots=True, kw_only=True)
class Preprocess:
    """Resize the shorter side, crop the centre, scale to 0..1, subtract ``mean``, divide by ``std``.

    ``size`` is height and width of the crop in pixels; ``resize`` the shorter side before it (default: the smallest
    that covers the crop). One value in ``mean`` makes the image gray, three make it RGB. The array is float32
    ``[channels, height, width]``. As in torchvision, the camera's orientation tag is ignored.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: tuple[int, int]
    resize: int | None = None
    interpolation: Interpolation = Interpolation.BILINEAR

    def __post_init__(self) -> None:
        if len(self.mean) not in {1, 3} or len(self.std) != len(self.mean):
            raise _wrong("mean and std need one value each (gray) or three (RGB)")
        if not all(value > 0 for value in self.std):
            raise _wrong("std must be positive")
        if min(*self.size, 1 if self.resize is None else self.resize) < 1:
            raise _wrong("sizes must be positive")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the preprocessing that ``text`` describes; a preset may come first and be changed after it.

        Raises:
            UsageError: a key is unknown, a value is no number, or a key is missing.
        """
        first, *rest = [part.strip() for part in text.split(";") if part.strip()] or [""]
        preset = PRESETS.get(first)
        given = dict(preset or {})
        for part in rest if preset is not None else [first, *rest]:
            key, separator, value = (piece.strip() for piece in part.partition("="))
            if not separator or key not in {field.name for field in fields(cls)}:
                raise _wrong(f"{part!r} is not known")
            given[key] = value
        if missing := [key for key in ("mean", "std", "size") if key not in given]:
            raise _wrong(f"{missing[0]} is missing")
        try:
            return cls(
                mean=_numbers(given["mean"]),
                std=_numbers(given["std"]),
                size=_size(given["size"]),
                resize=int(given["resize"]) if "resize" in given else None,
                interpolation=Interpolation(given.get("interpolation", "bilinear")),
            )
        except ValueError as error:
            raise _wrong(str(error)) from error


# imagenet: torchvision's reference evaluation. vit: timm's evaluation of the augreg ViTs (crop 0.9).
PRESETS: Final = {
    "imagenet": {"mean": "0.485,0.456,0.406", "std": "0.229,0.224,0.225", "size": "224", "resize": "256"},
    "vit": {"mean": "0.5,0.5,0.5", "std": "0.5,0.5,0.5", "size": "224", "resize": "248", "interpolation": "bicubic"},
}


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(number) for number in text.split(","))


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    return int(height), int(width or height)


def _wrong(what: str) -> UsageError:
    return UsageError(f"preprocess cannot be read: {what}", expected=FORM)
