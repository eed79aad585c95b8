"""Intervals for scores of pairs that come in clusters: pairs made from one base model are alike.

1. `clustered`: any statistic, by resampling whole clusters (base models) with replacement.
2. `clustered_share`: a share near 0 or 1, of which every resample is alike, so that the bootstrap is a point: the more
   cautious of that and of a Wilson interval at an effective n (Korn & Graubard 1998, Survey Methodology 24:193).
3. `intraclass`: how far pairs of one cluster agree beyond chance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from reasoninterp.errors import UserError
from reasoninterp.stats import CONFIDENCE, N_RESAMPLES, Estimate, derive_seed


def clustered(
    values: ArrayLike,
    clusters: Sequence[object],
    statistic: Callable[..., float] | None = None,
    *,
    seed: int = 0,
) -> Estimate:
    """A statistic over pairs with its percentile interval under resampling of whole clusters (base models).

    With few clusters (under some 20) such intervals are too narrow; for a share, `clustered_share` allows for that.

    Args:
        values: [pair], or [pair, column] for a statistic of several columns (severity and label, say).
        clusters: for each pair, what it was made from.
        statistic: of an array shaped like `values`, giving a number; the mean by default.  Resamples for which it is
            NaN (an AUROC without controls) are left out, and counted in `method`.
        seed: of the resampling.

    Returns:
        `n` counts pairs; pairs with a NaN value are left out.  The interval is NaN with a single cluster.

    Raises:
        UserError: values and clusters are not of one length.
    """
    x, code = _without_nan(values, clusters)
    compute = statistic if statistic is not None else lambda a: float(np.mean(a))
    k = int(code.max()) + 1 if len(code) else 0
    method = f"bootstrap of {k} clusters"
    if not k:
        return Estimate(np.nan, np.nan, np.nan, 0, method)
    value = float(compute(x))
    if k == 1:
        return Estimate(value, np.nan, np.nan, len(x), method)
    rng = np.random.default_rng(derive_seed(seed, "clusters"))
    drawn = rng.integers(0, k, size=(N_RESAMPLES, k))
    if statistic is None:
        sums = np.bincount(code, weights=x.reshape(len(x)), minlength=k)
        draws = sums[drawn].sum(1) / np.bincount(code, minlength=k)[drawn].sum(1)
    else:
        members = [np.flatnonzero(code == c) for c in range(k)]
        draws = np.array([compute(x[np.concatenate([members[c] for c in row])]) for row in drawn], dtype=float)
    gone = int(np.isnan(draws).sum())
    if gone:
        method += f", {gone} of {N_RESAMPLES} resamples without a value"
    tail = (1 - CONFIDENCE) / 2
    low, high = np.nanquantile(draws, [tail, 1 - tail]) if gone < N_RESAMPLES else (np.nan, np.nan)
    return Estimate(value, float(low), float(high), len(x), method)


class ClusteredShare(NamedTuple):
    """A share over pairs that come in clusters.

    Attributes:
        estimate: the share; each end of the interval is the more cautious of the cluster bootstrap's and of the Wilson
            interval's at `n_effective`.
        n_clusters: base models.
        icc: intraclass correlation used (how far pairs of one base model agree beyond chance).
        n_effective: independent pairs that carry as much information.
        worst: the Wilson interval if every base model counted only once (`icc` = 1): no assumption, and wide.
    """

    estimate: Estimate
    n_clusters: int
    icc: float
    n_effective: float
    worst: Estimate


def clustered_share(
    hits: ArrayLike, clusters: Sequence[object], *, icc_floor: float = 0.0, seed: int = 0
) -> ClusteredShare:
    """A share of pairs with an interval that holds where all, or nearly all, are hits.

    1. n_effective = n / (1 + (m − 1) icc) · (t₍n−1₎ / t₍k−1₎)², at most n, for n pairs in k clusters of some m pairs
       each: the design effect, and the price of knowing the spread between clusters from k of them only.
    2. Wilson's interval for the share at n_effective, and `clustered`'s; the more cautious end of either.

    Where all hits are alike the bootstrap is a point and the icc cannot be estimated: it is then `icc_floor`, as the
    estimate's `method` says.  Estimate the floor on pairs that are not reported here (`intraclass`), or read `worst`.

    Args:
        hits: [pair] in [0, 1] (ties make fractions); NaN is left out.
        clusters: for each pair, the base model.
        icc_floor: least intraclass correlation to assume.
        seed: of the bootstrap.

    Raises:
        UserError: lengths that differ, a hit or a floor outside [0, 1].
    """
    from scipy.stats import t

    x, code = _without_nan(hits, clusters)
    if not 0 <= icc_floor <= 1:
        raise UserError(f"icc_floor: {icc_floor} is no correlation between 0 and 1.")
    if ((x < 0) | (x > 1)).any():
        raise UserError("hits: a hit is outside [0, 1]; give a share for each pair.")
    n, k = len(x), int(code.max()) + 1 if len(code) else 0
    if not n:
        nothing = Estimate(np.nan, np.nan, np.nan, 0, "no pairs")
        return ClusteredShare(nothing, 0, np.nan, np.nan, nothing)
    value, means = float(x.mean()), np.bincount(code, weights=x) / np.bincount(code)
    worst = Estimate(float(means.mean()), *_wilson(float(means.mean()), float(k)), k, "wilson, one value a cluster")
    if k == 1:
        return ClusteredShare(Estimate(value, np.nan, np.nan, n, "1 cluster"), 1, np.nan, np.nan, worst)
    found = intraclass(x, clusters_of(code))
    icc = max(icc_floor, 0.0 if np.isnan(found) else found)
    size = float((np.bincount(code) ** 2).sum() / n)  # mean size as a pair sees it
    known = float(t.ppf(1 - (1 - CONFIDENCE) / 2, n - 1) / t.ppf(1 - (1 - CONFIDENCE) / 2, k - 1))
    n_effective = min(float(n), n / (1 + (size - 1) * icc) * known**2)
    low, high = _wilson(value, n_effective)
    boot = clustered(x, clusters_of(code), seed=seed)
    how = f"icc {icc:.2f}" + (" assumed, all alike" if np.isnan(found) else "")
    method = f"wilson at n = {n_effective:.1f} ({how}) or bootstrap of {k} clusters, the more cautious"
    out = Estimate(value, min(low, boot.ci_low), max(high, boot.ci_high), n, method)
    return ClusteredShare(out, k, icc, n_effective, worst)


def intraclass(values: ArrayLike, clusters: Sequence[object]) -> float:
    """Intraclass correlation by one-way analysis of variance, at least 0; NaN where it cannot be told.

    It cannot where all values are alike, or no cluster has two.  With clusters of sizes m_c, n in all, k of them:
    (MSB − MSW) / (MSB + (m₀ − 1) MSW), m₀ = (n − Σ m_c² / n) / (k − 1).

    Raises:
        UserError: values and clusters are not of one length.
    """
    x, code = _without_nan(values, clusters)
    sizes = np.bincount(code)
    n, k = len(x), len(sizes)
    if k < 2 or n <= k or np.ptp(x) == 0:
        return float("nan")
    means = np.bincount(code, weights=x) / sizes
    between = float((sizes * (means - x.mean()) ** 2).sum() / (k - 1))
    within = float(((x - means[code]) ** 2).sum() / (n - k))
    typical = (n - float((sizes**2).sum()) / n) / (k - 1)
    return max(0.0, (between - within) / (between + (typical - 1) * within))


def _wilson(share: float, n: float) -> tuple[float, float]:
    """Wilson's score interval at an n that need not be whole."""
    from scipy.stats import norm

    z2 = float(norm.ppf(1 - (1 - CONFIDENCE) / 2)) ** 2
    centre, half = share + z2 / (2 * n), (z2 * (share * (1 - share) / n + z2 / (4 * n * n))) ** 0.5
    # At 0 and 1 the end is the share itself, but for rounding.
    low, high = (centre - half) / (1 + z2 / n), (centre + half) / (1 + z2 / n)
    return (0.0 if share == 0 else low), (1.0 if share == 1 else high)


def clusters_of(code: NDArray[np.int64]) -> list[object]:
    """Codes of clusters as labels."""
    return list(code.tolist())


def _without_nan(values: ArrayLike, clusters: Sequence[object]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Values without those that hold a NaN, and the codes 0, 1, … of their clusters."""
    x = np.asarray(values, dtype=float)
    if len(x) != len(clusters):
        raise UserError(f"clusters: {len(clusters)} labels for {len(x)} values; give one for each pair.")
    keep = ~np.isnan(x.reshape(len(x), -1)).any(1) if len(x) else np.zeros(0, dtype=bool)
    kept = [label for label, k in zip(clusters, keep, strict=True) if k]
    return x[keep], pd.factorize(np.array([str(label) for label in kept], dtype=object))[0].astype(np.int64)
