"""The study `repair`: what reliance comes back when Units are given back, and what accuracy it costs.

1. The repairs and the controls of `severance.grafts.repair` at every alpha, and both minds as they are, read on the run's
   traces (`in distribution`) and on each further file of traces (named by its stem).
2. Draws of a random control are averaged within each trace; the least and the greatest draw stand beside the mean.
3. `change` is the difference to the tuned mind, paired over traces; `restored` is that difference as a share of what
   tuning took, (x - tuned) / (base - tuned), given for `E` and `swap_follow` where the loss is safely away from zero.
4. Alpha 1 of every series is the tuned mind, alpha 0 of the whole model the base: each is read once, and the base's rows
   stand for both.
5. Repairs and controls are of the tuned mind in the base's gauge (`severance.gauge.aligned`), which computes what the
   tuned mind computes; `weight_change` is what they differ from it by.

All intervals are 95 % and cover the choice of traces, not training seeds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from reasoninterp.errors import UserError
from reasoninterp.figures import INK, MIND_COLOURS, MORE_COLOURS, MUTED, NEUTRAL, figure, housed
from reasoninterp.models.context import Context, ContextSpec, Item
from reasoninterp.severance.effects import is_safe
from reasoninterp.severance.gauge.aligned import Asked, aligned, alignment_table, each_mind
from reasoninterp.severance.grafts.repair import (
    MEASURES,
    RANDOM,
    RELIANCE,
    SAME_NORM,
    SERIES,
    SET,
    WHOLE,
    candidates,
    estimate_of,
    recommend,
    scores,
    smallest_restoring,
    units_of,
)
from reasoninterp.stats import Estimate, paired, ratio
from reasoninterp.study import Batch, Cell, Row, Study

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HERE = "in distribution"
NOTHING = Estimate(np.nan, np.nan, np.nan, 0, "")


class Repair(Study):
    """Give the smallest restoring set its base weights back, and read reliance and accuracy, beside controls.

    Parameters:
        units: names of Units to give back (repeat the flag); none: the smallest restoring set is searched.
        level: `fine`, `circuit`, `head`, `block` or `layer`: of the Units, and of those that controls are drawn from.
        alphas: shares of tuning's change that are kept.
        draws: random sets of either kind.
        others: further files of traces (JSON Lines), out of distribution.
        from_mind: the mind with the path.
        to_mind: the mind that is repaired.
        align: bring the tuned mind into the base's gauge first.
    """

    units: tuple[str, ...] = ()
    level: str = "block"
    alphas: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75)
    draws: int = 3
    others: tuple[str, ...] = ()
    from_mind: str = "base"
    to_mind: str = "tuned"
    align: bool = True

    def cells(self, context: Context) -> Iterator[Cell]:
        """Every repaired mind × file × trace."""
        if not self.alphas or any(not 0 <= a <= 1 for a in self.alphas) or self.draws < 0:
            raise UserError("repair: give --alphas from 0 to 1, at least one, and --draws of 0 or more.")
        names = self.units or self._searched(context)
        every, chosen = units_of(context, self.level, names)
        alphas, ends = sorted(set(self.alphas)), (self.from_mind, self.to_mind)
        files: list[tuple[str, list[Item]]] = [(HERE, context.items)]
        files += [(Path(path).stem, beside(context, path).items) for path in self.others]
        if len({name for name, _ in files}) < len(files):
            raise UserError("--others: two files have one name; give each another.")
        onto = aligned(context, *ends, align=self.align).mind
        for one in candidates(context, chosen, every, ends, onto=onto, alphas=alphas, draws=self.draws):
            labels = {"series": one.series, "draw": one.draw, "alpha": one.alpha, "units": "+".join(one.units)}
            labels |= {"weight_change": one.weight_change}
            for file, items in files:
                for item in items:
                    key = f"{one.series}/{one.draw}/{one.alpha:g}/{'+'.join(one.units)}/{file}/{item.id}/"
                    about = {**labels, "traces": file, "trace": item.id}
                    yield Cell(key=key + item.digest[:8], labels=about, item=Asked(one.handle, item))

    def _searched(self, context: Context) -> tuple[str, ...]:
        """The smallest restoring set, searched once."""
        key = ("repair", self.level, self.from_mind, self.to_mind, self.align)
        if key not in context.memo:
            context.memo[key] = smallest_restoring(
                context, self.level, from_mind=self.from_mind, to_mind=self.to_mind, align=self.align
            ).units
        names: tuple[str, ...] = context.memo[key]
        return names

    def measure(self, context: Context, batch: Batch) -> Iterable[Row]:
        """One row per cell: E, and as 0 or 1 the follow rate and the three accuracies (`repair.scores`)."""
        paths = {Path(path).stem: path for path in self.others}
        for part in each_mind(context, batch, self.from_mind, self.to_mind, align=self.align):
            for file in dict.fromkeys(cell.labels["traces"] for cell in part):
                cells = [cell for cell in part if cell.labels["traces"] == file]
                other = context if file == HERE else beside(context, paths[file])
                with other.open(context.minds.inside):
                    for cell, found in zip(cells, scores(other, [c.item.item for c in cells]), strict=True):
                        yield cell.row(**found)

    def summarise(self, rows: pd.DataFrame, context: Context) -> dict[str, pd.DataFrame]:
        """`repair`: series × alpha × file × measure; `repair_choice`: the alpha to take in each series; `repair_alignment`."""
        table = repair_table(rows, self.from_mind, self.to_mind, seed=context.seed)
        choice = recommend(table[table["traces"] == HERE])
        notes = alignment_table(aligned(context, self.from_mind, self.to_mind, align=self.align))
        return {"repair": table, "repair_choice": choice, "repair_alignment": notes}

    @housed
    def draw(self, summary: dict[str, pd.DataFrame]) -> dict[str, Figure]:
        """Accuracy against reliance, a panel for each file of traces."""
        return {"repair": draw_repair({"": summary["repair"]})}


def beside(context: Context, path: str) -> Context:
    """The context of another file of traces with the same minds, read in the same way; kept with the context.

    The file says its own format in its first line.

    Raises:
        UserError: no such file, or traces that these minds cannot read.
    """
    key = ("repair", "beside", str(path))
    if key not in context.memo:
        contrast = str(context.extra.get("contrast", "propagated"))
        spec = ContextSpec(
            minds={},
            traces=str(path),
            prompt=str(context.extra.get("prompt", "raw")),
            limit=len(context.items),
            contrast=contrast,
            extractor=context.extractor,
            max_new_tokens=context.max_new_tokens,
            seed=context.seed,
            batch_size=context.rows,
        )
        context.memo[key] = spec.load(minds=context.minds)
    found: Context = context.memo[key]
    return found


def repair_table(rows: pd.DataFrame, from_mind: str, to_mind: str, *, seed: int = 0) -> pd.DataFrame:
    """One row per file, series, alpha and measure, with intervals over traces; see the module.

    `units` and `n_units` are empty for whole models; draws of a control are parted by bars, their sizes averaged.  The
    base as it is stands once more as the whole model at alpha 0.

    Args:
        rows: of the study: `series, draw, alpha, units, weight_change, traces, trace` and a column each measure.
        from_mind, to_mind: series of the two minds as they are.
        seed: of the resampling.
    """
    out = []
    for file, part in rows.groupby("traces", sort=False):
        ends = {name: part[part["series"] == name].set_index("trace") for name in (from_mind, to_mind)}
        base, tuned = ends[from_mind], ends[to_mind]
        safe = {m: _is_safe(base[m], tuned[m], seed) for m in RELIANCE}
        for (series, alpha), group in part.groupby(["series", "alpha"], sort=False):
            about = {
                "traces": file,
                "series": series,
                "alpha": alpha,
                "units": " | ".join(dict.fromkeys(group["units"])),
                "n_units": group["units"].map(lambda text: len(text.split("+")) if text else np.nan).mean(),
                "weight_change": group.groupby("draw")["weight_change"].first().mean(),
                "n_draws": group["draw"].nunique(),
            }
            draws = group.groupby("draw")[list(MEASURES)].mean()
            each = group.groupby("trace", sort=False)[list(MEASURES)].mean().loc[tuned.index]
            for m in MEASURES:
                value = estimate_of(each[m], seed)
                change = paired(each[m], tuned[m], seed=seed) if series != to_mind else NOTHING
                back = NOTHING
                if safe.get(m) and series != to_mind:
                    back = ratio(each[m] - tuned[m], base[m] - tuned[m], seed=seed)
                spread = {"draw_low": draws[m].min(), "draw_high": draws[m].max()}
                out.append(
                    about | {"measure": m, **value._asdict()} | _ends("change", change) | _ends("restored", back)
                )
                out[-1] |= spread
                if series == from_mind:
                    out.append(out[-1] | {"series": WHOLE})
    return pd.DataFrame(out)


def _is_safe(base: pd.Series, tuned: pd.Series, seed: int) -> bool:
    known = pd.DataFrame({"base": base, "tuned": tuned}).dropna()
    return len(known) > 1 and is_safe(known["base"], known["tuned"], seed=seed)


def _ends(name: str, e: Estimate) -> dict[str, float]:
    return {name: e.value, f"{name}_ci_low": e.ci_low, f"{name}_ci_high": e.ci_high}


@housed
def draw_repair(tables: Mapping[str, pd.DataFrame], titles: Mapping[str, str] | None = None) -> Figure:
    """Accuracy with the mind's own chain (up) against the follow rate of the swap (right).

    A row of panels for each table (`repair` of a run, by the name that is shown), a panel for each file of traces.  A line
    joins the alphas of a series, from the tuned mind (alpha 1) to its full repair (alpha 0, the largest mark); bars are
    95 % intervals over traces, whose number is in the title.
    """
    files = list(dict.fromkeys(file for table in tables.values() for file in table["traces"]))
    fig = figure(0.9 + 2.9 * len(files), 0.8 + 2.9 * len(tables))
    panels = fig.subplots(len(tables), len(files), sharex=True, sharey=True, squeeze=False)
    for row, (name, table) in enumerate(tables.items()):
        for column, file in enumerate(files):
            title = (titles or {}).get(file, file)
            _panel(panels[row, column], table[table["traces"] == file], f"{name}, {title}" if name else title)
        panels[row, 0].set_ylabel("accuracy with its own chain")
    for ax in panels[-1]:
        ax.set_xlabel("reliance: follow rate of the swap")
    last = panels[-1, -1]
    last.text(0.97, 0.04, "larger mark: more given back", transform=last.transAxes, ha="right", fontsize=7, color=MUTED)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8)
    return fig


def _panel(ax: Any, part: pd.DataFrame, title: str) -> None:
    """One table on one file of traces."""
    ends = [s for s in dict.fromkeys(part["series"]) if s not in SERIES]
    to_mind, from_mind = (part[part["series"] == s] for s in ends)  # in this order (`repair.candidates`)
    for series, colour in ((WHOLE, MUTED), (RANDOM, NEUTRAL), (SAME_NORM, MORE_COLOURS[2]), (SET, MORE_COLOURS[0])):
        rows = part[part["series"] == series]
        if len(rows):
            label = "smallest set" if series == SET else series
            _line(ax, pd.concat([rows, to_mind]), colour, label, thick=series == SET)
    for rows, name in ((to_mind, "tuned"), (from_mind, "base")):
        x, y = (rows[rows["measure"] == m]["value"].iloc[0] for m in ("swap_follow", "accuracy_own_chain"))
        ax.plot(x, y, ls="", marker="D", ms=7, color=MIND_COLOURS[name], zorder=5, label=rows["series"].iloc[0])
    counts = part.loc[part["measure"].isin(["swap_follow", "accuracy_own_chain"]), "n"]
    n = " to ".join(f"{k:.0f}" for k in dict.fromkeys((counts.min(), counts.max())))
    ax.set(title=f"{title} (n = {n})", xlim=(-0.05, 1.05), ylim=(-0.05, 1.05))
    ax.grid(True)


def _line(ax: Any, rows: pd.DataFrame, colour: str, label: str, *, thick: bool) -> None:
    """One series: a point an alpha with its intervals, larger where more is given back."""
    wide = rows.pivot_table(index="alpha", columns="measure", values=["value", "ci_low", "ci_high"]).sort_index()
    across, up = "swap_follow", "accuracy_own_chain"
    if ("value", across) not in wide:  # no swap could be made
        return
    x, y = wide["value"][across], wide["value"][up]
    ax.plot(x, y, color=colour, lw=2.2 if thick else 1.2, label=label, zorder=3 if thick else 2)
    ax.scatter(x, y, s=12 + 26 * (1 - wide.index.to_numpy(float)), color=colour, zorder=4, edgecolor=INK, linewidth=0.3)
    reach = {m: [wide["value"][m] - wide["ci_low"][m], wide["ci_high"][m] - wide["value"][m]] for m in (across, up)}
    ax.errorbar(x, y, xerr=reach[across], yerr=reach[up], ls="", color=colour, lw=0.7, alpha=0.6, zorder=1)
