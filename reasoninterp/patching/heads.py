"""Head outputs where the answer is read: which head brings the step's value to the answer.

`z` (the head's output before W_O, [head, d_head]) at the token where the answer is read is put from the other run into
this one, one head at a time, in both directions; values and signs as in `sweep`.  At the answer position alone, a
head that lights up carries the value there, or lies downstream of one that does: this traces a path, not a locus.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import pandas as pd

from reasoninterp.models.context import Context
from reasoninterp.patching.budget import Sweeping
from reasoninterp.patching.cells import Sites
from reasoninterp.patching.residual import summarise_map
from reasoninterp.patching.sweep import sweep_cells
from reasoninterp.study import Batch, Cell, Row, Study


class Heads(Sweeping, Study):
    """Head outputs (`z`) at the answer position, one head at a time, both directions, for each mind.

    Parameters:
        max_traces: at most so many aligned contrasts a mind; 0 for all.
    """

    sites: ClassVar[Sites] = Sites(("z",), spans="answer")
    max_traces: int = 128

    def cells(self, context: Context) -> Iterable[Cell]:
        """Every mind × item whose contrast is aligned."""
        return context.contrast_cells(aligned=True, most=self.max_traces or None)

    def measure(self, context: Context, batch: Batch) -> Iterable[Row]:
        """One row per cell, direction, layer and head."""
        return sweep_cells(context, batch, **self.sweep_arguments())

    def summarise(self, rows: pd.DataFrame, context: Context) -> pd.DataFrame:
        """`heads`: mind, direction, layer, head, value, ci_low, ci_high, n, d, p, p_corrected, normalised."""
        return summarise_map(rows, ["mind", "direction", "layer", "head"], context.seed)
