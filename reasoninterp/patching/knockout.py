"""Attention knockout: cut edges from queries to keys, and read what the network loses.

1. An `Edge` says which query positions may no longer read which key positions, in which layers and heads.  Its
   pre-softmax scores become the dtype's minimum, so that their pattern is 0 and the rest of the row renormalises.
2. The first token stays visible (`keep_first`): it is where attention that reads nothing goes, and a query needs some
   key.  So "everything but the first token" can be knocked out.  Without `keep_first`, cutting a query's last key is
   refused.
3. For each cell (a set of edges cut together, in one item): `KL(base ‖ knocked)` in bits over the whole vocabulary
   that all minds share, at every position that is read, from float64 log-softmaxes; and the change of the margin
   `m = log P(corrupt answer) − log P(clean answer)` (nats) where the item has a pair of answers.
4. What causality fixes is not left to rounding: logits before the first query that is cut are the base's own, and a
   cell that cuts nothing, or nothing before what is read, is not run.
5. Each cell's rows are lanes that leave the uncut run at the first layer and the first query that are cut, and
   climb together (`staircase`).  Networks that cannot be driven so run whole forward passes, in which edges in all
   layers and heads are one additive mask, and others are written into `attn_scores` layer by layer.

After Geva et al. 2023 (arXiv:2304.14767).  The exact divergence matters: over a truncated vocabulary one missing token
makes it arbitrarily large.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import log
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from reasoninterp.errors import UserError
from reasoninterp.models.body import Body
from reasoninterp.models.packed import supported
from reasoninterp.models.read import MarginPlan, margins_from_logits
from reasoninterp.patching.attention_edges import (
    EdgeSet,
    check_obeys,
    edge_hooks,
    edge_mask,
    has_windows,
    settle,
)
from reasoninterp.patching.lanes import Lanes
from reasoninterp.patching.staircase import LaneCut, climb
from reasoninterp.patching.store import record

MAX_LOGITS = 2**28  # logits of one batch: 1 GiB in float32
KL_BLOCK = 2**24


@dataclass(frozen=True)
class KnockoutResult:
    """What cells lose, on the CPU.

    Attributes:
        kl: `KL(base ‖ knocked)` in bits, at the positions that are read in the item's first row; for a contrast the
            first of them is the prompt's last token, where the answer is read.
        margin: the margin after the cut, in nats; NaN for an item without answers.
        base_margin: the margin of the uncut run, likewise.
    """

    kl: Float64[Tensor, "cell read"]
    margin: Float[Tensor, " cell"]
    base_margin: Float[Tensor, " cell"]


def reading_plan(rows: Sequence[Sequence[int]], reads: Sequence[Sequence[int]]) -> MarginPlan:
    """Rows of token ids to read at some positions, without answers: one item a row.

    Args:
        rows: token ids, of any lengths (padded on the right).
        reads: positions to read in each row, at least one; shorter lists are padded by repeating their last.

    Raises:
        UserError: a row in which nothing is read, or a position outside its row.
    """
    for k, (row, read) in enumerate(zip(rows, reads, strict=True)):
        if not len(read) or min(read) < 0 or max(read) >= len(row):
            raise UserError(f"reads[{k}]: give at least one position, each in a row of {len(row)} tokens.")
    longest, widest = max(map(len, rows), default=0), max(map(len, reads), default=0)
    ids = torch.tensor([[*r, *[0] * (longest - len(r))] for r in rows], dtype=torch.long)
    positions = torch.tensor([[*r, *[r[-1]] * (widest - len(r))] for r in reads], dtype=torch.long)
    none = torch.zeros(0, dtype=torch.long)
    return MarginPlan(ids, positions, none, none, none, none, none, torch.arange(len(rows)), len(rows))


def knockout(
    body: Body,
    plan: MarginPlan,
    cells: Sequence[EdgeSet],
    item_of_cell: Sequence[int],
    *,
    keep_first: bool = True,
    max_rows: int = 32,
) -> KnockoutResult:
    """Cut the edges of each cell in its item's rows and read what changes.

    Args:
        body: the mind that is read.
        plan: the rows: `reading_plan(...)`, or one side of a contrast plan, `contrast_plan(...).sides[side]`.
        cells: edges that are cut together.
        item_of_cell: the item of the plan that each cell cuts.
        keep_first: never cut the first token as a key.
        max_rows: at most so many rows in one forward pass (fewer where the logits would not fit).

    Raises:
        UserError: a layer, head or position that is not there; a query left without a key; an architecture whose
            scores cannot be edited.
    """
    if len(cells) != len(item_of_cell):
        raise UserError(f"item_of_cell has {len(item_of_cell)} entries for {len(cells)} cells; give one for each cell.")
    length = plan.ids.shape[1]
    settled = [settle(body, edges, length, keep_first=keep_first, name=f"cells[{k}]") for k, edges in enumerate(cells)]
    if any(settled):
        check_obeys(body)
    rows_of = [(plan.item_of_row == item).nonzero()[:, 0].tolist() for item in range(plan.n_items)]
    kl = torch.zeros(len(cells), plan.positions.shape[1], dtype=torch.float64)
    margin, base_margin = torch.full((2, len(cells)), float("nan")).unbind(0)
    runs = _Plain(body, plan) if supported(body) else _Restarted(body, plan, settled)
    room = max(1, min(max_rows, MAX_LOGITS // max(1, plan.positions.shape[1] * body.n_vocab_shared)))
    for chunk in _chunks(item_of_cell, rows_of, room):
        rows = torch.tensor([row for k in chunk for row in rows_of[item_of_cell[k]]])
        counts = [len(rows_of[item_of_cell[k]]) for k in chunk]
        edges = [settled[k] for k, n in zip(chunk, counts, strict=True) for _ in range(n)]
        before = runs.base(rows)
        after = _after(runs, plan, edges, rows, before)
        first = torch.tensor([0, *counts]).cumsum(0)[:-1]
        kl[chunk] = torch.stack([kl_bits(before[r], after[r]).cpu() for r in first.tolist()])
        tiles = _tile(plan, [item_of_cell[k] for k in chunk], rows_of)
        asked = torch.zeros(len(chunk), dtype=torch.bool).index_fill(0, tiles.item, True)
        for found, logits in ((margin, after), (base_margin, before)):
            values = margins_from_logits(tiles, logits).margin.float().cpu()
            found[chunk] = torch.where(asked, values, torch.nan)
    return KnockoutResult(kl, margin, base_margin)


def knocked_logits(
    body: Body,
    ids: Int[Tensor, "row pos"],
    positions: Int[Tensor, "row read"],
    cells: Sequence[EdgeSet],
    row_of_cell: Sequence[int],
) -> Float[Tensor, "cell read vocab"]:
    """Logits at `positions` of each cell's row with the cell's edges cut, from one whole forward pass.

    Edges are cut as they stand (see `settle`).

    Args:
        body: the mind that is read.
        ids: token ids, padded on the right.
        positions: positions to read in each row, not negative.
        cells: edges of each cell.
        row_of_cell: the row of `ids` that each cell cuts.
    """
    rows = torch.as_tensor(row_of_cell, dtype=torch.long)
    at = positions[rows]
    stop = int(at.max()) + 1  # nothing behind the last position that is read can reach it
    some = ids[rows, :stop]
    if not any(cells):
        return body.forward(some, positions=at)
    whole = all(edge.layers is None and edge.heads is None for edges in cells for edge in edges)
    if whole and not has_windows(body.config):
        return body.forward(some, positions=at, attention_mask=edge_mask(cells, stop, body.dtype))
    return body.forward(some, positions=at, hooks=edge_hooks(cells, body.n_layers))


def kl_bits(before: Float[Tensor, "... vocab"], after: Float[Tensor, "... vocab"]) -> Float64[Tensor, ...]:
    """`KL(before ‖ after)` of the softmaxes of two sets of logits, in bits, in float64; never below 0."""
    vocab = before.shape[-1]
    block = max(1, KL_BLOCK // vocab)  # so that the float64 copies stay small beside the logits
    parts = []
    for x, y in zip(before.reshape(-1, vocab).split(block), after.reshape(-1, vocab).split(block), strict=True):
        p, q = x.double().log_softmax(-1), y.double().log_softmax(-1)
        parts.append((p.exp() * (p - q)).sum(-1) / log(2))
    # Rounding alone could make the sum of nearly equal distributions negative.
    return torch.cat(parts).reshape(before.shape[:-1]).clamp(min=0)


@runtime_checkable
class _Runs(Protocol):
    """Logits of the plan's rows, uncut and cut."""

    def base(self, rows: Int[Tensor, " cell"]) -> Float[Tensor, "cell read vocab"]:
        """Uncut."""

    def cut(self, edges: Sequence[EdgeSet], rows: Sequence[int]) -> Float[Tensor, "cell read vocab"]:
        """With a cell's edges cut; what is read before its first query is not used."""


class _Plain:
    """Whole forward passes; an uncut row is run once as long as cells come sorted by item."""

    def __init__(self, body: Body, plan: MarginPlan) -> None:
        self.body, self.plan = body, plan
        self.kept: dict[int, Tensor] = {}

    def base(self, rows: Int[Tensor, " cell"]) -> Float[Tensor, "cell read vocab"]:
        wanted = list(dict.fromkeys(rows.tolist()))
        self.kept = {row: self.kept[row] for row in wanted if row in self.kept}
        missing = [row for row in wanted if row not in self.kept]
        if missing:
            logits = self.cut([()] * len(missing), missing)
            self.kept.update(zip(missing, logits, strict=True))
        return torch.stack([self.kept[row] for row in rows.tolist()])

    def cut(self, edges: Sequence[EdgeSet], rows: Sequence[int]) -> Float[Tensor, "cell read vocab"]:
        return knocked_logits(self.body, self.plan.ids, self.plan.positions, edges, rows)


class _Restarted:
    """Cells as lanes that leave the stored uncut run at their first cut layer and query."""

    def __init__(self, body: Body, plan: MarginPlan, settled: Sequence[EdgeSet]) -> None:
        self.body, self.plan = body, plan
        self.stops = plan.positions.max(1).values.numpy() + 1
        layers = {_first_layer(edges) for edges in settled if edges}
        wanted = {("resid_pre", layer) for layer in layers}
        self.store = record(body, plan.ids, self.stops, plan.positions, wanted)

    def base(self, rows: Int[Tensor, " cell"]) -> Float[Tensor, "cell read vocab"]:
        return self.body.logits(self.store.hidden[rows.to(self.body.device)])

    def cut(self, edges: Sequence[EdgeSet], rows: Sequence[int]) -> Float[Tensor, "cell read vocab"]:
        row = np.array(rows, dtype=np.int64)
        start = np.array([min(e.queries.start for e in some) for some in edges], dtype=np.int64)
        join = np.array([_first_layer(some) for some in edges], dtype=np.int64)
        every = tuple(range(self.body.n_layers))
        cuts = [
            LaneCut(k, e.layers or every, (e.queries.start, e.queries.stop), (e.keys.start, e.keys.stop), e.heads)
            for k, some in enumerate(edges)
            for e in some
        ]
        lanes = Lanes(row, start, self.stops[row], join)
        out = self.body.logits(self.store.hidden[row])
        for mine, hidden in climb(self.body, self.store, lanes, None, None, self.plan.positions, cuts=cuts):
            out[torch.as_tensor(mine)] = self.body.logits(hidden)
        return out


def _first_layer(edges: EdgeSet) -> int:
    return min(min(e.layers) if e.layers else 0 for e in edges)


def _after(
    runs: _Runs, plan: MarginPlan, edges: Sequence[EdgeSet], rows: Tensor, before: Tensor
) -> Float[Tensor, "row read vocab"]:
    """Logits after the cut, the base's own wherever no query that was cut can reach."""
    after = before.clone()
    first = torch.tensor([min((e.queries.start for e in some), default=plan.ids.shape[1]) for some in edges])
    reached = plan.positions[rows] >= first[:, None]
    live = reached.any(1).nonzero()[:, 0].tolist()
    if live:
        found = runs.cut([edges[r] for r in live], rows[live].tolist())
        where = reached[live][..., None].to(found.device)
        after[live] = torch.where(where, found, before[live])
    return after


def _chunks(item_of_cell: Sequence[int], rows_of: Sequence[Sequence[int]], room: int) -> Iterator[list[int]]:
    """Cells, sorted by item, in chunks of at most `room` rows (at least one cell each)."""
    chunk: list[int] = []
    used = 0
    for k in sorted(range(len(item_of_cell)), key=lambda k: item_of_cell[k]):
        n = len(rows_of[item_of_cell[k]])
        if chunk and used + n > room:
            yield chunk
            chunk, used = [], 0
        chunk.append(k)
        used += n
    if chunk:
        yield chunk


def _tile(plan: MarginPlan, items: Sequence[int], rows_of: Sequence[Sequence[int]]) -> MarginPlan:
    """The plan with an item, and its rows, for each entry of `items` (which may repeat)."""
    pairs = [(k, row) for k, item in enumerate(items) for row in rows_of[item]]
    owner, rows = torch.tensor(pairs, dtype=torch.long).unbind(1)
    # For every new row, the tokens read in the row that it repeats.
    row, token = (plan.read_row == rows[:, None]).nonzero(as_tuple=True)
    slot, target, part = plan.read_slot[token], plan.target[token], plan.part[token]
    return MarginPlan(plan.ids[rows], plan.positions[rows], row, slot, target, owner[row], part, owner, len(items))
