"""What every corpus index must do, whatever is behind it: a judge that counts by plain loops, and the cases.

`BruteForce` is the judge: `interface.py` word by word, without an idea of speed.  `Conformance` is the suite; a backend
is put through it by a subclass that says how to make an index from documents and what the backend cannot do:

    class TestMine(Conformance):
        max_vocab = 65_535

        @pytest.fixture
        def make(self, tmp_path):
            return lambda documents, vocab_size: build(tmp_path / "index", documents, vocab_size=vocab_size)

What a backend declares that it cannot do must be refused (`UserError`) or marked (`exact=False` and a note); a number
that is marked as exact must be the judge's.  The refusals that all backends share are in
`reasoninterp.memorization.corpus.checks` and, as a base class that makes them, `base`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import Any

import numpy as np
import pytest

from reasoninterp.errors import UserError
from reasoninterp.memorization.corpus.interface import CorpusIndex, CorpusInfo, Count, NextTokens, SuffixMatch

Documents = Sequence[Sequence[int]]
Make = Callable[[Documents, int], Any]

# Overlaps, a duplicate, an empty document, one-token documents, an id that stands twice in a row across documents.
MIXED: list[list[int]] = [[1, 1, 1, 2], [3, 1, 2], [], [1], [3, 1, 2], [2, 1, 2, 1, 2], [4]]


class BruteForce:
    """The judge: every method of the interface, by loops over lists."""

    def __init__(self, documents: Documents, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._documents = [self._ids(document) for document in documents]
        if not self._documents:
            raise UserError("documents: there are none; give at least one.")
        n_tokens = sum(len(document) for document in self._documents)
        self._info = CorpusInfo(n_tokens, len(self._documents), vocab_size, "ids", "in memory")
        self._closed = False

    @property
    def info(self) -> CorpusInfo:
        return self._info

    def count(self, ngram: Any) -> Count:
        return Count(self._how_often(self._asked(ngram)))

    def count_many(self, ngrams: Any) -> list[Count]:
        return [self.count(ngram) for ngram in ngrams]

    def continuation_counts(self, context: Any, candidates: Any) -> list[Count]:
        before = self._asked(context)
        return [Count(self._how_often([*before, candidate])) for candidate in self._asked(candidates)]

    def longest_suffix(self, context: Any, *, last: Any = None, min_count: Any = 1) -> SuffixMatch:
        ids, after = self._asked(context), [] if last is None else self._asked([last])
        least = self._at_least_one(min_count)
        for length in range(len(ids), 0, -1):
            n = self._how_often(ids[len(ids) - length :] + after)
            if n >= least:
                return SuffixMatch(length, Count(n))
        return SuffixMatch(0, Count(self._how_often(after)))

    def next_token_counts(self, context: Any, limit: Any = None) -> NextTokens:
        ids = self._asked(context)
        most = None if limit is None else self._at_least_one(limit)
        counts: dict[int, int] = {}
        for d, start in self._occurrences(ids):
            if start + len(ids) < len(self._documents[d]):
                follower = self._documents[d][start + len(ids)]
                counts[follower] = counts.get(follower, 0) + 1
        ranked = sorted(counts, key=lambda follower: (-counts[follower], follower))
        kept = ranked if most is None else ranked[:most]
        total = Count(sum(counts.values()))
        return NextTokens({follower: counts[follower] for follower in kept}, total, kept == ranked)

    def cooccurrence(self, a: Any, b: Any, *, window: Any = None, unit: Any = "documents") -> Count:
        first, second = self._asked(a), self._asked(b)
        if not first or not second:
            raise UserError("a and b: neither may be empty.")
        if unit not in ("documents", "pairs", "anchors"):
            raise UserError(f"unit {unit}: give documents, pairs or anchors.")
        if window is not None:
            window = self._at_least_one(window)
            if unit == "documents":
                raise UserError("window: documents are counted whole.")
        where_a, where_b = self._occurrences(first), self._occurrences(second)
        if unit == "documents":
            return Count(len({d for d, _ in where_a} & {d for d, _ in where_b}))

        def near(x: tuple[int, int], y: tuple[int, int]) -> bool:
            return x[0] == y[0] and (window is None or abs(x[1] - y[1]) <= window)

        def itself(x: tuple[int, int], y: tuple[int, int]) -> bool:
            return first == second and x == y

        if unit == "pairs":
            pairs = sum(near(x, y) and not itself(x, y) for x in where_a for y in where_b)
            return Count(pairs // 2 if first == second else pairs)
        rarer, other = (where_a, where_b) if len(where_a) <= len(where_b) else (where_b, where_a)
        return Count(sum(any(near(x, y) and not itself(x, y) for y in other) for x in rarer))

    def close(self) -> None:
        self._closed = True

    def _occurrences(self, ngram: list[int]) -> list[tuple[int, int]]:
        """(document, start) of each; the empty sequence stands before every token."""
        found = []
        for d, document in enumerate(self._documents):
            for start in range(len(document)):
                if document[start : start + len(ngram)] == ngram:
                    found.append((d, start))
        return found

    def _how_often(self, ngram: list[int]) -> int:
        return len(self._occurrences(ngram))

    def _asked(self, values: Any) -> list[int]:
        if self._closed:
            raise UserError("the index was closed; open it again.")
        return self._ids(values)

    def _ids(self, values: Any) -> list[int]:
        if isinstance(values, np.ndarray):
            if values.ndim != 1 or not np.issubdtype(values.dtype, np.integer):
                raise UserError("ids: give one row of integers.")
        elif not isinstance(values, list | tuple):
            raise UserError("ids: give a list of integers.")
        return [self._id(value) for value in values]

    def _id(self, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or not 0 <= value < self._vocab_size:
            raise UserError(f"ids: {value!r} is no id of a vocabulary of {self._vocab_size}.")
        return int(value)

    def _at_least_one(self, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
            raise UserError(f"{value!r}: give an integer of at least 1.")
        return int(value)


def agree(found: Count, true: Count) -> None:
    """A count that is marked as exact is the judge's; one that is not says why."""
    if found.exact:
        assert found == true
    else:
        assert found.value >= 0
        assert found.note


def random_corpus(seed: int) -> tuple[list[list[int]], int]:
    """Documents over a small alphabet, so that sequences recur: repeats, duplicates, prefixes, empty ones."""
    rng = random.Random(seed)
    vocab_size = rng.choice([2, 3, 5, 11])
    documents: list[list[int]] = []
    for _ in range(rng.randint(5, 12)):
        kind = rng.random()
        if documents and kind < 0.2:
            documents.append(list(rng.choice(documents)))
        elif documents and kind < 0.35:
            whole = rng.choice(documents)
            documents.append(whole[: rng.randint(0, len(whole))])
        elif kind < 0.45:
            documents.append([rng.randrange(vocab_size)] * rng.choice([0, 1, 9]))
        else:
            documents.append([rng.randrange(vocab_size) for _ in range(rng.randint(0, 20))])
    return documents, vocab_size


def random_queries(documents: Documents, vocab_size: int, n: int, seed: int) -> Iterator[list[int]]:
    """Pieces of documents, pieces across the end of one, whole documents, and any ids."""
    rng = random.Random(seed)
    joined = [i for document in documents for i in document]
    for _ in range(n):
        kind = rng.random()
        if kind < 0.6:
            start = rng.randrange(len(joined))
            yield joined[start : start + rng.randint(1, 4)]
        elif kind < 0.7:
            yield list(rng.choice(documents))
        elif kind < 0.75:
            yield []
        else:
            yield [rng.randrange(vocab_size) for _ in range(rng.randint(1, 4))]


class Conformance:
    """The cases.  A subclass overrides the fixture `make` and what else differs.

    Attributes:
        max_vocab: largest vocabulary the backend can count in; `make` must refuse a larger one.
        max_window: largest window, None for any; a larger one must be refused.
        inexact_next: whether it may mark what follows a context as not exact.
        inexact_units: units of co-occurrence for which it may refuse or give marked counts; elsewhere it must be exact.
        builds: whether `make` builds an index itself, and so is what must refuse bad documents.
        knows_sizes: whether it tells how many tokens and documents there are.
    """

    max_vocab: int | None = None
    max_window: int | None = None
    inexact_next = False
    inexact_units: frozenset[str] = frozenset()
    builds = True
    knows_sizes = True

    @pytest.fixture
    def make(self) -> Make:
        raise NotImplementedError("a subclass says how to make an index from documents and a vocabulary's size")

    def together(self, index: CorpusIndex, a: Any, b: Any, window: int | None, unit: Any) -> Count | None:
        """A co-occurrence; None where a declared weakness was refused."""
        try:
            found = index.cooccurrence(a, b, window=window, unit=unit)
        except UserError:
            assert unit in self.inexact_units
            return None
        assert found.exact or unit in self.inexact_units
        return found

    def follows(self, index: CorpusIndex, context: Any, true: NextTokens, limit: int | None = None) -> None:
        """What follows is the judge's, in the same order; or marked, where that is declared."""
        found = index.next_token_counts(context, limit)
        if self.inexact_next and not found.total.exact:
            assert found.total.note
            assert not found.complete
            assert found.total.value >= true.total.value
        else:
            assert found == true
            assert list(found.counts) == list(true.counts)

    # ------------------------------------------------------------------------------------------ worked by hand

    def test_what_it_was_made_from(self, make: Make) -> None:
        with closing(make(MIXED, 5)) as index:
            assert index.info.vocab_size == 5
            assert index.info.max_window == self.max_window
            assert index.info.tokenizer
            assert index.info.corpus
            if self.knows_sizes:
                assert (index.info.n_tokens, index.info.n_docs) == (17, 7)

    def test_counts(self, make: Make) -> None:
        # Of `MIXED`; in brackets which documents, counted from 0.
        with closing(make(MIXED, 5)) as index:
            assert index.count([1]) == Count(8)  # 3 (0), 1 (1), 1 (3), 1 (4), 2 (5)
            assert index.count([2]) == Count(6)
            assert index.count([4]) == Count(1)
            assert index.count([0]) == Count(0)  # an id that never occurs
            assert index.count([1, 1]) == Count(2)  # overlapping (0)
            assert index.count([1, 1, 1]) == Count(1)
            assert index.count([1, 2]) == Count(5)  # (0), (1), (4), twice (5)
            assert index.count([2, 1, 2]) == Count(2)  # overlapping (5)
            assert index.count([3, 1, 2]) == Count(2)  # whole documents, and duplicates
            assert index.count([2, 1, 2, 1, 2]) == Count(1)
            assert index.count([2, 3]) == Count(0)  # only across the end of (0)
            assert index.count([1, 3]) == Count(0)  # only across the end of (3)
            assert index.count([2, 1, 2, 1, 2, 4]) == Count(0)
            assert index.count([2, 2]) == Count(0)  # only across the end of (4)
            assert index.count([1, 1, 1, 2, 3]) == Count(0)  # longer than its document
            assert index.count([]) == Count(17)  # once per token

    def test_many_counts_are_the_counts(self, make: Make) -> None:
        queries: list[Any] = [[1, 2], (2,), np.array([3, 1]), [0], []]
        with closing(make(MIXED, 5)) as index:
            assert index.count_many(queries) == [Count(5), Count(6), Count(2), Count(0), Count(17)]
            assert index.count_many([]) == []

    def test_continuations(self, make: Make) -> None:
        with closing(make(MIXED, 5)) as index:
            # 1 is followed by 1 twice (0), by 2 five times, by nothing once (3).
            assert index.continuation_counts([1], [1, 2, 3, 4]) == [Count(2), Count(5), Count(0), Count(0)]
            assert index.continuation_counts([1], (2, 2)) == [Count(5), Count(5)]  # one asked for twice
            assert index.continuation_counts([], [4, 1]) == [Count(1), Count(8)]
            assert index.continuation_counts([2, 1], np.array([2])) == [Count(2)]
            assert index.continuation_counts([4], [1]) == [Count(0)]  # nothing follows it
            assert index.continuation_counts([0, 0], [1]) == [Count(0)]
            assert index.continuation_counts([1], []) == []

    def test_longest_suffix(self, make: Make) -> None:
        with closing(make(MIXED, 5)) as index:
            assert index.longest_suffix([4, 3, 1, 2]) == SuffixMatch(3, Count(2))
            assert index.longest_suffix([3, 1, 2], min_count=3) == SuffixMatch(2, Count(5))
            assert index.longest_suffix([2, 1, 2, 1, 2]) == SuffixMatch(5, Count(1))
            assert index.longest_suffix([1, 0]) == SuffixMatch(0, Count(17))
            assert index.longest_suffix([]) == SuffixMatch(0, Count(17))
            # The end 1, 2 occurs five times, but is followed by 1 only once (5), and 3, 1, 2 never is.
            assert index.longest_suffix([3, 1, 2], last=1) == SuffixMatch(2, Count(1))
            assert index.longest_suffix([3, 1, 2], last=1, min_count=2) == SuffixMatch(1, Count(2))
            assert index.longest_suffix([3, 1, 2], last=4) == SuffixMatch(0, Count(1))
            assert index.longest_suffix([3, 1, 2], last=0) == SuffixMatch(0, Count(0))
            assert index.longest_suffix([], last=2) == SuffixMatch(0, Count(6))
            assert index.longest_suffix((3, 1), last=np.int64(2), min_count=np.int32(2)) == SuffixMatch(2, Count(2))

    def test_next_tokens(self, make: Make) -> None:
        with closing(make(MIXED, 5)) as index:
            self.follows(index, [1], NextTokens({2: 5, 1: 2}, Count(7), True))
            self.follows(index, [1], NextTokens({2: 5}, Count(7), False), limit=1)
            self.follows(index, [1], NextTokens({2: 5, 1: 2}, Count(7), True), limit=2)
            self.follows(index, [3, 1, 2], NextTokens({}, Count(0), True))  # only at ends
            self.follows(index, [4], NextTokens({}, Count(0), True))  # only at the end of all
            self.follows(index, [0], NextTokens({}, Count(0), True))
            self.follows(index, [], NextTokens({1: 8, 2: 6, 3: 2, 4: 1}, Count(17), True))
            assert index.next_token_counts([1]).total.exact  # also where others may be marked

    def test_next_tokens_come_by_frequency_and_then_by_id(self, make: Make) -> None:
        with closing(make([[0, 3], [0, 1], [0, 2], [0, 1], [0, 3], [0, 4]], 5)) as index:
            self.follows(index, [0], NextTokens({1: 2, 3: 2, 2: 1, 4: 1}, Count(6), True))
            self.follows(index, [0], NextTokens({1: 2, 3: 2, 2: 1}, Count(6), False), limit=3)

    @pytest.mark.parametrize("window", [1, 1000])
    def test_a_neighbour_in_the_document_before_hides_nothing(self, make: Make, window: int) -> None:
        # [2], [1, 2]: an index that merges the 2s on both sides of the 1 and then sees a document's end between them
        # says 0 for the window of 1000 and 1 for the window of 1.  There is one.
        with closing(make([[2], [1, 2]], 3)) as index:
            assert index.count([1]).value > 0
            for unit in ("anchors", "pairs"):
                found = self.together(index, [1], [2], window, unit)
                if found is not None:
                    agree(found, Count(1))
            found = self.together(index, [1], [2], None, "documents")
            if found is not None:
                agree(found, Count(1))

    @pytest.mark.parametrize(
        ("unit", "window", "a", "b", "true"),
        [
            # [1, 1, 1, 2], [3, 1, 2], [1], [3, 1, 2], [2, 1, 2, 1, 2]: documents with 1 and 2 are (0), (1), (4), (5).
            ("documents", None, [1], [2], 4),
            ("documents", None, [3], [2], 2),
            ("documents", None, [1, 1], [1, 2], 1),
            ("documents", None, [1], [1], 5),  # the same term: all that hold it
            ("documents", None, [4], [1], 0),
            ("documents", None, [0], [1], 0),
            # Pairs of 1 and 2: 3·1 (0), 1 (1), 1 (4), 2·3 (5).
            ("pairs", None, [1], [2], 11),
            ("pairs", None, [2], [1], 11),
            ("pairs", 1, [1], [2], 7),  # 1 (0), 1, 1, and 4 neighbours (5)
            ("pairs", 2, [1], [2], 8),  # and 1 _ 2 (0)
            ("pairs", 3, [1], [2], 11),
            ("pairs", None, [1], [1], 4),  # 3 pairs (0), 1 (5); none of an occurrence with itself
            ("pairs", 1, [1], [1], 2),
            ("pairs", None, [1, 1], [1, 1], 1),  # overlapping occurrences, one apart
            ("pairs", 1, [3], [3, 1, 2], 2),  # of different sequences at the same start
            ("pairs", None, [0], [1], 0),
            # Anchors are the six 2s rather than the eight 1s; the 1s near them decide.
            ("anchors", None, [1], [2], 6),
            ("anchors", None, [2], [1], 6),
            ("anchors", None, [3], [1], 2),
            ("anchors", 1, [3], [2], 0),  # 3 1 2: two apart
            ("anchors", 2, [3], [2], 2),
            ("anchors", None, [4], [1], 0),
            ("anchors", None, [1], [1], 5),  # with another one: 3 (0), 2 (5)
            ("anchors", 1, [1], [1], 3),  # neighbours only (0)
            ("anchors", None, [0], [1], 0),
        ],
    )
    def test_cooccurrence(self, make: Make, unit: Any, window: int | None, a: Any, b: Any, true: int) -> None:
        assert BruteForce(MIXED, 5).cooccurrence(a, b, window=window, unit=unit) == Count(true)
        with closing(make(MIXED, 5)) as index:
            found = self.together(index, a, b, window, unit)
            if found is not None:
                agree(found, Count(true))

    def test_equally_rare_anchors_are_those_of_the_first(self, make: Make) -> None:
        # 1 and 2 both occur three times.  Two of the 1s have a 2 near; all three 2s have a 1 near.
        documents = [[1, 2, 2, 2, 0, 0, 0, 1], [1]]
        with closing(make(documents, 3)) as index:
            for a, b, true in (([1], [2], 1), ([2], [1], 3)):
                found = self.together(index, a, b, 3, "anchors")
                if found is not None:
                    agree(found, Count(true))

    def test_a_document_that_starts_or_ends_with_the_query(self, make: Make) -> None:
        documents = [[5, 6, 7], [7, 5, 6], [5, 6], [6, 5], [5]]
        with closing(make(documents, 8)) as index:
            assert index.count([5, 6]) == Count(3)
            assert index.count([6, 5]) == Count(1)
            assert index.count([7, 7]) == Count(0)  # (0) ends as (1) starts
            self.follows(index, [5, 6], NextTokens({7: 1}, Count(1), True))
            self.follows(index, [5], NextTokens({6: 3}, Count(3), True))

    def test_one_document_of_one_token(self, make: Make) -> None:
        with closing(make([[0]], 1)) as index:
            assert index.count([0]) == Count(1)
            assert index.count([0, 0]) == Count(0)
            assert index.count([]) == Count(1)
            self.follows(index, [0], NextTokens({}, Count(0), True))
            assert index.longest_suffix([0, 0]) == SuffixMatch(1, Count(1))

    def test_empty_documents_separate_but_add_nothing(self, make: Make) -> None:
        with closing(make([[], [1, 0], [], [], [0, 1], []], 2)) as index:
            assert index.count([]) == Count(4)
            assert index.count([0, 0]) == Count(0)
            assert index.count([0, 1]) == Count(1)
            assert index.count([0]) == Count(2)
            if self.knows_sizes:
                assert index.info.n_docs == 6

    def test_many_copies_of_one_document(self, make: Make) -> None:
        document = [1, 2, 1, 2, 1, 3]
        with closing(make([document] * 50, 4)) as index:
            assert index.count(document) == Count(50)
            assert index.count([1, 2]) == Count(100)
            assert index.count([3, 1]) == Count(0)
            assert index.longest_suffix([3, *document]) == SuffixMatch(6, Count(50))
            self.follows(index, [1], NextTokens({2: 100, 3: 50}, Count(150), True))

    def test_a_vocabulary_of_two(self, make: Make) -> None:
        documents = [[0, 0, 0, 1], [1, 1, 0], [0] * 9]
        with closing(make(documents, 2)) as index:
            assert index.count([0]) == Count(13)
            assert index.count([0] * 9) == Count(1)
            assert index.count([0, 0]) == Count(10)
            assert index.count([0, 1, 1]) == Count(0)
            with pytest.raises(UserError):
                index.count([2])

    @pytest.mark.parametrize("vocab_size", [255, 256, 257, 65_535, 65_536, 65_537, 200_000])
    def test_ids_around_the_widths_of_integers(self, make: Make, vocab_size: int) -> None:
        """Byte order, the id next to a mark of a document's end, and truncation of wide ids."""
        near = [0, 1, 254, 255, 256, 257, 511, 512, 65_280, 65_533, 65_534, 65_535, 65_536, 65_537, 131_072, 199_999]
        ids = [i for i in near if i < vocab_size] + [vocab_size - 1]
        documents = [ids, [ids[-1]], ids[::-1], [], [ids[-1], ids[-1], 0]]
        if self.max_vocab is not None and vocab_size > self.max_vocab:
            with pytest.raises(UserError, match=f"{self.max_vocab:,}|{self.max_vocab}"):
                make(documents, vocab_size)
            return
        judge = BruteForce(documents, vocab_size)
        with closing(make(documents, vocab_size)) as index:
            for query in [[i] for i in ids] + [ids[i : i + 2] for i in range(len(ids))] + [ids, [ids[-1], 0]]:
                assert judge.count(query).value > 0
                assert index.count(query) == judge.count(query)
            for i in ids:
                self.follows(index, [i], judge.next_token_counts([i]))
            self.follows(index, [], judge.next_token_counts([]))
            if vocab_size > 256:
                assert judge.count([0, 256]) == Count(0)  # 1, 0 in other bytes
                assert index.count([0, 256]) == Count(0)
            with pytest.raises(UserError, match="vocabulary"):
                index.count([vocab_size])

    # ------------------------------------------------------------------------------------------ against the judge

    @pytest.mark.parametrize("seed", range(8))
    def test_sequences_of_random_corpora(self, make: Make, seed: int) -> None:
        documents, vocab_size = random_corpus(seed)
        judge = BruteForce(documents, vocab_size)
        rng = random.Random(seed + 1000)
        nonzero = 0
        with closing(make(documents, vocab_size)) as index:
            queries = list(random_queries(documents, vocab_size, 30, seed))
            assert index.count_many(queries) == judge.count_many(queries)
            for query in queries:
                nonzero += judge.count(query).value > 0
                assert index.count(query) == judge.count(query), query
                candidates = list(range(vocab_size))
                assert index.continuation_counts(query, candidates) == judge.continuation_counts(query, candidates)
                limit = rng.choice([None, None, 1, 2])
                self.follows(index, query, judge.next_token_counts(query, limit), limit)
                last = rng.choice([None, rng.randrange(vocab_size)])
                asked: dict[str, Any] = {"last": last, "min_count": rng.choice([1, 1, 2, 3])}
                longer = [rng.randrange(vocab_size), *query]
                assert index.longest_suffix(longer, **asked) == judge.longest_suffix(longer, **asked), (longer, asked)
        assert nonzero >= 15

    @pytest.mark.parametrize("seed", range(8))
    def test_cooccurrences_in_random_corpora(self, make: Make, seed: int) -> None:
        documents, vocab_size = random_corpus(seed)
        judge = BruteForce(documents, vocab_size)
        rng = random.Random(seed + 2000)
        terms = [query for query in random_queries(documents, vocab_size, 40, seed + 100) if 1 <= len(query) <= 2]
        nonzero = dict.fromkeys(("documents", "pairs", "anchors"), 0)
        with closing(make(documents, vocab_size)) as index:
            for _ in range(60):
                a = rng.choice(terms)
                b = a if rng.random() < 0.15 else rng.choice(terms)
                unit: Any = rng.choice(list(nonzero))
                window = None if unit == "documents" else rng.choice([None, 1, 2, 5, 1000])
                true = judge.cooccurrence(a, b, window=window, unit=unit)
                found = self.together(index, a, b, window, unit)
                if found is not None:
                    agree(found, true)
                nonzero[unit] += true.value > 0
        assert min(nonzero.values()) >= 3

    def test_what_must_hold_between_counts(self, make: Make) -> None:
        """Without a judge: ends of documents are what a sequence's count has over its continuations."""
        documents, vocab_size = random_corpus(5)
        ends = sum(1 for document in documents if document[-1:] == [0])
        with closing(make(documents, vocab_size)) as index:
            following = index.continuation_counts([0], list(range(vocab_size)))
            assert index.count([0]).value == sum(c.value for c in following) + ends
            assert index.count([0]).value > ends > 0

    # ------------------------------------------------------------------------------------------ refusals

    @pytest.mark.parametrize(
        "bad",
        [
            [-1],
            [1, -1],
            np.array([-1]),
            [5],
            [1, 5],
            np.array([5], dtype=np.uint64),
            [2**70],
            [1.0],
            [1, 2.5],
            np.array([1.0]),
            [True],
            [1, False],
            np.array([True]),
            [np.bool_(True)],
            ["1"],
            "1",
            b"\x01",
            [None],
            [[1]],
            [[1], [2]],
            np.array([[1, 2]]),
            np.array(1),
            np.array([1, 2], dtype=object),
            [1, "AND", 2],
        ],
        ids=repr,
    )
    def test_what_is_no_sequence_of_ids_is_refused(self, make: Make, bad: Any) -> None:
        with closing(make(MIXED, 5)) as index:
            asks: list[Callable[[], Any]] = [
                lambda: index.count(bad),
                lambda: index.count_many([[1], bad]),
                lambda: index.continuation_counts(bad, [1]),
                lambda: index.continuation_counts([1], bad),
                lambda: index.longest_suffix(bad),
                lambda: index.longest_suffix(bad, last=1),
                lambda: index.next_token_counts(bad),
                lambda: index.cooccurrence(bad, [1]),
                lambda: index.cooccurrence([1], bad, window=3, unit="anchors"),
            ]
            for ask in asks:
                with pytest.raises(UserError):
                    ask()
            assert index.count([1]) == Count(8)  # and is none the worse for it

    @pytest.mark.parametrize("bad", [5, -1, 1.0, True, "1", [1]], ids=repr)
    def test_what_is_no_id_is_refused_as_the_last_one(self, make: Make, bad: Any) -> None:
        with closing(make(MIXED, 5)) as index, pytest.raises(UserError):
            index.longest_suffix([1], last=bad)

    def test_tuples_and_integer_arrays_are_sequences_of_ids(self, make: Make) -> None:
        with closing(make(MIXED, 5)) as index:
            for ids in (
                (1, 2),
                np.array([1, 2]),
                np.array([1, 2], dtype=np.uint8),
                np.array([1, 9, 2, 9], dtype=np.int32)[::2],
                [np.int64(1), np.uint16(2)],
            ):
                assert index.count(ids) == Count(5)
                assert index.longest_suffix(ids) == SuffixMatch(2, Count(5))
                self.follows(index, ids, NextTokens({1: 1}, Count(1), True))
                assert index.continuation_counts(ids, ids) == [Count(1), Count(0)]

    @pytest.mark.parametrize("bad", [0, -1, 1.0, True, "3"], ids=repr)
    def test_what_is_no_number_of_tokens_is_refused(self, make: Make, bad: Any) -> None:
        with closing(make(MIXED, 5)) as index:
            asks: list[Callable[[], Any]] = [
                lambda: index.cooccurrence([1], [2], window=bad, unit="anchors"),
                lambda: index.cooccurrence([1], [2], window=bad, unit="pairs"),
                lambda: index.longest_suffix([1], min_count=bad),
                lambda: index.next_token_counts([1], limit=bad),
            ]
            for ask in asks:
                with pytest.raises(UserError):
                    ask()

    def test_a_window_above_the_backends_own_is_refused(self, make: Make) -> None:
        with closing(make(MIXED, 5)) as index:
            if self.max_window is None:
                found = self.together(index, [1], [2], 10**9, "pairs")
                if found is not None:
                    agree(found, Count(11))
                return
            for unit in ("anchors", "pairs"):
                with pytest.raises(UserError, match="window"):
                    index.cooccurrence([1], [2], window=self.max_window + 1, unit=unit)

    def test_other_cooccurrences_are_refused(self, make: Make) -> None:
        with closing(make(MIXED, 5)) as index:
            for unit in ("words", "", None, "Documents"):
                with pytest.raises(UserError, match="unit"):
                    index.cooccurrence([1], [2], unit=unit)
            for a, b in (([], [1]), ([1], []), ([], [])):
                for unit in ("documents", "pairs", "anchors"):
                    with pytest.raises(UserError):
                        index.cooccurrence(a, b, unit=unit)
            with pytest.raises(UserError, match="window"):  # documents have none
                index.cooccurrence([1], [2], window=3, unit="documents")

    def test_a_closed_index_answers_nothing(self, make: Make) -> None:
        index = make(MIXED, 5)
        assert index.count([1]) == Count(8)
        index.close()
        index.close()
        asks: list[Callable[[], Any]] = [
            lambda: index.count([1]),
            lambda: index.count([]),
            lambda: index.count_many([[1]]),
            lambda: index.continuation_counts([1], [2]),
            lambda: index.longest_suffix([1]),
            lambda: index.next_token_counts([1]),
            lambda: index.cooccurrence([1], [2]),
        ]
        for ask in asks:
            with pytest.raises(UserError, match="closed"):
                ask()

    @pytest.mark.parametrize(
        "documents", [[], [[1], [5]], [[-1]], [[1, 2.0]], [[True]], [["1"]], [1, 2], ["1"], [np.array([[1]])]], ids=repr
    )
    def test_documents_that_are_none_are_refused(self, make: Make, documents: Any) -> None:
        if self.builds:
            with pytest.raises(UserError):
                make(documents, 5)
