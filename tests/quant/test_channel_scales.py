"""Scales and shifts per channel: what each of them makes of the channels."""

from __future__ import annotations

import torch
from torch import Tensor

from normfuse.quant import ChannelScales, SeenChannels, channel_scales
from normfuse.testing import seeded

CHANNELS = 6
SPREAD = torch.tensor([1.0, 100.0, 0.01, 3.0, 0.0, 1e-9], dtype=torch.float64)
ALIVE = slice(0, 4)


def seen(x: Tensor, weight: Tensor | None = None) -> SeenChannels:
    found = SeenChannels.of(x.shape[1])
    for part in x.split(7):
        found.see(part, 1)
    found.weight = torch.ones(x.shape[1], dtype=torch.float64) if weight is None else weight
    return found


def values() -> Tensor:
    x = torch.randn(50, CHANNELS, 3, generator=seeded(0), dtype=torch.float64) + 2
    return x * SPREAD[:, None]


def offered(x: Tensor, *, weight: Tensor | None = None, groups: Tensor | None = None) -> dict[str, ChannelScales]:
    groups = torch.arange(CHANNELS) if groups is None else groups
    return {found.label: found for found in channel_scales(seen(x, weight), groups)}


def scaled(x: Tensor, found: ChannelScales) -> Tensor:
    return x * found.scale[:, None] + found.shift[:, None]


def test_the_full_power_makes_channels_alike() -> None:
    x, found = values(), offered(values())
    largest = scaled(x, found["largest ^ 1"]).abs().amax((0, 2))[ALIVE]
    torch.testing.assert_close(largest, largest[:1].expand(4))
    ranges = scaled(x, found["largest, centred ^ 1"])
    torch.testing.assert_close(ranges.amax((0, 2)), -ranges.amin((0, 2)))
    torch.testing.assert_close(ranges.amax((0, 2))[ALIVE], ranges.amax((0, 2))[:1].expand(4))
    rms = scaled(x, found["rms ^ 1"]).square().mean((0, 2))[ALIVE]
    torch.testing.assert_close(rms, rms[:1].expand(4))
    centred = scaled(x, found["deviation, centred ^ 1"])
    torch.testing.assert_close(centred.mean((0, 2))[ALIVE], torch.zeros(4, dtype=torch.float64))
    deviation = centred.std((0, 2), correction=0)[ALIVE]
    torch.testing.assert_close(deviation, deviation[:1].expand(4))


def test_half_the_power_halves_the_spread_in_octaves() -> None:
    x, found = values(), offered(values())
    size = x.abs().amax((0, 2))[ALIVE].log()
    halved = scaled(x, found["largest ^ 0.5"]).abs().amax((0, 2))[ALIVE].log()
    torch.testing.assert_close(halved - halved.mean(), (size - size.mean()) / 2)


def test_weights_take_over_what_activations_lose() -> None:
    """SmoothQuant's balance: at one half both have the same size per channel, up to one factor."""
    x, weight = values(), torch.tensor([0.3, 2.0, 5.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    found = offered(x, weight=weight)["largest ^ 0.5, weights ^ 0.5"]
    activation, now = scaled(x, found).abs().amax((0, 2))[ALIVE], (weight / found.scale)[ALIVE]
    torch.testing.assert_close(activation / now, (activation / now)[:1].expand(4))


def test_dead_channels_stay_and_every_scale_is_a_positive_number() -> None:
    for found in offered(values()).values():
        assert bool((found.scale > 0).all())
        assert bool(found.scale.isfinite().all() and found.shift.isfinite().all())
        assert found.scale[4:].tolist() == [1, 1]


def test_the_scales_as_a_whole_neither_grow_nor_shrink() -> None:
    for found in offered(values()).values():
        torch.testing.assert_close(found.scale.log().sum(), torch.zeros((), dtype=torch.float64))


def test_groups_share_their_numbers() -> None:
    groups = torch.tensor([0, 1, 2, 0, 1, 2])
    for found in offered(values().roll(1, 1), groups=groups).values():
        assert torch.equal(found.scale[:3], found.scale[3:])
        assert torch.equal(found.shift[:3], found.shift[3:])


def test_what_was_never_seen_is_offered_nothing() -> None:
    assert not list(channel_scales(SeenChannels.of(3), torch.arange(3)))


def test_zeros_alone_stay_as_they_are() -> None:
    for found in offered(torch.zeros(4, CHANNELS, 3)).values():
        assert found.scale.tolist() == [1] * CHANNELS
