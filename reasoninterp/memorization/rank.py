"""Rank correlations of a token's alternatives, with control variables, for many count vectors at once.

1. Values become average ranks over the alternatives (ties share their mean rank) and are centred.
2. *Partial*: the ranks of both sides are replaced by what a linear regression on the controls' ranks leaves of them, and
   these residuals are correlated (the usual partial Spearman correlation; without controls, Spearman's).
3. *Share*: R² of the regression of the ranks of one side on the ranks of several others.  With some 20 alternatives and
   up to 4 regressors the plain R² of pure noise is 0.2, so the adjusted one is given,
   `1 − (1 − R²) (m − 1) / (m − r − 1)` with m alternatives and regressors of rank r: it is 0 on average where nothing is
   explained, and may be negative.  (The cross-validated one of noise is well below 0, and noisier, at this size.)

What is not defined is NaN here: too few alternatives, a side that is constant, or one that the controls determine.
`sources` turns it into None and a reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from jaxtyping import Float64
from scipy.stats import rankdata

Values: TypeAlias = Float64[np.ndarray, " alt"]
MIN_ALTERNATIVES = 3
_NOTHING = 1e-9  # share of a sum of squares below which only rounding is left


def centred_ranks(values: Float64[np.ndarray, "*rows alt"]) -> Float64[np.ndarray, "*rows alt"]:
    """Average ranks along the last axis, minus their mean."""
    ranks = rankdata(values, axis=-1) - (values.shape[-1] + 1) / 2
    return np.asarray(ranks, dtype=np.float64)


def partial_correlations(
    x: Values, y: Float64[np.ndarray, "row alt"], controls: Sequence[Values] = ()
) -> Float64[np.ndarray, " row"]:
    """Rank correlation of `x` with each row of `y`, given the controls; NaN where it is not defined.

    Args:
        x: one value for each alternative.
        y: rows of values for the same alternatives.
        controls: what both are freed of; one that is constant frees them of nothing.
    """
    n = len(x)
    if n < MIN_ALTERNATIVES + len(controls):
        return np.full(len(y), np.nan)
    basis = _basis(controls, n)
    left, right = _left(centred_ranks(x), basis), _left(centred_ranks(y), basis)
    norms = np.sqrt((left**2).sum() * (right**2).sum(-1))
    with np.errstate(invalid="ignore"):
        return np.clip(right @ left / np.where(norms > 0, norms, np.nan), -1.0, 1.0)


def adjusted_share(x: Values, regressors: Sequence[Values]) -> float:
    """Adjusted R² of the ranks of `x` on the ranks of the regressors; NaN where it is not defined."""
    ranks = centred_ranks(x)
    total = float((ranks**2).sum())
    basis = _basis(regressors, len(x))
    spare = len(x) - basis.shape[1] - 1
    if spare < 1 or total == 0:
        return float("nan")
    return 1.0 - float((_left(ranks, basis) ** 2).sum()) / total * (len(x) - 1) / spare


def _basis(controls: Sequence[Values], n: int) -> Float64[np.ndarray, "alt rank"]:
    """Orthonormal directions of the controls' centred ranks; as many as they have rank."""
    if not controls:
        return np.zeros((n, 0))
    u, s, _ = np.linalg.svd(centred_ranks(np.stack(controls)).T, full_matrices=False)
    return u[:, s > _NOTHING * max(1.0, s[0])]


def _left(
    ranks: Float64[np.ndarray, "*rows alt"], basis: Float64[np.ndarray, "alt rank"]
) -> Float64[np.ndarray, "*rows alt"]:
    """What a regression on the basis leaves; exactly 0 where that is rounding."""
    rest = ranks - (ranks @ basis) @ basis.T
    nothing = (rest**2).sum(-1, keepdims=True) <= _NOTHING * (ranks**2).sum(-1, keepdims=True)
    return np.where(nothing, 0.0, rest)
