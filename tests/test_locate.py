"""Locate: a model set by hand whose path is cut, overridden or whole; the words, the sets, the command."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pandas as pd
import pytest
from nbclient import NotebookClient

from reasoninterp.cli import main
from reasoninterp.cli_locate import lines_of
from reasoninterp.errors import UserError
from reasoninterp.models.context import Context
from reasoninterp.runs import Run
from reasoninterp.severance.location.confidence import FEATURES, confidence, fit
from reasoninterp.severance.location.locate import locate
from reasoninterp.severance.location.location import RANKING, Location
from reasoninterp.severance.location.mechanism import words
from reasoninterp.traces.io import write_traces
from tests import planted_copy

NOTEBOOK = Path(__file__).resolve().parents[1] / "notebooks" / "severance.ipynb"
TUNED: dict[str, dict[str, Any]] = {
    "severed": {"carries": 0.0, "rival": 1.0, "drift": 0.003},
    "away": {"looks_at": planted_copy.COLON, "rival": 1.0},
    "overridden": {"rival": 3.0},
    "benign": {"drift": 0.003},
    "damaged": {"carries": 0.0},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("planted")


@pytest.fixture(scope="module")
def context(folder: Path) -> Context:
    return planted_copy.context(folder, TUNED, n=N)


N = 24
FREE = planted_copy.items(N, with_rival=False, seed=1)


def located(context: Context, name: str, level: str = "block", *, free: bool = True) -> Location:
    """Locate once for all tests of this file."""
    key = "located", name, level, free
    if key not in context.memo:
        rival_free = FREE if free else None
        given: Any = {"level": level, "tolerance": 0.5, "most_contrasts": N, "align": name == "severed"}
        context.memo[key] = locate(context, to_mind=name, rival_free=rival_free, **given)
    found: Location = context.memo[key]
    return found


@pytest.mark.parametrize(
    ("name", "level", "verdict", "unit", "mechanism"),
    [
        ("severed", "block", "severed", "L0.attn", "carries nothing"),
        ("away", "head", "severed", "L0.H0", "looks away"),
        ("overridden", "head", "overridden", "L0.H1", "shortcut wins"),
        ("damaged", "layer", "undecided", "L0", "carries nothing"),
    ],
)
def test_what_was_planted_is_located(
    context: Context, name: str, level: str, verdict: str, unit: str, mechanism: str
) -> None:
    found = located(context, name, level)
    assert found.verdict == verdict
    assert found.restoring is not None and found.cutting is not None and found.mechanism is not None
    assert found.restoring.units == found.cutting.units == found.located == (unit,)
    shares = [s.share_follow if verdict == "overridden" else s.share for s in (found.restoring, found.cutting)]
    assert all(s.value > 0.95 and s.n == N for s in shares)
    assert found.mechanism.word == mechanism
    assert found.units[0] == unit
    for scores in (found.rank_ledger, found.rank_grafts, found.rank_both):
        assert scores.argmax() == 0
    assert found.costs.evaluations > 2 and found.costs.backward_passes > 2
    still = found.ranking["weight_change"] == 0
    assert (found.ranking.loc[still, "rank_both"] == 0).all()


def test_without_the_rivals_removal_e_alone_tells(context: Context) -> None:
    cut, hidden = (located(context, m, "head", free=False) for m in ("away", "overridden"))
    assert (cut.verdict, hidden.verdict) == ("severed", "overridden")
    assert any("not excluded" in s for s in cut.sentences)
    assert cut.severance_score > 0.95 > 0.3 > hidden.severance_score > 0.05
    # Once the rival is gone the path is back: nothing is severed at all.
    assert located(context, "overridden", "head").severance_score == pytest.approx(0, abs=0.01)
    assert located(context, "damaged", "layer").severance_score < 0.3  # what it lost is its answers


def test_an_intact_pair_ends_after_the_behaviour(context: Context) -> None:
    # An equivalence claim takes more traces than a loss: 24 cannot exclude one of 10 points.
    assert located(context, "benign").verdict == "undecided"
    more = Context(context.minds, planted_copy.items(64), max_new_tokens=4)
    found = locate(more, to_mind="benign")
    assert found.verdict == "intact"
    assert found.severance_score == pytest.approx(0, abs=0.01)
    assert found.costs.backward_passes == found.costs.evaluations == 0
    assert found.located == () and not len(found.ranking)
    whole = located(context, "benign")
    assert len(whole.ranking) and whole.shares_of is None and whole.located == ()
    assert np.isnan(whole.ranking["restore"]).all() and whole.ranking["weight_change"].min() > 0


def test_a_base_without_a_path_is_not_interpretable(context: Context) -> None:
    found = locate(context, from_mind="severed", to_mind="benign")
    assert found.verdict == "not interpretable" and np.isnan(found.severance_score)
    assert "follows another chain in 0 %" in found.sentences[0]
    damaged = locate(context, from_mind="damaged", to_mind="benign")
    assert damaged.verdict == "not interpretable" and "at floor" in damaged.sentences[0]
    few = Context(context.minds, context.items[:12], max_new_tokens=4)
    assert "only 12 swaps" in locate(few, to_mind="severed").sentences[0]


def test_every_sentence_says_what_would_reverse_it_and_the_json_is_plain(context: Context) -> None:
    found = located(context, "severed")
    assert len(found.sentences) >= 5
    assert all("would be reversed by" in s and "not training seeds" in s for s in found.sentences)
    assert len(found.evidence) >= 12
    assert all(e.would_reverse and e.n == N and e.ci_low <= e.value <= e.ci_high for e in found.evidence)
    text = json.dumps(found.to_json(), allow_nan=False)
    assert json.loads(text)["restoring"]["units"] == ["L0.attn"]
    assert list(found.ranking.columns) == RANKING
    lines = lines_of(found)
    assert len(lines) <= 15 and lines[0].startswith("SEVERED") and "not calibrated" in lines[0]


def test_wrong_arguments_are_told_in_a_sentence(context: Context) -> None:
    for wrong, said in (
        ({"threshold": 0.0}, "threshold"),
        ({"most_contrasts": 0}, "most_contrasts"),
        ({"to_mind": "nobody"}, "nobody"),
        ({"rival_free": [replace(FREE[0], contrast=None, swap=None)]}, "rival_free"),
    ):
        with pytest.raises(UserError, match=said):
            locate(context, **{"to_mind": "severed", **wrong})
    with pytest.raises(UserError, match="no contrast"):
        locate(Context(context.minds, [replace(i, contrast=None) for i in FREE]), to_mind="severed")


@pytest.mark.parametrize(
    ("weights", "word"),
    [
        ({"QK": 0.9, "OV": 0.1}, "looks away"),
        ({"OV": 0.6, "QK": 0.3}, "carries nothing"),
        ({"OV": 0.6, "QK": 0.35}, "mixed"),  # the next one moves more than half as much
        ({"mlp": 0.45}, "mixed"),  # under one half
        ({"mlp": 1.0, "norms": 0.2}, "mlp"),
        ({"embedding": 0.8}, "embedding"),
        ({"OV": float("nan")}, "not known"),
        ({}, "not known"),
    ],
)
def test_mechanism_words(weights: dict[str, float], word: str) -> None:
    rows = [{"part": p, "restore": w, "cut": w, "weight": w, "ledger_share": 0.5} for p, w in weights.items()]
    found = words(pd.DataFrame(rows, columns=["part", "restore", "cut", "weight", "ledger_share"]))
    assert found[0] == word
    assert found[2]


def test_confidence_is_a_number_only_where_it_was_calibrated(tmp_path: Path) -> None:
    given = dict.fromkeys(FEATURES, 0.5)
    nowhere = confidence(given, tmp_path / "none.json")
    assert np.isnan(nowhere.value) and nowhere.basis == "not calibrated"
    rng = np.random.default_rng(0)
    cases = pd.DataFrame(rng.random((400, len(FEATURES))), columns=list(FEATURES))
    right = rng.random(400) < 1 / (1 + np.exp(-(8 * cases["restored"] - 4)))  # one feature matters, with a known slope
    file = tmp_path / "calibration.json"
    file.write_text(json.dumps(fit(cases, right.astype(float), basis="400 drawn cases")))
    low, high = (confidence({**given, "restored": x}, file) for x in (0.1, 0.9))
    assert low.value == pytest.approx(1 / (1 + np.exp(3.2)), abs=0.06)
    assert high.value == pytest.approx(1 / (1 + np.exp(-3.2)), abs=0.06)
    assert high.basis == "400 drawn cases"
    assert confidence({**given, "restored": float("nan")}, file).value == pytest.approx(0.5, abs=0.1)
    with pytest.raises(UserError, match="both kinds"):
        fit(cases, np.ones(400), basis="")


def test_the_command_and_the_notebook(
    folder: Path,
    context: Context,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files = {}
    for name, some in (("with", context.items), ("without", FREE)):
        traces = [i.trace for i in some]
        pairs = {i.id: (i.contrast.corrupt.steps, i.contrast.corrupt.answer) for i in some if i.contrast}
        files[name] = tmp_path / f"{name}.jsonl"
        write_traces(files[name], traces, pairs)
    minds = ["--base", str(folder / "base"), "--tuned", str(folder / "severed"), "--traces", str(files["with"])]
    out = folder / "runs" / "severed"
    main(["locate", *minds, "--without-rival", str(files["without"]), "--out", str(out), "--quiet"])
    said = capsys.readouterr().out.strip().splitlines()
    assert said[0].startswith("SEVERED") and len(said) <= 15
    run = Run.read(out)
    assert run.table("ranking")["unit"].iloc[0] == "L0.attn"
    assert set(run.table("sets")["direction"]) == {"restore", "cut"}
    assert {"location", "evidence", "answers", "rival", "direct", "mechanism"} <= {
        p.stem for p in (out / "tables").glob("*.parquet")
    }
    assert json.loads((out / "location.json").read_text())["verdict"] == "severed"
    assert (out / "figures" / "location.png").stat().st_size > 10_000
    note = nbformat.read(NOTEBOOK, as_version=4)
    monkeypatch.setitem(os.environ, "REASONINTERP_SEVERANCE", str(out.parent))
    NotebookClient(note, timeout=120, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    shown = [o for cell in note.cells for o in cell.get("outputs", [])]
    assert any("image/png" in o.get("data", {}) for o in shown)
    assert any("ledger and grafts lead with L0.attn, in both sets" in str(o.get("data", {})) for o in shown)
    for wrong in (["--without-rival", "nowhere.jsonl"], ["--traces", "nowhere.jsonl"]):
        with pytest.raises(SystemExit) as stop:
            main(["locate", *minds, *wrong])
        assert stop.value.code == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
