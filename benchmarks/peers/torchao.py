"""torchao's PT2E quantization for x86 of the exported program, run by its own environment's Python."""

from __future__ import annotations

import torch
from torchao.quantization.pt2e import move_exported_model_to_eval
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
    X86InductorQuantizer,
    get_default_x86_inductor_quantization_config,
)

from benchmarks.peers.order import Floats, Order, Quantized, obey

TENSORS = "inputs and weights of linear maps and convolutions; sums behind convolutions"
"""Counted in the zoo's ViT and CNN: attention stays float."""


def quantize(order: Order, samples: Floats) -> Quantized:
    """Quantize as torchao's tutorial for x86 says: static, weights per channel, histogram observers."""
    program = torch.export.load(order.archive)
    quantizer = X86InductorQuantizer()
    quantizer.set_global(get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(program.module(check_guards=False), quantizer)
    with torch.no_grad():
        for part in torch.from_numpy(samples).split(16):
            prepared(part)
    converted = convert_pt2e(prepared)
    move_exported_model_to_eval(converted)
    return Quantized(lambda images: converted(torch.from_numpy(images)).numpy(), TENSORS)


if __name__ == "__main__":
    with torch.no_grad():
        obey("torchao", quantize)
