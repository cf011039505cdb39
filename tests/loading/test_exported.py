"""torch.export archives load without running anything, and say so when they would."""

import contextlib
import json
import logging
import os
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import normfuse
from normfuse.errors import BadInput, UnsupportedModel, UsageError
from normfuse.loading import ModelKind, load_model

Members = dict[str, bytes]


class Branching(nn.Module):
    """Several inputs and outputs, dynamic shapes, a buffer, a constant, a no_grad block."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)
        self.register_buffer("shift", torch.arange(3.0))
        self.factor = torch.tensor([2.0])

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Any]:
        joined = self.linear(torch.cat([x.reshape(-1, 6), y])) * self.factor
        with torch.no_grad():
            joined = joined * 2
        pieces = x.reshape(-1, 2, 3).flatten(0, 1)
        return {"a": joined + self.shift, "b": (pieces, joined.argmax(-1).float() / x.shape[0])}


def program() -> ExportedProgram:
    torch.manual_seed(1)
    dynamic = ({0: Dim.AUTO}, {0: Dim.AUTO})
    return torch.export.export(Branching().eval(), (torch.randn(4, 6), torch.randn(3, 6)), dynamic_shapes=dynamic)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("archive") / "model.pt2"
    torch.export.save(program(), path)
    return path


def members(path: Path) -> Members:
    with zipfile.ZipFile(path) as opened:
        return {name.partition("/")[2]: opened.read(name) for name in opened.namelist()}


def write(path: Path, content: Members) -> Path:
    """Write an archive with torch's own writer, which aligns members as its reader wants them."""
    writer = torch._C.PyTorchFileWriter(str(path))
    writer.set_min_version(6)
    for name, data in content.items():
        if not name.startswith(".data/") and name != "byteorder":
            writer.write_record(name, data, len(data))
    writer.write_end_of_file()
    return path


def edited(archive: Path, path: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
    content = members(archive)
    model = json.loads(content["models/model.json"])
    edit(model)
    content["models/model.json"] = json.dumps(model).encode()
    return write(path, content)


def test_loads(archive: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        loaded = load_model(archive)
    x, y = torch.randn(5, 6), torch.randn(2, 6)
    assert loaded.kind is ModelKind.EXPORTED
    assert isinstance(loaded.model, ExportedProgram)
    actual, expected = loaded.model.module()(x, y), program().module()(x, y)
    assert torch.equal(actual["a"], expected["a"])
    assert torch.equal(actual["b"][1], expected["b"][1])
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_rewritten_unchanged_loads(archive: Path, tmp_path: Path) -> None:
    """The edits below are refused for what they change, not for having been rewritten."""
    assert load_model(edited(archive, tmp_path / "same.bin", lambda model: None)).kind is ModelKind.EXPORTED


class Halving(nn.Module):
    """Arithmetic on shapes: guards, quotients, a text argument, control flow."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        pairs = x.reshape(x.shape[0], -1, 2)[:, ::2]
        wider = nn.functional.interpolate(pairs.mT, size=x.shape[1] * 2 + 1, mode="linear")
        return wider, torch.einsum("bi,bi->b", x, x), torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,))


@pytest.mark.parametrize("axis", [Dim.AUTO, 2 * Dim("half", min=2, max=9)], ids=["auto", "even"])
def test_shape_arithmetic_is_not_refused(tmp_path: Path, axis: Any) -> None:
    x = torch.randn(4, 6)
    exported = torch.export.export(Halving(), (x,), dynamic_shapes=({0: Dim.AUTO, 1: axis},))
    torch.export.save(exported, tmp_path / "m.pt2")
    loaded = load_model(tmp_path / "m.pt2")
    assert isinstance(loaded.model, ExportedProgram)
    x = torch.randn(3, 10)
    for actual, expected in zip(loaded.model.module()(x), Halving()(x), strict=True):
        assert torch.equal(actual, expected)


def test_arch_is_refused(archive: Path) -> None:
    with pytest.raises(UsageError, match="its own network"):
        load_model(archive, arch="torch.nn:Identity")


RUN = "__import__('os').mkdir({trace!r})"


def nodes(model: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = model["graph_module"]["graph"]["nodes"]
    return found


def in_expression(model: dict[str, Any], run: str) -> None:
    model["graph_module"]["graph"]["tensor_values"]["x"]["sizes"][0]["as_expr"]["expr_str"] = run


def in_inner_expression(model: dict[str, Any], run: str) -> None:
    model["graph_module"]["graph"]["tensor_values"]["x"]["sizes"][0]["as_expr"]["expr_str"] = f"Max(2, Symbol({run!r}))"


def in_attribute(model: dict[str, Any], run: str) -> None:
    in_expression(model, "Symbol.__class__.__subclasses__(Symbol)")


def in_guard(model: dict[str, Any], run: str) -> None:
    model["guards_code"] = [run + " is None"]


def in_placeholder(model: dict[str, Any], run: str) -> None:
    text = json.dumps(model).replace('"name": "x"', json.dumps({"name": f"x={run}"})[1:-1])
    model.clear()
    model.update(json.loads(text.replace('"x": {"dtype"', json.dumps(f"x={run}") + ': {"dtype"')))


def in_target(model: dict[str, Any], run: str) -> None:
    nodes(model)[0]["target"] = "torch.hub.os.system"


def in_operator_of_objects(model: dict[str, Any], run: str) -> None:
    nodes(model)[0]["target"] = "torch.ops.aten.__class__.mro"


def in_operator_module(model: dict[str, Any], run: str) -> None:
    nodes(model)[0]["target"] = "_operator.methodcaller"


def in_file_operator(model: dict[str, Any], run: str) -> None:
    nodes(model)[0]["target"] = "torch.ops.aten.from_file.default"


def in_foreign_space(model: dict[str, Any], run: str) -> None:
    nodes(model)[0]["target"] = "torch.ops.inductor.resize_storage_bytes_.default"


def in_buffer_name(model: dict[str, Any], run: str) -> None:
    specs = model["graph_module"]["signature"]["input_specs"]
    next(spec for spec in specs if "buffer" in spec)["buffer"]["buffer_name"] = f'a") or {run} or ("'


def in_default_factory(model: dict[str, Any], run: str) -> None:
    context = {"default_factory_module": "antigravity", "default_factory_name": "x", "dict_context": []}
    tree = {"type": "collections.defaultdict", "context": context, "children_spec": []}
    model["graph_module"]["module_call_graph"][0]["signature"]["out_spec"] = json.dumps([1, tree])


def in_enumeration(model: dict[str, Any], run: str) -> None:
    context = '[{"\\u005f_enum__": true, "fqn": "antigravity:x", "name": "y"}]'
    tree = {"type": "builtins.dict", "context": context, "children_spec": []}
    model["graph_module"]["module_call_graph"][0]["signature"]["out_spec"] = json.dumps([1, tree])


def in_constant_input(model: dict[str, Any], run: str) -> None:
    model["graph_module"]["graph"]["inputs"].append({"as_string": f"' + str({run}) + '"})


def in_constant_object(model: dict[str, Any], run: str) -> None:
    model["graph_module"]["graph"]["inputs"].append({"as_custom_obj": {"name": "o", "class_fqn": "a.B"}})


HOSTILE = [
    in_expression,
    in_inner_expression,
    in_attribute,
    in_guard,
    in_placeholder,
    in_target,
    in_operator_of_objects,
    in_operator_module,
    in_file_operator,
    in_foreign_space,
    in_buffer_name,
    in_default_factory,
    in_enumeration,
    in_constant_input,
    in_constant_object,
]


@pytest.mark.parametrize("place", HOSTILE, ids=lambda place: place.__name__)
def test_hostile_program_is_refused(
    archive: Path, tmp_path: Path, place: Callable[[dict[str, Any], str], None]
) -> None:
    trace = tmp_path / "trace"
    path = edited(archive, tmp_path / "m.pt2", lambda model: place(model, RUN.format(trace=str(trace))))
    with pytest.raises(BadInput, match="could run code from it") as caught:
        load_model(path)
    assert "models/model.json" in caught.value.where
    assert not trace.exists()


def test_the_attacks_are_real(archive: Path, tmp_path: Path) -> None:
    """torch itself runs two of the payloads above, so refusing them protects against something."""
    for place in (in_expression, in_guard):
        trace = tmp_path / place.__name__
        path = tmp_path / f"{place.__name__}.pt2"
        edited(archive, path, lambda model: place(model, RUN.format(trace=str(trace))))  # noqa: B023
        with warnings.catch_warnings(), contextlib.suppress(Exception):
            warnings.simplefilter("ignore")
            torch.export.load(path).module()(torch.randn(4, 6), torch.randn(3, 6))
        assert trace.exists()


class Evil:
    """Leaves a folder behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("member", ["data/sample_inputs/model.pt", "data/weights/model.pt", "data/constants/model.pt"])
def test_hostile_pickle_is_refused(archive: Path, tmp_path: Path, member: str) -> None:
    trace, payload = tmp_path / "trace", tmp_path / "payload"
    torch.save((Evil(trace),), payload)
    content = members(archive) | {member: payload.read_bytes()}
    path = write(tmp_path / "m.pt2", content)
    with pytest.raises(BadInput, match="could run code from it") as caught:
        load_model(path)
    assert member in caught.value.where
    assert not trace.exists()


def test_tensors_in_old_weight_files_load(archive: Path, tmp_path: Path) -> None:
    saved, expected = tmp_path / "weights", program()
    torch.save(dict(expected.state_dict), saved)
    loaded = load_model(write(tmp_path / "m.pt2", members(archive) | {"data/weights/model.pt": saved.read_bytes()}))
    assert isinstance(loaded.model, ExportedProgram)
    assert torch.equal(loaded.model.state_dict["linear.weight"], expected.state_dict["linear.weight"])


@pytest.mark.parametrize(("key", "value"), [("use_pickle", True), ("path_name", "opaque_obj_0")])
def test_pickled_payload_is_refused(archive: Path, tmp_path: Path, key: str, value: object) -> None:
    content = members(archive)
    name = "data/weights/model_weights_config.json"
    config = json.loads(content[name])
    config["config"]["linear.weight"][key] = value
    with pytest.raises(BadInput, match="is a pickled object"):
        load_model(write(tmp_path / "m.pt2", content | {name: json.dumps(config).encode()}))


def test_members_of_the_old_format_are_refused(archive: Path, tmp_path: Path) -> None:
    """Where the new format fails, torch reads the old one from the same file, and that was not checked."""
    path = tmp_path / "m.pt2"
    path.write_bytes(archive.read_bytes())
    with zipfile.ZipFile(path, "a") as opened:
        opened.writestr("version", "8.7")
        opened.writestr("serialized_exported_program.json", "{}")
    with pytest.raises(BadInput, match=r"torch 2\.7 or older"):
        load_model(path)


def test_machine_code_is_refused(archive: Path, tmp_path: Path) -> None:
    content = members(archive) | {"data/aotinductor/model/code.so": b"\x7fELF"}
    with pytest.raises(BadInput, match="machine code"):
        load_model(write(tmp_path / "m.pt2", content))


@pytest.mark.parametrize(
    "lost",
    [
        "models/model.json",
        "data/sample_inputs/model.pt",
        "data/weights/model_weights_config.json",
        "data/weights/weight_0",
        "archive_version",
    ],
)
def test_missing_member(archive: Path, tmp_path: Path, lost: str) -> None:
    content = {name: data for name, data in members(archive).items() if name != lost}
    with pytest.raises(BadInput, match=r"torch\.export archive cannot be loaded") as caught:
        load_model(write(tmp_path / "m.pt2", content))
    assert caught.value.hint


@pytest.mark.parametrize("keep", [0.3, 0.95])
def test_truncated(archive: Path, tmp_path: Path, keep: float) -> None:
    path, content = tmp_path / "m.pt2", archive.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(BadInput, match="broken or cut off"):
        load_model(path)


def test_broken_json(archive: Path, tmp_path: Path) -> None:
    content = members(archive)
    content["models/model.json"] = content["models/model.json"][:-7]
    with pytest.raises(BadInput, match="JSONDecodeError"):
        load_model(write(tmp_path / "m.pt2", content))


TRAINING: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "dropout": (lambda: nn.Dropout(0.2), True),
    "batch norm": (lambda: nn.BatchNorm1d(5), True),
    "dropout of nothing": (lambda: nn.Dropout(0.0), False),
    "batch norm without statistics": (lambda: nn.BatchNorm1d(5, track_running_stats=False), False),
}


@pytest.mark.parametrize("case", TRAINING)
def test_training_mode(tmp_path: Path, case: str) -> None:
    make, refused = TRAINING[case]
    path = tmp_path / "m.pt2"
    torch.export.save(torch.export.export(nn.Sequential(nn.Linear(5, 5), make()).train(), (torch.randn(3, 5),)), path)
    if not refused:
        assert load_model(path).kind is ModelKind.EXPORTED
        return
    with pytest.raises(UnsupportedModel, match="training mode") as caught:
        load_model(path)
    assert "1" in caught.value.where
    assert "eval" in caught.value.hint


class NoisyAttention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(x, x, x, dropout_p=0.1)


def test_attention_dropout(tmp_path: Path) -> None:
    path = tmp_path / "m.pt2"
    torch.export.save(torch.export.export(NoisyAttention(), (torch.randn(2, 3, 5, 7),)), path)
    with pytest.raises(UnsupportedModel, match="training mode"):
        load_model(path)


class Answer:
    """What a library returns: a class that only a process which has imported it can name."""

    def __init__(self, logits: Tensor, hidden: Tensor) -> None:
        self.logits, self.hidden = logits, hidden


class Answers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> tuple[Any, Tensor]:
        found = self.linear(x)
        return Answer(found, x + 1), found.sum(-1)


def test_classes_of_a_library_are_dicts_in_the_file(tmp_path: Path) -> None:
    key = torch.utils._pytree.MappingKey
    torch.utils._pytree.register_pytree_node(
        Answer,
        lambda answer: ([answer.logits, answer.hidden], ["logits", "hidden"]),
        lambda parts, _: Answer(*parts),
        serialized_type_name="tests.Answer",
        flatten_with_keys_fn=lambda answer: (
            [(key("logits"), answer.logits), (key("hidden"), answer.hidden)],
            ["logits", "hidden"],
        ),
    )
    model, x = Answers().eval(), torch.randn(2, 6)
    normfuse.save(model, x, tmp_path / "model.pt2")
    loaded = load_model(tmp_path / "model.pt2").model
    assert isinstance(loaded, ExportedProgram)
    named, total = loaded.module()(x)
    assert isinstance(named, dict)
    wanted, wanted_total = model(x)
    torch.testing.assert_close(named, {"logits": wanted.logits, "hidden": wanted.hidden})
    torch.testing.assert_close(total, wanted_total)
