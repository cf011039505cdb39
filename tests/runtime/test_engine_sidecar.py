"""An engine is held against its sidecar before anything loads it; sidecars come from strangers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from normfuse.errors import BadInput
from normfuse.quant.target import Via
from normfuse.runtime.engine_sidecar import (
    Sidecar,
    check_engine,
    onnx_sums,
    read_sidecar,
    sidecar_path,
    sidecar_text,
)

ENGINE, MODEL = b"an engine", b"a model"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


SIDECAR = Sidecar(
    sha256=sha256(ENGINE),
    flavour="tensorrt",
    via=Via.ONNX,
    version="11.4.0.106",
    capabilities=("SM90",),
    onnx_sha256=sha256(MODEL),
    weights_sha256=None,
    shapes={"x": ((1, 3), (4, 3), (8, 3))},
    workspace_bytes=1 << 20,
    level=3,
    version_compatible=False,
    messages=("a \N{WARNING SIGN} warning\n\x1b[1m",),
)


def written(folder: Path, sidecar: Sidecar = SIDECAR) -> Path:
    engine = folder / "model.engine"
    engine.write_bytes(ENGINE)
    sidecar_path(engine).write_text(sidecar_text(sidecar), encoding="utf-8")
    (folder / "model.onnx").write_bytes(MODEL)
    return engine


def checked(engine: Path, version: str = "11.4.0.106", module: str = "tensorrt", **options: Any) -> Sidecar | None:
    return check_engine(engine, backend_module=module, backend_version=version, **options)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    engine = written(tmp_path)
    assert sidecar_path(engine).name == "model.engine.json"
    assert read_sidecar(engine) == SIDECAR
    assert checked(engine, capability="SM90", onnx=tmp_path / "model.onnx") == SIDECAR


def test_the_way_is_written_and_read(tmp_path: Path) -> None:
    sidecar = replace(SIDECAR, via=Via.TORCH_TENSORRT)
    engine = written(tmp_path, sidecar)
    assert json.loads(sidecar_path(engine).read_text(encoding="utf-8"))["via"] == "torch-tensorrt"
    assert checked(engine, onnx=tmp_path / "model.onnx") == sidecar


def test_no_engine(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such engine"):
        checked(tmp_path / "model.engine", trust=True)


def test_a_foreign_engine_is_taken_where_it_is_trusted(tmp_path: Path) -> None:
    engine = written(tmp_path)
    sidecar_path(engine).unlink()
    with pytest.raises(BadInput, match="the engine has no sidecar") as refusal:
        checked(engine)
    assert "--trust-engine" in refusal.value.hint
    assert checked(engine, trust=True) is None


@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize("place", [0, 4, len(ENGINE) - 1])
def test_a_byte_that_flipped(place: int, trust: bool, tmp_path: Path) -> None:
    engine = written(tmp_path)
    data = bytearray(ENGINE)
    data[place] ^= 1
    engine.write_bytes(data)
    with pytest.raises(BadInput, match="not the file that its sidecar was written for"):
        checked(engine, trust=trust)


def test_a_sidecar_that_is_a_dead_link_is_not_trusted(tmp_path: Path) -> None:
    engine = written(tmp_path)
    sidecar_path(engine).unlink()
    sidecar_path(engine).symlink_to(tmp_path / "nothing")
    with pytest.raises(BadInput, match="has no sidecar"):
        checked(engine, trust=True)


BROKEN: dict[str, Callable[[dict[str, Any]], object]] = {
    "format": lambda held: held.update(format="another"),
    "schema": lambda held: held.update(schema=2),
    "schema of truth": lambda held: held.update(schema=True),
    "no schema": lambda held: held.pop("schema"),
    "unknown field": lambda held: held.update(author="x"),
    "short sum": lambda held: held.update(sha256="12"),
    "sum in capitals": lambda held: held.update(sha256=held["sha256"].upper()),
    "no sum": lambda held: held.pop("sha256"),
    "sum of null": lambda held: held.update(onnx_sha256=None),
    "weights": lambda held: held.update(weights_sha256=0),
    "flavour": lambda held: held.update(flavour="os.system('x')"),
    "via": lambda held: held.update(via="torch_tensorrt"),
    "via of null": lambda held: held.update(via=None),
    "no via": lambda held: held.pop("via"),
    "version": lambda held: held.update(version=11),
    "version in words": lambda held: held.update(version="new"),
    "capabilities as text": lambda held: held.update(capabilities="SM90"),
    "capability": lambda held: held.update(capabilities=["9.0"]),
    "shapes as list": lambda held: held.update(shapes=[]),
    "two shapes": lambda held: held.update(shapes={"x": [[1], [2]]}),
    "shape of text": lambda held: held.update(shapes={"x": ["1", "1", "1"]}),
    "shape of floats": lambda held: held.update(shapes={"x": [[1.0], [1.0], [1.0]]}),
    "ranks": lambda held: held.update(shapes={"x": [[1], [1, 2], [1]]}),
    "order": lambda held: held.update(shapes={"x": [[2], [1], [3]]}),
    "sizes": lambda held: held.update(shapes={"x": [[1], [1], [2**40]]}),
    "workspace": lambda held: held.update(workspace_bytes=0),
    "workspace of truth": lambda held: held.update(workspace_bytes=True),
    "level": lambda held: held.update(level=6),
    "level as text": lambda held: held.update(level="3"),
    "version compatible": lambda held: held.update(version_compatible=1),
    "messages": lambda held: held.update(messages=[1]),
}


@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize("name", BROKEN)
def test_fields_that_cannot_be(name: str, trust: bool, tmp_path: Path) -> None:
    engine = written(tmp_path)
    held = json.loads(sidecar_path(engine).read_text(encoding="utf-8"))
    BROKEN[name](held)
    sidecar_path(engine).write_text(json.dumps(held), encoding="utf-8")
    with pytest.raises(BadInput, match=r"sidecar (is broken|has schema)") as refusal:
        checked(engine, trust=trust)
    assert refusal.value.where == str(sidecar_path(engine))
    assert refusal.value.expected
    assert refusal.value.hint


WHOLE = sidecar_text(SIDECAR).encode()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        WHOLE[: len(WHOLE) // 2],
        b"[]",
        b"null",
        b"\xff\xfe\x00",
        b"[" * 100_000,
        b"9" * 10_000,
        WHOLE + b" " * 2**20,
    ],
    ids=["empty", "half", "list", "null", "no text", "deep", "digits", "large"],
)
def test_json_of_another_form(data: bytes, tmp_path: Path) -> None:
    engine = written(tmp_path)
    sidecar_path(engine).write_bytes(data)
    with pytest.raises(BadInput, match="sidecar is broken: it is no JSON"):
        checked(engine)


def test_truncated_sidecars_are_refused(tmp_path: Path) -> None:
    engine = written(tmp_path)
    for length in range(0, len(WHOLE.rstrip()), 5):
        sidecar_path(engine).write_bytes(WHOLE[:length])
        with pytest.raises(BadInput, match="sidecar is broken"):
            checked(engine)


def test_another_library(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"the engine was built by tensorrt\n") as refusal:
        checked(written(tmp_path), module="tensorrt_rtx")
    assert "tensorrt_rtx" in refusal.value.expected


@pytest.mark.parametrize(
    ("flavour", "built", "compatible", "runs", "taken"),
    [
        ("tensorrt", "11.4.0.106", False, "11.4.0.106", True),
        ("tensorrt", "11.4.0.106", False, "11.4.0.107", False),
        ("tensorrt", "11.4.0.106", False, "11.3.0.99", False),
        ("tensorrt", "10.13.2.6", True, "10.13.2.6", True),
        ("tensorrt", "10.13.2.6", True, "10.14.0.1", True),
        ("tensorrt", "10.13.2.6", True, "11.4.0.106", True),
        ("tensorrt", "10.13.2.6", True, "10.9.0.1", False),
        ("tensorrt", "11.0.0.1", True, "10.16.1.11", False),
        ("tensorrt", "10.13.2.6", True, "unknown", False),
        ("tensorrt_rtx", "1.7.1.116", True, "1.7.1.116", True),
        ("tensorrt_rtx", "1.7.1.116", True, "1.8.0.1", False),
    ],
)
def test_versions(flavour: str, built: str, compatible: bool, runs: str, taken: bool, tmp_path: Path) -> None:
    sidecar = replace(SIDECAR, flavour=flavour, version=built, version_compatible=compatible)
    engine = written(tmp_path, sidecar)
    if taken:
        assert checked(engine, runs, flavour) == sidecar
        return
    with pytest.raises(BadInput, match=f"built by {flavour} {built}") as refusal:
        checked(engine, runs, flavour)
    assert runs in refusal.value.expected


@pytest.mark.parametrize(
    ("flavour", "capabilities", "capability", "taken"),
    [
        ("tensorrt", ("SM90",), "SM90", True),
        ("tensorrt", ("SM90",), "SM89", False),
        ("tensorrt", (), "SM89", True),
        ("tensorrt_rtx", ("SM86", "SM89"), "SM89", True),
        ("tensorrt_rtx", ("SM86", "SM89"), "SM80", False),
        ("tensorrt_rtx", (), "SM120", True),
        ("tensorrt_rtx", (), "SM75", False),
        ("tensorrt_rtx", (), "8.9", False),
    ],
)
def test_capabilities(
    flavour: str, capabilities: tuple[str, ...], capability: str, taken: bool, tmp_path: Path
) -> None:
    sidecar = replace(SIDECAR, flavour=flavour, capabilities=capabilities)
    engine = written(tmp_path, sidecar)
    if taken:
        assert checked(engine, module=flavour, capability=capability) == sidecar
        return
    with pytest.raises(BadInput, match=r"the engine was built for (SM|RTX GPUs)") as refusal:
        checked(engine, module=flavour, capability=capability)
    assert refusal.value.expected == f"an engine for {capability}"


def test_another_onnx_file(tmp_path: Path) -> None:
    engine = written(tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"another model")
    with pytest.raises(BadInput, match="built from another ONNX file"):
        checked(engine, onnx=tmp_path / "model.onnx")
    assert checked(engine) == SIDECAR


def test_other_weights_beside_the_same_onnx_file(tmp_path: Path) -> None:
    engine = written(tmp_path)
    (tmp_path / "model.onnx.data").write_bytes(b"weights")
    assert onnx_sums(tmp_path / "model.onnx") == (sha256(MODEL), sha256(b"weights"))
    with pytest.raises(BadInput, match="built from another ONNX file"):
        checked(engine, onnx=tmp_path / "model.onnx")
    with pytest.raises(BadInput, match="cannot be read"):
        checked(engine, onnx=tmp_path / "no.onnx")


@pytest.mark.parametrize("change", ["level", "signature", "no signature", "key"])
def test_a_sidecar_that_was_not_written_here_is_trusted_or_refused(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = written(tmp_path)
    place = sidecar_path(engine)
    held = json.loads(place.read_text())
    if change == "level":
        held["level"] += 1
    elif change == "signature":
        held["signature"] = "0" * 64
    elif change == "no signature":
        del held["signature"]
    else:
        monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "somebody else"))
    place.write_text(json.dumps(held))
    with pytest.raises(BadInput, match="built elsewhere, or by somebody else") as refusal:
        checked(engine)
    assert "--trust-engine" in refusal.value.hint
    assert checked(engine, trust=True) is not None
