"""Other traces as sources: which trace stands in for a contrast, and where its columns lie.

For each contrast the partner is drawn, by a seed that every mind and batch shares, among the other traces of the
context: with `same_answer` those whose answer is the one that the source run implies, with `random` those with neither
of the contrast's answers; among them, first those whose columns have the contrast's lengths.  A cell fits where its column
has as many tokens in the partner.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

from reasoninterp.models.context import Context
from reasoninterp.patching.cells import Cells, Sites, spans_of
from reasoninterp.patching.lanes import Ints
from reasoninterp.stats import derive_seed
from reasoninterp.traces.answers import same_answer
from reasoninterp.traces.contrast import Contrast
from reasoninterp.traces.trace import TokenTrace


@dataclass(frozen=True)
class Partner:
    """Rows of the partners, and per cell the row, the shift of positions, and whether the column fits."""

    ids: Int[Tensor, "row pos"]
    lengths: Ints
    row: Ints
    shift: Ints
    fits: NDArray[np.bool_]


def partners(
    context: Context,
    contrasts: Sequence[Contrast],
    tokens: Sequence[TokenTrace],
    cells: Cells,
    sites: Sites,
    how: str,
    source_side: int,
) -> Partner:
    """A partner for every contrast; `source_side` says whose answer (0 clean, 1 corrupt) the source run implies."""
    pool = [(item, context.encode(item.trace)) for item in context.items]
    chosen: list[TokenTrace | None] = []
    for contrast, mine in zip(contrasts, tokens, strict=True):
        implied = (contrast.clean, contrast.corrupt)[source_side].answer
        answers = (contrast.clean.answer, contrast.corrupt.answer)
        lengths = [len(c.span) for c in spans_of(mine, sites.spans)]
        fit = []
        for item, theirs in pool:
            answer = item.trace.answer
            same = same_answer(answer, implied)
            wanted = same if how == "same_answer" else not any(same_answer(answer, a) for a in answers)
            if wanted and item.trace.id != contrast.clean.id:
                fit.append(([len(c.span) for c in spans_of(theirs, sites.spans)] == lengths, theirs))
        best = [t for exact, t in fit if exact] or [t for _, t in fit]
        draw = random.Random(derive_seed(context.seed, contrast.clean.id, "partner", how))
        chosen.append(draw.choice(best) if best else None)
    return _table(chosen, cells, sites)


def _table(chosen: Sequence[TokenTrace | None], cells: Cells, sites: Sites) -> Partner:
    lengths = np.array([max(1, t.answer.start) if t else 1 for t in chosen], dtype=np.int64)
    ids = torch.zeros(len(chosen), int(lengths.max()), dtype=torch.long)
    spans = []
    for row, t in enumerate(chosen):
        if t is not None:
            ids[row, : lengths[row]] = torch.tensor(t.prompt_ids)
        spans.append({c.order: c.span for c in spans_of(t, sites.spans)} if t is not None else {})
    contrast = cells.table["contrast"].to_numpy()
    order = cells.table["column_index"].to_numpy()
    shift, fits = np.zeros(len(contrast), dtype=np.int64), np.zeros(len(contrast), dtype=bool)
    for k, (c, o) in enumerate(zip(contrast.tolist(), order.tolist(), strict=True)):
        span = spans[c].get(o)
        if span is not None and len(span) == cells.stop[k] - cells.start[k] > 0:
            shift[k], fits[k] = span.start - cells.start[k], True
    return Partner(ids, lengths, contrast, shift, fits)
