"""Do counts and interventions agree, token by token?  What the corpus calls local, does the network take from nearby?

1. `causes_table`: of tokens called local, mid-range, long-range or none of them by the counts, the mean effect of taking
   the local window, the chain before it, the question, or as many random tokens as the window has out of the context
   (`ablation`): `kl` and `drop`, in bits.
2. `agreement_table`: of tokens called one source alone and with all three parts there, the share in which taking *that*
   part out moves the prediction most (`kl`).  Beside it what the same calls would reach on other tokens of the same mind
   and part (`expected`: the share of all those tokens in which that part moves most), and their difference (`excess`),
   which is the agreement that is not due to one part moving everything.

The window is what the prediction stands on, so taking it out moves nearly every token: read `excess`, and the other
parts' effects, rather than the share alone.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from reasoninterp.memorization.names import REMOVED, SOURCES
from reasoninterp.memorization.tables import called
from reasoninterp.stats import estimate


def causes_table(tokens: pd.DataFrame, seed: int) -> pd.DataFrame:
    """`memorization_causes`: mind, part, called, removed, measure, value (bits), ci_low, ci_high, n (traces), method, n_tokens."""
    if tokens[[f"kl_{name}" for name in REMOVED]].isna().all(axis=None):
        return pd.DataFrame()
    by = ["mind", "part", "called"]
    frame = tokens.assign(called=called(tokens))
    parts = []
    for removed in REMOVED:
        for measure in ("kl", "drop"):
            column = f"{measure}_{removed}"
            found = estimate(frame, by=by, value=column, kind="mean", seed=seed)
            found = found.merge(frame.groupby(by)[column].count().rename("n_tokens").reset_index(), on=by)
            found.insert(3, "removed", removed)
            found.insert(4, "measure", measure)
            parts.append(found)
    table = pd.concat(parts, ignore_index=True)
    return table[table["n"] > 0].reset_index(drop=True)


def agreement_table(tokens: pd.DataFrame, seed: int) -> pd.DataFrame:
    """`memorization_agreement`: mind, part, called, measure (agrees, expected, excess), value, ci_low, ci_high, n (traces),
    method, n_tokens."""
    moved = tokens[[f"kl_{source}" for source in SOURCES]].to_numpy(dtype=float)
    whole = ~np.isnan(moved).any(axis=1)
    frame = tokens[whole].assign(called=called(tokens)[whole])
    if frame.empty:
        return pd.DataFrame()
    most = np.array(SOURCES)[moved[whole].argmax(axis=1)]
    by = ["mind", "part", "called"]
    for source in SOURCES:
        frame[f"most_{source}"] = (most == source).astype(float)
    # Over all tokens of a mind and part, weighing traces alike as the estimates do.
    rates = frame.groupby(["mind", "part", "trace"])[[f"most_{s}" for s in SOURCES]].mean()
    rates = rates.groupby(["mind", "part"]).mean()
    some = frame[frame["called"].isin(SOURCES)].copy()
    if some.empty:
        return pd.DataFrame()
    some["agrees"] = [row[f"most_{row['called']}"] for row in some.to_dict("records")]
    some["expected"] = [rates.loc[(r["mind"], r["part"]), f"most_{r['called']}"] for r in some.to_dict("records")]
    some["excess"] = some["agrees"] - some["expected"]
    parts = []
    for measure in ("agrees", "expected", "excess"):
        found = estimate(some, by=by, value=measure, kind="mean", seed=seed)
        found = found.merge(some.groupby(by)[measure].count().rename("n_tokens").reset_index(), on=by)
        found.insert(3, "measure", measure)
        parts.append(found)
    return pd.concat(parts, ignore_index=True)
