"""How often two sequences occur together, from where each of them occurs.

With the sorted places of a and of b and the ends of the documents, for the rarer of the two (a, if equally rare):

1. *window None*: each sequence's number of occurrences in each document that holds it, n_a(d) and n_b(d).  `documents` are
   those that have both, `pairs` Σ n_a(d) n_b(d), `anchors` Σ n_a(d) over the documents that have both.
2. *window w*: the b's between max(place − w, start of the document) and min(place + w, its end) are counted by two binary
   searches for each place of a.  `pairs` is their sum, `anchors` the places that have any (one search tells).
3. *a = b*: an occurrence is none of its own neighbours, and an unordered pair counts once: Σ n (n − 1) / 2 pairs without
   a window, and with one half of the neighbours' sum.

The places of a frequent sequence take long to collect and to sort, and the same few are asked for again and again (five
salient words with twenty alternatives each), so the last ones are kept, up to a number of bytes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import cached_property
from threading import Lock

import numpy as np
from jaxtyping import Int32, Integer

Ends = Int32[np.ndarray, " documents"]


class Places:
    """Where a sequence occurs.

    Attributes:
        at: places in the text, in order.
        ends: where documents end, in order.
    """

    def __init__(self, at: Int32[np.ndarray, " places"], ends: Ends) -> None:
        self.at, self.ends = at, ends

    @cached_property
    def _documents(self) -> tuple[Integer[np.ndarray, " holding"], Integer[np.ndarray, " holding"]]:
        """The documents that hold it, in order, and how often each does."""
        of_each = np.searchsorted(self.ends, self.at)
        first = np.flatnonzero(np.diff(of_each, prepend=-1))
        n_each = np.diff(np.append(first, len(of_each)))
        return of_each[first].astype(np.int32), n_each.astype(np.int32)

    @property
    def documents(self) -> Integer[np.ndarray, " holding"]:
        """The documents that hold it, in order."""
        return self._documents[0]

    @property
    def n_each(self) -> Integer[np.ndarray, " holding"]:
        """How often each of `documents` holds it."""
        return self._documents[1]

    @property
    def nbytes(self) -> int:
        """At most so many bytes are kept."""
        return 3 * self.at.nbytes

    def around(self, window: int) -> tuple[Int32[np.ndarray, " places"], Int32[np.ndarray, " places"]]:
        """For each place the first and the last one of its document that are at most `window` away."""
        last = np.repeat(self.ends[self.documents], self.n_each)
        before = np.where(self.documents > 0, self.ends[self.documents - 1] + 1, 0)
        first = np.repeat(before, self.n_each)
        window = min(window, int(self.ends[-1]) + 1)
        low = np.maximum(self.at.astype(np.int64) - window, first)
        high = np.minimum(self.at.astype(np.int64) + window, last)
        # In the dtype of the places: `searchsorted` would otherwise copy all places into the other one.
        return low.astype(np.int32), high.astype(np.int32)


def together(a: Places, b: Places, *, same: bool, window: int | None, unit: str) -> int:
    """How often two sequences occur together; see the module.

    Args:
        a: where the first one occurs.
        b: where the second one occurs.
        same: whether they are the same sequence.
        window: most tokens from start to start, or None for the whole document; documents are counted whole.
        unit: documents, pairs or anchors (see `interface.py`).
    """
    if len(b.at) < len(a.at):
        a, b = b, a
    if not len(a.at):
        return 0
    if unit == "documents":
        return int(np.count_nonzero(_counts_in(a, b)))
    if window is None:
        near = np.repeat(_counts_in(a, b), a.n_each)
    else:
        low, high = a.around(window)
        at = np.searchsorted(b.at, low)
        if unit == "anchors" and not same:  # the first b that is not too early tells
            inside = at < len(b.at)
            return int(np.count_nonzero(b.at[at[inside]] <= high[inside]))
        near = np.searchsorted(b.at, high, side="right") - at
    if same:
        near = near - 1
    if unit == "pairs":
        return int(near.sum(dtype=np.int64)) // (2 if same else 1)
    return int(np.count_nonzero(near))


def _counts_in(a: Places, b: Places) -> Integer[np.ndarray, " holding"]:
    """How often b occurs in each of a's documents."""
    at = np.searchsorted(b.documents, a.documents)
    at[at == len(b.documents)] = 0
    return np.where(b.documents[at] == a.documents, b.n_each[at], 0)


class Kept:
    """The last places that were asked for, up to a number of bytes; may be used by several threads."""

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes, self.nbytes = most_bytes, 0
        self._kept: OrderedDict[bytes, Places] = OrderedDict()
        self._lock = Lock()

    def get(self, key: bytes, find: Callable[[], Places]) -> Places:
        """The places of a key: kept ones, or what `find` finds, which is then kept."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        found = find()
        with self._lock:
            if key not in self._kept and found.nbytes <= self.most_bytes:
                self._kept[key] = found
                self.nbytes += found.nbytes
            while self.nbytes > self.most_bytes:
                self.nbytes -= self._kept.popitem(last=False)[1].nbytes
        return found
