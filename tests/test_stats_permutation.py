"""Permutation p-values, corrections and effect sizes: by enumeration, by hand, and against other libraries."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats as scipy_stats

from reasoninterp import stats
from reasoninterp.errors import UserError
from reasoninterp.stats import corrected, effect_sizes, estimate, sign_flip_pvalues


def by_enumeration(x: np.ndarray) -> float:
    """The definition, one sign pattern at a time."""
    means = [abs(np.mean(np.array(signs) * x)) for signs in itertools.product((1, -1), repeat=len(x))]
    return float(np.mean(np.array(means) >= abs(x.mean()) * (1 - 1e-12)))


# ---------------------------------------------------------------------------------------------- p-values


def test_sign_flips_worked_by_hand() -> None:
    # Effects 1, 2, 3: sums over the 8 patterns are ±6, ±4, ±2, 0, 0; two are as large as 6.
    # Effects 1, 2, -3: the sum is 0, and every pattern is at least that large.
    found = sign_flip_pvalues(np.array([[1.0, 1.0], [2.0, 2.0], [3.0, -3.0]]))
    assert found.tolist() == [0.25, 1.0]


@pytest.mark.parametrize("n", [1, 2, 5, 8, 12])
def test_exact_for_few_traces_by_enumeration_and_by_transformer_lens(n: int) -> None:
    torch: Any = pytest.importorskip("torch")
    from transformer_lens.utilities.statistics import sign_flip_permutation_pvalue

    x = np.random.default_rng(n).normal(0.4, 1, size=(n, 7))
    x[:, 0] = np.round(x[:, 0])  # ties
    found = sign_flip_pvalues(x)
    assert found == pytest.approx([by_enumeration(x[:, k]) for k in range(7)] if n < 12 else found)
    theirs = sign_flip_permutation_pvalue(torch.from_numpy(x), dim=0).numpy()
    assert found == pytest.approx(theirs, abs=1e-12)
    assert n == 1 or found.min() < 1


def test_drawn_patterns_agree_with_all_of_them_and_share_the_definition() -> None:
    torch: Any = pytest.importorskip("torch")
    from transformer_lens.utilities.statistics import sign_flip_permutation_pvalue

    x = np.random.default_rng(3).normal(0.4, 1, size=(16, 20))
    found = sign_flip_pvalues(x, seed=1)
    whole = sign_flip_permutation_pvalue(torch.from_numpy(x), dim=0, exact_max_n=16).numpy()
    error = np.sqrt(whole * (1 - whole) / stats.N_PERMUTATIONS)
    assert (np.abs(found - whole) < 4.5 * error + 1e-4).all()
    assert not np.array_equal(found, sign_flip_pvalues(x, seed=2))
    assert np.array_equal(found, sign_flip_pvalues(x, seed=1))
    # a huge effect: no drawn pattern reaches it, and p is never 0
    assert sign_flip_pvalues(np.full((40, 1), 5.0))[0] == 1 / (stats.N_PERMUTATIONS + 1)


@pytest.mark.parametrize("n", [11, 20])
def test_uniform_under_the_null(n: int) -> None:
    x = np.random.default_rng(0).standard_t(3, size=(n, 2000))
    p = sign_flip_pvalues(x)
    assert scipy_stats.kstest(p, "uniform").pvalue > 0.01
    assert np.mean(p <= 0.05) == pytest.approx(0.05, abs=0.02)
    assert scipy_stats.kstest(sign_flip_pvalues(x + 0.5), "uniform").pvalue < 1e-10


def test_missing_traces_are_left_out_of_their_column_alone() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(0.5, 1, size=(9, 5))
    holes = x.copy()
    holes[[1, 4], 2] = np.nan
    holes[:, 3] = np.nan
    found = sign_flip_pvalues(holes)
    assert found[[0, 1, 4]] == pytest.approx(sign_flip_pvalues(x)[[0, 1, 4]])
    assert found[2] == pytest.approx(by_enumeration(np.delete(x[:, 2], [1, 4])))
    assert np.isnan(found[3])


def test_no_effect_at_all_is_no_evidence() -> None:
    assert sign_flip_pvalues(np.zeros((6, 1)))[0] == 1.0
    assert sign_flip_pvalues(np.array([[3.0]]))[0] == 1.0  # one trace: its opposite is as likely


# ---------------------------------------------------------------------------------------------- corrections


def test_corrections_worked_by_hand() -> None:
    p = [0.01, 0.04, 0.03, 0.005]
    # Holm: sorted .005·4, .01·3, .03·2, .04·1 = .02, .03, .06, .04, never falling: .02, .03, .06, .06
    assert corrected(p, "holm") == pytest.approx([0.03, 0.06, 0.06, 0.02])
    # Benjamini–Hochberg: sorted p·4/k = .02, .02, .04, .04
    assert corrected(p, "bh") == pytest.approx([0.02, 0.04, 0.04, 0.02])
    assert corrected([0.6, 0.7], "holm") == pytest.approx([1.0, 1.0])


def test_what_was_not_tested_does_not_count() -> None:
    for method in ("bh", "holm"):
        with_gap = corrected([0.01, np.nan, 0.04], method)
        assert with_gap[[0, 2]] == pytest.approx(corrected([0.01, 0.04], method))
        assert np.isnan(with_gap[1])
        assert np.isnan(corrected([np.nan], method)).all()
    with pytest.raises(ValueError, match="not one of bh, holm"):
        corrected([0.1], "bonferroni")


def test_holm_bounds_the_chance_of_any_false_discovery() -> None:
    rng = np.random.default_rng(1)
    p = rng.uniform(size=(2000, 20))
    any_hit = np.mean([corrected(row, "holm").min() <= 0.05 for row in p])
    assert any_hit < 0.07
    assert np.mean(p.min(1) <= 0.05) > 0.5  # uncorrected, the same tests find something most of the time


# ---------------------------------------------------------------------------------------------- effect sizes


def table_of(effects: dict[tuple[str, int], list[float]], repeats: int = 1) -> pd.DataFrame:
    return pd.DataFrame(
        {"mind": mind, "head": head, "trace": f"t{k}", "value": v + (r - (repeats - 1) / 2)}
        for (mind, head), values in effects.items()
        for k, v in enumerate(values)
        for r in range(repeats)
    )


def test_effect_sizes_are_those_of_estimate_scipy_and_the_corrections() -> None:
    rng = np.random.default_rng(0)
    effects = {(m, h): list(rng.normal(0.3 * h, 1, size=10)) for m in ("base", "tuned") for h in range(4)}
    rows = table_of(effects)
    found = effect_sizes(rows, ["mind", "head"], "value", family=["mind"], seed=5)
    plain = estimate(rows, by=["mind", "head"], value="value", kind="mean", seed=5)
    pd.testing.assert_frame_equal(found[plain.columns], plain)
    for row in found.itertuples():
        x = np.array(effects[row.mind, row.head])
        assert row.d == pytest.approx(scipy_stats.ttest_1samp(x, 0).statistic / np.sqrt(len(x)))
        assert row.p == pytest.approx(by_enumeration(x))
    for _, one in found.groupby("mind"):
        assert one["p_corrected"].to_numpy() == pytest.approx(corrected(one["p"], "bh"))
    whole = effect_sizes(rows, ["mind", "head"], "value", seed=5, correction="holm")
    assert whole["p_corrected"].to_numpy() == pytest.approx(corrected(whole["p"], "holm"))
    assert not np.allclose(whole["p_corrected"], found["p_corrected"])


def test_rows_of_one_trace_are_one_observation() -> None:
    effects = {("base", 0): [0.2, 1.1, 0.7, -0.1], ("base", 1): [0.5, 0.4, 0.6, 0.9]}
    once = effect_sizes(table_of(effects), ["mind", "head"], "value")
    often = effect_sizes(table_of(effects, repeats=6), ["mind", "head"], "value")
    pd.testing.assert_frame_equal(once, often)
    nameless = effect_sizes(table_of(effects).drop(columns="trace"), ["mind", "head"], "value")
    pd.testing.assert_frame_equal(once, nameless)


def test_what_cannot_be_known_is_nan() -> None:
    rows = table_of({("base", 0): [0.5], ("base", 1): [0.1, 0.1, 0.1], ("base", 2): [np.nan, np.nan]})
    found = effect_sizes(rows, ["mind", "head"], "value").set_index("head")
    assert found["n"].tolist() == [1, 3, 0]
    assert found["d"].isna().all()
    assert found["p"].tolist()[:2] == [1.0, 0.25]
    assert np.isnan(found.loc[2, "p"]) and np.isnan(found.loc[2, "p_corrected"])


def test_a_family_is_made_of_columns_that_make_groups() -> None:
    with pytest.raises(UserError, match="family names 'layer'"):
        effect_sizes(table_of({("base", 0): [1.0]}), ["mind", "head"], "value", family=["layer"])
