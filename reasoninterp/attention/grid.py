"""Spans of rows as tensors: which tokens read (destinations) and which are read (sources).

Rows are padded on the right and each has spans of its own; rows with fewer spans are filled up with empty ones.  A
cell destination × source of a row has a value only where both have tokens and some token of the source stands at or
before the destination's last one; every other cell is NaN in every map of this package (causality, or no token), so
that what cannot be is never taken for a 0 that was measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from reasoninterp.errors import UserError
from reasoninterp.traces.trace import Span


@dataclass(frozen=True)
class SpanGrid:
    """Half-open token spans of each row; made by `span_grid`.

    Attributes:
        destinations: first token and end of each reading span; equal for an empty one.
        sources: the same of each span that is read.
        lengths: tokens of each row that are no padding.
    """

    destinations: Int[Tensor, "row dst 2"]
    sources: Int[Tensor, "row src 2"]
    lengths: Int[Tensor, " row"]

    @property
    def visible(self) -> Bool[Tensor, "row dst src"]:
        """Cells that have a value: both spans hold tokens and causality lets the one read the other."""
        (d_start, d_stop), (s_start, s_stop) = self.destinations.unbind(-1), self.sources.unbind(-1)
        both = (d_stop > d_start)[:, :, None] & (s_stop > s_start)[:, None, :]
        return both & (s_start[:, None, :] < d_stop[:, :, None])

    def take(self, rows: Sequence[int]) -> SpanGrid:
        """The grid of these rows, in this order; a row may come twice."""
        at = torch.as_tensor(rows, dtype=torch.long)
        return SpanGrid(self.destinations[at], self.sources[at], self.lengths[at])

    def to(self, device: torch.device) -> SpanGrid:
        """The same on a device."""
        return SpanGrid(self.destinations.to(device), self.sources.to(device), self.lengths.to(device))


def span_grid(
    sources: Sequence[Sequence[Span]],
    destinations: Sequence[Sequence[Span]] | None = None,
    lengths: Sequence[int] | None = None,
) -> SpanGrid:
    """A grid from lists of spans.

    Args:
        sources: for each row, the spans that are read.  Where they partition the row, plain attention sums to 1.
        destinations: for each row, the spans that read; by default the sources.
        lengths: tokens of each row without padding; by default the end of the last span.

    Raises:
        UserError: the lists are not of one length, or a span reaches beyond its row.
    """
    destinations = sources if destinations is None else destinations
    ends = [max((s.stop for s in [*a, *b]), default=0) for a, b in zip(sources, destinations, strict=False)]
    lengths = ends if lengths is None else list(lengths)
    if not len(sources) == len(destinations) == len(lengths):
        raise UserError(
            f"destinations: {len(destinations)} rows of destinations and {len(lengths)} lengths do not fit "
            f"{len(sources)} rows of sources; give one of each for a row."
        )
    for row, (end, length) in enumerate(zip(ends, lengths, strict=True)):
        if end > length:
            raise UserError(f"lengths: a span of row {row} ends at {end}, beyond its {length} tokens; mend the span.")
    return SpanGrid(_bounds(destinations), _bounds(sources), torch.tensor(lengths, dtype=torch.long))


def _bounds(spans: Sequence[Sequence[Span]]) -> Int[Tensor, "row span 2"]:
    widest = max((len(row) for row in spans), default=0)
    filled = [[*[(s.start, s.stop) for s in row], *[(0, 0)] * (widest - len(row))] for row in spans]
    return torch.tensor(filled, dtype=torch.long).reshape(len(spans), widest, 2)


def members(bounds: Int[Tensor, "row span 2"], n_pos: int) -> Float[Tensor, "row span pos"]:
    """1 where a token belongs to a span, else 0."""
    at = torch.arange(n_pos, device=bounds.device)
    return ((at >= bounds[..., :1]) & (at < bounds[..., 1:])).float()


def places(bounds: Int[Tensor, "row 2"]) -> tuple[Int[Tensor, "row width"], Bool[Tensor, "row width"]]:
    """Positions of one span in every row, filled up to the widest with position 0, and which of them are the span's."""
    width = int((bounds[:, 1] - bounds[:, 0]).max()) if len(bounds) else 0
    at = bounds[:, :1] + torch.arange(width, device=bounds.device)
    real = at < bounds[:, 1:]
    return at.where(real, torch.zeros_like(at)), real
