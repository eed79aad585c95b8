"""Counts of a corpus that are remembered: the same few are asked for again for every token and every null context.

A `CountBook` asks its index once for each suffix of a context, each continuation and each pair of tokens.  What the index
refuses or fails to count is handed on as the `UserError` it raised, in the place of the counts; nothing is remembered of
it and nothing becomes 0.  Counts that the index itself calls inexact keep its note.

What a token with A alternatives costs, in queries of the index that were not asked before: A unigrams; 1 suffix and A
continuations for the token's own context and for each null context; and A co-occurrences for each *distinct* salient
token, its own and the null's.  The null contexts are the same for all tokens (`nulls`), so co-occurrences are bounded by
the distinct salient tokens of one draw times the distinct alternatives of all tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from jaxtyping import Bool, Float64

from reasoninterp.errors import UserError
from reasoninterp.memorization.corpus.interface import Count
from reasoninterp.memorization.settings import Settings

if TYPE_CHECKING:
    from reasoninterp.memorization.corpus.interface import CorpusIndex

Tokens: TypeAlias = tuple[int, ...]
Row: TypeAlias = list[Count] | UserError


class CountBook:
    """What an index has been asked under some settings."""

    def __init__(self, index: CorpusIndex, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        self._index = index
        self._suffixes: dict[tuple[Tokens, int], Tokens] = {}
        self._following: dict[Tokens, dict[int, Count]] = {}
        self._together: dict[int, dict[int, Count]] = {}

    @property
    def corpus(self) -> str:
        """Identity of the corpus that is counted."""
        return self._index.info.corpus

    def suffixes(self, contexts: Sequence[Tokens], target: int) -> list[Tokens | UserError]:
        """The longest end of each context that the target follows often enough in the corpus; empty where none is."""
        found: list[Tokens | UserError] = []
        for context in contexts:
            end = context[-self.settings.max_suffix :]
            if (end, target) not in self._suffixes:
                try:
                    match = self._index.longest_suffix(end, last=target, min_count=self.settings.min_count)
                except UserError as error:
                    found.append(error)
                    continue
                self._suffixes[end, target] = end[len(end) - match.length :]
            found.append(self._suffixes[end, target])
        return found

    def continuations(self, suffixes: Sequence[Tokens], ids: Sequence[int]) -> list[Row]:
        """Occurrences of each suffix followed by each id; of the id by itself for an empty suffix."""
        found: list[Row] = []
        for suffix in suffixes:
            known = self._following.setdefault(suffix, {})
            missing = [a for a in dict.fromkeys(ids) if a not in known]
            try:
                if missing:
                    known.update(zip(missing, self._index.continuation_counts(suffix, missing), strict=True))
                found.append([known[a] for a in ids])
            except UserError as error:
                found.append(error)
        return found

    def cooccurrences(self, tokens: Sequence[int], ids: Sequence[int]) -> list[Row]:
        """How often each token occurs together with each id."""
        unit, window = self.settings.unit, self.settings.window
        found: list[Row] = []
        for token in tokens:
            known = self._together.setdefault(token, {})
            try:
                for a in ids:
                    if a not in known:
                        # Anchors of two equally rare tokens are those of the first; other units know no order.
                        mirrored = None if unit == "anchors" else self._together.get(a, {}).get(token)
                        known[a] = mirrored or self._index.cooccurrence((token,), (a,), window=window, unit=unit)
                found.append([known[a] for a in ids])
            except UserError as error:
                found.append(error)
        return found


def matrix(rows: Sequence[Row], n: int) -> tuple[Float64[np.ndarray, "row alt"], Bool[np.ndarray, " row"]]:
    """The numbers of rows of `n` counts, 0 in those that were not counted, and which were."""
    known = np.array([not isinstance(row, UserError) for row in rows], dtype=bool)
    counts = [[0] * n if isinstance(row, UserError) else [c.value for c in row] for row in rows]
    return np.array(counts, dtype=np.float64).reshape(len(rows), n), known


def notes(rows: Sequence[Row]) -> str:
    """Why some counts are not exact; "" where all are."""
    counts = [c for row in rows if not isinstance(row, UserError) for c in row]
    return "; ".join(sorted({c.note or "not exact" for c in counts if not c.exact}))
