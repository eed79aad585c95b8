"""The search for a location by grafts alone: single Units both ways, then the smallest sets along their order.

1. *What is lost* (`lost_in`): E, or where the path is there underneath or E is not safely lost, the follow between the
   two answers, as shares of which everything else is read.
2. *Singles* (`single_shares`): what each Unit returns and takes away by itself, of at most `MOST_SINGLES` Units.
3. *Sets* (`search`): along an order, half by what makes a Unit suspect beforehand (the ledger's losses, where there is
   a ledger) and half by its single share, the smallest restoring and the smallest cutting set, with others beside them.
4. *Marginal shares* (`marginals`): what a set moves less without one of its members.

`search_alone` is steps 1 to 4 without a ledger; `severance.location.locate` puts its ledger in front of step 2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import pandas as pd

from reasoninterp.models.context import Context
from reasoninterp.models.units import Level, units
from reasoninterp.severance.grafts.controls import MATCHES, control
from reasoninterp.severance.grafts.moves import WAYS, Moves, Way
from reasoninterp.severance.grafts.smallest import families
from reasoninterp.severance.location.location import LocatedSet
from reasoninterp.stats import CONFIDENCE, Estimate
from reasoninterp.traces.contrast import Contrast

MOST_SINGLES = 48  # Units grafted by themselves
MOST_SETS = 3  # 1-minimal sets that are looked for in one direction
MOST_TRIES = 60  # sets evaluated before the search for others ends
CONTROL_DRAWS = 3  # random sets of each kind: each that was not grafted before takes one more pass
CONTROLS = [
    "direction", "match", "draws", "share", "share_ci_low", "share_ci_high", "share_follow", "share_follow_ci_low",
    "share_follow_ci_high", "norm_ratio", "n",
]  # fmt: skip
NOTHING = Estimate(float("nan"), float("nan"), float("nan"), 0, "")
NOTHING_LESS = Estimate(0.0, 0.0, 0.0, 0, "")  # the marginal share of a Unit that is in no set
Of = Literal["effect", "follow"]


class SearchAlone(NamedTuple):
    """What grafts alone find.

    `ranking`: one row a Unit, `unit` and `rank` (higher is more suspected; Units that nothing tells apart have one
    rank; 0 is the lowest).  `sets`: the smallest sets, by direction; empty where nothing is safely lost.  `evaluations`:
    passes over all contrasts.
    """

    ranking: pd.DataFrame
    sets: dict[Way, LocatedSet]
    evaluations: int


def search_alone(
    context: Context,
    contrasts: Sequence[Contrast],
    *,
    from_mind: str = "base",
    to_mind: str = "tuned",
    level: Level = "block",
    verdict: str = "severed",
    threshold: float = 0.9,
) -> SearchAlone:
    """Where a path was lost, by grafts alone and without a ledger.

    Singles of all Units in forward order (of the `MOST_SINGLES` of largest weight change, where there are more), then
    sets along the singles' order.  Members of sets rank first, by their marginal share; then the others by the larger
    of their two single shares; then Units that were not grafted; and last, at 0, those that both minds have alike.

    Args:
        context: the minds.
        contrasts: what is read; at least one.
        from_mind: the mind with the path.
        to_mind: the mind in which it may be lost, aligned already if it is to be.
        level: of the Units.
        verdict: the word of the behaviour; of an *overridden* path the follow rate is looked for first.
        threshold: share of the loss that a set has to return, or take away.
    """
    with context.open(from_mind) as body:
        found = units(body, level)
    moves = Moves(context, contrasts, found, from_mind=from_mind, to_mind=to_mind)
    of = lost_in(moves, verdict)
    largest = set(sorted(moves.moved, key=lambda n: -moves.norms[n])[:MOST_SINGLES])
    singles = single_shares(moves, [n for n in moves.names if n in largest], of)
    none_suspected = pd.Series(0.0, index=pd.Index(moves.names, name="unit"))
    sets = search(moves, none_suspected, singles, of, threshold)
    marginal = marginals(moves, sets, of)
    keys = pd.DataFrame(
        {
            "differs": [moves.norms[n] > 0 for n in moves.names],
            "member": [n in marginal for n in moves.names],
            "marginal": [marginal.get(n, NOTHING_LESS).value for n in moves.names],
            "single": pd.DataFrame(singles).max(axis=1).fillna(-np.inf).to_numpy(),
        }
    )
    rank = keys.groupby(list(keys.columns), sort=True).ngroup().astype(float)
    ranking = pd.DataFrame({"unit": moves.names, "rank": rank}).sort_values("rank", ascending=False, kind="stable")
    return SearchAlone(ranking.reset_index(drop=True), sets, moves.evaluations)


def lost_in(moves: Moves, verdict: str) -> Of | None:
    """What shares are of: the lost E, unless the path is there underneath or E is not safely lost; else follow; else nothing."""

    def lost(of: Of) -> bool:
        fallen = getattr(moves.base, of).mean() > getattr(moves.tuned, of).mean()
        return bool(moves.safe(of) and fallen)

    order: tuple[Of, ...] = ("follow", "effect") if verdict == "overridden" else ("effect", "follow")
    return next((of for of in order if lost(of)), None)


def share_of(moves: Moves, of: Of | None) -> Callable[[Way, Iterable[str]], float]:
    """The share that a search goes by."""
    return moves.share_follow if of == "follow" else moves.share


def single_shares(moves: Moves, order: Sequence[str], of: Of | None) -> dict[Way, pd.Series]:
    """By direction, each Unit's share by itself; NaN for those that were not grafted, 0 for those that do not differ.

    Args:
        moves: the grafts.
        order: Units, the first `MOST_SINGLES` of which that differ are grafted.
        of: what shares are of; nothing is grafted where it is None.
    """
    differ = set(moves.moved)
    chosen = [name for name in order if name in differ][:MOST_SINGLES] if of else []
    out: dict[Way, pd.Series] = {}
    for way in WAYS:
        shares = {n: share_of(moves, of)(way, [n]) for n in chosen}
        unmoved = {n: 0.0 for n in moves.names if n not in differ}
        out[way] = pd.Series({**shares, **unmoved}, dtype=float).reindex(moves.names)
    return out


def search(
    moves: Moves, suspected: pd.Series, singles: Mapping[Way, pd.Series], of: Of | None, threshold: float
) -> dict[Way, LocatedSet]:
    """The smallest set of either direction; none where nothing is safely lost.

    Args:
        moves: the grafts.
        suspected: by Unit, how much it is suspected beforehand, from 0 to 1.
        singles: by direction, single shares.
        of: what shares are of.
        threshold: share of the loss that a set has to move.
    """
    if of is None:
        return {}
    return {w: located_set(moves, w, search_order(suspected, singles[w]), of, threshold) for w in WAYS}


def search_order(suspected: pd.Series, singles: pd.Series) -> list[str]:
    """The order in which a search tries Units: half by what suspects them beforehand, half by their single share."""
    score = suspected + singles.reindex(suspected.index).fillna(0.0).clip(0, 1)
    return list(score.sort_values(ascending=False, kind="stable").index)


def located_set(moves: Moves, way: Way, order: list[str], of: Of, threshold: float) -> LocatedSet:
    """The smallest of the 1-minimal sets found in one direction, with the others beside it."""
    share = share_of(moves, of)
    found = families(
        lambda names: share(way, names), order, threshold=threshold, max_sets=MOST_SETS, max_evaluations=MOST_TRIES
    )
    reached = [s for s in found.sets if s.reached]
    if not reached:
        return LocatedSet(way, (), NOTHING, NOTHING, False, (), False, threshold)
    place = {name: k for k, name in enumerate(moves.names)}  # forward order
    best, *others = (
        tuple(sorted(one.units, key=lambda n: place[n])) for one in sorted(reached, key=lambda s: len(s.units))
    )
    shares = [(moves.interval(way, one, of="effect"), moves.interval(way, one, of="follow")) for one in (best, *others)]
    return LocatedSet(way, best, *shares[0], True, tuple(others), found.complete, threshold, tuple(shares[1:]))


def marginals(moves: Moves, sets: Mapping[Way, LocatedSet], of: Of | None) -> dict[str, Estimate]:
    """By member of a reached set, what the set moves less without it: of the two directions, the larger."""
    out: dict[str, Estimate] = {}
    if of is None:
        return out
    for way, one in sets.items():
        names = frozenset(one.units if one.reached else ())
        if not names:
            continue
        fewer = [names - {name} for name in one.units]
        drawn = moves.draws(way, [names, *fewer], of=of)
        low, high = np.quantile(drawn[:, :1] - drawn[:, 1:], [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=0)
        share = share_of(moves, of)
        for name, rest, a, b in zip(one.units, fewer, low, high, strict=True):
            less = share(way, names) - share(way, rest)
            if name not in out or out[name].value < less:
                method = "bootstrap" if of == "effect" else "jeffreys"
                out[name] = Estimate(less, float(min(a, less)), float(max(b, less)), len(moves.base.effect), method)
    return out


def control_table(moves: Moves, located: LocatedSet | None) -> pd.DataFrame:
    """Random sets beside a located one, moved the same way, one row a `match`; no rows where nothing was located."""
    rows = []
    way, members = (cast(Way, located.direction), located.units) if located is not None else ("cut", ())
    for match in MATCHES if members else ():
        found = control(moves, way, members, match, draws=CONTROL_DRAWS)
        row: dict[str, Any] = {"direction": way, "match": match, "draws": len(found.sets)}
        for name, e in (("share", found.share), ("share_follow", found.share_follow)):
            row |= {name: e.value, f"{name}_ci_low": e.ci_low, f"{name}_ci_high": e.ci_high}
        rows.append(row | {"norm_ratio": found.norm_ratio, "n": max(found.share.n, found.share_follow.n)})
    return pd.DataFrame(rows, columns=CONTROLS)
