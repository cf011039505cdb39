"""A model repository for Triton: what its text says to protobuf's own parser, what is served, what is never lost."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format
from onnx import TensorProto, helper

import normfuse
from normfuse.artifact import ArtifactWriter
from normfuse.errors import BadInput, UsageError
from normfuse.manifest import sha256_of
from normfuse.quant.target import Via
from normfuse.runtime.engine_sidecar import Sidecar, sidecar_text
from normfuse.runtime.onnx_session import AS_WRITTEN, open_onnx
from normfuse.runtime.shapes import Shapes
from normfuse.triton_repository import Served, Serving, write_repository
from normfuse.triton_repository.model_config import quoted

Field = descriptor_pb2.FieldDescriptorProto
FIELDS: Final = {
    "Parameter": [("string_value", 1, "string")],
    "Reshape": [("shape", 1, "int64*")],
    "Input": [("name", 1, "string"), ("data_type", 2, "DataType"), ("dims", 4, "int64*"), ("reshape", 5, "Reshape")],
    "Output": [("name", 1, "string"), ("data_type", 2, "DataType"), ("dims", 3, "int64*"), ("reshape", 5, "Reshape")],
    "Group": [("count", 2, "int32"), ("kind", 4, "Kind")],
    "Batching": [("preferred_batch_size", 1, "int32*")],
    "Entry": [("key", 1, "string"), ("value", 2, "Parameter")],
    "ModelConfig": [
        *(("name", 1, "string"), ("platform", 2, "string"), ("backend", 17, "string"), ("max_batch_size", 4, "int32")),
        *(("input", 5, "Input*"), ("output", 6, "Output*"), ("instance_group", 7, "Group*")),
        *(("dynamic_batching", 11, "Batching"), ("parameters", 14, "Entry*")),
    ],
}
"""The part of Triton's model_config.proto that is written; ``*`` is repeated. The numbers play no part in text."""
TYPES: Final = ["INVALID", "BOOL", *(f"{u}INT{n}" for u in ("U", "") for n in (8, 16, 32, 64)), "FP16", "FP32", "FP64"]
ENUMS: Final = {
    "DataType": [f"TYPE_{name}" for name in (*TYPES, "STRING", "BF16")],
    "Kind": [f"KIND_{name}" for name in ("AUTO", "GPU", "CPU", "MODEL")],
}
SCALARS: Final = {"string": Field.TYPE_STRING, "int64": Field.TYPE_INT64, "int32": Field.TYPE_INT32}


def model_config_class() -> Any:
    file = descriptor_pb2.FileDescriptorProto(name="model_config.proto", package="inference", syntax="proto3")
    for name, values in ENUMS.items():
        enum = file.enum_type.add(name=name)
        for number, value in enumerate(values):
            enum.value.add(name=value, number=number)
    for name, fields in FIELDS.items():
        message = file.message_type.add(name=name)
        for field, number, kind in fields:
            label = Field.LABEL_REPEATED if kind.endswith("*") else Field.LABEL_OPTIONAL
            kind = kind.removesuffix("*")
            typed = {"type": SCALARS[kind]} if kind in SCALARS else {"type_name": f".inference.{kind}"}
            message.field.add(name=field, number=number, label=label, **typed)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("inference.ModelConfig"))


MODEL_CONFIG: Final = model_config_class()


def config_of(served: Served) -> Any:
    """What protobuf's parser reads; a name that Triton does not know, or a wrong escape, is an error."""
    return text_format.Parse((served.folder / "config.pbtxt").read_text(encoding="ascii"), MODEL_CONFIG())


def tensors(ports: Any) -> dict[str, tuple[str, list[int], bool]]:
    return {port.name: (ENUMS["DataType"][port.data_type], list(port.dims), port.HasField("reshape")) for port in ports}


Sizes = Sequence[int | str]
Ports = dict[str, tuple[int, Sizes]]
Extra = Callable[[Path], dict[str, bytes]]
"""More files, for an ONNX file."""


def zeros(name: str, kind: int, sizes: Sizes) -> list[onnx.NodeProto]:
    """Return nodes that make an output of zeros, of size 1 where an axis is free."""
    shape = [size if isinstance(size, int) else 1 for size in sizes]
    made = helper.make_tensor("sizes", I64, [len(shape)], shape)
    return [
        helper.make_node("Constant", [], [f"{name} sizes"], value=made),
        helper.make_node("ConstantOfShape", [f"{name} sizes"], [f"{name} zeros"]),
        helper.make_node("Cast", [f"{name} zeros"], [name], to=kind),
    ]


def artifact(folder: Path, inputs: Ports, outputs: Ports, *, extra: Extra | None = None, **facts: object) -> Path:
    """Write an artifact whose model has these ports; what it computes is of no matter."""
    nodes = [node for name, port in outputs.items() for node in zeros(name, *port)]
    return artifact_of(folder, nodes, inputs, outputs, extra=extra, **facts)


def artifact_of(
    folder: Path,
    nodes: Sequence[onnx.NodeProto],
    inputs: Ports,
    outputs: Ports,
    *,
    extra: Extra | None = None,
    **facts: object,
) -> Path:
    values = ([helper.make_tensor_value_info(n, *port) for n, port in ports.items()] for ports in (inputs, outputs))
    graph = helper.make_graph(nodes, "graph", *values)
    folder.parent.mkdir(parents=True, exist_ok=True)
    source = folder.parent / "built.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), source)
    with ArtifactWriter(folder) as writer:
        writer.add_file(source, "model.onnx")
        for name, data in (extra(source) if extra else {}).items():
            writer.add_bytes(name, data)
        writer.finish({"verdict": {"verdict": "kept"}, **facts})
    source.unlink()
    return folder


F32, F16, F64, I64 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.INT64
BATCHED: Final[Ports] = {"x": (F32, ["batch", 3, 5])}
RESULT: Final[Ports] = {"y": (F32, ["batch", 7])}


def engine(flavour: str = "tensorrt", shapes: Mapping[str, Shapes] | None = None, via: Via = Via.ONNX) -> Extra:
    """Return what makes an engine and its sidecar for an ONNX file."""

    def files(onnx_file: Path) -> dict[str, bytes]:
        sidecar = Sidecar(
            sha256=hashlib.sha256(b"plan").hexdigest(),
            flavour=flavour,
            via=via,
            version="11.4.0.106",
            capabilities=(),
            onnx_sha256=sha256_of(onnx_file),
            weights_sha256=None,
            shapes=shapes or {},
            workspace_bytes=1,
            level=3,
            version_compatible=False,
            messages=(),
        )
        return {"model.engine": b"plan", "model.engine.json": sidecar_text(sidecar).encode()}

    return files


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_free_batch_is_tritons(tmp_path: Path) -> None:
    served = write_repository(artifact(tmp_path / "vit", BATCHED, RESULT), tmp_path / "models")
    config = config_of(served)
    assert served.folder == tmp_path / "models" / "vit"
    assert (config.name, config.backend, config.platform) == ("vit", "onnxruntime", "onnxruntime_onnx")
    assert config.max_batch_size == 8
    assert tensors(config.input) == {"x": ("TYPE_FP32", [3, 5], False)}
    assert tensors(config.output) == {"y": ("TYPE_FP32", [7], False)}
    assert config.HasField("dynamic_batching")
    assert [(group.count, group.kind) for group in config.instance_group] == [(1, ENUMS["Kind"].index("KIND_CPU"))]
    assert not served.warnings
    assert not served.notes
    assert sorted(contents(served.folder)) == ["1/model.onnx", "config.pbtxt"]


FIXED: Final[dict[str, tuple[Ports, Ports]]] = {
    "a fixed batch": ({"x": (F32, [4, 3])}, {"y": (F32, [4, 7])}),
    "an output without the batch": ({"x": (F32, ["batch", 3])}, {"y": (F32, [7])}),
    "two axes": ({"x": (F32, ["batch", 3]), "z": (F32, ["tokens", 3])}, {"y": (F32, ["batch", 7])}),
    "every sample with every other": ({"x": (F32, ["batch", 3])}, {"y": (F32, ["batch", "batch"])}),
}


@pytest.mark.parametrize("name", FIXED)
def test_what_cannot_be_put_together_gets_all_dims(tmp_path: Path, name: str) -> None:
    inputs, outputs = FIXED[name]
    made = artifact(tmp_path / "a", inputs, outputs)
    config = config_of(write_repository(made, tmp_path / "models"))
    assert config.max_batch_size == 0
    assert not config.HasField("dynamic_batching")
    expected = {n: [-1 if isinstance(s, str) else s for s in sizes] for n, (_, sizes) in {**inputs, **outputs}.items()}
    assert {port.name: list(port.dims) for port in (*config.input, *config.output)} == expected
    with pytest.raises(UsageError, match="cannot be put together"):
        write_repository(made, tmp_path / "models", Serving(name="b", largest_batch=4))
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["a"]


def test_inputs_of_different_ranks_and_types(tmp_path: Path) -> None:
    inputs: Ports = {
        "ids": (I64, ["batch", "tokens"]),
        "image": (F16, ["batch", 3, 6, 5]),
        "length": (TensorProto.INT32, ["batch"]),
        "flag": (TensorProto.BOOL, ["batch", 1]),
    }
    outputs: Ports = {"score": (F64, ["batch"]), "map": (TensorProto.UINT8, ["batch", "tokens", 9])}
    served = write_repository(artifact(tmp_path / "a", inputs, outputs), tmp_path / "models", Serving(largest_batch=32))
    config = config_of(served)
    assert config.max_batch_size == 32
    assert tensors(config.input) == {
        "ids": ("TYPE_INT64", [-1], False),
        "image": ("TYPE_FP16", [3, 6, 5], False),
        "length": ("TYPE_INT32", [1], True),
        "flag": ("TYPE_BOOL", [1], False),
    }
    assert list(config.input[2].reshape.shape) == []
    assert tensors(config.output) == {"score": ("TYPE_FP64", [1], True), "map": ("TYPE_UINT8", [-1, 9], False)}


def test_without_batches_a_free_first_axis_is_a_dim(tmp_path: Path) -> None:
    made = artifact(tmp_path / "a", {**BATCHED, "one": (F32, [])}, RESULT)
    config = config_of(write_repository(made, tmp_path / "models", Serving(largest_batch=0, instances=3)))
    assert tensors(config.input) == {"x": ("TYPE_FP32", [-1, 3, 5], False), "one": ("TYPE_FP32", [1], False)}
    assert config.instance_group[0].count == 3


@pytest.mark.parametrize("name", ['say "x"', "a\\b", "new\nline", "größe", "µ\x00\x7f", "a'b#c{}"])
def test_any_name_of_a_tensor_comes_back(tmp_path: Path, name: str) -> None:
    read = text_format.Parse(f"name: {quoted(name)}", MODEL_CONFIG())
    assert read.name == name
    if "\x00" not in name:
        config = config_of(
            write_repository(artifact(tmp_path / "a", {name: BATCHED["x"]}, RESULT), tmp_path / "models")
        )
        assert [port.name for port in config.input] == [name]


@pytest.mark.parametrize("name", ["", "..", ".hidden", "a/b", "a\\b", "two words", "a..b", "-x", "größe", "a\n"])
def test_names_that_triton_cannot_take(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="no name of a model"):
        write_repository(artifact(tmp_path / "a", BATCHED, RESULT), tmp_path / "models", Serving(name=name))
    assert not (tmp_path / "models").exists()


def test_session_entries_that_triton_has_no_way_to_set_are_said(tmp_path: Path) -> None:
    entries = {"session.qdqisint8allowed": "1", "session.use_device_allocator_for_initializers": "1"}
    made = artifact(tmp_path / "a", BATCHED, RESULT, session_config=entries)
    served = write_repository(made, tmp_path / "models")
    (warning,) = served.warnings
    assert "session.qdqisint8allowed = 1" in warning
    assert "on random inputs its answers differ by 0," in warning
    (entry,) = config_of(served).parameters
    assert (entry.key, entry.value.string_value) == ("session.use_device_allocator_for_initializers", "1")


def test_a_full_engine_is_served_where_there_is_one(tmp_path: Path) -> None:
    entries = {"session.qdqisint8allowed": "1"}
    made = artifact(tmp_path / "a", BATCHED, RESULT, extra=engine(), session_config=entries)
    served = write_repository(made, tmp_path / "models")
    config = config_of(served)
    assert (config.backend, config.platform) == ("tensorrt", "tensorrt_plan")
    assert config.instance_group[0].kind == ENUMS["Kind"].index("KIND_GPU")
    assert contents(served.folder)["1/model.plan"] == b"plan"
    assert not served.warnings, "the entries are onnxruntime's"
    assert ["batches of 8" in note for note in served.notes] == [True]
    assert not write_repository(made, tmp_path / "models", Serving(largest_batch=0)).notes

    served = write_repository(made, tmp_path / "models", Serving(engine=False))
    assert config_of(served).backend == "onnxruntime"
    assert sorted(contents(served.folder)) == ["1/model.onnx", "config.pbtxt"], "the older model was replaced whole"
    assert not served.notes


def test_batches_are_those_that_the_engine_was_built_for(tmp_path: Path) -> None:
    built = engine(shapes={"x": ((1, 3, 5), (4, 3, 5), (24, 3, 5))})
    made = artifact(tmp_path / "a", BATCHED, RESULT, extra=built)
    served = write_repository(made, tmp_path / "models")
    assert config_of(served).max_batch_size == 24
    assert not served.notes, "nothing is left to be hoped for"
    assert config_of(write_repository(made, tmp_path / "models", Serving(largest_batch=24))).max_batch_size == 24
    with pytest.raises(UsageError, match="built for batches of at most 24"):
        write_repository(made, tmp_path / "models", Serving(largest_batch=25))
    onnx = write_repository(made, tmp_path / "models", Serving(engine=False))
    assert config_of(onnx).max_batch_size == 8, "the ONNX file takes any"

    never_one = engine(shapes={"x": ((2, 3, 5), (4, 3, 5), (24, 3, 5))})
    made = artifact(tmp_path / "b", BATCHED, RESULT, extra=never_one)
    assert config_of(write_repository(made, tmp_path / "models")).max_batch_size == 0, "Triton may send one request"
    with pytest.raises(UsageError, match="cannot be put together"):
        write_repository(made, tmp_path / "models", Serving(largest_batch=4))


def test_a_file_that_onnxruntime_does_not_open_as_triton_does_is_refused(tmp_path: Path) -> None:
    nodes = [helper.make_node("Unheard", ["x"], ["y"])]
    made = artifact_of(tmp_path / "a", nodes, BATCHED, {"y": BATCHED["x"]})
    with pytest.raises(BadInput, match="opened as Triton's onnxruntime backend opens it"):
        write_repository(made, tmp_path / "models")
    assert not (tmp_path / "models").exists()


def test_a_file_that_answers_something_else_without_its_entries_is_refused(tmp_path: Path) -> None:
    """Onnxruntime drops a Relu in front of 8-bit floats."""
    nodes = [
        helper.make_node("Constant", [], ["s"], value=helper.make_tensor("s", F32, [], [0.01])),
        helper.make_node("Constant", [], ["z"], value=helper.make_tensor("z", TensorProto.FLOAT8E4M3FN, [], [0.0])),
        helper.make_node("Relu", ["x"], ["r"]),
        helper.make_node("QuantizeLinear", ["r", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    made = artifact_of(tmp_path / "a", nodes, BATCHED, {"y": BATCHED["x"]}, session_config=AS_WRITTEN)
    with pytest.raises(BadInput, match=r"outputs differ by [0-9.]+ of the largest"):
        write_repository(made, tmp_path / "models")


@pytest.mark.parametrize(
    ("inputs", "extra", "says"),
    [
        (BATCHED, engine("tensorrt_rtx"), "TensorRT-RTX"),
        (BATCHED, lambda _: {"model.engine": b"plan"}, "nothing says"),
        (BATCHED, lambda _: {"model.engine": b"plan", "model.engine.json": b"[3"}, "nothing says"),
        (BATCHED, engine(via=Via.TORCH_TENSORRT), "torch-tensorrt built it, which calls outputs output0"),
        ({"x": (F64, ["batch", 3])}, engine(), "x is float64"),
        ({**BATCHED, "one": (F32, [])}, engine(), "one has no axes"),
    ],
)
def test_an_engine_that_triton_cannot_take_is_not_served(
    tmp_path: Path, inputs: Ports, extra: Extra, says: str
) -> None:
    made = artifact(tmp_path / "a", inputs, RESULT, extra=extra)
    served = write_repository(made, tmp_path / "models")
    assert config_of(served).backend == "onnxruntime"
    (note,) = served.notes
    assert says in note
    with pytest.raises(UsageError, match=says):
        write_repository(made, tmp_path / "models", Serving(engine=True))


def test_an_engine_is_checked_as_before_it_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def another(onnx_file: Path) -> dict[str, bytes]:
        return {**engine()(onnx_file), "model.engine": b"evil"}

    made = artifact(tmp_path / "a", BATCHED, RESULT, extra=another)
    for trust in (False, True):
        with pytest.raises(UsageError, match="not the file that its sidecar was written for"):
            write_repository(made, tmp_path / "models", Serving(engine=True, trust_engine=trust))

    made = artifact(tmp_path / "b", BATCHED, RESULT, extra=engine())
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "somebody else"))
    with pytest.raises(UsageError, match="built elsewhere"):
        write_repository(made, tmp_path / "models", Serving(engine=True))
    served = write_repository(made, tmp_path / "models", Serving(engine=True, trust_engine=True))
    assert contents(served.folder)["1/model.plan"] == b"plan"


def test_profiles_that_have_no_batch_in_common(tmp_path: Path) -> None:
    inputs: Ports = {"x": (F32, ["batch", 3]), "z": (F32, ["batch", 3])}
    shapes: dict[str, Shapes] = {"x": ((4, 3), (4, 3), (8, 3)), "z": ((1, 3), (1, 3), (2, 3))}
    made = artifact(tmp_path / "a", inputs, RESULT, extra=engine(shapes=shapes))
    for asked in (None, 0):
        served = write_repository(made, tmp_path / "models", Serving(largest_batch=asked))
        assert config_of(served).max_batch_size == 0


def test_an_engine_that_is_not_there_cannot_be_asked_for(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is none"):
        write_repository(artifact(tmp_path / "a", BATCHED, RESULT), tmp_path / "models", Serving(engine=True))


def test_types_that_onnxruntimes_backend_does_not_take(tmp_path: Path) -> None:
    bfloat16: Ports = {"x": (TensorProto.BFLOAT16, ["batch", 3])}
    with pytest.raises(BadInput, match="x is bfloat16"):
        write_repository(artifact(tmp_path / "a", bfloat16, bfloat16), tmp_path / "models")
    served = write_repository(artifact(tmp_path / "b", bfloat16, RESULT, extra=engine()), tmp_path / "models")
    assert tensors(config_of(served).input) == {"x": ("TYPE_BF16", [3], False)}
    text: Ports = {"x": (TensorProto.STRING, ["batch"])}
    with pytest.raises(BadInput, match="type and axes of x"):
        write_repository(artifact(tmp_path / "c", text, text), tmp_path / "models")


def test_damaged_and_folded_artifacts_are_refused(tmp_path: Path) -> None:
    made = artifact(tmp_path / "a", BATCHED, RESULT)
    (made / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(BadInput, match=r"damaged: notes\.txt is not of this artifact"):
        write_repository(made, tmp_path / "models")
    with ArtifactWriter(tmp_path / "folded") as writer:
        writer.add_bytes("model.pt2", b"archive")
        writer.finish({"kind": "fold"})
    with pytest.raises(BadInput, match="no engine"):
        write_repository(tmp_path / "folded", tmp_path / "models")
    assert not (tmp_path / "models").exists()


def test_a_repository_inside_of_the_artifact_is_refused(tmp_path: Path) -> None:
    made = artifact(tmp_path / "a", BATCHED, RESULT)
    with pytest.raises(UsageError, match="inside of the artifact"):
        write_repository(made, made)


def test_what_was_written_is_replaced_and_others_stay(tmp_path: Path) -> None:
    models = tmp_path / "models"
    (models / "other" / "1").mkdir(parents=True)
    (models / "other" / "1" / "model.onnx").write_bytes(b"theirs")
    made = artifact(tmp_path / "a", BATCHED, RESULT)
    first = contents(write_repository(made, models).folder)
    assert contents(write_repository(made, models).folder) == first
    assert config_of(write_repository(made, models, Serving(largest_batch=2))).max_batch_size == 2
    assert sorted(path.name for path in models.iterdir()) == ["a", "other"]
    assert contents(models / "other") == {"1/model.onnx": b"theirs"}


def another_model(folder: Path) -> None:
    shutil.rmtree(folder)
    (folder / "1").mkdir(parents=True)
    (folder / "config.pbtxt").write_text('backend: "onnxruntime"\n', encoding="utf-8")


def edited(folder: Path) -> None:
    with (folder / "config.pbtxt").open("a", encoding="utf-8") as file:
        file.write("# tuned by hand\n")


def second_version(folder: Path) -> None:
    (folder / "2").mkdir()


def labels(folder: Path) -> None:
    (folder / "labels.txt").write_text("cat", encoding="utf-8")


def without_config(folder: Path) -> None:
    (folder / "config.pbtxt").unlink()


def a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("a file", encoding="utf-8")


def linked(folder: Path) -> None:
    (folder / "1" / "model.onnx").unlink()
    (folder / "1" / "model.onnx").symlink_to(folder / "config.pbtxt")


CHANGES: Final = [another_model, edited, second_version, labels, without_config, a_file, linked]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_others_wrote_or_changed_is_refused(tmp_path: Path, change: Any) -> None:
    made = artifact(tmp_path / "a", BATCHED, RESULT)
    target = write_repository(made, tmp_path / "models").folder
    change(target)
    before = contents(tmp_path / "models")
    with pytest.raises(UsageError, match="did not write, or that was changed"):
        write_repository(made, tmp_path / "models")
    assert contents(tmp_path / "models") == before
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["a"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    made = artifact(tmp_path / "a", BATCHED, RESULT)
    write_repository(made, tmp_path / "models")
    before = contents(tmp_path / "models")

    def full(*_: object) -> None:
        raise error

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(BadInput if isinstance(error, OSError) else KeyboardInterrupt):
        write_repository(made, tmp_path / "models", Serving(largest_batch=2))
    assert contents(tmp_path / "models") == before
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["a"]


def test_constants_beside_the_model_are_in_a_folder_with_it(tmp_path: Path) -> None:
    weight = onnx.numpy_helper.from_array(np.full((3, 2), 0.5, dtype=np.float32), "w")
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    x, y = (helper.make_tensor_value_info(n, F32, ["batch", size]) for n, size in (("x", 3), ("y", 2)))
    graph = helper.make_graph([node], "graph", [x], [y], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, tmp_path / "model.onnx", save_as_external_data=True, location="model.onnx.data", size_threshold=0)
    with ArtifactWriter(tmp_path / "a") as writer:
        writer.add_file(tmp_path / "model.onnx", "model.onnx")
        writer.finish({})
    served = write_repository(tmp_path / "a", tmp_path / "models")
    assert sorted(contents(served.folder)) == [
        "1/model.onnx/model.onnx",
        "1/model.onnx/model.onnx.data",
        "config.pbtxt",
    ]
    session = open_onnx(served.folder / "1" / "model.onnx" / "model.onnx")
    assert session(np.ones((4, 3), dtype=np.float32))["y"].tolist() == [[1.5, 1.5]] * 4
    assert write_repository(tmp_path / "a", tmp_path / "models").files == served.files


@pytest.mark.slow
def test_what_is_served_is_what_load_runs(tmp_path: Path) -> None:
    import torch
    from torch import nn

    from normfuse.testing import randomized, seeded

    model = randomized(nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3)))
    samples = torch.randn(32, 12, generator=seeded(0))
    recipe = normfuse.Recipe(bits=8, benchmark=False)
    normfuse.compile(model, calibration=samples, recipe=recipe).save(tmp_path / "a")
    served, loaded = write_repository(tmp_path / "a", tmp_path / "models"), normfuse.load(tmp_path / "a")
    # onnxruntime, and so Triton's backend of it, sees the same inputs and outputs as the configuration names.
    assert (tuple(served.config.inputs), tuple(served.config.outputs)) == (loaded.inputs, loaded.outputs)
    config = config_of(served)
    batch = samples[: config.max_batch_size].numpy()
    assert batch.shape[1:] == tuple(config.input[0].dims)
    session = open_onnx(served.folder / "1" / "model.onnx")  # with the session that Triton opens: no entries
    if not served.warnings:
        expected = loaded(**{config.input[0].name: batch})
        found = session(**{config.input[0].name: batch})
        assert np.array_equal(found[config.output[0].name], expected[config.output[0].name])
