"""Is a source's correlation more than any other context would give?  p-values under a null that is hard to beat.

For one target, one source and its `partial` correlation T (`sources`):

1. The alternatives, their probabilities and the target y stay.  The context is replaced by that of another target, of
   another group, in an order drawn once for all: for `local` the tokens before it, for the others its salient tokens
   (without its own target, and without y, as T's are).
2. *The selection is redone.*  w was chosen because y follows it, so y's count with w is never 0 while those of most
   alternatives are; and y, which the mind wrote, is among its favourites.  That alone makes T positive.  So in every
   null context w is chosen again, as the longest end that *the same y* follows.
3. The statistic is T's: unigram frequency is partialled out, so a null context cannot lose by being of rare tokens.
4. Null contexts in which the statistic is not defined (y follows no end of them; no salient tokens; equal counts) are
   passed over until `n_null` are found or all have been tried.  The target's own statistic is defined, or nothing would
   be tested, so this is the null given that it is: it costs power, never validity.  (To count them as not reached would
   not do: where a tenth is defined, p would be ten times too small.)  A null context that the index fails to count is
   taken as one that reaches T.
5. `p = (1 + #{T_null ≥ T}) / (1 + n)`, one-sided, ties reaching T.  If the contexts of the targets are exchangeable
   where counts say nothing of this mind's preference, p ≤ α happens in at most a share α of the targets tested.

Two things it does to power.  A context that recurs in other groups (template text, few different n-grams) ties with
itself: p is then at least its share of the null contexts, `n_same`; 50 topics in all give no p below 0.02.  (Leaving
such contexts out, or taking each different one once, does not hold the level: 12 % at 5 % where frequent contexts have
denser counts than rare ones.)  And where w has been followed by y alone, the counts are y's alone in many null contexts
as well: that y is preferred then says little of w.

Measured at 5 % on a mind that knows unigram frequency at most, in four synthetic corpora (4,800 tokens): 4.3 % local,
4.8 % mid-range, 4.3 % long-range.  Without step 2 local is found in 6 to 15 %; Spearman's own p finds local in 9 to
66 % and the others in 5 to 99 %.

The null contexts are shared by all targets, as in conformal p-values, for which the procedure of Benjamini and Hochberg
still bounds the share of false discoveries (Bates et al. 2023, Annals of Statistics 51:149).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Bool, Float64

from reasoninterp.errors import UserError
from reasoninterp.memorization.counts import CountBook, Tokens, matrix
from reasoninterp.memorization.names import Source
from reasoninterp.memorization.rank import partial_correlations
from reasoninterp.memorization.sources import Observed, SourceScore, mean_counts
from reasoninterp.stats import derive_seed

SLACK = 1e-9  # correlations that differ by rounding alone are a tie
NO_NULL = "no other context in which the statistic is defined"
_CHUNK = 32  # contexts tried at once, at least


class Null:
    """The null contexts of a measurement, in the order in which they are drawn.

    Args:
        book: the counts.
        pool: where the contexts come from; of the same kind of places as the targets that are tested.
    """

    def __init__(self, book: CountBook, pool: Sequence[Observed]) -> None:
        self._book = book
        order = np.random.default_rng(derive_seed(book.settings.seed, "null contexts")).permutation(len(pool))
        self._pool = [pool[i] for i in order]

    def test(self, observed: Observed, source: Source) -> SourceScore:
        """The source's score with its p-value."""
        score, n_null = observed.scores[source], self._book.settings.n_null
        if score.partial is None:
            return score
        others = [o for o in self._pool if o.target.group != observed.target.group]
        found: list[Float64[np.ndarray, " context"]] = []
        n = same = at = 0
        while n < n_null and at < len(others):
            more = max(_CHUNK, n_null - n)
            tokens, statistics = self._draw(others[at : at + more], observed, source)
            defined = np.flatnonzero(~np.isnan(statistics))[: n_null - n]
            found.append(statistics[defined])
            same += sum(tokens[i] == score.tokens for i in defined)
            n, at = n + len(defined), at + more
        if not n:
            return replace(score, reason=NO_NULL)
        drawn = np.concatenate(found)
        reached = int((drawn >= score.partial - SLACK).sum())
        counted = drawn[np.isfinite(drawn)]
        mean = float(counted.mean()) if len(counted) else None
        return replace(score, p=(1 + reached) / (1 + n), n_null=n, null_mean=mean, n_same=same)

    def _draw(
        self, others: Sequence[Observed], observed: Observed, source: Source
    ) -> tuple[list[Tokens], Float64[np.ndarray, " context"]]:
        """What the source reads in other contexts, and T there; NaN: not defined, inf: not counted."""
        ids, y = observed.target.alternatives.ids.tolist(), observed.target.token
        if source == "local":
            tokens, counts, counted = self._local([o.target.context for o in others], y, ids)
        else:
            ranked = [tuple(s for s in o.ranked.get(source, ()) if s != y) for o in others]
            tokens = [some[: self._book.settings.n_salient] for some in ranked]
            counts, counted = self._salient(tokens, ids)
            counted &= np.array([source in o.ranked for o in others])  # where not even their own window was counted
        out = np.where(counted, np.nan, np.inf)
        there = np.array([bool(t) for t in tokens]) & counted
        out[there] = partial_correlations(observed.target.alternatives.log_probs, counts[there], [observed.unigrams])
        return tokens, out

    def _local(
        self, contexts: Sequence[Tokens], y: int, ids: Sequence[int]
    ) -> tuple[list[Tokens], Float64[np.ndarray, "context alt"], Bool[np.ndarray, " context"]]:
        """The suffix of each context that y follows, counts behind it, and whether they could be counted."""
        found = self._book.suffixes(contexts, y)
        suffixes: list[Tokens] = [() if isinstance(s, UserError) else s for s in found]
        place = {s: i for i, s in enumerate(dict.fromkeys(suffixes))}
        rows, known = matrix(self._book.continuations(list(place), ids), len(ids))
        at = [place[s] for s in suffixes]
        return suffixes, rows[at], known[at] & np.array([not isinstance(s, UserError) for s in found])

    def _salient(
        self, sets: Sequence[Tokens], ids: Sequence[int]
    ) -> tuple[Float64[np.ndarray, "context alt"], Bool[np.ndarray, " context"]]:
        """Mean co-occurrences with each set of salient tokens, and whether they could be counted."""
        place = {s: i for i, s in enumerate(dict.fromkeys(s for some in sets for s in some))}
        rows, known = matrix(self._book.cooccurrences(list(place), ids), len(ids))
        member = np.zeros((len(sets), len(place)))
        for row, some in zip(member, sets, strict=True):
            row[[place[s] for s in some]] = 1
        return mean_counts(member, rows, list(place), ids), member @ ~known == 0
