"""What the sources of a token come to: which one dominates, how much they explain together, and what STIM would say.

`trace_sources` does all of it for a set of targets:

1. Count and correlate (`sources`), test against other contexts (`nulls`).
2. Within each source, correct p for the number of targets tested (Benjamini and Hochberg).
3. *Dominant*: of the sources that are present (q ≤ `level`), the one with the largest `partial`; all of those that tie;
   none where no source is present.
4. *STIM's rule* beside it: the largest of the three raw `score`s, without any threshold, ties going to local, then
   mid-range, then long-range.  (It is STIM's rule on this kit's counts and saliency; their code has faults of its own.)
5. *Joint* (`joint_share`): what the sources explain together, so that two that overlap are not counted twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from reasoninterp.memorization.counts import CountBook
from reasoninterp.memorization.names import SOURCES, Source
from reasoninterp.memorization.nulls import SLACK, Null
from reasoninterp.memorization.rank import adjusted_share, partial_correlations
from reasoninterp.memorization.settings import Settings
from reasoninterp.memorization.sources import Observed, SourceScore, Target, observe
from reasoninterp.stats import corrected

if TYPE_CHECKING:
    from reasoninterp.memorization.corpus.interface import CorpusIndex

NO_SOURCE = "no source is defined"
TOO_MANY = "too few alternatives for so many sources"


@dataclass(frozen=True)
class Joint:
    """How much of a mind's ranking of the alternatives the sources explain together: shares of the variance of ranks.

    All shares are differences of adjusted R² (`rank`): 0 on average where nothing is explained, negative by chance.

    Attributes:
        beyond: of the sources together, over what unigram counts explain; None with a `reason`.
        unigram: of the unigram counts alone.
        unique: by source, what is lost when it is left out and the others stay.
        shared: `beyond` less the sum of `unique`: what any of several sources would explain.
        partial: by source, the rank correlation given unigram counts *and* the other sources; None where those
            determine it.
        reason: why `beyond` is None.
    """

    beyond: float | None = None
    unigram: float | None = None
    unique: Mapping[Source, float] | None = None
    shared: float | None = None
    partial: Mapping[Source, float | None] | None = None
    reason: str = ""


@dataclass(frozen=True, eq=False)
class TokenSources:
    """All that is said of one token.

    Attributes:
        target: the token.
        scores: by source.
        joint: the sources together.
        present: the sources that are present.
        dominant: the dominant source; several where they tie, none where no source is present.
        stim: STIM's choice, or None where no score is defined.
    """

    target: Target
    scores: Mapping[Source, SourceScore]
    joint: Joint
    present: tuple[Source, ...]
    dominant: tuple[Source, ...]
    stim: Source | None

    def to_row(self) -> dict[str, Any]:
        """The numbers as one flat row: `local_score`, `local_partial`, `local_p`, `local_q`, …, `dominant`, `stim`."""
        row: dict[str, Any] = {
            "token": self.target.token,
            "position": len(self.target.context),
            "surprise": self.target.alternatives.surprise,
            "rank": self.target.alternatives.rank,
            "n_alternatives": len(self.target.alternatives.ids),
        }
        for source, s in self.scores.items():
            for name in ("score", "partial", "p", "q", "n_null", "null_mean", "n_same", "n_distinct", "reason", "note"):
                row[f"{source}_{name}"] = getattr(s, name)
            row[f"{source}_n_tokens"] = len(s.tokens)
            row[f"{source}_present"] = source in self.present
            row[f"{source}_unique"] = (self.joint.unique or {}).get(source)
            row[f"{source}_partial_given_others"] = (self.joint.partial or {}).get(source)
        row |= {
            "joint_beyond": self.joint.beyond,
            "joint_unigram": self.joint.unigram,
            "joint_shared": self.joint.shared,
        }
        return row | {"joint_reason": self.joint.reason, "dominant": "+".join(self.dominant), "stim": self.stim}


def trace_sources(
    index: CorpusIndex,
    targets: Sequence[Target],
    *,
    pool: Sequence[Target] | None = None,
    settings: Settings | None = None,
) -> list[TokenSources]:
    """Score, test and judge targets, in order.

    Args:
        index: the corpus; its ids are those of the targets.
        targets: the tokens.  They are one family for the correction: ask for those of one mind and one kind at once.
        pool: where null contexts come from; by default the targets themselves.  Give others where those that are
            tested were picked (tokens of wrong steps, say): a pool of the same picking is what makes p valid.
        settings: conventions; the defaults if None.
    """
    book = CountBook(index, settings or Settings())
    observed = observe(book, targets)
    return judged(book, observed, observed if pool is None else observe(book, pool))


def judged(
    book: CountBook,
    observed: Sequence[Observed],
    pool: Sequence[Observed],
    progress: Callable[[Sequence[Observed]], Iterable[Observed]] = iter,
) -> list[TokenSources]:
    """Test and judge what was observed, in order; steps 1 (the null) to 5.

    Args:
        book: the counts.
        observed: one family for the correction.
        pool: where null contexts come from.
        progress: wraps the observed as they are tested.
    """
    null = Null(book, pool)
    tested = [{s: null.test(o, s) for s in SOURCES} for o in progress(observed)]
    for source in SOURCES:
        p = np.array([scores[source].p for scores in tested], dtype=float)  # None becomes NaN: not tested
        for scores, q in zip(tested, corrected(p).tolist(), strict=True):
            scores[source] = replace(scores[source], q=None if np.isnan(q) else q)
    out = []
    for o, scores in zip(observed, tested, strict=True):
        there, most = present(scores, book.settings), dominant(scores, book.settings)
        out.append(TokenSources(o.target, scores, joint_share(o), there, most, stim(scores)))
    return out


def present(scores: Mapping[Source, SourceScore], settings: Settings) -> tuple[Source, ...]:
    """The sources whose q (or p, if they are not to be corrected) is at most the level."""

    def small(score: SourceScore) -> bool:
        p = score.q if settings.correct else score.p
        return p is not None and p <= settings.level

    return tuple(s for s in SOURCES if s in scores and small(scores[s]))


def dominant(scores: Mapping[Source, SourceScore], settings: Settings) -> tuple[Source, ...]:
    """The sources with the largest `partial` among those that are present."""
    partials = {s: scores[s].partial for s in present(scores, settings)}
    most = max((x for x in partials.values() if x is not None), default=0.0)
    return tuple(s for s, x in partials.items() if x is not None and x >= most - SLACK)


def stim(scores: Mapping[Source, SourceScore]) -> Source | None:
    """The source with the largest `score`, the first of those that tie."""
    defined = {s: x.score for s, x in scores.items() if x.score is not None}
    return max(defined, key=lambda s: defined[s], default=None)


def joint_share(observed: Observed) -> Joint:
    """What the sources that are defined explain of the ranking, together and each by itself."""
    log_probs, unigrams = observed.target.alternatives.log_probs, observed.unigrams
    counts = {s: x.counts for s, x in observed.scores.items() if x.counts is not None and x.score is not None}
    if not counts:
        return Joint(reason=NO_SOURCE)
    alone, all_of_them = adjusted_share(log_probs, [unigrams]), adjusted_share(log_probs, [unigrams, *counts.values()])
    if np.isnan(all_of_them):
        return Joint(reason=TOO_MANY)
    unique, partial = {}, {}
    for source, mine in counts.items():
        others = [unigrams, *(c for s, c in counts.items() if s != source)]
        unique[source] = all_of_them - adjusted_share(log_probs, others)
        rho = float(partial_correlations(log_probs, mine[None], others)[0])
        partial[source] = None if np.isnan(rho) else rho
    beyond = all_of_them - alone
    return Joint(beyond, alone, unique, beyond - sum(unique.values()), partial)
