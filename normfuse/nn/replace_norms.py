"""Swaps the layer norms of any model for norms that fold."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain

from torch import nn

__all__ = ["replace_norms"]


def replace_norms(
    model: nn.Module,
    factory: Callable[[int], nn.Module],
    *,
    only: Callable[[str, nn.LayerNorm], bool] = lambda path, norm: True,
) -> list[str]:
    """Replace every layer norm over the last axis by ``factory(channels)``, in place.

    The new norms start fresh: what the layer norms had learned is not taken over. They get the training mode of the
    old ones and their device and type; those of the nearest module around it that has parameters, where a layer norm
    has none of its own. A norm that stands at several paths stays one norm.

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
    made: dict[nn.LayerNorm, nn.Module] = {}
    for path, norm in found:
        if norm not in made:
            made[norm] = _like(_surroundings(model, path), factory(norm.normalized_shape[0])).train(norm.training)
    for path, norm in found:
        owner, _, name = path.rpartition(".")
        setattr(model.get_submodule(owner), name, made[norm])
    return [path for path, _ in found]


def _surroundings(model: nn.Module, path: str) -> Iterator[nn.Module]:
    """Yield the module at ``path`` and all around it, from the inside out."""
    while path:
        yield model.get_submodule(path)
        path = path.rpartition(".")[0]
    yield model


def _like(modules: Iterable[nn.Module], new: nn.Module) -> nn.Module:
    """Return ``new`` with device and type of the first floating-point parameter of the first module that has one."""
    for parameter in chain.from_iterable(module.parameters() for module in modules):
        if parameter.is_floating_point():
            return new.to(device=parameter.device, dtype=parameter.dtype)
    return new
