"""The order in which Units are suspected, by the ledger, by grafts, and by both.

`rank_ledger`   minus the Unit's entry: the effect that it lost, in nats.
`rank_grafts`   the larger of the two shares that it returns or takes away by itself; NaN where it was not grafted.
`rank_both`     members of the smallest sets first, by their *marginal* share (what the set loses without them, the
                larger of the two directions); then the other Units by the larger single share; then, among those that
                were not grafted or move as much, by the ledger.  Its score is the number of Units that stand behind.

A Unit that both minds have alike scores 0 everywhere and stands behind all others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

import numpy as np
import pandas as pd

from reasoninterp.models.units import Unit
from reasoninterp.severance.grafts.moves import Moves, Way
from reasoninterp.severance.grafts.smallest import families
from reasoninterp.severance.ledger.integrate import Integral
from reasoninterp.severance.location.location import RANKING, LocatedSet
from reasoninterp.stats import Estimate, matrix_intervals

MOST_SINGLES = 48  # Units grafted by themselves, those first that lead the ledger
MOST_SETS = 3  # 1-minimal sets that are looked for in one direction
MOST_TRIES = 60  # sets evaluated before the search for others ends
Of = Literal["effect", "follow"]


def ledger_of(integral: Integral, found: Sequence[Unit], level: str, *, seed: int = 0) -> pd.DataFrame:
    """The ledger's entries of a level, in the Units' order: index `unit`; `value, ci_low, ci_high` in nats.

    Both uses of a tied embedding are one Unit here, since a graft moves them together.
    """
    held = {name: np.asarray(values, dtype=float) for name, values in integral.at(level).items()}
    names = [u.name for u in found]
    if "unembed" in held and "unembed" not in names:
        held["embed"] = held["embed"] + held.pop("unembed")
    empty = np.zeros(len(integral.e_from))
    values = np.stack([held.get(name, empty) for name in names], axis=1)
    low, high = matrix_intervals(values, seed=seed)
    return pd.DataFrame({"value": values.mean(0), "ci_low": low, "ci_high": high}, index=pd.Index(names, name="unit"))


def loss_shares(ledger: pd.DataFrame) -> pd.Series:
    """Each Unit's share of all losses in the ledger; 0 for a Unit that gained, and for all where nothing lost."""
    losses = (-ledger["value"]).clip(lower=0)
    return losses / losses.sum() if losses.sum() > 0 else losses


def lost_in(moves: Moves, verdict: str) -> Of | None:
    """What shares are of: the lost E, unless the path is there underneath or E is not safely lost; else follow; else nothing."""

    def lost(of: Of) -> bool:
        fallen = getattr(moves.base, of).mean() > getattr(moves.tuned, of).mean()
        return bool(moves.safe(of) and fallen)

    order: tuple[Of, ...] = ("follow", "effect") if verdict == "overridden" else ("effect", "follow")
    return next((of for of in order if lost(of)), None)


def single_shares(moves: Moves, ledger: pd.DataFrame, of: Of | None) -> dict[Way, pd.Series]:
    """By direction, each Unit's share by itself; NaN for those that were not grafted."""
    leading = ledger["value"].abs().sort_values(ascending=False, kind="stable").index
    chosen = [name for name in leading if name in set(moves.moved)][:MOST_SINGLES]
    out: dict[Way, pd.Series] = {}
    for way in ("restore", "cut"):
        shares = {n: _share(moves, of)(way, [n]) if of else float("nan") for n in chosen}
        unmoved = {n: 0.0 for n in moves.names if n not in set(moves.moved)}
        out[way] = pd.Series({**shares, **unmoved}, dtype=float).reindex(moves.names)
    return out


def _share(moves: Moves, of: Of | None) -> Callable[[Way, Iterable[str]], float]:
    return moves.share_follow if of == "follow" else moves.share


def search_order(ledger: pd.DataFrame, singles: pd.Series) -> list[str]:
    """The order in which a search tries Units: half by their share of the ledger's losses, half by their single share."""
    score = loss_shares(ledger) + singles.reindex(ledger.index).fillna(0.0).clip(0, 1)
    return list(score.sort_values(ascending=False, kind="stable").index)


def rank(
    found: Sequence[Unit],
    ledger: pd.DataFrame,
    singles: Mapping[Way, pd.Series],
    sets: Mapping[Way, LocatedSet],
    moves: Moves,
    of: Of | None,
) -> pd.DataFrame:
    """All Units of a level, the most suspected first (columns `location.RANKING`).

    Args:
        found: the Units.
        ledger: `ledger_of` them.
        singles: by direction, their single shares.
        sets: the smallest sets, by direction.
        moves: their grafts.
        of: what the shares are of.
    """
    table = pd.DataFrame({"unit": [u.name for u in found], "layer": pd.array([u.layer for u in found], dtype="Int64")})
    table["kind"] = [u.kind for u in found]
    at = ledger.loc[table["unit"]]
    table["ledger"], table["ledger_ci_low"], table["ledger_ci_high"] = (at[c].to_numpy() for c in ledger.columns)
    for way in ("restore", "cut"):
        table[way] = singles[way].reindex(table["unit"]).to_numpy()
    inside = {way: set(s.units) for way, s in sets.items() if s.reached}
    table["in_restoring"] = [name in inside.get("restore", ()) for name in table["unit"]]
    table["in_cutting"] = [name in inside.get("cut", ()) for name in table["unit"]]
    marginal = dict.fromkeys(table["unit"], 0.0)
    if of is not None:
        share = moves.share if of == "effect" else moves.share_follow
        for way, names in inside.items():
            for name in names:
                marginal[name] = max(marginal[name], share(way, names) - share(way, names - {name}))
    table["marginal"] = [marginal[name] for name in table["unit"]]
    table["rank_ledger"] = -table["ledger"]
    table["rank_grafts"] = table[["restore", "cut"]].max(axis=1)
    table["weight_change"] = [moves.norms[name] for name in table["unit"]]
    table["n"] = len(moves.base.effect) if of is not None else 0
    member = table["in_restoring"] | table["in_cutting"]
    still = table["weight_change"] == 0
    keys = (table["rank_ledger"], table["rank_grafts"].fillna(0.0), table["marginal"], member, ~still)
    order = np.lexsort([k.to_numpy() for k in keys])
    table["rank_both"] = np.argsort(order, kind="stable").astype(float)
    table.loc[still, "rank_both"] = 0.0
    return table.iloc[order[::-1]].reset_index(drop=True)[RANKING]


def leading(ranking: pd.DataFrame, by: str) -> str:
    """The Unit that leads by one score; "" where no Unit has one above 0."""
    scores = ranking[by].dropna()
    return str(ranking.loc[scores.idxmax(), "unit"]) if len(scores) and scores.max() > 0 else ""


def features_of(
    ranking: pd.DataFrame,
    sets: Mapping[Way, LocatedSet],
    integral: Integral,
    lost: tuple[float, float],
    of: Of | None,
) -> dict[str, float]:
    """The features of `severance.location.confidence`.

    Args:
        ranking: a ranking.
        sets: the smallest sets, by direction.
        integral: the ledger.
        lost: shares of the base's follow rate and of its E that are lost.
        of: what the shares are of.
    """
    shares = loss_shares(ranking.set_index("unit")[["ledger"]].rename(columns={"ledger": "value"}))
    top = shares.sort_values(ascending=False).to_numpy()
    reached = {way: s for way, s in sets.items() if s.reached}
    members = {name for s in reached.values() for name in s.units}
    name = "share_follow" if of == "follow" else "share"

    def share(way: Way) -> float:
        return float(np.clip(getattr(reached[way], name).value, 0, 1)) if way in reached else 0.0

    return {
        "restored": share("restore"),
        "cut": share("cut"),
        "ledger_share": float(shares[list(members)].sum()) if members else 0.0,
        "ledger_lead": float(top[0] - top[1]) if len(top) > 1 else float(top.sum()),
        "agreement": float(all(leading(ranking, by) in members for by in ("rank_ledger", "rank_grafts"))),
        "parsimony": max((1 / len(s.units) for s in reached.values() if s.units), default=0.0),
        "lost_follow": lost[0],
        "lost_effect": lost[1],
        "residual": min(1.0, integral.residual),
    }


def located_set(moves: Moves, way: Way, order: list[str], of: Of, threshold: float) -> LocatedSet:
    """The smallest of the 1-minimal sets found in one direction, with the others beside it."""
    share = _share(moves, of)
    found = families(
        lambda names: share(way, names),
        order,
        threshold=threshold,
        max_sets=MOST_SETS,
        max_evaluations=MOST_TRIES,
    )
    reached = [s for s in found.sets if s.reached]
    if not reached:
        nothing = Estimate(float("nan"), float("nan"), float("nan"), 0, "")
        return LocatedSet(way, (), nothing, nothing, False, (), False)
    place = {name: k for k, name in enumerate(moves.names)}  # forward order
    best, *others = (
        tuple(sorted(one.units, key=lambda n: place[n])) for one in sorted(reached, key=lambda s: len(s.units))
    )
    share_e, share_follow = moves.interval(way, best, of="effect"), moves.interval(way, best, of="follow")
    return LocatedSet(way, best, share_e, share_follow, True, tuple(others), found.complete)
