"""Locate: was the path from the steps to the answer cut between two minds, where, and how; in one call.

1. *Read* both minds: E on contrasts, and the answers that they give after swapped chains and after whole ones
   (`answers`).  The words are those of `verdict`: a base at floor, or that does not follow its own steps, or of which
   fewer than `MIN_TRACES` swaps can be read, is *not interpretable*; a loss of follow rate under `MARGIN` is *intact*.
   Either ends here: there is nothing to locate.
2. *Severed or overridden*, by E underneath and, where traces without the rival are given, by what returns (`rival`).
3. *Align* the tuned mind's gauge with the base's (`align`), since the straight path in weight space depends on it.
4. *Ledger* along that path (`integrate`) of E, or, of an overridden path, of the margin after the corrupt chain.
5. *Grafts* of single Units both ways, of at most `MOST_SINGLES` that lead the ledger (`moves`), and from both the
   smallest restoring and the smallest cutting set with alternatives (`smallest`).  Shares are of the lost E; where E is
   not lost (overridden) or its loss not safely away from zero, of the lost follow rate between the two answers.
6. *Rank* all Units of the level (`rank`), name the *mechanism* (`mechanism`), and say it, with what would have reversed
   each sentence (`words`).

Costs are passes over both chains of all contrasts in one mind.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, NamedTuple, cast

import numpy as np
import pandas as pd

from reasoninterp.errors import UserError
from reasoninterp.models.context import Context, Item
from reasoninterp.models.units import LEVELS, Level, units
from reasoninterp.severance.gauge.align import Alignment
from reasoninterp.severance.gauge.align import align as align_gauges
from reasoninterp.severance.grafts.moves import Moves, Way
from reasoninterp.severance.ledger.integrate import Integral, integrate
from reasoninterp.severance.location import words as say
from reasoninterp.severance.location.answers import answer_table, read_answers
from reasoninterp.severance.location.confidence import Confidence, confidence
from reasoninterp.severance.location.direct_logits import corrupt_margin, direct_contributions, direct_table
from reasoninterp.severance.location.location import Costs, LocatedSet, Location
from reasoninterp.severance.location.mechanism import Mechanism, mechanism, shortcut_wins
from reasoninterp.severance.location.rank import (
    Of,
    features_of,
    ledger_of,
    located_set,
    lost_in,
    rank,
    search_order,
    single_shares,
)
from reasoninterp.severance.location.rival import RETURNED, Answers, Told, rival_table, share_returned, tell_apart
from reasoninterp.severance.verdict import MIN_BASE_FOLLOW, MIN_TRACES, word_of
from reasoninterp.stats import proportion

INTACT, NOT_INTERPRETABLE = "intact", "not interpretable"
CORRUPT_MARGIN = "margin after the corrupt chain"
NOTHING_LEFT = Confidence(float("nan"), "nothing was located", {})


def locate(
    context: Context,
    *,
    from_mind: str = "base",
    to_mind: str = "tuned",
    rival_free: Sequence[Item] | None = None,
    level: Level = "block",
    threshold: float = 0.9,
    most_contrasts: int = 128,
    align: bool = True,
    everything: bool = False,
    tolerance: float = 0.005,
) -> Location:
    """Whether, where and how the path from the steps to the answer was lost between two minds.

    Args:
        context: the minds and the traces with the rival in place.
        from_mind: the mind with the path.
        to_mind: the mind in which it may be lost.
        rival_free: traces with their contrasts and swaps in which the rival is removed, read by the same tokenizer.
        level: of the Units: block, head, circuit or layer.
        threshold: share of the loss that a set has to return, or take away.
        most_contrasts: at most so many traces (the first ones) of either kind.
        align: align the tuned mind's gauge with the base's first.
        everything: locate also where the verdict is *intact* (ledger and grafts of next to nothing).
        tolerance: of the ledger's relative residual; the order of the Units settles long before the last digits.

    Raises:
        UserError: an unknown level or mind, a threshold that is no share, or traces of which no contrast can be made.
    """
    began = time.perf_counter()
    _check(context, level, threshold, most_contrasts)
    items = context.items
    contrasts = [i.contrast for i in items if i.contrast is not None][:most_contrasts]
    if not contrasts:
        raise UserError("traces: no contrast can be made of them; give corrupt_steps, or chains of calculations.")
    pairs = {"with": _first(items, most_contrasts)}
    if rival_free is not None:
        pairs["without"] = _first(rival_free, most_contrasts)
        if not any(i.contrast is not None or i.swap is not None for i in pairs["without"]):
            raise UserError("rival_free: neither contrasts nor swaps can be made of these traces; give others.")
    read = {(m, t): read_answers(context, some, m) for t, some in pairs.items() for m in (from_mind, to_mind)}
    both = _Both(read[from_mind, "with"], read[to_mind, "with"])
    word, told, table, problem = _verdict(context, read, from_mind, to_mind)
    location = Location(
        verdict=word,
        level=level,
        severance_score=severance_score(both, table) if word != NOT_INTERPRETABLE else float("nan"),
        answers=answer_table(read, seed=context.seed),
        rival=table,
        confidence=NOTHING_LEFT,
        costs=Costs(len(read) * (1 + context.answer_tokens), 0, 0, 0.0),
        notes=(problem,) if problem else (),
        minds=(from_mind, to_mind),
    )
    if word != NOT_INTERPRETABLE and (word != INTACT or everything):
        sought = _Sought(from_mind, to_mind, level, threshold, align, tolerance)
        location = _find(context, contrasts, location, both, sought)
    location = say.put_into_words(location, both.base, both.tuned, told)
    return replace(location, costs=replace(location.costs, seconds=time.perf_counter() - began))


class _Both(NamedTuple):
    """Both minds' answers on the traces with the rival."""

    base: Answers
    tuned: Answers


class _Sought(NamedTuple):
    from_mind: str
    to_mind: str
    level: Level
    threshold: float
    align: bool
    tolerance: float


def severance_score(both: tuple[Answers, Answers], rival: pd.DataFrame) -> float:
    """How far a path that was there is gone, from 0 to 1: the lost share of the follow rate times the lost share of E.

    Times the share of swaps that the tuned mind answers with one of the two answers (a mind that lost its answers is
    damaged, not severed), and times what did not return without the rival.
    """
    base, tuned = both
    follow = _lost(base.follow, tuned.follow)
    effect = _lost(base.effect, tuned.effect)
    return float(follow * effect * (1 - tuned.neither) * (1 - share_returned(rival)))


def _lost(base: np.ndarray, tuned: np.ndarray) -> float:
    """Share of the base's mean that is lost, within 0 and 1; NaN where the base's is not above 0."""
    return float(np.clip(1 - tuned.mean() / base.mean(), 0, 1)) if len(base) and base.mean() > 0 else float("nan")


def _check(context: Context, level: str, threshold: float, most: int) -> None:
    if level not in LEVELS:
        raise UserError(f"level: {level!r} is not one of {', '.join(LEVELS)}.")
    if not 0 < threshold <= 1:
        raise UserError(f"threshold {threshold}: give a share of the loss above 0 and at most 1, e.g. 0.9.")
    if most < 1:
        raise UserError(f"most_contrasts {most}: give at least 1.")


def _first(items: Sequence[Item], most: int) -> list[Item]:
    """The first items that have a contrast or a swap, each kind at most `most` times."""
    kept = [i for i in items if i.contrast is not None or i.swap is not None]
    n = {"contrast": 0, "swap": 0}
    out = []
    for item in kept:
        use = {}
        for kind in n:
            if getattr(item, kind) is not None and n[kind] < most:
                use[kind] = getattr(item, kind)
                n[kind] += 1
        if use:
            out.append(replace(item, contrast=use.get("contrast"), swap=use.get("swap")))
    return out


def _verdict(
    context: Context, read: dict[tuple[str, str], Answers], base: str, tuned: str
) -> tuple[str, Told | None, pd.DataFrame, str]:
    """The word, how severed and overridden were told apart, the rival's table, and what is wrong with the traces."""
    a, b = read[base, "with"], read[tuned, "with"]
    free = (read.get((base, "without")), read.get((tuned, "without")))
    table, problem = rival_table(a, b, *free, seed=context.seed), ""
    follow = proportion(a.follow)
    right = proportion(a.right)
    if follow.n < MIN_TRACES:
        return NOT_INTERPRETABLE, None, table, f"only {follow.n} swaps could be made, fewer than {MIN_TRACES}"
    if not right.ci_low > context.chance():
        said = (
            f"{base} is at floor: {100 * right.value:.0f} % right with the chain whole, chance {context.chance():.2f}"
        )
        return NOT_INTERPRETABLE, None, table, said
    if not follow.ci_low >= MIN_BASE_FOLLOW:
        said = f"{base} follows another chain in {100 * follow.value:.0f} % of {follow.n} traces"
        return NOT_INTERPRETABLE, None, table, f"{said}, too few to say that its steps drive its answer"
    if free[0] is not None and not proportion(free[0].follow).ci_low >= MIN_BASE_FOLLOW:
        problem = f"without the rival, {base} is not shown to follow its steps: those traces were not used"
        table = table[table["quantity"] != RETURNED].reset_index(drop=True)
    word, _ = word_of(a.follow, b.follow, b.neither)
    if word not in ("severed", "weakened"):
        return INTACT if word == "no damage found" else word, None, table, problem
    told = tell_apart(cast(Literal["severed", "weakened"], word), table)
    return told.word, told, table, problem


def _find(context: Context, contrasts: list, location: Location, both: _Both, sought: _Sought) -> Location:
    """Steps 3 to 6: the sets, the ranking and the mechanism."""
    from_mind, to_mind, notes = sought.from_mind, sought.to_mind, list(location.notes)
    if sought.align:
        alignment = _aligned(context, from_mind, to_mind)
        to_mind = alignment.mind
        notes += [note.rstrip(".") for note in alignment.notes]
    overridden = location.verdict == "overridden"
    # E is whole where a path is overridden; what is lost is the preference for the chain's answer.
    readout, ledger_of_what = (corrupt_margin, CORRUPT_MARGIN) if overridden else (None, "E")
    integral = integrate(
        context, contrasts, from_mind=from_mind, to_mind=to_mind, readout=readout, tolerance=sought.tolerance
    )
    notes += integral_notes(integral, ledger_of_what, sought.tolerance)
    with context.open(from_mind) as body:
        found = units(body, sought.level)
    moves = Moves(context, contrasts, found, from_mind=from_mind, to_mind=to_mind)
    of = lost_in(moves, location.verdict)
    ledger = ledger_of(integral, found, sought.level, seed=context.seed)
    singles = single_shares(moves, ledger, of)
    sets: dict[Way, LocatedSet] = {}
    if of is None:
        notes.append("neither E nor the follow rate is lost safely: no set was looked for")
    else:
        for way in ("restore", "cut"):
            sets[way] = located_set(moves, way, search_order(ledger, singles[way]), of, sought.threshold)
    ranking = rank(found, ledger, singles, sets, moves, of)
    located = next((s.units for s in sets.values() if s.reached), ())
    how, spent = _how(context, contrasts, located, integral, of or "effect", (from_mind, to_mind))
    direct = direct_table(
        *(direct_contributions(context, contrasts, m) for m in (from_mind, to_mind)), seed=context.seed
    )
    if overridden:
        how = _overridden(how, direct)
    lost = _lost(both.base.follow, both.tuned.follow), _lost(both.base.effect, both.tuned.effect)
    evaluations = moves.evaluations + spent
    return replace(
        location,
        restoring=sets.get("restore"),
        cutting=sets.get("cut"),
        ranking=ranking,
        mechanism=how,
        direct=direct,
        integral=integral,
        ledger_of=ledger_of_what,
        aligned=to_mind,
        shares_of=of,
        confidence=confidence(features_of(ranking, sets, integral, lost, of)),
        costs=replace(
            location.costs,
            forward_passes=location.costs.forward_passes + evaluations + 2,
            backward_passes=integral.passes,
            evaluations=evaluations,
        ),
        notes=tuple(notes),
    )


def _aligned(context: Context, from_mind: str, to_mind: str) -> Alignment:
    """The alignment of a pair, made once for the context."""
    key = "alignment", from_mind, to_mind
    if key not in context.memo:
        context.memo[key] = align_gauges(context.minds, from_mind, to_mind)
    found: Alignment = context.memo[key]
    return found


def integral_notes(integral: Integral, what: str = "E", tolerance: float = 0.005) -> list[str]:
    """What is to be known of a ledger: its residual where it is large, and a path through worse or better minds."""
    out = []
    if integral.residual > tolerance:
        out.append(f"the ledger's residual is {integral.residual:.1%}, above {tolerance:.1%}")
    ends = float(integral.e_from.mean()), float(integral.e_to.mean())
    room = 0.1 * max(map(abs, ends))
    if len(integral.along) and min(integral.along) < min(ends) - room:
        out.append(
            f"between the two minds {what} falls to {min(integral.along):.2f}, below both ends ({ends[0]:.2f}, {ends[1]:.2f})"
        )
    if len(integral.along) and max(integral.along) > max(ends) + room:
        out.append(
            f"between the two minds {what} rises to {max(integral.along):.2f}, above both ends ({ends[0]:.2f}, {ends[1]:.2f})"
        )
    return out


def _how(
    context: Context, contrasts: list, located: tuple[str, ...], integral: Integral, of: Of, minds: tuple[str, str]
) -> tuple[Mechanism | None, int]:
    if not located:
        return None, 0
    found = mechanism(context, contrasts, located, integral=integral, of=of, from_mind=minds[0], to_mind=minds[1])
    return found, found.evaluations


def _overridden(found: Mechanism | None, direct: pd.DataFrame) -> Mechanism | None:
    """The mechanism of an overridden path: the shortcut that wins, where one is seen."""
    word, sentence, reverse = shortcut_wins(found, direct)
    if found is None:
        return Mechanism.only(word, sentence, reverse)
    return replace(found, word=word, sentence=sentence, would_reverse=reverse)
