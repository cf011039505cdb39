"""From the arguments of a command to a model and samples, with a word on what takes long."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normfuse.errors import UsageError

if TYPE_CHECKING:
    from normfuse.data import Samples
    from normfuse.folding import FoldOptions
    from normfuse.loading import LoadedModel
    from normfuse.progress import Progress

__all__ = ["opened_fold", "opened_model", "opened_samples"]


def opened_model(path: Path, *, arch: str | None, trust_pickle: bool, progress: Progress) -> LoadedModel:
    """Return the model of a command."""
    from normfuse.loading import load_model

    with progress.task("loading the model"):
        return load_model(path, arch=arch, trust_pickle=trust_pickle)


def opened_samples(
    source: str | None, preprocess: str | None, *, other: str | None = None, progress: Progress | None = None
) -> Samples | None:
    """Return the samples of ``--calib`` or ``--eval``, or None where the option is not given.

    ``other`` is the other of the two options: where it is a folder of images and this one is none, ``--preprocess``
    is meant for it alone.

    Raises:
        UsageError: ``--preprocess`` cannot be read, or is given without images.
    """
    from normfuse.data import Preprocess, load_samples
    from normfuse.progress import Silent

    chosen = Preprocess.parse(preprocess) if preprocess is not None else None
    if source is None:
        if chosen is not None and other is None:
            raise UsageError("there are no samples to preprocess", where="--preprocess", expected="a folder of images")
        return None
    if other is not None and _is_of_images(other) and not _is_of_images(source):
        chosen = None
    # A callable is run once to count its samples.
    with (progress or Silent()).task("opening the samples"):
        return load_samples(source, preprocess=chosen)


def opened_fold(options: Mapping[str, Any]) -> FoldOptions:
    """Return how to fold, from what `fold_options` adds to a command."""
    from normfuse.folding import FoldOptions
    from normfuse.passes.presets import LayerNorms

    return FoldOptions(
        refresh_norms=options["refresh_norms"],
        layer_norms=LayerNorms(options["layer_norm"]),
        samples=options["samples"],
        seed=options["seed"],
    )


def _is_of_images(source: str) -> bool:
    from normfuse.data.images import holds_images

    try:
        return Path(source).is_dir() and holds_images(Path(source))
    except OSError:
        return False  # opening it says why
