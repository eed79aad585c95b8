"""The attributed map over component × layer × head × column, with its measured agreement and its top confirmed exactly.

1. For every mind and batch of aligned contrasts, one backward pass a direction gives the whole map (`attribution`);
   columns are those of `patching.columns`.  The integrated gradient runs along one line, so that both directions have
   the same values and one pass serves both.
2. In each trace a seeded sample of cells, the same for all minds, is patched exactly (`agreement`).
3. When all traces are read, the cells with the largest means are patched exactly in every trace.

The default is the integrated gradient: where an answer is firm its gradient at either end is nearly flat, so that plain
attribution patching misses the very cells that matter (the agreement says by how much, for these traces).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from reasoninterp.errors import UserError
from reasoninterp.figures import INK, colours, figure, housed
from reasoninterp.models.context import Context, Item
from reasoninterp.patching.agreement import PatchCell, exactly, live_cells, sample_cells, summary_row
from reasoninterp.patching.attribution import COMPONENTS, Attributed, attribute, method_name, span_sums
from reasoninterp.patching.columns import Column, columns
from reasoninterp.patching.metric import DIRECTIONS, ContrastPlan, contrast_plan
from reasoninterp.stats import matrix_intervals, mean
from reasoninterp.study import Batch, Cell, Row, Study

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PLACE = ["component", "layer", "head", "column", "column_index"]
TABLE = [
    "mind", "direction", *PLACE, "value", "normalised", "ci_low", "ci_high", "n", "exact", "exact_ci_low",
    "exact_ci_high", "method",
]  # fmt: skip


class Top(NamedTuple):
    """An item whose leading cells are to be patched exactly: (direction, component, layer, head, column's order)."""

    item: Item
    places: tuple[tuple[str, str, int, int, int], ...]


class Attribution(Study):
    """Gradient attribution over component × layer × head × column, checked against exact patching, for each mind.

    Parameters:
        max_traces: at most so many aligned contrasts a mind.
        components: what is attributed: resid_pre, resid_mid, resid_post, attn_out, mlp_out, z, q, k, v, pattern.
        steps: nodes of the integrated gradient; 0 is attribution patching, the gradient at the patched run.
        sample: cells of each trace and direction that are patched exactly, for the agreement.
        confirm: leading cells of each mind's and direction's map that are patched exactly in every trace.
    """

    max_traces: int = 128
    components: tuple[str, ...] = ("resid_pre", "attn_out", "mlp_out", "z")
    steps: int = 8
    sample: int = 8
    confirm: int = 8

    def search(self, context: Context, evaluate: Callable[..., list[list[Row]]]) -> None:
        """Map every trace, then patch what leads the maps."""
        if unknown := [c for c in self.components if c not in COMPONENTS]:
            raise UserError(f"--components {unknown[0]}: not one of {', '.join(COMPONENTS)}.")
        if min(self.steps, self.sample, self.confirm) < 0:
            raise UserError("attribution: --steps, --sample and --confirm must not be negative.")
        cells = list(context.contrast_cells(aligned=True, most=self.max_traces))
        found = evaluate(*cells)
        if not self.confirm:
            return
        for mind in dict.fromkeys(str(cell.group) for cell in cells):
            at = [k for k, cell in enumerate(cells) if cell.group == mind]
            places = _leading((row for k in at for row in found[k]), self.confirm)
            digest = hashlib.sha256(repr(places).encode()).hexdigest()[:8]
            evaluate(*(replace(cells[k], key=f"{cells[k].key}/{digest}", item=Top(cells[k].item, places)) for k in at))

    def measure(self, context: Context, batch: Batch) -> Iterable[Row]:
        """Rows of kind `map`, `sampled` (attributed and exact) and `confirmed` (exact)."""
        contrasts = [_item(cell).contrast for cell in batch]
        plan = contrast_plan(context, contrasts)
        tables = [columns(context.encode(c.clean)) for c in contrasts]
        orders = sorted({c.order for table in tables for c in table})
        grid = [[next((c for c in table if c.order == order), None) for order in orders] for table in tables]
        if isinstance(batch[0].item, Top):
            yield from self._confirm(context, batch, plan, grid, orders)
        else:
            yield from self._map(context, batch, plan, grid)

    def _map(
        self, context: Context, batch: Batch, plan: ContrastPlan, grid: Sequence[Sequence[Column | None]]
    ) -> Iterator[Row]:
        body, spans = context.body, [[c.span if c else None for c in row] for row in grid]
        whole = (plan.margins(body, 1) - plan.margins(body, 0)).tolist()
        found: Attributed | None = None
        for direction in DIRECTIONS:
            if found is None or not self.steps:
                found = attribute(body, plan, direction, self.components, steps=self.steps)
            values = {c: span_sums(x, spans) for c, x in found.values.items()}
            drawn: list[PatchCell] = []
            for k, cell in enumerate(batch):
                live, _ = live_cells(plan, values, spans, k)
                seed = context.seed_of(cell.item, self.name, direction)
                drawn += sample_cells(live, self.sample, seed=seed)
                rest = {"kind": "map", "direction": direction, "effect": whole[k]}
                for place, value in _entries(values, grid[k], k):
                    yield cell.row(**rest, **place, value=value)
            for patch, exact in zip(drawn, exactly(body, plan, direction)(drawn), strict=True):
                place = _place(patch, grid)
                value = float(values[patch.component][patch.contrast, patch.layer, max(patch.head, 0), patch.column])
                rest = {"kind": "sampled", "direction": direction, "value": value, "exact": exact}
                yield batch[patch.contrast].row(**rest, **place)

    def _confirm(
        self,
        context: Context,
        batch: Batch,
        plan: ContrastPlan,
        grid: Sequence[Sequence[Column | None]],
        orders: Sequence[int],
    ) -> Iterator[Row]:
        for direction in DIRECTIONS:
            wanted = [
                PatchCell(k, component, layer, head, orders.index(order), column.span)
                for where, component, layer, head, order in batch[0].item.places
                for k, row in enumerate(grid)
                if where == direction and order in orders and (column := row[orders.index(order)]) is not None
            ]
            for patch, exact in zip(wanted, exactly(context.body, plan, direction)(wanted), strict=True):
                rest = {"kind": "confirmed", "direction": direction, "exact": exact}
                yield batch[patch.contrast].row(**rest, **_place(patch, grid))

    def summarise(self, rows: pd.DataFrame, context: Context) -> dict[str, pd.DataFrame]:
        """`attribution`, `attribution_agreement` (all components and each) and `attribution_cells` (the sample)."""
        if not len(rows):
            empty = pd.DataFrame(columns=TABLE)
            return {"attribution": empty, "attribution_agreement": pd.DataFrame(), "attribution_cells": pd.DataFrame()}
        method = method_name(self.steps)
        mapped = _means(rows[rows["kind"] == "map"], context.seed)
        checked = rows[rows["kind"] == "confirmed"]
        exact = [
            [*key, *mean(group["exact"], seed=context.seed)[:3]]
            for key, group in checked.groupby(["mind", "direction", *PLACE], sort=False)
        ]
        names = ["exact", "exact_ci_low", "exact_ci_high"]
        table = mapped.assign(**dict.fromkeys(names, np.nan))
        if exact:
            table = mapped.merge(pd.DataFrame(exact, columns=["mind", "direction", *PLACE, *names]), how="left")
        rank = {order: k for k, order in enumerate(sorted(table["column_index"].unique()))}
        table["column_index"] = table["column_index"].map(rank)
        sampled = rows[rows["kind"] == "sampled"].rename(columns={"value": "attributed"})
        sampled = sampled.reset_index(drop=True).reindex(
            columns=["mind", "trace", "direction", *PLACE, "attributed", "exact"]
        )
        agreements = []
        for (mind, direction), group in sampled.groupby(["mind", "direction"], sort=False):
            for component, part in [("all", group), *group.groupby("component", sort=False)]:
                about = {"mind": mind, "direction": direction, "component": component, "method": method}
                found = summary_row(part.reset_index(drop=True), group="trace", seed=context.seed)
                agreements.append({**about, **found, "seed": context.seed})
        return {
            "attribution": table.assign(method=method)[TABLE],
            "attribution_agreement": pd.DataFrame(agreements),
            "attribution_cells": sampled,
        }

    def draw(self, summary: Any) -> dict[str, Figure]:
        """Attributed against exact values of the sampled cells, a panel a direction."""
        return {"attribution": scatter(summary["attribution_cells"], summary["attribution_agreement"])}


@housed
def scatter(cells: pd.DataFrame, agreements: pd.DataFrame) -> Figure:
    """Attributed over exact values, a point a cell, with the diagonal on which they agree."""
    made = figure(7.2, 3.6)
    directions = list(dict.fromkeys(cells["direction"])) if len(cells) else []
    palette = colours(cells["mind"]) if len(cells) else {}
    for k, direction in enumerate(directions):
        ax = made.add_subplot(1, len(directions), k + 1)
        here = cells[cells["direction"] == direction]
        ends = [here[["attributed", "exact"]].to_numpy().min(), here[["attributed", "exact"]].to_numpy().max()]
        ax.plot(ends, ends, color=INK, lw=0.8, ls=(0, (3, 2)))
        for mind, points in here.groupby("mind", sort=False):
            match = agreements[(agreements["mind"] == mind) & (agreements["direction"] == direction)]
            whole = match[match["component"] == "all"].iloc[0]
            label = f"{mind}: rank corr. {whole['rank_correlation']:.2f}, slope {whole['slope']:.2f}, n {whole['n']}"
            ax.scatter(points["exact"], points["attributed"], s=10, alpha=0.6, color=palette[str(mind)], label=label)
        ax.set_title(direction)
        ax.set_xlabel("exact patching (nats)")
        ax.set_ylabel("attributed (nats)")
        ax.legend(loc="upper left", fontsize=7)
    return made


def _item(cell: Cell) -> Any:
    return cell.item.item if isinstance(cell.item, Top) else cell.item


def _leading(rows: Iterable[Row], k: int) -> tuple[tuple[str, str, int, int, int], ...]:
    """Of each direction, the `k` places of the map with the largest |mean over traces|."""
    sums: dict[tuple[str, str, int, int, int], tuple[float, int]] = {}
    for row in rows:
        if row["kind"] == "map":
            key = (row["direction"], row["component"], row["layer"], row["head"], row["column_index"])
            total, n = sums.get(key, (0.0, 0))
            sums[key] = (total + row["value"], n + 1)
    order = sorted(sums, key=lambda key: -abs(sums[key][0] / sums[key][1]))
    return tuple(key for d in DIRECTIONS for key in [key for key in order if key[0] == d][:k])


def _entries(
    values: dict[str, Any], row: Sequence[Column | None], contrast: int
) -> Iterator[tuple[dict[str, Any], float]]:
    """Every place of one contrast's map with its value."""
    for component, grid in values.items():
        heads = grid.shape[2] if component in ("z", "q", "k", "v", "pattern") else 0
        for layer, by_head in enumerate(grid[contrast].tolist()):
            for head, by_column in enumerate(by_head):
                for column, value in zip(row, by_column, strict=True):
                    if column is not None:
                        place = {"component": component, "layer": layer, "head": head if heads else -1}
                        yield {**place, "column": column.label, "column_index": column.order}, value


def _place(patch: PatchCell, grid: Sequence[Sequence[Column | None]]) -> dict[str, Any]:
    column = grid[patch.contrast][patch.column]
    assert column is not None
    place = {"component": patch.component, "layer": patch.layer, "head": patch.head}
    return {**place, "column": column.label, "column_index": column.order}


def _means(rows: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Means over traces with intervals, for all places of a mind, direction and column at once."""
    out = []
    for (mind, direction), of_mind in rows.groupby(["mind", "direction"], sort=False):
        for _, group in of_mind.groupby("column_index", sort=True):  # one set of traces has all of its places
            wide = group.pivot(index=PLACE, columns="trace", values="value")
            low, high = matrix_intervals(wide.to_numpy().T, seed=seed)
            effect = mean(group.groupby("trace")["effect"].first(), seed=seed)
            average = wide.mean(axis=1).to_numpy()
            safe = effect.ci_low > 0 or effect.ci_high < 0
            table = wide.index.to_frame(index=False).assign(
                mind=mind, direction=direction, value=average, ci_low=low, ci_high=high, n=wide.shape[1],
                normalised=average / effect.value if safe else np.nan,
            )  # fmt: skip
            out.append(table)
    return pd.concat(out, ignore_index=True)
