"""Swaps the layer norms of any model for norms that fold."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

__all__ = ["replace_norms"]


def replace_norms(
    model: nn.Module,
    factory: Callable[[int], nn.Module],
    *,
    only: Callable[[str, nn.LayerNorm], bool] = lambda path, norm: True,
) -> list[str]:
    """Replace every layer norm over the last axis by ``factory(channels)``, in place.

    Args:
        model: any module.
        factory: makes the new norm from the number of channels.
        only: tells from path and norm whether to replace it.

    Returns:
        The module paths that were replaced.
    """
    found = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) == 1 and only(path, module)
    ]
    for path, norm in found:
        owner, _, name = path.rpartition(".")
        new = factory(norm.normalized_shape[0])
        setattr(model.get_submodule(owner), name, new.train(norm.training))
    return [path for path, _ in found]
