"""Right against wrong, in tables: means, differences and AUROCs of measures of steps, clustered by question.

1. *Differences* wrong − right.  `each model`: of its rows.  `same question`: question and model as fixed effects, that is,
   rows on one question, each against its model's mean.  `same question, frequency and place`: besides, given the mean log
   frequency of the tokens (rare numbers are rare everywhere), the step's number and the log of how many tokens.  All by
   residuals (Frisch, Waugh, Lovell); rows weigh equally; the interval resamples questions, with the residuals as they are;
   p flips the sign of each question's part and is corrected over measures (Benjamini and Hochberg).
2. *AUROC* of each measure for finding wrong rows: over all pairs of a wrong and a right one, and over those on the same
   question.  Above ½ the wrong one has the larger value.  Intervals are 95 % over questions: for all pairs from the parts
   that questions have in it (Obuchowski 1997, Biometrics 53:567), for the same question the bootstrap of pairs won over
   pairs.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import pandas as pd
from gsm8k_steps import LABELS

from reasoninterp.stats import Estimate, auroc, corrected, estimate, placements, ratio, sign_flip_pvalues

ALL = "all models"
Units: TypeAlias = dict[str, pd.DataFrame]
MEASURES = {
    "suffix": "longest suffix w, tokens",
    "count": "log₂ count of w + token",
    "share": "share of what follows w",
    "rank": "log₂ (1 + rank after w)",
    "probability": "∞-gram probability",
    "expected": "∞-gram's first choice",
    "question": "PMI with the question, bits",
    "chain": "PMI with the chain, bits",
    "frequency": "log₂ frequency",
    "unseen": "not in the corpus",
}
PLAIN, SAME, GIVEN = "each model", "same question", "same question, frequency and place"


def means(units: Units) -> pd.DataFrame:
    """Mean of each measure by unit, label, model and whether wrong; a question's rows are averaged first."""
    out = []
    for unit, label, rows in judged(units):
        both = pd.concat([rows, rows.assign(model=ALL)])
        n = both.groupby(["model", "wrong"]).agg(n_rows=("place", "size"), n_tokens=("n_tokens", "sum")).reset_index()
        for name in MEASURES:
            found = estimate(both, by=["model", "wrong"], value=name, over="question_id", kind="mean")
            found = found.merge(n, on=["model", "wrong"]).rename(columns={"n": "n_questions"})
            out.append(found.assign(unit=unit, label=label, measure=name))
    return pd.concat(out, ignore_index=True)


def judged(units: Units) -> list[tuple[str, str, pd.DataFrame]]:
    """Unit, label and the rows that it judges, with a column `wrong`."""
    found = [(unit, label, rows.assign(wrong=rows[label])) for unit, rows in units.items() for label in LABELS]
    return [(unit, label, rows[rows["wrong"].notna()]) for unit, label, rows in found]


def differences(units: Units) -> pd.DataFrame:
    """Wrong − right by unit, label, model and what is held fixed (step 1)."""
    out = []
    for unit, label, rows in judged(units):
        for model, kind in [*((model, PLAIN) for model in dict.fromkeys(rows["model"])), (ALL, SAME), (ALL, GIVEN)]:
            some = rows if model == ALL else rows[rows["model"] == model]
            found = {name: contrast(some, name, kind) for name in MEASURES}
            parts = pd.DataFrame({name: part for name, (_, part) in found.items()}).fillna(0.0)
            p = sign_flip_pvalues(parts.to_numpy(float)) if len(parts) else np.full(len(MEASURES), np.nan)
            p = np.where([found[name][0].n > 1 for name in MEASURES], p, np.nan)
            for name, raw, q in zip(MEASURES, p, corrected(p), strict=True):
                row = {"unit": unit, "label": label, "model": model, "fixed": kind, "measure": name}
                out.append(row | found[name][0]._asdict() | {"p": raw, "p_corrected": q})
    return pd.DataFrame(out)


def contrast(rows: pd.DataFrame, measure: str, kind: str) -> tuple[Estimate, pd.Series]:
    """Wrong − right of a measure, and the part of each question in its numerator (which is what p flips)."""
    rows = rows.assign(length=np.log(rows["n_tokens"].clip(1)))
    given = [] if kind != GIVEN else [name for name in ("frequency", "place", "length") if name != measure]
    rows = rows.dropna(subset=[measure, *given])
    if kind != PLAIN:  # a question whose steps are all right, or all wrong, compares nothing
        rows = rows[rows.groupby("question_id")["wrong"].transform("nunique") == 2]
    if rows["wrong"].nunique() < 2 or rows[measure].nunique() < 2:  # tokens with a frequency are all in the corpus
        return Estimate(np.nan, np.nan, np.nan, 0, "bootstrap"), pd.Series(dtype=float)
    table = rows[[measure, "wrong", *given]].astype(float)
    if kind != PLAIN:
        table = table.join(pd.get_dummies(rows["model"], drop_first=True, dtype=float))
    centre = table.mean() if kind == PLAIN else table.groupby(rows["question_id"]).transform("mean")
    left = (table - centre).to_numpy()
    y, x, others = left[:, 0], left[:, 1], left[:, 2:]
    if others.shape[1]:
        y, x = (v - others @ np.linalg.lstsq(others, v, rcond=None)[0] for v in (y, x))
    parts = pd.DataFrame({"part": x * y, "weight": x * x}).groupby(rows["question_id"].to_numpy()).sum()
    if parts["weight"].sum() < 1e-9:  # model, place and frequency say all that the label does
        return Estimate(np.nan, np.nan, np.nan, 0, "bootstrap"), pd.Series(dtype=float)
    return ratio(parts["part"], parts["weight"]), parts["part"]


def aurocs(units: Units) -> pd.DataFrame:
    """AUROC of each measure, the step's number and its length: all pairs (all models and each), and on one question."""
    out = []
    for unit, label, rows in judged(units):
        for model in (ALL, *dict.fromkeys(rows["model"])):
            some = rows if model == ALL else rows[rows["model"] == model]
            for name in (*MEASURES, "place", *["n_tokens"] * (unit == "step")):
                part = some.dropna(subset=[name])
                x, wrong, who = (part[c].to_numpy() for c in (name, "wrong", "question_id"))
                wrong = wrong == 1
                base = {"unit": unit, "label": label, "model": model, "measure": name}
                base |= {"n_wrong": int(wrong.sum()), "n_right": int((~wrong).sum())}
                out.append(base | {"pairs": "all"} | auroc(x, wrong, who)._asdict())
                if model == ALL:
                    out.append(base | {"pairs": SAME} | auroc_within(x, wrong, who)._asdict())
    return pd.DataFrame(out)


def auroc_within(x: np.ndarray, wrong: np.ndarray, cluster: np.ndarray) -> Estimate:
    """AUROC over pairs of one cluster, and its bootstrap interval over clusters."""
    won, pairs = [], []
    for _, rows in pd.DataFrame({"x": x, "wrong": wrong}).groupby(cluster):
        a, b = (rows["x"].to_numpy()[rows["wrong"].to_numpy() == side] for side in (True, False))
        if len(a) and len(b):
            won.append(placements(a, b).sum() * len(b))
            pairs.append(len(a) * len(b))
    return ratio(won, pairs)
