"""The balance: what tuning bought and what it cost, Unit by Unit.

The same straight path between two minds, four readouts, each split over Units so that the entries sum to its change:

`reliance`              E, how far the answer follows a changed chain (nats): what severing costs.
`accuracy`              log P of the gold answer after the trace's own chain (nats).
`accuracy_base_chain`   the same after the chain that the from-mind wrote (from the study `samples`, where it has one).
`chain`                 mean log P of the chain's step tokens (nats per token): does the mind still write such steps?

A Unit with a positive entry of accuracy or chain and a negative one of reliance has bought answers with severance.
Readouts differ in scale, so a column is compared with its own total (`ledger_balance_total`), not with its neighbour.
Each readout refines its nodes for itself; its residual stands in the total, and `detour`: how far the readout leaves
the range of its ends along the path.  Accuracy that both ends have and the middle lacks makes large entries of
opposite sign whose sum is small; there `detour` is above 1 and the single entries are not to be read.  `warning` says
so, and whatever else is to be known of a readout's ledger.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import pandas as pd

from reasoninterp.models.context import Context, Item
from reasoninterp.severance.effects import loss_of
from reasoninterp.severance.ledger import readouts
from reasoninterp.severance.ledger.integrate import Integral, difference_of
from reasoninterp.severance.ledger.quadrature import check
from reasoninterp.severance.ledger.study import Evaluate, NodeStudy
from reasoninterp.severance.ledger.tables import integral_of, level_named, unit_table, warnings_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = ("reliance", "accuracy", "accuracy_base_chain", "chain")
UNITS_OF = {"reliance": "nats", "accuracy": "nats", "accuracy_base_chain": "nats", "chain": "nats per token"}


class LedgerBalance(NodeStudy):
    """What tuning bought (accuracy, chain) and what it cost (reliance), side by side per Unit.

    Parameters:
        level: `fine`, `circuit`, `head`, `block` or `layer`.
        nodes: intervals between nodes to begin with (nodes + 1 gradients), for each readout.
        max_nodes: where doubling ends.
        tolerance: largest residual, relative to the larger end, with which it is content.
        from_mind: the mind where the path begins.
        to_mind: the mind where it ends.
        align: bring the tuned mind into the base's gauge first (`severance.gauge.aligned`).
        checkpoint: keep the activations of one block at a time (slower, the same entries).
    """

    needs: ClassVar[tuple[str, ...]] = ("samples",)
    level: str = "block"

    def search(self, context: Context, evaluate: Evaluate) -> None:
        """Each readout in turn, over the traces that have it."""
        check(self.nodes, self.max_nodes, self.tolerance)
        level_named(self.level)
        for name in COLUMNS:
            items = self._items(context, name)
            if items:
                self.refine(context, evaluate, partial(self.ask, context, items, readout=name))

    def _items(self, context: Context, name: str) -> list[Item]:
        items = [i for i in context.items if i.contrast is not None]
        if name != "accuracy_base_chain":
            return items
        chains = self._chains(context)
        return [i for i in items if i.id in chains]

    def _chains(self, context: Context) -> dict[str, tuple[str, ...]]:
        """Chains that the from-mind wrote itself, where it came to an end of them."""
        if context.run is None or not context.run.has_table("samples"):
            return {}
        table = context.table("samples")
        own = table[(table["mind"] == self.from_mind) & (table["status"] == "ok")]
        return {r.trace: tuple(r.steps) for r in own.itertuples() if len(r.steps)}

    def readout(self, name: str, context: Context) -> readouts.Readout:
        """The readout of a column."""
        if name == "accuracy_base_chain":
            return readouts.after_chains(self._chains(context))
        return readouts.readout_named(name)

    def summarise(self, rows: pd.DataFrame, context: Context) -> dict[str, pd.DataFrame]:
        """`ledger_balance` (a Unit a row, a readout a column), `ledger_balance_total` (a readout a row) and
        `ledger_balance_alignment` (notes)."""
        pair, out, totals = self.pair(context), pd.DataFrame(), []
        delta = difference_of(context, self.from_mind, pair.end)
        for name in COLUMNS:
            part = rows[rows["readout"] == name] if len(rows) else rows
            if not len(part):
                continue
            with context.open(self.from_mind) as body:
                found, _ = integral_of(part, body, part["alpha"].nunique() - 1)
                table = unit_table(found, body, delta, level_named(self.level), context.seed, pair.withheld)
            if not len(out):
                out = table[["unit", "layer", "kind", "head", "circuit", "level", "weight_change"]].copy()
            out[name], out[f"{name}_ci_low"], out[f"{name}_ci_high"], out[f"{name}_n"] = (
                table[c] for c in ("attribution", "ci_low", "ci_high", "n")
            )
            change = loss_of(found.e_from, found.e_to, seed=context.seed)
            totals.append(
                {
                    "readout": name,
                    "unit": UNITS_OF[name],
                    "from": float(found.e_from.mean()),
                    "to": float(found.e_to.mean()),
                    "change": change.value,
                    "ci_low": change.ci_low,
                    "ci_high": change.ci_high,
                    "total": float(found.values.sum(1).mean()),
                    "residual_relative": found.residual,
                    "settled": found.settled,
                    "n_nodes": found.n_nodes,
                    "within_tolerance": found.residual <= self.tolerance,
                    "along_min": float(found.along.min()),
                    "along_max": float(found.along.max()),
                    "detour": detour_of(found),
                    "rounding": found.rounding,
                    "n": len(found.values),
                    "warning": "; ".join([*self._warnings(found, name), *pair.warnings]),
                    "convention": pair.convention,
                }
            )
        return {
            "ledger_balance": out,
            "ledger_balance_total": pd.DataFrame(totals),
            "ledger_balance_alignment": pair.table(),
        }

    def _warnings(self, found: Integral, name: str) -> list[str]:
        out, detour = warnings_of(found, self.tolerance, name.replace("_", " ")), detour_of(found)
        if detour > 1:
            out.append(f"the path leaves its ends by {detour:.1f} times the change: single entries are not to be read")
        return out

    def draw(self, summary: Any) -> Figure | None:
        """One column of bars a readout, Units in forward order."""
        return draw_balance(summary["ledger_balance"])


def detour_of(found: Integral) -> float:
    """How far the readout leaves the range of its two ends along the path, relative to its change (0: nowhere).

    Above about 1, entries of opposite sign cancel: they say more of the path's detour than of what tuning did.
    """
    ends = float(found.e_from.mean()), float(found.e_to.mean())
    outside = max(min(ends) - float(found.along.min()), float(found.along.max()) - max(ends), 0.0)
    return outside / abs(ends[1] - ends[0]) if ends[0] != ends[1] else float("nan")


def draw_balance(table: pd.DataFrame) -> Figure | None:
    """Bars with intervals, a panel a readout."""
    from reasoninterp.figures import bars, figure, style

    shown = [name for name in COLUMNS if name in table]
    if not shown:
        return None
    with style():
        fig = figure(3.0 * len(shown) + 0.6, 1.2 + 0.24 * len(table))
        axes = fig.subplots(1, len(shown), sharey=True, squeeze=False)[0]
        for ax, name in zip(axes, shown, strict=True):
            part = table[["unit"]].assign(
                value=table[name], ci_low=table[f"{name}_ci_low"], ci_high=table[f"{name}_ci_high"]
            )
            bars(part, "unit", ax=ax, signed=True, title=name.replace("_", " "), xlabel=UNITS_OF[name])
    return fig
