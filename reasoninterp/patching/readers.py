"""Who reads a step for the answer: knock out the answer's attention to it, one head or one layer at a time.

1. The queries are the positions behind the last step up to the end of the row: what asks for the answer, and the
   answer's own tokens where it has several.  Their attention to the tokens of one column of the trace (`columns`) is
   cut in one set of heads.
2. For each such cut: the KL of the next-token distribution at the prompt's last token in bits, and the change of the
   margin `m = log P(corrupt answer) − log P(clean answer)` after the clean chain, in nats: positive where the cut makes
   the answer less the clean chain's.
3. One head at a time misses heads that stand in for each other; whole layers are beside them (`head` −1).

This is what the answer reads of the step *directly*; what reaches it through later steps is in `step_matrix`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import pandas as pd
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from reasoninterp.models.body import Body
from reasoninterp.models.context import Context
from reasoninterp.models.read import MarginPlan
from reasoninterp.patching.attention_edges import Edge
from reasoninterp.patching.columns import ANSWER, columns
from reasoninterp.patching.knockout import knockout, reading_plan
from reasoninterp.patching.metric import CLEAN, contrast_plan
from reasoninterp.stats import effect_sizes, estimate
from reasoninterp.study import Batch, Cell, Row, Study
from reasoninterp.traces.trace import Span, TokenTrace

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ALL_HEADS = -1
DRAWN_HEADS = 24


class HeadSet(NamedTuple):
    """Layers and heads that are cut together; None means all."""

    layers: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None


class Readers(NamedTuple):
    """What the answer loses by each cut: KL in bits and change of the margin in nats; NaN where there is none."""

    kl: Float64[Tensor, "item head_set"]
    margin_change: Float[Tensor, "item head_set"]


def every_head(body: Body) -> list[HeadSet]:
    """Each head by itself, layer by layer."""
    return [HeadSet((layer,), (head,)) for layer in range(body.n_layers) for head in range(body.n_heads)]


def every_layer(body: Body, width: int = 1) -> list[HeadSet]:
    """All heads of each layer, or of each window of `width` layers, from the bottom up."""
    return [HeadSet(tuple(range(low, low + width))) for low in range(body.n_layers - width + 1)]


def answer_queries(tokens: TokenTrace) -> Span:
    """The positions that ask for the answer: all behind the last step, at least the prompt's last; to the row's end."""
    last = tokens.answer.start - 1
    return Span(min([t.stop for t in tokens.steps[-1:]] + [last]), 2**31)


def answer_readers(
    body: Body,
    plan: MarginPlan,
    queries: Sequence[Span],
    keys: Sequence[Span | None],
    sets: Sequence[HeadSet],
    *,
    max_rows: int = 32,
) -> Readers:
    """Cut one column of each item from its answer's queries, in one set of heads after the other.

    Args:
        body: the mind that is read.
        plan: rows and answers: `contrast_plan(...).sides[side]`, or `reading_plan` where there are no answers (each
            row's first read is then where the KL is taken).
        queries: the positions that lose the column, for each item (see `answer_queries`).
        keys: the column, for each item; None where it has none.  Keys from the first query on are not cut.
        sets: layers and heads of each cut.
        max_rows: at most so many rows in one forward pass.
    """
    where = [(k, s) for k, span in enumerate(keys) if span is not None for s in range(len(sets))]
    cells = []
    for k, s in where:
        span = keys[k] or Span(0, 0)
        cells.append([Edge(queries[k], Span(span.start, min(span.stop, queries[k].start)), *sets[s])])
    found = knockout(body, plan, cells, [k for k, _ in where], max_rows=max_rows)
    kl = torch.full((len(keys), len(sets)), float("nan"), dtype=torch.float64)
    change = torch.full((len(keys), len(sets)), float("nan"))
    if where:
        at = torch.tensor(where).unbind(1)
        kl[at] = found.kl[:, 0]
        change[at] = found.margin - found.base_margin
    return Readers(kl, change)


class Knockout(Study):
    """Attention of the answer to each step knocked out, by layer and by head: which head reads which step for it.

    Parameters:
        max_traces: at most so many traces a mind: each takes a row of a forward pass per column, layer and head.
        heads: also cut every head by itself, beside whole layers.
    """

    max_traces: int = 32
    heads: bool = True

    def cells(self, context: Context) -> Iterable[Cell]:
        """Every mind × the first traces, with a contrast or without."""
        for mind in context.minds.names:
            for item in context.items[: self.max_traces]:
                yield context.cell(mind, item)

    def measure(self, context: Context, batch: Batch) -> Iterable[Row]:
        """One row per cell, column and set of heads; `margin_change` is NaN for a trace without a contrast."""
        body = context.body
        sets = every_layer(body) + (every_head(body) if self.heads else [])
        asked = [cell for cell in batch if cell.item.contrast is not None]
        plain = [cell for cell in batch if cell.item.contrast is None]
        groups: list[tuple[list[Cell], list[TokenTrace], MarginPlan]] = []
        if asked:
            contrasts = [cell.item.contrast for cell in asked]
            tokens = [context.encode(c.clean) for c in contrasts]
            groups.append((asked, tokens, contrast_plan(context, contrasts).sides[CLEAN]))
        if plain:
            tokens = [context.encode(cell.item.trace) for cell in plain]
            prompts = [t.prompt_ids for t in tokens]
            groups.append((plain, tokens, reading_plan(prompts, [[len(p) - 1] for p in prompts])))
        for cells, tokens, plan in groups:
            tables = [[c for c in columns(t) if c.label != ANSWER] for t in tokens]
            queries = [answer_queries(t) for t in tokens]
            for order in sorted({c.order for table in tables for c in table}):
                found = [next((c for c in table if c.order == order), None) for table in tables]
                keys = [c.span if c else None for c in found]
                read = answer_readers(body, plan, queries, keys, sets, max_rows=context.rows)
                for k, (cell, column) in enumerate(zip(cells, found, strict=True)):
                    if column is None:
                        continue
                    for s, one in enumerate(sets):
                        layer, head = (one.layers or (0,))[0], one.heads[0] if one.heads else ALL_HEADS
                        yield cell.row(
                            layer=layer,
                            head=head,
                            column=column.label,
                            column_index=order,
                            kl=float(read.kl[k, s]),
                            margin_change=float(read.margin_change[k, s]),
                        )

    def summarise(self, rows: pd.DataFrame, context: Context) -> pd.DataFrame:
        """`knockout`: mind, scope, site, layer, head, column, column_index, measure, value, ci_low, ci_high, n, method,
        d, p, p_corrected.

        `scope` is `layer` (all its heads, `head` −1) or `head`; `measure` is `kl` (bits) or `margin_change` (nats, only
        of traces with a contrast).  p-values are of margin changes alone, for a KL has no null about which its sign
        could flip, and are corrected (Benjamini–Hochberg) within each mind and scope, over layers, heads and columns.
        """
        by = ["mind", "scope", "site", "layer", "head", "column", "column_index"]
        sizes = ["value", "ci_low", "ci_high", "n", "method", "d", "p", "p_corrected"]
        if not len(rows):
            return pd.DataFrame(columns=[*by, "measure", *sizes])
        whole = rows["head"] == ALL_HEADS
        names = "L" + rows["layer"].astype(str) + ("H" + rows["head"].astype(str)).where(~whole, "")
        frame = rows.assign(scope=whole.map({True: "layer", False: "head"}), site=names)
        parts = [estimate(frame, by=by, value="kl", kind="mean", seed=context.seed).assign(measure="kl")]
        signed = frame[frame["margin_change"].notna()]
        if len(signed):
            found = effect_sizes(signed, by, "margin_change", family=["mind", "scope"], seed=context.seed)
            parts.append(found.assign(measure="margin_change"))
        table = pd.concat(parts, ignore_index=True).reindex(columns=[*by, "measure", *sizes])
        rank = {order: k for k, order in enumerate(sorted(table["column_index"].unique()))}
        table["column_index"] = table["column_index"].map(rank)
        return table

    def draw(self, summary: pd.DataFrame) -> dict[str, Figure]:
        """`knockout`: layer × column; `knockout-heads`: the heads with the largest effect × column, one map a mind."""
        from reasoninterp.figures import heatmap, short

        out: dict[str, Figure] = {}
        layers = summary[(summary["scope"] == "layer") & (summary["measure"] == "kl")]
        if len(layers):
            out["knockout"] = heatmap(
                layers,
                "column",
                "layer",
                title=lambda mind: f"{short(mind)}: answer's attention cut, layer by layer",
                xlabel="cut from the answer's positions",
                unit="KL in bits",
            )
        heads = summary[summary["scope"] == "head"]
        measure = "margin_change" if (heads["measure"] == "margin_change").any() else "kl"
        heads = heads[heads["measure"] == measure]
        if len(heads):
            largest = heads["value"].abs().groupby(heads["site"]).max().nlargest(DRAWN_HEADS).index
            shown = heads[heads["site"].isin(largest)].sort_values(["layer", "head"], kind="stable")
            some = f" ({len(largest)} largest)" if heads["site"].nunique() > len(largest) else ""
            out["knockout-heads"] = heatmap(
                shown,
                "column",
                "site",
                title=lambda mind: f"{short(mind)}: head by head{some}",
                xlabel="cut from the answer's positions",
                ylabel="head",
                unit="change of the margin in nats" if measure == "margin_change" else "KL in bits",
            )
        return out
