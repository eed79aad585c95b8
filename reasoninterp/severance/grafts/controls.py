"""Controls for a located set of Units: other sets, and another chain of the same answer.

A set that returns the loss proves little if any set does.  Beside it stand

1. *same size*: sets of as many Units, drawn without replacement from the Units outside the located set;
2. *same norm*: sets whose weight change has about the located set's Frobenius norm, from the same Units: a random order
   is cut off where the norm comes nearest (of `TRIES` random orders, the nearest);
3. *same answer*: the corrupt chain of every contrast is replaced by another trace's chain that implies the *clean*
   answer, and `m = log P(corrupt answer) − log P(clean answer)` is read as before.  What follows the steps has an
   effect near 0 here, before and after any graft; a graft under which it is large restored a response to any change of
   the chain, not reliance on what the chain says.

The share of a control is the mean over its draws; its interval resamples draws and traces together.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import comb
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from reasoninterp.models.context import Context, unaskable
from reasoninterp.severance.grafts.moves import NOT_SAFE, Moves, Way
from reasoninterp.stats import CONFIDENCE, N_RESAMPLES, Estimate, derive_seed
from reasoninterp.traces.answers import same_answer
from reasoninterp.traces.contrast import Contrast, ContrastSet, Refusal, alignment, changed_steps
from reasoninterp.traces.trace import Trace

Match = Literal["size", "norm"]
MATCHES: tuple[Match, Match] = ("size", "norm")
DRAWS = 5
TRIES = 20
NO_SAME_ANSWER = "no other chain that was tried leads to the clean answer"


class Control(NamedTuple):
    """Random sets beside a located one.

    `share` and `share_follow` are means over the sets, with intervals over draws and traces; NaN and n = 0 where no set
    could be drawn.  `norm_ratio` is the mean over sets of their weight change's norm over the located set's.
    """

    match: Match
    sets: tuple[tuple[str, ...], ...]
    share: Estimate
    share_follow: Estimate
    norm_ratio: float


def random_sets(
    norms: Mapping[str, float], located: Sequence[str], *, match: Match = "size", draws: int = DRAWS, seed: int = 0
) -> list[tuple[str, ...]]:
    """Distinct random sets of the Units outside a located set.

    Args:
        norms: norm of the weight change, by Unit; only Units that change are drawn.
        located: the set that they stand beside.
        match: as many Units (`size`), or about as large a weight change (`norm`).
        draws: how many sets; fewer where there are not so many, none where too few Units are left.
        seed: of the draws.
    """
    rest = [name for name, norm in norms.items() if norm > 0 and name not in set(located)]
    size = sum(norms[name] > 0 for name in located)
    if not rest or not size or (match == "size" and len(rest) < size):
        return []
    rng = np.random.default_rng(derive_seed(seed, "random-sets", match, *located))
    most = comb(len(rest), size) if match == "size" else TRIES * draws
    found: dict[frozenset[str], None] = {}
    for _ in range(TRIES * draws):
        if len(found) >= min(draws, most):
            break
        if match == "size":
            drawn = [rest[int(k)] for k in rng.choice(len(rest), size, replace=False)]
        else:
            drawn = _of_norm(norms, rest, float(np.sqrt(sum(norms[n] ** 2 for n in located))), rng)
        found[frozenset(drawn)] = None
    return [tuple(name for name in norms if name in chosen) for chosen in found]


def _of_norm(norms: Mapping[str, float], rest: Sequence[str], wanted: float, rng: np.random.Generator) -> list[str]:
    """Of some random orders the first Units, as many as come nearest to a norm."""
    best: tuple[float, list[str]] = (np.inf, [])
    for _ in range(TRIES):
        order = [rest[int(k)] for k in rng.permutation(len(rest))]
        grown = np.sqrt(np.cumsum([norms[name] ** 2 for name in order]))
        nearest = int(np.abs(np.log(grown / wanted)).argmin())
        gap = float(abs(np.log(grown[nearest] / wanted)))
        if gap < best[0]:
            best = gap, order[: nearest + 1]
        if gap < 0.05:
            break
    return best[1]


def control(moves: Moves, way: Way, located: Sequence[str], match: Match, *, draws: int = DRAWS) -> Control:
    """Random sets beside a located one, moved the same way."""
    sets = random_sets(moves.norms, located, match=match, draws=draws, seed=moves.seed)
    shares = []
    for of in ("effect", "follow"):
        pairs = [moves.gained(way, names, of=of) for names in sets]
        usable = pairs and moves.safe(of)
        shares.append(
            share_over_draws(np.stack([g for g, _ in pairs]), pairs[0][1], seed=moves.seed) if usable else NOT_SAFE
        )
    norm = moves.norm(located)
    ratio = float(np.mean([moves.norm(names) / norm for names in sets])) if sets and norm > 0 else float("nan")
    return Control(match, tuple(sets), shares[0], shares[1], ratio)


def share_over_draws(
    gained: NDArray[np.float64], lost: NDArray[np.float64] | None = None, *, seed: int = 0
) -> Estimate:
    """Mean over draws and traces of what was gained, over the mean of what was lost.

    Args:
        gained: [draw, trace].
        lost: [trace]; None for the mean of `gained` alone.
        seed: of the resampling.

    Returns:
        The ratio, with a percentile interval in which draws and traces are resampled together; n counts traces.
    """
    n_draws, n = gained.shape
    below = np.ones(n) if lost is None else lost
    value = float(gained.mean() / below.mean())
    if n < 2:
        return Estimate(value, np.nan, np.nan, n, "bootstrap")
    rng = np.random.default_rng(derive_seed(seed, "bootstrap", "draws"))
    draws = rng.multinomial(n_draws, np.full(n_draws, 1 / n_draws), size=N_RESAMPLES) / n_draws
    traces = rng.multinomial(n, np.full(n, 1 / n), size=N_RESAMPLES) / n
    with np.errstate(all="ignore"):
        resampled = ((draws @ gained) * traces).sum(1) / (traces @ below)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return Estimate(value, float(low), float(high), n, "bootstrap")


def same_answer_contrasts(context: Context, contrasts: Sequence[Contrast], *, reader: str = "base") -> ContrastSet:
    """For every contrast, the same with a corrupt chain that implies the clean answer: another trace's.

    What a chain implies can depend on the question that it stands under, so a partner is one after whose chain, under
    this question, the mind `reader` (the one with the path) answers the clean answer.

    1. Candidates are traces of the same format with another chain, and with the clean answer or the clean chain's last
       step; in a seeded order that all minds share, those first whose tokens align with the clean chain's.
    2. The reader answers after one candidate of each contrast at a time, at most `TRIES` each.

    `corrupt.answer` stays the contrast's own corrupt answer, so that the same margin is read.  Contrasts without a
    partner are refused.
    """
    memo = ("same answer", reader, tuple(c.id for c in contrasts))
    if memo not in context.memo:
        context.memo[memo] = _partnered(context, contrasts, reader)
    found: ContrastSet = context.memo[memo]
    return found


def _partnered(context: Context, contrasts: Sequence[Contrast], reader: str) -> ContrastSet:
    candidates = {k: _candidates(context, c) for k, c in enumerate(contrasts)}
    found: dict[int, Contrast] = {}
    for attempt in range(TRIES):
        asked = {k: c[attempt] for k, c in candidates.items() if k not in found and attempt < len(c)}
        if not asked:
            break
        with context.open(reader):
            answers = context.read([c.corrupt for c in asked.values()])
        for (k, c), answer in zip(asked.items(), answers, strict=True):
            if answer.says(c.clean.answer):
                found[k] = c
    refused = tuple(Refusal(c.clean.id, NO_SAME_ANSWER) for k, c in enumerate(contrasts) if k not in found)
    return ContrastSet(tuple(found[k] for k in sorted(found)), refused)


def _candidates(context: Context, c: Contrast) -> list[Contrast]:
    """Contrasts with chains that may imply the clean answer, the likeliest first."""
    fit = [i.trace for i in context.items if _can_stand_in(c.clean, i.trace)]
    random.Random(derive_seed(context.seed, c.clean.id, "same answer")).shuffle(fit)
    built = [_with_chain(context, c, t) for t in fit]
    built = [b for b in built if unaskable(b, context.tokenizer, context.end_id) is None]
    return sorted(built, key=lambda b: not b.aligned)


def _can_stand_in(clean: Trace, other: Trace) -> bool:
    return (
        other.id != clean.id
        and other.format == clean.format
        and other.steps != clean.steps
        and bool(other.steps)
        and (same_answer(other.answer, clean.answer) or other.steps[-1:] == clean.steps[-1:])
    )


def _with_chain(context: Context, c: Contrast, other: Trace) -> Contrast:
    corrupt = c.clean.with_steps(other.steps, answer=c.corrupt.answer)
    aligned = alignment(context.encode(c.clean), context.encode(corrupt)) is None
    changed = changed_steps(c.clean.steps, corrupt.steps)
    return replace(c, id=f"{c.clean.id}/same answer", kind="swap", corrupt=corrupt, changed=changed, aligned=aligned)
