"""Bits that a target has kernels for, and the layers that it has them for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import normfuse
from normfuse.build import FOLDING
from normfuse.export.placement import onnx_placement, tensorrt_placement
from normfuse.planning import place
from normfuse.progress import Silent
from normfuse.quant.bits import FLOAT, Bits
from normfuse.quant.placement import Placement
from normfuse.recipe import Recipe
from normfuse.sensitivity.units import Member, members_of
from normfuse.target_bits import FEW, bits_of_target, fewest_of_target, members_of_target
from normfuse.testing import Small, randomized, seeded

EIGHT, WHOLE = Bits(8, 8), Bits(FLOAT, FLOAT)


def mixed(target: str, **options: Any) -> Recipe:
    return Recipe().with_options(target=target, bits="mixed", budget="avg-bits=6", **options)


def test_what_is_multiplied_with_what() -> None:
    assert set(bits_of_target(mixed("trt"))) == {FEW, EIGHT, WHOLE}
    assert set(bits_of_target(mixed("trt", weight_widths="8"))) == {EIGHT}
    assert set(bits_of_target(mixed("trt", weight_widths="4,16", activation_widths="16"))) == {FEW, WHOLE}
    assert set(bits_of_target(mixed("onnx"))) == {Bits(4, 8), EIGHT}
    assert Bits(4, 8) in bits_of_target(mixed("onnx", activation_widths="8,16"))


def forward(m: Any, image: Tensor) -> Tensor:
    x = m.conv(image).relu().flatten(2).transpose(1, 2)  # [batch, 6, 64]
    return m.head(m.narrow(m.wide(x).relu()).relu().mean(dim=1))  # type: ignore[no-any-return]


def test_fewest_bits_are_some_that_there_are() -> None:
    assert fewest_of_target(mixed("trt"), 4) == FEW
    assert fewest_of_target(mixed("trt", weight_widths="8,16"), 8) == EIGHT
    assert fewest_of_target(mixed("onnx", weight_widths="3,8", activation_widths="4,8"), 2) == Bits(2, 4)


def members(recipe: Recipe) -> dict[str, Member]:
    """What the target says of every layer, by its name."""
    parts = {"wide": nn.Linear(64, 96), "narrow": nn.Linear(96, 20), "head": nn.Linear(20, 5)}
    model, sample = randomized(Small(forward, conv=nn.Conv2d(2, 64, 3, 3), **parts)), torch.zeros(2, 2, 9, 6)
    graph = normfuse.capture(model, sample)
    FOLDING.run(graph)
    samples = [[torch.randn(1, 2, 9, 6, generator=seeded(1))]]

    def placement_of(bits: Bits) -> Placement:
        return tensorrt_placement(bits) if recipe.target.value == "trt" else onnx_placement("avx512_vnni", bits)

    placed = place(graph, lambda: iter(samples), recipe=recipe, placement=placement_of(EIGHT), progress=Silent()).graph
    found = members_of_target(members_of(placed, samples[0]), placed, recipe, placement_of)
    return {work.layer: member for member in found for work in member.maps.values()}


def test_few_bits_are_for_linear_maps_of_several_blocks() -> None:
    found = members(mixed("trt"))
    has_few = {layer: member.has_few for layer, member in found.items()}
    assert has_few == {"conv": False, "wide": True, "narrow": True, "head": False}, "blocks of 32 at least"
    assert {layer: member.allowed(FEW) for layer, member in found.items()} == {
        "conv": EIGHT,
        "wide": FEW,
        "narrow": FEW,
        "head": EIGHT,
    }


def test_few_bits_meet_floats_where_the_input_would_have_codes() -> None:
    conv = members(mixed("trt"))["conv"]
    assert (conv.source, conv.fixed, conv.may_read_floats) == ("", 8, True)
    linear = replace(conv, has_few=True)
    assert [linear.allowed(bits) for bits in (FEW, EIGHT, WHOLE)] == [FEW, EIGHT, WHOLE]
    elsewhere = replace(linear, may_read_floats=False)
    assert [elsewhere.allowed(bits) for bits in (FEW, EIGHT, WHOLE)] == [Bits(4, 8), EIGHT, WHOLE]


def test_onnxruntime_has_few_bits_for_all() -> None:
    assert all(member.has_few for member in members(mixed("onnx")).values())
