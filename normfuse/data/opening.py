"""One door for every source of samples; which kind it is, is told from what is there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from normfuse.data import arrays, generator, images, in_memory
from normfuse.data.in_memory import Data
from normfuse.data.preprocess import Preprocess
from normfuse.data.samples import Samples
from normfuse.errors import BadInput, UsageError

__all__ = ["load_samples"]

FORMS: Final = "an .npz file, a folder of .npy files, a folder of images, or package.module:callable"
CALLABLE: Final = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


def load_samples(source: Data, *, preprocess: Preprocess | None = None, name: str = "samples") -> Samples:
    """Return the samples of ``source``; nothing is ever unpickled.

    ``.npz``: arrays by input name, first axis the samples; ``label`` or ``labels`` holds the labels.
    Folder of ``.npy``: one file is one sample of the only input; with several inputs, one sub-folder per input,
    named after it, holding files of the same names. Order is by name. ``labels.npy`` beside them holds the labels.
    Folder of images: sub-folders are classes, numbered in sorted order; without sub-folders there are no labels.
    ``package.module:callable``: called without arguments for every run, returns single samples without a batch
    axis (an array, a tensor, or a mapping by input name), or pairs of such a sample and its label.
    In Python also what these hold: an array or tensor (first axis the samples), a mapping of them by input name with
    ``label`` or ``labels``, a list of what a callable would return, the callable itself; ``name`` is said in errors.

    Raises:
        BadInput: the source is missing, empty, cannot be read, is broken, or holds Python objects.
        UsageError: it is none of the forms, or ``preprocess`` is given for arrays or missing for images.
        MissingDependency: images need Pillow.
    """
    if isinstance(source, Samples):
        return source
    if not isinstance(source, (str, Path)):
        _refuse(preprocess, name)
        return in_memory.read(source, name)
    try:
        return _open(source, preprocess)
    except OSError as error:
        raise BadInput(
            f"the samples cannot be read: {error.strerror or error}",
            where=str(source),
            expected=FORMS,
            hint="check the path, and who may read it",
        ) from error


def _open(source: str | Path, preprocess: Preprocess | None) -> Samples:
    path = Path(source)
    if not path.exists():
        if CALLABLE.fullmatch(str(source)):
            _refuse(preprocess, str(source))
            return generator.read(str(source))
        raise BadInput("the samples do not exist", where=str(source), expected=FORMS, hint="check the path")
    if path.is_file():
        _refuse(preprocess, str(source))
        return arrays.read_npz(path)
    if images.holds_images(path):
        if preprocess is None:
            raise UsageError(
                "images need the preprocessing that the model was trained with",
                where=str(path),
                expected="preprocess (--preprocess)",
                hint="--preprocess imagenet, or 'mean=0.5;std=0.25;size=28'; in Python "
                "normfuse.data.load_samples(folder, preprocess=normfuse.data.Preprocess.parse('imagenet'))",
            )
        return images.read(path, preprocess)
    _refuse(preprocess, str(source))
    return arrays.read_folder(path)


def _refuse(preprocess: Preprocess | None, source: str) -> None:
    if preprocess is not None:
        raise UsageError(
            "preprocess is only for folders of images",
            where=source,
            expected="arrays as the model takes them",
            hint="leave --preprocess out",
        )
