"""Can a score of tokens find the wrong ones?  Precision and recall at k, beside chance and the mind's own surprise.

1. In each trace with at least one wrong token W, the judged tokens of its steps are ranked by a score, largest first:
   `stim`, the largest of the three raw correlations (STIM's); `partial`, the largest given unigram counts; `surprise`,
   −log₂ P of the token.  A token without a score comes last.
2. With h of the first k in W: precision `h / min(|W|, k)`, recall `h / |W|` (STIM's definitions, arXiv:2508.02037).  Where
   scores tie, h is its expectation over the orders of those that tie.
3. `random` is the expectation under a random order: `h = k |W| / n` of n judged tokens.  Traces with k > n count n.

Only traces with a wrong token take part, so these are not rates of detection over all traces.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float64

from reasoninterp.memorization.names import SOURCES, STEP
from reasoninterp.stats import estimate

KS = (1, 2, 3)
RANDOM = "random"
SCORES = ("stim", "partial", "surprise", RANDOM)


def scores_of(tokens: pd.DataFrame) -> pd.DataFrame:
    """The scores by which tokens are ranked, a column each; NaN where there is none."""
    largest = {
        name: tokens[[f"{s}_{column}" for s in SOURCES]].astype(float).max(axis=1)
        for name, column in (("stim", "score"), ("partial", "partial"))
    }
    return pd.DataFrame({**largest, "surprise": tokens["surprise"].astype(float), RANDOM: 0.0})


def expected_hits(score: Float64[np.ndarray, " token"], wrong: Bool[np.ndarray, " token"], k: int) -> float:
    """Wrong tokens among the k of largest score, in expectation where scores tie; those without a score come last."""
    ranked = np.where(np.isnan(score), -np.inf, score)
    hits, left = 0.0, min(k, len(ranked))
    for value in np.unique(ranked)[::-1]:
        here = ranked == value
        taken = min(left, int(here.sum()))
        hits += taken * float(wrong[here].mean())
        left -= taken
        if not left:
            break
    return hits


def finding_table(tokens: pd.DataFrame, seed: int) -> pd.DataFrame:
    """`memorization_finding`: mind, shift, score, k, measure, value, ci_low, ci_high, n (traces with a wrong token), method."""
    rows = list(_rows(tokens))
    if not rows:
        return pd.DataFrame()
    by = ["mind", "shift", "score", "k", "measure"]
    return estimate(pd.DataFrame(rows), by=by, value="value", kind="mean", seed=seed)


def _rows(tokens: pd.DataFrame) -> Iterator[dict[str, object]]:
    some = tokens[(tokens["part"] == STEP) & tokens["wrong"].notna()]
    if some.empty:
        return
    scores = scores_of(some)
    for (mind, shift, trace), group in some.groupby(["mind", "shift", "trace"], sort=False):
        wrong = group["wrong"].to_numpy(dtype=bool)
        if not wrong.any():
            continue
        about = {"mind": mind, "shift": shift, "trace": trace}
        for name in SCORES:
            score = scores.loc[group.index, name].to_numpy(dtype=np.float64)
            for k in KS:
                hits = expected_hits(score, wrong, k)
                yield {**about, "score": name, "k": k, "measure": "precision", "value": hits / min(wrong.sum(), k)}
                yield {**about, "score": name, "k": k, "measure": "recall", "value": hits / wrong.sum()}
