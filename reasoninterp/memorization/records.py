"""What was observed of a token as plain values, so that it can lie in a run's shard, and back.

The null needs other tokens' contexts, alternatives, counts and salient tokens, not their networks: a token that was
measured in one process can be a null context in another.  Of a context only the end is kept that a local window can reach
(`Settings.max_suffix`), and no saliency, which has become salient tokens.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np

from reasoninterp.memorization.alternatives import Alternatives
from reasoninterp.memorization.names import SOURCES
from reasoninterp.memorization.sources import Observed, SourceScore, Target
from reasoninterp.traces.trace import Span

_KEPT = ("score", "partial", "reason", "note")


def to_record(observed: Observed, max_suffix: int) -> dict[str, Any]:
    """One observed token as numbers, texts and lists."""
    target, found = observed.target, observed.target.alternatives
    record: dict[str, Any] = {
        "context_end": list(target.context[-max_suffix:]),
        "alternative_ids": found.ids.tolist(),
        "log_probs": found.log_probs.tolist(),
        "token": found.target,
        "rank": found.rank,
        "unigrams": [None if np.isnan(n) else n for n in observed.unigrams.tolist()],
    }
    for source, score in observed.scores.items():
        record |= {f"{source}_{name}": getattr(score, name) for name in _KEPT}
        record[f"{source}_token_ids"] = list(score.tokens)
        record[f"{source}_counts"] = None if score.counts is None else score.counts.tolist()
        if source in observed.ranked:
            record[f"{source}_ranked"] = list(observed.ranked[source])
    return record


def from_record(record: Mapping[str, Any], group: Hashable) -> Observed:
    """The observed token of a record; its context is the kept end, with spans and saliency unknown."""
    context = tuple(record["context_end"])
    ids = np.array(record["alternative_ids"], dtype=np.int64)
    log_probs = np.array(record["log_probs"], dtype=np.float64)
    alternatives = Alternatives(ids, log_probs, int(record["token"]), int(record["rank"]))
    nowhere = Span(len(context), len(context))
    target = Target(group, context, alternatives, nowhere, nowhere, np.full(len(context), np.nan))
    scores, ranked = {}, {}
    for source in SOURCES:
        counts = _or_none(record[f"{source}_counts"])
        scores[source] = SourceScore(
            source,
            tuple(record[f"{source}_token_ids"]),
            None if counts is None else np.array(counts, dtype=np.float64),
            **{name: _or_none(record[f"{source}_{name}"]) for name in _KEPT},
        )
        if isinstance(some := record.get(f"{source}_ranked"), list):
            ranked[source] = tuple(some)
    return Observed(target, scores, np.array(record["unigrams"], dtype=np.float64), ranked)


def _or_none(value: Any) -> Any:
    """A table turns None among numbers into NaN; here it is None again."""
    return None if isinstance(value, float) and np.isnan(value) else value
