"""What a quantization range costs, read from a histogram for many ranges at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from normfuse.quant.granularity import PerChannel
from normfuse.quant.histogram import DyadicHistogram
from normfuse.quant.integer_type import IntegerType
from normfuse.quant.parameters import asymmetric, symmetric

__all__ = ["RangeLoss", "entropy_loss", "squared_error_loss"]

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
RangeLoss = Callable[[Floats, Floats], Floats]
"""From lower ends and upper ends, [ranges] each, to losses [ranges]; lower is better, infinity is refused."""

MOST_CELLS: Final = 1 << 10
"""Above this many codes, cells are narrower than bins, and inside a bin the error of uniform values is step² / 12."""


def squared_error_loss(histogram: DyadicHistogram, type: IntegerType, *, is_symmetric: bool) -> RangeLoss:
    """Return the mean squared quantization error of a range: rounding and clipping together.

    Values count as uniform inside their bin. The error is integrated exactly under that density, cell by cell of the
    quantizer, so low widths and peaked tensors need no noise model. (Ours.)
    """
    moments = _Moments.of(histogram)

    def loss(lower: Floats, upper: Floats) -> Floats:
        step, first = _grid(lower / histogram.width, upper / histogram.width, type, is_symmetric)
        if type.levels > MOST_CELLS:
            error = _noise_error(moments, step, first, type.levels)
        else:
            error = _cell_error(moments, step, first, type.levels)
        return error * histogram.width**2 / max(histogram.total, 1)

    return loss


def entropy_loss(histogram: DyadicHistogram, type: IntegerType) -> RangeLoss:
    """Return the Kullback-Leibler divergence from the values to the quantized values.

    As TensorRT's entropy calibration (Migacz 2017), with two ends instead of a magnitude: what lies outside is added to
    the last bin inside; the quantized distribution spreads each cell evenly over its occupied bins; zero is exact
    whatever the range, so its bin counts no more than its fuller neighbour. A range of fewer bins than codes tells
    nothing and costs infinity.
    """
    half = histogram.bins // 2
    counts = histogram.counts.astype(np.float64)
    counts[half] = min(counts[half], max(counts[half - 1], counts[half + 1]))
    if type.levels > histogram.bins:
        return lambda lower, upper: np.full_like(lower, np.inf)
    tables = _EntropyTables(counts, _prefix(counts), _prefix(counts > 0), _prefix(_x_log_x(counts)))

    def loss(lower: Floats, upper: Floats) -> Floats:
        first = np.clip(np.floor(lower / histogram.width).astype(np.int64) + half, 0, histogram.bins - 1)
        last = np.clip(np.ceil(upper / histogram.width).astype(np.int64) + half, first + 1, histogram.bins)
        return np.where(last - first < type.levels, np.inf, _divergence(tables, first, last, type.levels))

    return loss


@dataclass(frozen=True, slots=True)
class _Moments:
    """Integrals of ``1, x, x²`` under the density up to a point; everything in units of one bin width."""

    counts: Floats
    zeroth: Floats
    first: Floats
    second: Floats

    @classmethod
    def of(cls, histogram: DyadicHistogram) -> _Moments:
        counts = histogram.counts.astype(np.float64)
        left = np.arange(-(histogram.bins // 2), histogram.bins // 2, dtype=np.float64)
        return cls(
            counts,
            _prefix(counts),
            _prefix(counts * (left + 0.5)),
            _prefix(counts * (left * left + left + 1 / 3)),
        )

    def up_to(self, point: Floats) -> tuple[Floats, Floats, Floats]:
        """Return the three integrals from the left end to each point."""
        half = self.counts.size // 2
        point = np.clip(point, -half, half)
        index = np.minimum(np.floor(point).astype(np.int64) + half, self.counts.size - 1)
        left = (index - half).astype(np.float64)
        part = point - left
        mass = self.counts[index] * part
        middle = left + 0.5 * part
        return (
            self.zeroth[index] + mass,
            self.first[index] + mass * middle,
            self.second[index] + mass * (middle * middle + part * part / 12),
        )


def _grid(lower: Floats, upper: Floats, type: IntegerType, is_symmetric: bool) -> tuple[Floats, Floats]:
    """Return step and first real value of the quantizers that these ranges get, [ranges] each."""
    if is_symmetric:
        magnitude = torch.from_numpy(np.maximum(-lower, upper))
        params = symmetric(magnitude, type, PerChannel(0))
    else:
        params = asymmetric(torch.from_numpy(lower), torch.from_numpy(upper), type, PerChannel(0))
    return params.scale.double().numpy(), params.smallest.numpy()


def _cell_error(moments: _Moments, step: Floats, first: Floats, levels: int) -> Floats:
    centre = first[:, None] + step[:, None] * np.arange(levels)  # [ranges, levels]
    limits = moments.up_to(centre[:, :-1] + 0.5 * step[:, None])
    mass, mean, square = (_between(part, total[-1]) for part, total in zip(limits, _totals(moments), strict=True))
    error: Floats = (square - 2 * centre * mean + centre * centre * mass).sum(axis=1)
    return error


def _noise_error(moments: _Moments, step: Floats, first: Floats, levels: int) -> Floats:
    last = first + step * (levels - 1)
    below, above = moments.up_to(first), moments.up_to(last)
    total = [part[-1] for part in _totals(moments)]
    clipped_low = below[2] - 2 * first * below[1] + first * first * below[0]
    clipped_high = (total[2] - above[2]) - 2 * last * (total[1] - above[1]) + last * last * (total[0] - above[0])
    inside = (above[0] - below[0]) * step * step / 12
    return np.asarray(inside + clipped_low + clipped_high, dtype=np.float64)


def _totals(moments: _Moments) -> tuple[Floats, Floats, Floats]:
    return moments.zeroth, moments.first, moments.second


def _between(limits: Floats, total: np.float64) -> Floats:
    """Return the differences of the running integral, from nothing to all, [ranges, levels]."""
    return np.diff(limits, axis=1, prepend=0.0, append=total)


@dataclass(frozen=True, slots=True)
class _EntropyTables:
    """Counts per bin and the running sums of counts, occupied bins and count · log(count)."""

    counts: Floats
    mass: Floats
    occupied: Floats
    information: Floats


def _divergence(tables: _EntropyTables, first: Integers, last: Integers, levels: int) -> Floats:
    """Return the divergence for the windows of bins ``first ... last - 1``, [ranges]."""
    limits = first[:, None] + (last - first)[:, None] * np.arange(levels + 1) // levels  # [ranges, levels + 1]
    quantized, occupied = np.diff(tables.mass[limits], axis=1), np.diff(tables.occupied[limits], axis=1)
    reference = quantized.copy()
    information = tables.information[last] - tables.information[first]
    total = tables.mass[-1]
    outside = ((0, first, tables.mass[first]), (-1, last - 1, total - tables.mass[last]))
    for cell, edge, extra in outside:
        before = tables.counts[edge]
        reference[:, cell] += extra
        occupied[:, cell] += (before == 0) & (extra > 0)
        information = information + _x_log_x(before + extra) - _x_log_x(before)
    with np.errstate(divide="ignore", invalid="ignore"):
        spread = np.where(reference > 0, reference * np.log(quantized / occupied), 0.0).sum(axis=1)
        inside = tables.mass[last] - tables.mass[first]
        divergence = (information - spread) / total + np.log(inside) - np.log(total)
    return np.where(np.isfinite(divergence), divergence, np.inf)


def _prefix(values: NDArray[np.float64] | NDArray[np.bool_]) -> Floats:
    return np.concatenate([np.zeros(1), np.cumsum(values, dtype=np.float64)])


def _x_log_x(values: Floats) -> Floats:
    return np.asarray(values * np.log(np.maximum(values, 1.0)), dtype=np.float64)
