"""The ledger: the effect lost between two minds, split over Units by integrated gradients in weight space.

With `θ(α) = θ_base + α (θ_tuned − θ_base)` and E the effect of the chain on the answer (`faithfulness.effect`),

    A_c = ∫₀¹ ⟨∂E/∂θ_c at θ(α), θ_tuned,c − θ_base,c⟩ dα        Σ_c A_c = E(tuned) − E(base)

1. Nodes and entries as in `severance.ledger.integrate`: nested Clenshaw–Curtis nodes, one forward and one backward pass at
   each, leaf products instead of weight gradients.  A cell is a node × trace, so a broken run goes on where it was,
   and doubling the intervals measures new nodes only.
2. Where the residual, relative to max(|E(base)|, |E(tuned)|), exceeds the tolerance, the intervals are doubled, unless
   what is left is the rounding of half-precision weights (`severance.ledger.quadrature`); the total says which.
3. Beside E, each node reads the cross-entropy of the gold chain and answer: where it bulges above both ends, the
   straight path runs through models that are worse than either (the loss barrier), and the total says so.
4. The path ends in the tuned mind as aligned with the base (`severance.ledger.pair`), since a straight path in weight
   space depends on the gauge; the total says of which pair the ledger is.

A positive entry is effect gained by tuning, a negative one effect lost; both in nats of the answers' log-probability
ratio.  A tied embedding has two entries, one for each use.  Levels: `fine`, `circuit`, `head`, `block`, `layer` (each
sums the one before) and `module`: for a LoRA adapter, the entry of each module's delta.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import ClassVar

import numpy as np
import pandas as pd
import torch

from reasoninterp.models.context import Context, Item
from reasoninterp.models.minds import blend
from reasoninterp.severance.gauge.aligned import Asked, each_mind, group_of
from reasoninterp.severance.ledger import readouts
from reasoninterp.severance.ledger.integrate import by_atoms, difference_along, difference_of
from reasoninterp.severance.ledger.pair import Pair, pair_of
from reasoninterp.severance.ledger.products import atoms, ledger_units, membership
from reasoninterp.severance.ledger.quadrature import Means, check, enough, nodes
from reasoninterp.severance.ledger.tables import (
    LEDGER_COLUMNS,
    TABLED,
    integral_of,
    total_row,
    trace_table,
    unit_table,
)
from reasoninterp.study import Batch, Cell, Row, Study
from reasoninterp.traces.contrast import Contrast

Evaluate = Callable[..., list[list[Row]]]


class NodeStudy(Study):
    """What ledgers have in common: cells are nodes × contrasts, and nodes are added until the entries sum up.

    Parameters:
        nodes: intervals between nodes to begin with (nodes + 1 gradients).
        max_nodes: where doubling ends.
        tolerance: largest residual, relative to the larger |E|, with which it is content.
        from_mind: the mind where the path begins.
        to_mind: the mind where it ends.
        align: bring the tuned mind into the base's gauge first (`severance.gauge.aligned`).
        checkpoint: keep the activations of one block at a time (slower, the same entries).
    """

    nodes: int = 8
    max_nodes: int = 64
    tolerance: float = 0.005
    from_mind: str = "base"
    to_mind: str = "tuned"
    align: bool = True
    checkpoint: bool = False

    needs_barrier: ClassVar[bool] = False

    def refine(self, context: Context, evaluate: Evaluate, ask: Callable[[float], Sequence[Cell]]) -> int:
        """Measure nodes until the entries sum to the change of the readout; returns the number of intervals."""
        check(self.nodes, self.max_nodes, self.tolerance)
        n, body = self.nodes, context.minds.body
        to_unit = membership([a.unit for a in atoms(body)], [u.name for u in ledger_units(body)]).numpy()
        known: dict[float, Means] = {}
        while True:
            for alpha, _ in nodes(n):
                if alpha not in known:
                    found = [rows[0] for rows in evaluate(*ask(alpha))]
                    by_atom = np.mean([np.asarray(row["entries"], dtype=np.float64) for row in found], axis=0)
                    known[alpha] = Means(by_atom @ to_unit, float(np.mean([row["effect"] for row in found])))
            if 2 * n > self.max_nodes or enough(known, n, self.tolerance, context.minds.dtype):
                return n
            n *= 2

    def pair(self, context: Context) -> Pair:
        """The two minds, the tuned one in the base's gauge."""
        return pair_of(context, self.from_mind, self.to_mind, align=self.align)

    def ask(self, context: Context, items: Sequence[Item], alpha: float, readout: str, **labels: str) -> list[Cell]:
        """One cell per item at one node; `labels` (whose values tell cells apart) become columns."""
        handle = blend(self.from_mind, self.pair(context).end, alpha)
        where = "/".join([readout, *labels.values(), repr(alpha)])
        return [
            Cell(
                key=f"{where}/{item.id}/{item.digest[:8]}",
                group=group_of(context, handle),
                labels={"trace": item.id, "alpha": alpha, "readout": readout, **labels},
                item=Asked(handle, item),
            )
            for item in items
        ]

    def measure(self, context: Context, batch: Batch) -> Iterable[Row]:
        """One row per contrast: the readout at this node, its entries by atom and, if wanted, the cross-entropy."""
        for part in each_mind(context, batch, self.from_mind, self.to_mind, align=self.align):
            yield from self._at_node(context, part)

    def _at_node(self, context: Context, batch: Batch) -> list[Row]:
        """Rows of cells that share a node, whose weights are in."""
        delta, body = difference_along(context, batch[0].item.handle), context.body
        rows: dict[str, Row] = {}
        for name in dict.fromkeys(cell.labels["readout"] for cell in batch):
            cells = [cell for cell in batch if cell.labels["readout"] == name]
            contrasts = [cell.item.item.contrast for cell in cells]
            plan = self.readout(name, context)(context, contrasts)
            found, _, values = by_atoms(body, delta, lambda: plan.values(body, grad=True), plan.owner,  # noqa: B023
                                        checkpoint=self.checkpoint)  # fmt: skip
            extra = self._cross_entropy(context, contrasts)
            for cell, effect, row, also in zip(cells, values.tolist(), found.tolist(), extra, strict=True):
                rows[cell.key] = cell.row(effect=effect, entries=row, **also)
        return [rows[cell.key] for cell in batch]

    def readout(self, name: str, context: Context) -> readouts.Readout:
        """The readout that a cell's label names."""
        return readouts.readout_named(name)

    def _cross_entropy(self, context: Context, contrasts: Sequence[Contrast]) -> list[dict[str, float]]:
        if not self.needs_barrier:
            return [{} for _ in contrasts]
        with torch.no_grad():
            values = readouts.text(context, contrasts).values(context.body)
        return [{"cross_entropy": -v} for v in values.tolist()]


class Ledger(NodeStudy):
    """What tuning cost the effect of the chain, split over Units of weight; sums to the loss.

    Parameters:
        nodes: intervals between nodes to begin with (nodes + 1 gradients).
        max_nodes: where doubling ends.
        tolerance: largest residual, relative to the larger |E|, with which it is content.
        from_mind: the mind where the path begins.
        to_mind: the mind where it ends.
        align: bring the tuned mind into the base's gauge first (`severance.gauge.aligned`).
        checkpoint: keep the activations of one block at a time (slower, the same entries).
    """

    needs_barrier: ClassVar[bool] = True

    def search(self, context: Context, evaluate: Evaluate) -> None:
        """Evaluate nodes, doubling their number until the entries sum to the loss."""
        check(self.nodes, self.max_nodes, self.tolerance)
        items = [i for i in context.items if i.contrast is not None]
        if items:
            self.refine(context, evaluate, partial(self.ask, context, items, readout="reliance"))

    def summarise(self, rows: pd.DataFrame, context: Context) -> dict[str, pd.DataFrame]:
        """`ledger` (Units of every level), `ledger_total` (one row), `ledger_traces` (blocks per trace) and
        `ledger_alignment` (notes)."""
        pair = self.pair(context)
        notes = {"ledger_alignment": pair.table()}
        if not len(rows):
            return {"ledger": pd.DataFrame(columns=LEDGER_COLUMNS), "ledger_total": pd.DataFrame(), **notes}
        delta = difference_of(context, self.from_mind, pair.end)
        with context.open(self.from_mind) as body:
            found, traces = integral_of(rows, body, rows["alpha"].nunique() - 1)
            tables = [unit_table(found, body, delta, level, context.seed, pair.withheld) for level in TABLED]
        entropy = rows.groupby("alpha")["cross_entropy"].mean().sort_index().to_numpy(np.float64)
        total = total_row(found, entropy, self.tolerance, context.seed, pair)
        return {
            "ledger": pd.concat(tables, ignore_index=True),
            "ledger_total": pd.DataFrame([total]),
            "ledger_traces": trace_table(found, traces),
            **notes,
        }
