"""How familiar a corpus is with a text, token by token, from counts alone: no mind is asked.

1. *Matching statistics* (Chang and Lawler 1994): m(t) is the length of the longest piece of the text that ends at token t
   and occurs in the corpus.  m(t) ≤ m(t − 1) + 1, so one short query a token finds them all.
2. *Local.*  The longest end w of the context that the token y follows in the corpus has m(t) − 1 tokens.  `count` is that
   of w followed by y, `share` what part it is of all that follows w, `rank` how many other tokens follow w more often.
   w was selected because y follows it, so a share is never 0 and w shrinks until y looks likely.  Read them together.
3. *∞-gram* (Liu et al. 2024, arXiv:2401.17377), which has no such selection: v is the longest end of the context that
   occurs at all (and is followed by anything); `probability` is the share of y among what follows v, 0 where it never
   does, and `expected` says whether nothing follows v more often.
4. *Association* of y with tokens S of the context (the question's, the chain's), over documents: the pointwise mutual
   information of y with S as a whole, `log₂ (Σ_s n(s, y) / Σ_s n(s) n(y) / D)` bits, where n counts the documents that hold
   all of its arguments, of D.  0 is chance.  Counts are added before the logarithm is taken, so a pair that never meets
   lowers the number and needs no smoothing.  y itself is left out of S: that it may be copied is no association.

A number that is not defined is None and `reason` says why.  All counts are of the index's documents; that a mind was
trained on them is for the caller to know.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import log2
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from reasoninterp.errors import UserError
from reasoninterp.memorization.counts import CountBook, matrix

if TYPE_CHECKING:
    from reasoninterp.memorization.corpus.interface import CorpusIndex

UNSEEN = "the token is not in the corpus"
NO_CONTEXT = "no such token in the context"
NEVER_TOGETHER = "never in one document with any of them"
_KEPT = 2**16  # contexts whose next tokens are remembered


@dataclass(frozen=True)
class Local:
    """What the corpus says of a token after the tokens before it.

    Attributes:
        length: tokens of w; None where the token is not in the corpus.
        count: occurrences of w followed by the token; of the token by itself where w is empty.
        share: `count` over the occurrences of w that any token follows, in (0, 1]; None as `length`.
        rank: how many other tokens follow w more often; None as `length`.
        probability: of the ∞-gram, in [0, 1].
        expected: whether no other token follows v more often.
        reason: why numbers are None; "" where none is.
    """

    length: int | None
    count: int
    share: float | None
    rank: int | None
    probability: float
    expected: bool
    reason: str = ""


@dataclass(frozen=True)
class Association:
    """Pointwise mutual information of a token with a set of tokens, in bits; positive: together more than by chance.

    Attributes:
        bits: None where it is not defined.
        n: tokens of the set, without the token itself.
        reason: why `bits` is None; "" where it is not.
    """

    bits: float | None
    n: int
    reason: str = ""


class Followers(NamedTuple):
    """What follows a context: counts by id, the same negated in rising order, and their sum."""

    counts: dict[int, int]
    ranked: list[int]
    total: int

    def more_frequent(self, count: int) -> int:
        """How many ids follow more than `count` times."""
        return bisect_left(self.ranked, -count)


class Reader:
    """Reads texts against an index; what follows a context is remembered for the last ones asked for.

    Args:
        index: of the tokenizer whose ids the texts are.
    """

    def __init__(self, index: CorpusIndex) -> None:
        self._index = index
        self._after = lru_cache(_KEPT)(self._asked)

    def local(self, row: Sequence[int]) -> list[Local]:
        """Steps 1 to 3 for each token of a row, whose context is the row before it.

        Raises:
            UserError: what the index refuses or fails to count.
        """
        out, ids, before = [], tuple(row), 0
        for t, token in enumerate(ids):
            after_v = self._after_longest(ids[t - before : t])
            n = after_v.counts.get(token, 0)
            probability, expected = n / after_v.total, not after_v.more_frequent(n)
            before = self._index.longest_suffix(ids[t - before : t + 1]).length
            if not before:
                out.append(Local(None, 0, None, None, probability, expected, UNSEEN))
                continue
            after_w = self._after(ids[t + 1 - before : t])
            count = after_w.counts[token]
            out.append(
                Local(before - 1, count, count / after_w.total, after_w.more_frequent(count), probability, expected)
            )
        return out

    def _after_longest(self, context: tuple[int, ...]) -> Followers:
        """What follows v: of a context that the corpus has, its longest end that is not always a document's."""
        for start in range(len(context) + 1):
            found = self._after(context[start:])
            if found.total:
                return found
        raise UserError(
            f"corpus index {self._index.info.corpus}: nothing follows anything in it; build it of some text."
        )

    def _asked(self, context: tuple[int, ...]) -> Followers:
        found = self._index.next_token_counts(context).counts
        return Followers(found, sorted(-n for n in found.values()), sum(found.values()))


def associations(
    book: CountBook, tokens: Sequence[int], sets: Sequence[Sequence[int]], n_docs: int
) -> list[Association]:
    """Step 4 for each of several tokens.

    Args:
        book: counts of documents (`Settings.unit`), which it remembers.
        tokens: the tokens y.
        sets: for each the tokens S; one that is there several times counts once.
        n_docs: D, documents of the corpus.

    Raises:
        UserError: other counts than of documents, not one set for each token, or what the index fails to count.
    """
    if book.settings.unit != "documents":
        raise UserError(f"book: it counts {book.settings.unit}; give one whose settings have the unit documents.")
    if len(tokens) != len(sets):
        raise UserError(f"sets: {len(sets)} sets for {len(tokens)} tokens; give one for each.")
    places = {y: i for i, y in enumerate(dict.fromkeys(tokens))}
    rows = {s: i for i, s in enumerate(dict.fromkeys(s for some in sets for s in some))}
    together = _counted(book, list(rows), list(places))
    n_rows = np.array([_counted(book, [s], [s])[0, 0] for s in rows])
    n_tokens = {y: _counted(book, [y], [y])[0, 0] for y in places}
    out = []
    for y, some in zip(tokens, sets, strict=True):
        at = [rows[s] for s in set(some) - {y}]
        observed, chance = together[at, places[y]].sum(), n_rows[at].sum() * n_tokens[y] / n_docs
        reason = UNSEEN if not n_tokens[y] else NO_CONTEXT if not chance else NEVER_TOGETHER if not observed else ""
        out.append(Association(None if reason else log2(observed / chance), len(at), reason))
    return out


def _counted(book: CountBook, tokens: list[int], ids: list[int]) -> np.ndarray:
    """Documents in which each token and each id are; what was not counted raises."""
    rows = book.cooccurrences(tokens, ids)
    for row in rows:
        if isinstance(row, UserError):
            raise row
    return matrix(rows, len(ids))[0]
