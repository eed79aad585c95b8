"""Locate: a model set by hand whose path is cut, overridden or whole; the words, the sets, the command."""

from __future__ import annotations

import json
import os
import re
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
from reasoninterp.severance.ledger.integrate import integrate
from reasoninterp.severance.location.confidence import FEATURES, confidence, fit
from reasoninterp.severance.location.ledger_entries import ledger_of
from reasoninterp.severance.location.locate import locate
from reasoninterp.severance.location.location import RANKING, Location
from reasoninterp.severance.location.mechanism import PARTS, mechanism, words
from reasoninterp.severance.location.search import search_alone
from reasoninterp.severance.location.words import _of_set
from reasoninterp.severance.verdict import traces_for_intact
from reasoninterp.stats import Estimate
from reasoninterp.traces.contrast import Refusal
from reasoninterp.traces.io import write_traces
from tests import planted_copy
from tests.test_ledger import items as tied_items
from tests.test_ledger import pair

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
    few_swaps = locate(few, to_mind="severed")
    assert "only 12 whole-chain swaps" in few_swaps.sentences[0]
    assert "reversed by at least 20 swaps" in few_swaps.sentences[0]  # more traces, not a better base
    assert "severance score not known" in lines_of(few_swaps)[0]
    lone = Context(context.minds, context.items[:1], max_new_tokens=4)
    assert "only 1 whole-chain swap could" in locate(lone, to_mind="severed").sentences[0]


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
    assert len(lines) <= 15 and lines[0].startswith("SEVERED") and found.confidence.basis in lines[0]


def test_wrong_arguments_are_told_in_a_sentence(context: Context) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"threshold": 0.0}, "threshold"),
        ({"most_contrasts": 0}, "most_contrasts"),
        ({"to_mind": "nobody"}, "nobody"),
        ({"rival_free": [replace(FREE[0], contrast=None, swap=None)]}, "rival_free"),
    ]
    for wrong, said in cases:
        with pytest.raises(UserError, match=said):
            locate(context, **{"to_mind": "severed", **wrong})
    with pytest.raises(UserError, match="no contrast"):
        locate(Context(context.minds, [replace(i, contrast=None) for i in FREE]), to_mind="severed")


@pytest.mark.parametrize(
    ("weights", "leads", "word"),
    [
        ({"QK": 0.9, "OV": 0.1}, 1.0, "looks away"),
        ({"OV": 0.6, "QK": 0.3}, 0.98, "carries nothing"),
        ({"OV": 0.6, "QK": 0.35}, 0.0, "mixed"),  # the next one moves more than half as much
        ({"mlp": 0.45}, 0.01, "mixed"),  # under one half
        ({"QK": 0.51, "OV": 0.1}, 0.6, "undecided (mixed)"),  # just above one half, on these traces
        ({"QK": 0.49, "OV": 0.1}, 0.4, "undecided (mixed)"),  # just below
        ({"mlp": 1.0, "norms": 0.2}, 1.0, "mlp"),
        ({"embedding": 0.8}, 1.0, "embedding"),
        ({"OV": float("nan")}, float("nan"), "not known"),
        ({}, 0.0, "not known"),
    ],
)
def test_mechanism_words(weights: dict[str, float], leads: float, word: str) -> None:
    first = max(weights.values(), default=0.0)
    rows = [
        {"part": p, "ledger_share": 0.5, "leads": leads if w == first else 0.0, "n": 64}
        | {f"{name}{end}": w for name in ("restore", "cut", "weight") for end in ("", "_ci_low", "_ci_high")}
        | ({"leads": leads} if np.isnan(w) else {})
        for p, w in weights.items()
    ]
    found = words(pd.DataFrame(rows, columns=PARTS))
    assert found[0] == word
    assert found[2]


def test_what_was_read_once_is_not_read_again_and_costs_the_same(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = located(context, "severed")

    def never(*_: object, **__: object) -> None:
        raise AssertionError("made again")

    for name in ("integrate", "read_answers", "direct_contributions"):
        monkeypatch.setattr(f"reasoninterp.severance.location.locate.{name}", never)
    monkeypatch.setattr("reasoninterp.severance.gauge.aligned.align_gauges", never)
    at_layer = located(context, "severed", "layer")
    assert at_layer.integral is first.integral and at_layer.aligned == first.aligned
    for found in (first, at_layer):  # each of the ledger's backward passes had a forward one
        read = 4 * (1 + context.answer_tokens)
        assert found.costs.forward_passes == read + found.costs.evaluations + found.costs.backward_passes + 2


def test_grafts_alone_find_what_was_planted(context: Context) -> None:
    contrasts = [i.contrast for i in context.items if i.contrast is not None]
    alone = search_alone(context, contrasts, to_mind="away", level="head")
    assert {s.units for s in alone.sets.values()} == {("L0.H0",)} and set(alone.sets) == {"restore", "cut"}
    ranking = alone.ranking
    assert list(ranking.columns) == ["unit", "rank"] and ranking["unit"].iloc[0] == "L0.H0"
    assert set(ranking["unit"]) == {u.name for u in context.minds.units("head")}
    assert ranking["rank"].iloc[0] > ranking["rank"].iloc[1] and ranking["rank"].is_monotonic_decreasing
    whole = located(context, "away", "head").ranking
    still = set(whole.loc[whole["weight_change"] == 0, "unit"])
    assert still and (ranking.set_index("unit").loc[list(still), "rank"] == 0).all()
    # Two Units differ: both ends, and each way of each.
    assert alone.evaluations == 2 + 2
    nothing = search_alone(context, contrasts, to_mind="benign")
    assert nothing.sets == {} and nothing.ranking["rank"].nunique() == 1  # no loss: nothing tells Units apart


def test_the_same_weights_are_intact_at_once_and_few_traces_say_how_many_it_takes(context: Context) -> None:
    few = Context(context.minds, context.items[:3], max_new_tokens=4)
    same = locate(few, from_mind="benign", to_mind="benign", everything=True)
    assert same.verdict == "intact" and same.severance_score == 0
    assert "have the same weights (would be reversed by a weight that differs" in same.sentences[0]
    found = located(context, "benign")
    assert found.verdict == "undecided" and f"at least {traces_for_intact()} can" in found.sentences[0]
    n = traces_for_intact()
    enough, fewer = (Context(context.minds, planted_copy.items(k), max_new_tokens=4) for k in (n, n - 1))
    assert [locate(c, to_mind="benign").verdict for c in (enough, fewer)] == ["intact", "undecided"]


def test_every_share_has_an_interval_and_controls_stand_beside_the_set(context: Context) -> None:
    found = located(context, "severed")
    grafted = found.ranking[found.ranking["restore"].notna()]
    for name in ("restore", "cut", "marginal"):
        low, value, high = (grafted[f"{name}{end}"] for end in ("_ci_low", "", "_ci_high"))
        assert (low <= value).all() and (value <= high).all() and (low < high).any()
    assert found.mechanism is not None
    assert (found.mechanism.parts["n"] == N).all() and found.mechanism.parts["weight_ci_low"].notna().all()
    sets = found.tables()["sets"]
    assert sets["complete"].notna().all() and (sets["threshold"] == 0.9).all() and sets["share_ci_low"].notna().all()
    controls = [e for e in found.evidence if " random set" in e.claim]
    assert len(controls) == 2 and all(e.value < 0.1 for e in controls)
    assert any("threshold 90 %" in s and "searched on the same traces" in s for s in found.sentences)
    assert not any("nan" in s or re.search(r"\d%", s) for s in found.sentences)
    hidden = located(context, "overridden", "head")
    claims = [e.claim for e in hidden.evidence]
    assert "share of the lost follow between the two answers returned by L0.H1" in claims
    # Only L0.H1 differs: with it given back, the mind is the base itself, and its share exactly 1.
    assert hidden.restoring is not None and hidden.restoring.share_follow[:3] == (1.0, 1.0, 1.0)
    assert any("no random sets of the same size" in n for n in hidden.notes)


def test_a_set_whose_interval_crosses_the_threshold_says_so(context: Context) -> None:
    found = located(context, "severed")
    one = found.restoring
    assert one is not None
    shaken = replace(one, share=Estimate(0.91, 0.85, 0.97, N, ""), units=("L0.attn", "L1.mlp"), complete=False)
    text, _ = _of_set(found, shaken, "return")
    assert "L0.attn + L1.mlp, with their base weights given back, return 91 %" in text
    assert "interval crosses it" in text and "the search for others was broken off" in text
    assert "crosses" not in _of_set(found, one, "return")[0]


def test_traces_that_were_not_read_are_counted(context: Context) -> None:
    some = [context.items[0], *(replace(i, contrast=None) for i in context.items[1:4]), *context.items[4:]]
    refused = [Refusal(i.id, "no calculation") for i in some[1:4]]
    found = locate(Context(context.minds, some, max_new_tokens=4, refused=refused), to_mind="benign", most_contrasts=20)
    assert f"of {N - 3} traces with a contrast the first 20 were read (most_contrasts)" in found.notes
    assert f"3 of {N} traces gave no contrast (3 no calculation)" in found.notes
    assert found.to_json()["notes"] == list(found.notes)


def test_both_uses_of_a_tied_embedding_are_charged_to_the_unit_that_a_graft_moves(tmp_path: Path) -> None:
    minds = pair(tmp_path, "llama-tied")
    tied = Context(minds, tied_items(6))
    contrasts = [i.contrast for i in tied.items if i.contrast is not None]
    integral = integrate(tied, contrasts, nodes=2, max_nodes=2)
    held = integral.at("fine")
    both = held["embed"].mean() + held["unembed"].mean()
    assert abs(held["unembed"].mean()) > 1e-3
    found = mechanism(tied, contrasts, ["embed"], integral=integral)
    assert found.parts["ledger"].tolist() == [pytest.approx(both)]
    assert ledger_of(integral, minds.units("block"), "block").loc["embed", "value"] == pytest.approx(both)


def test_a_unit_that_does_not_differ_stands_before_none(context: Context) -> None:
    ranking = located(context, "overridden", "head").ranking
    still = ranking["weight_change"] == 0
    for column in ("rank_ledger", "rank_grafts", "rank_both"):
        assert still.any() and ranking.loc[still, column].max() <= ranking[column].min()


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
    # Into the same directory, a call that finds nothing to locate: of the first one nothing is left.
    main(["locate", *minds, "--out", str(out), "--quiet", "--most-contrasts", "5"])
    capsys.readouterr()
    assert {p.stem for p in (out / "tables").glob("*.parquet")} == {"location", "evidence", "answers", "rival"}
    assert not list((out / "figures").glob("location.*"))
    assert json.loads((out / "location.json").read_text())["verdict"] == "not interpretable"
    for wrong in (["--without-rival", "nowhere.jsonl"], ["--traces", "nowhere.jsonl"]):
        with pytest.raises(SystemExit) as stop:
            main(["locate", *minds, *wrong])
        assert stop.value.code == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
