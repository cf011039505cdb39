"""What an engine was built from and for, written beside it, and held against it before anything loads it.

An engine is native code: whoever deserializes one runs it, and TensorRT's own check of an engine finds damage but no
tampering. The sidecar is signed with a key of the user's, so that engines of others are told from one's own.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from normfuse.errors import BadInput, UsageError
from normfuse.manifest import sha256_of
from normfuse.quant.target import Via
from normfuse.runtime.engine_key import is_signed_here, signature_of
from normfuse.runtime.shapes import Shapes, check_shapes
from normfuse.runtime.tensorrt_backend import TENSORRT_RTX
from normfuse.strict_json import strict_json

__all__ = [
    "FORMAT",
    "SCHEMA",
    "Sidecar",
    "check_engine",
    "onnx_sums",
    "read_sidecar",
    "runs_on",
    "sidecar_path",
    "sidecar_text",
]

FORMAT: Final = "normfuse engine"
SCHEMA: Final = 1
SIGNATURE: Final = "signature"
LARGEST_BYTES: Final = 1 << 20
CAPABILITY: Final = re.compile(r"SM[0-9]{2,4}")
SHA256: Final = re.compile(r"[0-9a-f]{64}")
NUMBERS: Final = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})*")
RTX_DEFAULT: Final = frozenset({"SM80", "SM86", "SM89", "SM120", "SM121"})
"""What TensorRT-RTX builds for where nothing is asked for: of the GPUs that it knows those from Ampere on."""

OF_RTX: Final = "RTX GPUs from Ampere on"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sidecar:
    """What an engine was built from and for.

    Attributes:
        sha256: of the engine.
        flavour: the module of the library that built it.
        via: what it was built from: the ONNX file, or the same model by torch-tensorrt.
        version: of that library.
        capabilities: what it runs on, as ``SM89``; empty: of TensorRT-RTX any from Ampere on, else not known.
        onnx_sha256: of the ONNX file of its model.
        weights_sha256: of the ONNX file's weights (``model.onnx.data``), if they lie beside it.
        shapes: of every input with a free axis, by its name.
        workspace_bytes: what kernels may use beside weights and activations.
        level: the builder's optimization level.
        version_compatible: whether later versions of TensorRT run it too.
        messages: what the builder said last.
    """

    sha256: str
    flavour: str
    via: Via
    version: str
    capabilities: tuple[str, ...]
    onnx_sha256: str
    weights_sha256: str | None
    shapes: Mapping[str, Shapes]
    workspace_bytes: int
    level: int
    version_compatible: bool
    messages: tuple[str, ...]


def check_engine(
    engine: Path,
    *,
    backend_module: str,
    backend_version: str,
    capability: str | None = None,
    onnx: Path | None = None,
    trust: bool = False,
) -> Sidecar | None:
    """Return an engine's sidecar if it was written for this engine and both fit what runs it; call it before loading.

    Args:
        engine: the engine's file.
        backend_module: the library that is to run it.
        backend_version: of that library.
        capability: of the GPU, as ``SM89``; None: it is not compared.
        onnx: the ONNX file that the engine must have been built from; None: it is not compared.
        trust: an engine without a sidecar is taken (None is returned), and one whose sidecar this user's key has not
            signed. One that is not its sidecar's never is.

    Raises:
        BadInput: there is no engine or no sidecar, the sidecar is broken or somebody else's, the engine is another
            file, or it was built by another library or version, for another GPU, or from another ONNX file.
    """
    if not engine.is_file():
        raise BadInput("there is no such engine", where=str(engine), expected="a file", hint="check the path")
    if trust and not os.path.lexists(sidecar_path(engine)):
        return None
    sidecar = read_sidecar(engine)
    if sha256_of(engine) != sidecar.sha256:
        raise BadInput(
            "the engine is not the file that its sidecar was written for",
            where=str(engine),
            expected=f"sha256 {sidecar.sha256}",
            hint="build the engine again: what was changed must not be loaded",
        )
    if not trust:
        _refuse_others(engine)
    _refuse_library(engine, sidecar, backend_module, backend_version)
    if capability is not None and not runs_on(sidecar, capability):
        raise BadInput(
            f"the engine was built for {', '.join(sidecar.capabilities) or OF_RTX}",
            where=str(engine),
            expected=f"an engine for {capability}",
            hint="build the engine for this GPU",
        )
    if onnx is not None and onnx_sums(onnx) != (sidecar.onnx_sha256, sidecar.weights_sha256):
        raise BadInput(
            "the engine was built from another ONNX file",
            where=str(engine),
            expected=f"an engine of {onnx}",
            hint="build the engine again",
        )
    return sidecar


def read_sidecar(engine: Path) -> Sidecar:
    """Return what is written beside an engine; the engine itself is not read.

    Raises:
        BadInput: there is no sidecar, or it is broken or of another format.
    """
    place = sidecar_path(engine)
    if not place.is_file():
        raise BadInput(
            "the engine has no sidecar",
            where=str(engine),
            expected=f"{place.name} beside it, as its build writes it",
            hint="build the engine here; or --trust-engine, if you would run a program of whoever built it",
        )
    found = _read_object(place)
    if found.get("format") != FORMAT:
        raise _broken(place, f"its format is not {FORMAT!r}")
    if found.get("schema") != SCHEMA or type(found["schema"]) is not int:
        raise BadInput(
            f"the engine's sidecar has schema {found.get('schema')!r}",
            where=str(place),
            expected=f"schema {SCHEMA}",
            hint="use the version of normfuse that wrote it, or build the engine again",
        )
    values = {name: value for name, value in found.items() if name not in ("format", "schema", SIGNATURE)}
    if strange := sorted(set(values) ^ set(FIELDS)):
        raise _broken(place, f"it {'has an unknown' if strange[0] in values else 'lacks'} {strange[0]!r}")
    if wrong := [name for name, fits in FIELDS.items() if not fits(values[name])]:
        raise _broken(place, f"its {wrong[0]!r} cannot be")
    shapes = {name: tuple(tuple(shape) for shape in each) for name, each in values["shapes"].items()}
    lists = {name: tuple(values[name]) for name in ("capabilities", "messages")}
    return Sidecar(**{**values, **lists, "shapes": shapes, "via": Via(values["via"])})


def sidecar_text(sidecar: Sidecar) -> str:
    """Return what ``read_sidecar`` reads, signed with the user's key where one can be kept."""
    facts = {"format": FORMAT, "schema": SCHEMA, **asdict(sidecar), "via": sidecar.via.value}
    return strict_json({**facts, SIGNATURE: signature_of(strict_json(facts))})


def sidecar_path(engine: Path) -> Path:
    """Return where an engine's sidecar lies: ``model.engine.json`` beside ``model.engine``."""
    return engine.with_name(f"{engine.name}.json")


def onnx_sums(model: Path) -> tuple[str, str | None]:
    """Return the sha256 of an ONNX file, and of its weights if they lie beside it in ``model.onnx.data``.

    Raises:
        BadInput: it cannot be read.
    """
    weights = model.with_name(f"{model.name}.data")
    try:
        return sha256_of(model), sha256_of(weights) if weights.exists() else None
    except OSError as error:
        raise BadInput(
            f"the ONNX file cannot be read: {error.strerror or error}", where=str(model), expected="a readable file"
        ) from error


def _refuse_others(engine: Path) -> None:
    """Refuse a sidecar that was not written here, by this user."""
    facts = _read_object(sidecar_path(engine))
    signature = facts.pop(SIGNATURE, None)
    if not is_signed_here(strict_json(facts), signature):
        raise BadInput(
            "the engine was built elsewhere, or by somebody else",
            where=str(engine),
            expected="a sidecar that your own key has signed",
            hint="build the engine here; or --trust-engine, if you would run a program of whoever built it",
        )


def _refuse_library(engine: Path, sidecar: Sidecar, module: str, version: str) -> None:
    if sidecar.flavour != module:
        raise BadInput(
            f"the engine was built by {sidecar.flavour}",
            where=str(engine),
            expected=f"an engine of {module}: neither loads the other's",
            hint=f"build the engine with {module}, or run it with {sidecar.flavour}",
        )
    if sidecar.version == version or (sidecar.version_compatible and _is_later(version, sidecar)):
        return
    raise BadInput(
        f"the engine was built by {sidecar.flavour} {sidecar.version}",
        where=str(engine),
        expected=f"an engine that {version} runs" + " (earlier ones do not)" * sidecar.version_compatible,
        hint="build the engine again, or install the version that built it",
    )


def _is_later(version: str, sidecar: Sidecar) -> bool:
    """Whether a TensorRT is later than the one that built an engine; of TensorRT-RTX only the same version runs it."""
    here, built = NUMBERS.match(version), NUMBERS.match(sidecar.version)
    if sidecar.flavour == TENSORRT_RTX.module or here is None or built is None:
        return False
    return [int(part) for part in here[0].split(".")] >= [int(part) for part in built[0].split(".")]


def runs_on(sidecar: Sidecar, capability: str) -> bool:
    """Return whether an engine was built for a compute capability (``SM89``), as far as its sidecar says."""
    if sidecar.capabilities:
        return capability in sidecar.capabilities
    return capability in RTX_DEFAULT or sidecar.flavour != TENSORRT_RTX.module


def _read_object(place: Path) -> dict[str, Any]:
    try:
        with place.open("rb") as file:
            data = file.read(LARGEST_BYTES + 1)
        found = json.loads(data) if len(data) <= LARGEST_BYTES else None
    except (OSError, ValueError, RecursionError) as error:
        raise _broken(place, "it is no JSON") from error
    if not isinstance(found, dict):
        raise _broken(place, f"it is no JSON object of at most {LARGEST_BYTES} bytes")
    return found


def _broken(place: Path, detail: str) -> BadInput:
    return BadInput(
        f"the engine's sidecar is broken: {detail}",
        where=str(place),
        expected="what the build of the engine wrote",
        hint="build the engine again",
    )


def _is_text(pattern: re.Pattern[str]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, str) and pattern.fullmatch(value) is not None


def _is_list_of(fits: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, list) and all(fits(each) for each in value)


def _is_integer(least: int, most: int) -> Callable[[object], bool]:
    return lambda value: type(value) is int and least <= value <= most  # True is no 1


def _are_shapes(value: object) -> bool:
    if not isinstance(value, dict):
        return False
    sizes = _is_list_of(_is_list_of(_is_integer(1, 2**63)))
    for name, shapes in value.items():
        if not sizes(shapes) or len(shapes) != 3 or not all(shapes):
            return False
        try:
            check_shapes(name, shapes)
        except UsageError:
            return False
    return True


FIELDS: Final[dict[str, Callable[[object], bool]]] = {
    "sha256": _is_text(SHA256),
    "flavour": _is_text(re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")),
    "via": _is_text(re.compile("|".join(via.value for via in Via))),
    "version": _is_text(re.compile(r"[0-9][0-9A-Za-z.+_-]{0,63}")),
    "capabilities": _is_list_of(_is_text(CAPABILITY)),
    "onnx_sha256": _is_text(SHA256),
    "weights_sha256": lambda value: value is None or _is_text(SHA256)(value),
    "shapes": _are_shapes,
    "workspace_bytes": _is_integer(1, 2**63),
    "level": _is_integer(0, 5),
    "version_compatible": lambda value: isinstance(value, bool),
    "messages": _is_list_of(lambda value: isinstance(value, str)),
}
