"""The three sources of a token: does what the corpus counts rank its alternatives as the mind does?

After STIM (Li et al. 2025, arXiv:2508.02037).  For a target token y with context c and its alternatives (`alternatives`):

1. *Local.*  w is the longest end of c (at most `max_suffix` tokens) such that w followed by y occurs in the corpus at
   least `min_count` times (STIM: once); the count of an alternative a is that of w followed by a.
2. *Mid-range.*  The salient tokens S are the `n_salient` most salient distinct ids of the chain so far; the count of a
   is the mean over s in S of how often s and a occur together.
3. *Long-range.*  The same with the salient tokens of the question.  What is left out of S is said in `salient`: w's own
   tokens, the target, stop tokens.  STIM's mid-range context is instead the shortest end of the chain that still elicits
   y; here the salience decides.
4. A token's count *with itself* is the number of its own documents, far above any other, and says that it may be copied,
   not that the two go together.  For an alternative that is itself salient it is replaced by that salient token's mean
   count with the other alternatives, which speaks neither for nor against it.
5. `score` is Spearman's correlation of the log-probabilities with the counts, STIM's number.  `partial` is the same with
   the alternatives' unigram counts partialled out (`rank`): frequent tokens are probable and frequent everywhere.
   `partial` is what is tested (`nulls`) and compared (`verdicts`).

Where a number is not defined it is None and `reason` says why: there are no such tokens, the counts or the probabilities
are all equal, unigram counts rank them alone, too few alternatives, or the index did not count.  Never 0, never NaN.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from reasoninterp.errors import UserError
from reasoninterp.memorization.alternatives import Alternatives
from reasoninterp.memorization.counts import CountBook, matrix, notes
from reasoninterp.memorization.names import SOURCES, Source
from reasoninterp.memorization.rank import MIN_ALTERNATIVES, partial_correlations
from reasoninterp.memorization.salient import ranked_ids
from reasoninterp.traces.trace import Span

NO_SUFFIX = "the target follows no end of its context in the corpus"
NO_SALIENT = "no salient token there"
FEW = "too few alternatives"
EQUAL_COUNTS = "all alternatives have the same count"
EQUAL_PROBABILITIES = "all alternatives are equally probable"
ONLY_UNIGRAMS = "unigram counts rank the counts or the probabilities completely"
NOT_COUNTED = "not counted: "


@dataclass(frozen=True, eq=False)
class Target:
    """A token whose sources are asked for.

    Attributes:
        group: traces of one group (of one question, whoever wrote them) give each other no null contexts.
        context: ids before the token.
        alternatives: of the distribution that predicts it.
        question, chain: their tokens in the context (the chain as far as it was written).
        saliency: of each token of the context for the target (`saliency`), NaN where undefined.
    """

    group: Hashable
    context: tuple[int, ...]
    alternatives: Alternatives
    question: Span
    chain: Span
    saliency: Float64[np.ndarray, " pos"]

    def __post_init__(self) -> None:
        if len(self.saliency) != len(self.context):
            raise UserError(
                f"saliency: {len(self.saliency)} values for a context of {len(self.context)} tokens; give one for each."
            )

    @property
    def token(self) -> int:
        """Its id."""
        return self.alternatives.target


@dataclass(frozen=True, eq=False)
class SourceScore:
    """What one source says of one token.

    Attributes:
        source: which.
        tokens: w in its order for `local`, else the salient tokens, most salient first.
        counts: of each alternative; None where they could not be counted.
        score: Spearman's correlation of log-probabilities and counts.
        partial: the same, given the unigram counts.
        reason: why any of `score`, `partial` and `p` is None; "" where none is.
        note: why counts are not exact; "" where they are.
        p: one-sided p-value of `partial` (see `nulls`).
        n_null: null contexts behind it.
        null_mean: mean of `partial` over them: what the selection of w and of the target alone makes of it.
        n_same: those among them with the very same tokens; p cannot be below `(1 + n_same) / (1 + n_null)`.
        q: p corrected for the number of tokens tested (Benjamini and Hochberg).
    """

    source: Source
    tokens: tuple[int, ...] = ()
    counts: Float64[np.ndarray, " alt"] | None = None
    score: float | None = None
    partial: float | None = None
    reason: str = ""
    note: str = ""
    p: float | None = None
    n_null: int = 0
    null_mean: float | None = None
    n_same: int = 0
    q: float | None = None

    @property
    def n_distinct(self) -> int:
        """Different counts among the alternatives."""
        return 0 if self.counts is None else len(np.unique(self.counts))


@dataclass(frozen=True, eq=False)
class Observed:
    """What was counted for one target: its scores (without p), unigram counts, and salient tokens in full.

    `ranked` lists all salient ids by source, of which a score takes the first few.
    """

    target: Target
    scores: dict[Source, SourceScore]
    unigrams: Float64[np.ndarray, " alt"]
    ranked: dict[Source, tuple[int, ...]]


def observe(book: CountBook, targets: Sequence[Target]) -> list[Observed]:
    """Count and correlate for the three sources; nothing is tested yet."""
    return [_observe(book, target) for target in targets]


def _observe(book: CountBook, target: Target) -> Observed:
    ids = target.alternatives.ids.tolist()
    suffix, unigrams = book.suffixes([target.context], target.token)[0], book.continuations([()], ids)[0]
    for found in (suffix, unigrams):  # without w it is not known what the other two must leave out
        if isinstance(found, UserError):
            failed = {s: SourceScore(s, reason=f"{NOT_COUNTED}{found}") for s in SOURCES}
            return Observed(target, failed, np.full(len(ids), np.nan), {})
    assert not isinstance(suffix, UserError)
    frequency = matrix([unigrams], len(ids))[0][0]
    left_out = book.settings.stop | {target.token}
    ranked: dict[Source, tuple[int, ...]] = {}
    scores: dict[Source, SourceScore] = {}
    for source in SOURCES:
        if source == "local":
            tokens, rows = suffix, book.continuations([suffix], ids) if suffix else []
            counts = matrix(rows, len(ids))[0].sum(0)
        else:
            span = target.chain if source == "mid" else target.question
            ranked[source] = ranked_ids(target.context, target.saliency, span, window=len(suffix), without=left_out)
            tokens = ranked[source][: book.settings.n_salient]
            rows = book.cooccurrences(tokens, ids)
            counts = mean_counts(np.ones((1, len(tokens))), matrix(rows, len(ids))[0], tokens, ids)[0]
        error = next((row for row in rows if isinstance(row, UserError)), None)
        if error:
            scores[source] = SourceScore(source, tokens, reason=f"{NOT_COUNTED}{error}")
        elif not tokens:
            scores[source] = SourceScore(source, reason=NO_SUFFIX if source == "local" else NO_SALIENT)
        else:
            score, partial, reason = correlate(target.alternatives.log_probs, counts, frequency)
            note = notes([*rows, unigrams])
            scores[source] = SourceScore(source, tokens, counts, score, partial, reason, note)
    return Observed(target, scores, frequency, ranked)


def correlate(
    log_probs: Float64[np.ndarray, " alt"],
    counts: Float64[np.ndarray, " alt"],
    unigrams: Float64[np.ndarray, " alt"],
) -> tuple[float | None, float | None, str]:
    """Spearman's correlation, the same given the unigram counts, and why one of them is None."""
    if len(counts) < MIN_ALTERNATIVES:
        return None, None, FEW
    for x, reason in ((counts, EQUAL_COUNTS), (log_probs, EQUAL_PROBABILITIES)):
        if np.ptp(x) == 0:
            return None, None, reason
    score = float(partial_correlations(log_probs, counts[None])[0])
    partial = float(partial_correlations(log_probs, counts[None], [unigrams])[0])
    if np.isnan(partial):
        return score, None, FEW if len(counts) == MIN_ALTERNATIVES else ONLY_UNIGRAMS
    return score, partial, ""


def mean_counts(
    member: Float64[np.ndarray, "set salient"],
    pairs: Float64[np.ndarray, "salient alt"],
    tokens: Sequence[int],
    ids: Sequence[int],
) -> Float64[np.ndarray, "set alt"]:
    """Mean counts of alternatives over sets of salient tokens, a token's own being neutral (step 4).

    Args:
        member: 1 where a token is in a set; an empty set has means of 0.
        pairs: how often each token and each alternative occur together.
        tokens: the tokens.
        ids: the alternatives.
    """
    itself = np.equal.outer(np.asarray(tokens, dtype=np.int64), np.asarray(ids, dtype=np.int64))
    others = max(1, len(ids) - 1)
    # Times the number of others, all are whole: sums are exact, and alternatives that tie still tie in any order.
    whole = np.where(itself, np.where(itself, 0.0, pairs).sum(-1, keepdims=True), pairs * others)
    return member @ whole / np.maximum(1, member.sum(1, keepdims=True) * others)
