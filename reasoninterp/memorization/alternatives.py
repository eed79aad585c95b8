"""A token's alternatives: what else a mind might have written in its place, and how probable each was.

1. The token at position t of a row is predicted by the logits at t − 1, from `row[:t]` alone; that one distribution is
   what everything in this room is about.  A `Place` holds a row and t, so that nobody counts positions twice.
2. The alternatives are the `k` most probable ids (ties by id), and the token itself as one more where it is not among
   them.  Every source uses all of them: 20 or 21 at k = 20.  (STIM's code drops the 21st for two of its three sources.)
3. Log-probabilities are natural logarithms over the whole vocabulary that all minds share, from float64 log-softmaxes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Float64, Int64

from reasoninterp.errors import UserError
from reasoninterp.traces.trace import Span, TokenTrace

if TYPE_CHECKING:
    from reasoninterp.models.body import Body

K = 20
MAX_LOGITS = 2**26  # logits of one forward pass: 256 MiB in float32


class Place(NamedTuple):
    """A token of a row: the row's ids and the token's position, from 1 (nothing predicts the first token)."""

    row: tuple[int, ...]
    position: int

    @property
    def context(self) -> tuple[int, ...]:
        """The tokens before it."""
        return self.row[: self.position]

    @property
    def target(self) -> int:
        """Its id."""
        return self.row[self.position]


@dataclass(frozen=True)
class Alternatives:
    """The alternatives of one token, most probable first.

    Attributes:
        ids: their ids.
        log_probs: their log-probabilities in nats.
        target: the id of the token that was written; it is one of `ids`.
        rank: how many ids of the whole vocabulary were more probable than it.
    """

    ids: Int64[np.ndarray, " alt"]
    log_probs: Float64[np.ndarray, " alt"]
    target: int
    rank: int

    @property
    def surprise(self) -> float:
        """−log₂ P(target), in bits."""
        return -float(self.log_probs[self.ids == self.target][0]) / log(2)


def pick(log_probs: Float64[np.ndarray, " vocab"], target: int, k: int = K) -> Alternatives:
    """The alternatives in a distribution.

    Raises:
        UserError: k below 1, or a target outside the vocabulary.
    """
    if k < 1:
        raise UserError(f"k: {k} alternatives; give at least 1.")
    if not 0 <= target < len(log_probs):
        raise UserError(f"target: the id {target} is none of the {len(log_probs)} that the minds share.")
    k = min(k, len(log_probs))
    least = np.partition(log_probs, -k)[-k]
    enough = np.flatnonzero(log_probs >= least)
    ids = enough[np.lexsort((enough, -log_probs[enough]))][:k]
    if target not in ids:
        ids = np.append(ids, target)
    rank = int((log_probs > log_probs[target]).sum())
    return Alternatives(ids.astype(np.int64), log_probs[ids], int(target), rank)


def read_alternatives(body: Body, places: Sequence[Place], *, k: int = K, max_rows: int = 32) -> list[Alternatives]:
    """The alternatives of each place, in order; every row is run once.

    Args:
        body: the mind that is read.
        places: tokens of any rows.
        k: how many of the most probable ids.
        max_rows: at most so many rows in one forward pass.

    Raises:
        UserError: a position outside its row, or the first one; or as `pick`.
    """
    import torch

    from reasoninterp.patching.knockout import reading_plan

    check_places(places)
    by_row: dict[tuple[int, ...], list[int]] = {}
    for i, place in enumerate(places):
        by_row.setdefault(place.row, []).append(i)
    found: dict[int, Alternatives] = {}
    rows = sorted(by_row, key=len)
    most = max((len(at) for at in by_row.values()), default=1)
    room = max(1, min(max_rows, MAX_LOGITS // (most * body.n_vocab_shared)))
    for start in range(0, len(rows), room):
        chunk = rows[start : start + room]
        plan = reading_plan(chunk, [[places[i].position - 1 for i in by_row[row]] for row in chunk])
        logits = body.forward(plan.ids, positions=plan.positions)
        for row, read in zip(chunk, logits, strict=True):
            for i, line in zip(by_row[row], read, strict=False):  # shorter lists of positions were padded
                found[i] = pick(line.to(torch.float64).log_softmax(-1).cpu().numpy(), places[i].target, k)
    return [found[i] for i in range(len(places))]


def chain_places(tokens: TokenTrace) -> list[Place]:
    """The tokens of a trace's steps, in order, without the separators between them."""
    inside = [position for step in tokens.steps for position in range(step.start, step.stop)]
    return [Place(tokens.ids, position) for position in inside if position > 0]


def parts_before(tokens: TokenTrace, position: int) -> tuple[Span, Span]:
    """The spans of the question and of the chain so far (steps and separators), as far as they lie before a position."""
    question, chain = (Span(min(s.start, position), min(s.stop, position)) for s in (tokens.question, tokens.chain))
    return question, chain


def check_places(places: Sequence[Place]) -> None:
    """Refuse places that nothing predicts.

    Raises:
        UserError: names the place.
    """
    for i, (row, position) in enumerate(places):
        if not 1 <= position < len(row):
            raise UserError(
                f"places[{i}]: position {position} of a row of {len(row)} tokens; give one from 1 up, since nothing "
                "predicts the first token."
            )
