"""The loss of effect between two minds, and when it may stand in a denominator.

`loss = E(tuned) − E(base)` (negative: tuning cost effect), paired over traces.  A share of the loss is given only where
the loss is safely away from zero: its interval excludes 0 and it is at least `SAFE_SHARE` of the larger |E|.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from reasoninterp.stats import Estimate, difference

SAFE_SHARE = 0.10


def loss_of(base: ArrayLike, tuned: ArrayLike, *, seed: int = 0) -> Estimate:
    """`E(tuned) − E(base)` with its paired bootstrap interval over traces, in nats."""
    return difference(tuned, base, seed=seed)


def is_safe(base: ArrayLike, tuned: ArrayLike, *, seed: int = 0) -> bool:
    """Whether the loss is safely away from zero."""
    loss = loss_of(base, tuned, seed=seed)
    scale = max(abs(float(np.mean(np.asarray(base)))), abs(float(np.mean(np.asarray(tuned)))))
    excludes_zero = loss.ci_low > 0 or loss.ci_high < 0
    return bool(excludes_zero and abs(loss.value) >= SAFE_SHARE * scale)
