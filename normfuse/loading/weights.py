"""State dicts and safetensors: read without running code, put into the module that ``arch`` builds."""

from __future__ import annotations

import importlib
import pickle
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from normfuse.errors import BadInput, MissingDependency, UsageError
from normfuse.loading.content import ARCHIVE_HINT
from normfuse.loading.quiet import quiet_torch

__all__ = ["build", "read_safetensors", "read_torch", "refuse_arch"]

# Training frameworks put the weights under one of these keys, beside optimizer and epoch.
NESTINGS: Final = ("state_dict", "model_state_dict", "model_state", "model", "module", "net")
SHOWN_KEYS: Final = 5
PACKAGE_HINT: Final = "run from the folder that holds the package, or install it"

StateDict = Mapping[str, Tensor]


def read_torch(path: Path, *, trust: bool) -> StateDict | nn.Module:
    """Return the state dict of a torch.save file, or, where ``trust`` is given, its module.

    Raises:
        BadInput: the file is broken, holds objects and is not trusted, or holds no model.
    """
    try:
        with quiet_torch():
            found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if not trust:
            raise BadInput(
                "the file holds pickled Python objects, and unpickling runs code from the file",
                where=str(path),
                expected="a state dict: torch.save(model.state_dict(), path)",
                hint=f"{ARCHIVE_HINT}, or, for a file that you wrote yourself: trust_pickle=True (--trust-pickle)",
            ) from error
        found = _unpickle(path)
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _broken(path, error) from error
    return found if isinstance(found, nn.Module) else _state_dict(path, found)


def read_safetensors(path: Path) -> StateDict:
    """Return the tensors of a safetensors file.

    Raises:
        BadInput: the file is broken.
        MissingDependency: safetensors is not installed.
    """
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise MissingDependency(
            "safetensors", needed_for=f"loading {path}", install="pip install safetensors"
        ) from error
    try:
        tensors: StateDict = load_file(path, device="cpu")
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise _broken(path, error) from error
    return _state_dict(path, tensors)


def build(path: Path, tensors: StateDict, arch: str | None) -> nn.Module:
    """Return the module that ``arch`` builds, with ``tensors`` in it; names and shapes must all fit.

    Raises:
        UsageError: there is no ``arch``, it has the wrong form, or it cannot be imported.
        BadInput: it gives no module, or keys or shapes differ.
    """
    if arch is None:
        raise UsageError(
            "the file holds weights only, not the network that they belong to",
            where=str(path),
            expected="arch (--arch) naming a function that builds the module",
            hint="--arch package.module:factory; in Python give the module with the weights in it",
        )
    module = _build_module(arch)
    _refuse_other_keys(path, module.state_dict(), tensors, arch)
    try:
        module.load_state_dict(dict(tensors), strict=True)
    except RuntimeError as error:
        raise BadInput(f"the weights do not fit {arch}: {error}", where=str(path)) from error
    return module


def refuse_arch(arch: str | None, path: Path) -> None:
    """Raise UsageError where ``arch`` is given for a file that holds its own network."""
    if arch is not None:
        raise UsageError(
            "arch is only for weights; this file holds its own network",
            where=str(path),
            hint="leave --arch out",
        )


def _unpickle(path: Path) -> object:
    _look_into_current_folder()
    try:
        with quiet_torch():
            return torch.load(path, map_location="cpu", weights_only=False)
    except (ImportError, AttributeError) as error:
        raise BadInput(
            f"the classes in the file cannot be restored: {error}",
            where=str(path),
            expected="the package that defines the class, as it was when the file was written",
            hint=f"{PACKAGE_HINT}; or save model.state_dict() and give --arch",
        ) from error
    # Unpickling runs the file's own code, which may raise anything.
    except Exception as error:
        raise _broken(path, error) from error


def _broken(path: Path, error: Exception) -> BadInput:
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return BadInput(f"the file cannot be read: {first}", where=str(path), hint="copy or save it again")


def _state_dict(path: Path, found: object) -> StateDict:
    tensors = _unnest(found)
    if tensors is None:
        raise BadInput(
            f"the file holds a {type(found).__name__}, and no weights in it",
            where=str(path),
            expected="a mapping of names to tensors, alone or under " + ", ".join(NESTINGS),
            hint="torch.save(model.state_dict(), path)",
        )
    # Wrappers for several devices and for torch.compile put their own name before every key.
    for prefix in ("module.", "_orig_mod."):
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def _unnest(found: object) -> StateDict | None:
    if not isinstance(found, Mapping) or not found:
        return None
    if all(isinstance(name, str) and isinstance(value, Tensor) for name, value in found.items()):
        return found
    nested = (_unnest(found[key]) for key in NESTINGS if key in found)
    return next((tensors for tensors in nested if tensors is not None), None)


def _build_module(arch: str) -> nn.Module:
    factory = _import(arch)
    try:
        module = factory()
    except Exception as error:
        raise BadInput(
            f"arch raised {type(error).__name__}: {error}", where=arch, expected="a function without arguments"
        ) from error
    if not isinstance(module, nn.Module):
        raise BadInput(
            f"arch returned {type(module).__name__}", where=arch, expected="a function that returns a torch.nn.Module"
        )
    return module


def _import(arch: str) -> Callable[[], Any]:
    name, separator, attribute = arch.partition(":")
    if not separator or not name or not attribute:
        raise UsageError("arch has the wrong form", where=arch, expected="package.module:factory")
    _look_into_current_folder()
    try:
        found: Any = importlib.import_module(name)
        for part in attribute.split("."):
            found = getattr(found, part)
    # Importing runs the user's own code, which may raise anything.
    except Exception as error:
        raise UsageError(
            f"arch cannot be imported: {type(error).__name__}: {error}",
            where=arch,
            expected="package.module:factory",
            hint=PACKAGE_HINT,
        ) from error
    if not callable(found):
        raise BadInput(f"arch is a {type(found).__name__}", where=arch, expected="a function without arguments")
    return found  # type: ignore[no-any-return]  # a callable by the check above


def _look_into_current_folder() -> None:
    # Unlike `python -m`, a console script does not look into the current folder by itself.
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))


def _refuse_other_keys(path: Path, expected: StateDict, found: StateDict, arch: str) -> None:
    missing, unexpected = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    shapes = [
        f"{name} {list(found[name].shape)} instead of {list(expected[name].shape)}"
        for name in expected.keys() & found.keys()
        if found[name].shape != expected[name].shape
    ]
    told = {"missing": missing, "unexpected": unexpected, "shape": sorted(shapes)}
    if any(told.values()):
        detail = "; ".join(f"{title}: {_some(names)}" for title, names in told.items() if names)
        raise BadInput(
            f"the weights do not fit the module of {arch}: {detail}",
            where=str(path),
            expected=f"the {len(expected)} tensors of the module, by name",
            hint="check that arch builds the network that was trained",
        )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN_KEYS} more" if len(names) > SHOWN_KEYS else ""
    return ", ".join(names[:SHOWN_KEYS]) + more
