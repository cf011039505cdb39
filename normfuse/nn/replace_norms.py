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

    The new norms start fresh: what the layer norms had learned is not taken over. They get the device and type
    of the old ones and their training mode. A norm that stands at several paths stays one norm.

    Args:
        model: any module that holds layer norms (a model that is itself one cannot be changed in place).
        factory: makes the new norm from the number of channels, such as `UnifiedNorm`.
        only: tells from path and norm whether to replace it.

    Returns:
        The module paths that were replaced, in the model's order.
    """
    found = [
        (path, module)
        for path, module in model.named_modules(remove_duplicate=False)
        if path and isinstance(module, nn.LayerNorm) and len(module.normalized_shape) == 1 and only(path, module)
    ]
    made = {norm: _like(norm, factory(norm.normalized_shape[0])) for norm in dict.fromkeys(norm for _, norm in found)}
    for path, norm in found:
        owner, _, name = path.rpartition(".")
        setattr(model.get_submodule(owner), name, made[norm])
    return [path for path, _ in found]


def _like(norm: nn.LayerNorm, new: nn.Module) -> nn.Module:
    for parameter in norm.parameters():  # none where the layer norm has no weight
        new = new.to(device=parameter.device, dtype=parameter.dtype)
    return new.train(norm.training)
