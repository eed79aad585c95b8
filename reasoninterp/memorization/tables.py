"""Tables of the study `memorization`: one row a token, one a step, and shares of sources with intervals over traces.

1. *Shares* (`sources_table`).  `dominant`: of all tokens, those of which a source is the dominant one (a tie of two counts
   half for each); beside the three sources `none` (at least one is defined, none is present) and `undefined` (no source
   is), so that the five sum to 1.  `present`: tokens in which the source is present, of those in which it was tested.
   `reached`: those with p at most `level`, not corrected: `level` itself where the source says nothing of any token.
   `partial`: mean rank correlation given unigram counts, of those in which it is defined.  `excess`: the same less its mean
   over the token's null contexts, 0 on average where the source says nothing: what a mind takes from a source in sum,
   also where no single token can be told from chance.  `stim`: the share that STIM's
   rule gives to the source.  `beyond`, of the source `joint`: mean share of the preference that the sources explain
   together beyond unigram counts (`verdicts.Joint`).
2. *Changes* (`changes_table`): the same, each other mind less the first, paired over traces (the mean over a trace's tokens
   in both minds), p by sign flips, corrected over sources within a mind, distribution, part and measure.
3. *Steps*: a step is wrong where one of its tokens is, right where some are judged and none is wrong.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd

from reasoninterp.memorization.names import CALLED, JOINT, NONE, REMOVED, SOURCES, STEP, UNDEFINED
from reasoninterp.memorization.verdicts import TokenSources
from reasoninterp.stats import effect_sizes, estimate

ABOUT = ("mind", "trace", "writer", "shift", "part", "step", "position", "text", "wrong")
ALL, RIGHT, WRONG = "all", "right", "wrong"


def token_table(rows: pd.DataFrame, verdicts: Sequence[TokenSources], tokenizer: Any) -> pd.DataFrame:
    """One row a token: where it stands, the verdict (`TokenSources.to_row`), its alternatives and counts, and the effects.

    `strength` is the `partial` of the dominant sources, NaN where there is none; tokens are given as texts.
    """

    def texts(ids: Sequence[int]) -> list[str]:
        return [tokenizer.decode([i]) for i in ids]

    out = []
    for row, verdict in zip(rows.to_dict("records"), verdicts, strict=True):
        said = verdict.to_row()
        for name in ("token", "position"):  # of the kept end of the context; the row has its own
            del said[name]
        said["stim"] = said["stim"] or ""
        lists: dict[str, Any] = {
            "alternatives": texts(row["alternative_ids"]),
            "log_probs": [float(p) for p in row["log_probs"]],
        }
        for source in SOURCES:
            lists[f"{source}_tokens"] = texts(row[f"{source}_token_ids"])
            lists[f"{source}_counts"] = row[f"{source}_counts"]
        partials = [verdict.scores[s].partial for s in verdict.dominant]
        moved = {f"{measure}_{name}": row[f"{measure}_{name}"] for measure in ("kl", "drop") for name in REMOVED}
        about = {name: row[name] for name in ABOUT}
        if isinstance(about["wrong"], float):  # a column with tokens that nobody judged
            about["wrong"] = None if np.isnan(about["wrong"]) else bool(about["wrong"])
        strength = max((p for p in partials if p is not None), default=np.nan)
        out.append({**about, **said, "strength": strength, **moved, **lists})
    return pd.DataFrame(out)


def called(tokens: pd.DataFrame) -> pd.Series:
    """What is said of each token: its dominant source, several joined by `+`, `none`, or `undefined`."""
    defined = tokens[[f"{s}_p" for s in SOURCES]].notna().any(axis=1)
    return tokens["dominant"].where(tokens["dominant"] != "", np.where(defined, NONE, UNDEFINED))


def shares(tokens: pd.DataFrame, source: str) -> pd.Series:
    """The part of each token that is called a source: 1, 0, or a half, a third where sources tie."""
    named = called(tokens).str.split("+")
    return named.map(lambda names: (source in names) / len(names))


def is_present(tokens: pd.DataFrame, source: str) -> pd.Series:
    """Whether a source is present in each token, as 0 or 1; NaN where it was not tested."""
    return tokens[f"{source}_present"].astype(float).where(tokens[f"{source}_p"].notna())


def values(tokens: pd.DataFrame, level: float) -> Iterator[tuple[str, str, pd.Series]]:
    """(measure, source, one value a token) of everything that is summarised."""
    for source in CALLED:
        yield "dominant", source, shares(tokens, source)
    for source in SOURCES:
        yield "present", source, is_present(tokens, source)
        yield "reached", source, (tokens[f"{source}_p"] <= level).astype(float).where(tokens[f"{source}_p"].notna())
        yield "partial", source, tokens[f"{source}_partial"].astype(float)
        yield "excess", source, tokens[f"{source}_partial"].astype(float) - tokens[f"{source}_null_mean"].astype(float)
        yield "stim", source, (tokens["stim"] == source).astype(float)
    yield "beyond", JOINT, tokens["joint_beyond"].astype(float)


def by_judgement(tokens: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """All tokens, and those judged right and wrong where some were judged."""
    yield ALL, tokens
    for name, wrong in ((RIGHT, False), (WRONG, True)):
        some = tokens[[w is not None and w == wrong for w in tokens["wrong"]]]
        if len(some):
            yield name, some


def sources_table(tokens: pd.DataFrame, level: float, seed: int) -> pd.DataFrame:
    """`memorization`: mind, shift, part, wrong, measure, source, value, ci_low, ci_high, n (traces), method, n_tokens."""
    by = ["mind", "shift", "part"]
    parts = []
    for judgement, some in by_judgement(tokens):
        for measure, source, value in values(some, level):
            frame = some[[*by, "trace"]].assign(value=value)
            found = estimate(frame, by=by, value="value", kind="mean", seed=seed)
            found = found.merge(frame.groupby(by)["value"].count().rename("n_tokens").reset_index(), on=by)
            found.insert(3, "wrong", judgement)
            found.insert(4, "measure", measure)
            found.insert(5, "source", source)
            parts.append(found)
    table = pd.concat(parts, ignore_index=True)
    return table[table["n"] > 0].reset_index(drop=True)


def changes_table(tokens: pd.DataFrame, minds: Sequence[str], level: float, seed: int) -> pd.DataFrame:
    """`memorization_changes`: mind (less the first), shift, part, measure, source, value, ci_low, ci_high, n, …, p_corrected."""
    first, *others = minds
    by = ["mind", "shift", "part", "measure", "source"]
    parts = []
    for measure, source, value in values(tokens, level):
        frame = tokens[["mind", "trace", "shift", "part"]].assign(value=value)
        wide = frame.groupby(["trace", "shift", "part", "mind"])["value"].mean().unstack("mind")
        for mind in others:
            if mind in wide and first in wide:
                change = (wide[mind] - wide[first]).rename("value").reset_index()
                parts.append(change.assign(mind=mind, measure=measure, source=source))
    if not parts:
        return pd.DataFrame()
    table = effect_sizes(
        pd.concat(parts, ignore_index=True), by, "value", family=["mind", "shift", "part", "measure"], seed=seed
    )
    return table[table["n"] > 0].reset_index(drop=True)


def steps_table(tokens: pd.DataFrame) -> pd.DataFrame:
    """`memorization_steps`: mind, trace, writer, shift, step, wrong, n_tokens, surprise (mean bits), and the share of each source."""
    steps = tokens[tokens["part"] == STEP]
    by = ["mind", "trace", "writer", "shift", "step"]
    columns = {source: shares(steps, source) for source in CALLED}
    frame = steps[[*by, "surprise"]].assign(**columns, n_tokens=1)
    about: dict[str, Any] = dict.fromkeys((*CALLED, "surprise"), "mean") | {"n_tokens": "sum"}
    table = frame.groupby(by, sort=False).agg(about).reset_index()
    wrong = steps.groupby(by, sort=False)["wrong"].agg(_any_wrong)
    return table.merge(wrong.reset_index(), on=by)


def steps_summary(tokens: pd.DataFrame, seed: int) -> pd.DataFrame:
    """`memorization_by_step`: mind, shift, wrong, source, value (mean share of a step's tokens), ci_low, ci_high, n, method."""
    by = ["mind", "shift"]
    parts = []
    for judgement, some in by_judgement(steps_table(tokens)):
        for source in CALLED:
            found = estimate(some, by=by, value=source, kind="mean", seed=seed)
            found.insert(2, "wrong", judgement)
            found.insert(3, "source", source)
            parts.append(found)
    return pd.concat(parts, ignore_index=True)


def _any_wrong(judged: pd.Series) -> bool | None:
    known = [bool(w) for w in judged if w is not None]
    return any(known) if known else None
