"""Brevitas' post-training flow on the zoo's module, run by its own environment's Python."""

from __future__ import annotations

from argparse import Namespace

import torch
from brevitas.fx.brevitas_tracer import symbolic_trace
from brevitas.graph.quantize import layerwise_quantize, preprocess_for_quantize
from brevitas.inject import value
from brevitas_examples.imagenet_classification.ptq import ptq_common as published
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.peers.order import Floats, Order, Quantized, obey
from examples.zoo.blocks import Attention
from examples.zoo.models import MODELS

EQUALIZATION_STEPS = 20
PERCENTILE = 99.999
BATCH = 64


class PackedAttention(nn.Module):
    """The zoo's attention as torch's own module, which is the one that Brevitas knows."""

    def __init__(self, source: Attention) -> None:
        super().__init__()
        width = source.proj.in_features
        self.inner = nn.MultiheadAttention(width, source.heads, batch_first=True)
        self.inner.in_proj_weight, self.inner.in_proj_bias = source.qkv.weight, source.qkv.bias
        self.inner.out_proj.load_state_dict(source.proj.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        """Return (batch, token, width)."""
        mixed: Tensor = self.inner(x, x, x, need_weights=False)[0]
        return mixed


def quantize(order: Order, samples: Floats) -> Quantized:
    """Run the published flow in its published order, with the best published configuration for a ViT.

    That is (RESULTS_TORCHVISION_BEST_CONFIGS.csv, vit_b_32): the layerwise backend, float scales, weights per channel,
    20 steps of graph equalization with merged biases, GPTQ with activation order, bias correction, percentile 99.999.
    ``asymmetric`` has zero points in activations, ``learned rounding`` takes that in place of GPTQ, ``ends at 8 bits``
    keeps the first convolution and the head at 8 bits as the published flow does for ImageNet.
    """
    torch.manual_seed(order.seed)
    model = preprocess_for_quantize(
        traced(zoo_module(order)),
        trace_model=False,
        equalize_iters=EQUALIZATION_STEPS,
        equalize_merge_bias=True,
        merge_bn=True,
    )
    images = torch.from_numpy(samples)
    batches = DataLoader(TensorDataset(images, torch.zeros(len(images))), batch_size=BATCH)
    model = layerwise_quantize(model, compute_layer_map=layer_map(order))
    with torch.no_grad():
        model(images[:BATCH])  # some scales are set by a first run
    published.calibrate(batches, model)
    if "GPTQ" in order.setting:
        published.apply_gptq(batches, model, act_order=True, create_weight_orig=True)
    if "learned rounding" in order.setting:
        learn_rounding(model, batches)
    published.apply_bias_correction(batches, model)
    model.eval()
    return Quantized(lambda some: _logits(model, some), describe(order))


def zoo_module(order: Order) -> nn.Module:
    """Return the zoo's trained module, with attention that Brevitas can quantize."""
    entry = MODELS[order.model]
    model = entry.build(entry.steps)
    model.load_state_dict(torch.export.load(order.archive).state_dict)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Attention):
                setattr(module, name, PackedAttention(child))
    return model.eval()


def traced(model: nn.Module) -> nn.Module:
    """Return the model as Brevitas traces it; its rewriting of means reads their axes where they have no name."""
    graph_module = symbolic_trace(model)
    for node in graph_module.graph.nodes:
        if node.op == "call_method" and node.target == "mean" and "dim" in node.kwargs:
            named = dict(node.kwargs)
            node.args, node.kwargs = (*node.args, named.pop("dim")), named
    graph_module.recompile()
    return graph_module


def layer_map(order: Order) -> dict[type[nn.Module], object]:
    """Return what each kind of layer becomes; the published function knows ImageNet's first and last layer only."""
    ends = 8 if "ends at 8 bits" in order.setting else None
    maps = published.create_quant_maps(
        dtype=torch.float32,
        bias_bit_width=32,
        weight_bit_width=value(lambda module: _bits(module, order.weight_bits, ends)),
        weight_param_method="stats",
        weight_scale_type="float_scale",
        weight_quant_type="sym",
        weight_quant_granularity="per_channel",
        weight_narrow_range=False,
        weight_quant_format="int",
        act_quant_format="int",
        act_bit_width=value(lambda module: _bits(module, order.activation_bits, ends)),
        act_scale_type="float_scale",
        act_scale_computation_type="static",
        act_param_method="stats",
        act_quant_type="asym" if "asymmetric" in order.setting else "sym",
        act_quant_granularity="per_tensor",
        act_quant_percentile=PERCENTILE,
    )
    found: dict[type[nn.Module], object] = maps[1]
    return found


def _bits(module: nn.Module, inside: int, ends: int | None) -> int:
    is_first = isinstance(module, nn.Conv2d) and module.in_channels == 1
    is_head = isinstance(module, nn.Linear) and module.out_features in (10, 62)
    return ends if ends is not None and (is_first or is_head) else inside


def learn_rounding(model: nn.Module, batches: DataLoader[tuple[Tensor, ...]]) -> None:
    """Learn each layer's rounding with the example's own defaults, but in float32: this is a CPU."""
    from brevitas_examples.imagenet_classification.ptq import learned_round_utils as rounding

    options = Namespace(
        learned_round="hard_sigmoid",
        learned_round_mode="layerwise",
        learned_round_loss="regularised_mse",
        learned_round_iters=1000,
        learned_round_lr=1e-3,
        learned_round_lr_scheduler=None,
        learned_round_batch_size=1,
    )
    make = rounding.parse_args_to_dataclass

    def in_float32(args: Namespace) -> object:
        config = make(args)
        config.training_args.use_amp = False
        return config

    rounding.parse_args_to_dataclass = in_float32
    rounding.apply_learned_round(model, batches, options)


def describe(order: Order) -> str:
    """Say which tensors have codes."""
    ends = ", image and head at 8 bits" if "ends at 8 bits" in order.setting else ", the image too"
    return f"inputs and weights of linear maps and convolutions, all operands of attention's products{ends}"


@torch.no_grad()
def _logits(model: nn.Module, images: Floats) -> Floats:
    logits: Floats = model(torch.from_numpy(images)).numpy()
    return logits


if __name__ == "__main__":
    obey("brevitas", quantize)
