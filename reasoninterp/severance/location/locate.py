"""Locate: was the path from the steps to the answer cut between two minds, where, and how; in one call.

1. *Read* both minds: E on contrasts, and the answers that they give after swapped chains and after whole ones
   (`answers`, `behaviour`).  The words are those of `verdict`: a base at floor, or that does not follow its own steps,
   or of which fewer than `MIN_TRACES` swaps can be read, is *not interpretable*; a loss of follow rate under `MARGIN` is
   *intact*.  Either ends here: there is nothing to locate.
2. *Severed or overridden*, by E underneath and, where traces without the rival are given, by what returns (`rival`).
3. *Align* the tuned mind's gauge with the base's (`align`), since the straight path in weight space depends on it.
4. *Ledger* along that path (`integrate`) of E, or, of an overridden path, of the margin after the corrupt chain.
5. *Grafts* of single Units both ways, of at most `MOST_SINGLES` that lead the ledger (`moves`), and from both the
   smallest restoring and the smallest cutting set with alternatives (`smallest`).  Shares are of the lost E; where E is
   not lost (overridden) or its loss not safely away from zero, of the lost follow rate between the two answers.
   Beside the located set stand random sets of as many Units, and of about the same weight change (`controls`).
6. *Rank* all Units of the level (`rank`), name the *mechanism* (`mechanism`), and say it, with what would have reversed
   each sentence (`words`).

What does not depend on the level (answers, alignment, ledger, direct contributions) is made once for a context.  Costs
are passes over both chains of all contrasts in one mind.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple, TypeVar

import pandas as pd

from reasoninterp.errors import UserError
from reasoninterp.models.context import Context, Item
from reasoninterp.models.units import LEVELS, Level, units
from reasoninterp.severance.gauge.aligned import aligned
from reasoninterp.severance.grafts.moves import Moves
from reasoninterp.severance.ledger.integrate import Integral, integrate
from reasoninterp.severance.ledger.tables import warnings_of
from reasoninterp.severance.location import words as say
from reasoninterp.severance.location.answers import answer_table, read_answers
from reasoninterp.severance.location.behaviour import (
    INTACT,
    NOT_INTERPRETABLE,
    Judged,
    first_items,
    judge,
    left_out,
    lost_share,
    severance_score,
)
from reasoninterp.severance.location.confidence import Confidence, confidence
from reasoninterp.severance.location.direct_logits import corrupt_margin, direct_contributions, direct_table
from reasoninterp.severance.location.ledger_entries import ledger_of, loss_shares
from reasoninterp.severance.location.location import Costs, LocatedSet, Location
from reasoninterp.severance.location.mechanism import Mechanism, mechanism, shortcut_wins
from reasoninterp.severance.location.rank import features_of, rank
from reasoninterp.severance.location.rival import Answers
from reasoninterp.severance.location.search import Of, control_table, lost_in, search, single_shares

T = TypeVar("T")
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
        level: of the Units: layer, block, head, circuit or fine.
        threshold: share of the loss that a set has to return, or take away.
        most_contrasts: at most so many traces (the first ones) of either kind.
        align: align the tuned mind's gauge with the base's first.
        everything: locate also where the verdict is *intact* (ledger and grafts of next to nothing).
        tolerance: of the ledger's relative residual; the order of the Units settles long before the last digits.

    Raises:
        UserError: an unknown level or mind, a threshold that is no share, or traces of which no contrast can be made.
    """
    began = time.perf_counter()
    _check(level, threshold, most_contrasts)
    contrasts = [i.contrast for i in context.items if i.contrast is not None][:most_contrasts]
    if not contrasts:
        raise UserError("traces: no contrast can be made of them; give corrupt_steps, or chains of calculations.")
    pairs = {"with": first_items(context.items, most_contrasts)}
    notes = left_out(context.items, most_contrasts, context.refused)
    if rival_free is not None:
        pairs["without"] = first_items(rival_free, most_contrasts)
        if not pairs["without"]:
            raise UserError("rival_free: neither contrasts nor swaps can be made of these traces; give others.")
        notes += left_out(rival_free, most_contrasts, what="rival-free trace")
    read = {(m, t): _answers(context, some, m) for t, some in pairs.items() for m in (from_mind, to_mind)}
    both = _Both(read[from_mind, "with"], read[to_mind, "with"])
    judged = judge(context, read, from_mind, to_mind)
    location = Location(
        verdict=judged.word,
        level=level,
        severance_score=_score(judged, both),
        answers=answer_table(read, seed=context.seed),
        rival=judged.rival,
        confidence=NOTHING_LEFT,
        costs=Costs(len(read) * (1 + context.answer_tokens), 0, 0, 0.0),
        notes=(*judged.notes, *notes),
        minds=(from_mind, to_mind),
    )
    sought = judged.word == INTACT and everything and not judged.same
    if sought or judged.word not in (NOT_INTERPRETABLE, INTACT):
        asked = _Sought(from_mind, to_mind, level, threshold, align, tolerance)
        location = _find(context, contrasts, location, both, asked)
    location = say.put_into_words(location, both.base, both.tuned, judged)
    return replace(location, costs=replace(location.costs, seconds=time.perf_counter() - began))


def _answers(context: Context, items: Sequence[Item], mind: str) -> Answers:
    """A mind's answers to some traces, read once for the context."""
    return _remembered(
        context, ("answers", mind, tuple(i.digest for i in items)), partial(read_answers, context, items, mind)
    )


def _score(judged: Judged, both: _Both) -> float:
    if judged.word == NOT_INTERPRETABLE:
        return float("nan")
    return 0.0 if judged.same else severance_score(both.base, both.tuned, judged.rival)


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


def _check(level: str, threshold: float, most: int) -> None:
    if level not in LEVELS:
        raise UserError(f"level: {level!r} is not one of {', '.join(LEVELS)}.")
    if not 0 < threshold <= 1:
        raise UserError(f"threshold {threshold}: give a share of the loss above 0 and at most 1, e.g. 0.9.")
    if most < 1:
        raise UserError(f"most_contrasts {most}: give at least 1.")


def _find(context: Context, contrasts: list, location: Location, both: _Both, sought: _Sought) -> Location:
    """Steps 3 to 6: the sets, the ranking and the mechanism."""
    from_mind, to_mind, notes = sought.from_mind, sought.to_mind, list(location.notes)
    if sought.align:
        alignment = aligned(context, from_mind, to_mind)
        to_mind = alignment.mind
        notes += [note.rstrip(".") for note in alignment.notes]
    overridden = location.verdict == "overridden"
    # E is whole where a path is overridden; what is lost is the preference for the chain's answer.
    readout, ledger_of_what = (corrupt_margin, CORRUPT_MARGIN) if overridden else (None, "E")
    integral = _remembered(
        context,
        ("integral", from_mind, to_mind, ledger_of_what, sought.tolerance, tuple(c.id for c in contrasts)),
        lambda: integrate(
            context, contrasts, from_mind=from_mind, to_mind=to_mind, readout=readout, tolerance=sought.tolerance
        ),
    )
    notes += warnings_of(integral, sought.tolerance, ledger_of_what)
    with context.open(from_mind) as body:
        found = units(body, sought.level)
    moves = Moves(context, contrasts, found, from_mind=from_mind, to_mind=to_mind)
    of = lost_in(moves, location.verdict)
    ledger = ledger_of(integral, found, sought.level, seed=context.seed)
    leading = ledger["value"].abs().sort_values(ascending=False, kind="stable").index
    singles = single_shares(moves, list(leading), of)
    if of is None:
        notes.append("neither E nor the follow between the two answers is lost safely: no set was looked for")
    sets = search(moves, loss_shares(ledger), singles, of, sought.threshold)
    ranking = rank(found, ledger, singles, sets, moves, of)
    reached = next((s for s in sets.values() if s.reached), None)
    controls = control_table(moves, reached)
    notes += [
        f"no random sets of the same {m} could be drawn beside the located one"
        for m in controls.loc[controls["n"] == 0, "match"]
    ]
    how, spent = _how(context, contrasts, reached, integral, of or "effect", (from_mind, to_mind))
    direct = _remembered(
        context,
        ("direct", from_mind, to_mind, tuple(c.id for c in contrasts)),
        lambda: direct_table(
            *(direct_contributions(context, contrasts, m) for m in (from_mind, to_mind)), seed=context.seed
        ),
    )
    if overridden:
        how = _overridden(how, direct)
    lost = lost_share(both.base.follow, both.tuned.follow), lost_share(both.base.effect, both.tuned.effect)
    evaluations = moves.evaluations + spent
    return replace(
        location,
        restoring=sets.get("restore"),
        cutting=sets.get("cut"),
        ranking=ranking,
        mechanism=how,
        direct=direct,
        controls=controls,
        integral=integral,
        ledger_of=ledger_of_what,
        aligned=to_mind,
        shares_of=of,
        confidence=confidence(features_of(ranking, sets, integral, lost, of)),
        costs=replace(
            location.costs,
            # every backward pass has a forward one; two halves for direct contributions, and two for attention
            forward_passes=location.costs.forward_passes + evaluations + integral.passes + 2,
            backward_passes=integral.passes,
            evaluations=evaluations,
        ),
        notes=tuple(notes),
    )


def _remembered(context: Context, key: tuple[Hashable, ...], make: Callable[[], T]) -> T:
    """What does not depend on the level of the Units, made once for the context and its minds."""
    own = (context.minds.discarded, *key)  # what was kept by the name of a mind that is gone is not of its successor
    if own not in context.memo:
        context.memo[own] = make()
    found: T = context.memo[own]
    return found


def _how(
    context: Context, contrasts: list, located: LocatedSet | None, integral: Integral, of: Of, minds: tuple[str, str]
) -> tuple[Mechanism | None, int]:
    if located is None:
        return None, 0
    found = mechanism(context, contrasts, located.units, integral=integral, of=of, from_mind=minds[0], to_mind=minds[1])
    return found, found.evaluations


def _overridden(found: Mechanism | None, direct: pd.DataFrame) -> Mechanism | None:
    """The mechanism of an overridden path: the shortcut that wins, where one is seen."""
    word, sentence, reverse = shortcut_wins(found, direct)
    if found is None:
        return Mechanism.only(word, sentence, reverse)
    return replace(found, word=word, sentence=sentence, would_reverse=reverse)
