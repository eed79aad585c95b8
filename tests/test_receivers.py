"""Receiver heads: worked examples, planted receivers, and how far their order can be believed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from reasoninterp.attention.receiver_study import ReceiverHeads
from reasoninterp.attention.receivers import (
    MIN_TRACES,
    causal,
    controlled,
    head_scores,
    split_half,
    stepped_up,
    steps_needed,
    vertical_scores,
)
from reasoninterp.errors import UserError
from reasoninterp.models.context import Context, Item
from reasoninterp.models.minds import Minds
from reasoninterp.running import run_study
from reasoninterp.runs import Run
from reasoninterp.traces.trace import Format, Trace
from tests.tiny import save_tiny, save_tuned

FORMAT = Format(after_question="\n", between_steps="\n", before_answer="\n= ", after_answer="\n")
BY_HAND = np.array(
    [
        [0.9, 0.5, 0.5, 0.5, 0.5],
        [0.4, 0.6, 0.5, 0.5, 0.5],
        [0.3, 0.1, 0.6, 0.5, 0.5],
        [0.2, 0.5, 0.1, 0.2, 0.5],
        [0.1, 0.3, 0.2, 0.2, 0.2],
    ]
)


def test_above_the_diagonal_is_nan_and_never_counts() -> None:
    masked = causal(BY_HAND)
    above = np.triu(np.ones((5, 5), bool), 1)
    assert np.isnan(masked[above]).all() and (masked[~above] == BY_HAND[~above]).all()
    zeros, noise = np.tril(BY_HAND), np.tril(BY_HAND) + np.triu(np.full((5, 5), 7.0), 1)
    for control in ("none", "depth", "rank"):
        for matrix in (zeros, noise):
            assert (controlled(matrix, control)[~above] == controlled(BY_HAND, control)[~above]).all()
            assert np.isnan(controlled(matrix, control)[above]).all()


def test_vertical_scores_by_hand() -> None:
    nan = np.nan
    # readers at least 2 steps later: column 0 has rows 2, 3, 4; column 1 rows 3, 4; column 2 row 4
    np.testing.assert_allclose(vertical_scores(BY_HAND, proximity=2), [0.2, 0.4, 0.2, nan, nan])
    np.testing.assert_allclose(vertical_scores(BY_HAND), [0.1, nan, nan, nan, nan])
    # depth: row i can read i + 1 steps
    np.testing.assert_allclose(
        vertical_scores(BY_HAND, proximity=2, control="depth"), [(0.9 + 0.8 + 0.5) / 3, 1.75, 1.0, nan, nan]
    )
    # ranks in rows 2, 3, 4: (2, 1, 3)/3, (2.5, 4, 1, 2.5)/4, (1, 5, 3, 3, 3)/5
    np.testing.assert_allclose(
        vertical_scores(BY_HAND, proximity=2, control="rank"),
        [(2 / 3 + 2.5 / 4 + 1 / 5) / 3, (4 / 4 + 5 / 5) / 2, 3 / 5, nan, nan],
    )
    with pytest.raises(UserError, match="proximity"):
        vertical_scores(BY_HAND, proximity=0)
    with pytest.raises(UserError, match="control"):
        vertical_scores(BY_HAND, control="depths")


def test_a_step_without_tokens_is_left_out() -> None:
    matrix = BY_HAND.copy()
    matrix[3, :], matrix[:, 3] = np.nan, np.nan
    np.testing.assert_allclose(vertical_scores(matrix, proximity=2), [0.2, 0.3, 0.2, np.nan, np.nan])


def test_even_attention_is_one_under_control_of_depth() -> None:
    even = np.tril(np.ones((9, 9))) / np.arange(1, 10)[:, None]
    scores = vertical_scores(even, control="depth")
    np.testing.assert_allclose(scores[:5], 1.0)
    plain = vertical_scores(even)
    assert (np.diff(plain[:5]) < 0).all()  # without it the earlier steps seem to be read more


def test_kurtosis_by_hand() -> None:
    # one of six is read: deviations are 5/6 and five times -1/6, so m4 / m2² = 4.2
    vertical = np.array([[1.0, 0, 0, 0, 0, 0, np.nan, np.nan], [0.5] * 6 + [np.nan] * 2])
    found = head_scores(vertical)
    assert found[0] == pytest.approx(4.2 - 3)
    assert np.isnan(found[1])  # equal scores have no kurtosis
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 7))
    np.testing.assert_allclose(head_scores(x), scipy.stats.kurtosis(x, axis=-1, fisher=True, bias=True))


def test_too_few_steps_are_not_known_rather_than_zero() -> None:
    rng = np.random.default_rng(1)
    for n_steps in range(1, 12):
        found = head_scores(vertical_scores(rng.random((5, n_steps, n_steps))))
        assert found.shape == (5,)
        assert np.isnan(found).all() == (n_steps < steps_needed())
    # what two or three scores would give says nothing of the head
    two, three = rng.random((4, 2)), rng.random((4, 3))
    np.testing.assert_allclose(scipy.stats.kurtosis(two, axis=-1), -2)
    np.testing.assert_allclose(scipy.stats.kurtosis(three, axis=-1), -1.5)
    assert np.isnan(head_scores(three)).all()


def planted(rng: np.random.Generator, n_steps: int, receiver: int, strength: float) -> np.ndarray:
    """Attention rows over 6 heads; in head 2, all later steps put `strength` on one step."""
    logits = rng.normal(size=(6, n_steps, n_steps)) * 0.3
    logits = np.where(np.tri(n_steps, dtype=bool), logits, -np.inf)
    attention = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    later = np.arange(n_steps) > receiver
    attention[2, later] *= 1 - strength
    attention[2, later, receiver] += strength
    return attention


@pytest.mark.parametrize("control", ["none", "depth"])
def test_a_planted_receiver_is_found(control: str) -> None:
    rng = np.random.default_rng(2)
    scores = []
    for k in range(8):
        receiver = 3 + k % 4
        vertical = vertical_scores(planted(rng, 14 + k % 3, receiver, 0.5), control=control)
        assert np.nanargmax(vertical[2]) == receiver
        scores.append(head_scores(vertical))
    mean = np.mean(scores, axis=0)
    assert mean.argmax() == 2 and mean[2] > 3
    assert (np.delete(mean, 2) < 2).all()


def test_reliability_of_noise_centres_on_zero_and_covers_it() -> None:
    found = [
        split_half(np.random.default_rng(k).normal(size=(16, 24)), seed=k, n_splits=60, n_resamples=60)
        for k in range(60)
    ]
    values = np.array([f.value for f in found])
    assert abs(np.median(values)) < 0.15 and abs(values.mean()) < 0.15
    assert values.std() > 0.05
    assert np.mean([f.ci_low <= 0 <= f.ci_high for f in found]) > 0.85


def test_reliability_of_a_planted_pattern_is_what_theory_says() -> None:
    # heads' variance s² against noise of variance 1 in each of n traces: s² / (s² + 1/n)
    found = []
    for k in range(20):
        rng = np.random.default_rng(k)
        heads = rng.normal(size=64)
        heads = 0.5 * (heads - heads.mean()) / heads.std()
        scores = heads + rng.normal(size=(12, 64))
        found.append(split_half(scores, seed=k, n_splits=60, n_resamples=60))
    truth = 0.25 / (0.25 + 1 / 12)
    assert np.mean([f.value for f in found]) == pytest.approx(truth, abs=0.06)
    assert np.mean([f.ci_low <= truth <= f.ci_high for f in found]) >= 0.85
    strong = split_half(np.arange(10.0) + 0.01 * np.random.default_rng(0).normal(size=(8, 10)))
    assert strong.value > 0.999 and strong.half <= strong.value and strong.n == 8 and strong.n_heads == 10


def test_reliability_is_the_same_for_the_same_seed_and_says_when_there_is_none() -> None:
    x = np.random.default_rng(5).normal(size=(9, 7)) + np.arange(7)
    assert split_half(x, seed=3) == split_half(x, seed=3)
    assert split_half(x, seed=3).value != split_half(x, seed=4).value
    x[4] = np.nan  # a trace that is too short
    x[2, 5] = np.nan  # a head without a score there
    short = split_half(x, seed=3)
    assert (short.n, short.n_heads) == (8, 6) and short.note == ""
    few = split_half(x[:3])
    assert np.isnan(few.value) and str(MIN_TRACES) in few.note and few.n == 3
    none = split_half(np.full((6, 5), np.nan))
    assert np.isnan(none.value) and none.n == 0
    flat = split_half(np.ones((6, 5)))
    assert np.isnan(flat.value) and flat.note
    narrow = split_half(x[:, :2])
    assert np.isnan(narrow.value) and "heads" in narrow.note


def test_spearman_brown() -> None:
    assert stepped_up(0.5) == pytest.approx(2 / 3) and stepped_up(1.0) == 1.0
    assert stepped_up(-0.5) == -stepped_up(0.5)
    # stepping up by 2 and by 2 again is stepping up by 4
    assert stepped_up(stepped_up(0.3)) == pytest.approx(stepped_up(0.3, 4.0))


def traces(n_steps: list[int]) -> list[Item]:
    words = "abcdefghijklmnopqrstuvwxyz"
    return [
        Item(Trace(f"t{k}", f"go {k}", tuple(f"now {words[(3 * k + j * j) % 26]}" for j in range(n)), "7", FORMAT))
        for k, n in enumerate(n_steps)
    ]


def test_the_study_counts_the_traces_that_are_too_short(tmp_path: Path) -> None:
    save_tiny(tmp_path / "base", "llama-gqa")
    save_tuned(tmp_path / "base", tmp_path / "tuned", scale=0.05)
    minds = Minds.load({"base": str(tmp_path / "base"), "tuned": str(tmp_path / "tuned")})
    context = Context(minds, traces([9, 10, 3, 8, 11, 9]))
    run = Run.open(tmp_path / "run", {})
    context.run = run
    result = run_study(ReceiverHeads(), context, run, quiet=True)
    heads, reliability = result.tables["receiver_heads"], result.tables["receiver_reliability"]
    assert len(heads) == 2 * 3 * 4 and (heads["n"] == 5).all()
    assert (heads["n_traces"] == 6).all() and (heads["n_too_short"] == 1).all()
    assert heads["value"].between(-2, 10).all() and heads["value"].std() > 0.05
    assert (heads["ci_low"] <= heads["value"]).all() and heads["top_step"].between(1, 7).all()
    assert (reliability["n"] == 5).all() and reliability["value"].between(-1, 1).all()
    assert (run.path / "figures").exists()
    none = run_study(ReceiverHeads(proximity=9), context, run, quiet=True).tables
    assert none["receiver_heads"]["value"].isna().all() and (none["receiver_heads"]["n"] == 0).all()
    assert none["receiver_reliability"]["value"].isna().all()
    assert "6 of 6 have fewer than 13 steps" in none["receiver_reliability"]["note"][0]
    near = run_study(ReceiverHeads(proximity=1, exclude_sinks=True), context, run, quiet=True).tables
    assert (near["receiver_heads"]["n"] == 5).all()
