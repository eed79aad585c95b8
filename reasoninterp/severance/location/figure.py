"""The figure of a location: each Unit's entry in the ledger beside what it returns and takes away, located ones marked."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from reasoninterp.figures import INK, MUTED, bars, figure, housed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_UNITS = 16


@housed
def draw(ranking: pd.DataFrame, *, verdict: str = "", most: int = MOST_UNITS) -> Figure:
    """Ledger entries with intervals, and single restore and cut shares, of the first Units of a ranking.

    Args:
        ranking: one row a Unit (`severance.location.location.RANKING`), the most suspected first.
        verdict: put into the title.
        most: how many Units are shown; how many are left out is told.
    """
    shown = ranking.head(most)
    made = figure(8.4, 1.5 + 0.32 * len(shown))
    left, right = made.subplots(1, 2, sharey=True)
    ends = {"ledger": "value", "ledger_ci_low": "ci_low", "ledger_ci_high": "ci_high"}
    rest = f", {len(ranking) - len(shown)} more Units not shown" if len(ranking) > len(shown) else ""
    bars(
        shown.rename(columns=ends), "unit", ax=left, signed=True, title=f"Ledger{f': {verdict}' if verdict else ''}",
        xlabel=f"effect gained or lost (nats){rest}",
    )  # fmt: skip
    at = range(len(shown))
    right.axvline(0, color=MUTED, lw=0.9)
    right.axvline(1, color=MUTED, lw=0.8, ls=(0, (3, 2)))
    right.plot(shown["restore"], at, "o", color=INK, label="restore", ls="none")
    right.plot(shown["cut"], at, "o", color=INK, mfc="white", label="cut", ls="none")
    right.set_xlabel("share of the loss moved by the Unit alone")
    right.set_title("Grafts; the located Units are in bold")
    right.legend(loc="best")
    located = (shown["in_restoring"] | shown["in_cutting"]).tolist()
    for label, inside in zip(left.get_yticklabels(), located, strict=True):
        label.set_fontweight("bold" if inside else "normal")
    return made
