"""The residual stream over layer × step: where the changed step's value is held, in both directions.

For every aligned contrast (clean and corrupt chains with equal token spans), layer and column of `columns`:

* *denoising*: the corrupt run with the clean run's `resid_pre` put in at the column's tokens; the value is
  `m(corrupt) − m(patched)`: what this place is enough to undo;
* *noising*: the clean run with the corrupt run's `resid_pre` put in; the value is `m(patched) − m(clean)`: what is
  lost without it.

`m = log P(corrupt answer) − log P(clean answer)`.  Both values run from 0 to the contrast's whole effect; `normalised`
divides the mean by the mean effect of the same traces, given only where that is safely away from zero.  Columns before the first
changed token are 0 by causality and are not run.  Sufficiency is not necessity: read both (Heimersheim & Nanda 2024,
arXiv:2404.15255).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from reasoninterp.models.body import Body, site
from reasoninterp.models.context import Context
from reasoninterp.patching.columns import Column, columns
from reasoninterp.patching.metric import ContrastPlan, contrast_plan
from reasoninterp.stats import estimate
from reasoninterp.study import Batch, Cell, Row, Study
from reasoninterp.traces.trace import Span

DIRECTIONS = ("denoising", "noising")


class Sides(NamedTuple):
    """The run that is patched and the run that it is patched from, with the sign that makes an effect positive."""

    into: int
    source: int
    sign: float


# Rows of a contrast plan: side 0 reads the clean chain, side 1 the corrupt one.
SIDES = {"denoising": Sides(into=1, source=0, sign=-1.0), "noising": Sides(into=0, source=1, sign=1.0)}


def span_mask(plan: ContrastPlan, side: int, spans: Sequence[Span | None]) -> Bool[Tensor, "row pos"]:
    """Positions to patch in each row of one side: the span of the row's contrast, none where it is None."""
    ids = plan.ids(side)
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    for row, owner in enumerate(plan.owners(side)):
        span = spans[owner]
        if span is not None:
            mask[row, span.start : span.stop] = True
    return mask


def patched_margins(
    body: Body, plan: ContrastPlan, direction: str, name: str, source: Tensor, mask: Tensor
) -> Float[Tensor, " contrast"]:
    """Margins of the patched run: `source` put in at site `name` where `mask` is true.

    Args:
        body: the mind that is read.
        plan: the contrasts.
        direction: `denoising` or `noising`.
        name: the site, as `site(component, layer)` gives it.
        source: activations of the other run at that site, [row, pos, ...].
        mask: [row, pos], or of the activation's full shape.
    """
    where = mask.to(source.device)
    while where.dim() < source.dim():
        where = where[..., None]
    return plan.margins(body, SIDES[direction].into, hooks=[(name, lambda act: torch.where(where, source, act))])


class Residual(Study):
    """Residual-stream patching over layer × step, both directions, for each mind.

    Parameters:
        max_traces: at most so many aligned contrasts a mind: every cell of the map is a forward pass over all of them.
    """

    max_traces: int = 128

    def cells(self, context: Context) -> Iterable[Cell]:
        """Every mind × item whose contrast is aligned."""
        return context.contrast_cells(aligned=True, most=self.max_traces)

    def measure(self, context: Context, batch: Batch) -> Iterable[Row]:
        """One row per cell, direction, layer and column."""
        body, contrasts = context.body, [cell.item.contrast for cell in batch]
        plan = contrast_plan(context, contrasts)
        tables = [columns(context.encode(c.clean)) for c in contrasts]
        first = plan.first_difference()
        sites = [site("resid_pre", layer) for layer in range(body.n_layers)]
        orders = sorted({c.order for table in tables for c in table})
        whole = plan.margins(body, 1) - plan.margins(body, 0)
        for direction in DIRECTIONS:
            sides = SIDES[direction]
            cache = body.cache(plan.ids(sides.source), sites)
            plain = plan.margins(body, sides.into)
            for order in orders:
                found: list[Column | None] = [next((c for c in t if c.order == order), None) for t in tables]
                live = [c.span if c and c.span.stop > first[k] else None for k, c in enumerate(found)]
                mask = span_mask(plan, sides.into, live)
                for layer, name in enumerate(sites):
                    values = torch.zeros(len(batch))
                    if mask.any():
                        values = sides.sign * (patched_margins(body, plan, direction, name, cache[name], mask) - plain)
                    for k, cell in enumerate(batch):
                        column = found[k]
                        if column is not None:
                            yield cell.row(
                                direction=direction,
                                layer=layer,
                                column=column.label,
                                column_index=order,
                                value=float(values[k]),
                                effect=float(whole[k]),
                            )

    def summarise(self, rows: pd.DataFrame, context: Context) -> pd.DataFrame:
        """`residual`: mind, direction, layer, column, column_index, value, normalised, ci_low, ci_high, n."""
        return summarise_map(rows, ["mind", "direction", "layer", "column", "column_index"], context.seed)


def summarise_map(rows: pd.DataFrame, by: list[str], seed: int) -> pd.DataFrame:
    """Means over traces with intervals, and beside them their share of the mean effect where that is safe."""
    if not len(rows):
        return pd.DataFrame(columns=[*by, "value", "normalised", "ci_low", "ci_high", "n"])
    table = estimate(rows, by=by, value="value", kind="mean", seed=seed)
    # Over the traces of the cell: chains that have the column may have another effect than those that do not.
    whole = estimate(rows, by=by, value="effect", kind="mean", seed=seed)
    safe = (whole["ci_low"] > 0) | (whole["ci_high"] < 0)
    table["normalised"] = table["value"] / whole["value"].where(safe)
    if "column_index" in by:
        rank = {order: k for k, order in enumerate(sorted(table["column_index"].unique()))}
        table["column_index"] = table["column_index"].map(rank)
    return table
