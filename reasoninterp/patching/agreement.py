"""How well gradient attribution agrees with exact patching, measured on a random sample of cells.

1. A cell is a contrast × component × layer × head × column.  Of every contrast the same number is drawn, spread evenly
   over the components, among the cells that can have an effect: the column reaches the first changed token, and above
   the last layer's keys and values it holds a position that is read.  The others are 0 both ways by causality, and
   would only flatter the agreement; they are counted in `n_causal_zeros`.
2. The exact values come from any callable `exact(cells) -> values` (`exactly` is the plain one, a forward pass for
   each component and layer and for as many rounds as one contrast has cells there).
3. Spearman's rank correlation; the slope of attributed on exact values through the origin (1: calibrated, below 1:
   attribution understates) and the line with an intercept; the worst cell both ways.  Intervals: bootstrap over
   contrasts, since the cells of one contrast belong together.
4. With `confirm=k`, the k cells of the map (means over contrasts) with the largest attributed values are patched
   exactly in the same call.

Values are in nats, with the signs of `patching.residual`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from reasoninterp.models.body import Body, site
from reasoninterp.patching.metric import SIDES, ContrastPlan
from reasoninterp.patching.plain import patched_margins
from reasoninterp.stats import Estimate, derive_seed, statistic
from reasoninterp.traces.trace import Span

HEADED = ("z", "q", "k", "v", "pattern")
# In the last layer these reach the logits at their own position only.
_OWN_POSITION = ("resid_mid", "resid_post", "attn_out", "mlp_out", "z", "q", "pattern")
Spans = Sequence[Sequence[Span | None]]
Values = Mapping[str, Float[Tensor, "contrast layer head column"]]


class PatchCell(NamedTuple):
    """One cell of a contrast's map: what is patched, and at which tokens (`head` −1: no heads there)."""

    contrast: int
    component: str
    layer: int
    head: int
    column: int
    span: Span


Weights: TypeAlias = NDArray[np.float64]  # [resample, cell]
Exact = Callable[[Sequence[PatchCell]], Sequence[float]]


@dataclass(frozen=True)
class Agreement:
    """Agreement of attributed with exact values.

    Attributes:
        n: cells compared.
        n_contrasts: contrasts that they come from (what the intervals resample).
        n_causal_zeros: cells that could not be drawn, being 0 by causality.
        rank_correlation: Spearman's, with its interval.
        slope: of attributed on exact values, through the origin, with its interval.
        line: slope and intercept (nats) of the least-squares line.
        largest: the largest exact value in the sample, by size: the scale for the worst cell.
        worst: position in `table` of the cell with the largest |attributed − exact|.
        table: the cells: contrast, component, layer, head, column, attributed, exact.
        confirmed: the top cells of the map: component, layer, head, column, attributed, exact (means), n.
        seed: of the sample and of the intervals.
    """

    n: int
    n_contrasts: int
    n_causal_zeros: int
    rank_correlation: Estimate
    slope: Estimate
    line: tuple[float, float]
    largest: float
    worst: int
    table: pd.DataFrame
    confirmed: pd.DataFrame
    seed: int

    def row(self) -> dict[str, object]:
        """The agreement as one row of a table."""
        return summary_row(self.table, seed=self.seed)


def agreement(
    plan: ContrastPlan,
    values: Values,
    spans: Spans,
    exact: Exact,
    *,
    per_contrast: int = 8,
    confirm: int = 0,
    seed: int = 0,
) -> Agreement:
    """Compare attributed values with exact ones on a random sample, and confirm the top of the map.

    Args:
        plan: the contrasts.
        values: by component, attributed values summed over spans (`attribution.span_sums`), for all layers.
        spans: by contrast, the span of every column (None: this contrast has no such column).
        exact: exact values of any cells.
        per_contrast: cells drawn from each contrast.
        confirm: how many of the map's cells to patch exactly in every contrast.
        seed: seed of the sample and of the intervals.
    """
    drawn, zeros = [], 0
    for k in range(plan.n):
        live, dead = live_cells(plan, values, spans, k)
        drawn += sample_cells(live, per_contrast, seed=derive_seed(seed, "agreement", k))
        zeros += dead
    top = top_of_map(values, confirm)
    wanted = [c for key in top for c in cells_of(spans, *key)]
    both = [*drawn, *wanted]
    found = [float(x) for x in exact(both)] if both else []
    attributed = [float(values[c.component][c.contrast, c.layer, max(c.head, 0), c.column]) for c in both]
    table = _table(both, attributed, found)
    checked = table.iloc[len(drawn) :].groupby(["component", "layer", "head", "column"], sort=False)
    confirmed = checked.agg(
        attributed=("attributed", "mean"), exact=("exact", "mean"), n=("exact", "size")
    ).reset_index()
    table = table.iloc[: len(drawn)]
    fit = compare(table["contrast"].tolist(), table["attributed"], table["exact"], seed=seed)
    return Agreement(
        len(table), fit.n_groups, zeros, fit.rank_correlation, fit.slope, fit.line, fit.largest, fit.worst,
        table, confirmed, seed,
    )  # fmt: skip


class Fit(NamedTuple):
    """Attributed against exact values: what `Agreement` reports, with the number of groups that were resampled."""

    rank_correlation: Estimate
    slope: Estimate
    line: tuple[float, float]
    largest: float
    worst: int
    n_groups: int


def compare(groups: Sequence[Hashable], attributed: ArrayLike, exact: ArrayLike, *, seed: int = 0) -> Fit:
    """Rank correlation, slopes and worst cell; intervals by bootstrap over `groups` (contrasts).

    Fewer than two different values on either side have no correlation: NaN.
    """
    x, y = np.asarray(exact, dtype=float), np.asarray(attributed, dtype=float)
    codes, names = pd.factorize(pd.Series(list(groups), dtype=object))

    def over(f: Callable[[Weights, NDArray[np.float64], NDArray[np.float64]], NDArray[np.float64]]) -> Estimate:
        def compute(drawn: NDArray[np.float64], axis: int) -> Any:
            draws = np.atleast_2d(drawn).astype(int)
            offset = len(names) * np.arange(len(draws))[:, None]
            counts = np.bincount((draws + offset).ravel(), minlength=len(names) * len(draws))
            out = f(counts.reshape(len(draws), len(names))[:, codes].astype(float), x, y)
            return out if np.ndim(drawn) > 1 else out[0]

        return statistic([np.arange(len(names), dtype=float)], compute, seed=seed)

    if not len(x):
        none = Estimate(np.nan, np.nan, np.nan, 0, "bootstrap")
        return Fit(none, none, (np.nan, np.nan), np.nan, -1, 0)
    centred = x - x.mean()
    spread = float(centred @ centred)
    line = float(centred @ y / spread) if spread > 0 else np.nan
    largest = float(x[np.argmax(np.abs(x))])
    worst = int(np.argmax(np.abs(y - x)))
    return Fit(over(_spearman), over(_slope), (line, float(y.mean() - line * x.mean())), largest, worst, len(names))


def summary_row(table: pd.DataFrame, *, group: str = "contrast", seed: int = 0) -> dict[str, object]:
    """The comparison of a table's columns `attributed` and `exact` as one row.

    `rank_correlation`, `slope` (each with `_ci_low`, `_ci_high`), `line_slope`, `intercept`, `n`, the number of
    groups, and the worst cell with its value both ways.
    """
    fit = compare(table[group].tolist(), table["attributed"], table["exact"], seed=seed)
    row: dict[str, object] = {}
    for name, found in (("rank_correlation", fit.rank_correlation), ("slope", fit.slope)):
        row |= {name: found.value, f"{name}_ci_low": found.ci_low, f"{name}_ci_high": found.ci_high}
    row |= {"line_slope": fit.line[0], "intercept": fit.line[1], "n": len(table), "n_groups": fit.n_groups}
    row["largest_exact"] = fit.largest
    if fit.worst >= 0:
        at = table.iloc[fit.worst]
        head = "" if at["head"] < 0 else f".{int(at['head'])}"
        row["worst_cell"] = f"{at[group]}: L{int(at['layer'])}.{at['component']}{head} at {at['column']}"
        row |= {"worst_attributed": float(at["attributed"]), "worst_exact": float(at["exact"])}
    return row


def live_cells(plan: ContrastPlan, values: Values, spans: Spans, contrast: int) -> tuple[list[PatchCell], int]:
    """The cells of one contrast that can have an effect, and how many are 0 by causality."""
    first = plan.first_difference()[contrast]
    reads = plan.sides[0].positions[plan.sides[0].item_of_row == contrast].flatten().tolist()
    live, dead = [], 0
    for component, grid in values.items():
        _, n_layers, n_heads, _ = grid.shape
        heads = range(n_heads) if component in HEADED else [-1]
        for column, span in enumerate(spans[contrast]):
            if span is None:
                continue
            for layer in range(n_layers):
                unread = layer == n_layers - 1 and component in _OWN_POSITION
                if span.stop <= first or (unread and not any(span.start <= r < span.stop for r in reads)):
                    dead += len(heads)
                else:
                    live += [PatchCell(contrast, component, layer, head, column, span) for head in heads]
    return live, dead


def sample_cells(cells: Sequence[PatchCell], n: int, *, seed: int) -> list[PatchCell]:
    """`n` of the cells without replacement (all, where there are fewer), spread evenly over the components."""
    rng = np.random.default_rng(seed)
    pools: dict[str, list[PatchCell]] = {}
    for k in rng.permutation(len(cells)):
        pools.setdefault(cells[k].component, []).append(cells[k])
    names = sorted(pools)
    order = [names[k] for k in rng.permutation(len(names))]  # no component always gets the odd one
    out: list[PatchCell] = []
    while len(out) < min(n, len(cells)):
        out += [pools[name].pop() for name in order if pools[name]][: n - len(out)]
    return out


def top_of_map(values: Values, k: int) -> list[tuple[str, int, int, int]]:
    """The `k` (component, layer, head, column) with the largest |mean over contrasts|, the largest first."""
    found: list[tuple[float, tuple[str, int, int, int]]] = []
    for component, grid in values.items():
        means = grid.nanmean(0)
        for flat in means.abs().nan_to_num(-1.0).flatten().topk(min(k, means.numel())).indices.tolist():
            layer, head, column = (int(i) for i in np.unravel_index(flat, tuple(means.shape)))
            size = abs(float(means[layer, head, column]))
            if size == size:  # a column that no contrast has is NaN
                found.append((size, (component, layer, head if component in HEADED else -1, column)))
    return [key for _, key in sorted(found, key=lambda pair: -pair[0])[:k]]


def cells_of(spans: Spans, component: str, layer: int, head: int, column: int) -> list[PatchCell]:
    """A cell of the map in every contrast that has its column."""
    placed = [(k, row[column]) for k, row in enumerate(spans)]
    return [PatchCell(k, component, layer, head, column, span) for k, span in placed if span is not None]


def exactly(body: Body, plan: ContrastPlan, direction: str) -> Exact:
    """Plain exact patching of any cells: values in nats, in the cells' order.

    Cells of different contrasts at one component and layer share a forward pass over the whole batch.
    """
    sides = SIDES[direction]

    def values(cells: Sequence[PatchCell]) -> list[float]:
        plain = plan.margins(body, sides.into)
        out = [0.0] * len(cells)
        sites: dict[tuple[str, int], dict[int, list[int]]] = {}
        for k, cell in enumerate(cells):
            sites.setdefault((cell.component, cell.layer), {}).setdefault(cell.contrast, []).append(k)
        for (component, layer), queues in sites.items():
            name = site(component, layer)
            source = body.cache(plan.ids(sides.source), [name])[name]
            for turn in range(max(len(q) for q in queues.values())):
                now = {c: q[turn] for c, q in queues.items() if turn < len(q)}
                mask = cell_mask(plan, sides.into, source, {c: cells[k] for c, k in now.items()})
                found = sides.sign * (patched_margins(body, plan, direction, name, source, mask) - plain)
                for c, k in now.items():
                    out[k] = float(found[c])
        return out

    return values


def cell_mask(plan: ContrastPlan, side: int, act: Tensor, cells: Mapping[int, PatchCell]) -> Tensor:
    """Where to patch an activation of one side: for each contrast its cell, nothing where it has none.

    A `pattern` is patched in the rows of the queries in the span.
    """
    mask = torch.zeros(act.shape, dtype=torch.bool)
    for row, owner in enumerate(plan.owners(side)):
        cell = cells.get(owner)
        if cell is None:
            continue
        at = slice(*cell.span)
        if cell.head < 0:
            mask[row, at] = True
        elif cell.component == "pattern":
            mask[row, cell.head, at] = True
        else:
            mask[row, at, cell.head] = True
    return mask


def _table(cells: Sequence[PatchCell], attributed: Sequence[float], exact: Sequence[float]) -> pd.DataFrame:
    frame = pd.DataFrame([c[:5] for c in cells], columns=["contrast", "component", "layer", "head", "column"])
    return frame.assign(attributed=list(attributed), exact=list(exact))


def _spearman(weights: Weights, x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """Spearman's correlation of each resample; `weights` say how often it has each cell."""
    a, b = _ranks(weights, x), _ranks(weights, y)
    n = weights.sum(1, keepdims=True)
    a, b = a - (n + 1) / 2, b - (n + 1) / 2
    size = np.sqrt((weights * a * a).sum(1) * (weights * b * b).sum(1))
    with np.errstate(all="ignore"):
        return np.where(size > 0, (weights * a * b).sum(1) / size, np.nan)


def _ranks(weights: Weights, x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks of the cells in each resample, ties (copies of a cell too) having their mean rank."""
    order = np.argsort(x, kind="stable")
    first = np.flatnonzero(np.diff(x[order], prepend=np.nan) != 0)
    tied = np.add.reduceat(weights[:, order], first, axis=1)
    middle = np.cumsum(tied, axis=1) - (tied - 1) / 2
    _, place = np.unique(x, return_inverse=True)
    return middle[:, place]


def _slope(weights: Weights, x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """Slope through the origin of y on x in each resample."""
    with np.errstate(all="ignore"):
        return np.where(weights @ (x * x) > 0, weights @ (x * y) / (weights @ (x * x)), np.nan)
