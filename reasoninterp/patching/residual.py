"""The residual stream over layer × step: where the changed step's value is held, in both directions.

For every aligned contrast (clean and corrupt chains with equal token spans), layer and column of `columns`,
`resid_pre` is put in from the other run at the column's tokens (values and signs as in `sweep`): denoising says what
this place is enough to undo, noising what is lost without it.  `normalised` divides the mean by the mean effect of the
same traces, given only where that is safely away from zero.  Sufficiency is not necessity: read both (Heimersheim &
Nanda 2024, arXiv:2404.15255).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import pandas as pd

from reasoninterp.models.context import Context
from reasoninterp.patching.budget import Sweeping
from reasoninterp.patching.cells import Sites
from reasoninterp.patching.sweep import sweep_cells
from reasoninterp.stats import effect_sizes, estimate
from reasoninterp.study import Batch, Cell, Row, Study


class Residual(Sweeping, Study):
    """Residual-stream patching over layer × step, both directions, for each mind.

    Parameters:
        max_traces: at most so many aligned contrasts a mind; 0 for all.
    """

    sites: ClassVar[Sites] = Sites(("resid_pre",))
    max_traces: int = 128

    def cells(self, context: Context) -> Iterable[Cell]:
        """Every mind × item whose contrast is aligned."""
        return context.contrast_cells(aligned=True, most=self.max_traces or None)

    def measure(self, context: Context, batch: Batch) -> Iterable[Row]:
        """One row per cell, direction, layer and column."""
        return sweep_cells(context, batch, **self.sweep_arguments())

    def summarise(self, rows: pd.DataFrame, context: Context) -> pd.DataFrame:
        """`residual`: mind, direction, layer, column, column_index, value, ci_low, ci_high, n, d, p, p_corrected, normalised."""
        return summarise_map(rows, ["mind", "direction", "layer", "column", "column_index"], context.seed)


def summarise_map(rows: pd.DataFrame, by: list[str], seed: int) -> pd.DataFrame:
    """Means over traces with intervals, and beside them their share of the mean effect where that is safe.

    `d` is the mean over its standard deviation over traces; `p` a two-sided sign-flip permutation test, and
    `p_corrected` its Benjamini–Hochberg correction over the map of one mind and direction.
    """
    if not len(rows):
        columns = ["value", "ci_low", "ci_high", "n", "method", "d", "p", "p_corrected", "normalised"]
        return pd.DataFrame(columns=[*by, *columns])
    table = effect_sizes(rows, by=by, value="value", family=["mind", "direction"], seed=seed)
    # Over the traces of the cell: chains that have the column may have another effect than those that do not.
    whole = estimate(rows, by=by, value="effect", kind="mean", seed=seed)
    safe = (whole["ci_low"] > 0) | (whole["ci_high"] < 0)
    table["normalised"] = table["value"] / whole["value"].where(safe)
    if "column_index" in by:
        rank = {order: k for k, order in enumerate(sorted(table["column_index"].unique()))}
        table["column_index"] = table["column_index"].map(rank)
    return table
