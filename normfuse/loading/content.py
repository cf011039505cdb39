"""What a file is, told from its bytes and never from its name."""

from __future__ import annotations

import zipfile
from collections import Counter
from enum import Enum
from pathlib import Path
from typing import BinaryIO, Final

from normfuse.errors import BadInput

__all__ = ["ARCHIVE_HINT", "MODEL_FILES", "Content", "recognize"]

MODEL_FILES: Final = "a torch.export archive, a TorchScript archive, a state dict (torch.save) or a safetensors file"
ARCHIVE_HINT: Final = "write the model again: normfuse.save(model, example_inputs, 'model.pt2')"

# torch.save's old format starts with this number as a pickled long (torch.serialization.MAGIC_NUMBER).
LEGACY_TORCH: Final = b"l\xfc\x9cF\xf9 j\xa8P\x19."
# ModelProto's field numbers (onnx.proto3); 7 is the graph.
ONNX_FIELDS: Final = frozenset({1, 2, 3, 4, 5, 6, 7, 8, 14, 20, 25, 26})
ONNX_GRAPH: Final = 7
LARGEST_HEADER: Final = 100 * 2**20


class Content(Enum):
    """The kinds of files that hold a model."""

    EXPORTED = "a torch.export archive"
    TORCHSCRIPT = "a TorchScript archive"
    TORCH_ZIP = "a file of torch.save"
    TORCH_LEGACY = "a file of torch.save before torch 1.6"
    SAFETENSORS = "a safetensors file"


def recognize(path: Path) -> Content:
    """Return what ``path`` holds.

    Raises:
        BadInput: it does not exist, is a folder, is empty, cannot be read, is broken, or is no model; the message
            says which.
    """
    try:
        _refuse_nothing(path)
        return _recognize(path)
    except OSError as error:
        raise BadInput(
            f"the model file cannot be read: {error.strerror or error}",
            where=str(path),
            expected=MODEL_FILES,
            hint="check the path, and who may read it",
        ) from error


def _recognize(path: Path) -> Content:
    with path.open("rb") as file:
        head = file.read(64)
        if head.startswith(b"PK\x03\x04"):
            return _recognize_zip(path)
        if LEGACY_TORCH in head[:24]:
            return Content.TORCH_LEGACY
        if _is_safetensors(head, path.stat().st_size):
            return Content.SAFETENSORS
        raise _stranger(path, file, head)


def _refuse_nothing(path: Path) -> None:
    if not path.exists():
        raise BadInput("the model file does not exist", where=str(path), expected=MODEL_FILES, hint="check the path")
    if path.is_dir():
        raise BadInput("the model is a folder", where=str(path), expected=MODEL_FILES, hint="name the file in it")
    if path.stat().st_size == 0:
        raise BadInput("the model file is empty", where=str(path), expected=MODEL_FILES, hint=ARCHIVE_HINT)


def _recognize_zip(path: Path) -> Content:
    try:
        with zipfile.ZipFile(path) as archive:
            listed = archive.namelist()
            start = min((info.header_offset for info in archive.infolist()), default=0)
        if start != 0:
            # A cut archive may end in a whole one: torch.export keeps the sample inputs as an archive in the archive.
            raise zipfile.BadZipFile("its table of contents is missing")
    except (zipfile.BadZipFile, OSError, NotImplementedError, UnicodeDecodeError) as error:
        raise BadInput(
            f"the archive is broken or cut off: {error}",
            where=str(path),
            expected=MODEL_FILES,
            hint="copy or download it again, and compare sizes",
        ) from error
    _refuse_duplicates(path, listed)
    # torch puts every member under one folder, which is named after the file.
    members = {name.partition("/")[2] for name in listed}
    # Before the next test: where reading an archive fails, torch.export.load tries these members, unchecked.
    if "serialized_exported_program.json" in listed:
        raise BadInput(
            "the torch.export archive was written by torch 2.7 or older",
            where=str(path),
            expected="an archive of torch 2.9 or newer",
            hint="load it with the old torch, export it again with a newer one",
        )
    if "archive_format" in members or any(name.startswith("models/") for name in members):
        return Content.EXPORTED
    if "constants.pkl" in members and any(name.startswith("code/") for name in members):
        return Content.TORCHSCRIPT
    if "data.pkl" in members:
        return Content.TORCH_ZIP
    raise _no_model_zip(path, listed)


def _refuse_duplicates(path: Path, listed: list[str]) -> None:
    # Two readers of one archive could otherwise see two different members of the same name.
    if twice := [name for name, count in Counter(listed).items() if count > 1]:
        raise BadInput("the archive holds a member twice", where=f"{path}: {twice[0]}", hint=ARCHIVE_HINT)


def _no_model_zip(path: Path, listed: list[str]) -> BadInput:
    if listed and all(name.endswith(".npy") for name in listed):
        return BadInput(
            "this is an .npz file: arrays, not a model",
            where=str(path),
            expected=MODEL_FILES,
            hint="samples are given with --calib",
        )
    return BadInput("the zip archive holds no model", where=str(path), expected=MODEL_FILES, hint=ARCHIVE_HINT)


def _is_safetensors(head: bytes, size: int) -> bool:
    length = int.from_bytes(head[:8], "little")
    return 2 <= length <= min(LARGEST_HEADER, size - 8) and head[8:9] == b"{"


def _stranger(path: Path, file: BinaryIO, head: bytes) -> BadInput:
    where = str(path)
    if _is_onnx(file, path.stat().st_size):
        return BadInput(
            "this is an ONNX file, and normfuse starts from PyTorch",
            where=where,
            expected=MODEL_FILES,
            hint="give the PyTorch model that the ONNX file was made from",
        )
    if head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05":
        return BadInput(
            "this is a plain pickle, which torch cannot load and normfuse never opens",
            where=where,
            expected=MODEL_FILES,
            hint=ARCHIVE_HINT,
        )
    return BadInput("this is no model file", where=where, expected=MODEL_FILES, hint=ARCHIVE_HINT)


def _is_onnx(file: BinaryIO, size: int) -> bool:
    """Walk the top level of the protobuf message; ONNX has a graph and no unknown field there."""
    file.seek(0)
    seen: set[int] = set()
    while file.tell() < size:
        key = _varint(file)
        seen.add(key >> 3)
        if not seen <= ONNX_FIELDS or key & 7 not in {0, 2}:
            return False
        value = _varint(file)
        if key & 7 == 2:
            file.seek(value, 1)
    return ONNX_GRAPH in seen and file.tell() == size


def _varint(file: BinaryIO) -> int:
    value = 0
    for shift in range(0, 70, 7):
        byte = file.read(1)
        if not byte:
            break
        value |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            break
    return value
