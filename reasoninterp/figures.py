"""The house style of plots, and plain functions from a tidy table to a figure.

* `style()` is the style as a context manager; every function here draws inside it.
* `figure()` makes a `matplotlib.figure.Figure` without pyplot: no window, no global state, and it shows itself when
  it is the last line of a notebook's cell.
* `curve`, `bars` and `heatmap` take a table with one row a number (`value`, `ci_low`, `ci_high`, and columns
  that say what it is) and return a figure; given `ax=`, they draw there and return its figure.

A mind has one colour everywhere (`colours`): base is blue, tuned vermilion (Okabe and Ito's palette, which
colour-blind readers can tell apart).  A signed quantity is green above zero and purple below, and its colour scale is
always centred on zero.  Intervals are drawn wherever the table has finite ones.

matplotlib is imported when the first figure is made, not when this module is.
"""

from __future__ import annotations

import functools
import io
import math
import textwrap
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import numpy as np
import pandas as pd
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

P = ParamSpec("P")
R = TypeVar("R")

INK, MUTED, FAINT, HAIR = "#1d2430", "#5d6673", "#9aa2ad", "#e7eaee"
LOSS, GAIN, NEUTRAL = "#8e2f7f", "#2d8a57", "#8b95a1"
WHITE = {"facecolor": "white", "edgecolor": "none", "pad": 1}
MIND_COLOURS = {"base": "#0f6cab", "tuned": "#d4520d"}
MORE_COLOURS = ("#1b9e77", "#b5579a", "#b38600", "#3aa3d9", "#6a51a3", "#4d4d4d")
DIVERGING = ("#4d1049", "#8e2f7f", "#d3a3cb", "#f7f6f7", "#a9d8b8", "#2d8a57", "#0b4527")
PRINTED_CELLS = 80
FONTS = ("Helvetica Neue", "Helvetica", "Arial", "Liberation Sans")


@functools.cache
def _families() -> list[str]:
    """The first font of the list that this machine has, and matplotlib's own for the signs that it lacks."""
    from matplotlib import font_manager

    have = set(font_manager.fontManager.get_font_names())
    return [*[f for f in FONTS if f in have][:1], "DejaVu Sans"]


def rc() -> dict[str, Any]:
    """The style as matplotlib's settings."""
    return {
        "font.family": _families(),
        "font.size": 9,
        "text.color": INK,
        "axes.titlesize": 9.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.titlecolor": INK,
        "axes.titlepad": 8,
        "axes.labelsize": 9,
        "axes.labelcolor": INK,
        "axes.edgecolor": FAINT,
        "axes.linewidth": 0.8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": False,
        "axes.axisbelow": True,
        "grid.color": HAIR,
        "grid.linewidth": 0.8,
        "xtick.color": FAINT,
        "ytick.color": FAINT,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "xtick.labelsize": 8.5,
        "ytick.labelsize": 8.5,
        "xtick.major.size": 3,
        "ytick.major.size": 3,
        "legend.frameon": False,
        "legend.fontsize": 8.5,
        "lines.linewidth": 1.8,
        "lines.markersize": 5,
        "errorbar.capsize": 0,
        "hatch.linewidth": 0.8,
        "hatch.color": MUTED,
        "figure.dpi": 110,
        "figure.facecolor": "white",
        "savefig.facecolor": "white",
        "svg.fonttype": "path",
        "svg.hashsalt": "reasoninterp",
    }


def style() -> AbstractContextManager[None]:
    """The house style for the length of a `with` block."""
    import matplotlib

    return matplotlib.rc_context(rc())  # type: ignore[arg-type]


def housed(draw: Callable[P, R]) -> Callable[P, R]:
    """Make a function that draws do so in the house style."""

    @functools.wraps(draw)
    def inside(*args: P.args, **kwargs: P.kwargs) -> R:
        with style():
            return draw(*args, **kwargs)

    return inside


@functools.cache
def _figure_class() -> type[Figure]:
    from matplotlib.figure import Figure

    class HouseFigure(Figure):
        """A figure that shows itself in a notebook without pyplot."""

        def _repr_png_(self) -> bytes:
            out = io.BytesIO()
            self.savefig(out, format="png", dpi=144, bbox_inches="tight")
            return out.getvalue()

    return HouseFigure


@housed
def figure(width: float = 6.4, height: float = 3.8) -> Figure:
    """An empty figure in the house style; sizes in inches."""
    return _figure_class()(figsize=(width, height), layout="constrained")


def colours(minds: Iterable[str]) -> dict[str, str]:
    """One colour a mind: `base` and `tuned` have their own, others take theirs in order of appearance."""
    out: dict[str, str] = {}
    for mind in minds:
        if mind not in out:
            extra = sum(m not in MIND_COLOURS for m in out)
            out[mind] = MIND_COLOURS.get(mind, MORE_COLOURS[extra % len(MORE_COLOURS)])
    return out


def mind_order(minds: Iterable[Any]) -> list[str]:
    """Base first, tuned second, others as they come."""
    first = list(MIND_COLOURS)
    return sorted(dict.fromkeys(map(str, minds)), key=lambda m: first.index(m) if m in first else len(first))


def number(value: Any, digits: int = 3) -> str:
    """A number as a reader wants it: about `digits` significant digits, a true minus sign, a dash for NaN."""
    if value is None or not math.isfinite(float(value)):
        return "–"
    v = float(value)
    if v == 0:
        return "0"
    places = digits - 1 - math.floor(math.log10(abs(v)))
    text = f"{v:.1e}" if places > 5 else f"{v:,.{max(0, places)}f}"
    return text.replace("-", "−")


def short(text: Any, width: int = 26) -> str:
    """Text cut to a width, in the middle, so that long names stay apart by both ends."""
    s = str(text)
    left = (width - 1) // 2
    return s if len(s) <= width else f"{s[: width - 1 - left]}…{s[-left:]}"


def errors(table: pd.DataFrame, value: str = "value") -> NDArray | None:
    """Lengths below and above each value, `[2, row]`, for matplotlib; None where the table has no finite interval."""
    if not {"ci_low", "ci_high"} <= set(table.columns):
        return None
    v, low, high = (table[c].to_numpy(float) for c in (value, "ci_low", "ci_high"))
    span = np.stack([v - low, high - v])
    return np.where(np.isfinite(span), np.clip(span, 0, None), 0) if np.isfinite(span).any() else None


@functools.cache
def diverging() -> Any:
    """The colour map of signed quantities."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("loss_gain", DIVERGING)


def _start(ax: Axes | None, width: float, height: float) -> Axes:
    return figure(width, height).add_subplot() if ax is None else ax


def _finish(ax: Axes, title: str, xlabel: str, ylabel: str, grid: str) -> Figure:
    ax.set_title(title, wrap=True) if title else None
    ax.set_xlabel(xlabel)
    ax.set_ylabel(ylabel)
    ax.grid(True, axis=grid) if grid else None  # type: ignore[arg-type]
    return ax.get_figure(root=True)  # type: ignore[return-value]


def _groups(table: pd.DataFrame, hue: str | None) -> list[tuple[str, pd.DataFrame]]:
    if hue is None or hue not in table:
        return [("", table)]
    return [(name, table[table[hue].astype(str) == name]) for name in mind_order(table[hue])]


@housed
def curve(
    table: pd.DataFrame,
    x: str,
    y: str = "value",
    hue: str | None = "mind",
    *,
    ax: Axes | None = None,
    title: str = "",
    xlabel: str | None = None,
    ylabel: str | None = None,
    ylim: tuple[float, float] | None = None,
    dashed: bool = False,
    legend: bool = True,
) -> Figure:
    """Lines of `y` over `x`, one a mind, each point with its interval; `dashed` is for a second quantity."""
    ax = _start(ax, 5.2, 3.4)
    groups = _groups(table, hue)
    palette = colours(name for name, _ in groups)
    for k, (name, rows) in enumerate(groups):
        rows = rows.sort_values(x)
        # Moved sideways a little, so that the intervals of two minds do not hide each other.
        at = rows[x].to_numpy(float) + (k - (len(groups) - 1) / 2) * 0.06
        look: dict[str, Any] = {"ls": (0, (3, 2)), "mfc": "white"} if dashed else {}
        look |= {"color": palette[name] if name else INK, "marker": "o", "elinewidth": 1.1}
        ax.errorbar(at, rows[y], yerr=errors(rows, y), label=short(name), **look)
    if ylim:
        ax.set_ylim(*ylim)
    if legend and any(name for name, _ in groups):
        ax.legend()
    return _finish(ax, title, x if xlabel is None else xlabel, y if ylabel is None else ylabel, "y")


@housed
def bars(
    table: pd.DataFrame,
    label: str,
    value: str = "value",
    hue: str | None = None,
    *,
    ax: Axes | None = None,
    title: str = "",
    xlabel: str | None = None,
    signed: bool = False,
    colour: str | Sequence[str] | None = None,
    legend: bool = True,
) -> Figure:
    """Horizontal bars with intervals, from top to bottom in the table's order; `hue` puts several beside each other.

    `signed` colours a bar by its sign (green above zero, purple below).
    """
    names = list(dict.fromkeys(table[label].astype(str)))
    ax = _start(ax, 5.6, 1.0 + 0.3 * len(names))
    groups = _groups(table, hue)
    palette = colours(name for name, _ in groups)
    thick = 0.72 / len(groups)
    for k, (name, rows) in enumerate(groups):
        at = [names.index(str(n)) + (k - (len(groups) - 1) / 2) * thick for n in rows[label]]
        fill: Any = colour or (palette[name] if name else NEUTRAL)
        if signed:
            fill = [GAIN if v > 0 else LOSS for v in rows[value]]
        ax.barh(at, rows[value], height=thick, color=fill, label=short(name) if name else None)
        span = errors(rows, value)
        if span is not None:
            ax.errorbar(rows[value], at, xerr=span, fmt="none", ecolor=INK, elinewidth=1.1)
    ax.axvline(0, color=MUTED, lw=0.9)
    label_rows(ax, names)
    if legend and any(name for name, _ in groups):
        ax.legend()
    return _finish(ax, title, value if xlabel is None else xlabel, "", "x")


def label_rows(ax: Axes, names: Sequence[str]) -> None:
    """One named row a bar, from top to bottom."""
    ax.set_yticks(range(len(names)), [short(n, 30) for n in names])
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)


@housed
def heatmap(
    table: pd.DataFrame,
    x: str,
    y: str,
    value: str = "value",
    panel: str | None = "mind",
    *,
    limit: float | None = None,
    title: Callable[[str], str] = short,
    xlabel: str | None = None,
    ylabel: str | None = None,
    unit: str = "",
    width: float | None = None,
) -> Figure:
    """Maps side by side, one a mind, on one colour scale that is centred on zero.

    Args:
        table: one row a cell and panel; cells without a row stay grey.
        x, y: the columns that place a cell.  Places are in the order of `<x>_index` if the table has such a column,
            sorted if they are numbers, else as they come; `y` runs from the bottom up.
        limit: the end of the colour scale; by default the largest finite size of any panel.
        unit: text beside the colour scale.
        width: of the figure, in inches.

    In maps of up to 80 cells each number is printed, in grey and italics where its interval holds 0.

    Raises:
        ValueError: two rows fall into one cell.
    """
    panels = _groups(table, panel)
    across, up = _places(table, x), _places(table, y)
    size = np.abs(table[value].to_numpy(float))
    size = size[np.isfinite(size)]
    limit = limit or (float(size.max()) if size.size and size.max() > 0 else 1.0)
    printed = len(across) * len(up) <= PRINTED_CELLS
    cell = 0.56 if printed else 0.3
    width = width or min(11.0, max(3.0, 0.6 + len(across) * cell) * len(panels) + 1.2)
    fig = figure(width, 1.5 + min(4.6, max(1.0, (0.34 if printed else 0.2) * len(up))))
    axes = fig.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    image = None
    for ax, (name, rows) in zip(axes, panels, strict=True):
        grid, low, high = (
            rows.pivot(index=y, columns=x, values=c).reindex(index=up, columns=across).to_numpy(float)
            if c in rows
            else np.full((len(up), len(across)), np.nan)
            for c in (value, "ci_low", "ci_high")
        )
        image = ax.imshow(grid, origin="lower", aspect="auto", cmap=diverging(), vmin=-limit, vmax=limit)
        ax.set_facecolor("#dfe3e8")  # what was not measured
        _frame_map(ax, _with_counts(table, x, across), up, width / len(panels))
        if printed:
            _print_cells(ax, grid, (low <= 0) & (high >= 0), limit)
        _finish(ax, title(name), x if xlabel is None else xlabel, "", "")
    axes[0].set_ylabel(y if ylabel is None else ylabel)
    bar = fig.colorbar(image, ax=list(axes), fraction=0.04, pad=0.015, aspect=22)  # type: ignore[arg-type]
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.set_label(unit, fontsize=8.5)
    return fig


def _places(table: pd.DataFrame, column: str) -> list[Any]:
    index = f"{column}_index"
    if index in table:
        return list(dict.fromkeys(table.sort_values(index, kind="stable")[column]))
    found = list(dict.fromkeys(table[column]))
    return sorted(found) if pd.api.types.is_numeric_dtype(table[column]) else found


def _with_counts(table: pd.DataFrame, x: str, across: Sequence[Any]) -> list[str]:
    """Labels of the columns, with n beneath where columns stand on different numbers of traces."""
    counts = table.groupby(x)["n"].max() if "n" in table else pd.Series(dtype=float)
    varies = counts.nunique() > 1
    return [short(c, 18) + (f" (n={int(counts[c])})" if varies else "") for c in across]


def _frame_map(ax: Axes, across: Sequence[Any], up: Sequence[Any], width: float) -> None:
    """Ticks and white gaps; every n-th layer where there are many."""
    texts = [str(c) for c in across]
    room = 13.5 * (width - 0.7) / len(across)  # letters that fit beneath a cell
    longest = max(len(word) for text in texts for word in text.split() or [""])
    tight = longest > room and longest > 2
    texts = texts if tight else [textwrap.fill(text, max(longest, int(room))) for text in texts]
    sparse = 1 if tight else 1 + (len(across) - 1) // max(8, int(12 * width / (2 + longest)))
    ticks = range(0, len(across), sparse)
    ax.set_xticks(ticks, texts[::sparse], rotation=40 if tight else 0, ha="right" if tight else "center")
    if tight:
        for tick in ax.get_xticklabels():
            tick.set_rotation_mode("anchor")
    every = 1 + (len(up) - 1) // 16
    ax.set_yticks(range(0, len(up), every), [short(v, 18) for v in up][::every])
    ax.tick_params(length=0)
    for k in range(1, len(across)):
        ax.axvline(k - 0.5, color="white", lw=1.2)
    for k in range(1, len(up)):
        ax.axhline(k - 0.5, color="white", lw=1.2 if len(up) <= 16 else 0.5)
    for spine in ax.spines.values():
        spine.set_visible(False)


def _print_cells(ax: Axes, grid: NDArray, quiet: NDArray, limit: float) -> None:
    for (i, j), v in np.ndenumerate(grid):
        if math.isfinite(v):
            ink = "white" if abs(v) > 0.62 * limit else MUTED if quiet[i, j] else INK
            text = number(v, 2 if abs(v) < 10 else 3) if abs(v) >= 0.005 * limit else "0"
            slant = "italic" if quiet[i, j] else "normal"
            ax.text(j, i, text, ha="center", va="center", fontsize=7.5, color=ink, style=slant)
