"""The embedded index: a suffix array over memory-mapped files, searched by halving.

1. A sequence of ids is turned into the bytes that it has in the text (`files.py`).  The suffixes that begin with its
   first symbol are known from a table; among them, those that begin with all its bytes are found by `bisect`, whose key
   is a slice of the text.  Their number is the count, and the suffix array says where they are.
2. No id is stored as 0, so that nothing that is looked for crosses the end of a document.
3. Suffixes that begin with a context stand in the order of what follows it: candidates' shares of them are found by
   halving again, or, where they are few, by reading what follows each.
4. Co-occurrence is counted from the places of both sequences (`together.py`).

An index is immutable.  It may be read by several threads, is opened anew in each process that it is pickled to, and
costs no memory of its own but the places it keeps.
"""

from __future__ import annotations

import os
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from reasoninterp.errors import UserError
from reasoninterp.memorization.corpus.base import CheckedIndex, most_frequent
from reasoninterp.memorization.corpus.files import CHUNK, Files
from reasoninterp.memorization.corpus.interface import Count, NextTokens
from reasoninterp.memorization.corpus.together import Kept, Places, together
from reasoninterp.memorization.corpus.verify import verify_files

_NEAR = 16  # most sequences are rare: the end of their suffixes is looked for so near to their begin first
_FEW = 2048  # so many followers are read sooner than candidates are looked for among them


class EmbeddedIndex(CheckedIndex):
    """An index in a directory that `build.build_index` made; every count is exact."""

    def __init__(self, path: str | os.PathLike[str], *, tokenizer: str | None = None, keep_bytes: int = 2**27) -> None:
        """Open an index.

        Args:
            path: its directory.
            tokenizer: the identity of the tokenizer whose ids will be asked for (`tokenizer.tokenizer_identity`).
            keep_bytes: how much memory the places of sequences may take that were asked for in co-occurrences.

        Raises:
            UserError: there is no index, it is damaged or was made with another tokenizer.
        """
        self.path = Path(path).absolute()
        files = Files.open(self.path)
        super().__init__(files.header.info)
        if tokenizer is not None and tokenizer != self.info.tokenizer:
            raise UserError(
                f"{path}: the index was built with the tokenizer {self.info.tokenizer}, and the ids to be counted are of "
                f"{tokenizer}; build an index with that one."
            )
        self._files: Files | None = files
        self._keep_bytes = keep_bytes
        self._places = Kept(keep_bytes)
        # memoryviews hand out plain integers several times faster than arrays do
        self._text, self._width = files.text, files.symbols.itemsize
        self._suffixes, self._starts = files.suffixes.data, files.starts.data

    def __reduce__(self) -> tuple[Callable[..., EmbeddedIndex], tuple[Any, ...]]:
        return _reopened, (str(self.path), self._opened().header.digest, self._keep_bytes)

    def close(self) -> None:
        """Let go of the files; what is asked afterwards raises."""
        super().close()
        self._files = None
        self._text = self._suffixes = self._starts = self._places = None  # type: ignore[assignment]

    def verify(self) -> list[str]:
        """Read every file whole: checksums, documents, and the order of all suffixes; returns what was checked.

        Takes 4 bytes of memory and some 0.1 µs a token.

        Raises:
            UserError: names the first file that is not what was built.
        """
        return verify_files(self._opened())

    def continuation_counts(self, context: Any, candidates: Any) -> list[Count]:
        """Occurrences of the context followed by each candidate."""
        before, after = self._ids(context, "context"), self._ids(candidates, "candidates")
        if not before or not after:
            return [self._count([one]) for one in after]
        low, high = self._range(self._key(before))
        depth = len(before)
        if high - low <= _FEW:
            followers = self._followers(low, high, depth)
            wanted = np.array(after, dtype=followers.dtype) + 1
            bounds = np.searchsorted(followers, wanted), np.searchsorted(followers, wanted, side="right")
            return [Count(n) for n in (bounds[1] - bounds[0]).tolist()]
        text, suffixes, width = self._text, self._suffixes, self._width
        shift = depth * width

        def key(place: int) -> bytes:
            return text[(at := place * width + shift) : at + width]

        out = []
        for one in after:
            symbol = self._key([one])
            first = bisect_left(suffixes, symbol, low, high, key=key)
            out.append(Count(bisect_right(suffixes, symbol, first, high, key=key) - first))
        return out

    def _opened(self) -> Files:
        self._open()
        assert self._files is not None
        return self._files

    def _key(self, ids: list[int]) -> bytes:
        """A sequence as the bytes that it has in the text."""
        width = self._width
        return b"".join([(one + 1).to_bytes(width, "big") for one in ids])

    def _range(self, key: bytes) -> tuple[int, int]:
        """The suffixes that begin with a sequence: the first, and the one after the last."""
        text, suffixes, width, n = self._text, self._suffixes, self._width, len(key)
        symbol = int.from_bytes(key[:width], "big")
        low, high = self._starts[symbol], self._starts[symbol + 1]
        if n == width:
            return low, high

        def begin(place: int) -> bytes:
            return text[(at := place * width) : at + n]

        low = bisect_left(suffixes, key, low, high, key=begin)
        near = min(low + _NEAR, high)
        end = bisect_right(suffixes, key, low, near, key=begin)
        if end == near < high:
            end = bisect_right(suffixes, key, near, high, key=begin)
        return low, end

    def _count(self, ngram: list[int]) -> Count:
        if not ngram:
            return Count(self._opened().header.n_tokens)
        low, high = self._range(self._key(ngram))
        return Count(high - low)

    def _next(self, context: list[int], limit: int | None) -> NextTokens:
        header = self._opened().header
        if not context:
            first = np.diff(self._opened().starts)[1:]
            ids = np.flatnonzero(first)
            counts = dict(zip(ids.tolist(), first[ids].tolist(), strict=True))
            return most_frequent(counts, limit, Count(header.n_tokens))
        low, high = self._range(self._key(context))
        found: Counter[int] = Counter()
        for at in range(low, high, CHUNK):
            symbols, n_each = np.unique(self._followers(at, min(at + CHUNK, high), len(context)), return_counts=True)
            found.update(dict(zip(symbols.tolist(), n_each.tolist(), strict=True)))
        found.pop(0, None)  # the ends of documents
        counts = {symbol - 1: n for symbol, n in found.items()}
        return most_frequent(counts, limit, Count(sum(counts.values())))

    def _followers(self, low: int, high: int, depth: int) -> np.ndarray:
        """The symbols that follow the first `depth` ones of a range of suffixes."""
        files = self._opened()
        at = files.suffixes[low:high].astype(np.int64) + depth
        return files.symbols[at].astype(np.int64)

    def _together(self, a: list[int], b: list[int], window: int | None, unit: str) -> Count:
        first, second = self._key(a), self._key(b)
        places = [self._places.get(key, lambda key=key: self._find(key)) for key in (first, second)]  # type: ignore[misc]
        return Count(together(*places, same=first == second, window=window, unit=unit))

    def _find(self, key: bytes) -> Places:
        """Where a sequence occurs."""
        files = self._opened()
        low, high = self._range(key)
        at = np.sort(files.suffixes[low:high])
        if len(at) and (at[0] < 0 or at[-1] >= len(files.suffixes)):
            raise files.damaged("suffixes.bin", "an entry lies outside of the text")
        return Places(at, files.ends)


def _reopened(path: str, digest: str, keep_bytes: int) -> EmbeddedIndex:
    """The index that was pickled, opened in this process."""
    index = EmbeddedIndex(path, keep_bytes=keep_bytes)
    if index._opened().header.digest != digest:
        raise UserError(f"{path}: another index stands here than the one that was pickled; open it by its path.")
    return index
