"""The path: does the ledger depend on the straight line between the two minds?

Entries of integrated gradients sum to the loss along *any* path from base to tuned, but how they split depends on it.

1. Run backwards, the straight path gives minus the same entries, node for node: a law (and a test), no information.
2. Another path is: one Unit after the other, from its base to its tuned weights, the rest held.  On such a leg only
   that Unit's weights move, so its entry is a difference of two effects, `E(… + c) − E(…)`, exact without a gradient:
   the grafts of a growing set.  `forwards` moves Units in the order of the forward pass, `backwards` in the opposite
   order.  They sum to the same loss as the straight ledger.
3. Agreement: rank correlation (Spearman) of each order with the straight ledger and with each other, the largest change
   of an entry relative to the loss, and whether the leading Unit is the same.
4. All paths end in the tuned mind as aligned with the base (`severance.ledger.pair`).  A run's ledger that ends in
   another mind (one was aligned, the other not) is no split of the same path: `straight` is then left out, with a note.

Where Units are redundant, the one that is moved last takes the blame; where they act only together, the first to
break the path does.  The orders then disagree with each other, and the straight ledger, which moves all at once,
stands between them: read such an entry as shared, and see the smallest sets.  The mean of the two orders is the
simplest (two-permutation) estimate of Shapley values (Castro et al. 2009).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from reasoninterp.models.context import Context
from reasoninterp.models.minds import graft
from reasoninterp.models.units import Level, Unit, units
from reasoninterp.patching.metric import contrast_plan
from reasoninterp.severance.gauge.align import Alignment
from reasoninterp.severance.gauge.aligned import Asked, aligned, alignment_table, each_mind, group_of
from reasoninterp.severance.ledger.integrate import batches
from reasoninterp.severance.ledger.tables import level_named
from reasoninterp.stats import matrix_intervals
from reasoninterp.study import Batch, Cell, Row, Study
from reasoninterp.traces.contrast import Contrast

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ORDERS = ("forwards", "backwards")


class Agreement(NamedTuple):
    """How far two ledgers of the same loss agree.

    Attributes:
        rank_correlation: Spearman over Units; NaN for fewer than three Units or where all entries are equal.
        largest_change: largest difference of an entry, relative to |loss|.
        same_leader: whether the most negative entry (the most positive one, where the loss is positive) is the same.
    """

    rank_correlation: float
    largest_change: float
    same_leader: bool


def agreement(a: NDArray[np.float64], b: NDArray[np.float64]) -> Agreement:
    """Agreement of two vectors of entries over the same Units, whose sums are the same loss."""
    from scipy.stats import spearmanr

    loss = float(a.sum())
    varied = len(a) > 2 and np.ptp(a) > 0 and np.ptp(b) > 0
    rank = float(spearmanr(a, b).statistic) if varied else float("nan")
    change = float(np.abs(a - b).max()) / abs(loss) if loss else float("nan")
    sign = 1.0 if loss < 0 else -1.0
    return Agreement(rank, change, bool(np.argmin(sign * a) == np.argmin(sign * b)))


def unit_by_unit(
    context: Context,
    contrasts: Sequence[Contrast],
    order: Sequence[Unit],
    *,
    from_mind: str = "base",
    to_mind: str = "tuned",
) -> dict[str, NDArray[np.float64]]:
    """Entries [contrast] of each Unit along the path that moves one Unit after the other; they telescope.

    Args:
        context: holds the minds.
        contrasts: whose effect is split.
        order: Units that make up the whole model, in the order in which they are moved.
        from_mind: where the path begins.
        to_mind: where it ends.
    """
    before: NDArray[np.float64] | None = None
    out: dict[str, NDArray[np.float64]] = {}
    for n in range(len(order) + 1):
        with context.open(graft(from_mind, to_mind, order[:n])) as body, torch.no_grad():
            parts = [contrast_plan(context, chunk).effects(body) for chunk in batches(context, contrasts)]
        now = torch.cat(parts).double().cpu().numpy()
        if before is not None:
            out[order[n - 1].name] = now - before
        before = now
    return out


class LedgerPaths(Study):
    """Whether the ledger depends on the straight path: the same loss split along paths that move Unit after Unit.

    Parameters:
        level: `block`, `layer`, `head`, `circuit` or `fine`.
        from_mind: the mind where the paths begin.
        to_mind: the mind where they end.
        align: bring the tuned mind into the base's gauge first (`severance.gauge.aligned`).
    """

    needs: ClassVar[tuple[str, ...]] = ("ledger",)
    level: str = "block"
    from_mind: str = "base"
    to_mind: str = "tuned"
    align: bool = True

    def cells(self, context: Context) -> Iterable[Cell]:
        """Every order × size of the moved set × item with a contrast."""
        end = self._aligned(context).mind
        with context.open(self.from_mind) as body:
            found = units(body, level_named(self.level))
        for name, order in (("forwards", found), ("backwards", found[::-1])):
            for n in range(len(order) + 1):
                handle = graft(self.from_mind, end, order[:n])
                for item in context.items:
                    if item.contrast is not None:
                        labels = {"order": name, "moved": n, "trace": item.id}
                        yield Cell(
                            key=f"{self.level}/{name}/{n}/{item.id}/{item.digest[:8]}",
                            group=group_of(context, handle),
                            labels=labels,
                            item=Asked(handle, item),
                        )

    def measure(self, context: Context, batch: Batch) -> Iterable[Row]:
        """One row per contrast: its effect with the first Units moved."""
        for part in each_mind(context, batch, self.from_mind, self.to_mind, align=self.align):
            with torch.no_grad():
                values = contrast_plan(context, [asked.item.contrast for asked in part.items]).effects(context.body)
            for cell, effect in zip(part, values.tolist(), strict=True):
                yield cell.row(effect=effect)

    def _aligned(self, context: Context) -> Alignment:
        return aligned(context, self.from_mind, self.to_mind, align=self.align)

    def summarise(self, rows: pd.DataFrame, context: Context) -> dict[str, pd.DataFrame]:
        """`ledger_paths` (a Unit a row, a path a column), `ledger_paths_agreement` (a pair of paths a row) and
        `ledger_paths_alignment` (notes)."""
        about = self._aligned(context)
        notes = alignment_table(about)
        if not len(rows):
            return {
                "ledger_paths": pd.DataFrame(),
                "ledger_paths_agreement": pd.DataFrame(),
                "ledger_paths_alignment": notes,
            }
        with context.open(self.from_mind) as body:
            found = units(body, level_named(self.level))
        table = pd.DataFrame({"unit": [u.name for u in found], "level": self.level})
        end = _end_of_ledger(context, self.to_mind)
        pairs = [("forwards", "backwards")]
        if end == about.mind:
            ledger = context.table("ledger")
            table["straight"] = straight_entries(ledger, found, self.level)
            table["straight_ci_low"], table["straight_ci_high"] = straight_intervals(ledger, found, self.level).T
            pairs = [("straight", n) for n in (*ORDERS, "mean_of_orders")] + pairs
        else:
            table[["straight", "straight_ci_low", "straight_ci_high"]] = np.nan
            left_out = f"The run's ledger ends in {end}, these paths in {about.mind}: `straight` is left out."
            notes = pd.concat([notes, notes.iloc[:1].assign(note=left_out)], ignore_index=True)
        by_trace = []
        for name in ORDERS:
            wide = rows[rows["order"] == name].pivot(index="trace", columns="moved", values="effect").sort_index(axis=1)
            legs = np.diff(wide.to_numpy(np.float64), axis=1)
            by_trace.append(legs if name == "forwards" else legs[:, ::-1])
            _add(table, name, by_trace[-1], context.seed)
        table["n"] = len(by_trace[0])
        _add(table, "mean_of_orders", (by_trace[0] + by_trace[1]) / 2, context.seed)
        out = [
            {"a": a, "b": b, **_agreement(table, a, b), "n_units": len(table), "n": int(table["n"].iloc[0])}
            for a, b in pairs
        ]
        return {
            "ledger_paths": table,
            "ledger_paths_agreement": pd.DataFrame(out),
            "ledger_paths_alignment": notes,
        }

    def draw(self, summary: Any) -> Figure | None:
        """Entries of each Unit along the three paths."""
        from reasoninterp.figures import bars

        table = summary["ledger_paths"]
        if not len(table):
            return None
        shown = [path for path in ("straight", *ORDERS) if table[path].notna().any()]
        long = table.melt(id_vars="unit", value_vars=shown, var_name="path", value_name="value")
        return bars(long, "unit", hue="path", xlabel="entry, nats")


def straight_entries(ledger: pd.DataFrame, found: Sequence[Unit], level: Level | str) -> NDArray[np.float64]:
    """The straight ledger's entries of some Units; a tied embedding's two uses together, as they are moved."""
    part = ledger[ledger["level"] == level].groupby("unit")["attribution"].sum()
    entry = {str(name): float(value) for name, value in part.items()}
    if "unembed" in entry and all(u.name != "unembed" for u in found):
        entry["embed"] += entry.pop("unembed")
    return np.array([entry[u.name] for u in found])


def straight_intervals(ledger: pd.DataFrame, found: Sequence[Unit], level: Level | str) -> NDArray[np.float64]:
    """Ends of the straight ledger's intervals [unit, low or high]; NaN where two uses of an embedding were summed."""
    part = ledger[ledger["level"] == level].set_index("unit")[["ci_low", "ci_high"]].copy()
    summed = "unembed" in part.index and all(u.name != "unembed" for u in found)
    if summed:
        part.loc["embed"] = np.nan
    return part.loc[[u.name for u in found]].to_numpy(np.float64)


def _end_of_ledger(context: Context, to_mind: str) -> str:
    """The mind in which the path of the run's ledger ends."""
    if context.run is None or not context.run.has_table("ledger_alignment"):
        return to_mind
    return str(context.table("ledger_alignment")["mind"].iloc[0])


def _add(table: pd.DataFrame, name: str, entries: NDArray[np.float64], seed: int) -> None:
    """Means over traces of entries [trace, unit] and their intervals, as columns."""
    low, high = matrix_intervals(entries, seed=seed)
    table[name], table[f"{name}_ci_low"], table[f"{name}_ci_high"] = entries.mean(0), low, high


def _agreement(table: pd.DataFrame, a: str, b: str) -> dict[str, Any]:
    return agreement(table[a].to_numpy(np.float64), table[b].to_numpy(np.float64))._asdict()
