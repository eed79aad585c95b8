"""The figure of the smallest sets: share of the loss against the number of Units moved along the ledger's order."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from reasoninterp import figures

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLES = {"restore": "base weights given back: share of E returned", "cut": "tuned weights put in: share of E taken"}
CONTROLS = {"size": ("random sets, same size", "0.88"), "norm": ("random sets, same norm", "0.78")}


@figures.housed
def draw_sets(sets: pd.DataFrame, curve: pd.DataFrame) -> Figure:
    """One panel a direction: the order's first Units (line), the first smallest set (diamond), controls (bands).

    Args:
        sets: the table `smallest_sets`.
        curve: the table `smallest_curve`.
    """
    ways = list(dict.fromkeys(sets["direction"]))
    fig = figures.figure(3.6 * len(ways), 3.5)
    axes = fig.subplots(1, len(ways), sharey=True, squeeze=False)[0]
    for ax, way in zip(axes, ways, strict=True):
        _panel(ax, sets[sets["direction"] == way], curve[curve["direction"] == way])
        ax.set_title(TITLES[way])
    handles, names = axes[0].get_legend_handles_labels()
    fig.legend(handles, names, loc="outside lower center", ncols=2)
    return fig


def _panel(ax: Axes, sets: pd.DataFrame, curve: pd.DataFrame) -> None:
    first = sets.iloc[0]
    for match, (label, grey) in CONTROLS.items():
        low, high = first[f"control_{match}_ci_low"], first[f"control_{match}_ci_high"]
        if np.isfinite(low):
            ax.axhspan(low, high, color=grey, lw=0, label=f"{label} (n = {first[f'control_{match}_draws']} sets)")
    ax.axhline(first["threshold"], color=figures.MUTED, lw=1.0, ls=(0, (4, 3)))
    line: dict[str, Any] = {"color": figures.INK, "marker": "o", "elinewidth": 1.1}
    ax.errorbar(curve["size"], curve["share"], yerr=figures.errors(curve, "share"), label="ledger's order", **line)
    look: dict[str, Any] = {"color": figures.GAIN, "marker": "D", "ms": 8, "ls": "none", "zorder": 4}
    ax.plot([first["size"]], [first["share"]], label="smallest set", **look)
    at_top = first["share"] > 0.75 * ax.get_ylim()[1]
    ax.annotate(
        first["units"].replace("+", "\n"),
        (first["size"], first["share"]),
        xytext=(8, -8 if at_top else 8),
        textcoords="offset points",
        va="top" if at_top else "bottom",
        fontsize=7.5,
    )
    ax.set_xlabel("Units moved")
    ax.locator_params(axis="x", integer=True)
    ax.grid(True, axis="y")
