"""Figures of the study `who-reads`: each measure against knockout, a point a head, and heads × measures as maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from reasoninterp.figures import FAINT, INK, MUTED, WHITE, colours, errors, figure, heatmap, housed, mind_order, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WORDS = {
    "knockout": "knockout (nats)",
    "attribution": "attribution (nats)",
    "gradient": "gradient × attention (nats)",
    "attention": "attention to the step",
    "value_share": "share of the norm written",
    "value_weighted": "norm written",
}
AGAINST = ("attention", "value_share", "gradient", "attribution")
SHORT = ("knockout", "attribution", "gradient", "attention", "value-weighted")  # in the order of WORDS
NAMED_HEADS = 3
WORTH_NAMING = 0.08  # of the largest effect in the figure
SHOWN_HEADS = 24
SHOWN_COLUMNS = 6


def draw_all(table: pd.DataFrame, agreement: pd.DataFrame) -> dict[str, Figure]:
    """All figures by name; none where nothing was measured."""
    if not len(table):
        return {}
    last = table.loc[table["column_index"].idxmax(), "column"]
    shown = [(column, "attention") for column in _leading_columns(table)]
    out = {
        "who-reads": against_knockout(table, agreement, [(last, measure) for measure in AGAINST]),
        "who-reads-heads": head_maps(table, last),
    }
    return out | ({"who-reads-steps": against_knockout(table, agreement, shown)} if len(shown) > 1 else {})


@housed
def against_knockout(table: pd.DataFrame, agreement: pd.DataFrame, panels: Sequence[tuple[str, str]]) -> Figure:
    """Panels of one measure against knockout at one column, a point a head and mind, arrows from the first mind on.

    The rank correlation with knockout stands in each panel; the heads that lead by either measure are named.

    Args:
        table: `who_reads`.
        agreement: `who_reads_agreement`.
        panels: column and measure of each.
    """
    across = min(len(panels), 4 if len(panels) != 6 else 3)
    down = -(-len(panels) // across)
    made = figure(1.0 + 2.35 * across, 0.55 + 2.5 * down)
    axes = made.subplots(down, across, squeeze=False, sharey=True, sharex=len({m for _, m in panels}) == 1).ravel()
    palette = colours(mind_order(table["mind"]))
    columns = {column for column, _ in panels}
    least = WORTH_NAMING * table.loc[table["measure"] == "knockout", "value"].abs().max()
    for ax, (column, measure) in zip(axes, panels, strict=False):
        _panel(ax, table[table["column"] == column], measure, palette, least)
        ax.set_title(column if len(columns) > 1 else "")
        _note(ax, agreement[(agreement["column"] == column) & (agreement["measure"] == measure)], palette)
        ax.set_xlabel(WORDS[measure])
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    for ax in axes[::across]:
        ax.set_ylabel("knockout (nats)")
    handles, labels = axes[0].get_legend_handles_labels()
    made.legend(handles, labels, loc="outside upper right", ncols=len(labels))
    what = f"the {panels[0][0]}" if len(columns) == 1 else "each step"
    made.suptitle(f"The answer's reading of {what}, a point a head", x=0.01, ha="left", fontsize=9.5)
    return made


@housed
def head_maps(table: pd.DataFrame, column: str) -> Figure:
    """Heads × measures at one column, one map a mind; each measure as a share of its largest size in any mind."""
    part = table[(table["column"] == column) & (table["measure"] != "value_weighted")].copy()
    largest = part.groupby("measure")["value"].transform(lambda v: v.abs().max())
    for name in ("value", "ci_low", "ci_high"):
        part[name] = part[name] / largest.where(largest > 0)
    lead = part[part["measure"] == "knockout"].groupby("site")["value"].agg(lambda v: v.abs().max())
    heads = lead.nlargest(SHOWN_HEADS).index
    part = part[part["site"].isin(heads)]
    hidden = len(lead) - len(heads)
    part["measure_index"] = part["measure"].map(list(WORDS).index)
    part["site_index"] = part["layer"] * 10_000 + part["head"]
    part["measure"] = part["measure"].map(dict(zip(WORDS, SHORT, strict=False)))
    return heatmap(
        part.drop(columns="n"),
        "measure",
        "site",
        limit=1.0,
        xlabel="",
        ylabel=f"head ({hidden} with less effect not shown)" if hidden else "head",
        unit=f"at the {column}, as a share of the measure's largest",
        width=4.6 * table["mind"].nunique() + 0.9,
    )


def _leading_columns(table: pd.DataFrame) -> list[str]:
    """The columns with the largest effect of any head, in the order of the trace."""
    exact = table[table["measure"] == "knockout"].assign(size=lambda t: t["value"].abs())
    largest = exact.groupby(["column_index", "column"])["size"].max().nlargest(SHOWN_COLUMNS)
    return [column for _, column in sorted(largest.index)]


def _panel(ax: Axes, here: pd.DataFrame, measure: str, palette: dict[str, str], least: float) -> None:
    x, y = (here[here["measure"] == m].set_index(["mind", "site"]) for m in (measure, "knockout"))
    ax.axhline(0, color=FAINT, lw=0.8)
    minds = [mind for mind in palette if mind in x.index.get_level_values("mind")]
    named = _named(x["value"], y["value"], least)
    for mind in minds:
        at, up = x.loc[mind], y.loc[mind].reindex(x.loc[mind].index)
        ax.errorbar(
            at["value"], up["value"], xerr=errors(at), yerr=errors(up), fmt="o", ms=4.5, color=palette[mind],
            elinewidth=0.8, alpha=0.9, label=mind,
        )  # fmt: skip
        if mind == minds[0]:
            continue
        for head in named:
            start, end = ((x.loc[m, head]["value"], y.loc[m, head]["value"]) for m in (minds[0], mind))
            line: Any = {"arrowstyle": "->", "color": MUTED, "lw": 0.9, "shrinkA": 4, "shrinkB": 4}
            ax.annotate("", end, start, arrowprops=line, zorder=1)
    ax.margins(0.14, 0.14)
    ax.grid(True, axis="y")
    _label(ax, {head: (x.loc[minds[0], head]["value"], y.loc[minds[0], head]["value"]) for head in named})


def _label(ax: Axes, places: Mapping[str, tuple[float, float]]) -> None:
    """Names beside points, the lower one's beneath where two points are close."""
    wide, high = np.ptp(ax.get_xlim()), np.ptp(ax.get_ylim())
    for head, (x, y) in places.items():
        near = [v for h, (u, v) in places.items() if h != head and abs(u - x) < wide / 5 and abs(v - y) < high / 10]
        right = x > np.mean(ax.get_xlim())
        ax.annotate(
            head, (x, y), (-6 if right else 6, -11 if any(v > y for v in near) else 4), textcoords="offset points",
            fontsize=7.5, color=INK, ha="right" if right else "left", bbox=WHITE | {"alpha": 0.6},
        )  # fmt: skip


def _named(x: pd.Series, y: pd.Series, least: float) -> list[str]:
    """The heads that lead by knockout, and by the other measure, in any mind; none in a panel without an effect."""
    exact, other = (v.abs().groupby("site").max() for v in (y, x))
    exact = exact[exact >= least]
    return list(dict.fromkeys([*exact.nlargest(NAMED_HEADS).index, *other.nlargest(1).index])) if len(exact) else []


def _note(ax: Axes, found: pd.DataFrame, palette: dict[str, str]) -> None:
    """The rank correlation with knockout of each mind, above the panel."""
    rows = [r for r in found.to_dict("records") if r["mind"] in palette]
    ax.set_title(ax.get_title(loc="left"), pad=6 + 11 * len(rows))
    for k, row in enumerate(reversed(rows)):
        text = f"ρ {number(row['value'], 2)} [{number(row['ci_low'], 2)}, {number(row['ci_high'], 2)}]"
        ax.annotate(
            text, (0, 1), (0, 4 + 11 * k), xycoords="axes fraction", textcoords="offset points", fontsize=7.5,
            color=palette[row["mind"]],
        )  # fmt: skip
