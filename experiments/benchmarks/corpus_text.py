"""Texts for the benchmark of the corpus index, what is asked of them, and a judge of its counts that knows no suffix array.

*Made text*: a book of phrases of 2 to 11 words is drawn once, words by Zipf's law; a text is a row of phrases, the book's
by a flatter power law, cut into documents of log-normal length.  So words are as unequally frequent as in a language, and
sequences of several words recur.

*GSM8K*: questions and solutions of the train file, one document each, cut into words, numbers and signs.

*Judge*: everything is found by looking at every place of the text.  A co-occurrence is counted from running sums of the
second sequence's occurrences, clipped to the documents.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

VOCABULARY, PHRASES = 30_000, 60_000
COUNTS = ("count 1", "count 3", "count 5")
_PART = 1_000_000  # tokens that are made at once

Ids = list[int]


class Corpus:
    """Documents in one row: `tokens` (uint16), and `starts`, where each document begins and the last one ends."""

    def __init__(self, tokens: np.ndarray, starts: np.ndarray, vocab_size: int, name: str) -> None:
        self.tokens, self.starts, self.vocab_size, self.name = tokens, starts, vocab_size, name

    @property
    def n_docs(self) -> int:
        """How many documents there are."""
        return len(self.starts) - 1

    def documents(self) -> Iterator[np.ndarray]:
        """One document after the other."""
        for first, last in zip(self.starts[:-1].tolist(), self.starts[1:].tolist(), strict=True):
            yield self.tokens[first:last]


def made_text(n_tokens: int, seed: int) -> Corpus:
    """A made text of so many tokens."""
    rng = np.random.default_rng(seed)
    words = np.cumsum(1 / np.arange(1, VOCABULARY + 1))
    lengths = rng.integers(2, 12, PHRASES)
    firsts = np.concatenate([[0], np.cumsum(lengths)])
    book = np.searchsorted(words / words[-1], rng.random(firsts[-1])).astype(np.uint16)
    phrases = np.cumsum(1 / np.arange(1, PHRASES + 1) ** 0.8)
    tokens = np.zeros(n_tokens, np.uint16)
    at = 0
    while at < n_tokens:
        chosen = np.searchsorted(phrases / phrases[-1], rng.random(_PART // 6))
        before = np.cumsum(lengths[chosen]) - lengths[chosen]
        places = np.repeat(firsts[chosen] - before, lengths[chosen]) + np.arange(lengths[chosen].sum())
        part = book[places][: n_tokens - at]
        tokens[at : at + len(part)] = part
        at += len(part)
    ends = np.cumsum(np.maximum(1, rng.lognormal(5.3, 1.0, n_tokens // 100 + 1).astype(np.int64)))
    return Corpus(tokens, np.concatenate([[0], ends[ends < n_tokens], [n_tokens]]), VOCABULARY, f"made, {n_tokens}")


def gsm8k(folder: Path) -> Corpus:
    """The train file of GSM8K."""
    names: dict[str, int] = {}
    ids: list[int] = []
    starts = [0]
    for line in (folder / "train.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        for word in re.findall(r"[A-Za-z]+|\d|\S", row["question"] + " " + row["answer"]):
            ids.append(names.setdefault(word, len(names)))
        starts.append(len(ids))
    return Corpus(np.array(ids, np.uint16), np.array(starts), len(names), "GSM8K train")


class Queries:
    """What is asked, drawn from a corpus."""

    def __init__(self, corpus: Corpus, n: int, n_groups: int, seed: int) -> None:
        self._corpus, self._rng = corpus, np.random.default_rng(seed)
        self.counts = {name: [self._ngram(int(name[-1])) for _ in range(n)] for name in COUNTS}
        self.contexts = [self._piece(3) for _ in range(n // 5)]
        self.candidates = [[self._word() for _ in range(20)] for _ in self.contexts]
        self.long = [self._piece(32) for _ in range(n // 5)]
        self.groups = [self._group() for _ in range(n_groups)]

    @property
    def pairs(self) -> list[tuple[Ids, Ids]]:
        """Each group's words with its alternatives, one group after the other."""
        return [([a], [b]) for words, others in self.groups for a in words for b in others if a != b]

    def _word(self) -> int:
        return int(self._corpus.tokens[self._rng.integers(len(self._corpus.tokens))])

    def _piece(self, length: int) -> Ids:
        """Tokens of one document, drawn by its length; fewer where it is shorter."""
        place = int(self._rng.integers(len(self._corpus.tokens)))
        document = int(np.searchsorted(self._corpus.starts, place, side="right"))
        last = int(self._corpus.starts[document])
        first = max(int(self._corpus.starts[document - 1]), min(place, last - length))
        found: Ids = self._corpus.tokens[first : min(first + length, last)].tolist()
        return found

    def _ngram(self, length: int) -> Ids:
        piece = self._piece(length)
        return [*piece[:-1], self._word()] if self._rng.random() < 0.25 else piece

    def _group(self) -> tuple[Ids, Ids]:
        """Five words of a piece of a document; ten more of them and ten of anywhere."""
        piece = self._piece(200)
        chosen = self._rng.permutation(np.unique(piece)).tolist()
        return chosen[:5], [*chosen[5:15], *[self._word() for _ in range(10)]]


class Judge:
    """Counts by looking at every place."""

    def __init__(self, corpus: Corpus) -> None:
        self.corpus = corpus
        # For each place, where its document ends: nothing may reach beyond.
        self._ends = np.repeat(corpus.starts[1:], np.diff(corpus.starts)).astype(np.int32)
        self._places = lru_cache(maxsize=16)(self._places_of)
        self._running_sum = lru_cache(maxsize=1)(self._running_sum_of)

    def places(self, ngram: Sequence[int]) -> np.ndarray:
        """Where a sequence occurs."""
        return self._places(tuple(ngram))

    def _places_of(self, ngram: tuple[int, ...]) -> np.ndarray:
        tokens = self.corpus.tokens
        found = np.flatnonzero(tokens[: max(0, len(tokens) - len(ngram) + 1)] == ngram[0])
        for k, token in enumerate(ngram[1:], start=1):
            found = found[tokens[found + k] == token]
        return found[found + len(ngram) <= self._ends[found]]

    def count(self, ngram: Sequence[int]) -> int:
        """Occurrences of a sequence."""
        return len(self.places(ngram))

    def longest_suffix(self, context: Sequence[int]) -> tuple[int, int]:
        """Length and count of the longest end of a context that occurs."""
        best = (0, len(self.corpus.tokens))
        for length in range(1, len(context) + 1):
            n = self.count(context[-length:])
            if not n:
                break
            best = (length, n)
        return best

    def next_tokens(self, context: Sequence[int]) -> dict[int, int]:
        """What follows a context, and how often."""
        after = self.places(context) + len(context)
        after = after[after < self._ends[after - 1]]
        ids, n_each = np.unique(self.corpus.tokens[after], return_counts=True)
        return dict(zip(ids.tolist(), n_each.tolist(), strict=True))

    def together(self, a: Sequence[int], b: Sequence[int], window: int | None, unit: str) -> int:
        """Documents, pairs or anchors of two different sequences, see `memorization.corpus.interface`."""
        first, second = self.places(a), self.places(b)
        if unit == "documents":
            return len(np.intersect1d(self._ends[first], self._ends[second]))
        if len(first) > len(second):
            a, b, first, second = b, a, second, first
        starts = self.corpus.starts
        document = np.searchsorted(starts, first, side="right") - 1
        low, high = starts[document], starts[document + 1] - 1
        if window is not None:
            low, high = np.maximum(low, first - window), np.minimum(high, first + window)
        running = self._running_sum(tuple(b))
        near = running[high + 1] - running[low]
        return int(near.sum() if unit == "pairs" else np.count_nonzero(near))

    def _running_sum_of(self, ngram: tuple[int, ...]) -> np.ndarray:
        """How often a sequence occurs before each place."""
        marks = np.zeros(len(self.corpus.tokens) + 1, np.int32)
        marks[self.places(ngram) + 1] = 1
        return np.cumsum(marks, dtype=np.int32)
