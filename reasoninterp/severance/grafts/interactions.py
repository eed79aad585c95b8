"""Interactions: whether two Units do together what they do alone.

    I(a, b) = share({a, b}) − share({a}) − share({b})        of the loss of E, for restoring and for cutting

1. `I > 0`: it takes both (synergy).  `I < 0`: what one does the other does too (redundancy).
2. The interval is a bootstrap over traces of the whole expression.  A word is given by where it lies against a margin of
   `MARGIN` of the loss, so that "independent" is a claim and not a lack of traces:
   *takes both* above it; *either suffices* below it, where each alone has at least `SUFFICES` of what both
   have; *overlap* below it otherwise; *independent* within it; *undecided* across its edge.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import pandas as pd

from reasoninterp.severance.grafts.moves import WAYS, Moves
from reasoninterp.stats import Estimate, ratio

MARGIN = 0.10
SUFFICES = 0.80
COLUMNS = ["direction", "a", "b", "share_a", "share_b", "share_both", "value", "ci_low", "ci_high", "n", "word"]


def interactions(moves: Moves, names: Sequence[str]) -> pd.DataFrame:
    """Every pair of some Units, both directions.

    Returns:
        `direction, a, b, share_a, share_b, share_both, value` (the interaction, as a share of the loss), `ci_low,
        ci_high, n, word`; no rows where the loss is not safely away from zero.
    """
    rows = []
    for way in WAYS if moves.safe() else ():
        for a, b in combinations(names, 2):
            (both, lost), (first, _), (second, _) = (moves.gained(way, s) for s in ([a, b], [a], [b]))
            found = ratio(both - first - second, lost, seed=moves.seed)
            shares = {"share_a": first, "share_b": second, "share_both": both}
            values = {name: float(gained.mean() / lost.mean()) for name, gained in shares.items()}
            word = word_of(found, values["share_a"], values["share_b"], values["share_both"])
            labels = {"direction": way, "a": a, "b": b, **values}
            rows.append(labels | dict(zip(("value", "ci_low", "ci_high", "n"), found, strict=False)) | {"word": word})
    return pd.DataFrame(rows, columns=COLUMNS)


def word_of(found: Estimate, share_a: float, share_b: float, share_both: float) -> str:
    """The word for an interaction with its interval (see the module)."""
    if found.ci_low > MARGIN:
        return "takes both"
    if found.ci_high < -MARGIN:
        alone = min(share_a, share_b)
        return "either suffices" if alone >= SUFFICES * share_both > 0 else "overlap"
    return "independent" if found.ci_low > -MARGIN and found.ci_high < MARGIN else "undecided"
