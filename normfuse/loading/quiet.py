"""Warnings and log lines of torch's loaders, kept from the user; the errors are ours."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

__all__ = ["quiet_torch"]

# torch logs what it also raises, with a traceback.
CHATTY: Final = ("torch.export", "torch.export.pt2_archive._package", "torch._export.serde.serialize")


@contextmanager
def quiet_torch() -> Iterator[None]:
    """Silence torch's warnings and its loaders' logs inside."""
    loggers = [logging.getLogger(name) for name in CHATTY]
    before = [logger.disabled for logger in loggers]
    try:
        for logger in loggers:
            logger.disabled = True
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, disabled in zip(loggers, before, strict=True):
            logger.disabled = disabled
