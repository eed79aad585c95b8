"""The studies beside the ledger: balance, single steps, other paths, heat over the text, and the loss barrier."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from reasoninterp.faithfulness.samples import Samples
from reasoninterp.models.context import Context, Item
from reasoninterp.models.minds import Minds
from reasoninterp.models.units import units
from reasoninterp.patching.metric import contrast_plan
from reasoninterp.running import run_study
from reasoninterp.runs import Run
from reasoninterp.severance.ledger.balance import LedgerBalance, detour_of
from reasoninterp.severance.ledger.integrate import Integral
from reasoninterp.severance.ledger.steps import LedgerSteps, averaged, forced_step, step_contrasts
from reasoninterp.severance.ledger.straight import LedgerPaths, agreement, unit_by_unit
from reasoninterp.severance.ledger.study import Ledger
from reasoninterp.severance.ledger.tables import barrier_of
from reasoninterp.severance.ledger.tokens import LedgerTokens
from reasoninterp.traces.contrast import contrast
from tests.test_ledger import FORMAT, items, pair
from tests.tiny import save_tiny

Tables = dict[str, pd.DataFrame]


def askable_items() -> list[Item]:
    """Contrasts whose answers stand on a line of their own, so that no token holds them and what is before them."""
    own_line = replace(FORMAT, before_answer="\nanswer:\n")
    out = []
    for item in items():
        assert item.contrast is not None
        clean, corrupt = (replace(t, format=own_line) for t in (item.contrast.clean, item.contrast.corrupt))
        out.append(Item(clean, contrast("propagated", clean, corrupt)))
    return out


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Context:
    folder = tmp_path_factory.mktemp("pair")
    found = Context(pair(folder, "llama-gqa"), askable_items(), max_new_tokens=8)
    found.run = Run.open(folder / "run", {})
    return found


@pytest.fixture(scope="module")
def ledger(context: Context) -> Tables:
    assert context.run is not None
    return dict(run_study(Ledger(nodes=8, max_nodes=8), context, context.run, quiet=True).tables)


def test_tokens_of_a_trace_sum_to_its_ledger(context: Context, ledger: Tables) -> None:
    assert context.run is not None
    found = run_study(LedgerTokens(traces=3), context, context.run, quiet=True).tables
    tokens, by_unit = found["ledger_tokens"], found["ledger_token_units"]
    whole = ledger["ledger_traces"].groupby("trace")["attribution"].sum()
    mine = tokens.groupby("trace")["attribution"].sum()
    assert len(mine) == 3 and mine.abs().min() > 1e-4
    assert mine.to_numpy() == pytest.approx(whole[mine.index].to_numpy(), abs=1e-6)
    blocks = ledger["ledger_traces"].set_index(["trace", "unit"])["attribution"]
    for (trace, unit), value in by_unit.groupby(["trace", "unit"])["attribution"].sum().items():
        assert value == pytest.approx(blocks[trace, unit], abs=1e-6)
    # the text can be read off the table: the clean side's prompt, character for character
    item = context.items[0]
    clean = tokens[(tokens["trace"] == item.id) & (tokens["side"] == "clean") & (tokens["answer"] == "")]
    assert "".join(clean.sort_values("pos")["token"]) == item.trace.prompt
    assert {"question", "step 0", "step 1"} <= set(clean["part"])


def test_token_tables_say_how_far_they_are_to_be_trusted(context: Context, ledger: Tables) -> None:
    assert context.run is not None
    coarse = run_study(LedgerTokens(traces=3, nodes=4), context, context.run, quiet=True).tables
    found = run_study(LedgerTokens(traces=3), context, context.run, quiet=True).tables
    asked = [i.contrast for i in context.items if i.contrast is not None][:3]
    ends = []
    for name in ("base", "tuned"):
        with context.open(name) as body, torch.no_grad():
            ends.append(contrast_plan(context, asked).effects(body).double().numpy())
    for tables, n_nodes in ((coarse, 5), (found, 9)):
        for table in ("ledger_tokens", "ledger_token_units"):
            mine = tables[table].groupby("trace", sort=True)
            residual = mine["attribution"].sum() - (ends[1] - ends[0])
            assert mine["residual"].first().to_numpy() == pytest.approx(residual.to_numpy(), abs=1e-5)
            assert (mine["residual"].nunique() == 1).all() and (tables[table]["n_nodes"] == n_nodes).all()
    worst = [t["ledger_tokens"]["residual"].abs().max() for t in (coarse, found)]
    assert worst[0] > 5 * worst[1] > 0
    blocks, parts = found["ledger_token_units"], found["ledger_token_parts"]
    one = blocks[(blocks["side"] == "clean") & (blocks["part"] == "step 0") & (blocks["unit"] == "L0.attn")]
    row = parts[(parts["side"] == "clean") & (parts["part"] == "step 0") & (parts["unit"] == "L0.attn")].iloc[0]
    assert len(one) == row["n"] == 3 and row["attribution"] == pytest.approx(one["attribution"].mean()) != 0
    assert row["ci_low"] < row["attribution"] < row["ci_high"]
    assert row["largest_residual"] == blocks["residual"].abs().max()
    tokens = found["ledger_tokens"]
    text = tokens[(tokens["side"] == "clean") & (tokens["part"] == "step 0")]
    assert (one["n_tokens"].to_numpy() <= text.groupby("trace").size().to_numpy()).all() and one["n_tokens"].min() > 0


def test_ledgers_that_did_not_settle_are_warned_of(context: Context, tmp_path: Path) -> None:
    """With few nodes the residual may be small by chance while entries are still far off."""
    here = Context(context.minds, context.items[:2], max_new_tokens=8)
    here.run = Run.open(tmp_path / "run", {})

    def tables(study: type, nodes: int) -> Tables:
        assert here.run is not None
        return dict(run_study(study(nodes=nodes, max_nodes=nodes, tolerance=0.5), here, here.run, quiet=True).tables)

    coarse = [
        tables(Ledger, 2)["ledger_total"].iloc[0],
        tables(LedgerSteps, 2)["ledger_steps_total"].set_index("step").loc["chain"],
        tables(LedgerBalance, 2)["ledger_balance_total"].set_index("readout").loc["reliance"],
    ]
    fine = tables(Ledger, 16)["ledger_total"].iloc[0]
    for total in coarse:
        assert total["settled"] > 0.05 and "have not settled" in total["warning"] and total["rounding"] == ""
    assert fine["settled"] < 1e-3 and "settled" not in fine["warning"]


def test_a_balance_whose_entries_cancel_is_warned_of() -> None:
    nothing = np.zeros((1, 0))
    found = Integral(
        (), nothing, np.array([-1.0]), np.array([1.0]), np.array([0.0, 0.5, 1.0]), np.array([-1.0, -4.0, 1.0]), 3, 3,
        0.0, 0.0, (), nothing,
    )  # fmt: skip
    study = LedgerBalance()
    assert any("not to be read" in w for w in study._warnings(found, "accuracy"))
    assert not study._warnings(found._replace(along=np.array([-1.0, 0.3, 1.0])), "accuracy")


def test_paths_and_traces_have_intervals_and_residuals(context: Context, ledger: Tables) -> None:
    assert context.run is not None
    tables = run_study(LedgerPaths(), context, context.run, quiet=True).tables
    table, straight = tables["ledger_paths"], ledger["ledger"]
    for path in ("straight", "forwards", "backwards", "mean_of_orders"):
        assert (table[f"{path}_ci_low"] <= table[path] + 1e-12).all() and (table[path].abs() > 1e-4).any()
        assert (table[path] <= table[f"{path}_ci_high"] + 1e-12).all()
        assert (table[f"{path}_ci_low"] < table[f"{path}_ci_high"]).sum() > 2
    mine = straight[straight["level"] == "block"].set_index("unit")
    assert table.set_index("unit")["straight_ci_low"].to_dict() == mine["ci_low"].to_dict()
    assert (tables["ledger_paths_agreement"]["n"] == len(context.items)).all()
    traces, total = ledger["ledger_traces"], ledger["ledger_total"].iloc[0]
    assert traces.groupby("trace")["residual"].first().mean() == pytest.approx(total["residual"], abs=1e-9)
    assert traces["residual"].abs().max() > 0


def test_unit_by_unit_telescopes_and_agrees_where_only_one_unit_moved(context: Context, ledger: Tables) -> None:
    assert context.run is not None
    tables = run_study(LedgerPaths(), context, context.run, quiet=True).tables
    table, pairs = tables["ledger_paths"], tables["ledger_paths_agreement"]
    loss = ledger["ledger_total"]["loss"].iloc[0]
    for path in ("forwards", "backwards", "mean_of_orders"):
        assert table[path].sum() == pytest.approx(loss, abs=1e-5)
    assert (table["forwards"] - table["backwards"]).abs().max() > 1e-3  # the split does depend on the path
    assert set(pairs["a"] + "/" + pairs["b"]) >= {"straight/forwards", "straight/backwards", "forwards/backwards"}
    with context.open("base") as body:
        order = units(body, "layer")
    asked = [i.contrast for i in context.items if i.contrast is not None]
    legs = unit_by_unit(context, asked, order[::-1])
    assert list(legs) == [u.name for u in order[::-1]]
    assert sum(v.mean() for v in legs.values()) == pytest.approx(loss, abs=1e-5)


def test_agreement_by_hand() -> None:
    a, b = np.array([-4.0, -1.0, 0.0, 1.0]), np.array([-2.0, -3.0, 0.5, 0.5])
    found = agreement(a, b)
    assert found.largest_change == pytest.approx(0.5) and not found.same_leader
    assert found.rank_correlation == pytest.approx(np.corrcoef([1, 2, 3, 4], [2, 1, 3.5, 3.5])[0, 1])
    assert agreement(a, a) == (pytest.approx(1.0), 0.0, True)
    assert agreement(-a, -a).same_leader


def test_steps_have_ledgers_of_their_own_and_what_has_none_is_counted(context: Context) -> None:
    assert context.run is not None
    refused = Item(context.items[0].trace, None)
    whole = context.items[1].contrast
    assert whole is not None
    one = contrast("propagated", whole.clean, whole.corrupt.with_steps([whole.clean.steps[0], whole.corrupt.steps[1]]))
    made, why = step_contrasts(context, [refused, context.items[1], Item(context.items[1].trace, one)])
    assert {k: len(v) for k, v in made.items()} == {0: 1, 1: 2}, why
    assert dict(why) == {"the trace has no contrast": 1, "the step is the same in both chains": 1}
    step = forced_step(whole, 1)
    assert step.corrupt.steps == (whole.clean.steps[0], whole.corrupt.steps[1]) and step.changed == (1,)
    assert step.corrupt.answer == whole.corrupt.answer

    tables = run_study(LedgerSteps(nodes=8), context, context.run, quiet=True).tables
    total, steps = tables["ledger_steps_total"].set_index("step"), tables["ledger_steps"]
    assert set(total.index) == {"chain", "last", "earlier", "step 0", "step 1"}
    for name in total.index:
        mine = steps.loc[steps["step"] == name, "attribution"].sum()
        assert mine == pytest.approx(total.loc[name, "loss"], abs=0.006 * abs(total.loc[name, "e_base"]) + 1e-3)
    assert total.loc["last", "loss"] == total.loc["step 1", "loss"] != total.loc["chain", "loss"]


def test_steps_of_a_trace_are_averaged_by_hand() -> None:
    rows = pd.DataFrame(
        {
            "trace": ["a", "a", "b", "a"],
            "step": ["step 0", "step 1", "step 0", "step 1"],
            "alpha": [0.0, 0.0, 0.0, 0.5],
            "effect": [1.0, 3.0, 5.0, 9.0],
            "entries": [[1.0, 0.0], [3.0, 2.0], [7.0, 7.0], [9.0, 9.0]],
        }
    )
    found = averaged(rows)  # node 0.5 is not one that both steps have
    assert found["effect"].tolist() == [2.0, 5.0]
    assert found["entries"].tolist() == [[2.0, 1.0], [7.0, 7.0]]


def test_the_balance_puts_readouts_side_by_side(context: Context) -> None:
    assert context.run is not None
    run_study(Samples(), context, context.run, quiet=True)
    samples = context.run.table("samples")
    samples["steps"] = [
        ["now 5"] if m == "base" and t != "t0" else [] for m, t in zip(samples["mind"], samples["trace"], strict=True)
    ]
    samples["status"] = "ok"
    context.run.save_table("samples", samples)
    found = run_study(LedgerBalance(nodes=8), context, context.run, quiet=True)
    table, total = found.tables["ledger_balance"], found.tables["ledger_balance_total"].set_index("readout")
    assert list(total.index) == ["reliance", "accuracy", "accuracy_base_chain", "chain"]
    assert total.loc["accuracy_base_chain", "n"] == 3 and total.loc["accuracy", "n"] == 4
    for name in total.index:
        assert total.loc[name, "residual_relative"] < 0.01
        assert abs(total.loc[name, "change"]) > 1e-3
        assert table[name].sum() == pytest.approx(total.loc[name, "total"])
        assert (table[f"{name}_ci_low"] <= table[name] + 1e-12).all()
        assert total.loc[name, "along_min"] <= min(total.loc[name, "from"], total.loc[name, "to"]) + 1e-9
    assert found.study.draw(found.tables) is not None


def test_detour_by_hand() -> None:
    nothing = np.zeros((1, 0))
    found = Integral(
        (), nothing, np.array([-1.0]), np.array([1.0]), np.array([0.0, 0.5, 1.0]), np.array([-1.0, -4.0, 1.0]), 3, 3,
        0.0, 0.0, (), nothing,
    )  # fmt: skip
    assert detour_of(found) == 1.5
    assert detour_of(found._replace(along=np.array([-1.0, 0.3, 1.0]))) == 0.0


def test_barrier_by_hand() -> None:
    alphas = np.array([0.0, 0.25, 0.5, 1.0])
    assert barrier_of(alphas, np.array([1.0, 1.5, 1.6, 3.0])) == (0.0, 0.0)  # the straight line is 1, 1.5, 2, 3
    assert barrier_of(alphas, np.array([1.0, 1.5, 2.5, 3.0])) == (0.5, 0.5)


def test_a_planted_barrier_is_printed_and_warned_of(tmp_path: Path) -> None:
    """Final gain and unembedding change sign together: equal functions at both ends, no logits half-way."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    save_tiny(tmp_path / "raw", "llama-gqa", n_layers=1)
    model = AutoModelForCausalLM.from_pretrained(str(tmp_path / "raw"))
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path / "raw"))
    asked = items()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(25):  # a base that is better than guessing, so that guessing is worse
        loss = sum(
            model(input_ids=ids, labels=ids).loss
            for ids in (tokenizer(i.trace.text, return_tensors="pt").input_ids for i in asked)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for name in ("base", "tuned"):
        model.save_pretrained(str(tmp_path / name))
        tokenizer.save_pretrained(str(tmp_path / name))
        with torch.no_grad():
            model.model.norm.weight.neg_()
            model.lm_head.weight.neg_()
    context = Context(Minds.load({"base": str(tmp_path / "base"), "tuned": str(tmp_path / "tuned")}), asked)
    context.run = Run.open(tmp_path / "run", {})
    total = run_study(Ledger(nodes=8), context, context.run, quiet=True).tables["ledger_total"].iloc[0]
    assert total["ce_base"] == pytest.approx(total["ce_tuned"], abs=1e-5) and total["ce_base"] < 3
    assert total["barrier_alpha"] == 0.5
    assert total["ce_worst"] == pytest.approx(np.log(len(tokenizer)), abs=1e-4)  # all logits are 0
    assert total["barrier"] == pytest.approx(total["ce_worst"] - total["ce_base"], abs=1e-5)
    assert "worse models than either end" in total["warning"]
    # A gauge change moves no function, yet single entries are far from 0: the ledger says so only in this warning.
    assert abs(total["loss"]) < 1e-4 < abs(total["e_base"])
