"""Routes: step *i* → step *j* → answer, in the activations of a held text and through text that is written anew.

Two tables, in both directions (`residual.SIDES`), for each step i whose text the contrast changes:

* `routes`, the text held: the effect of step i's changed text on the answer in total, by the direct hop, via each
  later step j, by all hops but the direct one, and what is left over (`hops` says exactly how).  A direct cause has its
  total in `direct`; a step that later *text* stands in for has no total at all.
* `written`, the single hops through text: with step i's text alone changed, how far the mind moves towards writing the
  other chain's step j, `m_j = log P(corrupt step j) − log P(clean step j)` after the text before it, and beside it the
  move when all the text before j is changed (`share` is the quotient of the means).  The answer is written last.

Routes through text are assembled from single hops.  `moved` is the change of the probability of writing the other
chain's step j, of the two texts; i → j → answer is worth `moved` times the effect of step j's text on the answer, and
`rewritten`, in `routes`, is the sum over all ways i → … → j → answer of products of `moved` with that effect: what
step i would do if the steps after it were written anew.  Unlike the held routes it is an estimate: it supposes that
hops add, and that only the two chains' texts are written.

Needs aligned contrasts; routes through text also `propagated` ones (in a `forced` contrast no later step differs).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd
import torch
from scipy.special import expit

from reasoninterp.errors import UserError
from reasoninterp.models.context import Context
from reasoninterp.models.read import AnswerPair, margins
from reasoninterp.patching.columns import Column, columns
from reasoninterp.patching.hops import Flow, Heads, RouteEffects
from reasoninterp.patching.metric import DIRECTIONS, SIDES, ContrastPlan, contrast_plan
from reasoninterp.patching.paths import Spans
from reasoninterp.stats import estimate, ratio
from reasoninterp.study import Batch, Cell, Row, Study
from reasoninterp.traces.trace import Span

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TOTAL, DIRECT, INDIRECT, REST, REWRITTEN = "total", "direct", "all but direct", "rest", "rewritten"
TO_ANSWER = "answer"
_HEAD = re.compile(r"(\d+)(?:\.(\d+))?")


def named_heads(text: str) -> Heads | None:
    """Heads from text: `0.1 2` is head 1 of layer 0 and all of layer 2; an empty text is None, which is every head.

    Raises:
        UserError: another form.
    """
    found: set[tuple[int, int | None]] = set()
    for word in text.replace(",", " ").split():
        match = _HEAD.fullmatch(word)
        if match is None:
            raise UserError(f"heads {word!r}: give layer.head, or a layer for all its heads, as in '0.1 2'.")
        found.add((int(match[1]), None if match[2] is None else int(match[2])))
    return frozenset(found) or None


def column_spans(tables: Sequence[Sequence[Column]]) -> dict[int, Spans]:
    """By column (its order), its tokens in each trace, None where a trace has no such column."""
    orders = sorted({column.order for table in tables for column in table})
    return {o: [next((c.span for c in table if c.order == o), None) for table in tables] for o in orders}


def changed_columns(plan: ContrastPlan, spans: Mapping[int, Spans]) -> dict[int, Spans]:
    """The columns with only those tokens spans whose text differs between the two chains; the rest is left out."""
    out: dict[int, Spans] = {}
    for order, found in spans.items():
        kept = [
            span if span is not None and clean[span.start : span.stop] != corrupt[span.start : span.stop] else None
            for span, clean, corrupt in zip(found, *plan.prompts, strict=True)
        ]
        if any(span is not None for span in kept):
            out[order] = kept
    return out


class WrittenHop(NamedTuple):
    """From a step's changed text to the writing of a later step.

    Attributes:
        contrast, origin, target: which contrast, and the two columns.
        value: move of the margin of the later step's text by the earlier step's text alone; nats.
        total: the same by all the text before.
        moved: the change by the step's text alone of the probability, of the two texts, of the source run's: −1 to 1.
    """

    contrast: int
    origin: int
    target: int
    value: float
    total: float
    moved: float


def written_hops(
    context: Context, plan: ContrastPlan, direction: str, origins: Mapping[int, Spans]
) -> list[WrittenHop]:
    """Hops through text, of the mind that is in; columns whose text does not differ are neither origin nor target."""
    sides = SIDES[direction]
    prompts: list[tuple[int, ...]] = []
    pairs: list[AnswerPair] = []
    asked: list[tuple[int, int, list[int]]] = []
    for k, both in enumerate(zip(*plan.prompts, strict=True)):
        into, source = both[sides.into], both[sides.source]
        places = {order: span for order, found in origins.items() if (span := found[k]) is not None}
        for target, span in sorted(places.items()):
            before = [order for order in sorted(places) if order < target]
            if not before:
                continue
            texts = [into, *(_put(into, source, places[order]) for order in before), source]
            prompts += [text[: span.start] for text in texts]
            pairs += [AnswerPair(both[0][span.start : span.stop], both[1][span.start : span.stop])] * len(texts)
            asked.append((k, target, before))
    if not asked:
        return []
    found = margins(context.body, prompts, pairs, end_id=context.end_id, batch_size=context.rows).margin.cpu()
    towards = (sides.sign * found).tolist()  # the source run's text, against that of the run patched into
    out, at = [], 0
    for k, target, before in asked:
        plain, *alone, every = towards[at : at + len(before) + 2]
        at += len(before) + 2
        for order, value in zip(before, alone, strict=True):
            moved = float(expit(value) - expit(plain))
            out.append(WrittenHop(k, order, target, value - plain, every - plain, moved))
    return out


def rewritten(hops: Sequence[WrittenHop], totals: Mapping[int, float]) -> dict[int, float]:
    """By origin, the sum over all ways origin → … → j → answer through text (j later) of products of hops.

    Args:
        hops: the hops of one contrast.
        totals: by column, the effect of its text on the answer, the other text held.
    """
    out = {}
    for origin in totals:
        reach = {origin: 1.0}
        for target in sorted(t for t in totals if t > origin):
            ways = [h for h in hops if h.target == target and h.origin in reach]
            reach[target] = sum(reach[h.origin] * h.moved for h in ways)
        if len(reach) > 1:
            out[origin] = sum(reach[j] * totals[j] for j in reach if j > origin)
    return out


def _put(into: tuple[int, ...], source: tuple[int, ...], span: Span) -> tuple[int, ...]:
    return (*into[: span.start], *source[span.start : span.stop], *into[span.stop :])


class Routes(Study):
    """How each changed step reaches the answer: directly, via later steps, or through text written anew, for each mind.

    Parameters:
        max_traces: at most so many aligned contrasts a mind: a chain of n steps takes some 2n² forward passes.
        to_step: heads by which later steps read, as `0.1 2` (layer.head, or a layer); by default all.
        to_answer: heads by which the answer position reads; by default all.
    """

    max_traces: int = 64
    to_step: str = ""
    to_answer: str = ""

    def cells(self, context: Context) -> Iterable[Cell]:
        """Every mind × item whose contrast is aligned."""
        return context.contrast_cells(aligned=True, most=self.max_traces)

    def measure(self, context: Context, batch: Batch) -> Iterable[Row]:
        """One row per cell, direction, changed step and route; and one per hop to what is written."""
        contrasts = [cell.item.contrast for cell in batch]
        plan = contrast_plan(context, contrasts)
        tables = [columns(context.encode(c.clean)) for c in contrasts]
        labels = {c.order: c.label for table in tables for c in table}
        spans = column_spans(tables)
        origins = changed_columns(plan, spans)
        whole = (plan.margins(context.body, 1) - plan.margins(context.body, 0)).tolist()
        to_step, to_answer = named_heads(self.to_step), named_heads(self.to_answer)
        for direction in DIRECTIONS:
            flow = Flow(context.body, plan, direction, spans)
            found = {c: flow.routes(c, to_step, to_answer) for c in origins}
            hops = written_hops(context, plan, direction, origins)
            for k, cell in enumerate(batch):
                mine = [c for c in origins if origins[c][k] is not None]
                totals = {c: float(found[c].total[k]) for c in mine}
                text = [h for h in hops if h.contrast == k]
                anew = rewritten(text, totals)
                for c in mine:
                    start = {"direction": direction, "from": labels[c], "from_index": c, "effect": whole[k]}
                    for via, order, value in _ways(found[c], k, labels, anew.get(c, math.nan)):
                        yield cell.row(table="routes", **start, via=via, via_index=order, value=value, total=totals[c])
                    for h in (h for h in text if h.origin == c):
                        place = {"to": labels[h.target], "to_index": h.target, "moved": h.moved}
                        place |= {"assembled": h.moved * totals[h.target]}
                        yield cell.row(table="written", **start, **place, value=h.value, total=h.total)
                    yield cell.row(
                        table="written", **start, to=TO_ANSWER, to_index=10_001, value=totals[c], total=whole[k]
                    )

    def summarise(self, rows: pd.DataFrame, context: Context) -> Mapping[str, pd.DataFrame]:
        """Two tables of means over traces, in nats.

        `routes`: mind, direction, from, from_index, via, via_index, value, ci_low, ci_high, n, share (of the step's
        total), normalised (share of the contrast's whole effect).
        `written`: mind, direction, from, from_index, to, to_index, value, ci_low, ci_high, n, share (of the move by all
        the text before), moved, assembled (from → to → answer, nats), assembled_low, assembled_high.
        Shares are quotients of means with intervals (`share_low`, `share_high`, …), NaN where the mean that they are of
        is not safely away from 0.
        """
        by = ["mind", "direction", "from", "from_index"]
        if not len(rows):
            ends = ["value", "ci_low", "ci_high", "n", "share", "share_low", "share_high"]
            whole = ["normalised", "normalised_low", "normalised_high"]
            more = ["moved", "assembled", "assembled_low", "assembled_high"]
            return {
                "routes": pd.DataFrame(columns=[*by, "via", "via_index", *ends, *whole]),
                "written": pd.DataFrame(columns=[*by, "to", "to_index", *ends, *more]),
            }
        held, text = rows[rows["table"] == "routes"], rows[rows["table"] == "written"]
        held = _with_shares(held, [*by, "via", "via_index"], {"share": "total", "normalised": "effect"}, context.seed)
        written = _with_shares(text, [*by, "to", "to_index"], {"share": "total"}, context.seed)
        if "moved" not in text:  # only the answer is written
            text = text.assign(moved=math.nan, assembled=math.nan)
        for name in ("moved", "assembled"):
            table = estimate(text, by=[*by, "to", "to_index"], value=name, kind="mean", seed=context.seed)
            written[name] = table["value"]
        written["assembled_low"], written["assembled_high"] = table["ci_low"], table["ci_high"]
        return {
            "routes": _ranked(held, ["from_index", "via_index"]),
            "written": _ranked(written, ["from_index", "to_index"]),
        }

    def draw(self, summary: Any) -> Mapping[str, Figure]:
        """Maps of step × route and step × what is written (noising), one panel a mind."""
        from reasoninterp.figures import heatmap

        out: dict[str, Figure] = {}
        for name, x, axis in (("routes", "via", "by way of"), ("written", "to", "what is written")):
            table = summary[name]
            table = table[table["direction"] == "noising"]
            if len(table):
                out[name] = heatmap(table, x, "from", xlabel=axis, ylabel="changed step", unit="effect (nats)")
        return out


def _ways(found: RouteEffects, k: int, labels: Mapping[int, str], anew: float) -> Iterator[tuple[str, int, float]]:
    """The routes of one contrast that there are: label, place among the routes, value."""
    yield TOTAL, -3, float(found.total[k])
    yield DIRECT, -2, float(found.direct[k])
    for column, values in sorted(found.via.items()):
        if torch.isfinite(values[k]):
            yield labels[column], column, float(values[k])
    yield REST, 10_002, float(found.rest[k])
    yield INDIRECT, 10_003, float(found.indirect[k])
    if math.isfinite(anew):
        yield REWRITTEN, 10_004, anew


def _with_shares(rows: pd.DataFrame, by: list[str], shares: Mapping[str, str], seed: int) -> pd.DataFrame:
    """Means with intervals, and their shares of the mean of other columns over the same traces, where that is safe."""
    table = estimate(rows, by=by, value="value", kind="mean", seed=seed)
    groups = rows.groupby(by, sort=False, dropna=False)
    for name, column in shares.items():
        whole = estimate(rows, by=by, value=column, kind="mean", seed=seed)
        safe = (whole["ci_low"] > 0) | (whole["ci_high"] < 0)
        found = [ratio(group["value"], group[column], seed=seed) for _, group in groups]
        for end, values in ((name, "value"), (f"{name}_low", "ci_low"), (f"{name}_high", "ci_high")):
            table[end] = pd.Series([getattr(r, values) for r in found], index=table.index, dtype=float).where(safe)
    return table


def _ranked(table: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """Places among the columns that there are, in place of their orders."""
    for name in names:
        rank = {order: k for k, order in enumerate(sorted(table[name].unique()))}
        table[name] = table[name].map(rank)
    return table
