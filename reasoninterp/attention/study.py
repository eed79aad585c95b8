"""The study `attention-map`: which steps each step, and the answer, attend to, per layer and head, for each mind.

Sources are the columns of `patching.columns` (they partition the prompt).  Destinations are the steps and the token at
which the answer is read, called `answer position`.  Kinds: those of `maps`, and `gradient` (gradient × attention, nats,
in the run over the clean chain; negative speaks for the clean answer) where the trace has a contrast.  Each map of
attention stands there with its sinks (`kept`) and without them (`excluded`, nothing renormalised); what was taken for
a sink is in `attention_sinks`.  Cells that causality forbids have no row.

Attention is not evidence of use; it shows where to look with knockout and patching.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from reasoninterp.attention.gradient import gradient_maps
from reasoninterp.attention.grid import SpanGrid, span_grid
from reasoninterp.attention.maps import AttentionMaps, attention_maps
from reasoninterp.attention.rollout import rollout_maps
from reasoninterp.attention.sinks import SinkRule, kinds_of_rows
from reasoninterp.attention.tables import (
    GRADIENT,
    MAP_KINDS,
    answer_heatmap,
    summarise_maps,
    summarise_rollout,
    summarise_sinks,
)
from reasoninterp.errors import UserError
from reasoninterp.models.context import Context
from reasoninterp.patching.columns import ANSWER, QUESTION, Column, columns
from reasoninterp.patching.metric import CLEAN, contrast_plan
from reasoninterp.study import Batch, Cell, Row, Study
from reasoninterp.traces.trace import Span, Trace

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Prepared(NamedTuple):
    """Traces as rows: ids padded on the right, their columns and the spans that read and are read."""

    ids: Int[Tensor, "row pos"]
    columns: list[list[Column]]
    destinations: list[list[Column]]
    grid: SpanGrid
    prompts: list[tuple[int, ...]]


def prepare(context: Context, traces: Sequence[Trace], *, steps: bool = True) -> Prepared:
    """Prompts of some traces with their columns; `steps` makes each step a destination beside the answer position."""
    encoded = [context.encode(trace) for trace in traces]
    sources = [columns(tokens) for tokens in encoded]
    reading = []
    for tokens, table in zip(encoded, sources, strict=True):
        stop = tokens.answer.start
        own = [c for c in table if c.label not in (QUESTION, ANSWER)] if steps else []
        reading.append([*own, Column(ANSWER, 10_001, Span(stop - 1, stop))])
    prompts = [tokens.prompt_ids for tokens in encoded]
    rows = [torch.tensor(ids, dtype=torch.long) for ids in prompts]
    grid = span_grid(
        [[c.span for c in table] for table in sources],
        [[c.span for c in table] for table in reading],
        [len(ids) for ids in prompts],
    )
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return Prepared(ids, sources, reading, grid, prompts)


class AttentionMap(Study):
    """Step-to-step and step-to-answer attention per head: plain, value-weighted, gradient × attention, rollout, sinks.

    Parameters:
        max_traces: at most so many traces a mind.
        steps: read step-to-step attention too, not only the answer's.
        gradient: gradient × attention where a trace has a contrast.
        sink_share: a first token or delimiter is a sink in a head where it receives more than this on average.
    """

    max_traces: int = 128
    steps: bool = True
    gradient: bool = True
    sink_share: float = 0.3

    def cells(self, context: Context) -> Iterable[Cell]:
        """Every mind × trace, up to `max_traces`."""
        for mind in context.minds.names:
            for item in context.items[: self.max_traces]:
                yield context.cell(mind, item)

    def measure(self, context: Context, batch: Batch) -> Iterable[Row]:
        """Rows of three sorts (`what`): `map` per layer, head, destination and source; `rollout`; `sink`."""
        made = prepare(context, [cell.item.trace for cell in batch], steps=self.steps)
        rule = SinkRule(share=self.sink_share)
        kinds = kinds_of_rows(made.prompts, context.tokenizer, rule)
        maps = attention_maps(context.body, made.ids, made.grid, kinds=MAP_KINDS, sinks=rule, token_kinds=kinds)
        rolled = rollout_maps(context.body, made.ids, made.grid)[-1]
        gradients = self._gradients(context, batch, made)
        for row, cell in enumerate(batch):
            yield from _map_rows(cell, row, made, maps, gradients.get(row))
            yield from _rollout_rows(cell, row, made, rolled)
            yield from _sink_rows(cell, row, made, maps, context)

    def summarise(self, rows: pd.DataFrame, context: Context) -> dict[str, pd.DataFrame]:
        """Means over traces with intervals.

        `attention_map`: one row per mind, layer, head, destination, source, kind and treatment of sinks.  `p` is the
        sign-flip p-value of a gradient's mean (attention itself cannot be negative and has no such null), `p_bh`
        corrected over the layers and heads of one mind, destination and source.  `attention_rollout`: per mind,
        destination and source.  `attention_sinks`: per mind, layer, head and token, the mean share received in the
        `traces` (of `n`) in which it is heavy; kind `content` is heavy but no sink.
        """
        parts = {what: rows[rows["what"] == what] if len(rows) else rows for what in ("map", "rollout")}
        return {
            "attention_map": summarise_maps(parts["map"], context.seed),
            "attention_rollout": summarise_rollout(parts["rollout"], context.seed),
            "attention_sinks": summarise_sinks(rows),
        }

    def draw(self, summary: dict[str, pd.DataFrame]) -> dict[str, Figure]:
        """Heads × columns: what the answer position attends to, plain and value-weighted, for each mind."""
        table = summary["attention_map"]
        return {"attention_map": answer_heatmap(table)} if len(table) else {}

    def _gradients(self, context: Context, batch: Batch, made: Prepared) -> dict[int, Tensor]:
        """Gradient × attention [layer, head, dst, src] by the row of the batch; rows without contrast have none."""
        live = [k for k, cell in enumerate(batch) if cell.item.contrast is not None]
        if not self.gradient or not live:
            return {}
        plan = contrast_plan(context, [batch[k].item.contrast for k in live])
        if list(plan.prompts[CLEAN]) != [made.prompts[k] for k in live]:
            raise UserError("items: a contrast's clean chain is not its item's trace; make contrasts from the traces.")
        answers = [len(made.destinations[k]) - 1 for k in live]
        maps = gradient_maps(context.body, plan, made.grid.take(live), answer=answers)
        return {row: maps[:, k] for k, row in enumerate(live)}


def _cells_of(made: Prepared, row: int) -> Iterator[tuple[int, int, dict[str, object]]]:
    """Places of a row's destinations and sources where there is a value, with the labels of a table's row."""
    visible = made.grid.visible
    for d, destination in enumerate(made.destinations[row]):
        for s, source in enumerate(made.columns[row]):
            if visible[row, d, s]:
                yield (
                    d,
                    s,
                    {
                        "destination": destination.label,
                        "destination_index": destination.order,
                        "source": source.label,
                        "source_index": source.order,
                    },
                )


def _map_rows(cell: Cell, row: int, made: Prepared, maps: AttentionMaps, gradient: Tensor | None) -> Iterator[Row]:
    kept = {kind: maps.kept[kind][:, row].tolist() for kind in MAP_KINDS}
    rest = {f"{kind}_x": maps.excluded[kind][:, row].tolist() for kind in MAP_KINDS}
    every = {**kept, **rest}
    if gradient is not None:
        every[GRADIENT] = gradient.tolist()
    n_heads = maps.kept["plain"].shape[2]
    for d, s, labels in _cells_of(made, row):
        for k, layer in enumerate(maps.layers):
            for head in range(n_heads):
                values = {name: grid[k][head][d][s] for name, grid in every.items()}
                values.setdefault(GRADIENT, np.nan)
                yield cell.row(what="map", layer=layer, head=head, **labels, **values)


def _rollout_rows(cell: Cell, row: int, made: Prepared, rolled: Tensor) -> Iterator[Row]:
    for d, s, labels in _cells_of(made, row):
        yield cell.row(what="rollout", **labels, plain=float(rolled[row, d, s]))


def _sink_rows(cell: Cell, row: int, made: Prepared, maps: AttentionMaps, context: Context) -> Iterator[Row]:
    for found in maps.heavy:
        if found.row == row:
            token = context.tokenizer.decode([made.prompts[row][found.position]])
            yield cell.row(
                what="sink",
                layer=found.layer,
                head=found.head,
                kind=found.kind,
                token=repr(token),
                position=found.position,
                plain=found.received,
            )
