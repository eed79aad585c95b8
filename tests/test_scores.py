"""Scores of rankings, sets and verdicts against examples by hand and brute force; intervals against simulation."""

from __future__ import annotations

from itertools import pairwise, permutations
from math import nan

import numpy as np
import pytest

from reasoninterp.errors import UserError
from reasoninterp.severance.scoring.intervals import clustered, clustered_share, intraclass
from reasoninterp.severance.scoring.scores import (
    auroc,
    average_precision,
    calibration,
    jaccard,
    layer_error,
    layer_of,
    leaders,
    nearest,
    recall_at,
    severed_auroc,
    top1,
)
from reasoninterp.stats import proportion

# Units in falling order: b | a = d | c | e (NaN)
SCORES = {"a": 2.0, "b": 3.0, "c": -1.0, "d": 2.0, "e": nan}


def orders(scores: dict[str, float]) -> list[tuple[str, ...]]:
    """Every ranking that agrees with the scores: all orders of the ties."""
    key = {n: -np.inf if np.isnan(v) else v for n, v in scores.items()}
    return [p for p in permutations(scores) if all(key[x] >= key[y] for x, y in pairwise(p))]


def random_case(seed: int) -> tuple[dict[str, float], list[set[str]]]:
    """Six Units with many ties and some NaN, and a family of one to three sets."""
    draw = np.random.default_rng(seed)
    values = [nan if draw.random() < 0.2 else float(v) for v in draw.integers(0, 4, 6)]
    names = list("abcdef")
    family = [set(draw.choice(names, draw.integers(1, 4), replace=False).tolist()) for _ in range(draw.integers(1, 4))]
    return dict(zip(names, values, strict=True)), family


# ---------------------------------------------------------------------------------------------------------- by hand


def test_top1_by_hand() -> None:
    assert top1(SCORES, [{"b"}]) == 1
    assert top1(SCORES, [{"a", "d"}]) == 0
    assert top1(SCORES, [{"a"}, {"b", "c"}]) == 1  # in some set of the family
    tied = SCORES | {"b": 2.0}
    assert leaders(tied) == ("a", "b", "d")
    assert top1(tied, [{"a"}]) == pytest.approx(1 / 3)
    assert top1(tied, [{"a"}, {"d"}]) == pytest.approx(2 / 3)
    assert top1({"a": nan, "b": nan}, [{"a"}]) == 0.5  # says nothing: chance


def test_recall_by_hand() -> None:
    assert recall_at(SCORES, [{"a", "d"}]) == 0.5  # first two: b, and one of a and d
    assert recall_at(SCORES, [{"a", "b"}]) == 0.75  # b, and a in half of the orders
    assert recall_at(SCORES, [{"a", "b", "d"}]) == 1
    assert recall_at(SCORES, [{"c"}, {"b"}]) == 1
    assert recall_at(SCORES, [{"c", "e"}]) == 0


def test_jaccard_by_hand() -> None:
    assert jaccard(["a", "b"], [{"b", "c"}]) == pytest.approx(1 / 3)
    assert jaccard(["a", "b"], [{"b", "c"}, {"a"}]) == 0.5  # the nearest
    assert jaccard([], [{"a"}]) == 0
    assert jaccard({"b", "a"}, [{"a", "b"}]) == 1


def test_auroc_by_hand() -> None:
    # a (2.0) beats c and e, ties d, loses to b: 2.5 of 4
    assert auroc(SCORES, ["a"]) == 2.5 / 4
    assert auroc(SCORES, ["e"]) == 0
    assert auroc(SCORES, ["b", "e"]) == 0.5
    assert auroc(SCORES, ["a"], ["b", "d"]) == 1  # against c and e only
    assert np.isnan(auroc(SCORES, list(SCORES)))


def test_average_precision_by_hand() -> None:
    assert average_precision(SCORES, ["b"]) == 1
    assert average_precision(SCORES, ["b", "c"]) == pytest.approx((1 + 2 / 4) / 2)
    assert average_precision(SCORES, ["a"]) == pytest.approx((1 / 2 + 1 / 3) / 2)  # second or third
    assert average_precision(SCORES, ["a", "d"]) == pytest.approx((1 / 2 + 2 / 3) / 2)


def test_nearest_leaves_members_of_other_sets_out() -> None:
    scores = {"a": 3.0, "b": 0.0, "c": 1.0, "d": 0.5}
    assert auroc(scores, ["a", "b"]) == 0.5  # as one set, b stands below both others
    assert nearest(auroc, scores, [{"a"}, {"b"}]) == 1  # a alone is right, and b is no mistake
    assert nearest(auroc, scores, [{"b"}]) == 0
    assert nearest(average_precision, {"a": 1.0, "b": 2.0, "c": 0.0}, [{"a", "c"}, {"b"}]) == 1


def test_layer_error_by_hand() -> None:
    names = ("embed", "pos_embed", "L3.H1.QK", "L10", "L0.attn.b_O", "ln_final", "unembed")
    assert [layer_of(u, 12) for u in names] == [-1, -1, 3, 10, 0, 12, 12]
    assert layer_error(["L3.mlp"], [{"L1.attn"}], 4) == 2
    assert layer_error(["L3.mlp"], [{"L1.attn"}, {"L2.G0", "L0"}], 4) == 1
    assert layer_error(["embed", "L1"], [{"L1.attn"}], 4) == 1  # 2 and 0
    assert layer_error(["unembed"], [{"embed"}], 4) == 5
    assert np.isnan(layer_error([], [{"L1"}], 4))
    with pytest.raises(UserError, match="head_3"):
        layer_of("head_3", 4)


def test_severed_auroc_by_hand() -> None:
    # severed 0.9, 0.4; controls 0.4, 0.1, NaN: wins 3 + (½ + 1 + 1) of 6
    assert severed_auroc([0.9, 0.4, 0.4, 0.1, nan], [1, 1, 0, 0, 0]) == pytest.approx(5.5 / 6)
    assert severed_auroc([nan, 0.1], [True, False]) == 0
    assert np.isnan(severed_auroc([0.9], [1]))


def test_calibration_by_hand() -> None:
    # bins of width ½: {0.1, 0.3} with y 0, 1; {0.9, 1.0} with y 1, 1
    found = calibration([0.1, 0.3, 0.9, 1.0], [0, 1, 1, 1], n_bins=2)
    assert found.brier == pytest.approx((0.01 + 0.49 + 0.01 + 0) / 4)
    assert found.ece == pytest.approx(0.5 * abs(0.2 - 0.5) + 0.5 * abs(0.95 - 1))
    assert found.brier_base_rate == pytest.approx(0.75 * 0.25)
    assert found.table["n"].tolist() == [2, 2] and found.table["share"].tolist() == [0.5, 1.0]
    assert found.table["bin_low"].tolist() == [0.0, 0.5]
    draw = np.random.default_rng(0)
    p = draw.random(20000)
    honest = calibration(p, draw.random(20000) < p)
    assert honest.ece < 0.02 and honest.brier == pytest.approx(1 / 6, abs=0.01)  # E[p(1−p)]
    assert ((honest.table["ci_low"] < honest.table["p"]) & (honest.table["p"] < honest.table["ci_high"])).sum() >= 8


# ------------------------------------------------------------------------------------------------------- brute force


@pytest.mark.parametrize("seed", range(25))
def test_ranking_scores_are_means_over_every_order_of_the_ties(seed: int) -> None:
    scores, family = random_case(seed)
    ranked = orders(scores)
    union = set().union(*family)
    assert top1(scores, family) == pytest.approx(np.mean([p[0] in union for p in ranked]))
    recalls = [np.mean([len(s & set(p[: len(s)])) / len(s) for p in ranked]) for s in family]
    assert recall_at(scores, family) == pytest.approx(max(recalls))
    for truth in family:
        precisions, areas = [], []
        for p in ranked:
            places = [k for k, u in enumerate(p, start=1) if u in truth]
            precisions.append(np.mean([(j + 1) / k for j, k in enumerate(places)]))
            areas.append(np.mean([p.index(t) < p.index(f) for t in truth for f in p if f not in truth]))
        assert average_precision(scores, truth) == pytest.approx(np.mean(precisions))
        assert auroc(scores, truth) == pytest.approx(np.mean(areas))


def test_wrong_arguments_are_named() -> None:
    for family in ([], [set()], ["a"], "a"):
        with pytest.raises(UserError, match="family"):
            top1(SCORES, family)
    with pytest.raises(UserError, match="'z' has no score"):
        auroc(SCORES, ["z"])
    with pytest.raises(UserError, match="no Unit is scored"):
        leaders({})
    with pytest.raises(UserError, match="confidence"):
        calibration([nan], [1])
    with pytest.raises(UserError, match="clusters"):
        clustered([1.0, 2.0], ["a"])
    with pytest.raises(UserError, match="outside"):
        clustered_share([2.0], ["a"])


# --------------------------------------------------------------------------------------------------------- intervals


def test_clusters_of_one_are_the_ordinary_bootstrap_and_copies_add_nothing() -> None:
    x = np.random.default_rng(1).normal(size=40)
    alone = clustered(x, list(range(40)))
    copied = clustered(np.repeat(x, 5), np.repeat(np.arange(40), 5).tolist())
    assert (copied.value, copied.ci_low, copied.ci_high) == pytest.approx((alone.value, alone.ci_low, alone.ci_high))
    assert copied.n == 200 and alone.ci_high - alone.ci_low == pytest.approx(4 * x.std() / 40**0.5, rel=0.15)
    by_function = clustered(x, list(range(40)), lambda a: float(np.mean(a)))
    assert by_function[:3] == pytest.approx(alone[:3])


def test_clustered_interval_covers_what_pairs_alone_would_not() -> None:
    draw = np.random.default_rng(2)
    held, naive = [], []
    for k in range(100):
        x = (draw.normal(size=(25, 1)) + 0.3 * draw.normal(size=(25, 8))).reshape(-1)  # truth: 0
        e = clustered(x, np.repeat(np.arange(25), 8).tolist(), seed=k)
        n = clustered(x, list(range(200)), seed=k)
        held.append(e.ci_low <= 0 <= e.ci_high)
        naive.append(n.ci_low <= 0 <= n.ci_high)
    assert np.mean(held) > 0.85 and np.mean(naive) < 0.7


def test_clustered_statistic_of_two_columns_drops_what_has_no_value() -> None:
    severity, severed = [0.9, 0.8, 0.1, 0.2, 0.7, 0.3], [1, 1, 0, 0, 1, 0]
    values = np.column_stack([severity, severed])
    e = clustered(values, list("aabbcc"), lambda a: severed_auroc(a[:, 0], a[:, 1]))
    assert e.value == 1 and e.ci_low == 1
    assert "without a value" in e.method  # resamples of a alone, or of b alone, have one side only
    assert np.isnan(clustered([1.0, 0.0], ["a", "a"]).ci_low)
    assert clustered([nan, 1.0, 1.0], list("aab")).n == 2


def test_intraclass_correlation_by_hand_and_by_simulation() -> None:
    # clusters (1, 1), (0, 0), (1, 0): means 1, 0, ½; MSB = 2·(¼ + ¼ + 0)/2 = ½; MSW = ½/3 = 1/6; m₀ = 2
    assert intraclass([1, 1, 0, 0, 1, 0], list("aabbcc")) == pytest.approx((1 / 2 - 1 / 6) / (1 / 2 + 1 / 6))
    assert intraclass([1, 0, 1, 0], list("aabb")) == 0
    assert intraclass([1, 1, 0, 0], list("aabb")) == 1
    assert np.isnan(intraclass([1, 1, 1, 1], list("aabb")))
    draw = np.random.default_rng(3)
    x = draw.normal(size=(400, 1)) + draw.normal(size=(400, 6))
    assert intraclass(x.reshape(-1), np.repeat(np.arange(400), 6).tolist()) == pytest.approx(0.5, abs=0.06)


def test_a_share_without_a_miss_has_an_interval_all_the_same() -> None:
    clusters = np.repeat(np.arange(12), 6).tolist()
    found = clustered_share(np.ones(72), clusters)
    # n = 72 · (1.9939 / 2.2010)² = 59.1; the lower end at p = 1 is n / (n + 3.8415)
    assert found.n_effective == pytest.approx(59.1, abs=0.1)
    assert found.estimate.ci_low == pytest.approx(59.1 / (59.1 + 3.8415), abs=1e-3)
    assert (found.estimate.value, found.estimate.ci_high, found.estimate.n, found.n_clusters) == (1, 1, 72, 12)
    assert found.worst.ci_low == pytest.approx(proportion(np.ones(12)).ci_low)
    assert "assumed" in found.estimate.method
    alike = clustered_share(np.ones(72), clusters, icc_floor=1.0)
    assert alike.estimate.ci_low < found.estimate.ci_low and alike.n_effective <= 12
    assert clustered_share(np.zeros(72), clusters).estimate.ci_low == 0


def test_a_share_is_never_narrower_than_either_of_its_two_intervals() -> None:
    draw = np.random.default_rng(4)
    for _ in range(20):
        rate = draw.beta(8, 1, size=10)
        hits = (draw.random((10, 7)) < rate[:, None]).astype(float).reshape(-1)
        clusters = np.repeat(np.arange(10), 7).tolist()
        found, boot, wilson = clustered_share(hits, clusters), clustered(hits, clusters), proportion(hits)
        assert found.estimate.ci_low <= min(boot.ci_low, wilson.ci_low) + 1e-9
        assert found.estimate.ci_high >= max(boot.ci_high, wilson.ci_high) - 1e-9
        assert found.n_effective <= 70
    assert np.isnan(clustered_share([1.0, 1.0], ["a", "a"]).estimate.ci_low)  # one base model says nothing of others
