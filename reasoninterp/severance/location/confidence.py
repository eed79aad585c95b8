"""How likely it is that the located set is right: stated features through a logistic map fitted on known cases.

1. `FEATURES` are read off a location alone, none from the truth: how far the sets restore and cut, how far the ledger
   and the grafts agree, how much was lost, how far the ledger sums.
2. `fit` finds, by penalised maximum likelihood, the weights with which a logistic function of the standardised features
   predicts whether the located set was right, on pairs whose truth is known.
3. `confidence` reads that map from `calibration.json` beside this module.  Where there is none, a location is *not
   calibrated* and its confidence NaN: a number that nobody has checked is no confidence.

The file says on how many pairs it was fitted and what it was checked on; it holds for pairs like those.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from reasoninterp.errors import UserError

CALIBRATION = Path(__file__).with_name("calibration.json")
FEATURES = (
    "restored",  # share of the loss that the restoring set returns, within 0 and 1
    "cut",  # share that the cutting set takes away, within 0 and 1
    "ledger_share",  # share of the ledger's losses that fall on the located Units
    "ledger_lead",  # the first Unit's loss in the ledger minus the second's, as a share of all losses
    "agreement",  # 1 where the ledger's and the grafts' leading Units are both in the located sets
    "parsimony",  # 1 over the number of Units in the smaller of the two sets
    "lost_follow",  # share of the base's follow rate that is lost
    "lost_effect",  # share of the base's E that is lost, within 0 and 1
    "residual",  # relative residual of the ledger, at most 1
)


class Confidence(NamedTuple):
    """Probability that the located set is right (NaN where not calibrated), what that rests on, and the features."""

    value: float
    basis: str
    features: dict[str, float]


def confidence(features: Mapping[str, float], calibration: Path = CALIBRATION) -> Confidence:
    """The calibrated confidence of a location.

    Args:
        features: a value for each of `FEATURES`; NaN counts as the mean of the cases that the map was fitted on.
        calibration: the file that `fit` made.

    Raises:
        UserError: the file names features that are not given.
    """
    given = {name: float(value) for name, value in features.items()}
    if not calibration.exists():
        return Confidence(float("nan"), "not calibrated", given)
    known = json.loads(calibration.read_text(encoding="utf-8"))
    if missing := [name for name in known["features"] if name not in given]:
        raise UserError(
            f"{calibration.name}: it uses the feature {missing[0]!r}, which a location has not; fit it anew."
        )
    x = np.array([given[name] for name in known["features"]])
    z = np.nan_to_num((x - known["mean"]) / known["scale"], nan=0.0)
    value = 1 / (1 + np.exp(-(float(np.dot(z, known["weights"])) + known["intercept"])))
    return Confidence(float(value), str(known["basis"]), given)


def fit(features: pd.DataFrame, right: ArrayLike, *, basis: str, penalty: float = 1.0) -> dict[str, Any]:
    """The logistic map, as `calibration.json` holds it.

    Args:
        features: one row a pair, with the columns of `FEATURES`.
        right: whether its located set was right, 0 or 1.
        basis: what it was fitted on, in words.
        penalty: of the squared weights of standardised features; the intercept is not penalised.

    Raises:
        UserError: a column is missing, or all sets were right or all wrong.
    """
    from scipy.optimize import minimize
    from scipy.special import expit

    y = np.asarray(right, dtype=float)
    if missing := [name for name in FEATURES if name not in features]:
        raise UserError(f"features: the column {missing[0]!r} is missing; give all of {', '.join(FEATURES)}.")
    if not len(y) or y.min() == y.max():
        raise UserError("right: all sets were right, or all wrong; give pairs of both kinds.")
    x = features[list(FEATURES)].to_numpy(float)
    average, spread = np.nanmean(x, axis=0), np.nanstd(x, axis=0)
    spread = np.where(spread > 1e-9, spread, 1.0)
    z = np.nan_to_num((x - average) / spread, nan=0.0)
    sign = 2 * y - 1

    def loss(w: np.ndarray) -> tuple[float, np.ndarray]:
        margin = sign * (z @ w[1:] + w[0])
        pull = -sign * expit(-margin)
        gradient = np.concatenate([[pull.sum()], z.T @ pull + penalty * w[1:]])
        return float(np.logaddexp(0, -margin).sum() + penalty * np.square(w[1:]).sum() / 2), gradient

    w = minimize(loss, np.zeros(z.shape[1] + 1), jac=True, method="L-BFGS-B").x
    return {
        "features": list(FEATURES),
        "mean": average.tolist(),
        "scale": spread.tolist(),
        "weights": w[1:].tolist(),
        "intercept": float(w[0]),
        "penalty": penalty,
        "n": len(y),
        "basis": basis,
    }
