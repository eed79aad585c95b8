"""Who reads which step: laws on tiny networks, worked examples, and what was planted in trained organisms.

The organisms are trained once and kept in the user's cache.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from nbclient import NotebookClient
from scipy.stats import spearmanr

from reasoninterp.errors import UserError
from reasoninterp.models.body import Body
from reasoninterp.models.context import Context, ContextSpec, Item
from reasoninterp.models.minds import Minds
from reasoninterp.patching.cut_attribution import cut_attribution
from reasoninterp.patching.metric import CLEAN, contrast_plan
from reasoninterp.patching.readers import HeadSet, answer_queries, answer_readers
from reasoninterp.patching.who_reads import MEASURES, WhoReads, kept, rank_agreement, side_by_side
from reasoninterp.running import run_study
from reasoninterp.runs import Run
from reasoninterp.studies import study_named
from reasoninterp.study import load_module
from reasoninterp.traces.contrast import contrast
from reasoninterp.traces.trace import Format, Span, Trace
from tests.tiny import save_tiny

ROOT = Path(__file__).resolve().parents[1]
LAST = "last step"
FORMAT = Format(after_question="\n", between_steps="\n", before_answer="\n= ", after_answer="\n")

# ------------------------------------------------------------------------------------------------ laws, tiny networks


def context_of(home: str) -> Context:
    """Three contrasts with chains of one to three steps, and answers of several tokens."""
    chains = [(("3 + 4", "7 + 1"), "8"), (("2 + 2", "4 + 9", "13 + 1"), "14"), (("6 + 6",), "12")]
    items = []
    for k, (steps, answer) in enumerate(chains):
        clean = Trace(f"t{k}", "add them up", steps, answer, FORMAT)
        changed = (*steps[:-1], steps[-1][:-1] + "5")
        corrupt = Trace(f"t{k}", "add them up", changed, str(int(answer) + 23), FORMAT)
        items.append(Item(clean, contrast("forced", clean, corrupt), None))
    return Context(Minds.load({"base": home}), items, rows=4)


@pytest.fixture(scope="module", params=["llama-gqa", "qwen3", "gpt2"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Context:
    return context_of(save_tiny(tmp_path_factory.mktemp("who") / request.param, request.param))


def cut_of(
    context: Context, body: Body, nodes: int, sets: list[HeadSet], *, question: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attribution of every head, and the exact loss by sets of heads, of the reading of the first step (and before)."""
    contrasts = [i.contrast for i in context.items if i.contrast is not None]
    tokens = [context.encode(c.clean) for c in contrasts]
    plan, queries = contrast_plan(context, contrasts).sides[CLEAN], [answer_queries(t) for t in tokens]
    first = [Span(0 if question else t.steps[0].start, t.steps[0].stop) for t in tokens]
    keys = [span if len(t.steps) > 1 else None for span, t in zip(first, tokens, strict=True)]
    parts = cut_attribution(body, plan, queries, keys, nodes=nodes)
    return parts, answer_readers(body, plan, queries, keys, sets).margin_change


@pytest.mark.parametrize("question", [False, True])
def test_parts_sum_to_the_exact_loss_of_cutting_every_head(tiny: Context, question: bool) -> None:
    with tiny.open("base") as body:
        parts, exact = cut_of(tiny, body, 24, [HeadSet()], question=question)
        rough, _ = cut_of(tiny, body, 1, [])
    there, absent = slice(0, 2), 2
    assert exact[there].abs().min() > 0.01
    torch.testing.assert_close(
        parts[there].sum((1, 2)), exact[there, 0], rtol=0, atol=2e-4 * float(exact[there].abs().max())
    )
    assert torch.isnan(parts[absent]).all() and torch.isnan(exact[absent]).all()
    assert (rough[there].sum((1, 2)) - exact[there, 0]).abs().max() > 1e-4  # one node is not enough: the path is curved


def test_a_head_that_writes_nothing_has_no_part(tiny: Context) -> None:
    """A head's output weights set to 0: knockout and attribution are 0 there, and not elsewhere."""
    with tiny.open("base") as body:
        layer, head = 1, 2
        module = body._bridge.blocks[layer].attn.o.original_component
        weight = module.weight
        columns = weight.shape[0] == body.d_model and type(module).__name__ != "Conv1D"
        at = slice(head * body.d_head, (head + 1) * body.d_head)
        before = weight.detach().clone()
        try:
            with torch.no_grad():
                (weight[:, at] if columns else weight[at]).zero_()
            parts, exact = cut_of(tiny, body, 4, [HeadSet((layer,), (head,)), HeadSet((layer,), (head + 1,))])
        finally:
            with torch.no_grad():
                weight.copy_(before)
    assert parts[:2, layer, head].abs().max() < 1e-6 < 1e-4 < parts[:2, layer, head + 1].abs().max()
    assert exact[:2, 0].abs().max() < 1e-5 < 1e-4 < exact[:2, 1].abs().max()


def test_no_nodes_are_refused(tiny: Context) -> None:
    with tiny.open("base") as body, pytest.raises(UserError, match="nodes"):
        cut_of(tiny, body, 0, [])


# -------------------------------------------------------------------------------------------------- worked by hand


def test_rank_agreement_by_hand() -> None:
    exact = np.array([[1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0]])
    swapped = np.array([[0.1, 0.2, 0.5, 0.4], [0.1, 0.2, 0.5, 0.4]])
    assert rank_agreement(exact, exact).value == pytest.approx(1.0)
    assert rank_agreement(swapped, exact).value == pytest.approx(0.8)  # 1 − 6·(1 + 1) / (4·15)
    assert rank_agreement(-swapped, exact).value == pytest.approx(0.8)  # sizes are ranked
    assert rank_agreement(exact[:, ::-1], exact).value == pytest.approx(-1.0)
    assert np.isnan(rank_agreement(np.ones((2, 4)), exact).value)
    assert np.isnan(rank_agreement(exact[:, :2], exact[:, :2]).value)
    with pytest.raises(ValueError, match="pairs"):
        rank_agreement(exact, exact[:1])


def test_rank_agreement_is_spearmans_of_the_means_and_its_interval_resamples_traces() -> None:
    rng = np.random.default_rng(0)
    truth = np.array([0.0, 1, 1, 2, 5, 9])
    a, b = truth + rng.normal(size=(40, 6)), truth + rng.normal(size=(40, 6))
    found = rank_agreement(a, b)
    assert found.n == 40
    assert rank_agreement(a, 3 * a).ci_low == pytest.approx(1.0)  # both are read on the same resampled traces
    assert found.value == pytest.approx(spearmanr(np.abs(a.mean(0)), np.abs(b.mean(0))).statistic)
    draws = rng.integers(40, size=(2000, 40))
    each = [spearmanr(np.abs(a[d].mean(0)), np.abs(b[d].mean(0))).statistic for d in draws]
    assert (found.ci_low, found.ci_high) == pytest.approx(tuple(np.quantile(each, [0.025, 0.975])), abs=0.04)


def test_null_centres_on_zero() -> None:
    rng = np.random.default_rng(1)
    found = [rank_agreement(rng.normal(size=(1, 9)), rng.normal(size=(1, 9))).value for _ in range(400)]
    assert abs(np.mean(found)) < 3 * np.std(found) / 20


def test_kept_by_hand() -> None:
    before = np.array([[2.0, 1.0], [4.0, -1.0], [3.0, 0.1]])
    value, low, high = kept(before, before * np.array([0.5, 1.0]))
    assert (value[0], low[0], high[0]) == pytest.approx((0.5, 0.5, 0.5))
    assert np.isnan([value[1], low[1], high[1]]).all()  # the mean before is not safely away from 0


def test_rows_are_joined_by_cell_and_the_gradient_turned() -> None:
    cell = {"mind": "base", "trace": "t", "layer": 0, "head": 1, "column_index": 1}
    mine = pd.DataFrame([{**cell, "column": "step 1", "attribution": 1.0}])
    cut = pd.DataFrame([{**cell, "margin_change": 2.0}, {**cell, "head": -1, "margin_change": 9.0}])
    seen = {k: v for k, v in cell.items() if k != "column_index"} | {"what": "map", "source_index": 1}
    seen |= {"plain": 0.5, "value_share": 0.4, "value_weighted": 3.0, "gradient": -7.0}
    asked = pd.DataFrame([{**seen, "destination": "answer position"}, {**seen, "destination": "step 2", "plain": 9.0}])
    (row,) = side_by_side(mine, cut, asked).to_dict("records")
    assert [row[m] for m in MEASURES] == [2.0, 1.0, 7.0, 0.5, 0.4, 3.0]
    with pytest.raises(UserError, match="no heads"):
        side_by_side(mine, cut[cut["head"] < 0], asked)
    with pytest.raises(UserError, match="none of its traces"):
        side_by_side(mine.assign(trace="u"), cut, asked)


# ------------------------------------------------------------------------------------------ planted in the organisms


@pytest.fixture(scope="module")
def script() -> Any:
    return load_module(ROOT / "experiments" / "causal_path.py")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("causal")


@pytest.fixture(scope="module")
def first(script: Any, home: Path) -> Run:
    """The first task: base against severed."""
    (run,) = script.run(home, only=("severed",), limit=32, quiet=True, figures=False)
    return run


@pytest.fixture(scope="module")
def second(home: Path) -> Run:
    """The second task: its base alone."""
    from reasoninterp.organisms import make

    make(home / "organisms", only=["largest-base"], progress=False)
    traces = str(home / "organisms" / "traces" / "largest-id.jsonl")
    context = ContextSpec({"base": str(home / "organisms" / "largest-base")}, traces, limit=32).load()
    run = Run.open(home / "second", {})
    context.run = run
    for study in ("routes", "knockout", "attention-map", "who-reads"):
        run_study(study_named(study)(), context, run, quiet=True, figures=False)
    return run


def of(table: pd.DataFrame, **where: Any) -> pd.DataFrame:
    for name, value in where.items():
        table = table[table[name] == value]
    return table


def carrier(run: Run) -> pd.Series:
    table = of(run.table("who_reads"), mind="base", measure="knockout", column=LAST)
    return table.loc[table["value"].idxmax()]


def test_only_the_last_step_is_a_direct_cause_in_the_first_task(first: Run) -> None:
    for direction in ("noising", "denoising"):
        routes = of(first.table("routes"), mind="base", direction=direction).set_index(["from", "via"])["value"]
        stream = of(first.table("residual"), mind="base", direction=direction, layer=0).set_index("column")["value"]
        direct = routes.xs("direct", level="via")
        assert set(direct.index) > {"step 1", "step 2", LAST}
        assert direct[LAST] > 5
        assert direct.drop(LAST).abs().max() < 0.05 * direct[LAST]
        assert routes.xs("total", level="via").drop(LAST).abs().max() < 0.05 * direct[LAST]
        assert stream.drop(LAST).abs().max() < 0.05 * stream[LAST]
    layers = of(first.table("knockout"), mind="base", measure="margin_change", scope="layer", layer=0)
    cut = layers.set_index("column")["value"].drop("question")
    assert cut.drop(LAST).abs().max() < 0.05 * cut[LAST]


def test_earlier_steps_act_through_what_is_written_after_them(first: Run) -> None:
    """Each changed step moves the next step's text as far as all the text before does; written anew, the answer too."""
    written = of(first.table("written"), mind="base", direction="noising").set_index(["from", "to"])
    assert written.loc[("step 1", "step 2"), "share"] > 0.9
    assert written.loc[("step 2", "step 3"), "share"] > 0.9
    assert abs(written.loc[("step 1", "step 3"), "share"]) < 0.1
    anew = of(first.table("routes"), mind="base", direction="noising").set_index(["from", "via"])
    for step in ("step 1", "step 2"):
        whole, held = anew.loc[(step, "rewritten"), "value"], anew.loc[(step, "total"), "value"]
        assert whole > 0.5 * anew.loc[(LAST, "total"), "value"]
        assert abs(held) < 0.05 * whole


def test_every_step_is_a_direct_cause_in_the_second_task(second: Run) -> None:
    routes = of(second.table("routes"), mind="base", direction="noising")
    direct = of(routes, via="direct").set_index("from")
    assert (direct.loc[["step 1", "step 2", LAST], "ci_low"] > 0.2 * direct["value"].max()).all()
    assert direct["value"].min() > 0.2 * direct["value"].max()
    cut = of(second.table("knockout"), mind="base", measure="margin_change", scope="layer", layer=0).set_index("column")
    assert (cut.loc[["step 1", "step 2", LAST], "ci_low"] > 0).all()


def test_one_head_carries_the_last_step_in_the_base_and_loses_it_in_severed(first: Run) -> None:
    lead = carrier(first)
    heads = of(first.table("who_reads"), mind="base", measure="knockout", column=LAST)
    others = heads[heads["site"] != lead["site"]]
    assert lead["p_corrected"] < 0.05
    assert lead["ci_low"] > others["value"].max()
    change = of(first.table("who_reads_change"), measure="knockout", column=LAST)
    assert change.loc[change["change"].idxmin(), "site"] == lead["site"]
    assert of(change, site=lead["site"])["change_ci_high"].iloc[0] < -2


def test_attention_alone_misleads_in_severed(first: Run) -> None:
    """The carrier goes on looking at what it no longer reads."""
    lead = carrier(first)
    left = of(first.table("who_reads_change"), site=lead["site"], column=LAST).set_index("measure")
    assert left.loc["attention", "kept_ci_low"] > 0.8
    assert left.loc["value_share", "kept_ci_low"] > 0.8
    for measure in ("knockout", "attribution"):
        assert left.loc[measure, "kept_ci_high"] < 0.2
    agreement = of(first.table("who_reads_agreement"), column=LAST).set_index(["mind", "measure"])
    assert agreement.loc[("base", "attribution"), "value"] > 0.9
    assert agreement.loc[("base", "attribution"), "value"] > agreement.loc[("base", "attention"), "value"]
    assert (
        agreement.loc[("tuned − base", "attribution"), "ci_low"] > agreement.loc[("tuned − base", "attention"), "value"]
    )
    assert (agreement["top_knockout"] == lead["site"]).all()


def test_tables_say_n_and_intervals(first: Run) -> None:
    table = first.table("who_reads")
    assert set(table["measure"]) == set(MEASURES)
    assert (table["n"] > 0).all()
    assert ((table["ci_low"] <= table["value"] + 1e-9) & (table["value"] <= table["ci_high"] + 1e-9)).all()
    signed = table["measure"].isin(["knockout", "attribution", "gradient"])
    assert table.loc[signed, "p"].notna().all() and table.loc[~signed, "p"].isna().all()
    agreement = first.table("who_reads_agreement")
    assert (agreement["n_heads"] == 8).all()
    assert agreement.loc[agreement["column"] == LAST, "n"].min() == 32


def test_one_mind_alone_has_no_changes(second: Run) -> None:
    assert len(second.table("who_reads_change")) == 0
    assert set(second.table("who_reads_agreement")["mind"]) == {"base"}
    figures = WhoReads().draw({n: second.table(n) for n in ("who_reads", "who_reads_agreement", "who_reads_change")})
    assert set(figures) == {"who-reads", "who-reads-steps", "who-reads-heads"}


def test_summary_says_what_was_planted(script: Any, first: Run) -> None:
    head, severed = script.summary([first])
    assert carrier(first)["site"] in head and "last step 100 %" in head and "step 1 0 %" in head
    assert "severed" in severed


def test_the_notebook_runs(first: Run, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "REASONINTERP_CAUSAL_PATH", str(home))
    path = ROOT / "notebooks" / "causal_path.ipynb"
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}
    ).execute()
    drawn = [o for cell in notebook.cells for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]
    assert len(drawn) >= 7
