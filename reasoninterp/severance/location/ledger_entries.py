"""The ledger's entries of the Units that grafts move, so that the two speak of the same weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from reasoninterp.models.units import Unit
from reasoninterp.severance.ledger.integrate import Integral
from reasoninterp.stats import matrix_intervals


def as_moved(entries: Mapping[str, NDArray[np.float64]], names: Sequence[str]) -> dict[str, NDArray[np.float64]]:
    """Entries [contrast] by the Unit that a graft moves: both uses of a tied embedding are one Unit, `embed`.

    Args:
        entries: of a level, as `Integral.at` has them: a tied embedding's use as unembedding stands by itself.
        names: of the Units of that level.
    """
    out = dict(entries)
    if "unembed" in out and "unembed" not in names:
        out["embed"] = out["embed"] + out.pop("unembed")
    return out


def ledger_of(integral: Integral, found: Sequence[Unit], level: str, *, seed: int = 0) -> pd.DataFrame:
    """The ledger's entries of a level, in the Units' order: index `unit`; `value, ci_low, ci_high` in nats."""
    names = [u.name for u in found]
    held = as_moved(integral.at(level), names)
    empty = np.zeros(len(integral.e_from))
    values = np.stack([held.get(name, empty) for name in names], axis=1)
    low, high = matrix_intervals(values, seed=seed)
    return pd.DataFrame({"value": values.mean(0), "ci_low": low, "ci_high": high}, index=pd.Index(names, name="unit"))


def loss_shares(ledger: pd.DataFrame) -> pd.Series:
    """Each Unit's share of all losses in the ledger; 0 for a Unit that gained, and for all where nothing lost."""
    losses = (-ledger["value"]).clip(lower=0)
    return losses / losses.sum() if losses.sum() > 0 else losses
