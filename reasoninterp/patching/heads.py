"""Head outputs where the answer is read: which head brings the step's value to the answer.

`z` (the head's output before W_O, [head, d_head]) at the token where the answer is read is put from the other run into
this one, one head at a time, in both directions; values and signs as in `residual`.  At the answer position alone, a
head that lights up carries the value there, or lies downstream of one that does: this traces a path, not a locus.
"""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd
import torch

from reasoninterp.models.body import site
from reasoninterp.models.context import Context
from reasoninterp.patching.metric import contrast_plan
from reasoninterp.patching.residual import DIRECTIONS, SIDES, patched_margins, span_mask, summarise_map
from reasoninterp.study import Batch, Cell, Row, Study
from reasoninterp.traces.trace import Span


class Heads(Study):
    """Head outputs (`z`) at the answer position, one head at a time, both directions, for each mind.

    Parameters:
        max_traces: at most so many aligned contrasts a mind: every cell of the map is a forward pass over all of them.
    """

    max_traces: int = 128

    def cells(self, context: Context) -> Iterable[Cell]:
        """Every mind × item whose contrast is aligned."""
        return context.contrast_cells(aligned=True, most=self.max_traces)

    def measure(self, context: Context, batch: Batch) -> Iterable[Row]:
        """One row per cell, direction, layer and head."""
        body, contrasts = context.body, [cell.item.contrast for cell in batch]
        plan = contrast_plan(context, contrasts)
        ends = [context.encode(c.clean).answer.start for c in contrasts]
        spans = [Span(end - 1, end) for end in ends]
        sites = [site("z", layer) for layer in range(body.n_layers)]
        whole = plan.margins(body, 1) - plan.margins(body, 0)
        for direction in DIRECTIONS:
            sides = SIDES[direction]
            cache = body.cache(plan.ids(sides.source), sites)
            plain = plan.margins(body, sides.into)
            mask = span_mask(plan, sides.into, spans)
            for layer, name in enumerate(sites):
                for head in range(body.n_heads):
                    one = torch.zeros(body.n_heads, dtype=torch.bool)
                    one[head] = True
                    at = mask[:, :, None, None] & one[None, None, :, None]
                    values = sides.sign * (patched_margins(body, plan, direction, name, cache[name], at) - plain)
                    for cell, value, effect in zip(batch, values.tolist(), whole.tolist(), strict=True):
                        yield cell.row(direction=direction, layer=layer, head=head, value=value, effect=effect)

    def summarise(self, rows: pd.DataFrame, context: Context) -> pd.DataFrame:
        """`heads`: mind, direction, layer, head, value, normalised, ci_low, ci_high, n."""
        return summarise_map(rows, ["mind", "direction", "layer", "head"], context.seed)
