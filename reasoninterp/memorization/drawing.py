"""Figures of the study `memorization`: shares of sources, what finds wrong tokens, and counts against interventions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from reasoninterp.figures import (
    MUTED,
    bars,
    colours,
    errors,
    figure,
    heatmap,
    housed,
    label_rows,
    mind_order,
    short,
)
from reasoninterp.memorization.finding import RANDOM, SCORES
from reasoninterp.memorization.names import ANSWER, CALLED, NAMES, REMOVED, STEP, TAKEN_OUT
from reasoninterp.memorization.tables import ALL, RIGHT, WRONG

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_all(tables: Mapping[str, pd.DataFrame]) -> dict[str, Figure]:
    """All figures by name, of those tables that are there."""
    out = {"memorization": draw_sources(tables["memorization"])}
    if "memorization_finding" in tables:
        out["memorization-finding"] = draw_finding(tables["memorization_finding"])
    if "memorization_causes" in tables:
        out["memorization-causes"] = draw_causes(tables["memorization_causes"])
    return out


def kinds_of(table: pd.DataFrame) -> list[tuple[str, str, str]]:
    """(title, part, judgement) of each row of panels: right and wrong steps apart where both were judged, and answers."""
    steps = table[table["part"] == STEP]
    judged = {RIGHT, WRONG} <= set(steps["wrong"])
    out = [(f"steps, {w} tokens", STEP, w) for w in (RIGHT, WRONG)] if judged else [("steps", STEP, ALL)]
    return [kind for kind in [*out, ("answers", ANSWER, ALL)] if kind[1] in set(table["part"])]


@housed
def draw_sources(table: pd.DataFrame) -> Figure:
    """The share of tokens of which each source is the dominant one, minds beside each other; a diamond is STIM's rule.

    A column of panels a distribution, a row a kind of token.
    """
    kinds, shifts = kinds_of(table), list(dict.fromkeys(table["shift"]))
    made = figure(1.1 + 2.5 * len(shifts), 0.6 + 1.75 * len(kinds))
    axes = made.subplots(len(kinds), len(shifts), squeeze=False, sharex=True, sharey=True)
    minds = mind_order(table["mind"])
    palette = colours(minds)
    thick = 0.72 / len(minds)
    for row, (title, part, judgement) in zip(axes, kinds, strict=True):
        for ax, shift in zip(row, shifts, strict=True):
            here = table[(table["part"] == part) & (table["wrong"] == judgement) & (table["shift"] == shift)]
            named = here.assign(label=here["source"].map(NAMES))
            name = f"{title}\n{short(shift, 30)}" if shift else title
            if here.empty:
                ax.set_title(f"{name}: there are none")
                continue
            bars(named[named["measure"] == "dominant"], "label", hue="mind", ax=ax, title=name, xlabel="", legend=False)
            for k, mind in enumerate(minds):
                stim = named[(named["measure"] == "stim") & (named["mind"] == mind)]
                at = [CALLED.index(source) + (k - (len(minds) - 1) / 2) * thick for source in stim["source"]]
                ax.plot(stim["value"], at, "D", ms=4, mfc="white", mec=palette[mind], ls="none")
            label_rows(ax, [NAMES[source] for source in CALLED])
            ax.set_xlim(-0.02, 1.02)
    made.supxlabel("share of tokens of which this is the dominant source (diamonds: by STIM's rule)", fontsize=9)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    made.legend(handles, labels, loc="outside upper right", ncols=len(labels))
    return made


@housed
def draw_finding(table: pd.DataFrame) -> Figure:
    """Precision at k of each score for wrong tokens, a panel a mind and distribution; chance is the grey line."""
    some = table[table["measure"] == "precision"]
    groups = list(some.groupby(["mind", "shift"], sort=False))
    made = figure(1.0 + 2.4 * len(groups), 2.7)
    axes = np.atleast_1d(made.subplots(1, len(groups), sharey=True))
    palette = {**dict(zip(SCORES, ("#6a51a3", "#1b9e77", "#b38600"), strict=False)), RANDOM: MUTED}
    for ax, ((mind, shift), here) in zip(axes, groups, strict=True):
        for i, name in enumerate(SCORES):
            rows = here[here["score"] == name].sort_values("k")
            look = {"ls": (0, (3, 2)), "mfc": "white"} if name == RANDOM else {}
            at = rows["k"] + (i - 1.5) * 0.05
            ax.errorbar(
                at, rows["value"], yerr=errors(rows), marker="o", color=palette[name], elinewidth=1, label=name, **look
            )
        n = int(here["n"].max())
        ax.set_title(f"{short(mind, 16)}{', ' + short(shift, 22) if shift else ''} (n = {n})")
        ax.set_xlabel("k")
        ax.set_xticks(sorted(here["k"].unique()))
        ax.grid(True, axis="y")
        ax.set_ylim(0, 1.02)
    axes[0].set_ylabel("precision at k for wrong tokens")
    handles, labels = axes[0].get_legend_handles_labels()
    made.legend(handles, labels, loc="outside upper right", ncols=len(labels))
    return made


@housed
def draw_causes(table: pd.DataFrame) -> Figure:
    """What taking a part of the context out does to tokens of each kind: called by counts × taken out, one map a mind."""
    some = table[(table["measure"] == "kl") & (table["part"] == STEP)]
    if some.empty:
        some = table[table["measure"] == "kl"]
    kinds = list(dict.fromkeys(some["called"]))
    order = {name: i for i, name in enumerate([*CALLED, *[k for k in kinds if k not in CALLED]])}
    some = some.assign(
        taken=some["removed"].map(TAKEN_OUT),
        taken_index=some["removed"].map(list(REMOVED).index),
        kind=["+".join(NAMES[s] for s in k.split("+")) for k in some["called"]],
        kind_index=some["called"].map(order),
    )
    sizes = some.groupby("kind")["n_tokens"].max()
    some["kind"] = [f"{kind} ({sizes[kind]})" for kind in some["kind"]]
    return heatmap(
        some.drop(columns=["n"]),
        "taken",
        "kind",
        xlabel="taken out of the context",
        ylabel="called by the counts (tokens)",
        unit="KL in bits",
    )
