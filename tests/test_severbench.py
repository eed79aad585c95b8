"""SeverBench's tables and scores on rows made by hand."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from reasoninterp.organisms.planted.truth import Truth
from reasoninterp.severance.scoring import intervals, scores
from reasoninterp.study import load_module

FOLDER = Path(__file__).parents[1] / "experiments" / "benchmarks"
EITHER = Truth("head", (frozenset({"L0.G0"}), frozenset({"L1.G1"})), (frozenset({"L0.G0", "L1.G1"}),))


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The scores and tables as a module; intervals from few resamples."""
    monkeypatch.setattr(intervals, "N_RESAMPLES", 50)
    return load_module(FOLDER / "severbench_scores.py")


@pytest.fixture
def bench(tables: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module."""
    monkeypatch.setitem(sys.modules, "severbench_scores", tables)
    return load_module(FOLDER / "severbench.py")


def row(method: str, base: str, label: str, top1: float, severity: float, **more: Any) -> dict[str, Any]:
    """One pair × method; controls have no scores."""
    score = top1 if label == "severed" else np.nan
    scores = dict.fromkeys(("top1", "recall", "jaccard", "unit_auroc", "average_precision"), score)
    about = {"base": base, "split": "held-out", "pair": f"{base}-{label}-{top1}", "clean": True, "gauge": 0.3}
    about |= {"level": "head", "at_grain": True}
    costs = {"forward": 10.0, "backward": 2.0, "seconds": 1.0}
    found = {"method": method, "label": label, "severity": severity, "word": label, "layer_error": 1 - score}
    return about | scores | costs | found | more


def both(method: str, hits: list[float], severities: list[float], **more: Any) -> list[dict[str, Any]]:
    """A severed pair and a control of two bases each; severities: the two severed ones', then the controls'."""
    cut = [row(method, b, "severed", h, s, **more) for b, h, s in zip("ab", hits, severities[:2], strict=True)]
    return cut + [row(method, b, "benign", 0.0, s, **more) for b, s in zip("ab", severities[2:], strict=True)]


def test_table_by_hand(tables: Any) -> None:
    rows = both("locate", [1.0, 0.0], [0.9, 0.8, 0.1, 0.2]) + both("random", [0.0, 0.0], [0.5, 0.5, 0.5, 0.5])
    rows += both("weight_norm", [1.0, 1.0], [0.1, 0.2, 0.3, 0.15])
    rows += both("ledger alone", [1.0, 0.0], [np.nan] * 4)
    rows += both("cross_patch", [1.0, 0.0], [-0.5, np.nan, -1.0, -2.0])
    found = tables.table(pd.DataFrame(rows)).set_index("method")
    assert list(found.index) == ["locate", "random", "weight_norm", "ledger alone", "cross_patch"]
    ours = found.loc["locate"]
    assert ours["top1"] == ours["jaccard"] == ours["layer_error"] == 0.5 and ours["auroc"] == 1.0
    assert (ours["pairs"], ours["controls"], ours["forward"]) == (2, 2, 10.0)
    assert ours["top1_ci_low"] < 0.5 < ours["top1_ci_high"] and 0 < ours["top1_worst"] < 0.5
    assert found.loc["random", "auroc"] == 0.5 and found.loc["random", "top1"] == 0.0
    assert found.loc["weight_norm", "auroc"] == 0.25  # above the control in one of four comparisons
    assert found.loc["weight_norm", "top1"] == 1.0
    assert np.isnan(found.loc["ledger alone", "auroc"])
    assert found.loc["cross_patch", "auroc"] == 0.5  # what says nothing is lowest, below what is negative
    text = tables.describe(found.reset_index(), "title").splitlines()
    assert text[0] == "title" and "0.50 [" in text[2] and text[5].count("—") == 1


def test_the_correlation_within_bases_is_that_of_the_worst_method(tables: Any) -> None:
    def hits(method: str, values: list[float]) -> list[dict[str, Any]]:
        bases = ["a", "a", "b", "b", "c", "c"]
        return [row(method, b, "severed", v, 0.9) for b, v in zip(bases, values, strict=True)]

    rows = pd.DataFrame(hits("locate", [1.0] * 6) + hits("ledger alone", [1, 1, 1, 1, 0, 0]))
    assert tables.icc_floor(rows, ["locate"]) == 0.0  # nothing to tell it from
    assert tables.icc_floor(rows, ["locate", "ledger alone"]) == pytest.approx(1.0)
    wide = tables.table(rows, icc=1.0).set_index("method").loc["locate", "top1_ci_low"]
    assert wide < tables.table(rows).set_index("method").loc["locate", "top1_ci_low"] < 1


def test_words_are_right_by_label(tables: Any) -> None:
    rows = [
        row("locate", "a", label, 1.0, 0.5, word=word)
        for label, word in [
            ("severed", "severed"),
            ("severed", "undecided"),
            ("benign", "intact"),
            ("backup", "severed"),
            ("overridden", "overridden"),
            ("damaged", "undecided"),
        ]
    ]
    rows.append(row("random", "a", "severed", 1.0, 0.5, word="intact"))
    found = tables.words(pd.DataFrame(rows)).set_index(["label", "word"])["right"]
    assert found.to_dict() == {
        ("severed", "severed"): True,
        ("severed", "undecided"): False,
        ("benign", "intact"): True,
        ("backup", "severed"): False,
        ("overridden", "overridden"): True,
        ("damaged", "undecided"): True,
    }


def test_failures_name_the_missed_pair_and_the_false_alarm(tables: Any) -> None:
    rows = [
        row("locate", "a", "severed", 1.0, 0.9),
        row("locate", "b", "severed", 0.0, 0.9, pair="missed"),
        row("locate", "c", "severed", 1.0, 0.9, pair="too-many", jaccard=0.5),
        row("locate", "c", "severed", 0.0, 0.9, pair="coarser", at_grain=False),
        row("locate", "a", "benign", 0.0, 0.1),
        row("locate", "b", "intact", 0.0, 0.9, pair="alarm", word="severed"),
        row("random", "a", "severed", 0.0, 0.9, pair="not-ours"),
    ]
    text = tables.failures(pd.DataFrame(rows))
    assert text.startswith("2 severed pairs are not located exactly; 1 controls are called severed.")
    assert [line.split()[0] for line in text.splitlines()[1:]] == ["missed", "too-many", "alarm"]


def test_levels_are_scored_by_themselves(tables: Any) -> None:
    rows = pd.DataFrame(
        [
            row("locate", "a", "severed", 1.0, 0.9),
            row("locate", "b", "severed", 0.0, 0.9),
            row("locate", "a", "severed", 1.0, 0.9, level="block"),
            row("locate", "a", "benign", 0.0, 0.0),
        ]
    )
    found = tables.by_level(rows).set_index("level")
    assert found["top1"].to_dict() == {"head": 0.5, "block": 1.0} and found["pairs"].to_dict() == {
        "head": 2,
        "block": 1,
    }


def test_a_method_that_names_nothing_is_wrong_and_not_missing(tables: Any) -> None:
    nothing = tables.score_ranking({}, EITHER, 3)
    right = tables.score_ranking({"L0.G0": 2.0, "L1.G1": 1.0, "L2.G0": 0.0}, EITHER, 3)
    assert set(nothing) == set(right) == set(tables.SHOWN)
    assert nothing["top1"] == nothing["jaccard"] == 0.0 and nothing["unit_auroc"] == 0.5
    assert nothing["layer_error"] == 3
    assert all(right[n] == 1.0 for n in tables.SHOWN if n != "layer_error") and right["layer_error"] == 0.0


def test_a_location_is_scored_by_its_own_sets_and_only_if_they_reach(tables: Any) -> None:
    one = SimpleNamespace(units=("L1.G1",), reached=True)
    whole = SimpleNamespace(units=("L0.G0", "L1.G1"), reached=True)
    assert tables.score_sets(one, whole, EITHER)["jaccard"] == 1.0
    half = tables.score_sets(whole, one, EITHER)  # too much restores, too little cuts
    assert (half["jaccard_restoring"], half["jaccard_cutting"]) == (0.5, 0.5)
    short = SimpleNamespace(units=("L0.G0", "L1.G1"), reached=False)
    assert tables.score_sets(one, short, EITHER)["jaccard"] == tables.score_sets(one, None, EITHER)["jaccard"] == 0.5
    assert tables.score_sets(None, None, EITHER)["jaccard"] == 0.0


def test_overlap_of_the_first_units_by_hand() -> None:
    ranking = {"a": 1.0, "b": 3.0, "c": float("nan"), "d": 2.0}  # b, d, a, c
    assert scores.jaccard_at(ranking, [{"b"}]) == 1.0
    assert scores.jaccard_at(ranking, [{"d"}]) == 0.0
    assert scores.jaccard_at(ranking, [{"b", "a"}]) == pytest.approx(1 / 3)  # b, d against a, b
    assert scores.jaccard_at(ranking, [{"d"}, {"b", "d"}]) == 1.0  # the nearest of the family
    assert scores.jaccard_at(ranking, [{"a", "b", "c"}]) == 0.5  # NaN is last: b, d, a


def test_overlap_of_ties_is_their_expectation_whatever_their_order() -> None:
    ranking = {"L0.G0.QK": 2.0, "L0.G0.OV": 2.0, "L1.mlp": 2.0, "L0.mlp": 1.0}
    for true in ("L0.G0.QK", "L0.G0.OV"):
        assert scores.jaccard_at(ranking, [{true}]) == pytest.approx(1 / 3)
    # Two of three that tie, of which both are true with chance 1/3 (overlap 1), else one (overlap 1/3).
    assert scores.jaccard_at(ranking, [{"L0.G0.QK", "L1.mlp"}]) == pytest.approx(1 / 3 + 2 / 3 / 3)


def test_scores_of_a_ranking_heed_the_family(tables: Any) -> None:
    found = tables.score_ranking({"L0.G0": 0.0, "L1.G1": 3.0, "L2.G0": 2.0, "L2.G1": 1.0}, EITHER, 3)
    assert found["top1"] == 1.0  # in one of the sets
    assert found["jaccard"] == found["recall"] - 1 / 12 == pytest.approx((1 + 1 / 3) / 2)  # recall: (1 + 1/2) / 2
    assert found["unit_auroc"] == 1.0  # of the nearest set; the other set's Unit counts as neither


def test_the_headline_is_of_held_out_clean_pairs(
    bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def every(hits: list[float], **more: Any) -> list[dict[str, Any]]:
        severities = [0.9, 0.8, 0.1, 0.2]
        return [r for m in (*bench.OURS, *bench.COMPETITORS) for r in both(m, hits, severities, **more)]

    rows = every([1.0, 1.0]) + every([0.0, 0.0], clean=False) + every([0.0, 1.0], split="development")
    features = pd.DataFrame(columns=["split", "label", "clean"])
    result = bench.tell(pd.DataFrame(rows), features, tmp_path)
    assert result["of"] == "held-out, clean" and result["top1"] == result["jaccard"] == result["auroc"] == 1.0
    assert set(result["baselines"]) == set(bench.COMPETITORS) and result["baselines"]["random"]["top1"] == 1.0
    assert (tmp_path / "severbench.png").stat().st_size > 10_000
    assert {f.name for f in tmp_path.glob("*.csv")} == {
        f"{split}-{part}{what}.csv"
        for split in ("held-out", "development")
        for part in ("clean", "all")
        for what in ("", "-by-level", "-words")
    }
    every_pair = pd.read_csv(tmp_path / "held-out-all.csv").set_index("method").loc["locate", "top1"]
    assert every_pair == 0.5 and "held-out, clean: " in capsys.readouterr().out
    development = pd.DataFrame([r for r in rows if r["split"] == "development"])
    assert bench.tell(development, features, tmp_path)["of"] == "development, clean"
