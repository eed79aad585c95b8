"""How far from base to tuned do the weights have to go before the answer stops following the chain?

The weights `base + alpha * (tuned - base)` answer under a chain that is not the problem's own.  The follow rate is the
share of traces in which they give the answer that this chain implies.  Starting from the two ends, bisection looks for
the alpha at which the follow rate falls below `level`; which alpha is read next depends on the rates so far.

    reasoninterp run experiments/studies/blend_threshold.py --base A --tuned B --traces FILE.jsonl --out runs/mine

The chain is the one with which the report computes its follow rate.  Where the base does not follow, or the tuned mind
still does, nothing is bisected and `crossing` says which.  If the rate is not monotone there may be other crossings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from reasoninterp import Batch, Cell, Context, Study, UserError, estimate
from reasoninterp.figures import curve
from reasoninterp.models.minds import blend


class BlendThreshold(Study):
    """The alpha between base and tuned at which the follow rate falls below a level, by bisection."""

    level: float = 0.5  # the follow rate that is looked for
    halvings: int = 6  # alpha is known to 2 ** -halvings

    def search(self, context: Context, evaluate: Callable[..., Any]) -> None:
        """Read the ends; where the rate crosses the level between them, halve the interval around the crossing."""
        swaps = {item.id: item.swap for item in context.items if item.swap is not None}
        if not swaps:
            raise UserError("no trace has another chain: give corrupt chains, or more traces to swap with.")

        def rate(alpha: float) -> float:
            group, cells = blend("base", "tuned", alpha), []
            for trace, swap in swaps.items():
                cells.append(Cell(f"{alpha}/{trace}", group, labels={"alpha": alpha, "trace": trace}, item=swap))
            return sum(row["follows"] for rows in evaluate(*cells) for row in rows) / len(swaps)

        low, high = 0.0, 1.0
        if rate(low) >= self.level > rate(high):
            for _ in range(self.halvings):
                middle = (low + high) / 2
                low, high = (low, middle) if rate(middle) < self.level else (middle, high)

    def measure(self, context: Context, batch: Batch) -> Iterator[Any]:
        """Is the answer under the other chain the one that it implies?"""
        chains = [cell.item.corrupt for cell in batch]
        for cell, chain, reading in zip(batch, chains, context.read(chains), strict=True):
            yield cell.row(follows=reading.says(chain.answer))

    def summarise(self, rows: pd.DataFrame, context: Context) -> dict[str, pd.DataFrame]:
        """`blend_path`: the rate at each alpha, as searched; `crossing`: the alphas around it, and those sure at 95 %."""
        path = estimate(rows, by=["alpha"], value="follows")
        path.insert(0, "read", range(1, len(path) + 1))
        above, below = path["alpha"][path["value"] >= self.level], path["alpha"][path["value"] < self.level]
        sure = path["alpha"][path["ci_low"] > self.level].max(), path["alpha"][path["ci_high"] < self.level].min()
        found = "base is below" if above.empty else "tuned is not below" if below.empty else "found"
        columns = ["level", "crossing", "above_at", "below_at", "surely_above_at", "surely_below_at"]
        values = [self.level, found, above.max(), below.min(), *sure]
        return {"blend_path": path, "crossing": pd.DataFrame([values], columns=columns)}

    def draw(self, summary: dict[str, pd.DataFrame]) -> Figure:
        """The follow rate against alpha, with its intervals and the level."""
        path = summary["blend_path"].sort_values("alpha")
        figure = curve(path, "alpha", hue=None, xlabel="alpha, base to tuned", ylabel="follow rate")
        figure.axes[0].axhline(self.level, color="grey", linewidth=0.8, linestyle=":")
        return figure
