"""The three sources: worked examples, conventions, planted truth, and a null in which 5 % means 5 %."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
from scipy.stats import binom, rankdata, spearmanr

from reasoninterp.errors import UserError
from reasoninterp.memorization.alternatives import Alternatives, pick
from reasoninterp.memorization.corpus.interface import CorpusInfo, Count, NextTokens, SuffixMatch
from reasoninterp.memorization.counts import CountBook
from reasoninterp.memorization.nulls import NO_NULL, Null
from reasoninterp.memorization.rank import adjusted_share, partial_correlations
from reasoninterp.memorization.settings import Settings
from reasoninterp.memorization.sources import (
    EQUAL_COUNTS,
    EQUAL_PROBABILITIES,
    FEW,
    NO_SALIENT,
    NO_SUFFIX,
    NOT_COUNTED,
    ONLY_UNIGRAMS,
    SOURCES,
    Observed,
    SourceScore,
    Target,
    observe,
)
from reasoninterp.memorization.verdicts import NO_SOURCE, TOO_MANY, TokenSources, dominant, stim, trace_sources
from reasoninterp.stats import corrected
from reasoninterp.traces.trace import Span
from tests.corpus_conformance import BruteForce

NOWHERE = -60.0
counted = lru_cache(maxsize=None)(Count)  # in the tests every new object is checked, which takes longer than counting


class Tables:
    """An index of short n-grams and of documents by token, fast enough for simulations; checked against the judge."""

    def __init__(self, documents: Sequence[Sequence[int]], vocab_size: int, longest: int = 4) -> None:
        self.info = CorpusInfo(sum(map(len, documents)), len(documents), vocab_size, "ids", "in memory")
        self.asked: Counter[Any] = Counter()
        self._longest = longest
        self._grams: Counter[tuple[int, ...]] = Counter()
        there = np.zeros((vocab_size, len(documents)), dtype=np.float32)
        for d, document in enumerate(map(tuple, documents)):
            for n in range(1, longest + 1):
                self._grams.update(document[i : i + n] for i in range(len(document) - n + 1))
            there[list(document), d] = 1
        self._together: list[list[float]] = (there @ there.T).tolist()

    def count(self, ngram: Sequence[int]) -> Count:
        if len(ngram) > self._longest:
            raise UserError(f"ngram: longer than {self._longest}.")
        return counted(self._grams[tuple(ngram)] if ngram else self.info.n_tokens or 0)

    def count_many(self, ngrams: Sequence[Sequence[int]]) -> list[Count]:
        return [self.count(ngram) for ngram in ngrams]

    def continuation_counts(self, context: Sequence[int], candidates: Sequence[int]) -> list[Count]:
        self.asked["continuations", tuple(context)] += len(candidates)
        return [self.count((*context, candidate)) for candidate in candidates]

    def longest_suffix(self, context: Sequence[int], *, last: int | None = None, min_count: int = 1) -> SuffixMatch:
        self.asked["suffix", tuple(context), last] += 1
        end = () if last is None else (last,)
        found = SuffixMatch(0, self.count(end))
        for n in range(1, min(len(context), self._longest - len(end)) + 1):
            count = self.count((*context[len(context) - n :], *end))
            if count.value < min_count:
                break
            found = SuffixMatch(n, count)
        return found

    def next_token_counts(self, context: Sequence[int], limit: int | None = None) -> NextTokens:
        raise NotImplementedError

    def cooccurrence(self, a: Sequence[int], b: Sequence[int], *, window: Any = None, unit: Any = "documents") -> Count:
        self.asked["together", a[0], b[0]] += 1
        return counted(int(self._together[a[0]][b[0]]))

    def close(self) -> None:
        pass


def test_the_tables_count_as_the_judge_does() -> None:
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 5, size=n).tolist() for n in (12, 1, 7, 20)]
    mine, judge = Tables(documents, 5), BruteForce(documents, 5)
    for _ in range(40):
        context, last = rng.integers(0, 5, size=3).tolist(), int(rng.integers(5))
        assert mine.longest_suffix(context, last=last) == judge.longest_suffix(context, last=last)
        assert mine.continuation_counts(context[:2], range(5)) == judge.continuation_counts(context[:2], list(range(5)))
        assert mine.cooccurrence([context[0]], [last]) == judge.cooccurrence([context[0]], [last])


def _alternatives(log_probs: Sequence[float], target: int = 0) -> Alternatives:
    """Alternatives 0, 1, 2, … with these log-probabilities, in the order of the ids."""
    return Alternatives(np.arange(len(log_probs)), np.array(log_probs, dtype=float), target, 0)


# ---------------------------------------------------------------------------------------------- rank correlations


def test_spearman_and_partial_by_hand() -> None:
    """Ranks of x 1 2 3 4 5, of y 2 1 3 5 4, of z 1 3 2 5 4: r_xy = 0.8, r_xz = 0.8, r_yz = 0.7."""
    x, y, z = np.array([-5.0, -4, -3, -2, -1]), np.array([7.0, 0, 8, 90, 11]), np.array([1.0, 30, 20, 500, 40])
    assert partial_correlations(x, y[None])[0] == pytest.approx(0.8)
    want = (0.8 - 0.8 * 0.7) / np.sqrt((1 - 0.8**2) * (1 - 0.7**2))
    assert partial_correlations(x, y[None], [z])[0] == pytest.approx(want)
    # R² of x on y and z from the same three correlations; adjusted for 2 regressors and 5 values.
    r2 = (0.8**2 + 0.8**2 - 2 * 0.8 * 0.8 * 0.7) / (1 - 0.7**2)
    assert adjusted_share(x, [y, z]) == pytest.approx(1 - (1 - r2) * 4 / 2)


def test_many_rows_with_ties_equal_scipy_one_by_one() -> None:
    rng = np.random.default_rng(1)
    x, z = rng.normal(size=20), rng.integers(0, 9, size=20).astype(float)
    rows = rng.integers(0, 4, size=(50, 20)).astype(float)
    plain, given = partial_correlations(x, rows), partial_correlations(x, rows, [z])
    r_xz = spearmanr(x, z).statistic
    for row, a, b in zip(rows, plain, given, strict=True):
        r_xy, r_yz = spearmanr(x, row).statistic, spearmanr(row, z).statistic
        assert a == pytest.approx(r_xy)
        assert b == pytest.approx((r_xy - r_xz * r_yz) / np.sqrt((1 - r_xz**2) * (1 - r_yz**2)))
    assert np.abs(given - plain).max() > 0.01


def test_what_is_not_defined_is_nan() -> None:
    x = np.array([3.0, 1, 2, 4])
    rows = np.array([[5.0, 5, 5, 5], [30, 10, 20, 40], [1, 2, 3, 4]])
    found = partial_correlations(x, rows, [np.array([1.0, 2, 3, 4])])
    assert np.isnan(found[[0, 2]]).all() and found[1] == pytest.approx(1)
    assert np.isnan(partial_correlations(x[:3], rows[:, :3], [x[:3]])).all()
    assert np.isnan(partial_correlations(x[:2], rows[:, :2])).all()
    # A constant control frees of nothing.
    np.testing.assert_allclose(partial_correlations(x, rows[1:], [np.ones(4)]), partial_correlations(x, rows[1:]))


def test_adjusted_share_of_noise_centres_on_zero() -> None:
    rng = np.random.default_rng(2)
    found = [adjusted_share(rng.normal(size=20), list(rng.normal(size=(4, 20)))) for _ in range(600)]
    assert abs(np.mean(found)) < 3 * np.std(found) / np.sqrt(600) and np.std(found) > 0.1


# -------------------------------------------------------------------------------------------------- one token

# Words 0–5 are alternatives; 6 and 7 open a sentence, 8 and 9 are subjects, 10 is everywhere.
DOCUMENTS = [
    [8, 10, 6, 0, 6, 0, 6, 0, 6, 1, 6, 1, 6, 2],
    [8, 10, 7, 5, 7, 5, 7, 4, 7, 3, 0, 1, 2],
    [9, 10, 5, 4, 3, 3],
    [9, 10, 5, 4],
    [9, 10, 5],
    [8, 10, 0],
    [10, 2, 3],
]
CONTEXT = (9, 10, 8, 10, 6)  # question 9 10, chain 8 10 6
SALIENCY = np.array([0.5, 0.1, 0.4, -0.2, 0.9])


def _target(log_probs: Sequence[float] = (-1, -2, -3, -4, -5, -6), **changes: Any) -> Target:
    named: dict[str, Any] = {"group": "a", "context": CONTEXT, "alternatives": _alternatives(log_probs)}
    named |= {"question": Span(0, 2), "chain": Span(2, 5), "saliency": SALIENCY}
    return Target(**(named | changes))


def _observe(target: Target, index: Any = None, **settings: Any) -> dict[Any, SourceScore]:
    return _seen(target, index, **settings).scores


def _seen(target: Target, index: Any = None, **settings: Any) -> Observed:
    return observe(CountBook(index or BruteForce(DOCUMENTS, 11), Settings(**settings)), [target])[0]


def test_the_window_is_the_longest_end_that_the_target_follows_often_enough() -> None:
    assert _observe(_target())["local"].tokens == (8, 10, 6)
    assert _observe(_target(), max_suffix=2)["local"].tokens == (10, 6)
    assert _observe(_target(), min_count=2)["local"].tokens == (6,)
    assert _observe(_target(alternatives=_alternatives([-1, -2, -3], target=2)))["local"].tokens == (6,)


def test_local_counts_and_correlation_by_hand() -> None:
    found = _observe(_target(), max_suffix=1)["local"]
    assert found.tokens == (6,) and found.counts is not None
    assert found.counts.tolist() == [3, 2, 1, 0, 0, 0]
    # Ranks 6 5 4 2 2 2 against 6 5 4 3 2 1.
    assert found.score == pytest.approx(spearmanr([3, 2, 1, 0, 0, 0], [6, 5, 4, 3, 2, 1]).statistic)
    unigrams = [sum(d.count(a) for d in DOCUMENTS) for a in range(6)]
    ranks = [rankdata(v) for v in ([6, 5, 4, 3, 2, 1], [3, 2, 1, 0, 0, 0], unigrams)]
    r = np.corrcoef(ranks)
    assert found.partial == pytest.approx(
        (r[0, 1] - r[0, 2] * r[1, 2]) / np.sqrt((1 - r[0, 2] ** 2) * (1 - r[1, 2] ** 2))
    )


def test_mid_and_long_counts_by_hand() -> None:
    found = _observe(_target(), max_suffix=1)
    assert found["mid"].tokens == (8,) and found["long"].tokens == (9, 10)  # 10 speaks against the target in the chain
    assert found["mid"].counts is not None and found["long"].counts is not None
    assert found["mid"].counts.tolist() == [3, 2, 2, 1, 1, 1]
    assert found["long"].counts.tolist() == [3 / 2, 2 / 2, 3 / 2, (1 + 3) / 2, (2 + 3) / 2, (3 + 4) / 2]
    first = _observe(_target(), max_suffix=1, n_salient=1)["long"]
    assert first.tokens == (9,) and first.counts is not None and first.counts.tolist() == [0, 0, 0, 1, 2, 3]
    assert first.score == pytest.approx(spearmanr([6, 5, 4, 3, 2, 1], [0, 0, 0, 1, 2, 3]).statistic)
    assert first.score < -0.8


def test_tokens_of_the_window_the_target_and_stop_words_are_not_salient() -> None:
    long_window = _observe(_target())
    assert long_window["local"].tokens == (8, 10, 6)
    assert long_window["mid"].reason == NO_SALIENT and long_window["mid"].score is None
    assert _observe(_target(), max_suffix=1, stop=frozenset({9}))["long"].tokens == (10,)
    copied = _target(context=(0, 9, 8, 10, 6))  # the question holds the target
    assert _observe(copied, max_suffix=1)["long"].tokens == (9,)


def test_a_count_with_itself_is_neutral() -> None:
    target = _target(context=(5, 9, 8, 10, 6))
    found = _observe(target, max_suffix=1, n_salient=1)["long"]
    assert found.tokens == (5,) and found.counts is not None
    assert found.counts.tolist() == [1, 1, 1, 2, 3, (1 + 1 + 1 + 2 + 3) / 5]  # not the 4 documents that hold 5


class Broken(BruteForce):
    """Fails where it is told to."""

    def __init__(self, *methods: str) -> None:
        super().__init__(DOCUMENTS, 11)
        for method in methods:
            setattr(self, method, self._fail)

    def _fail(self, *_args: Any, **_kwargs: Any) -> Any:
        raise UserError("The server did not answer.")


def test_undefined_is_none_with_its_reason() -> None:
    def reasons(target: Target, index: Any = None, **settings: Any) -> dict[Any, str]:
        found = _observe(target, index, **{"max_suffix": 1, **settings})
        for x in found.values():
            assert (x.partial is None) == bool(x.reason)
            assert all(v is None or np.isfinite(v) for v in (x.score, x.partial))
        return {s: x.reason for s, x in found.items()}

    assert reasons(_target()) == dict.fromkeys(SOURCES, "")
    assert reasons(_target([-1, -2])) == dict.fromkeys(SOURCES, FEW)
    assert reasons(_target([-2] * 6)) == dict.fromkeys(SOURCES, EQUAL_PROBABILITIES)
    # Three alternatives have a correlation, but none given a third variable.
    three = _observe(_target([-1, -2, -3]), max_suffix=1)["local"]
    assert three.score == pytest.approx(1) and three.partial is None and three.reason == FEW
    assert reasons(_target(context=(9, 10, 8, 10, 9)))["local"] == NO_SUFFIX
    assert reasons(_target(saliency=np.full(5, np.nan)))["long"] == NO_SALIENT
    assert (
        reasons(_target([-1, -2, -3], alternatives=Alternatives(np.array([3, 4, 5]), -np.arange(1.0, 4), 5, 2)))["mid"]
        == EQUAL_COUNTS
    )
    assert reasons(_target(np.log(_seen(_target()).unigrams)))["local"] == ONLY_UNIGRAMS
    one = reasons(_target(), Broken("cooccurrence"))
    assert one["local"] == "" and one["mid"] == one["long"] == f"{NOT_COUNTED}The server did not answer."
    assert set(reasons(_target(), Broken("longest_suffix")).values()) == {f"{NOT_COUNTED}The server did not answer."}


def test_counts_that_are_not_exact_say_so() -> None:
    class Sampled(BruteForce):
        def cooccurrence(self, a: Any, b: Any, **more: Any) -> Count:
            return replace(super().cooccurrence(a, b, **more), exact=False, note="clause sampled")

    found = _observe(_target(), Sampled(DOCUMENTS, 11), max_suffix=1)
    assert (found["local"].note, found["mid"].note, found["long"].note) == ("", "clause sampled", "clause sampled")


def test_nothing_is_asked_twice() -> None:
    index = Tables(DOCUMENTS, 11)
    observe(CountBook(index, Settings(max_suffix=1)), [_target()] * 3)
    assert len(index.asked) > 10
    assert set(index.asked.values()) == {1, 6}  # pairs and suffixes one by one; six continuations in one call
    assert index.asked["continuations", (6,)] == 6


@pytest.mark.parametrize("settings", [Settings(), Settings(unit="pairs", window=3), Settings(unit="anchors", window=2)])
def test_cooccurrences_are_the_index_s_in_the_order_asked(settings: Settings) -> None:
    judge = BruteForce(DOCUMENTS, 11)
    book, ids = CountBook(judge, settings), list(range(11))
    rows = book.cooccurrences(ids, ids)
    want = [[judge.cooccurrence([a], [b], window=settings.window, unit=settings.unit) for b in ids] for a in ids]
    assert rows == want and len({c.value for row in want for c in row}) > 3


def test_saliency_is_of_the_whole_context() -> None:
    with pytest.raises(UserError, match="4 values for a context of 5"):
        _target(saliency=SALIENCY[:4])


# ------------------------------------------------------------------------------------------------------ verdicts


def _score(partial: float | None, q: float | None, score: float | None = None) -> SourceScore:
    return SourceScore("local", partial=partial, q=q, p=q, score=partial if score is None else score)


def test_dominant_source_ties_and_none() -> None:
    a, b, weak, none = _score(0.5, 0.01), _score(0.5, 0.05), _score(0.9, 0.051), _score(None, None)
    settings = Settings(level=0.05)
    assert dominant({"local": a, "mid": b, "long": weak}, settings) == ("local", "mid")
    assert dominant({"local": a, "mid": _score(0.6, 0.05), "long": none}, settings) == ("mid",)
    assert dominant({"local": weak, "mid": none, "long": none}, settings) == ()
    assert dominant({"local": weak, "mid": a, "long": none}, Settings(level=0.051)) == ("local",)
    uncorrected = replace(weak, p=0.04)
    assert dominant({"local": uncorrected, "mid": a}, settings) == ("mid",)
    assert dominant({"local": uncorrected, "mid": a}, Settings(correct=False)) == ("local",)


def test_stim_takes_the_largest_score_whatever_it_is() -> None:
    low, high = _score(-0.3, None), _score(0.02, 1.0)
    assert stim({"local": low, "mid": high, "long": _score(None, None)}) == "mid"
    assert stim({"local": low, "mid": low, "long": low}) == "local"
    assert stim({"local": _score(None, None)}) is None


def test_sources_that_overlap_are_not_counted_twice() -> None:
    """The chain's salient token is the question's: each alone explains nothing that the other does not."""
    both = _target(context=(9, 10, 9, 10, 6), saliency=np.array([1.0, 0, 1, 0, 0]))
    settings = Settings(max_suffix=1, n_salient=1)
    found = trace_sources(BruteForce(DOCUMENTS, 11), [both], settings=settings)[0]
    assert found.scores["mid"].tokens == found.scores["long"].tokens == (9,)
    joint = found.joint
    assert joint.beyond is not None and joint.unique is not None and joint.partial is not None
    assert joint.partial["mid"] is None and joint.partial["long"] is None and joint.partial["local"] is not None
    assert joint.unique["mid"] == pytest.approx(0, abs=1e-9) and joint.unique["long"] == pytest.approx(0, abs=1e-9)
    assert joint.shared == pytest.approx(joint.beyond - joint.unique["local"]) and abs(joint.shared) > 0.01


def test_the_joint_share_is_a_regression_of_ranks() -> None:
    target = _target([-1, -3, -2, -6, -4, -5])
    observed = _seen(target, max_suffix=1, n_salient=1)
    joint = trace_sources(BruteForce(DOCUMENTS, 11), [target], settings=Settings(max_suffix=1, n_salient=1))[0].joint
    y = rankdata(target.alternatives.log_probs)

    def adjusted(*columns: Any) -> float:
        x = np.column_stack([np.ones(6), *map(rankdata, columns)])
        rest = y - x @ np.linalg.lstsq(x, y, rcond=None)[0]
        return 1 - (rest @ rest) / (6 - x.shape[1]) / (np.var(y, ddof=1))

    counts = [observed.scores[s].counts for s in SOURCES]
    whole, alone = adjusted(observed.unigrams, *counts), adjusted(observed.unigrams)
    assert joint.unigram == pytest.approx(alone) and joint.beyond == pytest.approx(whole - alone)
    assert joint.unique is not None
    for i, source in enumerate(SOURCES):
        without = adjusted(observed.unigrams, *(c for k, c in enumerate(counts) if k != i))
        assert joint.unique[source] == pytest.approx(whole - without)
    nothing = _target(context=(9, 10, 8, 10, 9), saliency=np.zeros(5))
    assert trace_sources(BruteForce(DOCUMENTS, 11), [nothing])[0].joint.reason == NO_SOURCE
    few = trace_sources(BruteForce(DOCUMENTS, 11), [_target([-1, -2, -3])], settings=Settings(max_suffix=1))[0]
    assert few.joint.reason == TOO_MANY and few.joint.beyond is None


def test_p_values_are_corrected_by_source_and_rows_are_flat() -> None:
    index, targets, _, settings = planted(0, n=60, n_docs=800)
    found = trace_sources(index, targets, settings=settings)
    for source in SOURCES:
        p = [x.scores[source].p for x in found]
        q = [x.scores[source].q for x in found]
        tested = [v for v in p if v is not None]
        assert len(tested) > 20 and len(set(tested)) > 5
        assert [v for v in q if v is not None] == pytest.approx(corrected(tested).tolist())
        assert all((a is None) == (b is None) for a, b in zip(p, q, strict=True))
    row = found[0].to_row()
    assert row["local_p"] == found[0].scores["local"].p and row["stim"] == found[0].stim
    assert not any(isinstance(v, float) and np.isnan(v) for r in (x.to_row() for x in found) for v in r.values())
    lonely = trace_sources(index, targets[:3], pool=targets[:1], settings=settings)
    assert [x.scores["mid"].n_null for x in lonely] == [0, 1, 1] and lonely[0].scores["mid"].reason == NO_NULL
    again = trace_sources(index, targets, settings=settings)
    assert [x.to_row() for x in again] == [x.to_row() for x in found]


@pytest.mark.parametrize("bad", ["n_salient", "n_null", "max_suffix", "min_count"])
def test_settings_out_of_range(bad: str) -> None:
    with pytest.raises(UserError, match=f"{bad}: 0"):
        Settings(**{bad: 0})  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------ the null


def test_p_by_hand_groups_ties_and_passed_over_contexts() -> None:
    """Of the other contexts one ties, one is below, one is undefined, and one is of the same group."""
    ends = {"own": ("a", 6), "same group": ("a", 6), "tie": ("b", 6), "below": ("c", 3), "undefined": ("d", 9)}
    targets = [_target(group=g, context=(9, 10, 8, 10, e)) for g, e in ends.values()]
    book = CountBook(BruteForce(DOCUMENTS, 11), Settings(max_suffix=1))
    observed = dict(zip(ends, observe(book, targets), strict=True))
    found = Null(book, list(observed.values())).test(observed["own"], "local")
    assert (found.n_null, found.n_same, found.p) == (2, 1, pytest.approx(2 / 3))
    alone = Null(book, [observed["same group"], observed["undefined"]]).test(observed["own"], "local")
    assert alone.p is None and alone.reason == NO_NULL and alone.partial is not None


def test_the_suffix_is_chosen_anew_with_the_same_target() -> None:
    index = Tables(DOCUMENTS, 11)
    book = CountBook(index)
    other = _target(group="b", context=(8, 10, 9, 10, 7), alternatives=_alternatives([-1, -2], 1))
    own, seen = observe(book, [_target(), other])
    Null(book, [seen]).test(own, "local")
    assert index.asked["suffix", (8, 10, 9, 10, 7), 0] == 1


def test_a_context_that_is_not_counted_counts_against_the_source() -> None:
    class Moody(Tables):
        broken = False

        def longest_suffix(self, context: Any, **more: Any) -> SuffixMatch:
            if self.broken:
                raise UserError("The server did not answer.")
            return super().longest_suffix(context, **more)

        def cooccurrence(self, a: Any, b: Any, **more: Any) -> Count:
            if self.broken:
                raise UserError("The server did not answer.")
            return super().cooccurrence(a, b, **more)

    index = Moody(DOCUMENTS, 11)
    book = CountBook(index, Settings(max_suffix=1))
    # Salient tokens and contexts of which nothing is remembered yet.
    strange = {"context": (7, 3, 7, 3, 3), "saliency": np.array([1.0, 0, 1, 0, 0])}
    pool = [_target(group=g, alternatives=_alternatives([-1, -2, -3], 1), **strange) for g in "bcd"]
    own, *seen = observe(book, [_target(), *pool])
    index.broken = True
    for source in SOURCES:
        found = Null(book, seen).test(own, source)
        assert found.p == 1.0 and found.n_null == 3
    unseen = observe(book, [_target(group="e", context=(3, 3, 3, 3, 3))])  # its own window is not known
    assert unseen[0].scores["mid"].reason.startswith(NOT_COUNTED)
    assert Null(book, unseen).test(own, "mid").p == 1.0


# --------------------------------------------------------------------------------------- simulations: the null


def chance(seed: int, *, n: int, V: int, spread: float, frequency: float) -> tuple[Tables, list[Target], Settings]:
    """Text of a Markov chain, and a mind whose preferences know unigram frequency at most; it writes its favourite.

    Args:
        n: targets, each in a trace of its own.
        V: words, with Zipf's frequencies.
        spread: how many different words follow a word (the chain's Dirichlet concentration).
        frequency: weight of log unigram frequency in the preferences.
    """
    rng = np.random.default_rng(seed)
    zipf = 1 / np.arange(1, V + 1)
    zipf /= zipf.sum()
    cumulative = np.stack([rng.dirichlet(spread * V * zipf + 1e-3) for _ in range(V)]).cumsum(1)

    def text(rows: int, length: int) -> list[list[int]]:
        words = [rng.choice(V, p=zipf, size=rows)]
        for _ in range(length - 1):
            words.append((cumulative[words[-1]] > rng.random(rows)[:, None]).argmax(1))
        return np.stack(words, 1).tolist()

    index = Tables(text(400, 60), V)
    targets = []
    for i, context in enumerate(text(n, 20)):
        log_probs = frequency * np.log(zipf) + rng.normal(size=V)
        log_probs -= np.logaddexp.reduce(log_probs)
        alternatives = pick(log_probs, int(log_probs.argmax()))
        targets.append(Target(i, tuple(context), alternatives, Span(0, 8), Span(8, 20), rng.random(20)))
    return index, targets, Settings(max_suffix=3, n_null=99, seed=seed)


def _at_most(hits: int, n: int, level: float = 0.05) -> bool:
    """Whether so many are no surprise at this level (one in a thousand runs would be)."""
    return bool(binom.sf(hits - 1, n, level) > 1e-3)


@pytest.mark.parametrize(("V", "spread", "frequency"), [(300, 0.05, 1.0), (60, 0.3, 0.0)])
def test_five_percent_means_five_percent(V: int, spread: float, frequency: float) -> None:
    index, targets, settings = chance(0, n=200, V=V, spread=spread, frequency=frequency)
    found = trace_sources(index, targets, settings=settings)
    for source in SOURCES:
        p = np.array([x.scores[source].p for x in found if x.scores[source].p is not None])
        assert len(p) > 60
        for level in (0.01, 0.05, 0.2, 0.5):
            assert _at_most(int((p <= level).sum()), len(p), level), (source, level, (p <= level).mean())
        # It is no blunt test either: half of them lie near one half.
        assert (p <= 0.5).mean() > 0.35
    assert sum(bool(x.dominant) for x in found) <= 3
    assert sum(x.stim is not None for x in found) > 190  # STIM's rule names a source for every one of them


def test_simpler_nulls_find_sources_where_there_are_none() -> None:
    """Without the choice redone, and with Spearman's own p-value, a mind that knows no counts is caught memorising."""
    redone, kept, raw = [], [], []
    for seed in range(3):
        index, targets, settings = chance(seed, n=250, V=60, spread=0.3, frequency=0.0)
        book = CountBook(index, settings)
        observed = observe(book, [replace(t, saliency=np.zeros(20)) for t in targets])  # only the local source
        null = Null(book, observed)
        for o in observed:
            score = null.test(o, "local")
            if score.p is None or score.counts is None:
                continue
            redone.append(score.p)
            kept.append(_without_redoing(index, observed[:60], o, score))
            raw.append(spearmanr(o.target.alternatives.log_probs, score.counts, alternative="greater").pvalue)
    hits = [int((np.array(p) <= 0.05).sum()) for p in (redone, kept, raw)]
    assert len(redone) > 200
    assert [_at_most(k, len(redone)) for k in hits] == [True, False, False], (hits, len(redone))


def _without_redoing(index: Tables, pool: Sequence[Any], own: Any, score: SourceScore) -> float:
    """p against other contexts whose longest suffix is chosen without a thought of the target."""
    ids = own.target.alternatives.ids.tolist()
    rows = []
    for context in (o.target.context[-3:] for o in pool if o is not own):
        suffix = context[len(context) - index.longest_suffix(context).length :]
        rows.append([c.value for c in index.continuation_counts(suffix, ids)])
    found = partial_correlations(own.target.alternatives.log_probs, np.array(rows, dtype=float), [own.unigrams])
    found = found[~np.isnan(found)]
    return (1 + int((found >= score.partial - 1e-9).sum())) / (1 + len(found))


# ------------------------------------------------------------------------------------- simulations: planted truth


def planted(seed: int, *, n: int = 240, n_docs: int = 2500) -> tuple[Tables, list[Target], list[str], Settings]:
    """Tokens whose probabilities are what follows their opener (local), what goes with the topic of the chain (mid) or
    of the question (long), or unigram frequency and noise (none), by turns; with the truth.

    A document has a topic, which is three marks and words of its own; openers are followed by words of their own.  There
    are 150 of each: a p-value cannot be smaller than a context's share of the contexts.
    """
    n_words, n_kinds, length = 60, 150, 16
    rng = np.random.default_rng(seed)
    zipf = 1 / np.arange(1, n_words + 1)
    zipf /= zipf.sum()
    follows, topics = (np.stack([rng.dirichlet(6 * zipf + 0.1) for _ in range(n_kinds)]) for _ in range(2))

    def draw(distributions: np.ndarray, rows: np.ndarray) -> np.ndarray:
        inside = distributions.cumsum(1)[rows] > rng.random(rows.shape)[..., None]
        return np.where(inside.any(-1), inside.argmax(-1), n_words - 1)

    def marks(topic: int) -> list[int]:
        return [n_words + n_kinds + 3 * topic + j for j in range(3)]

    topic_of, openers = rng.integers(n_kinds, size=n_docs), rng.integers(n_kinds, size=(n_docs, length))
    words = draw(topics, np.repeat(topic_of[:, None], length, axis=1))
    triples = np.stack([words, n_words + openers, draw(follows, openers)], axis=-1).reshape(n_docs, -1)
    documents = [marks(int(t)) + row for t, row in zip(topic_of, triples.tolist(), strict=True)]
    size = n_words + 4 * n_kinds
    targets, truth = [], []
    for i in range(n):
        kind = (*SOURCES, "none")[i % 4]
        question, chain, opener = (int(x) for x in rng.integers(n_kinds, size=3))
        true = {"local": follows[opener], "mid": topics[chain], "long": topics[question], "none": zipf}[kind]
        log_probs = np.full(size, NOWHERE)
        log_probs[:n_words] = np.log(true + 1e-4) + (1.0 if kind == "none" else 0.1) * rng.normal(size=n_words)
        log_probs -= np.logaddexp.reduce(log_probs)
        token = int(rng.choice(n_words, p=np.exp(log_probs[:n_words]) / np.exp(log_probs[:n_words]).sum()))
        filler = rng.choice(n_words, p=zipf, size=4).tolist()
        context = (*marks(question), *filler[:2], *marks(chain), *filler[2:], n_words + opener)
        saliency = np.array([1.0] * 3 + [0.1] * 2 + [1.0] * 3 + [0.1] * 3)
        targets.append(Target(i, context, pick(log_probs, token), Span(0, 5), Span(5, 11), saliency))
        truth.append(kind)
    settings = Settings(n_salient=3, correct=False, max_suffix=1, n_null=99, seed=seed)
    return Tables(documents, size, longest=2), targets, truth, settings


def test_planted_sources_are_found_and_none_where_there_is_none() -> None:
    index, targets, truth, settings = planted(0)
    found = trace_sources(index, targets, settings=settings)
    by_kind: dict[str, list[TokenSources]] = defaultdict(list)
    for kind, x in zip(truth, found, strict=True):
        by_kind[kind].append(x)
    for source in SOURCES:
        mine = by_kind[source]
        assert np.mean([x.dominant == (source,) for x in mine]) > 0.9
        assert sum(source in x.dominant for x in mine) / sum(source in x.dominant for x in found) > 0.9
        # Beyond unigram frequency they explain most of the ranking, and the true source does it alone.
        assert np.mean([x.joint.beyond for x in mine]) > 0.3
        for other in SOURCES:
            unique = np.mean([x.joint.unique[other] for x in mine if other in (x.joint.unique or {})])  # type: ignore[index]
            assert (unique > 0.2) if other == source else (abs(unique) < 0.05)
        # The sources that a token does not have are found at the stated rate.
        p = [x.scores[source].p for kind in by_kind for x in by_kind[kind] if kind != source]
        tested = np.array([v for v in p if v is not None])
        assert len(tested) > 60 and _at_most(int((tested <= 0.05).sum()), len(tested))
    assert np.mean([x.dominant == () for x in by_kind["none"]]) > 0.75
    assert all(x.stim is not None for x in by_kind["none"])
