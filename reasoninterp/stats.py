"""Intervals and tests: every number with its n, its interval and the convention behind it.

* A share (0/1 per trace) has the Wilson interval (`scipy.stats.binomtest`).
* A mean has the percentile bootstrap over traces (`scipy.stats.bootstrap`); where a trace gives several rows,
  the rows are averaged within the trace first, so that the trace, not the row, is resampled.
* A difference or a ratio between minds is paired: both are read on the same resampled traces.

All intervals are 95 % unless said otherwise and cover the choice of traces, not training seeds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from reasoninterp.errors import UserError

CONFIDENCE = 0.95
N_RESAMPLES = 2000


class Estimate(NamedTuple):
    """A number with its interval, the count of traces behind it and how the interval was made."""

    value: float
    ci_low: float
    ci_high: float
    n: int
    method: str


def derive_seed(seed: int, *labels: object) -> int:
    """A seed that depends on the run's seed and on any labels, the same in every process."""
    key = ":".join(str(x) for x in (seed, *labels)).encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:4], "little")


def proportion(hits: ArrayLike) -> Estimate:
    """Share of true values with its Wilson interval; NaN values are left out and do not count towards n.

    Raises:
        ValueError: a value that is neither 0 nor 1 (a fraction would be cut to a whole number of hits).
    """
    from scipy.stats import binomtest

    values = np.asarray(hits, dtype=float)
    values = values[~np.isnan(values)]
    n = len(values)
    if not n:
        return Estimate(np.nan, np.nan, np.nan, 0, "wilson")
    if not np.isin(values, (0, 1)).all():
        raise ValueError("a share is of values that are 0 or 1; take the mean of other values")
    k = int(values.sum())
    ci = binomtest(k, n).proportion_ci(CONFIDENCE, method="wilson")
    return Estimate(k / n, float(ci.low), float(ci.high), n, "wilson")


def mean(values: ArrayLike, *, seed: int = 0) -> Estimate:
    """Mean over traces with its bootstrap interval; NaN values are left out and do not count towards n."""
    x = np.asarray(values, dtype=float)
    return statistic([x[~np.isnan(x)]], lambda a, axis: np.mean(a, axis=axis), seed=seed)


def difference(a: ArrayLike, b: ArrayLike, *, seed: int = 0) -> Estimate:
    """Mean of the paired differences `a - b` over traces; a pair with a NaN is left out.

    Raises:
        ValueError: the two are not of one length, so they are not pairs.
    """
    x, y = _paired(a, b)
    return mean(x - y, seed=seed)


def paired_shares(a: ArrayLike, b: ArrayLike) -> Estimate:
    """Difference of two paired shares, `mean(a) - mean(b)`, with Newcombe's score interval.

    The bootstrap of a sample without variation is a point, whatever its size; this interval is not (Newcombe 1998,
    Statistics in Medicine 17:2635, method 10).  Pairs with a NaN are left out.
    """
    x, y = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    keep = ~(np.isnan(x) | np.isnan(y))
    x, y = x[keep], y[keep]
    if not len(x):
        return Estimate(np.nan, np.nan, np.nan, 0, "newcombe")
    p, q, n = proportion(x), proportion(y), len(x)
    both, first = float((x * y).sum()), float((x * (1 - y)).sum())
    second, none = float(((1 - x) * y).sum()), float(((1 - x) * (1 - y)).sum())
    margins = (both + first) * (second + none) * (both + second) * (first + none)
    excess = both * none - first * second
    phi = 0.0 if margins == 0 else (max(excess - n / 2, 0.0) if excess > 0 else excess) / margins**0.5
    p_low, p_high, q_low, q_high = p.value - p.ci_low, p.ci_high - p.value, q.value - q.ci_low, q.ci_high - q.value
    d = p.value - q.value
    low = d - max(p_low**2 - 2 * phi * p_low * q_high + q_high**2, 0.0) ** 0.5
    high = d + max(p_high**2 - 2 * phi * p_high * q_low + q_low**2, 0.0) ** 0.5
    return Estimate(d, low, high, n, "newcombe")


def paired(a: ArrayLike, b: ArrayLike, *, seed: int = 0) -> Estimate:
    """Paired difference: `paired_shares` where every value is 0 or 1, else the bootstrap of the differences."""
    x, y = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    whole = np.concatenate([x, y])
    shares = np.isin(whole[~np.isnan(whole)], [0.0, 1.0]).all()
    return paired_shares(x, y) if shares else difference(x, y, seed=seed)


def ratio(a: ArrayLike, b: ArrayLike, *, seed: int = 0) -> Estimate:
    """Mean of `a` over mean of `b`, both read on the same resampled traces.

    The caller decides whether the denominator is safely away from zero; this does not.

    Raises:
        ValueError: the two are not of one length, so they are not pairs.
    """
    x, y = _paired(a, b)
    keep = ~(np.isnan(x) | np.isnan(y))
    return statistic([x[keep], y[keep]], lambda p, q, axis: np.mean(p, axis=axis) / np.mean(q, axis=axis), seed=seed)


def _paired(a: ArrayLike, b: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Both as vectors of one length; NumPy would stretch a single value over all traces without a word."""
    x, y = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if x.shape != y.shape:
        raise ValueError(f"pairs are wanted, not {x.shape} against {y.shape} values")
    return x, y


def statistic(samples: Sequence[NDArray[np.float64]], compute: Callable[..., Any], *, seed: int = 0) -> Estimate:
    """Any statistic of paired per-trace samples with its percentile bootstrap interval.

    Args:
        samples: arrays `[trace]` of equal length.
        compute: vectorised statistic, called as `compute(*samples, axis=...)`.
        seed: seed of the resampling.
    """
    from scipy.stats import bootstrap

    n = len(samples[0])
    if not n:
        return Estimate(np.nan, np.nan, np.nan, 0, "bootstrap")
    value = float(compute(*samples, axis=-1))
    if n == 1 or all(np.ptp(s) == 0 for s in samples):
        # A constant sample resamples to itself; one trace says nothing of its spread.
        spread = value if n > 1 else np.nan
        return Estimate(value, spread, spread, n, "bootstrap")
    with np.errstate(all="ignore"):
        ci = bootstrap(
            tuple(samples),
            compute,
            n_resamples=N_RESAMPLES,
            paired=True,
            vectorized=True,
            method="percentile",
            confidence_level=CONFIDENCE,
            rng=np.random.default_rng(derive_seed(seed, "bootstrap")),
        ).confidence_interval
    return Estimate(value, float(ci.low), float(ci.high), n, "bootstrap")


def estimate(
    rows: pd.DataFrame,
    *,
    by: Sequence[str],
    value: str,
    over: str = "trace",
    kind: str = "auto",
    seed: int = 0,
) -> pd.DataFrame:
    """A tidy summary: one row per group with `value, ci_low, ci_high, n`.

    Rows of the same `over` (trace) within a group are averaged first, so the trace is what is resampled.

    Args:
        rows: raw rows with the columns of `by`, the column `value` and, usually, the column `over`.
        by: columns that make a group; groups keep their order of appearance.
        value: the column to summarise; NaN and None are left out and do not count towards n.
        over: the unit that is resampled.
        kind: `"share"` (Wilson; bootstrap for a group in which a trace's rows average to a fraction), `"mean"`
            (bootstrap), or `"auto"`: a share where every value is 0 or 1.
        seed: seed of the resampling.

    Raises:
        ValueError: an unknown kind, or a share of values outside 0…1.
    """
    if kind not in ("auto", "mean", "share"):
        raise ValueError(f"kind {kind!r}: not one of auto, mean, share")
    missing = [name for name in (*by, value) if name not in rows.columns]
    if missing:
        have = ", ".join(map(str, rows.columns)) or "none: there are no rows"
        raise UserError(f"estimate: no column {missing[0]!r} in the rows; the columns are {have}.")
    frame = rows.copy()
    frame[value] = pd.to_numeric(frame[value]).astype(float)
    keys = list(by)
    if over in frame.columns:
        units = list(dict.fromkeys([*keys, over]))
        frame = frame.groupby(units, sort=False, dropna=False)[value].mean().reset_index()
    share = kind == "share" or (kind == "auto" and frame[value].dropna().isin([0.0, 1.0]).all())
    if kind == "share" and not frame[value].dropna().between(0, 1).all():
        raise ValueError(f"column {value!r}: a share is of values between 0 and 1")
    groups: Iterable = frame.groupby(keys, sort=False, dropna=False) if keys else [((), frame)]
    out = []
    for key, group in groups:
        whole = share and group[value].dropna().isin([0.0, 1.0]).all()
        found = proportion(group[value]) if whole else mean(group[value], seed=seed)
        out.append([*(key if isinstance(key, tuple) else (key,)), *found])
    return pd.DataFrame(out, columns=[*keys, "value", "ci_low", "ci_high", "n", "method"])


def matrix_intervals(values: NDArray[np.float64], *, seed: int = 0) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Bootstrap intervals over traces for many means at once.

    The same resampled traces serve every column, so intervals of a ledger's entries belong together.

    Args:
        values: `[trace, column]` without NaN.

    Returns:
        `(ci_low, ci_high)`, each `[column]`; NaN where there is a single trace.
    """
    n = len(values)
    if n < 2:
        nan = np.full(values.shape[1], np.nan)
        return nan, nan
    rng = np.random.default_rng(derive_seed(seed, "bootstrap"))
    counts = rng.multinomial(n, np.full(n, 1 / n), size=N_RESAMPLES)
    draws = counts @ values / n
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(draws, [tail, 1 - tail], axis=0)
    return low, high


def auroc(x: NDArray[np.float64], positive: NDArray[np.bool_], cluster: NDArray[Any]) -> Estimate:
    """Chance that a positive row has the larger value, a tie counting half, of rows that come in clusters.

    The interval is Obuchowski's for clustered data (1997, Biometrics 53:567); NaN without one of the two sides.

    Args:
        x: values.
        positive: which rows are to be found.
        cluster: of each row (its trace, its question): what is resampled.
    """
    n, m = int(positive.sum()), int((~positive).sum())
    names, at = np.unique(cluster, return_inverse=True)
    if not n or not m:
        return Estimate(np.nan, np.nan, np.nan, len(names), "obuchowski")
    below, above = placements(x[positive], x[~positive]), placements(x[~positive], x[positive])
    value = float(below.mean())
    # Each row's part in the estimate, summed over its cluster, is what varies from one draw of clusters to the next.
    part = np.empty(len(x))
    part[positive], part[~positive] = (below - value) / n, (1 - above - value) / m
    k = len(names)
    spread = 1.96 * float(np.sqrt((np.bincount(at, part) ** 2).sum() * k / (k - 1))) if k > 1 else np.nan
    return Estimate(value, max(0.0, value - spread), min(1.0, value + spread), k, "obuchowski")


def placements(x: NDArray[np.float64], others: NDArray[np.float64]) -> NDArray[np.float64]:
    """Share of the others below each value, a tie counting half."""
    ranked = np.sort(others)
    return (np.searchsorted(ranked, x) + np.searchsorted(ranked, x, side="right")) / (2 * len(ranked))


# ---------------------------------------------------------------------------------------------- tests and corrections

EXACT_MAX_N = 14  # up to here, all sign patterns are fewer than the draws
N_PERMUTATIONS = 9999


def sign_flip_pvalues(values: NDArray[np.float64], *, seed: int = 0) -> NDArray[np.float64]:
    """Two-sided sign-flip permutation p-values that the mean over traces is zero, for many columns at once.

    The null: each trace's effect is as likely to be `-x` as `x`.  With at most `EXACT_MAX_N` traces all sign patterns
    are counted and p is exact (never below `2 / 2**n`); with more, `N_PERMUTATIONS` patterns are drawn, the same for
    every column, and `p = (hits + 1) / (N_PERMUTATIONS + 1)`.  A tie counts as a hit.  The definition is that of
    `transformer_lens.utilities.statistics.sign_flip_permutation_pvalue`; as one product of matrices it is some ten
    times faster, and this module stays free of torch.

    Only for signed effects: a quantity that cannot be negative (a KL divergence) has no such null.

    Args:
        values: `[trace, column]`; NaN where a trace has no such effect (left out of its column).
        seed: seed of the drawn patterns.

    Returns:
        `[column]`; NaN for a column without values.
    """
    x = np.asarray(values, dtype=float)
    present = ~np.isnan(x)
    out = np.full(x.shape[1], np.nan)
    # Columns of the same traces share their sign patterns.
    kinds, kind_of = np.unique(present, axis=1, return_inverse=True)
    for k, rows in enumerate(kinds.T):
        if not rows.any():
            continue
        at = np.flatnonzero(kind_of.reshape(-1) == k)
        signs, drawn = _sign_patterns(int(rows.sum()), seed)
        for some in np.array_split(at, 1 + len(at) // 256):
            block = x[np.ix_(rows, some)]
            observed = np.abs(block.sum(0))
            slack = observed * (100 * np.finfo(float).eps)  # sums in another order differ in their last digits
            hits = (np.abs(signs @ block) >= observed - slack).sum(0)
            out[some] = (hits + drawn) / (len(signs) + drawn)
    return out


def _sign_patterns(n: int, seed: int) -> tuple[NDArray[np.float64], int]:
    """Sign patterns `[pattern, trace]`, and 1 where they were drawn at random, 0 where these are all of them."""
    if n <= EXACT_MAX_N:
        # A pattern and its opposite tie in a two-sided test, so the first sign can stay.
        bits = (np.arange(2 ** (n - 1))[:, None] >> np.arange(n)) & 1
        return 1.0 - 2.0 * bits.astype(np.float64), 0
    rng = np.random.default_rng(derive_seed(seed, "sign-flip", n))
    return 2.0 * rng.integers(0, 2, size=(N_PERMUTATIONS, n)).astype(np.float64) - 1.0, 1


def corrected(p: ArrayLike, method: str = "bh") -> NDArray[np.float64]:
    """p-values corrected for the number of tests; NaN (not tested) stays NaN and does not count.

    Args:
        p: p-values of one family of tests.
        method: `"bh"` (Benjamini and Hochberg: bounds the share of false discoveries) or `"holm"` (Holm: bounds the
            chance of any).

    Raises:
        ValueError: another method.
    """
    from scipy.stats import false_discovery_control

    if method not in ("bh", "holm"):
        raise ValueError(f"correction {method!r}: not one of bh, holm")
    out = np.array(p, dtype=float)
    real = ~np.isnan(out)
    found = out[real]
    if not len(found):
        return out
    if method == "bh":
        out[real] = false_discovery_control(found, method="bh")
        return out
    order = np.argsort(found, kind="stable")
    steps = np.maximum.accumulate(found[order] * np.arange(len(found), 0, -1))
    found[order] = np.minimum(steps, 1.0)
    out[real] = found
    return out


def effect_sizes(
    rows: pd.DataFrame,
    by: Sequence[str],
    value: str,
    *,
    family: Sequence[str] = (),
    over: str = "trace",
    seed: int = 0,
    correction: str = "bh",
) -> pd.DataFrame:
    """`estimate` of a mean with its standardised size and its p-value, effect sizes first.

    Rows of the same trace within a group are averaged first: the trace is what is resampled and what is flipped.

    Args:
        rows: raw rows, one effect each, signed (see `sign_flip_pvalues`: not for a KL divergence).
        by: columns that make a group, e.g. `["mind", "layer", "head"]`.
        value: the column of effects; NaN is left out.
        family: those columns of `by` within which p-values are corrected together: `["mind"]` corrects over layers and
            heads within each mind.  Empty: all groups are one family.
        over: the unit that is resampled and flipped.
        seed: seed of both.
        correction: `"bh"` or `"holm"` (see `corrected`).

    Returns:
        One row per group: `by`, `value, ci_low, ci_high, n, method, d, p, p_corrected`.  `d` is the mean over traces
        divided by their standard deviation (NaN for one trace, or where all agree).

    Raises:
        UserError: no such column, or a column of `family` that is not in `by`.
    """
    extra = [name for name in family if name not in by]
    if extra:
        raise UserError(
            f"effect_sizes: family names {extra[0]!r}, which is none of the columns of by: {', '.join(by)}."
        )
    table = estimate(rows, by=by, value=value, over=over, kind="mean", seed=seed)
    wide = _per_unit(rows, list(by), value, over)
    n, average = table["n"].to_numpy(), table["value"].to_numpy(float)
    with np.errstate(all="ignore"):
        spread = np.sqrt(np.nansum((wide - average) ** 2, axis=0) / (n - 1))
        table["d"] = np.where(spread > 1e-12 * np.abs(average), average / spread, np.nan)
    table["p"] = sign_flip_pvalues(wide, seed=seed)
    families = table.groupby(list(family), sort=False, dropna=False).ngroup() if family else pd.Series(0, table.index)
    table["p_corrected"] = table.groupby(families)["p"].transform(lambda p: corrected(p, correction))
    return table


def _per_unit(rows: pd.DataFrame, by: list[str], value: str, over: str) -> NDArray[np.float64]:
    """`[unit, group]`: means of each unit's rows within each group, groups in order of appearance; NaN where none."""
    frame = pd.DataFrame({"group": rows.groupby(by, sort=False, dropna=False).ngroup() if by else 0}, index=rows.index)
    frame["value"] = pd.to_numeric(rows[value]).astype(float)
    # Where units have no names, every row is one.
    frame["unit"] = pd.factorize(rows[over])[0] if over in rows.columns else frame.groupby("group").cumcount()
    wide = frame.groupby(["unit", "group"])["value"].mean().unstack("group")
    return wide.to_numpy(float)
