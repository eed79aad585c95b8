"""What backends of a corpus index share: each argument is checked once, and the rest is made of counts.

`CheckedIndex` has the public methods of `interface.CorpusIndex`.  Each sees to it that the index is open and its
arguments are what the interface says (`checks.py`), and hands plain ints on to a method of the backend with a leading
underscore.  Of those, a backend must say how to count (`_count`), what follows (`_next`) and what occurs together
(`_together`); the others have a default made of counts.

The arguments are typed `Any` on purpose: what is no id must reach the check that says so in a sentence.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from reasoninterp.errors import UserError
from reasoninterp.memorization.corpus.checks import checked_cooccurrence, checked_id, checked_ids, checked_positive
from reasoninterp.memorization.corpus.interface import CorpusInfo, Count, NextTokens, SuffixMatch


def most_frequent(counts: Mapping[int, int], limit: int | None, total: Count, *, complete: bool = True) -> NextTokens:
    """Next tokens in the interface's order, cut to the limit; `complete` says whether `counts` holds all there are."""
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    kept = ranked if limit is None else ranked[:limit]
    return NextTokens(dict(kept), total, complete and len(kept) == len(ranked))


class CheckedIndex(ABC):
    """The public methods of `interface.CorpusIndex`, see there; backends derive from it."""

    def __init__(self, info: CorpusInfo) -> None:
        self._info = info
        self._closed = False

    @property
    def info(self) -> CorpusInfo:
        """What it was made from."""
        return self._info

    def count(self, ngram: Any) -> Count:
        """Occurrences of a sequence."""
        return self._count(self._ids(ngram, "ngram"))

    def count_many(self, ngrams: Any) -> list[Count]:
        """Occurrences of each sequence."""
        self._open()
        return [self._count(ids) for ids in [self._ids(ngram, f"ngrams[{i}]") for i, ngram in enumerate(ngrams)]]

    def continuation_counts(self, context: Any, candidates: Any) -> list[Count]:
        """Occurrences of the context followed by each candidate."""
        before = self._ids(context, "context")
        return [self._count([*before, candidate]) for candidate in self._ids(candidates, "candidates")]

    def longest_suffix(self, context: Any, *, last: Any = None, min_count: Any = 1) -> SuffixMatch:
        """The longest end of the context that occurs often enough, by itself or followed by `last`."""
        before = self._ids(context, "context")
        followed = [] if last is None else [checked_id(last, self.info.vocab_size, "last")]
        return self._longest(before, followed, checked_positive(min_count, "min_count"))

    def next_token_counts(self, context: Any, limit: Any = None) -> NextTokens:
        """What follows a context; at most `limit` ids."""
        before = self._ids(context, "context")
        return self._next(before, None if limit is None else checked_positive(limit, "limit"))

    def cooccurrence(self, a: Any, b: Any, *, window: Any = None, unit: Any = "documents") -> Count:
        """How often two sequences, neither of them empty, occur together."""
        first, second = self._ids(a, "a"), self._ids(b, "b")
        for name, ids in (("a", first), ("b", second)):
            if not ids:
                raise UserError(f"{name}: the empty sequence occurs everywhere; give at least one id.")
        window = checked_cooccurrence(window, unit, self.info.max_window)
        if window is not None and unit == "documents":
            raise UserError("window: documents are counted whole; leave it out, or ask for pairs or anchors.")
        return self._together(first, second, window, unit)

    def close(self) -> None:
        """Let go of files and connections; what is asked afterwards raises.  Closing twice does nothing."""
        self._closed = True

    def _open(self) -> None:
        if self._closed:
            raise UserError(f"corpus index {self.info.corpus}: it was closed; open it again.")

    def _ids(self, values: Any, name: str) -> list[int]:
        self._open()
        return checked_ids(values, self.info.vocab_size, name)

    @abstractmethod
    def _count(self, ngram: list[int]) -> Count: ...

    @abstractmethod
    def _next(self, context: list[int], limit: int | None) -> NextTokens: ...

    @abstractmethod
    def _together(self, a: list[int], b: list[int], window: int | None, unit: str) -> Count: ...

    def _longest(self, context: list[int], followed: list[int], min_count: int) -> SuffixMatch:
        """Suffixes of 1, 2, 4, … tokens until one is too rare, then by halving: a longer one never occurs more often."""

        def ending(length: int) -> Count:
            return self._count([*context[len(context) - length :], *followed])

        low, high, count = 0, 1, None
        while high <= len(context) and (found := ending(high)).value >= min_count:
            low, high, count = high, 2 * high, found
        high = min(high, len(context) + 1)
        while high - low > 1:
            middle = (low + high) // 2
            if (found := ending(middle)).value >= min_count:
                low, count = middle, found
            else:
                high = middle
        return SuffixMatch(low, count or ending(0))
