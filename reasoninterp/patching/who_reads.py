"""Who reads step i for the answer: knockout, attribution and attention of every head, side by side.

For each mind, step column and head, over the same traces:

* `knockout`: the exact change of the margin `log P(corrupt answer) − log P(clean answer)` (nats) when this head alone
  may no longer read the column from the answer's positions (study `knockout`).  The others are held to it.
* `attribution`: the head's part, by integrated gradients, in what cutting *all* heads at once changes
  (`cut_attribution`, nats): heads that stand in for each other share what each alone does not lose.
* `gradient`: minus gradient × attention (study `attention-map`, nats): attribution to first order.
* `attention`, `value_share`, `value_weighted`: what the head gives the column from the answer position: attention, the
  column's share of the norm that the head writes, and that norm in units of the residual stream.

Signed measures are positive where reading the column speaks for the clean answer.  Agreement with knockout is
Spearman's rank correlation over heads of the sizes of the means over traces.  Its interval resamples traces; where most
heads do nothing their ranks are noise, and it leans towards 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from reasoninterp.errors import UserError
from reasoninterp.models.context import Context
from reasoninterp.patching.columns import ANSWER, QUESTION, columns
from reasoninterp.patching.cut_attribution import cut_attribution
from reasoninterp.patching.metric import CLEAN, contrast_plan
from reasoninterp.patching.readers import ALL_HEADS, answer_queries
from reasoninterp.stats import (
    CONFIDENCE,
    N_RESAMPLES,
    Estimate,
    corrected,
    derive_seed,
    matrix_intervals,
    sign_flip_pvalues,
)
from reasoninterp.study import Batch, Cell, Row, Study

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KNOCKOUT, ATTENTION = "knockout", "attention"
SIGNED = (KNOCKOUT, "attribution", "gradient")
MEASURES = (*SIGNED, ATTENTION, "value_share", "value_weighted")
UNITS = {
    **dict.fromkeys(SIGNED, "nats"),
    **dict.fromkeys((ATTENTION, "value_share"), "share"),
    "value_weighted": "norm",
}
TAILS = ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2)
CELL = ["mind", "trace", "layer", "head", "column_index"]
PLACE = ["layer", "head", "site", "column", "column_index", "measure", "unit"]
TABLE = ["mind", *PLACE, "value", "ci_low", "ci_high", "n", "p", "p_corrected"]
CHANGE = [
    "mind", "against", *PLACE, "before", "after", "change", "change_ci_low", "change_ci_high", "kept", "kept_ci_low",
    "kept_ci_high", "n",
]  # fmt: skip
AGREEMENT = [
    "mind", "column", "column_index", "measure", "value", "ci_low", "ci_high", "n", "n_heads", "top", "top_knockout",
]  # fmt: skip


class Block(NamedTuple):
    """One mind's values at one column.

    Attributes:
        mind, column, order: which.
        traces: their ids.
        heads: (layer, head) of each place.
        values: by measure, `[trace, place]`.
    """

    mind: str
    column: str
    order: int
    traces: list[str]
    heads: list[tuple[int, int]]
    values: Mapping[str, NDArray[np.float64]]

    def labels(self, measure: str) -> pd.DataFrame:
        """A row for each place with what says where it is."""
        frame = pd.DataFrame(self.heads, columns=["layer", "head"])
        where = {"column": self.column, "column_index": self.order, "measure": measure, "unit": UNITS[measure]}
        return frame.assign(site=[f"L{layer}H{head}" for layer, head in self.heads], **where)


def side_by_side(attributed: pd.DataFrame, knocked: pd.DataFrame, attended: pd.DataFrame) -> pd.DataFrame:
    """One row per mind, trace, layer, head and column with every measure, where all three tables have it.

    Args:
        attributed: rows of `who-reads`.
        knocked: rows of `knockout`.
        attended: rows of `attention-map`.

    Raises:
        UserError: knockout was run without heads, or the three have no trace in common.
    """
    alone = knocked[knocked["head"] != ALL_HEADS] if len(knocked) else knocked
    if not len(alone):
        raise UserError("who-reads: the run's knockout has no heads; run knockout again with its heads.")
    alone = alone[[*CELL, "margin_change"]].rename(columns={"margin_change": KNOCKOUT})
    asked = attended[(attended["what"] == "map") & (attended["destination"] == ANSWER)]
    asked = asked.rename(columns={"source_index": "column_index", "plain": ATTENTION})
    asked = asked[[*CELL, ATTENTION, "value_share", "value_weighted", "gradient"]].assign(gradient=-asked["gradient"])
    whole = attributed.merge(alone, on=CELL).merge(asked, on=CELL).dropna(subset=[KNOCKOUT, "attribution", "gradient"])
    if not len(whole):
        raise UserError("who-reads: knockout and attention-map read none of its traces; run all three on the same.")
    return whole


def blocks(whole: pd.DataFrame) -> list[Block]:
    """The rows of `side_by_side` as matrices, minds in order of appearance and columns from the left."""
    out = []
    for mind, of_mind in whole.groupby("mind", sort=False):
        for order, part in of_mind.groupby("column_index"):
            wide = part.pivot(index="trace", columns=["layer", "head"], values=list(MEASURES)).sort_index(axis=1)
            heads = [(int(layer), int(head)) for layer, head in wide[KNOCKOUT].columns]
            values = {measure: wide[measure].to_numpy(float) for measure in MEASURES}
            out.append(Block(str(mind), part["column"].iloc[0], int(order), list(wide.index), heads, values))
    return out


def rank_agreement(measure: NDArray[np.float64], exact: NDArray[np.float64], *, seed: int = 0) -> Estimate:
    """Spearman's correlation over heads of the sizes of two measures' means over traces; resamples traces.

    Args:
        measure: `[trace, head]`.
        exact: the same of what it is held to.
        seed: of the resampling.

    Returns:
        The correlation, its interval, the traces; NaN for fewer than 3 heads, or where one side's are all alike.
    """
    if measure.shape != exact.shape:
        raise ValueError(f"pairs are wanted, not {measure.shape} against {exact.shape} values")
    n, n_heads = measure.shape
    if n_heads < 3 or not n:
        return Estimate(np.nan, np.nan, np.nan, n, "bootstrap")
    value = float(_correlations(measure.mean(0)[None], exact.mean(0)[None])[0])
    if n == 1 or np.isnan(value):
        return Estimate(value, np.nan, np.nan, n, "bootstrap")
    counts = _resamples(n, seed)
    low, high = np.nanquantile(_correlations(counts @ measure, counts @ exact), TAILS)
    return Estimate(value, float(low), float(high), n, "bootstrap")


def _resamples(n: int, seed: int) -> NDArray[np.float64]:
    """How much each of `n` traces weighs in each resample, `[resample, trace]`."""
    rng = np.random.default_rng(derive_seed(seed, "bootstrap"))
    return rng.multinomial(n, np.full(n, 1 / n), size=N_RESAMPLES) / n


def _ranks(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks within each row, ties (to rounding) having their mean rank."""
    from scipy.stats import rankdata

    scale = np.abs(x).max(axis=1, keepdims=True)
    return np.asarray(rankdata(np.round(x / np.where(scale > 0, scale, 1), 12), axis=1), dtype=float)


def _correlations(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Spearman's correlation of the sizes in each row; NaN where one side's are all alike."""
    a, b = _ranks(np.abs(a)), _ranks(np.abs(b))
    a, b = a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True)
    size = np.sqrt((a * a).sum(1) * (b * b).sum(1))
    return np.where(size > 0, (a * b).sum(1) / np.where(size > 0, size, 1), np.nan)


def kept(
    before: NDArray[np.float64], after: NDArray[np.float64], *, seed: int = 0
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """What is left of each head's mean after tuning, `mean(after) / mean(before)`, with its interval over traces.

    Args:
        before: `[trace, head]`.
        after: the same traces and heads.
        seed: of the resampling.

    Returns:
        Values, lower and upper ends, each `[head]`; NaN where `mean(before)` is not safely away from 0.
    """
    low, high = matrix_intervals(before, seed=seed)
    safe = (low > 0) | (high < 0)
    counts = _resamples(len(before), seed)
    with np.errstate(all="ignore"):
        value = after.mean(0) / before.mean(0)
        ends = np.quantile((counts @ after) / (counts @ before), TAILS, axis=0)
    return tuple(np.where(safe, x, np.nan) for x in (value, *ends))  # type: ignore[return-value]


class WhoReads(Study):
    """Who reads which step for the answer, head by head: knockout, attribution and attention side by side, for each mind.

    Parameters:
        max_traces: at most so many contrasts a mind; those that `knockout` and `attention-map` read too are compared.
        nodes: nodes of the integrated gradient.
    """

    needs = (KNOCKOUT, "attention-map")

    max_traces: int = 32
    nodes: int = 8

    def cells(self, context: Context) -> Iterable[Cell]:
        """Every mind × trace with a contrast."""
        return context.contrast_cells(most=self.max_traces)

    def measure(self, context: Context, batch: Batch) -> Iterable[Row]:
        """One row per cell, step column, layer and head: `attribution`."""
        contrasts = [cell.item.contrast for cell in batch]
        tokens = [context.encode(c.clean) for c in contrasts]
        plan, queries = contrast_plan(context, contrasts).sides[CLEAN], [answer_queries(t) for t in tokens]
        tables = [[c for c in columns(t) if c.label not in (QUESTION, ANSWER)] for t in tokens]
        for order in sorted({c.order for table in tables for c in table}):
            found = [next((c for c in table if c.order == order), None) for table in tables]
            keys = [c.span if c else None for c in found]
            parts = cut_attribution(context.body, plan, queries, keys, nodes=self.nodes).numpy()
            for k, (cell, column) in enumerate(zip(batch, found, strict=True)):
                if column is not None:
                    for (layer, head), value in np.ndenumerate(parts[k]):
                        place = {"layer": layer, "head": head, "column": column.label, "column_index": order}
                        yield cell.row(**place, attribution=float(value))

    def summarise(self, rows: pd.DataFrame, context: Context) -> dict[str, pd.DataFrame]:
        """Three tables over the traces that all three studies read.

        `who_reads`: means with intervals per mind, head, column and measure; sign-flip p-values of signed measures,
        corrected (Benjamini–Hochberg) within each mind and measure, over heads and columns.
        `who_reads_agreement`: per mind, column and measure its rank correlation with knockout over `n_heads` heads
        (`n` traces, which are resampled), and the leading head by either; rows of `tuned − base` compare changes.
        `who_reads_change`: per head, column and measure the first mind's mean (`before`), another's (`after`), the
        change, and the share `kept` where `before` is safely away from 0.
        """
        if not len(rows):
            empty = {"who_reads": TABLE, "who_reads_agreement": AGREEMENT, "who_reads_change": CHANGE}
            return {name: pd.DataFrame(columns=names) for name, names in empty.items()}
        found = blocks(side_by_side(rows, context.table("knockout.rows"), context.table("attention-map.rows")))
        rank = {order: k for k, order in enumerate(sorted({b.order for b in found}))}
        found = [b._replace(order=rank[b.order]) for b in found]
        pairs = list(_pairs(found, context.minds.names[0]))
        compared = [*found, *(_less(before, after) for before, after in pairs)]
        agreements = [row for b in compared for row in _agreements(b, context.seed)]
        changes = [_changes(*pair, measure, context.seed) for pair in pairs for measure in MEASURES]
        return {
            "who_reads": _means(found, context.seed),
            "who_reads_agreement": pd.DataFrame(agreements, columns=AGREEMENT),
            "who_reads_change": pd.concat(changes, ignore_index=True)[CHANGE]
            if changes
            else pd.DataFrame(columns=CHANGE),
        }

    def draw(self, summary: Any) -> dict[str, Figure]:
        """`who-reads`: the last step by every measure; `who-reads-steps`: attention, every column; `who-reads-heads`."""
        from reasoninterp.patching.who_reads_figures import draw_all

        return draw_all(summary["who_reads"], summary["who_reads_agreement"])


def _means(found: Sequence[Block], seed: int) -> pd.DataFrame:
    parts = []
    for b in found:
        for measure in MEASURES:
            x = b.values[measure]
            low, high = matrix_intervals(x, seed=seed)
            p = sign_flip_pvalues(x, seed=seed) if measure in SIGNED else np.full(len(b.heads), np.nan)
            parts.append(
                b.labels(measure).assign(mind=b.mind, value=x.mean(0), ci_low=low, ci_high=high, n=len(x), p=p)
            )
    table = pd.concat(parts, ignore_index=True)
    table["p_corrected"] = table.groupby(["mind", "measure"])["p"].transform(lambda p: corrected(p))
    return table[TABLE]


def _pairs(found: Sequence[Block], first: str) -> Iterator[tuple[Block, Block]]:
    """The first mind's blocks with every other mind's of the same column, cut to the traces that both have."""
    of_first = {b.order: b for b in found if b.mind == first}
    for b in found:
        if b.mind != first and b.order in of_first:
            a = of_first[b.order]
            common = [t for t in a.traces if t in set(b.traces)]
            yield _only(a, common), _only(b, common)


def _only(b: Block, traces: list[str]) -> Block:
    at = [b.traces.index(t) for t in traces]
    return b._replace(traces=traces, values={name: x[at] for name, x in b.values.items()})


def _less(before: Block, after: Block) -> Block:
    values = {name: x - before.values[name] for name, x in after.values.items()}
    return after._replace(mind=f"{after.mind} − {before.mind}", values=values)


def _agreements(b: Block, seed: int) -> Iterator[Row]:
    leaders = {}
    for measure in MEASURES:
        layer, head = b.heads[int(np.abs(b.values[measure].mean(0)).argmax())]
        leaders[measure] = f"L{layer}H{head}"
    for measure in MEASURES[1:]:
        got = rank_agreement(b.values[measure], b.values[KNOCKOUT], seed=seed)
        ends = {"value": got.value, "ci_low": got.ci_low, "ci_high": got.ci_high, "n": got.n, "n_heads": len(b.heads)}
        where = {"mind": b.mind, "column": b.column, "column_index": b.order, "measure": measure}
        yield {**where, **ends, "top": leaders[measure], "top_knockout": leaders[KNOCKOUT]}


def _changes(before: Block, after: Block, measure: str, seed: int) -> pd.DataFrame:
    a, b = before.values[measure], after.values[measure]
    low, high = matrix_intervals(b - a, seed=seed)
    share, share_low, share_high = kept(a, b, seed=seed)
    return after.labels(measure).assign(
        mind=after.mind, against=before.mind, before=a.mean(0), after=b.mean(0), change=(b - a).mean(0),
        change_ci_low=low, change_ci_high=high, kept=share, kept_ci_low=share_low, kept_ci_high=share_high, n=len(a),
    )  # fmt: skip
