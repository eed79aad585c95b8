"""Receiver heads: heads in which a few steps are read by all the later ones (Bogdan et al. 2025, arXiv:2506.19143).

1. A head's matrix [step, step] of a trace: the attention of the row's step to the column's, averaged over the tokens
   of both (`maps`, `plain_per_key`).  Above the diagonal it is NaN: a step cannot read a later one.
2. The *vertical score* of step i is the mean of column i over rows ≥ i + `proximity` (default 4: neighbours read each
   other in any case); NaN where there is no such row.
3. Optional control of depth, since later rows share their attention among more steps: `depth` multiplies each row by
   the number of steps it can read (even attention over steps of equal length becomes 1), `rank` puts in each value's
   rank in its row over that number.
4. A head's score in a trace is the kurtosis of its vertical scores (Fisher's: 0 for a normal sample; the biased
   estimator, as published).  Of n scores it is between −2 and about n − 5 and grows with n, so that scores compare
   heads on the same traces, not traces of different length.  Of two scores it is −2 and of three −1.5 whatever they
   are; fewer than `MIN_SCORED` give NaN, never 0.
5. Scores are averaged over traces.  Split-half reliability says whether heads keep their order on other traces:
   many random halvings of the traces, the correlation across heads of the two halves' means, its mean over halvings
   stepped up to the whole number of traces by the Spearman–Brown formula 2r / (1 + |r|).  (Below zero the usual
   denominator 1 + r would run to −∞; with |r| the value is odd in r, so that noise centres on 0.)  Interval: bootstrap
   over traces in which all copies of a trace fall into the same half, so that no half is compared with itself, and
   each resample is stepped up from the smaller number of traces that it is worth.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from reasoninterp.errors import UserError
from reasoninterp.stats import CONFIDENCE, derive_seed

PROXIMITY = 4
MIN_SCORED = 4
MIN_TRACES = 4
MIN_HEADS = 3
CONTROLS = ("none", "depth", "rank")
Matrix = Float[np.ndarray, "*head step step"]
Scores = Float[np.ndarray, "*head step"]


class Reliability(NamedTuple):
    """Split-half reliability of head scores over traces.

    Attributes:
        value: stepped up to the whole number of traces; NaN with the reason in `note`.
        ci_low, ci_high: 95 % bootstrap interval over traces.
        half: the mean correlation of two halves.
        n: traces with scores.
        n_heads: heads with a score in every one of them.
        n_splits: halvings that were drawn.
        seed: of the halvings and the resampling.
        note: why there is no value; empty if there is one.
    """

    value: float
    ci_low: float
    ci_high: float
    half: float
    n: int
    n_heads: int
    n_splits: int
    seed: int
    note: str


def causal(matrix: Matrix) -> Matrix:
    """The matrix with NaN above the diagonal."""
    n = matrix.shape[-1]
    return np.where(np.tri(n, dtype=bool), np.asarray(matrix, dtype=float), np.nan)


def controlled(matrix: Matrix, control: str = "none") -> Matrix:
    """The causal matrix with each row corrected for the number of steps that it can read (see the module's step 3).

    Raises:
        UserError: no such control.
    """
    from scipy.stats import rankdata

    if control not in CONTROLS:
        raise UserError(f"control: {control!r} is not one of {', '.join(CONTROLS)}.")
    rows = causal(matrix)
    if control == "none":
        return rows
    count = (~np.isnan(rows)).sum(-1, keepdims=True)
    if control == "depth":
        return rows * count
    return rankdata(rows, axis=-1, nan_policy="omit") / np.where(count, count, 1)


def vertical_scores(matrix: Matrix, *, proximity: int = PROXIMITY, control: str = "none") -> Scores:
    """Vertical score of every step; NaN where no row is far enough below it.

    Args:
        matrix: attention of the row's step to the column's, for any number of heads; NaN where a step has no tokens.
        proximity: rows nearer than this to the column's step are left out; at least 1.
        control: `none`, `depth` or `rank`.

    Raises:
        UserError: a proximity below 1, or no such control.
    """
    if proximity < 1:
        raise UserError(f"proximity: {proximity} is below 1; give the number of steps that a reader must be later.")
    n = matrix.shape[-1]
    far = np.subtract.outer(np.arange(n), np.arange(n)) >= proximity
    return _nanmean(np.where(far, controlled(matrix, control), np.nan), axis=-2)


def head_scores(vertical: Scores, *, min_scored: int = MIN_SCORED) -> NDArray[np.float64]:
    """Kurtosis (Fisher's, biased) over a trace's vertical scores, for each head; NaN where there are too few or all equal.

    Args:
        vertical: `vertical_scores`; NaN are left out.
        min_scored: fewer scores than this say nothing (4 is the smallest number whose kurtosis can differ).
    """
    from scipy.stats import kurtosis

    vertical = np.asarray(vertical, dtype=float)
    enough = (~np.isnan(vertical)).sum(-1) >= max(min_scored, MIN_SCORED)
    if not enough.any():
        return np.full(vertical.shape[:-1], np.nan)
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # SciPy tells of heads whose scores are all equal, which give NaN
        found = kurtosis(vertical, axis=-1, fisher=True, bias=True, nan_policy="omit")
    return np.where(enough, np.ma.filled(found, np.nan), np.nan)


def steps_needed(proximity: int = PROXIMITY) -> int:
    """The fewest steps of a trace for which head scores exist."""
    return proximity + MIN_SCORED


def split_half(
    scores: Float[np.ndarray, "trace head"], *, n_splits: int = 200, n_resamples: int = 500, seed: int = 0
) -> Reliability:
    """Split-half reliability of the heads' mean scores over traces (see the module's step 5).

    Args:
        scores: head scores of each trace.  Traces without any score, then heads that miss one in some trace, are left
            out.
        n_splits: halvings.
        n_resamples: bootstrap resamples of the traces, each halved a tenth as often.
        seed: seed.
    """
    x = np.asarray(scores, dtype=float)
    x = x[~np.isnan(x).all(axis=1)] if x.size else x.reshape(0, x.shape[-1])
    x = x[:, ~np.isnan(x).any(axis=0)] if len(x) else x
    n, n_heads = len(x), x.shape[1] if len(x) else 0
    note = ""
    if n < MIN_TRACES:
        note = f"{n} traces with scores, {MIN_TRACES} are needed"
    elif n_heads < MIN_HEADS:
        note = f"{n_heads} heads with a score in every trace, {MIN_HEADS} are needed"
    if note:
        return Reliability(np.nan, np.nan, np.nan, np.nan, n, n_heads, 0, seed, note)
    rng = np.random.default_rng(derive_seed(seed, "split-half"))
    half = _mean_half(x, np.ones(n), n_splits, rng)
    drawn = []
    for _ in range(n_resamples):
        copies = np.bincount(rng.integers(n, size=n), minlength=n).astype(float)
        some = copies > 0
        if some.sum() >= 2:
            half_drawn = _mean_half(x[some], copies[some], max(2, n_splits // 10), rng)
            # Means weighted by copies are as noisy as those of this many traces, fewer than n.
            effective = n**2 / (copies**2).sum()
            drawn.append(stepped_up(half_drawn, 2 * n / effective))
    low, high = _interval(np.array(drawn))
    value = stepped_up(half)
    note = "" if np.isfinite(value) else "all heads have the same mean score in a half"
    return Reliability(value, low, high, half, n, n_heads, n_splits, seed, note)


def stepped_up(half: float, times: float = 2.0) -> float:
    """The Spearman–Brown reliability of a mean over `times` as many traces; odd in the correlation (the module's step 5)."""
    return times * half / (1 + (times - 1) * abs(half))


def _mean_half(
    x: Float[np.ndarray, "trace head"], copies: Float[np.ndarray, " trace"], n_splits: int, rng: np.random.Generator
) -> float:
    """Mean over random halvings of the correlation across heads of the two halves' mean scores."""
    n = len(x)
    first = np.argsort(rng.random((n_splits, n)), axis=1) < n // 2
    sides = []
    for chosen in (first, ~first):
        weight = chosen * copies
        mean = weight @ x / weight.sum(1, keepdims=True)
        mean = mean - mean.mean(1, keepdims=True)
        size = np.linalg.norm(mean, axis=1, keepdims=True)
        sides.append(mean / np.where(size > 1e-12 * np.abs(x).max(), size, np.nan))
    found = (sides[0] * sides[1]).sum(1)
    found = found[np.isfinite(found)]
    return float(found.mean()) if len(found) else np.nan


def _interval(drawn: NDArray[np.float64]) -> tuple[float, float]:
    drawn = drawn[np.isfinite(drawn)]
    if len(drawn) < 2:
        return np.nan, np.nan
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return float(low), float(high)


def _nanmean(x: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
    """Mean of what is not NaN; NaN, and no warning, where there is nothing."""
    count = (~np.isnan(x)).sum(axis=axis)
    with np.errstate(invalid="ignore"):
        return np.nansum(x, axis=axis) / np.where(count, count, np.nan)
