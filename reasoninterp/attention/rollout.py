"""Attention rollout: where the attention of all layers together leads (Abnar & Zuidema 2020, arXiv:2005.00928).

1. In each layer the heads' patterns are averaged and mixed with the identity for the residual stream:
   `Ā_l = (1 − r) mean_h α^{l,h} + r I`, with r = 0.5.
2. The rollout up to layer l is `Ā_l · … · Ā_0`; row q says from which tokens of the input position q is fed.
3. Its rows are averaged over the destination's tokens and its columns summed over the source's.

Only the product with the sources' columns is kept, [pos, source] for each row, never a matrix of positions by
positions.  Rows sum to 1 where the sources partition the row.  In causal models mass runs down to the first tokens as
layers are added, and heads' values and signs play no part: a baseline, not evidence.

With a rule for sinks, their columns are set to 0 in the heads in which they are sinks and the rest of each query's
attention is scaled up to 1 again, since a rollout must keep its mass; a query with nothing left stays at itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reasoninterp.attention.grid import SpanGrid, members
from reasoninterp.attention.maps import at_least_float
from reasoninterp.attention.sinks import SinkRule, received, sink_mask, without
from reasoninterp.errors import UserError
from reasoninterp.models.body import Body, Hook, site


def roll(
    patterns: Iterable[Float[Tensor, "row head query key"]],
    start: Float[Tensor, "row pos src"],
    *,
    residual: float = 0.5,
) -> Iterator[Float[Tensor, "row pos src"]]:
    """The rollout up to each layer applied to `start` (the sources' membership, or the identity for single tokens)."""
    running = start
    for pattern in patterns:
        running = _next(running, pattern, residual)
        yield running


def rollout_maps(
    body: Body,
    ids: Int[Tensor, "row pos"],
    grid: SpanGrid,
    *,
    residual: float = 0.5,
    sinks: SinkRule | None = None,
    token_kinds: Int[Tensor, "row pos"] | None = None,
) -> Float[Tensor, "layer row dst src"]:
    """Rollout up to each layer, from span to span, on the CPU; NaN where `SpanGrid.visible` is false.

    Args:
        body: the mind that is read.
        ids: rows padded on the right.
        grid: the spans of each row.
        residual: r, the share of the residual stream (0…1).
        sinks: if given, sinks are left out.
        token_kinds: what each token is (`sinks.kinds_of_rows`); needed with `sinks`.

    Raises:
        UserError: `residual` is no share, or a rule for sinks without the tokens' kinds.
    """
    if not 0 <= residual <= 1:
        raise UserError(f"residual: {residual} is no share of the residual stream; give a number from 0 to 1.")
    if sinks is not None and token_kinds is None:
        raise UserError("token_kinds: a rule for sinks needs to know the tokens; give `kinds_of_rows(...)`.")
    grid = grid.to(body.device)
    n_pos = ids.shape[1]
    reads = members(grid.destinations, n_pos)
    reads = reads / reads.sum(-1, keepdim=True).clamp(min=1)
    state = [members(grid.sources, n_pos).mT]
    found: list[Tensor] = []

    def hook(pattern: Tensor) -> None:
        pattern = at_least_float(pattern)
        if sinks is not None and token_kinds is not None:
            mask = sink_mask(received(pattern, grid.lengths, sinks.min_queries), token_kinds, sinks)
            pattern = without(pattern, mask, renormalise=True)
            lost = pattern.isnan().any(-1, keepdim=True)
            pattern = torch.where(lost, torch.eye(n_pos, dtype=pattern.dtype, device=pattern.device), pattern)
        state[0] = _next(state[0], pattern, residual)
        found.append((reads.to(state[0].dtype) @ state[0]).cpu())

    hooks: list[tuple[str, Hook]] = [(site("pattern", layer), hook) for layer in range(body.n_layers)]
    body.forward(ids, hooks=hooks, positions=torch.zeros(len(ids), 1, dtype=torch.long))
    return torch.stack(found).masked_fill(~grid.visible.cpu()[None], torch.nan)


def _next(running: Tensor, pattern: Tensor, residual: float) -> Tensor:
    """One more layer: heads averaged, identity mixed in."""
    running = running.to(pattern.dtype)
    return (1 - residual) * (pattern.mean(1) @ running) + residual * running
