"""What the answers alone say: the word, how far a path is gone, and which traces were not used.

1. Two minds with the same weights are *intact*, whatever the traces.
2. A base at floor, or that does not follow its own steps, or too few swaps: *not interpretable* (`verdict`).
3. The word that the follow rates give (`verdict.word_of`), with severed told apart from overridden (`rival`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, NamedTuple, cast

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from reasoninterp.models.context import Context, Item
from reasoninterp.severance.location.rival import RETURNED, Answers, Told, rival_table, share_returned, tell_apart
from reasoninterp.severance.verdict import (
    MIN_BASE_FOLLOW,
    MIN_TRACES,
    Problem,
    counted,
    not_interpretable,
    percent,
    word_of,
)
from reasoninterp.stats import proportion
from reasoninterp.traces.contrast import Refusal

INTACT, NOT_INTERPRETABLE = "intact", "not interpretable"
SAME_WEIGHTS = "the two minds have the same weights"


class Judged(NamedTuple):
    """The word, how severed and overridden were told apart, the rival's table, and what is wrong with the traces."""

    word: str
    told: Told | None
    rival: pd.DataFrame
    problem: Problem | None
    notes: tuple[str, ...]
    same: bool


def judge(context: Context, read: dict[tuple[str, str], Answers], base: str, tuned: str) -> Judged:
    """The word of two minds' answers.

    Args:
        context: the minds, and the traces for chance.
        read: answers by (mind, traces): `with` the rival and, if read, `without`.
        base: the mind with the path.
        tuned: the mind in which it may be lost.
    """
    a, b = read[base, "with"], read[tuned, "with"]
    free = (read.get((base, "without")), read.get((tuned, "without")))
    table = rival_table(a, b, *free, seed=context.seed)
    if same_weights(context, base, tuned):
        return Judged(INTACT, None, table, None, (SAME_WEIGHTS,), True)
    follow, right = proportion(a.follow), proportion(a.right)
    floor = None
    if follow.n >= MIN_TRACES and not right.ci_low > context.chance():
        floor = f"{percent(right.value)} right with the chain whole, n = {right.n}, chance {context.chance():.2f}"
    if problem := not_interpretable(base, follow, floor):
        return Judged(NOT_INTERPRETABLE, None, table, problem, (), False)
    notes = []
    if free[0] is not None and not proportion(free[0].follow).ci_low >= MIN_BASE_FOLLOW:
        notes.append(f"without the rival, {base} is not shown to follow its steps: those traces were not used")
        table = table[table["quantity"] != RETURNED].reset_index(drop=True)
    word, _ = word_of(a.follow, b.follow, b.neither)
    if word not in ("severed", "weakened"):
        word = INTACT if word == "no damage found" else word
        return Judged(word, None, table, None, tuple(notes), False)
    told = tell_apart(cast(Literal["severed", "weakened"], word), table)
    return Judged(told.word, told, table, None, tuple(notes), False)


def same_weights(context: Context, base: str, tuned: str) -> bool:
    """Whether no weight differs between two minds."""
    return not any(bool((change != 0).any()) for _, change in context.minds.delta(base, tuned))


def severance_score(base: Answers, tuned: Answers, rival: pd.DataFrame) -> float:
    """How far a path that was there is gone, from 0 to 1: the lost share of the follow rate times the lost share of E.

    Times the share of swaps that the tuned mind answers with one of the two answers (a mind that lost its answers is
    damaged, not severed), and times what did not return without the rival.
    """
    follow, effect = lost_share(base.follow, tuned.follow), lost_share(base.effect, tuned.effect)
    return float(follow * effect * (1 - tuned.neither) * (1 - share_returned(rival)))


def lost_share(base: NDArray[np.float64], tuned: NDArray[np.float64]) -> float:
    """Share of the base's mean that is lost, within 0 and 1; NaN where the base's is not above 0."""
    return float(np.clip(1 - tuned.mean() / base.mean(), 0, 1)) if len(base) and base.mean() > 0 else float("nan")


def first_items(items: Sequence[Item], most: int) -> list[Item]:
    """The first items that have a contrast or a swap, each kind at most `most` times."""
    n = {"contrast": 0, "swap": 0}
    out = []
    for item in items:
        use = {}
        for kind in n:
            if getattr(item, kind) is not None and n[kind] < most:
                use[kind] = getattr(item, kind)
                n[kind] += 1
        if use:
            out.append(replace(item, contrast=use.get("contrast"), swap=use.get("swap")))
    return out


def left_out(items: Sequence[Item], most: int, refused: Sequence[Refusal] = (), *, what: str = "trace") -> list[str]:
    """Which traces were not read, and why.

    Args:
        items: all traces.
        most: how many were read of each kind.
        refused: why some of them have no contrast.
        what: the word for one of them.
    """
    out = []
    for kind in ("contrast", "swap"):
        without = {i.id for i in items if getattr(i, kind) is None}
        if (n := len(items) - len(without)) > most:
            out.append(f"of {counted(n, what)} with a {kind} the first {most} were read (most_contrasts)")
        if without:
            mine = [r.reason for r in refused if r.trace_id in without]
            reasons = Counter(r.removeprefix("swap: ") for r in mine if r.startswith("swap: ") == (kind == "swap"))
            said = f" ({', '.join(f'{n} {reason}' for reason, n in reasons.most_common(3))})" if reasons else ""
            out.append(f"{len(without)} of {counted(len(items), what)} gave no {kind}{said}")
    return out
