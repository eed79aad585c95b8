"""The figure of a location: each Unit's entry in the ledger beside what it returns and takes away, located ones marked."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from reasoninterp.figures import INK, MUTED, bars, figure, housed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_UNITS = 16


@housed
def draw(ranking: pd.DataFrame, *, verdict: str = "", most: int = MOST_UNITS, seed: object = None) -> Figure:
    """Ledger entries, and single restore and cut shares, with intervals, of the first Units of a ranking.

    Args:
        ranking: one row a Unit (`severance.location.location.RANKING`), the most suspected first.
        verdict: put into the title.
        most: how many Units are shown; how many are left out is told.
        seed: of the bootstrap, told where it is given.
    """
    shown = ranking.head(most)
    made = figure(8.4, 1.7 + 0.34 * len(shown))
    left, right = made.subplots(1, 2, sharey=True)
    ends = {"ledger": "value", "ledger_ci_low": "ci_low", "ledger_ci_high": "ci_high"}
    bars(
        shown[["unit", *ends]].rename(columns=ends), "unit", ax=left, signed=True,
        title=f"Ledger{f': {verdict}' if verdict else ''}", xlabel="effect gained or lost (nats)",
    )  # fmt: skip
    right.axvline(0, color=MUTED, lw=0.9)
    right.axvline(1, color=MUTED, lw=0.8, ls=(0, (3, 2)))
    for way, face, up, label in (("restore", INK, -0.14, "returned"), ("cut", "white", 0.14, "taken away")):
        kept = shown[way].notna().to_numpy()
        value, low, high = (shown.loc[kept, f"{way}{end}"].to_numpy(float) for end in ("", "_ci_low", "_ci_high"))
        at = np.flatnonzero(kept) + up
        right.hlines(at, low, high, color=INK, lw=1.0, zorder=1)
        right.plot(value, at, "o", color=INK, mfc=face, label=label, ls="none", ms=4.5)
    right.set_xlabel("share of the loss moved by the Unit alone")
    right.set_title("Grafts; located Units in bold")
    right.legend(loc="upper center", bbox_to_anchor=(0.5, -0.5 / made.get_figheight()), ncol=2, frameon=False)
    located = (shown["in_restoring"] | shown["in_cutting"]).tolist()
    for text, inside in zip(left.get_yticklabels(), located, strict=True):
        text.set_fontweight("bold" if inside else "normal")
    rest = len(ranking) - len(shown)
    said = [f"n = {int(ranking['n'].max())} traces; lines are 95 % intervals over traces"]
    said += [f"seed {seed}"] * (seed is not None) + [f"{rest} more Units not shown"] * (rest > 0)
    made.text(0.01, -0.02, "; ".join(said), color=MUTED, fontsize=8.5, va="top")
    return made
