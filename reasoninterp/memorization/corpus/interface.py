"""The interface of a corpus index: what can be counted, in what units, and what is refused.

Everything is counted over token ids.  A corpus is a list of documents; no sequence, window or suffix ever crosses the
end of a document.

1. *n-gram*: occurrences of a sequence of ids, overlapping ones included.  The empty one occurs once per token.
2. *continuation*: occurrences of context + candidate, for several candidates.
3. *longest suffix*: the longest end of a context that occurs at least `min_count` times (with `last`: such that the end
   followed by `last` does).
4. *next tokens*: what follows a context, and how often; occurrences at the end of a document are followed by nothing.
5. *co-occurrence* of two sequences a and b (unit `CoUnit`), distances being from start to start, overlaps allowed:
   `documents` that hold both; `pairs` of an occurrence of a and one of b in one document, at most `window` apart (a
   pair of an occurrence with itself is none, and for a = b each unordered pair counts once); `anchors`: occurrences of
   the rarer one (a, if equally rare) with at least one (other) occurrence of the other one at most `window` away in the
   same document, which is what STIM's queries mean.  `window` None is the whole document.

Refused are a `limit` or `min_count` below 1, and a window beside the unit `documents`, which has none.  The longest
suffix of length 0 without `last` occurs once per token.

A count says whether it is exact.  What cannot be counted raises; nothing is ever 0 because something failed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Integer

Ids = Sequence[int] | Integer[np.ndarray, "_"]
CoUnit = Literal["documents", "pairs", "anchors"]


@dataclass(frozen=True)
class Count:
    """How often something occurs.

    Attributes:
        value: at least 0.
        exact: False where a backend estimates, samples, or is known to be biased; `note` then says how.
        note: why it is not exact; "" where it is.
    """

    value: int
    exact: bool = True
    note: str = ""


@dataclass(frozen=True)
class CorpusInfo:
    """What an index was made from.

    Attributes:
        n_tokens: tokens, without marks of documents' ends; None where a backend does not tell.
        n_docs: documents, empty ones included; None where a backend does not tell.
        vocab_size: ids are below this; None where a backend does not tell.
        tokenizer: identity of the tokenizer (a hash), or a name where only that is known.
        corpus: identity of the corpus: a hash of its ids, or a remote index's name.
        max_window: largest window of a co-occurrence, None for any.
    """

    n_tokens: int | None
    n_docs: int | None
    vocab_size: int | None
    tokenizer: str
    corpus: str
    max_window: int | None = None


@dataclass(frozen=True)
class SuffixMatch:
    """The longest suffix of a context that occurs: its length in tokens (0: none does), and its count.

    With `last`, `count` is that of the suffix followed by `last`; length 0 then means that only `last` alone was asked
    for, whose count may be 0.
    """

    length: int
    count: Count


@dataclass(frozen=True)
class NextTokens:
    """What follows a context: `counts` by id, most frequent first (ties by id), and how often the context occurs.

    `total` counts occurrences that are followed by a token; `complete` is False where a limit left some ids out.
    """

    counts: dict[int, int]
    total: Count
    complete: bool = True


@runtime_checkable
class CorpusIndex(Protocol):
    """An index of a corpus; see the module for what each count means.

    Every method raises `UserError` for ids that are no integers (bools are none), negative, or not below `vocab_size`;
    for a window below 1 or above `max_window`; for an unknown unit; and where the backend fails.  Tuples, lists and
    one-dimensional integer arrays are sequences of ids.
    """

    @property
    def info(self) -> CorpusInfo:
        """What it was made from."""
        ...

    def count(self, ngram: Ids) -> Count:
        """Occurrences of a sequence."""
        ...

    def count_many(self, ngrams: Sequence[Ids]) -> list[Count]:
        """Occurrences of each sequence."""
        ...

    def continuation_counts(self, context: Ids, candidates: Ids) -> list[Count]:
        """Occurrences of the context followed by each candidate."""
        ...

    def longest_suffix(self, context: Ids, *, last: int | None = None, min_count: int = 1) -> SuffixMatch:
        """The longest end of the context that occurs often enough, by itself or followed by `last`."""
        ...

    def next_token_counts(self, context: Ids, limit: int | None = None) -> NextTokens:
        """What follows a context; at most `limit` ids."""
        ...

    def cooccurrence(self, a: Ids, b: Ids, *, window: int | None = None, unit: CoUnit = "documents") -> Count:
        """How often two sequences, neither of them empty, occur together."""
        ...

    def close(self) -> None:
        """Let go of files and connections; what is asked afterwards raises."""
        ...
