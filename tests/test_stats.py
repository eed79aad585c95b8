"""Intervals: against worked examples, the law of coverage, and scipy as an independent oracle."""

from __future__ import annotations

import hashlib
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats as scipy_stats

from reasoninterp import stats
from reasoninterp.stats import (
    derive_seed,
    difference,
    estimate,
    matrix_intervals,
    mean,
    paired,
    paired_shares,
    proportion,
    ratio,
    statistic,
)

ROOT = Path(__file__).resolve().parents[1]


# ---------------------------------------------------------------------------------------------- shares


def test_wilson_worked_by_hand() -> None:
    # 8 of 10: z = 1.959964, z² = 3.841459; centre (0.8 + 0.19207) / 1.38415 = 0.71674,
    # half width 1.959964 · sqrt(0.8·0.2/10 + 3.841459/400) / 1.38415 = 1.959964 · 0.160013 / 1.38415 = 0.22658.
    found = proportion([1] * 8 + [0] * 2)
    assert found.value == pytest.approx(0.8)
    assert found.ci_low == pytest.approx(0.71674 - 0.22658, abs=2e-5)
    assert found.ci_high == pytest.approx(0.71674 + 0.22658, abs=2e-5)
    assert (found.n, found.method) == (10, "wilson")


def test_wilson_of_none_and_of_all() -> None:
    # With no hits the interval is [0, z² / (n + z²)]; all hits mirror it.
    edge = 3.841459 / 13.841459
    assert proportion([0] * 10)[:3] == pytest.approx((0, 0, edge), abs=1e-6)
    assert proportion([True] * 10)[:3] == pytest.approx((1, 1 - edge, 1), abs=1e-6)


def test_missing_values_are_left_out_of_a_share_and_n_says_so() -> None:
    hits = np.array([1, np.nan, 0, 1, None], dtype=object)
    assert proportion(hits) == proportion([1, 0, 1])
    assert proportion(hits).n == 3
    nothing = proportion([np.nan])
    assert nothing.n == 0
    assert all(math.isnan(x) for x in nothing[:3])


@pytest.mark.parametrize("bad", [[0.5, 1], [2, 0], [-1, 1]])
def test_a_share_of_other_than_hits_is_refused(bad: list[float]) -> None:
    with pytest.raises(ValueError, match="0 or 1"):
        proportion(bad)


# ---------------------------------------------------------------------------------------------- means


def test_the_bootstrap_covers_as_often_as_it_says() -> None:
    rng = np.random.default_rng(7)
    repetitions, hits = 300, 0
    for i in range(repetitions):
        found = mean(rng.normal(1.0, 2.0, size=40), seed=i)
        hits += found.ci_low <= 1.0 <= found.ci_high
        assert found.ci_low < found.value < found.ci_high
    assert 0.90 <= hits / repetitions <= 0.98


def test_the_bootstrap_has_the_width_of_theory() -> None:
    x = np.random.default_rng(0).normal(size=400)
    found = mean(x)
    assert found.value == pytest.approx(x.mean())
    assert found.ci_high - found.ci_low == pytest.approx(2 * 1.96 * x.std() / 20, rel=0.08)


def test_the_same_seed_gives_the_same_interval_and_another_another() -> None:
    x = np.random.default_rng(1).exponential(size=25)
    assert mean(x, seed=3) == mean(x, seed=3)
    assert mean(x, seed=3) != mean(x, seed=4)


@pytest.mark.parametrize("x", [[2.5, 2.5, 2.5], [0.0, 0.0]])
def test_a_constant_sample_has_no_spread(x: list[float]) -> None:
    assert mean(x)[:4] == (x[0], x[0], x[0], len(x))


def test_one_trace_has_a_value_and_no_interval_and_none_has_neither() -> None:
    one = mean([3.0, np.nan])
    assert (one.value, one.n) == (3.0, 1)
    assert math.isnan(one.ci_low)
    assert math.isnan(one.ci_high)
    none = mean([])
    assert none.n == 0
    assert all(math.isnan(x) for x in none[:3])


def test_missing_values_are_left_out_of_a_mean() -> None:
    x = np.array([1.0, 4.0, 2.0, 8.0])
    assert mean([1.0, np.nan, 4.0, 2.0, np.nan, 8.0]) == mean(x)
    assert mean(x).n == 4


# ---------------------------------------------------------------------------------------------- pairs


def _width(e: stats.Estimate) -> float:
    return e.ci_high - e.ci_low


def test_pairing_narrows_the_difference_of_correlated_minds() -> None:
    rng = np.random.default_rng(2)
    trace = rng.normal(0, 5, size=60)  # most of the spread is the traces'
    base, tuned = trace + rng.normal(0, 0.5, 60), trace - 1 + rng.normal(0, 0.5, 60)
    paired, unpaired = difference(base, tuned), difference(base, rng.permutation(tuned))
    assert paired.value == pytest.approx(unpaired.value)
    assert _width(paired) < 0.25 * _width(unpaired)
    assert paired.ci_low > 0.5
    assert unpaired.ci_low < 0 < unpaired.ci_high


def test_a_pair_with_one_side_missing_is_left_out() -> None:
    a, b = [5.0, np.nan, 1.0, 2.0], [1.0, 2.0, np.nan, 1.0]
    assert difference(a, b)[::3] == (2.5, 2)  # of (5, 1) and (2, 1)
    assert ratio(a, b)[::3] == (3.5, 2)


@pytest.mark.parametrize("compute", [difference, ratio])
def test_what_is_not_paired_is_refused(compute: object) -> None:
    with pytest.raises(ValueError, match="pairs"):
        compute([1.0, 2.0, 3.0], [1.0])  # type: ignore[operator]


def test_a_ratio_is_of_means_and_read_on_the_same_traces() -> None:
    found = ratio([1.0, 9.0], [1.0, 3.0])
    assert found.value == pytest.approx(10 / 4)  # the mean of the ratios would be 2
    b = np.random.default_rng(3).uniform(1, 100, size=30)
    proportional = ratio(0.4 * b, b)
    assert proportional[:3] == pytest.approx((0.4, 0.4, 0.4))  # wildly spread, but together


def test_any_statistic_has_scipys_interval() -> None:
    x = np.random.default_rng(4).lognormal(size=50)
    found = statistic([x], np.median, seed=1)
    oracle = scipy_stats.bootstrap((x,), np.median, n_resamples=20_000, method="percentile", rng=0).confidence_interval
    assert found.value == np.median(x)
    assert found.ci_low == pytest.approx(oracle.low, abs=0.1)
    assert found.ci_high == pytest.approx(oracle.high, abs=0.1)
    assert found.ci_high - found.ci_low > 0.3


# ---------------------------------------------------------------------------------------------- tables


def test_rows_of_one_trace_count_once() -> None:
    # Trace a says 1 a hundred times, trace b says 0 once: the mean over traces is a half, of two.
    rows = pd.DataFrame({"trace": ["a"] * 100 + ["b"], "mind": "base", "v": [2.0] * 100 + [0.0]})
    found = estimate(rows, by=["mind"], value="v", kind="mean").iloc[0]
    assert (found["value"], found["n"]) == (1.0, 2)


def test_repeating_every_row_changes_nothing() -> None:
    x = np.random.default_rng(5).normal(size=20)
    once = pd.DataFrame({"trace": range(20), "v": x})
    many = pd.concat([once] * 7, ignore_index=True)
    pd.testing.assert_frame_equal(estimate(once, by=[], value="v"), estimate(many, by=[], value="v"))


def test_groups_keep_their_order_and_match_their_own_estimate() -> None:
    rng = np.random.default_rng(6)
    rows = pd.DataFrame({"mind": ["tuned", "base"] * 15, "trace": np.repeat(range(15), 2), "v": rng.normal(size=30)})
    table = estimate(rows, by=["mind"], value="v", seed=5)
    assert list(table["mind"]) == ["tuned", "base"]
    assert list(table.columns) == ["mind", "value", "ci_low", "ci_high", "n", "method"]
    for name, part in rows.groupby("mind"):
        row = table[table["mind"] == name].iloc[0]
        assert tuple(row.iloc[1:]) == pytest.approx((*mean(part["v"], seed=5)[:4], "bootstrap"))


def test_kinds() -> None:
    hits = pd.DataFrame({"trace": range(4), "v": [True, False, None, True]})
    assert estimate(hits, by=[], value="v")["method"].item() == "wilson"
    assert estimate(hits, by=[], value="v")["n"].item() == 3
    assert estimate(hits, by=[], value="v", kind="mean")["method"].item() == "bootstrap"
    numbers = hits.assign(v=[1.0, 0.0, 0.5, 1.0])
    assert estimate(numbers, by=[], value="v")["method"].item() == "bootstrap"
    with pytest.raises(ValueError, match="shares"):
        estimate(hits, by=[], value="v", kind="shares")
    with pytest.raises(ValueError, match="between 0 and 1"):
        estimate(numbers.assign(v=[3, 0, 1, 1]), by=[], value="v", kind="share")


def test_a_share_whose_traces_average_to_fractions_keeps_its_value() -> None:
    # Three answers a trace: 2/3, 1/3 and 3/3 right. Counting whole hits would say 1 of 3.
    rows = pd.DataFrame({"trace": np.repeat(["a", "b", "c"], 3), "v": [1, 1, 0, 1, 0, 0, 1, 1, 1]})
    found = estimate(rows, by=[], value="v", kind="share").iloc[0]
    assert found["value"] == pytest.approx(2 / 3)
    assert found["n"] == 3
    assert found["ci_low"] < found["value"] < found["ci_high"]


def test_a_group_a_trace_is_one_trace() -> None:
    rows = pd.DataFrame({"trace": ["a", "a", "b"], "v": [1.0, 2.0, 5.0]})
    table = estimate(rows, by=["trace"], value="v")
    assert list(table["value"]) == [1.5, 5.0]
    assert list(table["n"]) == [1, 1]
    assert table["ci_low"].isna().all()


def test_a_group_without_values_says_n_0() -> None:
    rows = pd.DataFrame({"mind": ["base", "tuned"], "trace": "a", "v": [1.0, np.nan]})
    assert list(estimate(rows, by=["mind"], value="v", kind="mean")["n"]) == [1, 0]


def test_estimate_leaves_its_input_alone() -> None:
    rows = pd.DataFrame({"trace": ["a", "b"], "v": ["1", "0"]})
    estimate(rows, by=[], value="v")
    assert list(rows["v"]) == ["1", "0"]


# ---------------------------------------------------------------------------------------------- many means


def test_matrix_intervals_agree_with_scipy() -> None:
    rng = np.random.default_rng(8)
    values = np.stack([rng.normal(3, 1, 30), rng.exponential(2, 30), rng.normal(0, 0.01, 30)], axis=1)
    low, high = matrix_intervals(values, seed=1)
    for k in range(3):
        oracle = scipy_stats.bootstrap((values[:, k],), np.mean, n_resamples=20_000, method="percentile", rng=0)
        # The end of an interval from 2000 resamples wanders by about a twentieth of the interval.
        slack = 0.06 * (oracle.confidence_interval.high - oracle.confidence_interval.low)
        assert slack > 0
        assert low[k] == pytest.approx(oracle.confidence_interval.low, abs=slack)
        assert high[k] == pytest.approx(oracle.confidence_interval.high, abs=slack)


def test_matrix_intervals_resample_the_columns_together() -> None:
    # Linear maps of one column have the mapped interval exactly, which separate draws would not give.
    x = np.random.default_rng(9).normal(size=(25, 1))
    low, high = matrix_intervals(np.hstack([x, 2 * x + 1, -x]))
    assert (low[1], high[1]) == pytest.approx((2 * low[0] + 1, 2 * high[0] + 1))
    assert (low[2], high[2]) == pytest.approx((-high[0], -low[0]))
    assert low[0] < x.mean() < high[0]


def test_matrix_intervals_cover_as_often_as_they_say() -> None:
    values = np.random.default_rng(10).normal(size=(40, 600))
    low, high = matrix_intervals(values)
    assert 0.90 <= np.mean((low <= 0) & (high >= 0)) <= 0.98


@pytest.mark.parametrize("n", [0, 1])
def test_matrix_intervals_of_too_few_traces(n: int) -> None:
    low, high = matrix_intervals(np.ones((n, 3)))
    assert np.isnan(low).all()
    assert np.isnan(high).all()
    assert low.shape == high.shape == (3,)


# ---------------------------------------------------------------------------------------------- seeds


def test_seeds_are_the_first_four_bytes_of_a_hash_of_everything() -> None:
    digest = hashlib.sha256(b"3:effect:base/7").digest()
    assert derive_seed(3, "effect", "base/7") == digest[0] + 256 * (digest[1] + 256 * (digest[2] + 256 * digest[3]))


def test_seeds_are_the_same_in_every_process_and_differ_where_a_label_does() -> None:
    # Python's own hash() of text is salted anew in every process; this must not be.
    code = "from reasoninterp.stats import derive_seed; print(derive_seed(1, 'a', ('b', 2)))"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(out.stdout) == derive_seed(1, "a", ("b", 2))
    seeds = {derive_seed(seed, label) for seed in range(20) for label in "abcde"}
    assert len(seeds) == 100
    assert all(0 <= s < 2**32 for s in seeds)


def test_paired_shares_by_a_worked_example_and_without_variation() -> None:
    """36 both, 12 only the first, 2 only the second, none neither: difference 0.2, interval 0.0569 to 0.3404."""
    first = [1.0] * 36 + [1.0] * 12 + [0.0] * 2
    second = [1.0] * 36 + [0.0] * 12 + [1.0] * 2
    found = paired_shares(first, second)
    assert (found.value, found.ci_low, found.ci_high) == pytest.approx((0.2, 0.0569, 0.3404), abs=1e-4)
    back = paired_shares(second, first)
    assert (back.ci_low, back.ci_high) == pytest.approx((-found.ci_high, -found.ci_low))
    constant = paired_shares([1.0] * 20, [1.0] * 20)
    assert constant.value == 0.0
    assert 0.1 < constant.ci_high < 0.2  # 20 traces without a loss do not exclude one of ten points
    assert paired([0.5, 1.0, 0.0], [0.0, 0.5, 1.0]).method == "bootstrap"
