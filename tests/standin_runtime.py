"""The half of a made-up TensorRT that runs engines: on the host, with onnxruntime, in the memory that it is given."""

from __future__ import annotations

from typing import Final

__all__ = ["RUNTIME"]

RUNTIME: Final = """
import ctypes, enum
import numpy as np

RUNS = "as it should"

class TensorIOMode(enum.Enum):
    INPUT = 1
    OUTPUT = 2

class TensorLocation(enum.Enum):
    DEVICE = 0
    HOST = 1

class DataType(enum.Enum):
    FLOAT = 0
    HALF = 1
    INT64 = 2
    BOOL = 3
    INT4 = 4

TYPES = {
    "tensor(float)": DataType.FLOAT,
    "tensor(float16)": DataType.HALF,
    "tensor(int64)": DataType.INT64,
    "tensor(bool)": DataType.BOOL,
}
NUMPY = {
    DataType.FLOAT: np.float32, DataType.HALF: np.float16, DataType.INT64: np.int64, DataType.BOOL: np.bool_,
}

class Runtime:
    def __init__(self, logger): self.logger = logger
    def deserialize_cuda_engine(self, plan):
        if RUNS == "ends":
            os.kill(os.getpid(), 11)
        import onnxruntime
        options = onnxruntime.SessionOptions()
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        try:
            return Engine(onnxruntime.InferenceSession(plan, options), self.logger)
        except Exception:
            self.logger.log(1, "magic tag does not match")
            return None

class Engine:
    def __init__(self, session, logger):
        self.session, self.logger = session, logger
        self.inputs = {each.name: each for each in session.get_inputs()}
        self.outputs = {each.name: each for each in session.get_outputs()}
        self.num_io_tensors = len(self.inputs) + len(self.outputs)
    def get_tensor_name(self, index): return [*self.inputs, *self.outputs][index]
    def get_tensor_mode(self, name): return TensorIOMode.INPUT if name in self.inputs else TensorIOMode.OUTPUT
    def get_tensor_location(self, name): return TensorLocation.DEVICE
    def get_tensor_dtype(self, name):
        return DataType.INT4 if RUNS == "strange type" else TYPES[{**self.inputs, **self.outputs}[name].type]
    def create_execution_context(self):
        if RUNS == "no room":
            self.logger.log(1, "CUDA out of memory")
            return None
        return Context(self)

class Context:
    def __init__(self, engine): self.engine, self.shapes, self.addresses = engine, {}, {}
    def set_input_shape(self, name, shape):
        if RUNS == "other shapes":
            self.engine.logger.log(1, "not in the profile")
            return False
        self.shapes[name] = shape
        return True
    def set_tensor_address(self, name, address):
        self.addresses[name] = address
        return True
    def get_tensor_shape(self, name):
        zeros = {
            each: np.zeros(shape, NUMPY[TYPES[self.engine.inputs[each].type]]) for each, shape in self.shapes.items()
        }
        shape = self.engine.session.run([name], zeros)[0].shape
        return (-1, *shape[1:]) if RUNS == "by values" else shape
    def at(self, name, shape):
        kind = np.dtype(NUMPY[TYPES[{**self.engine.inputs, **self.engine.outputs}[name].type]])
        size = int(np.prod(shape)) * kind.itemsize
        memory = (ctypes.c_char * size).from_address(self.addresses[name])
        return np.frombuffer(memory, dtype=kind).reshape(shape)
    def execute_async_v3(self, stream):
        assert stream == 0, "on the host there is no other"
        if RUNS == "refuses":
            self.engine.logger.log(1, "an illegal address")
            return False
        feeds = {name: self.at(name, shape) for name, shape in self.shapes.items()}
        for name, value in zip(self.engine.outputs, self.engine.session.run(None, feeds)):
            np.copyto(self.at(name, value.shape), value[..., ::-1] if RUNS == "backwards" else value)
        return True
"""
"""Appended to the builder's; an engine's bytes are an ONNX file."""
