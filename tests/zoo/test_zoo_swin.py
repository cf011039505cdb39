"""The zoo's network of shifted windows: cutting, masking, relative positions and merging."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.zoo.models import MODELS
from examples.zoo.swin import PatchMerging, SwinBlock, SwinTransformer, WindowAttention, Windows
from normfuse.nn import PRepBN

GRIDS = [Windows(6, 3, 0), Windows(6, 3, 1), Windows(8, 4, 2), Windows(5, 5, 0), Windows(9, 3, 2)]


def places(windows: Windows) -> Tensor:
    """Return the row and column on the uncut grid of every token of every window, [window, token, 2]."""
    rows, columns = torch.meshgrid(torch.arange(windows.side), torch.arange(windows.side), indexing="ij")
    return windows.cut(torch.stack([rows, columns], dim=-1).reshape(1, -1, 2))[0]


@pytest.mark.parametrize("windows", GRIDS, ids=str)
def test_windows_join_to_what_was_cut(windows: Windows) -> None:
    x = torch.randn(2, windows.side**2, 7)
    assert windows.cut(x).shape == (2, (windows.side // windows.window) ** 2, windows.window**2, 7)
    assert torch.equal(windows.join(windows.cut(x)), x)


@pytest.mark.parametrize("windows", GRIDS, ids=str)
def test_tokens_attend_to_those_of_their_window_that_were_near_before_the_shift(windows: Windows) -> None:
    found = places(windows)
    apart = (found[:, :, None] - found[:, None, :]).abs().amax(dim=-1)
    assert torch.equal(windows.mask()[:, 0] == 0, apart < windows.window)
    assert bool((windows.mask() <= 0).all())


def test_offsets_are_one_for_each_relative_position() -> None:
    windows = Windows(4, 4, 0)
    found = places(windows)[0]
    apart = (found[:, None] - found[None, :]).reshape(-1, 2)
    pairs = {(int(offset), *map(int, pair)) for offset, pair in zip(windows.offsets().flatten(), apart, strict=True)}
    assert len(pairs) == (2 * 4 - 1) ** 2
    assert sorted(offset for offset, _, _ in pairs) == list(range(49))


@pytest.mark.parametrize("windows", [Windows(6, 3, 1), Windows(6, 6, 0)], ids=str)
def test_window_attention_is_attention_over_the_grid_with_a_mask(windows: Windows) -> None:
    attention = WindowAttention(10, 2, windows)
    nn.init.normal_(attention.table)
    x = torch.randn(2, windows.side**2, 10)
    rows, columns = (torch.arange(windows.side**2) // windows.side, torch.arange(windows.side**2) % windows.side)
    apart = [place[:, None] - place[None, :] for place in (rows, columns)]
    window_of = windows.join(torch.arange((windows.side // windows.window) ** 2)[None, :, None, None].expand(
        1, -1, windows.window**2, 1))[0, :, 0]  # fmt: skip
    is_near = (window_of[:, None] == window_of[None, :]) & (torch.stack(apart).abs().amax(dim=0) < windows.window)
    index = [(gap + windows.window - 1).clamp(0, 2 * windows.window - 2) for gap in apart]
    bias = torch.where(is_near, attention.table[:, index[0], index[1]], -torch.inf)
    q, k, v = attention.qkv(x).reshape(2, -1, 3, 2, 5).permute(2, 0, 3, 1, 4)
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).reshape(x.shape)
    # Sums of at most 36 terms of the order of one, in another order.
    found = windows.join(attention(windows.cut(x)))
    torch.testing.assert_close(found, attention.proj(mixed), rtol=0, atol=36 * 1.2e-7 * 8)


def test_merging_puts_four_neighbours_side_by_side() -> None:
    merging = PatchMerging(3, 4, lambda channels: nn.Identity())
    nn.init.eye_(merging.reduction.weight)
    merged = merging(torch.arange(16.0)[None, :, None].expand(1, 16, 3))
    assert merging.reduction.bias is None
    assert merged.shape == (1, 4, 6)
    assert merged[0, :, 0].tolist() == [0, 2, 8, 10]  # the upper left of each four
    assert merged[0, :, 3].tolist() == [4, 6, 12, 14]  # the one below it


def test_the_committed_network_shifts_every_other_block_of_the_large_grid_and_has_one_kind_of_norm() -> None:
    model = MODELS["glyphs_swin_prepbn"].build(100)
    assert isinstance(model, SwinTransformer)
    grids = [stage.windows for stage in model.stages if isinstance(stage, SwinBlock)]
    assert grids == [Windows(8, 4, 0), Windows(8, 4, 2), Windows(4, 4, 0), Windows(4, 4, 0)]
    norms = [module for module in model.modules() if isinstance(module, PRepBN)]
    assert len(norms) == 2 * len(grids) + 3  # behind the patches, in the merging, at the end
    layer_norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    assert len(layer_norms) == len(norms)  # those inside PRepBN
