"""Chooses scales and shifts per channel that make a quantized block's output error smaller."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, fx

from normfuse.graph import Graph, query
from normfuse.graph.affine import IDENTITY, Affine, along
from normfuse.graph.edit import editing
from normfuse.graph.quantization import QuantizationRequest, WeightRequest, is_requested, requested_weights, requests
from normfuse.graph.quickly import quickly
from normfuse.graph.segments import Compute, Segment, read_after, run_segment, segments
from normfuse.precision.block import Values, forget, summed_error, tensors_of
from normfuse.precision.chunks import samples_in, split
from normfuse.precision.equalization_offers import NOTHING, Candidate, Offer, taken
from normfuse.precision.simulation import call_with
from normfuse.progress import Progress, Silent
from normfuse.quant import (
    ActivationParams,
    ChannelScales,
    DyadicHistogram,
    DynamicParams,
    RangeMethod,
    SeenChannels,
    channel_scales,
    snap,
)
from normfuse.rewrite.changes import Blocked
from normfuse.rewrite.channel_product import ProductSite, read_by_linears
from normfuse.rewrite.equalization import Equalization, Site, groupings, read_by_maps
from normfuse.rewrite.linear_map import LinearMap, read_linear_map

__all__ = ["choose_equalizations"]

HELD_OUT: Final = 4
"""One of so many samples judges what the others have chosen."""


def choose_equalizations(
    graph: Graph, placed: Graph, chunks: Sequence[Sequence[Tensor]], *, progress: Progress | None = None
) -> dict[str, Equalization]:
    """Return, by the name of a tensor's node, the affine that lowers the error of the blocks that read it most (ours).

    A block is a segment of the network; its exits are compared with those in float while only the linear maps that
    read the site are quantized, from float entries. The error is summed over the blocks. What is chosen on some chunks
    is kept if it is better on others.

    Args:
        graph: a folded float graph; it is not changed.
        placed: a copy of it with requests, whose nodes have the same names.
        chunks: batches of samples, one tensor per input.
        progress: shows the blocks.
    """
    weights = {node.name: request for node, request in requested_weights(placed).items()}
    asked = {request.source.name: request for request in requests(placed)}
    free = _sites(graph)
    found = [site for site in free if any(reader in weights for reader in site.readers)]
    found += _product_sites(graph, asked, {reader for site in free for reader in site.readers})
    _offer(graph, found, _observed(graph, found, chunks))
    return taken(found, _Judge(placed, asked, weights, chunks).run(found, progress or Silent()))


def _sites(graph: Graph) -> list[Candidate]:
    """Return the tensors that can be scaled; each linear map reads one of them at most."""
    scratch, found = graph.copy(), list[Candidate]()
    with editing(scratch) as edit:
        for node, axis in read_by_maps(scratch).items():
            channels = query.shape(node)[axis]
            if not isinstance(channels, int):
                continue
            site = Site(edit, node)
            groups = groupings(site, axis, channels)
            if isinstance(groups, Tensor):
                scale = 1 + groups.double() / channels
                plan = site.plan(Affine(scale, torch.zeros_like(scale), axis))
                assert not isinstance(plan, Blocked)
                readers = [reader.name for reader in plan.carried]
                if not any(reader in each.readers for each in found for reader in readers):
                    found.append(Candidate(node.name, axis, groups, readers))
            site.leave()
    return found


def _product_sites(graph: Graph, read_as_codes: Collection[str], taken: Collection[str]) -> list[Candidate]:
    """Return the tensors that linear maps read as codes, if none of these maps reads a site that costs nothing.

    Inputs of the model are none: their codes are chosen for whoever feeds them.
    """
    found = list[Candidate]()
    for node in graph.nodes:
        readers = read_by_linears(node)
        if node.op == "placeholder" or node.name not in read_as_codes or not readers:
            continue
        if not any(reader.name in taken for reader in readers):
            linear = read_linear_map(graph, readers[0])
            assert linear is not None
            names = [reader.name for reader in readers]
            found.append(Candidate(node.name, linear.input_axis, torch.arange(linear.inputs), names, is_product=True))
    return found


def _observed(graph: Graph, found: list[Candidate], chunks: Sequence[Sequence[Tensor]]) -> dict[str, SeenChannels]:
    """Return what the maps read at every site, on all chunks."""
    seen = {site.name: SeenChannels.of(site.groups.numel()) for site in found}
    readers = {name: site for site in found for name in site.readers}
    sources = dict[str, list[tuple[LinearMap, SeenChannels]]]()
    for node in graph.nodes:
        linear = read_linear_map(graph, node) if node.name in readers else None
        channels = None if linear is None else seen[readers[node.name].name]
        if linear is None or channels is None or linear.inputs != channels.low.numel():
            continue
        sources.setdefault(_source(node).name, []).append((linear, channels))
        channels.weight = torch.maximum(channels.weight, _largest_per_input(linear))

    def watch(node: fx.Node, value: Any) -> Any:
        for linear, channels in sources.get(node.name, ()):
            channels.see(value, linear.input_axis)
        return value

    for chunk in chunks:
        graph.run_watched(chunk, watch)
    return seen


def _offer(graph: Graph, found: list[Candidate], seen: Mapping[str, SeenChannels]) -> None:
    """Fill in what can be taken at every site."""
    scratch = graph.copy()
    nodes = {node.name: node for node in scratch.nodes}
    with editing(scratch) as edit:
        for each in found:
            site = (ProductSite if each.is_product else Site)(edit, nodes[each.name])
            none = torch.ones(each.groups.numel(), dtype=torch.float64)
            for tried in (ChannelScales(NOTHING, none, none - 1), *channel_scales(seen[each.name], each.groups)):
                affine = Affine(tried.scale, tried.shift, each.axis)
                plan = site.plan(affine)
                if not isinstance(plan, Blocked):
                    carried = {reader.name: before for reader, before in plan.carried.items()}
                    each.offers[tried.label] = Offer(affine, carried)
            site.leave()


def _largest_per_input(linear: LinearMap) -> Tensor:
    """Return the largest magnitude of the weights of every input channel, float64 [inputs]."""
    size = linear.weight.abs().double()
    if linear.is_transposed:
        return size.flatten(1).amax(1)
    return size.movedim(1, -1).reshape(linear.groups, -1, size.shape[1]).amax(1).reshape(-1)


class _Judge:
    """Adds up what every offer leaves as error at the exits of the blocks."""

    def __init__(
        self,
        placed: Graph,
        asked: Mapping[str, QuantizationRequest],
        weights: Mapping[str, WeightRequest],
        chunks: Sequence[Sequence[Tensor]],
    ) -> None:
        self._placed, self._asked, self._weights, self._chunks = placed, asked, weights, chunks
        self._sizes = [samples_in(chunk) for chunk in chunks]
        self._split = split(self._sizes, HELD_OUT)

    def run(self, found: Sequence[Candidate], progress: Progress) -> dict[int, float]:
        """Go through the blocks, in float; return what each errs with all its maps quantized, where it is judged."""
        placed, whole = self._placed, dict[int, float]()
        parts = segments(placed, wanted=lambda node: node.name in self._weights)
        values = [dict(zip(placed.inputs, chunk, strict=True)) for chunk in self._chunks]
        with progress.task("equalizing channels", len(parts)) as advance, torch.no_grad():
            for index, segment in enumerate(parts):
                later = read_after(placed, parts[index + 1 :])
                inside = {node.name: node for node in segment.nodes}
                before = [dict(each) for each in values]
                inputs = _run(placed, segment, values, self._weights)
                targets = [tensors_of(segment.exits, each) for each in values]
                plain = Offer(IDENTITY, dict.fromkeys(self._weights, IDENTITY))
                tried = [(plain, [node for name, node in inside.items() if name in self._weights])]
                for site in found:
                    readers = [inside[name] for name in site.readers if name in inside and name in self._weights]
                    tried += [(offer, readers) for offer in site.offers.values() if readers]
                for offer, readers in tried:
                    errors = self._errors(segment, before, targets, self._simulated(offer, readers, inputs))
                    offer.teaching += self._mean(errors, self._split.teaching)
                    offer.judging[index] = self._mean(errors, self._split.judging)
                whole[index] = plain.judging[index]
                for each in values:
                    forget(each, later)
                advance(1)
        return whole

    def _mean(self, errors: Sequence[float], chunks: Sequence[int]) -> float:
        """Return the mean over the samples of these chunks."""
        return sum(errors[at] * self._sizes[at] for at in chunks) / sum(self._sizes[at] for at in chunks)

    def _errors(
        self, segment: Segment, entries: list[Values], targets: list[list[Tensor]], compute: Compute
    ) -> list[float]:
        """Return the squared error at a block's exits, by chunk."""
        found = list[float]()
        for entry, wanted in zip(entries, targets, strict=True):
            local = dict(entry)
            run_segment(self._placed, segment, local, compute)
            found.append(float(summed_error(tensors_of(segment.exits, local), wanted)))
        return found

    def _simulated(self, offer: Offer, readers: list[fx.Node], inputs: Mapping[str, list[Tensor]]) -> Compute:
        """Return what computes a block with the readers of a site quantized, as the offer has them."""
        quantized = dict[fx.Node, tuple[LinearMap, Tensor, Callable[[Tensor], Tensor]]]()
        shared = dict[str, Callable[[Tensor], Tensor]]()
        for node in readers:
            linear, carried = read_linear_map(self._placed, node), offer.carried[node.name]
            assert linear is not None
            linear = linear.before(carried)
            rounded = self._weights[node.name].nearest(linear.weight, linear.bias, input_scale=None)
            source = _source(node)
            if source.name not in shared:
                shared[source.name] = self._read(source.name, carried, inputs[node.name])
            quantized[node] = linear, rounded.values, shared[source.name]

        def compute(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if node not in quantized:
                return quickly(node, args, kwargs)
            linear, weight, read = quantized[node]
            return call_with(node, (read(args[0]), *args[1:]), kwargs, weight, linear.bias)

        return compute

    def _read(self, source: str, carried: Affine, inputs: list[Tensor]) -> Callable[[Tensor], Tensor]:
        """Return what makes of a reader's input the values of the codes that it will read."""
        now = carried.inverse()
        params: ActivationParams | None = None
        if (asked := self._asked.get(source)) is not None and asked.group is not None:
            params = DynamicParams(size=asked.group)
        elif asked is not None:
            histogram = DyadicHistogram()
            for chunk in self._split.teaching:
                histogram.update(_applied(now, inputs[chunk]))
            (range_,) = asked.candidates(histogram, [RangeMethod.MSE]).values()
            params = asked.quantizer(range_)
        return lambda x: _applied(now, x) if params is None else snap(_applied(now, x), params)


def _run(placed: Graph, segment: Segment, values: list[Values], names: Collection[str]) -> dict[str, list[Tensor]]:
    """Compute a block on every chunk; return what the named maps read."""
    inputs = dict[str, list[Tensor]]()

    def watch(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if node.name in names:
            inputs.setdefault(node.name, []).append(args[0])
        return quickly(node, args, kwargs)

    for each in values:
        run_segment(placed, segment, each, watch)
    return inputs


def _source(node: fx.Node) -> fx.Node:
    """Return what a map reads, in front of the request."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source.args[0] if is_requested(source) else source  # type: ignore[return-value]


def _applied(found: Affine, x: Tensor) -> Tensor:
    wide = x.double() * along(found.scale, found.axis, x.ndim) + along(found.shift, found.axis, x.ndim)
    return wide.to(x.dtype)
