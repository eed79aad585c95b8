"""The figure of the corpus benchmark: answers a second, seconds to build and memory over the size of the text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from reasoninterp.figures import MIND_COLOURS, NEUTRAL, figure, housed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OURS, THEIRS = MIND_COLOURS["base"], NEUTRAL
PANELS = {
    "counts of 3 tokens": (("count 3",), ("infini count 3",)),
    "20 continuations": (("continuations",), ("infini continuations, counts", "infini continuations, next")),
    "longest suffix of 32": (("suffix",), ("infini suffix",)),
    "co-occurrence within 1000": (("together, kept",), ("infini together, own limit", "infini together, STIM")),
}
COLD = "together, cold"


@housed
def draw(result: Mapping[str, Any]) -> Figure:
    """Queries in the upper row (the faster of infini-gram's ways), building below.

    Args:
        result: what the benchmark ends with.
    """
    sizes = [int(name) for name in result["per_second"] if name.isdigit()]
    made = figure(10.4, 5.2)
    grid = made.add_gridspec(2, 12)
    for k, (title, (ours, theirs)) in enumerate(PANELS.items()):
        ax = made.add_subplot(grid[0, 3 * k : 3 * k + 3])
        by_size = [result["per_second"][str(n)] for n in sizes]
        _line(ax, sizes, [max(row[name] for name in ours) for row in by_size], OURS, "reasoninterp")
        if all(name in row for row in by_size for name in theirs):
            _line(ax, sizes, [max(row[name] for name in theirs) for row in by_size], THEIRS, "infini-gram")
        if ours == ("together, kept",):
            cold = [row[COLD] for row in by_size]
            ax.plot(sizes, cold, "o--", color=OURS, mfc="white", ms=4, lw=1.1, label="reasoninterp, no places kept")
        _axes(ax, title, "answers a second" if k == 0 else "", sizes)
    for k, (title, of, other, scale) in enumerate(
        (
            ("seconds to build", "build_seconds", "build_seconds", 1.0),
            ("MiB of memory while building", "peak_bytes", "peak_bytes", 2**20),
        )
    ):
        ax = made.add_subplot(grid[1, 3 * k : 3 * k + 3])
        _line(ax, sizes, [result[of][str(n)] / scale for n in sizes], OURS, "reasoninterp")
        if all(result["infini"][str(n)] for n in sizes):
            _line(ax, sizes, [result["infini"][str(n)][other] / scale for n in sizes], THEIRS, "infini-gram")
        _axes(ax, title, "", sizes)
    ax = made.add_subplot(grid[1, 6:12])
    if all(result["infini"][str(n)] for n in sizes):
        found = [result["infini"][str(n)]["together"] for n in sizes]
        ax.bar(range(len(sizes)), [100 * f["wrong"] for f in found], width=0.5, color=THEIRS)
        for at, f in enumerate(found):
            ax.text(at, 100 * f["wrong"] + 2, f"n = {f['n']}", ha="center", fontsize=7.5)
    ax.set_xticks(range(len(sizes)), [f"{n // 1_000_000} M" for n in sizes])
    ax.set_ylim(0, 112)
    ax.set_title("infini-gram's co-occurrences that are wrong, per cent (ours: none)")
    ax.set_xlabel("tokens")
    shown = dict(zip(*reversed(made.axes[3].get_legend_handles_labels()), strict=True))
    made.legend(shown.values(), shown.keys(), loc="outside upper right", ncols=len(shown))
    return made


def _line(ax: Axes, sizes: list[int], values: list[float], colour: str, label: str) -> None:
    ax.plot(sizes, values, "o-", color=colour, ms=4, lw=1.4, label=label)


def _axes(ax: Axes, title: str, ylabel: str, sizes: list[int]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xticks(sizes, [f"{n // 1_000_000} M" for n in sizes])
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}" if v >= 1 else f"{v:.1f}"))
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_minor_formatter(NullFormatter())
    ax.tick_params(which="minor", length=0)
    ax.set_title(title)
    ax.set_ylabel(ylabel)
    ax.set_xlabel("tokens")
    ax.grid(True, axis="y")
