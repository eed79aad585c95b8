"""The ledger and the grafts as figures, each a plain function of the run's tables.

1. `ledger`: the change of E split over blocks of weights, largest first, with the quadrature's residual as a bar of its
   own and the change itself as a line; beside it, how far the same weights moved.
2. `ledger_circuits`: the leading entries by circuit.
3. `grafts`: both directions of every graft, in the ledger's order; `graft_sets`: of several blocks at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from reasoninterp import figures
from reasoninterp.figures import FAINT, HAIR, INK, MUTED, NEUTRAL, WHITE, errors, housed, number, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TOP_UNITS = 14
TOP_CIRCUITS = 16
REST = "other blocks"


def blocks(table: pd.DataFrame) -> pd.DataFrame:
    """The ledger's rows at block level, largest first."""
    rows = table[table["level"] == "block"] if "level" in table else table[table["circuit"].fillna("") == ""]
    return rows.sort_values("attribution", key=lambda c: c.abs(), ascending=False, kind="stable", na_position="last")


def circuits(table: pd.DataFrame) -> pd.DataFrame:
    """The ledger's rows at circuit level, largest first, with a `label` of their own."""
    rows = table[table["level"] == "circuit"] if "level" in table else table[table["circuit"].fillna("") != ""]
    rows = rows.sort_values("attribution", key=lambda c: c.abs(), ascending=False, kind="stable", na_position="last")
    rows = rows.copy()
    if rows["unit"].is_unique:
        rows["label"] = rows["unit"]
    else:
        tail = [f".H{int(h)}" if pd.notna(h) else "" for h in pd.to_numeric(rows["head"], errors="coerce")]
        rows["label"] = [
            f"{u}{t}{'.' + c if c else ''}"
            for u, t, c in zip(rows["unit"], tail, rows["circuit"].fillna(""), strict=True)
        ]
    return rows


def residual_text(total: Mapping[str, Any]) -> str:
    """The quadrature residual in words, as the ledger prints it."""
    relative = total.get("residual_relative")
    text = f"{number(total.get('residual'), 2)} nats"
    if relative is None or pd.isna(relative):
        return text
    percent = 100 * float(relative)
    return f"{text} ({'under 0.001' if 0 < percent < 0.001 else number(percent, 2)} % of the larger |E|)"


@housed
def ledger(table: pd.DataFrame, total: Mapping[str, Any], top: int = TOP_UNITS) -> Figure:
    """The loss split over blocks: signed bars with intervals, the residual as its own hatched bar, the loss as a line.

    Beside it the size of the weight change of the same blocks, with its rank: usually another order.
    """
    ranked = blocks(table)
    shown = ranked if len(ranked) <= top + 1 else ranked.head(top)
    rest = ranked.iloc[len(shown) :]
    names = list(shown["unit"].astype(str))
    values = list(shown["attribution"].astype(float))
    if len(rest):
        names.append(f"{len(rest)} {REST}")
        values.append(float(rest["attribution"].sum()))
    weighed = "weight_change" in shown and shown["weight_change"].notna().any()
    fig = figures.figure(9.6, 1.45 + 0.29 * (len(names) + 1))
    grid = fig.add_gridspec(1, 2 if weighed else 1, width_ratios=[2.5, 1] if weighed else [1])
    ax = fig.add_subplot(grid[0])
    frame = pd.DataFrame({"unit": [*names, "residual"], "value": [*values, float(total.get("residual", np.nan))]})
    for side in ("ci_low", "ci_high"):
        frame[side] = [*shown[side].astype(float), *[np.nan] * (len(frame) - len(shown))]
    figures.bars(
        frame,
        "unit",
        ax=ax,
        signed=True,
        xlabel="share of the change of E, in nats  (below zero: takes away from following)",
    )
    last = ax.patches[-1]
    last.set(facecolor="white", edgecolor=INK, hatch="//////", linewidth=0.9)
    if len(rest):
        ax.patches[len(shown)].set(alpha=0.45)
    _loss_line(ax, total)
    low, high = _wide_enough(ax, total)
    way = 1 if high > -low else -1  # the emptier side of zero is the wrong one: the axis ends there
    at = max(0.0, *(way * frame[["value", "ci_low", "ci_high"]].iloc[-1].fillna(0)))
    ax.annotate(
        residual_text(total),
        (way * at, len(names)),
        xytext=(way * 6, 0),
        textcoords="offset points",
        ha="left" if way > 0 else "right",
        va="center",
        fontsize=8,
        color=MUTED,
        bbox=WHITE,
    )
    ax.axhline(len(names) - 0.5, color=HAIR, lw=1)
    if weighed:
        _weight_panel(fig.add_subplot(grid[1], sharey=ax), ranked, names)
    return fig


def _loss_line(ax: Axes, total: Mapping[str, Any]) -> None:
    loss = float(total.get("loss", np.nan))
    if not np.isfinite(loss):
        return
    low, high = (float(total.get(k, np.nan)) for k in ("loss_ci_low", "loss_ci_high"))
    known = np.isfinite(low) and np.isfinite(high)
    if known:
        ax.axvspan(low, high, color=INK, alpha=0.08, lw=0, zorder=0)
    ax.axvline(loss, color=INK, ls=(0, (4, 2)), lw=1.2, zorder=1)
    span = f"  [{number(low)}, {number(high)}]" if known else ""
    ax.set_title(f"E(tuned) − E(base) = {number(loss)}{span}, dashed")


def _wide_enough(ax: Axes, total: Mapping[str, Any]) -> tuple[float, float]:
    """Widen the axis to a quarter of the larger |E| either way, so that a small change looks small."""
    ends = [abs(float(total.get(k, np.nan))) for k in ("e_base", "e_tuned")]
    quarter = 0.25 * max([e for e in ends if np.isfinite(e)] or [0.0])
    low, high = ax.get_xlim()
    if quarter == 0 and high - low < 1:
        quarter = 1.0
    low, high = min(low, -quarter), max(high, quarter)
    ax.set_xlim(low, high)
    return low, high


def _weight_panel(ax: Axes, ranked: pd.DataFrame, names: Sequence[str]) -> None:
    """Size of the weight change of each block with its rank among all blocks."""
    change = ranked.set_index(ranked["unit"].astype(str))["weight_change"].astype(float)
    rank = change.rank(ascending=False, method="min")
    for k, name in enumerate(names):
        if name not in change.index or pd.isna(change[name]):
            continue
        first = rank[name] == 1
        ax.barh(k, change[name], height=0.72, color="#6b7480" if first else "#c9ced6")
        text = f"{int(rank[name])}{' – largest' if first else ''}"
        ax.annotate(
            text,
            (change[name], k),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=INK if first else MUTED,
        )
    if change.idxmax() not in names:
        most = f"largest: {short(change.idxmax(), 18)}, {number(change.max(), 2)}"
        ax.annotate(
            most, (0, len(names)), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8, color=INK
        )
    shown = change[[n for n in names if n in change.index]]
    ax.set_xlim(0, 1.35 * float(shown.max() or 1))
    ax.tick_params(axis="y", labelleft=False, length=0)
    ax.spines["left"].set_visible(False)
    ax.set_title("where weights changed", color=MUTED)
    ax.set_xlabel("‖Δ weights‖, with its rank")
    ax.grid(True, axis="x")


@housed
def ledger_circuits(table: pd.DataFrame, total: Mapping[str, Any] | None = None, top: int = TOP_CIRCUITS) -> Figure:
    """The leading entries at circuit level; heads split into QK (where it looks) and OV (what it carries)."""
    from matplotlib.patches import Patch

    rows = circuits(table).head(top)
    fig = figures.figure(6.4, 1.2 + 0.25 * len(rows))
    ax = fig.add_subplot()
    look = {"QK": "#4a2d7a", "OV": "#b784c4", "": NEUTRAL}
    kinds = [c if c in look else "" for c in rows["circuit"].fillna("")]
    figures.bars(
        rows.rename(columns={"attribution": "value"}),
        "label",
        ax=ax,
        colour=[look[k] for k in kinds],
        xlabel="share of the change of E, in nats",
    )
    _wide_enough(ax, total or {})
    words = {"QK": "QK: where a head looks", "OV": "OV: what a head carries", "": "not split"}
    handles = [Patch(color=look[k], label=words[k]) for k in look if k in kinds]
    fig.legend(handles=handles, loc="outside upper left", ncols=3)
    return fig


@housed
def dots(
    table: pd.DataFrame,
    label: str,
    hue: str,
    palette: Mapping[str, str],
    *,
    ax: Axes,
    title: str = "",
    xlabel: str = "",
) -> Figure:
    """A dot with its interval for each label, from top to bottom in the table's order, one a value of `hue`."""
    names = list(dict.fromkeys(table[label].astype(str)))
    kinds = list(dict.fromkeys(table[hue]))
    for k, kind in enumerate(kinds):
        rows = table[(table[hue] == kind) & table["value"].notna()]
        at = [names.index(str(n)) + (k - (len(kinds) - 1) / 2) * 0.26 for n in rows[label]]
        look: dict[str, Any] = {"fmt": "os"[k % 2], "ms": 5.5, "color": palette[kind], "elinewidth": 1.5}
        ax.errorbar(rows["value"], at, xerr=errors(rows), label=short(kind, 44), **look)
    figures.label_rows(ax, names)
    ax.set_title(title)
    ax.set_xlabel(xlabel)
    ax.grid(True, axis="x")
    return ax.get_figure(root=True)  # type: ignore[return-value]


RESTORE = "restore: base's block put into tuned"
CUT = "cut: tuned's block put into base"
GRAFT_COLOURS = {RESTORE: figures.MIND_COLOURS["base"], CUT: figures.MIND_COLOURS["tuned"]}


def graft_rows(table: pd.DataFrame, order: Sequence[str] | None = None, top: int = TOP_UNITS) -> pd.DataFrame:
    """Grafts in the ledger's order (units the ledger lacks come last), the leading ones only."""
    place = {name: k for k, name in enumerate(order or [])}
    key = table["unit"].astype(str).map(lambda u: place.get(u, len(place)))
    return table.iloc[np.argsort(key.to_numpy(), kind="stable")].head(top)


def shares_defined(table: pd.DataFrame) -> bool:
    """Whether any restored or cut share could be formed (its denominator was safely away from zero)."""
    return bool(table[["restore", "cut"]].notna().any(axis=None))


@housed
def grafts(
    table: pd.DataFrame,
    order: Sequence[str] | None = None,
    top: int = TOP_UNITS,
    follow: Mapping[str, float] | None = None,
) -> Figure:
    """Both directions of every graft as dots with intervals: share of the loss, raw E, and follow rate.

    Args:
        table: the grafts.
        order: units in the ledger's order.
        top: how many units.
        follow: the follow rates of base and tuned, drawn as lines.
    """
    rows = graft_rows(table, order, top)
    panels = [("e_restored", "e_cut", "E, in nats", "E after the graft")]
    if shares_defined(rows):
        panels.insert(0, ("restore", "cut", "share of the loss of E", "Share restored, share cut"))
    if {"follow_restored", "follow_cut"} <= set(rows.columns) and rows[["follow_restored", "follow_cut"]].notna().any(
        axis=None
    ):
        panels.append(("follow_restored", "follow_cut", "share of contrasts", "Follows after the graft"))
    fig = figures.figure(max(5.4, 3.2 * len(panels)), 1.6 + 0.36 * len(rows))
    axes = fig.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for ax, (first, second, xlabel, title) in zip(axes, panels, strict=True):
        both = []
        for column, words in ((first, RESTORE), (second, CUT)):
            part = rows[["unit"]].assign(value=rows[column], kind=words)
            for side in ("ci_low", "ci_high"):
                part[side] = rows.get(f"{column}_{side}", np.nan)
            both.append(part)
        dots(pd.concat(both), "unit", "kind", GRAFT_COLOURS, ax=ax, xlabel=xlabel, title=title)
        for k in range(0, len(rows), 2):
            ax.axhspan(k - 0.5, k + 0.5, color="#f5f6f8", lw=0, zorder=0)
        ends = {"restore": (0.0, 1.0), "e_restored": _pair(rows, "e_base", "e_tuned")}
        if first == "e_restored":
            ax.axvline(0, color=FAINT, lw=0.9, zorder=1)
        if first == "follow_restored":
            ax.set_xlim(-0.04, 1.04)  # a rate is read against all or nothing, not against its own noise
        for at, name in zip(ends.get(first, _follow_pair(follow)), ("base", "tuned"), strict=True):
            colour = MUTED if first == "restore" else figures.MIND_COLOURS[name]
            if np.isfinite(at):  # drawn, the ends are also in view: a small difference then looks small
                ax.axvline(at, color=colour, ls=(0, (4, 3)), lw=1.1, zorder=1)
    handles, words_ = axes[0].get_legend_handles_labels()
    fig.legend(handles, words_, loc="outside lower center", ncols=2)
    return fig


@housed
def graft_sets(table: pd.DataFrame) -> Figure:
    """Grafts of several blocks at once over their number: sets along the ledger (filled) against random sets (open)."""
    shares = shares_defined(table)
    effect = ("restore", "cut", "share of the loss of E") if shares else ("e_restored", "e_cut", "E, in nats")
    panels = [effect, ("follow_restored", "follow_cut", "share of contrasts that follow")]
    fig = figures.figure(7.2, 3.3)
    axes = fig.subplots(1, len(panels))
    for ax, (first, second, ylabel) in zip(axes, panels, strict=True):
        for column, words in ((first, RESTORE), (second, CUT)):
            for chosen in dict.fromkeys(table["chosen"]):
                rows = table[table["chosen"] == chosen].sort_values("size")
                values = rows[["size"]].assign(value=rows[column])
                for side in ("ci_low", "ci_high"):
                    values[side] = rows.get(f"{column}_{side}", np.nan)
                open_ = chosen != "ledger"
                look: dict[str, Any] = {"ls": (0, (3, 2)), "mfc": "white", "lw": 1.1} if open_ else {}
                look |= {"color": GRAFT_COLOURS[words], "marker": "o" if column == first else "s", "elinewidth": 1.1}
                name = words.replace("block", "blocks") + (f" ({chosen} set)" if open_ else "")
                ax.errorbar(values["size"], values["value"], yerr=errors(values), label=name, **look)
        ax.set_xlabel("number of blocks")
        ax.set_xticks(sorted(table["size"].unique()))
        ax.set_title(ylabel)
        if not ylabel.startswith("E"):
            ax.set_ylim(min(-0.03, ax.get_ylim()[0]), max(1.03, ax.get_ylim()[1]))
        ax.grid(True, axis="y")
    handles, names = axes[0].get_legend_handles_labels()
    fig.legend(handles, names, loc="outside lower center", ncols=2)
    return fig


def _pair(rows: pd.DataFrame, first: str, second: str) -> tuple[float, float]:
    return float(rows[first].iloc[0]), float(rows[second].iloc[0])


def _follow_pair(follow: Mapping[str, float] | None) -> tuple[float, float]:
    return (follow or {}).get("base", np.nan), (follow or {}).get("tuned", np.nan)
