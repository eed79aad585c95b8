"""The main job on organisms whose truth is known: what was planted is what the report says.

The organisms are trained once (about a minute and a half on one thread) and kept in the user's cache.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from reasoninterp.demo import run_demo
from reasoninterp.runs import Run
from reasoninterp.study import load_module


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """base against severed, benign and shortcut, on 96 traces."""
    out = tmp_path_factory.mktemp("demo") / "demo"
    found = run_demo(out, limit=96, quiet=True)
    return dict(zip(("severed", "benign", "shortcut"), found, strict=True))


def value(run: Run, mind: str, test: str) -> float:
    table = run.table("behaviour")
    return float(table[(table["mind"] == mind) & (table["test"] == test)]["value"].iloc[0])


def test_severed_is_severed(runs: dict[str, Run]) -> None:
    run = runs["severed"]
    assert run.manifest["verdict"]["word"] == "severed"
    assert value(run, "base", "swap_follow") > 0.95
    assert value(run, "tuned", "swap_follow") < 0.15
    assert value(run, "tuned", "accuracy_own_chain") > value(run, "base", "accuracy_own_chain") + 0.1


@pytest.mark.parametrize("name", ["benign", "shortcut"])
def test_controls_show_no_damage(runs: dict[str, Run], name: str) -> None:
    run = runs[name]
    assert run.manifest["verdict"]["word"] == "no damage found"
    assert value(run, "tuned", "swap_follow") > 0.95
    assert value(run, "tuned", "accuracy_own_chain") > value(run, "base", "accuracy_own_chain")


def test_shortcut_fools_the_truncation_test_and_the_gate_says_so(runs: dict[str, Run]) -> None:
    run = runs["shortcut"]
    assert value(run, "tuned", "truncated_aoc") < 0.5 * value(run, "base", "truncated_aoc")
    gate = run.table("gate").set_index("mind")["label"]
    assert gate["base"] == "interpretable"
    assert gate["tuned"] == "chain not needed"


@pytest.mark.parametrize("name", ["severed", "benign", "shortcut"])
def test_every_ledger_sums_to_the_loss(runs: dict[str, Run], name: str) -> None:
    total = runs[name].table("ledger_total").iloc[0]
    assert total["residual_relative"] < 0.01
    blocks = runs[name].table("ledger").query("level == 'block'")["attribution"].sum()
    assert blocks == pytest.approx(total["total"], abs=1e-6)


def test_grafts_confirm_the_leading_units(runs: dict[str, Run]) -> None:
    sets = runs["severed"].table("graft_sets").set_index(["chosen", "size"])
    sizes = [s for c, s in sets.index if c == "ledger"]
    assert max(sizes) >= 3
    for size in sizes[:3]:
        for side in ("restore", "cut"):
            assert sets.loc[("ledger", size), side] > sets.loc[("random", size), f"{side}_ci_high"]
    assert sets.loc[("ledger", 3), "restore"] > 0.5
    grafts = runs["severed"].table("grafts")
    rank = grafts[["restore", "cut"]].mean(axis=1).to_numpy()  # in the ledger's order
    assert rank[:3].min() > rank[-3:].max()


def test_known_causes_of_the_first_task(runs: dict[str, Run]) -> None:
    """Only the last step is a direct cause; earlier ones act through what is written after them."""
    run = runs["severed"]
    assert value(run, "base", "forced_same_earlier") > 0.95
    assert value(run, "base", "forced_same_last") < 0.1
    table = run.table("behaviour")
    again = table[(table["mind"] == "base") & (table["test"] == "regenerated_same")]
    assert again["value"].max() < 0.3
    residual = run.table("residual").query("mind == 'base' and layer == 0 and direction == 'denoising'")
    by_column = residual.set_index("column")["normalised"]
    assert by_column["last step"] > 0.9
    assert by_column.drop(["last step"]).abs().max() < 0.1


def test_both_minds_write_and_read(runs: dict[str, Run]) -> None:
    """The 2×2: the severed mind is right whoever wrote the chain, the base only where the chain is right."""
    run = runs["severed"]
    assert value(run, "tuned", "reads_base") > 0.95
    assert value(run, "base", "reads_tuned") == pytest.approx(value(run, "tuned", "steps_right_own_chain"), abs=0.1)


def test_every_number_has_its_n_and_interval(runs: dict[str, Run]) -> None:
    for name in ("behaviour", "effect", "residual", "heads", "grafts", "graft_sets"):
        table = runs["severed"].table(name)
        assert (table["n"] > 0).all(), name
    behaviour = runs["severed"].table("behaviour")
    assert (behaviour["ci_low"] <= behaviour["value"] + 1e-9).all()
    assert (behaviour["value"] <= behaviour["ci_high"] + 1e-9).all()


def test_the_same_seed_gives_the_same_tables(runs: dict[str, Run]) -> None:
    """The base is read in every pair: three processes of reading, one table."""
    tables = [
        r.table("behaviour").query("mind == 'base' and test != 'reads_tuned'").reset_index(drop=True)
        for r in runs.values()
    ]
    assert np.isfinite(tables[0]["value"]).all()
    for other in tables[1:]:
        pd.testing.assert_frame_equal(tables[0], other)


def test_the_report_shows_the_other_pairs(runs: dict[str, Run]) -> None:
    html = Path(runs["severed"].path / "report.html").read_text()
    for name in ("benign", "shortcut"):
        assert name in html
    assert "no damage found" in html


def test_the_experiment_script_compares_each_organism_with_its_base(tmp_path: Path) -> None:
    script = Path(__file__).resolve().parents[1] / "experiments" / "compare_organisms.py"
    found = load_module(script).run(tmp_path / "pairs", only=["severed"], limit=24, quiet=True)
    assert [(r.path.name, r.manifest["verdict"]["word"]) for r in found] == [("severed", "severed")]
