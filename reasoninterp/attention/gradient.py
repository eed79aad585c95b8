"""Gradient × attention: the part of the margin that each block of attention carries, to first order.

In the run over one side of a contrast (the clean chain unless said otherwise), with the margin
`m = log P(corrupt answer) − log P(clean answer)` (nats), a row, a head, a destination D and a source S have

    Σ_{q∈D} Σ_{k∈S} α_qk · ∂m/∂α_qk

1. One forward pass with graph; one backward pass of the summed margins.
2. At each layer's `pattern` the gradient is multiplied by the attention and reduced to spans as it comes.
3. Rows do not meet, so each contrast gets its own values; the two rows of an answer of several tokens are added.

It is the first-order estimate of `m − m(with these weights set to 0, nothing renormalised)`.  Sign: negative, this
attention speaks for the clean answer; positive, for the corrupt one.  Sums over tokens, not means: blocks add up.
Gradients of the last layers' queries reach only positions that are read.  The graph of the backward pass keeps every
layer's pattern, which is what one pass for all layers costs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from reasoninterp.attention.grid import SpanGrid, members
from reasoninterp.attention.maps import at_least_float, checked_layers
from reasoninterp.errors import UserError
from reasoninterp.models.body import Body, Hook, site
from reasoninterp.patching.metric import CLEAN, ContrastPlan


def gradient_maps(
    body: Body,
    plan: ContrastPlan,
    grid: SpanGrid,
    *,
    side: int = CLEAN,
    layers: Sequence[int] | None = None,
    answer: Sequence[int] | None = None,
) -> Float[Tensor, "layer contrast head dst src"]:
    """Gradient × attention of every head, nats, on the CPU; NaN where `SpanGrid.visible` is false.

    Args:
        body: the mind that is read.
        plan: the contrasts.
        grid: spans in the prompts of that side, one row a contrast.
        side: which chain is run.
        layers: which layers; by default all.
        answer: for each contrast, the destination that reads the answer.  Its span is drawn on to the last token that
            is read, so that in answers of several tokens what the answer's own tokens read is in it.

    Raises:
        UserError: the grid has not one row for each contrast, or there is no such layer.
    """
    chosen = checked_layers(body, layers)
    if len(grid.lengths) != plan.n:
        raise UserError(f"grid: {len(grid.lengths)} rows of spans do not fit {plan.n} contrasts; give one for each.")
    owners = plan.owners(side)
    at = None if answer is None else [answer[owner] for owner in owners]
    rows = _reading_on(grid.take(owners), plan.sides[side].positions, at).to(body.device)
    n_pos = plan.ids(side).shape[1]
    reads, read = members(rows.destinations, n_pos), members(rows.sources, n_pos)
    found: dict[int, Tensor] = {}

    def watch(layer: int) -> Hook:
        def hook(pattern: Tensor) -> Tensor:
            def reduce(gradient: Tensor) -> None:
                product = at_least_float(pattern.detach()) * at_least_float(gradient)
                found[layer] = (reads.to(product.dtype)[:, None] @ product @ read.to(product.dtype).mT[:, None]).cpu()

            pattern.register_hook(reduce)
            return pattern

        return hook

    margins = plan.margins(body, side, hooks=[(site("pattern", layer), watch(layer)) for layer in chosen], grad=True)
    margins.sum().backward()
    by_row = torch.stack([found[layer] for layer in chosen])
    total = by_row.new_zeros(by_row.shape[0], plan.n, *by_row.shape[2:])
    total.index_add_(1, torch.tensor(owners), by_row)
    return total.masked_fill(~grid.visible[None, :, None], torch.nan)


def _reading_on(grid: SpanGrid, positions: Tensor, answer: Sequence[int] | None) -> SpanGrid:
    """The grid with each row's destination `answer` drawn on to the row's last position that is read."""
    if answer is None:
        return grid
    destinations = grid.destinations.clone()
    rows, end = torch.arange(len(answer)), positions.max(dim=1).values + 1
    destinations[rows, torch.tensor(answer), 1] = end
    return SpanGrid(destinations, grid.sources, torch.maximum(grid.lengths, end))
