from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest

from normfuse.artifact import ArtifactWriter, check_output, read_artifact, read_intact, verify_artifact
from normfuse.errors import BadInput, InternalError, UsageError

FACTS = {"seed": 3, "verdict": {"verdict": "kept"}, "session_config": {"session.x64quantprecision": "1"}}


def write(target: Path, *, model: bytes = b"onnx") -> None:
    source = target.parent / "built.onnx"
    source.parent.mkdir(parents=True, exist_ok=True)
    source.write_bytes(model)
    with ArtifactWriter(target) as writer:
        writer.add_file(source, "model.onnx")
        writer.add_text("recipe.toml", "bits = 8\n")
        writer.add_json("report.json", {"verdict": "kept", "value": math.nan, "list": [math.inf, 1.5]})
        writer.finish(FACTS)
    source.unlink()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_is_written_can_be_read_and_verified(tmp_path: Path) -> None:
    write(tmp_path / "new" / "out")
    found = read_artifact(tmp_path / "new" / "out")
    assert found.manifest["seed"] == 3
    assert found.manifest["schema"] == 1
    assert found.session_config == {"session.x64quantprecision": "1"}
    assert found.model.read_bytes() == b"onnx"
    assert found.report == {"verdict": "kept", "value": None, "list": [None, 1.5]}
    assert found.files["model.onnx"] == hashlib.sha256(b"onnx").hexdigest()
    assert sorted(found.files) == ["model.onnx", "recipe.toml", "report.json"]
    assert verify_artifact(found.folder) == []
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]


def test_two_writes_are_the_same_bytes(tmp_path: Path) -> None:
    write(tmp_path / "one")
    write(tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_external_data_goes_along_under_the_name_that_the_model_knows(tmp_path: Path) -> None:
    (tmp_path / "built.onnx").write_bytes(b"onnx")
    (tmp_path / "built.onnx.data").write_bytes(b"weights")
    with ArtifactWriter(tmp_path / "out") as writer:
        writer.add_file(tmp_path / "built.onnx", "model.onnx")
        writer.finish(FACTS)
    assert sorted(read_artifact(tmp_path / "out").files) == ["built.onnx.data", "model.onnx"]


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    write(tmp_path / "out")
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_an_older_artifact_and_an_empty_folder_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write(tmp_path / "out", model=b"old")
    write(tmp_path / "out", model=b"new")
    assert read_artifact(tmp_path / "out").model.read_bytes() == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_link_keeps_pointing_where_the_artifact_is(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert verify_artifact(tmp_path / "real") == []


def folder_of_a_user(path: Path) -> None:
    path.mkdir()
    (path / "thesis.txt").write_text("years of work", encoding="utf-8")


def folder_with_another_manifest(path: Path) -> None:
    path.mkdir()
    (path / "manifest.json").write_text('{"name": "a web page"}', encoding="utf-8")
    (path / "index.html").write_text("", encoding="utf-8")


def artifact_with_notes(path: Path) -> None:
    write(path)
    (path / "notes.txt").write_text("mine", encoding="utf-8")


def plain_file(path: Path) -> None:
    path.write_text("a file", encoding="utf-8")


def broken_manifest(path: Path) -> None:
    path.mkdir()
    (path / "manifest.json").write_text("{", encoding="utf-8")


@pytest.mark.parametrize(
    "make", [folder_of_a_user, folder_with_another_manifest, artifact_with_notes, plain_file, broken_manifest]
)
def test_what_is_no_artifact_is_not_overwritten(tmp_path: Path, make: Callable[[Path], None]) -> None:
    target = tmp_path / "out"
    make(target)
    before = contents(target) if target.is_dir() else {"": target.read_bytes()}
    with pytest.raises(UsageError):
        check_output(target)
    with pytest.raises(UsageError), ArtifactWriter(target):
        raise AssertionError("the body must not run")
    assert before == (contents(target) if target.is_dir() else {"": target.read_bytes()})
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_became_something_else_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    def fill() -> None:
        with ArtifactWriter(tmp_path / "out") as writer:
            writer.finish(FACTS)
            folder_of_a_user(tmp_path / "out")

    with pytest.raises(UsageError):
        fill()
    assert sorted(contents(tmp_path / "out")) == ["thesis.txt"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1), ValueError("x"), BadInput("x")])
def test_whatever_is_raised_inside_leaves_nothing_new(tmp_path: Path, error: BaseException) -> None:
    write(tmp_path / "out", model=b"old")
    before = contents(tmp_path / "out")

    def fill() -> None:
        with ArtifactWriter(tmp_path / "out") as writer:
            writer.add_text("recipe.toml", "half")
            raise error

    with pytest.raises(type(error)):
        fill()
    assert contents(tmp_path / "out") == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


class Interrupting:
    """Stands in for a function: its call number ``at`` raises instead, before or after the work is done."""

    def __init__(self, real: Callable[..., object], at: int, error: BaseException, *, after: bool) -> None:
        self.real, self.at, self.error, self.after = real, at, error, after
        self.calls = 0

    def __call__(self, *arguments: object, **named: object) -> object:
        self.calls += 1
        if self.calls != self.at:
            return self.real(*arguments, **named)
        if self.after:
            self.real(*arguments, **named)
        raise self.error


FULL = OSError(28, "No space left on device")


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), FULL])
def test_a_failure_around_the_renames_keeps_one_whole_artifact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, at: int, after: bool
) -> None:
    target = tmp_path / "out"
    write(target, model=b"old")
    old = contents(target)
    interrupting = Interrupting(Path.rename, at, error, after=after)

    def rename(path: Path, to: Path) -> object:
        return interrupting(path, to)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(BadInput if error is FULL else KeyboardInterrupt):
        write(target, model=b"new")
    assert verify_artifact(target) == []
    # Interrupted after the second rename the new one is in place; before, the old one is back.
    if (at, after) == (2, True):
        assert read_artifact(target).model.read_bytes() == b"new"
    else:
        assert contents(target) == old
    assert {path.name for path in tmp_path.iterdir()} == {"out", "built.onnx"}


@pytest.mark.parametrize("place", ["shutil.copyfile", "os.fsync", "hashlib.file_digest"])
def test_a_full_disk_is_bad_input_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    library, name = place.split(".")
    real = getattr(import_module(library), name)
    monkeypatch.setattr(place, Interrupting(real, 1, FULL, after=False))
    with pytest.raises(BadInput, match="No space left on device") as caught:
        write(tmp_path / "out")
    assert caught.value.exit_code == 4
    assert [path.name for path in tmp_path.iterdir()] == ["built.onnx"]


@pytest.mark.parametrize("place", ["file/out", "/proc/nope", "/proc/nope/deeper"])
def test_an_output_that_cannot_be_written_is_found_at_the_start(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(UsageError, match="cannot be written") as caught:
        check_output(tmp_path / place)
    assert caught.value.exit_code == 2
    assert caught.value.hint == "choose another -o"


def test_checking_the_output_leaves_nothing(tmp_path: Path) -> None:
    check_output(tmp_path / "new" / "out")
    assert list(tmp_path.iterdir()) == []


def test_without_a_manifest_nothing_is_published(tmp_path: Path) -> None:
    with pytest.raises(InternalError), ArtifactWriter(tmp_path / "out") as writer:
        writer.add_text("recipe.toml", "bits = 8\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["../outside", "a/b", "", "..", "c:d"])
def test_names_stay_inside_the_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(InternalError), ArtifactWriter(tmp_path / "out") as writer:
        writer.add_text(name, "text")
    assert list(tmp_path.iterdir()) == []


def test_tampering_is_found(tmp_path: Path) -> None:
    target = tmp_path / "out"
    write(target)
    (target / "model.onnx").write_bytes(b"onnX")
    (target / "recipe.toml").unlink()
    (target / "extra").mkdir()
    (target / ".hidden").write_text("", encoding="utf-8")
    assert sorted(verify_artifact(target)) == [
        ".hidden is not of this artifact",
        "extra is not of this artifact",
        "model.onnx is not the file that was written",
        "recipe.toml is missing",
    ]


def test_a_link_to_the_same_bytes_is_found(tmp_path: Path) -> None:
    write(tmp_path / "out")
    shutil.move(tmp_path / "out" / "model.onnx", tmp_path / "elsewhere.onnx")
    (tmp_path / "out" / "model.onnx").symlink_to(tmp_path / "elsewhere.onnx")
    assert verify_artifact(tmp_path / "out") == ["model.onnx is a link"]


def test_only_what_was_written_is_run(tmp_path: Path) -> None:
    target = tmp_path / "out"
    write(target)
    (target / "report.json").write_text("{}", encoding="utf-8")
    (target / "notes.txt").write_text("mine", encoding="utf-8")
    assert read_intact(target).model.read_bytes() == b"onnx", "the engine is what was written, whatever lies beside it"
    (target / "model.onnx").write_bytes(b"onnX")
    with pytest.raises(BadInput, match=r"model\.onnx is not the file that was written") as caught:
        read_intact(target)
    assert "compile again" in str(caught.value)


def test_external_data_is_part_of_the_engine(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"onnx")
    (tmp_path / "model.onnx.data").write_bytes(b"weights")
    with ArtifactWriter(tmp_path / "out") as writer:
        writer.add_file(tmp_path / "model.onnx", "model.onnx")
        writer.finish(FACTS)
    (tmp_path / "out" / "model.onnx.data").write_bytes(b"weightz")
    with pytest.raises(BadInput, match=r"model\.onnx\.data is not the file"):
        read_intact(tmp_path / "out")


def test_a_model_that_the_manifest_does_not_know_is_not_run(tmp_path: Path) -> None:
    write(tmp_path / "out")
    change(tmp_path / "out", files={})
    with pytest.raises(BadInput, match="damaged"):
        read_intact(tmp_path / "out")


def change(target: Path, **facts: object) -> None:
    manifest = json.loads((target / "manifest.json").read_text(encoding="utf-8"))
    (target / "manifest.json").write_text(json.dumps({**manifest, **facts}), encoding="utf-8")


@pytest.mark.parametrize(
    ("facts", "says"),
    [
        ({"schema": 2}, "has schema 2"),
        ({"format": "another"}, "no normfuse artifact"),
        ({"files": {"../../secret": "0"}}, "names '../../secret'"),
        ({"files": ["model.onnx"]}, "manifest is broken"),
        ({"files": {"model.onnx": 3}}, "manifest is broken"),
        ({"session_config": {"a": 1}}, "manifest is broken"),
    ],
)
def test_manifests_that_cannot_be_trusted_are_refused(tmp_path: Path, facts: dict[str, object], says: str) -> None:
    write(tmp_path / "out")
    change(tmp_path / "out", **facts)
    for read in (read_artifact, verify_artifact):
        with pytest.raises(BadInput, match=says):
            read(tmp_path / "out")


def test_what_is_missing_or_no_artifact_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "out")
    (tmp_path / "out" / "model.onnx").unlink()
    with pytest.raises(BadInput, match=r"lacks model\.onnx"):
        read_artifact(tmp_path / "out")
    (tmp_path / "file").write_text("", encoding="utf-8")
    for place, says in ((".", "no normfuse artifact"), ("none", "does not exist"), ("file", "the folder is a file")):
        with pytest.raises(BadInput, match=says):
            read_artifact(tmp_path / place)


def test_a_missing_report_is_said(tmp_path: Path) -> None:
    write(tmp_path / "out")
    found = read_artifact(tmp_path / "out")
    (tmp_path / "out" / "report.json").write_text("[]", encoding="utf-8")
    with pytest.raises(BadInput, match="no readable report"):
        _ = found.report
