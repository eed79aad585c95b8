"""How well a method found what was cut: scores of a ranking, of a set and of a verdict.

A method gives every Unit of a level a score (higher = more suspected; NaN = it says nothing of that Unit, which counts
as lower than any number).  The truth of a pair is a *family* of sets of Units: any one of them is a right answer (where
two redundant places were cut, restoring either suffices), so everything is scored against the nearest set.

1. Ranking: `top1`, `recall_at`, `auroc`, `average_precision`.  Units with equal scores have no order, so each score is
   its expectation over the orders of the ties: a method that cannot tell Units apart is neither favoured nor punished.
2. Set: `jaccard`; place: `layer_error`.
3. Verdict: `severed_auroc` (one severity for each pair), `calibration` (a stated confidence against what came true).

Intervals over pairs, clustered by base model, are in `severance.scoring.intervals`.

The AUROC is the Mann–Whitney statistic (midranks for ties); the expected average precision under ties follows McSherry
& Najork 2008 (ECIR, doi:10.1007/978-3-540-78646-7_38).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from reasoninterp.errors import UserError
from reasoninterp.stats import proportion

Scores = Mapping[str, float]
Family = Sequence[Collection[str]]


def leaders(scores: Scores) -> tuple[str, ...]:
    """The Units with the highest score: one, or all that tie for it; all of them where every score is NaN.

    Raises:
        UserError: no Unit is scored.
    """
    names, values = _arrays(scores)
    return tuple(n for n, v in zip(names, values, strict=True) if v == values.max())


def top1(scores: Scores, family: Family) -> float:
    """Whether the top-ranked Unit is in some set of the family, 0 or 1; with ties, the share of leaders that are.

    Raises:
        UserError: no Unit is scored, or the family is empty or names a Unit that has no score.
    """
    truth = frozenset().union(*_sets(family, scores))
    first = leaders(scores)
    return sum(name in truth for name in first) / len(first)


def recall_at(scores: Scores, family: Family) -> float:
    """Share of a set S that is among the first |S| Units, for the set of the family that fares best.

    Where the |S|-th place is tied, the expectation over the orders of the ties.

    Raises:
        UserError: as `top1`.
    """
    return max(_recall(scores, truth) for truth in _sets(family, scores))


def _recall(scores: Scores, truth: frozenset[str]) -> float:
    sure, left, true_tied, tied = _first_places(scores, truth)
    return (sure + left * true_tied / tied) / len(truth)


def _first_places(scores: Scores, truth: frozenset[str]) -> tuple[int, int, int, int]:
    """Of the first |S| places: true Units surely there, places left to ties, and true Units and Units that tie for them."""
    names, values = _arrays(scores)
    true = np.isin(names, list(truth))
    edge = np.sort(values)[-len(truth)]  # the score at the last place that counts
    above, tied = values > edge, values == edge
    return int((above & true).sum()), len(truth) - int(above.sum()), int((tied & true).sum()), int(tied.sum())


def jaccard_at(scores: Scores, family: Family) -> float:
    """Overlap of the first |S| Units with a set S, for the set that fares best: what a ranking gets that is told |S|.

    Where the |S|-th place is tied, the expectation over the orders of the ties (hypergeometric).

    Raises:
        UserError: as `top1`.
    """
    from scipy.stats import hypergeom

    def one(truth: frozenset[str]) -> float:
        sure, left, true_tied, tied = _first_places(scores, truth)
        more = np.arange(min(left, true_tied) + 1)
        both = sure + more
        chance = hypergeom(tied, true_tied, left).pmf(more)
        return float((chance * both / (2 * len(truth) - both)).sum())

    return max(one(truth) for truth in _sets(family, scores))


def jaccard(found: Collection[str], family: Family) -> float:
    """Overlap |found ∩ S| / |found ∪ S| with the nearest set S of the family; 0 where nothing was found.

    Raises:
        UserError: the family is empty.
    """
    mine = frozenset(found)
    return max(len(mine & truth) / len(mine | truth) for truth in _sets(family))


def auroc(scores: Scores, truth: Collection[str], neutral: Collection[str] = ()) -> float:
    """Chance that a true Unit is scored above one that is not, a tie counting half.

    Args:
        scores: by Unit.
        truth: the Units that were cut.
        neutral: Units that count as neither (members of another set that would have been as right).

    Returns:
        In [0, 1]; NaN where all Units are true, or none.

    Raises:
        UserError: a true Unit has no score.
    """
    true, values = _labelled(scores, truth, neutral)
    return mann_whitney(values, true)


def average_precision(scores: Scores, truth: Collection[str], neutral: Collection[str] = ()) -> float:
    """Mean, over the true Units, of the share of true ones among all Units ranked as high; expectation over ties.

    For a group of m tied Units, r of them true, behind t Units of which R are true, the i-th place of the group holds a
    true Unit with chance r/m, and then R + 1 + (i − 1)(r − 1)/(m − 1) of the t + i Units so far are true.

    Arguments, NaN and errors as `auroc`.
    """
    true, values = _labelled(scores, truth, neutral)
    if not true.any():
        return float("nan")
    total, behind, hits = 0.0, 0, 0
    for value in np.unique(values)[::-1]:
        tied = values == value
        m, r = int(tied.sum()), int((tied & true).sum())
        place = np.arange(1, m + 1)
        expected = hits + 1 + (place - 1) * (r - 1) / max(m - 1, 1)
        total += r / m * float((expected / (behind + place)).sum())
        behind, hits = behind + m, hits + r
    return total / int(true.sum())


def nearest(
    score: Callable[[Scores, Collection[str], Collection[str]], float], scores: Scores, family: Family
) -> float:
    """`auroc` or `average_precision` against the set of the family that fares best.

    Units of the other sets are then neither true nor false.  The best of several sets is a little above 1/2 by chance
    alone: compare with a random ranking scored in the same way.

    Raises:
        UserError: as `top1`.
    """
    sets = _sets(family, scores)
    union = frozenset().union(*sets)
    return float(np.max([score(scores, truth, union - truth) for truth in sets]))


def layer_error(units: Collection[str], family: Family, n_layers: int) -> float:
    """Mean distance in layers of some Units (leaders, or a located set) from the nearest true Unit's layer.

    Embeddings count as layer −1, the final norm and the unembedding as layer `n_layers`.  NaN where nothing was found.

    Raises:
        UserError: the family is empty, or a name is no Unit's.
    """
    layers = {layer_of(name, n_layers) for truth in _sets(family) for name in truth}
    if not units:
        return float("nan")
    return float(np.mean([min(abs(layer_of(name, n_layers) - true) for true in layers) for name in units]))


def layer_of(unit: str, n_layers: int) -> int:
    """The layer of a Unit by its name; −1 for embeddings, `n_layers` for the final norm and the unembedding.

    Raises:
        UserError: the name is no Unit's.
    """
    if unit in ("embed", "pos_embed"):
        return -1
    if unit in ("ln_final", "unembed"):
        return n_layers
    head = unit.partition(".")[0]
    if head[:1] == "L" and head[1:].isdigit():
        return int(head[1:])
    raise UserError(f"unit: {unit!r} is not a Unit's name; names look like embed, L0.attn, L0.H1.QK, L0.mlp.")


def severed_auroc(severity: ArrayLike, severed: ArrayLike) -> float:
    """Chance that a severed pair has a higher severity than a control, a tie counting half; NaN severities are lowest.

    Args:
        severity: [pair] any scale, higher = more severed.
        severed: [pair] 1 or True where the pair is severed, 0 where it is a control.

    Returns:
        NaN where there are no severed pairs, or no controls.

    Raises:
        UserError: the two are not of one length.
    """
    values, labels = np.asarray(severity, dtype=float), np.asarray(severed).astype(bool)
    if values.shape != labels.shape:
        raise UserError(f"severed: {labels.size} labels for {values.size} severities; give one for each pair.")
    return mann_whitney(np.where(np.isnan(values), -np.inf, values), labels)


def mann_whitney(values: NDArray[np.float64], true: NDArray[np.bool_]) -> float:
    """Mann–Whitney U of the true against the others over its largest value, by midranks; NaN if one side is empty."""
    from scipy.stats import rankdata

    n, m = int(true.sum()), int((~true).sum())
    if not n or not m:
        return float("nan")
    return float((rankdata(values)[true].sum() - n * (n + 1) / 2) / (n * m))


# ---------------------------------------------------------------------------------------------------------- calibration


class Calibration(NamedTuple):
    """Stated confidences against outcomes.

    Attributes:
        brier: mean of (p − y)²; 0 is perfect.
        brier_base_rate: what always stating the share of y would get: a stated confidence is worth having below it.
        ece: expected calibration error: mean over bins, weighted by their n, of |mean p − share of y|.
        table: one row per bin that holds something: bin_low, bin_high, p, share, ci_low, ci_high (Wilson), n.
        n: how many.
    """

    brier: float
    brier_base_rate: float
    ece: float
    table: pd.DataFrame
    n: int


def calibration(p: ArrayLike, y: ArrayLike, *, n_bins: int = 10) -> Calibration:
    """How far confidences can be taken at their word.

    Args:
        p: stated probabilities that y is 1.
        y: what came true, 0 or 1.
        n_bins: bins of equal width on [0, 1], closed on the left; the last one holds p = 1 too.

    Raises:
        UserError: none, lengths that differ, a p outside [0, 1] or NaN, or a y that is neither 0 nor 1.
    """
    stated, true = np.asarray(p, dtype=float), np.asarray(y, dtype=float)
    if stated.shape != true.shape or not stated.size:
        raise UserError(f"y: {true.size} outcomes for {stated.size} confidences; give one for each, and at least one.")
    if not ((stated >= 0) & (stated <= 1)).all():
        raise UserError("p: a confidence is no number between 0 and 1; leave out pairs without a confidence.")
    if not np.isin(true, (0.0, 1.0)).all():
        raise UserError("y: an outcome is neither 0 nor 1; say of each pair whether it came true.")
    which = np.minimum((stated * n_bins).astype(int), n_bins - 1)
    rows = []
    for k in np.unique(which):
        mine = which == k
        share = proportion(true[mine])
        rows.append([k / n_bins, (k + 1) / n_bins, stated[mine].mean(), *share[:4]])
    table = pd.DataFrame(rows, columns=["bin_low", "bin_high", "p", "share", "ci_low", "ci_high", "n"])
    ece = float((table["n"] * (table["p"] - table["share"]).abs()).sum() / len(stated))
    rate = float(true.mean())
    return Calibration(float(((stated - true) ** 2).mean()), rate * (1 - rate), ece, table, len(stated))


# -------------------------------------------------------------------------------------------------------------- helpers


def _arrays(scores: Scores) -> tuple[list[str], NDArray[np.float64]]:
    """Names and scores, NaN as −∞."""
    if not scores:
        raise UserError("scores: no Unit is scored; give a score for every Unit of a level.")
    values = np.array([float(v) for v in scores.values()])
    return list(scores), np.where(np.isnan(values), -np.inf, values)


def _sets(family: Family, scores: Scores | None = None) -> list[frozenset[str]]:
    """The sets of a family, checked."""
    if isinstance(family, str) or any(isinstance(one, str) for one in family):
        raise UserError(
            "family: it holds a string where a set of Units is wanted; write [{'L0.attn'}], not ['L0.attn']."
        )
    sets = [frozenset(one) for one in family]
    if not sets or not all(sets):
        raise UserError("family: there is no set of Units in it, or an empty one; score controls by severed_auroc.")
    for name in sorted(frozenset().union(*sets)):
        if scores is not None and name not in scores:
            raise UserError(
                f"family: the true Unit {name!r} has no score; rank the Units of the level the truth is of."
            )
    return sets


def _labelled(
    scores: Scores, truth: Collection[str], neutral: Collection[str]
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Which Units are true and their scores, without the neutral ones."""
    (one,) = _sets([truth], scores)
    names, values = _arrays(scores)
    keep = np.array([name in one or name not in frozenset(neutral) for name in names])
    return np.isin(names, list(one))[keep], values[keep]
