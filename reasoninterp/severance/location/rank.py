"""The order in which Units are suspected, by the ledger, by grafts, and by both.

`rank_ledger`   minus the Unit's entry: the effect that it lost, in nats.
`rank_grafts`   the larger of the two shares that it returns or takes away by itself; NaN where it was not grafted.
`rank_both`     members of the smallest sets first, by their *marginal* share (what the set loses without them, the
                larger of the two directions); then the other Units by the larger single share, 0 for those that were
                not grafted (they lost little in the ledger); then, among those that move as much, by the ledger.  Its
                score is the number of Units that stand behind.

A Unit that both minds have alike cannot have lost anything: by every score no Unit stands behind it (`rank_both` is 0,
the others are the lowest score of all Units, and at most 0).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from reasoninterp.models.units import Unit
from reasoninterp.severance.grafts.moves import WAYS, Moves, Way
from reasoninterp.severance.ledger.integrate import Integral
from reasoninterp.severance.location.ledger_entries import loss_shares
from reasoninterp.severance.location.location import RANKING, LocatedSet
from reasoninterp.severance.location.search import NOTHING_LESS, Of, marginals


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
    for way in WAYS:
        table[way] = singles[way].reindex(table["unit"]).to_numpy()
        table[f"{way}_ci_low"], table[f"{way}_ci_high"] = _single_intervals(moves, way, table, of)
    inside = {way: set(s.units) for way, s in sets.items() if s.reached}
    table["in_restoring"] = [name in inside.get("restore", ()) for name in table["unit"]]
    table["in_cutting"] = [name in inside.get("cut", ()) for name in table["unit"]]
    marginal = marginals(moves, sets, of)
    for column, end in (("value", ""), ("ci_low", "_ci_low"), ("ci_high", "_ci_high")):
        table[f"marginal{end}"] = [getattr(marginal.get(name, NOTHING_LESS), column) for name in table["unit"]]
    table["weight_change"] = [moves.norms[name] for name in table["unit"]]
    still = table["weight_change"] == 0
    table["rank_ledger"] = _behind_all(-table["ledger"], still)
    table["rank_grafts"] = _behind_all(table[["restore", "cut"]].max(axis=1), still)
    table["n"] = len(moves.base.effect) if of is not None else 0
    member = table["in_restoring"] | table["in_cutting"]
    keys = (table["rank_ledger"], table["rank_grafts"].fillna(0.0), table["marginal"], member, ~still)
    order = np.lexsort([k.to_numpy() for k in keys])
    table["rank_both"] = np.argsort(order, kind="stable").astype(float)
    table.loc[still, "rank_both"] = 0.0
    return table.iloc[order[::-1]].reset_index(drop=True)[RANKING]


def _single_intervals(
    moves: Moves, way: Way, table: pd.DataFrame, of: Of | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Interval ends of single shares, in the table's order; NaN where a Unit was not grafted."""
    low, high = (np.full(len(table), np.nan) for _ in range(2))
    at = np.flatnonzero(table[way].notna().to_numpy())
    if of is not None and len(at):
        found = moves.estimates(way, [[name] for name in table["unit"].iloc[at]], of=of)
        low[at], high[at] = [e.ci_low for e in found], [e.ci_high for e in found]
    return low, high


def _behind_all(scores: pd.Series, still: pd.Series) -> pd.Series:
    """Scores, with those of Units that do not differ at the lowest of all."""
    return scores.mask(still, min(0.0, float(np.nan_to_num(scores[~still].min()))))


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
