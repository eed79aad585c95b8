"""Do counts and interventions agree, token by token?  What the corpus calls local, does the network take from nearby?

1. `causes_table`: of tokens called local, mid-range, long-range or none of them by the counts, the mean effect of taking
   the local window, the chain before it, the question, or as many random tokens as the window has out of the context
   (`ablation`): `kl` and `drop`, in bits.
2. `agreement_table`: does the effect tell which tokens the counts call a source?  Of a token's effects, the share of its part,
   `kl_s / (kl_local + kl_mid + kl_long)`, is compared between tokens called s alone and all others that are not called s
   (of the same mind and part, with all three parts there): the chance that the former have the larger share (AUROC; .5 is no
   agreement).  Shares, since the local window is what the prediction stands on: taking it out moves nearly every token.
"""

from __future__ import annotations

import pandas as pd

from reasoninterp.memorization.names import REMOVED, SOURCES
from reasoninterp.memorization.tables import called
from reasoninterp.stats import auroc, estimate


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


def agreement_table(tokens: pd.DataFrame) -> pd.DataFrame:
    """`memorization_agreement`: mind, part, called, measure (`auroc`), value, ci_low, ci_high, n (traces), method, n_tokens
    (called)."""
    columns = [f"kl_{source}" for source in SOURCES]
    frame = tokens[tokens[columns].notna().all(axis=1)]
    frame = frame.assign(called=called(frame), total=frame[columns].sum(axis=1))
    out = []
    for (mind, part), some in frame[frame["total"] > 0].groupby(["mind", "part"], sort=False):
        for source in SOURCES:
            mine = (some["called"] == source).to_numpy()
            compared = mine | ~some["called"].str.split("+").map(lambda names, s=source: s in names).to_numpy(bool)
            if mine.any() and not mine[compared].all():
                rows = some[compared]
                share = (rows[f"kl_{source}"] / rows["total"]).to_numpy(float)
                found = auroc(share, mine[compared], rows["trace"].to_numpy())
                about = {"mind": mind, "part": part, "called": source, "measure": "auroc"}
                out.append({**about, **found._asdict(), "n_tokens": int(mine.sum())})
    return pd.DataFrame(out)
