"""Behaviour and maps of a comparison, each figure a plain function of the run's tables.

`accuracy_follow`, `step_curves`, `residual_maps`, `head_maps`; `weight_plots` has the ledger and the grafts.  They live
above `reasoninterp.figures` (the house style and the general plots) because they know the tables of this one study.
Everything drawn is a number of the table it was given: nothing is estimated here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from reasoninterp import figures
from reasoninterp.figures import FAINT, INK, MUTED, WHITE, errors, housed, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def pick(table: pd.DataFrame, **labels: Any) -> pd.Series | None:
    """The first row with these labels and a finite value, or None."""
    for column, wanted in labels.items():
        if column not in table:
            return None
        table = table[table[column] == wanted]
    table = table[table["value"].notna()]
    return None if table.empty else table.iloc[0]


@housed
def accuracy_follow(behaviour: pd.DataFrame, siblings: Mapping[str, pd.DataFrame] | None = None) -> Figure:
    """Accuracy with the own chain against the follow rate under whole-chain swap, intervals both ways.

    An arrow goes from base to tuned.  The tuned minds of other pairs stand beside them, lighter; dashed lines are
    what guessing gives.
    """
    from matplotlib.ticker import PercentFormatter

    fig = figures.figure(6.0, 4.6)
    ax = fig.add_subplot()
    minds = figures.mind_order(behaviour["mind"])
    palette = figures.colours(minds)
    seen: list[tuple[float, float, str, str, bool]] = []
    for name, table in (siblings or {}).items():
        last = figures.mind_order(table["mind"])[-1]
        at = _point(ax, table, last, FAINT, 5.0, filled=False)
        if at:
            seen.append((*at, short(name, 22), MUTED, False))
    places = {mind: _point(ax, behaviour, mind, palette[mind], 8.5) for mind in minds}
    seen = [(*at, short(mind, 22), palette[mind], True) for mind, at in places.items() if at] + seen
    ends = [places[m] for m in (minds[0], minds[-1])]
    if len(minds) > 1 and ends[0] and ends[1] and np.hypot(*np.subtract(ends[0], ends[1])) > 0.08:
        look = {"arrowstyle": "-|>,head_width=0.32,head_length=0.6", "color": INK, "lw": 1.3}
        ax.annotate("", ends[1], ends[0], arrowprops={**look, "shrinkA": 9, "shrinkB": 9}, zorder=2)
    chance = pick(behaviour, test="chance")
    if chance is not None:
        ax.axhline(chance["value"], color=FAINT, ls=(0, (4, 3)), lw=1, zorder=0)
        ax.axvline(chance["value"], color=FAINT, ls=(0, (4, 3)), lw=1, zorder=0)
        ax.text(
            0.5,
            chance["value"] - 0.012,
            f"chance {100 * chance['value']:.0f} %",
            color=MUTED,
            fontsize=7.5,
            ha="center",
            va="top",
        )
    for x, text, side in ((0.015, "right without its steps", "left"), (0.985, "right from its steps", "right")):
        ax.text(x, 1.13, text, color=MUTED, fontsize=8.5, style="italic", ha=side, va="top", bbox=WHITE)
    ax.set(xlim=(-0.04, 1.04), ylim=(-0.04, 1.15), xticks=np.linspace(0, 1, 6), yticks=np.linspace(0, 1, 6))
    ax.set_xlabel("follow rate: share of swapped chains whose answer the mind gives")
    ax.set_ylabel("accuracy with its own chain")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(PercentFormatter(1))
    ax.grid(True)
    if not seen:
        ax.text(0.5, 0.5, "accuracy or follow rate not measured", ha="center", color=MUTED)
    _place_labels(ax, seen)
    return fig


def _point(
    ax: Axes, table: pd.DataFrame, mind: str, colour: str, size: float, filled: bool = True
) -> tuple[float, float] | None:
    x = pick(table, mind=mind, test="swap_follow")
    y = pick(table, mind=mind, test="accuracy_own_chain")
    if x is None or y is None:
        return None
    spans = [errors(row.to_frame().T.infer_objects()) for row in (x, y)]
    ax.errorbar(
        x["value"],
        y["value"],
        xerr=spans[0],
        yerr=spans[1],
        fmt="o",
        ms=size,
        color=colour,
        mfc=colour if filled else "white",
        mec="white" if filled else colour,
        elinewidth=1.6 if filled else 0.9,
        zorder=4 if filled else 3,
    )
    return float(x["value"]), float(y["value"])


def _place_labels(ax: Axes, seen: Sequence[tuple[float, float, str, str, bool]]) -> None:
    """Put each label where it covers no point and no other label (greedily, nearest place first)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.patheffects import withStroke
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

    fig = ax.get_figure(root=True)
    assert fig is not None
    canvas = FigureCanvasAgg(fig)
    canvas.draw()
    canvas.draw()  # the layout settles in the second pass only; then it must not move under the labels
    fig.set_layout_engine("none")
    dpi = fig.dpi / 72
    points = [ax.transData.transform((x, y)) for x, y, *_ in seen]
    taken = [Bbox.from_bounds(px - 6 * dpi, py - 6 * dpi, 12 * dpi, 12 * dpi) for px, py in points]
    frame = ax.get_window_extent()
    for (x, y, text, colour, strong), _ in zip(seen, points, strict=True):
        best: tuple[float, Any] | None = None
        for far in (11, 20, 32, 46, 60, 76):
            for dx, dy in ((1, 0.9), (-1, 0.9), (1, -0.9), (-1, -0.9), (0, 1.2), (0, -1.2), (1.3, 0), (-1.3, 0)):
                label = ax.annotate(
                    text,
                    (x, y),
                    xytext=(dx * far * 0.8, dy * far * 0.8),
                    textcoords="offset points",
                    ha="left" if dx > 0 else "right" if dx < 0 else "center",
                    va="bottom" if dy > 0 else "top" if dy < 0 else "center",
                    color=colour,
                    fontsize=10 if strong else 8,
                    weight="bold" if strong else "normal",
                    arrowprops={"arrowstyle": "-", "color": FAINT, "lw": 0.6, "shrinkA": 0, "shrinkB": 4}
                    if far > 11
                    else None,
                    zorder=5,
                    path_effects=[withStroke(linewidth=2.5, foreground="white")],
                )
                label.update_positions(canvas.get_renderer())
                box = Text.get_window_extent(label, canvas.get_renderer())  # the words alone, not their line
                inside = box.x0 > frame.x0 and box.x1 < frame.x1 and box.y0 > frame.y0 and box.y1 < frame.y1 - 16 * dpi
                cost = sum(_overlap(box, other) for other in taken) + (0 if inside else 1e6)
                if best is None or cost < best[0]:
                    if best is not None:
                        best[1].remove()
                    best = (cost, label)
                else:
                    label.remove()
            if best is not None and best[0] == 0:
                break
        if best is not None:
            taken.append(Text.get_window_extent(best[1], canvas.get_renderer()))


def _overlap(a: Any, b: Any) -> float:
    wide = min(a.x1, b.x1) - max(a.x0, b.x0)
    high = min(a.y1, b.y1) - max(a.y0, b.y0)
    return wide * high if wide > 0 and high > 0 else 0.0


STEP_PANELS = (
    ("forced", "One step changed, the rest held", "changed step"),
    ("regenerated", "One step changed, the rest rewritten", "changed step"),
    ("truncated", "Only the first steps kept", "steps kept"),
)


def step_panels(behaviour: pd.DataFrame) -> list[str]:
    """Which of the three per-step tests the table has."""
    tests = set(behaviour.loc[behaviour["value"].notna() & behaviour["step"].notna(), "test"])
    return [name for name, *_ in STEP_PANELS if {f"{name}_same", f"{name}_follow"} & tests]


@housed
def step_curves(behaviour: pd.DataFrame) -> Figure:
    """Share of answers that stay the same (solid) or follow the change (dashed), over the step that was changed."""
    from matplotlib.lines import Line2D
    from matplotlib.ticker import PercentFormatter

    have = [p for p in STEP_PANELS if p[0] in step_panels(behaviour)]
    minds = figures.mind_order(behaviour["mind"])
    fig = figures.figure(0.6 + 3.2 * max(1, len(have)), 3.1)
    axes = fig.subplots(1, max(1, len(have)), sharey=True, squeeze=False)[0]
    dashes = False
    for ax, (name, title, xlabel) in zip(axes, have, strict=False):
        for kind in ("same", "follow"):
            rows = behaviour[(behaviour["test"] == f"{name}_{kind}") & behaviour["step"].notna()].copy()
            if rows["value"].notna().any():
                dashes |= kind == "follow"
                rows["step"] = rows["step"] + (name != "truncated")
                figures.curve(rows, "step", ax=ax, dashed=kind == "follow", legend=False, xlabel=xlabel, ylabel="")
        ax.set_title(title)
        steps = sorted({int(t) for line in ax.lines for t in np.round(np.atleast_1d(line.get_xdata()))})
        ax.set_xticks(steps[:: 1 + len(steps) // 12])
        ax.set_ylim(-0.03, 1.03)
        ax.yaxis.set_major_formatter(PercentFormatter(1))
    axes[0].set_ylabel("share of traces")
    palette = figures.colours(minds)
    handles = [Line2D([], [], color=palette[m], marker="o", label=short(m)) for m in minds]
    handles.append(Line2D([], [], color=MUTED, label="answer stays the same"))
    if dashes:
        handles.append(
            Line2D([], [], color=MUTED, ls=(0, (3, 2)), marker="o", mfc="white", label="answer follows the change")
        )
    fig.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return fig


@housed
def residual_maps(residual: pd.DataFrame, direction: str) -> Figure:
    """Layer × step maps of one direction, one panel a mind, one colour scale centred on zero."""
    rows = residual[residual["direction"] == direction]
    return figures.heatmap(
        rows,
        "column",
        "layer",
        title=lambda m: f"{short(m)}, {direction}",
        xlabel="",
        ylabel="layer",
        unit="effect, in nats",
    )


@housed
def head_maps(heads: pd.DataFrame, direction: str) -> Figure:
    """Layer × head maps (output z at the answer position) of one direction, one panel a mind, one colour scale."""
    rows = heads[heads["direction"] == direction]
    return figures.heatmap(
        rows, "head", "layer", title=lambda m: f"{short(m)}, {direction}", ylabel="layer", unit="effect, in nats"
    )


__all__ = ["accuracy_follow", "head_maps", "pick", "residual_maps", "step_curves", "step_panels"]
