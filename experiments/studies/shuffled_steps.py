"""Does the answer survive when the steps before it change places?

Each mind reads every trace whole, with its steps in another order (or several), and, as the control, with one random
earlier step left out.  A mind whose answer comes from the steps should change it when they are shuffled; one that
only looks at the last step should change it exactly when another step has become the last.

    reasoninterp run experiments/studies/shuffled_steps.py --base A --tuned B --traces FILE.jsonl --out runs/mine

Counted is the share of traces in which the answer stays the one that the mind gave after the whole chain, not the
share of right answers.  Chains of a single step, and traces to which the mind gave no answer at all, are left out; `n`
is what remains.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from reasoninterp import Batch, Context, Study, UserError, estimate
from reasoninterp.figures import bars
from reasoninterp.traces.edits import drop, shuffle


class ShuffledSteps(Study):
    """Shuffle the steps, or drop an earlier one: does the answer stay the same?"""

    orders: int = 2  # how many orders of the steps are read per trace

    def measure(self, context: Context, batch: Batch) -> Iterator[Any]:
        """One row for each edit of each trace: was the answer the one after the whole chain?"""
        edited = []
        for cell in batch:
            trace = cell.item.trace
            if len(trace.steps) < 2:
                continue
            chance = random.Random(f"{context.seed}/{trace.id}")  # not cell.seed: all minds read the same edits
            seeds = [chance.randrange(2**31) for _ in range(self.orders)]
            edits = [("shuffled", shuffle(trace, seed).trace) for seed in seeds]
            earlier = chance.randrange(len(trace.steps) - 1)
            edits.append(("one step dropped", drop(trace, earlier).trace))
            edited += [(cell, trace, kind, other) for kind, other in edits]
        whole = context.read([trace for _, trace, _, _ in edited])
        after = context.read([other for *_, other in edited])
        for (cell, trace, kind, other), before, now in zip(edited, whole, after, strict=True):
            if before.value is not None:
                last_kept = other.steps[-1] == trace.steps[-1]
                yield cell.row(edit=kind, same=now.says(before.value), last_kept=last_kept)

    def summarise(self, rows: pd.DataFrame, context: Context) -> dict[str, pd.DataFrame]:
        """The share of answers that stay, per mind and edit, and again by whether the last step stayed last."""
        if rows.empty:
            raise UserError("no chain of two steps or more got an answer: there is nothing to shuffle.")
        return {
            "shuffled": estimate(rows, by=["mind", "edit"], value="same", kind="share"),
            "shuffled_last": estimate(rows, by=["mind", "edit", "last_kept"], value="same", kind="share"),
        }

    def draw(self, summary: dict[str, pd.DataFrame]) -> Figure:
        """Bars of the share of answers that stay the same, one colour an edit."""
        return bars(summary["shuffled"], "mind", hue="edit", xlabel="share of answers that stay the same")
