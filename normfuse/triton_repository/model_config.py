"""A model's configuration as Triton reads it: protocol buffer text (inference.ModelConfig)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from normfuse.runtime.onnx_session import Port
from normfuse.triton_repository.backends import Backend

__all__ = ["ModelConfig", "can_batch"]

ANY: Final = -1
"""Triton's size of an axis that may have any."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """What Triton has to know of a model; ``largest_batch`` 0 gives every request to the model as it is.

    With a batch, the first axis of all inputs and outputs is Triton's: ``dims`` are the others, and requests are put
    together along it. Triton knows no tensor without dims: a lone batch axis is shown to clients as ``[batch, 1]``, a
    tensor without axes as ``[1]``.
    """

    name: str
    backend: Backend
    inputs: Sequence[Port]
    outputs: Sequence[Port]
    largest_batch: int
    instances: int = 1
    parameters: Mapping[str, str] = field(default_factory=dict)

    def text(self) -> str:
        """Return it as protocol buffer text."""
        return "".join(f"{line}\n" for line in self._lines())

    def _lines(self) -> Iterator[str]:
        yield f"name: {quoted(self.name)}"
        yield f"platform: {quoted(self.backend.platform)}"
        yield f"backend: {quoted(self.backend.name)}"
        yield f"max_batch_size: {self.largest_batch}"
        for kind, ports in (("input", self.inputs), ("output", self.outputs)):
            for port in ports:
                yield from (f"{kind} {{", *self._tensor(port), "}")
        if self.largest_batch:
            yield "dynamic_batching { }"
        yield from ("instance_group {", f"  count: {self.instances}", f"  kind: {self.backend.kind}", "}")
        for key, value in self.parameters.items():
            yield f"parameters {{ key: {quoted(key)} value {{ string_value: {quoted(value)} }} }}"

    def _tensor(self, port: Port) -> Iterator[str]:
        sizes = port.shape[1:] if self.largest_batch else port.shape
        yield f"  name: {quoted(port.name)}"
        yield f"  data_type: {self.backend.types[port.dtype.name]}"
        yield f"  dims: [ {', '.join(str(ANY if size is None else size) for size in sizes or (1,))} ]"
        if self.largest_batch and not sizes:
            yield "  reshape { shape: [ ] }"


def can_batch(ports: Sequence[Port]) -> bool:
    """Return whether all begin with one free axis that is nowhere else: then requests can be put together along it."""
    firsts = {port.axes[0] if port.axes else "" for port in ports}
    others = {name for port in ports for name in port.axes[1:]}
    return len(firsts) == 1 and not firsts & {"", *others}


def quoted(text: str) -> str:
    """Return a string of protocol buffer text; all but printable ASCII as octal bytes of its UTF-8."""
    return f'"{"".join(_escaped(byte) for byte in text.encode())}"'


def _escaped(byte: int) -> str:
    character = chr(byte)
    if character in '"\\':
        return f"\\{character}"
    return character if 0x20 <= byte < 0x7F else f"\\{byte:03o}"
