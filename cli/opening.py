"""From the data options of a command to samples."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from normfuse.data import Samples

__all__ = ["opened_samples"]


def opened_samples(source: str | None, preprocess: str | None) -> Samples | None:
    """Return the samples of ``--calib`` or ``--eval``; ``--preprocess`` counts for folders of images only."""
    from pathlib import Path

    from normfuse.data import Preprocess, load_samples

    if source is None:
        return None
    is_folder = Path(source).is_dir()
    return load_samples(source, preprocess=Preprocess.parse(preprocess) if preprocess and is_folder else None)
