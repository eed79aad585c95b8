"""Repair: what a repaired mind is bit for bit, what is saved of it, and a repair whose truth is planted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from nbclient import NotebookClient
from torch import Tensor

from reasoninterp.errors import UserError
from reasoninterp.models.context import Context, ContextSpec, Item
from reasoninterp.models.minds import Handle, Minds, blend, graft, mind
from reasoninterp.models.saving import save_mind
from reasoninterp.models.units import unit_named
from reasoninterp.running import run_study
from reasoninterp.runs import Run
from reasoninterp.severance.grafts.moves import Moves, Reader, unit_norms
from reasoninterp.severance.grafts.repair import (
    RANDOM,
    SAME_NORM,
    SET,
    WHOLE,
    candidates,
    recommend,
    repaired,
    scores,
    smallest_restoring,
    units_of,
)
from reasoninterp.severance.grafts.repair_command import repair_command
from reasoninterp.severance.grafts.repair_study import HERE, Repair, draw_repair, repair_table
from reasoninterp.severance.ledger import integrate as ledger_integrate
from reasoninterp.severance.ledger.integrate import integrate
from reasoninterp.study import load_module
from reasoninterp.traces.contrast import contrast
from reasoninterp.traces.trace import Format, Trace
from tests.test_moves import losing
from tests.test_smallest import Regrouped, regrouped_pair
from tests.tiny import save_lora, save_tiny, save_tuned

FORMAT = Format(after_question="\n", between_steps="\n", before_answer="\nanswer ", after_answer="\n")
ROOT = Path(__file__).resolve().parents[1]
FAMILIES = ("llama-gqa", "qwen3", "gpt2")


def items(n: int = 5) -> list[Item]:
    """Contrasts that serve as swaps too."""
    out = []
    for k in range(n):
        clean = Trace(f"t{k}", f"start with {k}", (f"now {k + 1}", f"now {k + 3}"), str(k + 4), FORMAT)
        corrupt = clean.with_steps((f"now {k + 2}", f"now {k + 5}"), answer=f"{k + 5}")
        found = contrast("propagated", clean, corrupt)
        out.append(Item(clean, found, found))
    return out


def pair(folder: Path, family: str = "llama-gqa") -> Minds:
    save_tiny(folder / "base", family, n_layers=2)
    save_tuned(folder / "base", folder / "tuned", scale=0.1)
    return Minds.load({"base": str(folder / "base"), "tuned": str(folder / "tuned")})


def context_of(minds: Minds) -> Context:
    return Context(minds, items(), rows=8, max_new_tokens=8)


def planted(folder: Path, family: str, unit: str) -> Minds:
    """A base, and a tuned mind that differs from it in one Unit alone."""
    minds = pair(folder, family)
    broken = graft("base", "tuned", [unit_named(minds.body, unit)])
    save_mind(minds, broken, folder / "broken", like="tuned")
    return Minds.load({"base": str(folder / "base"), "tuned": str(folder / "broken")})


def weights(minds: Minds, handle: str | Handle) -> dict[str, Tensor]:
    """What really is in the body's parameters."""
    with minds.at(handle):
        return {name: p.detach().clone() for name, p in minds._params.items()}


# ------------------------------------------------------------------------------------------------ laws of the weights


@pytest.mark.parametrize("family", FAMILIES)
def test_alpha_one_is_tuned_and_alpha_zero_on_all_units_is_base(tmp_path: Path, family: str) -> None:
    minds = pair(tmp_path, family)
    context = context_of(minds)
    base, tuned = weights(minds, "base"), weights(minds, "tuned")
    assert all(not torch.equal(base[name], tuned[name]) for name in base)
    for level in ("circuit", "layer"):
        every, _ = units_of(context, level)
        for alpha, expected in ((1.0, tuned), (0.0, base)):
            found = weights(minds, repaired(every, alpha))
            assert all(torch.equal(found[name], expected[name]) for name in expected), (level, alpha)
        half = weights(minds, repaired(every, 0.5))
        whole = weights(minds, blend("base", "tuned", 0.5))
        assert all(torch.equal(half[name], whole[name]) for name in whole)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_units_are_scaled_and_all_others_keep_their_bits(tmp_path: Path, family: str) -> None:
    minds = pair(tmp_path, family)
    every, chosen = units_of(context_of(minds), "circuit", [f"L1.{'H' if family == 'gpt2' else 'G'}1.OV", "L0.mlp"])
    assert len(chosen) == 2
    base, tuned = weights(minds, "base"), weights(minds, "tuned")
    found = weights(minds, repaired(chosen, 0.25))
    for unit in every:
        for part in unit.parts:
            now, was, after = (part.of(w[part.param]) for w in (found, base, tuned))
            if unit in chosen:
                torch.testing.assert_close(now, was + 0.25 * (after - was))
                assert not torch.equal(now, was) and not torch.equal(now, after)
            else:
                assert torch.equal(now, after), unit.name


def test_weight_changes_are_the_norms_of_the_difference(tmp_path: Path) -> None:
    minds = pair(tmp_path)
    every, _ = units_of(context_of(minds), "head")
    found = unit_norms(context_of(minds), every, "base", "tuned")[0]
    base, tuned = weights(minds, "base"), weights(minds, "tuned")
    total = sum(float((tuned[n] - base[n]).double().square().sum()) for n in base)
    assert sum(v**2 for v in found.values()) == pytest.approx(total, rel=1e-6)
    norms = [n for n in base if "layers.0." in n and "norm" in n]
    alone = sum(float((tuned[n] - base[n]).double().square().sum()) for n in norms) ** 0.5
    assert found["L0.norms"] == pytest.approx(alone, rel=1e-6) and alone > 0


def test_alpha_outside_is_refused() -> None:
    with pytest.raises(UserError, match=r"alpha 1\.5"):
        repaired([], 1.5)


# ------------------------------------------------------------------------------------------------------------- saving


def plain_logits(path: Path, ids: Tensor) -> Tensor:
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"output_loading_info": True, "attn_implementation": "eager"}
    found: Any = AutoModelForCausalLM.from_pretrained(str(path), **options)
    model, info = found
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        logits: Tensor = model.eval()(input_ids=ids).logits
    return logits


@pytest.mark.parametrize("family", ["llama-gqa", "llama-tied", "qwen3", "gpt2"])
def test_what_is_saved_has_the_logits_of_what_is_in_memory(tmp_path: Path, family: str) -> None:
    minds = pair(tmp_path, family)
    handle = repaired(units_of(context_of(minds), "block", ["embed", "L0.attn", "L1.mlp"])[1], 0.3)
    path = save_mind(minds, handle, tmp_path / "made" / "repaired")
    ids = torch.randint(minds.body.n_vocab_shared, (2, 9), generator=torch.Generator().manual_seed(1))
    saved = plain_logits(path, ids)
    for other in ("base", "tuned"):
        with minds.at(other) as body:
            assert (body.forward(ids) - saved).abs().max() > 0.05
    with minds.at(handle) as body:
        torch.testing.assert_close(body.forward(ids), saved, atol=1e-4, rtol=1e-4)
    names = set(json.loads((tmp_path / "tuned" / "config.json").read_text()))
    assert set(json.loads((path / "config.json").read_text())) == names
    again = Minds.load({"base": str(tmp_path / "base"), "tuned": str(path)})
    mine, kept = weights(again, "tuned"), weights(minds, handle)
    assert set(mine) == set(kept) and all(torch.equal(mine[n], kept[n]) for n in kept)
    assert again.tokenizer("tuned").get_vocab() == minds.tokenizer("tuned").get_vocab()


@pytest.mark.parametrize("family", ["llama-gqa", "gpt2"])
def test_rows_of_the_vocabulary_that_tuned_has_are_kept(tmp_path: Path, family: str) -> None:
    save_tiny(tmp_path / "base", family, n_layers=1)
    save_tuned(tmp_path / "base", tmp_path / "tuned", scale=0.1, resize=3)
    minds = Minds.load({"base": str(tmp_path / "base"), "tuned": str(tmp_path / "tuned")})
    every, _ = units_of(context_of(minds), "block")
    path = save_mind(minds, repaired(every, 0.0), tmp_path / "repaired")
    n = minds.body.n_vocab_shared
    ids = torch.arange(n - 8, n).reshape(2, 4)
    torch.testing.assert_close(plain_logits(path, ids)[..., :n], plain_logits(tmp_path / "base", ids))
    assert plain_logits(path, ids).shape[-1] == n + 3
    more = torch.tensor([[n + 2, 5]])  # a token that only the tuned mind knows
    assert torch.isfinite(plain_logits(path, more)).all()
    from safetensors.torch import load_file

    name = "transformer.wte.weight" if family == "gpt2" else "model.embed_tokens.weight"
    saved, tuned, base = (
        load_file(str(tmp_path / f / "model.safetensors"))[name] for f in ("repaired", "tuned", "base")
    )
    assert torch.equal(saved[n:], tuned[n:]) and tuned[n:].abs().min() > 0
    assert torch.equal(saved[:n], base)
    smaller = save_mind(minds, blend("base", "tuned", 0.5), tmp_path / "smaller", like="base")
    assert plain_logits(smaller, ids).shape[-1] == n


@pytest.mark.parametrize("family", ["llama-gqa", "gpt2"])
def test_an_adapter_is_saved_merged(tmp_path: Path, family: str) -> None:
    save_tiny(tmp_path / "base", family, n_layers=2)
    save_lora(tmp_path / "base", tmp_path / "lora", targets=["c_attn"] if family == "gpt2" else ["q_proj", "v_proj"])
    minds = Minds.load({"base": str(tmp_path / "base"), "tuned": str(tmp_path / "lora")})
    handle = repaired(units_of(context_of(minds), "block", ["L0.attn"])[1])
    path = save_mind(minds, handle, tmp_path / "repaired")
    assert not (path / "adapter_config.json").exists()
    ids = torch.arange(20).reshape(2, 10)
    with minds.at(handle) as body:
        expected = body.forward(ids)
    torch.testing.assert_close(plain_logits(path, ids), expected, atol=1e-4, rtol=1e-4)
    with minds.at("base") as body:
        assert (body.forward(ids) - expected).abs().max() > 0.01  # layer 1 keeps its adapter


def test_bf16_is_saved_as_bf16(tmp_path: Path) -> None:
    save_tiny(tmp_path / "base", n_layers=1)
    save_tuned(tmp_path / "base", tmp_path / "tuned")
    sources = {"base": str(tmp_path / "base"), "tuned": str(tmp_path / "tuned")}
    minds = Minds.load(sources, dtype="bfloat16")
    path = save_mind(minds, blend("base", "tuned", 0.5), tmp_path / "half")
    assert json.loads((path / "config.json").read_text())["dtype"] == "bfloat16"
    again = Minds.load({"base": sources["base"], "half": str(path)}, dtype="bfloat16")
    mine, kept = weights(again, "half"), weights(minds, blend("base", "tuned", 0.5))
    assert all(torch.equal(mine[n], kept[n]) for n in kept)


def test_nothing_is_overwritten_and_nothing_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    minds = pair(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        save_mind(minds, "tuned", tmp_path / "full")
    with pytest.raises(UserError, match="this is a file"):
        save_mind(minds, "tuned", tmp_path / "full" / "note.txt")
    (tmp_path / "empty").mkdir()
    assert save_mind(minds, "tuned", tmp_path / "empty").is_dir()

    def fail(*_args: object, **_kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("huggingface_hub.save_torch_state_dict", fail)
    with pytest.raises(UserError, match="No space left"):
        save_mind(minds, "tuned", tmp_path / "never")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "empty", "full", "tuned"]
    assert minds.inside.label == "base"


# ------------------------------------------------------------------------------------------------- what a repair does


@pytest.mark.parametrize("family", FAMILIES)
def test_a_planted_repair_returns_everything_exactly(tmp_path: Path, family: str) -> None:
    minds = planted(tmp_path, family, "L1.attn")
    context = context_of(minds)
    every, chosen = units_of(context, "block", ["L1.attn"])
    change = unit_norms(context_of(minds), every, "base", "tuned")[0]
    assert [name for name, size in change.items() if size > 0] == ["L1.attn"]

    def read(handle: str | Handle) -> pd.DataFrame:
        with context.open(handle):
            return pd.DataFrame(list(scores(context, context.items)))

    base, tuned, mended = read("base"), read("tuned"), read(repaired(chosen))
    assert (base["E"] - tuned["E"]).abs().min() > 1e-3
    pd.testing.assert_frame_equal(mended, base)
    wrong = read(repaired(units_of(context, "block", ["L1.mlp"])[1]))
    pd.testing.assert_frame_equal(wrong, tuned)


def test_scores_do_not_depend_on_the_batch_and_equal_the_verbs(tmp_path: Path) -> None:
    context = context_of(pair(tmp_path))
    with context.open("tuned"):
        together = pd.DataFrame(list(scores(context, context.items)))
        alone = pd.DataFrame([next(iter(scores(context, [i]))) for i in context.items])
        answers = [(i.contrast.clean.answer, i.contrast.corrupt.answer) for i in context.items if i.contrast]
        clean = context.margins([i.trace for i in context.items], answers).margin
        corrupt = context.margins([i.contrast.corrupt for i in context.items if i.contrast], answers).margin
    pd.testing.assert_frame_equal(together, alone, rtol=1e-3, atol=1e-4)
    assert together["E"].to_numpy() == pytest.approx((corrupt - clean).numpy(), abs=1e-4)
    assert together["E"].abs().min() > 1e-3
    with context.open("tuned"):
        (bare,) = scores(context, [Item(context.items[0].trace)])
    assert np.isnan(bare["E"]) and np.isnan(bare["swap_follow"]) and bare["accuracy_given_chain"] in (0.0, 1.0)


def test_scores_of_a_mind_that_always_reads_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With readings put in by hand: the swap is followed where the swap's answer is said, and so on."""
    from reasoninterp.models.context import Reading

    context = context_of(pair(tmp_path))
    said = ["4", "5", "9", "9", "9", "5", "9", "7", "9", "9"]  # five given chains (right: 4 … 8), five swaps (5 … 9)
    monkeypatch.setattr(context, "read", lambda traces: [Reading(a, a, "ok") for a in said[: len(traces)]])
    with context.open("base"):
        found = pd.DataFrame(list(scores(context, context.items)))
    assert found["accuracy_given_chain"].tolist() == [1, 1, 0, 0, 0]
    assert found["swap_follow"].tolist() == [1, 0, 1, 0, 1]


def test_controls_are_other_units_of_the_same_size_or_norm(tmp_path: Path) -> None:
    context = context_of(pair(tmp_path))
    every, chosen = units_of(context, "block", ["L0.attn", "L1.mlp"])
    found = candidates(context, chosen, every, alphas=[0.0, 0.5, 1.0], draws=3)
    change = unit_norms(context, every, "base", "tuned")[0]
    total = sum(v**2 for v in change.values()) ** 0.5
    by_series = {s: [c for c in found if c.series == s] for s in dict.fromkeys(c.series for c in found)}
    assert {s: len(c) for s, c in by_series.items()} == {
        SET: 2, RANDOM: 6, SAME_NORM: 6, WHOLE: 1, "tuned": 1, "base": 1
    }  # fmt: skip
    mine = by_series[SET][0].weight_change
    assert mine == pytest.approx((change["L0.attn"] ** 2 + change["L1.mlp"] ** 2) ** 0.5 / total)
    assert by_series[SET][1].weight_change == pytest.approx(mine / 2)
    for one in by_series[RANDOM] + by_series[SAME_NORM]:
        assert not {"L0.attn", "L1.mlp"} & set(one.units)
    assert {len(c.units) for c in by_series[RANDOM]} == {2}
    assert all(c.weight_change == pytest.approx((1 - c.alpha) * mine, rel=0.2) for c in by_series[SAME_NORM])


def test_recommend_by_hand() -> None:
    def rows(series: str, points: list[tuple[float, float, float]]) -> pd.DataFrame:
        out = []
        for alpha, back, cost in points:
            about = {"series": series, "alpha": alpha, "weight_change": 0.5 * (1 - alpha)}
            out.append({**about, "measure": "E", "restored": back, "change": 9.0})
            out.append({**about, "measure": "accuracy_own_chain", "restored": np.nan, "change": cost})
        return pd.DataFrame(out)

    table = pd.concat(
        [
            rows(SET, [(0.0, 1.02, -0.06), (0.25, 0.97, -0.02), (0.4, 0.92, -0.025), (0.5, 0.7, 0.0)]),
            rows(WHOLE, [(0.25, 0.6, 0.0), (0.5, 0.8, -0.3)]),
            rows(RANDOM, [(0.0, np.nan, 0.0)]),
            rows("tuned", [(1.0, np.nan, np.nan)]),
        ]
    )
    found = recommend(table).set_index("series")
    assert list(found.index) == [SET, WHOLE, RANDOM]
    assert (found.loc[SET, "alpha"], found.loc[SET, "reached"]) == (0.4, True)  # 0.5 points apart: the smaller change
    assert recommend(table, tie=0.0).set_index("series").loc[SET, "alpha"] == 0.25
    assert (found.loc[WHOLE, "alpha"], found.loc[WHOLE, "reached"]) == (0.5, False)
    assert not found.loc[RANDOM, "reached"] and np.isnan(found.loc[RANDOM, "restored"])


def test_the_table_by_hand() -> None:
    rows = []
    for trace, base, tuned, draws in (("a", 4.0, 0.0, (1.0, 3.0)), ("b", 6.0, 1.0, (2.0, 0.0))):
        for series, draw, alpha, e in (
            (RANDOM, 0, 0.0, draws[0]),
            (RANDOM, 1, 0.0, draws[1]),
            ("tuned", 0, 1.0, tuned),
            ("base", 0, 0.0, base),
        ):
            about = {"series": series, "draw": draw, "alpha": alpha, "units": "u", "weight_change": 0.1 * (draw + 1)}
            kept = {"swap_follow": 0.0, "accuracy_own_chain": 1.0, "accuracy_given_chain": 1.0}
            rows.append({**about, "traces": HERE, "trace": trace, "E": e, **kept, "steps_right_own_chain": 0.0})
    table = repair_table(pd.DataFrame(rows), "base", "tuned").set_index(["series", "measure"])
    row = table.loc[(RANDOM, "E")]
    assert row["value"] == pytest.approx(1.5) and row["change"] == pytest.approx(1.0)
    assert row["restored"] == pytest.approx(1.0 / 4.5)
    assert (row["draw_low"], row["draw_high"], row["n_draws"]) == (1.5, 1.5, 2)
    assert row["weight_change"] == pytest.approx(0.15) and row["n"] == 2
    assert table.loc[("base", "E"), "restored"] == pytest.approx(1.0)
    assert table.loc[("base", "swap_follow"), ["restored", "change"]].isna().tolist() == [True, False]  # nothing lost
    assert np.isnan(table.loc[("tuned", "E"), "change"])


def write_traces(path: Path, first: int = 0) -> str:
    lines: list[dict[str, object]] = [{"format": FORMAT.to_json()}]
    for item in items():
        trace = item.trace
        lines.append(
            {
                "id": f"x{first}-{trace.id}",
                "question": f"{trace.question}{first or ''}",
                "steps": list(trace.steps),
                "answer": trace.answer,
                "corrupt_steps": list(item.contrast.corrupt.steps),  # type: ignore[union-attr]
                "corrupt_answer": item.contrast.corrupt.answer,  # type: ignore[union-attr]
            }
        )
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return str(path)


def spec_of(folder: Path) -> ContextSpec:
    sources = {"base": str(folder / "base"), "tuned": str(folder / "broken")}
    return ContextSpec(sources, write_traces(folder / "here.jsonl"), max_new_tokens=8)


def test_the_study_of_a_planted_repair(tmp_path: Path) -> None:
    planted(tmp_path, "llama-gqa", "L1.attn")
    context = spec_of(tmp_path).load()
    context.run = Run.open(tmp_path / "run", {})
    study = Repair(units=("L1.attn",), alphas=(0.0, 0.5), draws=2, others=(write_traces(tmp_path / "there.jsonl", 7),))
    result = run_study(study, context, context.run, quiet=True)
    table = result.tables["repair"].set_index(["traces", "series", "alpha", "measure"])
    assert set(result.tables["repair"]["traces"]) == {HERE, "there"}
    for file in (HERE, "there"):
        assert table.loc[(file, SET, 0.0, "E"), "value"] == table.loc[(file, "base", 0.0, "E"), "value"]
        assert table.loc[(file, SET, 0.0, "E"), "value"] != table.loc[(file, "tuned", 1.0, "E"), "value"]
        # All of the change lies in the set, so scaling it is interpolating the whole model.
        assert table.loc[(file, SET, 0.5, "E"), "value"] == table.loc[(file, WHOLE, 0.5, "E"), "value"]
        assert table.loc[(file, SET, 0.5, "E"), "weight_change"] == pytest.approx(0.5)
    assert set(result.tables["repair"]["series"]) == {SET, WHOLE, "base", "tuned"}  # nothing else changed
    n_effects = sum(i.contrast is not None for i in context.items)
    assert (table["ci_low"] <= table["value"] + 1e-12).all()
    assert table["n"].eq(np.where(table.index.get_level_values("measure") == "E", n_effects, 5)).all() and n_effects > 2
    assert list(result.tables["repair_choice"]["series"])[:2] == [SET, WHOLE]
    assert (tmp_path / "run" / "figures" / "repair.png").exists()
    again = run_study(study, context, context.run, quiet=True, figures=False)
    assert again.measured == 0 and again.reused == result.measured > 0
    assert len(draw_repair({"a": result.tables["repair"], "b": result.tables["repair"]}).axes) == 4


def test_the_command_repairs_saves_and_measures(tmp_path: Path) -> None:
    planted(tmp_path, "llama-gqa", "L1.attn")
    made = tmp_path / "new" / "mended"
    lines = list(repair_command(spec_of(tmp_path), ["L1.attn", "L1.attn"], 0.0, made))
    said = "\n".join(lines)
    assert "\nL1.attn: base weights given back, 0 % of tuning's change" in said and str(made) in lines[-1]
    minds = Minds.load({"base": str(tmp_path / "base"), "tuned": str(made)})
    assert minds.hashes["base"] == minds.hashes["tuned"]
    assert "; n = 5" in said and "nothing was aligned" in lines[0]
    with pytest.raises(UserError, match="not empty"):
        list(repair_command(spec_of(tmp_path), ["L1.attn"], 0.0, made))
    with pytest.raises(UserError, match="--level nope"):
        list(repair_command(spec_of(tmp_path), ["L1.attn"], 0.0, tmp_path / "other", level="nope"))
    same = ContextSpec(dict.fromkeys(("base", "tuned"), str(tmp_path / "base")), str(tmp_path / "here.jsonl"))
    with pytest.raises(UserError, match="nothing to repair"):
        list(repair_command(same, ["L1.attn"], 0.0, tmp_path / "other"))
    assert not (tmp_path / "other").exists()


def test_a_directory_that_cannot_be_had_is_told_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    nowhere = ContextSpec({"base": "none", "tuned": "none"}, str(tmp_path / "no.jsonl"))
    with pytest.raises(UserError, match=r"--out .*cannot write here"):
        next(repair_command(nowhere, [], 0.0, tmp_path / "file" / "under" / "it"))
    with pytest.raises(UserError, match=r"no\.jsonl"):
        next(repair_command(nowhere, [], 0.0, tmp_path / "a" / "b"))
    assert not (tmp_path / "a").exists()  # nor is anything left of it


def test_what_was_measured_is_told_where_saving_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planted(tmp_path, "llama-gqa", "L1.attn")

    def full(*_args: object, **_kwargs: object) -> None:
        raise UserError("--out: cannot write here (No space left on device); give another directory.")

    monkeypatch.setattr("reasoninterp.severance.grafts.repair_command.save_mind", full)
    lines: list[str] = []
    with pytest.raises(UserError, match="No space"):
        lines.extend(repair_command(spec_of(tmp_path), ["L1.attn"], 0.0, tmp_path / "mended"))
    assert any(line.startswith("accuracy_own_chain") for line in lines)


@pytest.fixture(scope="module")
def regrouped(tmp_path_factory: pytest.TempPathFactory) -> Regrouped:
    return regrouped_pair(tmp_path_factory.mktemp("regrouped"))


def test_a_repair_of_heads_in_another_order_is_the_same_repair(regrouped: Regrouped, tmp_path: Path) -> None:
    """Finding and mending go by the base's names: what is saved has the E of the repair of the mind as it was."""
    saved, sets, said = {}, {}, {}
    for name in ("tuned", "regrouped"):
        lines = list(repair_command(regrouped.spec(name), [], 0.0, tmp_path / name, level="head"))
        sets[name] = next(line.split(":")[0] for line in lines if "weights given back" in line)
        said[name] = "\n".join(lines)
        spec = regrouped.spec(name)
        context = ContextSpec({**spec.minds, "mended": str(tmp_path / name)}, spec.traces).load()
        read = Reader(context, [i.contrast for i in context.items if i.contrast is not None])
        saved[name] = [read(mind(which)).effect.mean() for which in ("base", "tuned", "mended")]
    base, tuned, mended = saved["regrouped"]
    assert saved["regrouped"] == pytest.approx(saved["tuned"], abs=1e-3)
    assert sets["tuned"] == sets["regrouped"] == "L0.G1" and base - tuned > 0.3
    assert mended - tuned > 0.9 * (base - tuned)
    assert "is head 0 of base" in said["regrouped"] and "is head 0 of base" not in said["tuned"]
    share = next(line for line in said["regrouped"].splitlines() if line.startswith("Returned"))
    assert f"Returned: {100 * (mended - tuned) / (base - tuned):.0f} % [" in share
    assert (
        "the follow rate between the two answers" in said["regrouped"]
        and "  random, same size (" in share + said["tuned"]
    )
    as_they_are = list(repair_command(regrouped.spec("regrouped"), ["L0.G1"], 0.0, tmp_path / "raw", align=False))
    assert any("less than 90 % of E" in line for line in as_they_are)  # another head of the base was put in its place


def test_a_mind_that_gained_reliance_is_not_repaired(regrouped: Regrouped, tmp_path: Path) -> None:
    spec = regrouped.spec("tuned")
    gained = ContextSpec({"base": spec.minds["tuned"], "tuned": spec.minds["base"]}, spec.traces)
    with pytest.raises(UserError, match="no lower than"):
        list(repair_command(gained, [], 0.0, tmp_path / "mended", level="head"))
    assert not (tmp_path / "mended").exists()
    with pytest.raises(UserError, match="no lower than"):
        list(Repair(level="head").cells(gained.load()))
    lines = list(repair_command(gained, ["L0.G1"], 0.5, tmp_path / "asked"))  # named, it is done, with a warning
    assert any(line.startswith("Warning: E of tuned") for line in lines)


def test_both_uses_of_a_tied_embedding_are_one_entry_in_the_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its first use the embedding gained and comes last; with its second it lost most, and is found at once."""
    minds = pair(tmp_path, "llama-tied")
    kept = losing(Context(minds, items(8)))
    context = Context(minds, [Item(c.clean, c) for c in kept])
    integral = integrate(context, kept, nodes=2, max_nodes=2, tolerance=9.0)
    names = [u.name for u in integral.units]
    values = np.zeros_like(integral.values)
    values[:, names.index("embed")], values[:, names.index("unembed")] = 1.0, -5.0
    values[:, names.index("ln_final")] = -2.0
    monkeypatch.setattr(ledger_integrate, "integrate", lambda *_, **__: integral._replace(values=values))
    tried: list[frozenset[str]] = []

    def share(_moves: Moves, _way: str, names: frozenset[str]) -> float:
        tried.append(frozenset(names))
        return float(bool(names))

    monkeypatch.setattr(Moves, "share", share)
    assert smallest_restoring(context).units == ("embed",) and frozenset({"embed"}) in tried


def test_the_base_is_the_whole_model_at_alpha_zero() -> None:
    """A random set returns nothing, the whole model at 0.5 half of E: at 0 it returns all, and is what to take."""
    rows = []
    for trace, base, tuned in (("a", 4.0, 0.0), ("b", 6.0, 1.0), ("c", 5.0, 0.5)):
        for series, alpha, e in ((WHOLE, 0.5, (base + tuned) / 2), ("tuned", 1.0, tuned), ("base", 0.0, base)):
            about = {"series": series, "draw": 0, "alpha": alpha, "units": "", "weight_change": 1 - alpha}
            kept = {"swap_follow": 0.0, "accuracy_own_chain": 1.0, "accuracy_given_chain": 1.0}
            rows.append({**about, "traces": HERE, "trace": trace, "E": e, **kept, "steps_right_own_chain": 0.0})
    table = repair_table(pd.DataFrame(rows), "base", "tuned")
    whole, base = (
        table[(table["series"] == s) & (table["alpha"] == 0)].drop(columns="series").reset_index(drop=True)
        for s in (WHOLE, "base")
    )
    pd.testing.assert_frame_equal(whole, base)
    chosen = recommend(table).set_index("series").loc[WHOLE]
    assert chosen["alpha"] == 0 and chosen["reached"] and chosen["restored"] == pytest.approx(1.0)


def test_what_a_user_can_get_wrong(tmp_path: Path) -> None:
    context = context_of(pair(tmp_path))
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"units": ("L7.attn",)}, "L7.attn"),
        ({"units": ("L0.attn",), "level": "blocks"}, "--level blocks"),
        ({"units": ("L0.attn",), "alphas": (2.0,)}, "--alphas"),
        ({"units": ("L0.attn",), "others": (str(tmp_path / "none.jsonl"),)}, "no such file"),
    ]
    for options, word in wrong:
        with pytest.raises(UserError, match=word):
            list(Repair(**options).cells(context))
    save_tiny(tmp_path / "same", "llama-gqa", n_layers=2)
    same = Minds.load({"base": str(tmp_path / "same"), "tuned": str(tmp_path / "same")})
    with pytest.raises(UserError, match="nothing to repair"):
        list(Repair(units=("L0.attn",)).cells(context_of(same)))


# ------------------------------------------------------------------------- the experiment and its notebook, quick runs


def test_the_experiment_and_its_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The organism is trained once and kept in the user's cache."""
    script = load_module(ROOT / "experiments" / "repair.py")
    (run,) = script.run(tmp_path, only=("memorised",), limit=12, alphas=(0.0,), draws=1, quiet=True)
    table = script.table_of([run]).set_index(["series", "traces"])
    mended, tuned, base = (table.loc[(series, HERE)] for series in (SET, "tuned", "base"))
    assert mended["restored"] >= 0.9 and mended["reached"]
    assert mended["swap_follow"] > 0.5 > tuned["swap_follow"] and base["swap_follow"] > 0.8
    assert table.loc[(RANDOM, HERE), "restored"] < 0.5
    out = "lastop-base"
    assert table.loc[(SET, out), "accuracy_own_chain"] > table.loc[("tuned", out), "accuracy_own_chain"] + 0.3
    assert len(script.summary([run])) == 1 + 6
    monkeypatch.setenv("REASONINTERP_REPAIR", str(tmp_path))
    path = ROOT / "notebooks" / "repair.ipynb"
    notebook = nbformat.read(path, as_version=4)
    metadata = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=120, kernel_name="python3", resources=metadata).execute()
    drawn = [o for cell in notebook.cells for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]
    assert len(drawn) == 1
    said = "".join(o.get("text", "") for cell in notebook.cells for o in cell.get("outputs", []))
    assert "the smallest restoring set is" in said and "model.safetensors" in said


# ----------------------------------------------------------------------------------- what the cost benchmark counts by


def test_activations_are_fitted_and_carried_over_by_the_stated_formulas() -> None:
    large = load_module(ROOT / "experiments" / "benchmarks" / "ledger_large.py")
    shapes = [(32, 48, 4, 32, 4), (32, 48, 8, 96, 4), (16, 64, 10, 288, 6), (8, 48, 15, 768, 12)]
    rows = []
    for shape in shapes:
        r, pos, layers, d, heads = shape
        whole = 20 * r * pos * layers * d + 3 * r * pos**2 * layers * heads
        checkpointed = 1 * r * pos * layers * d + 30 * r * pos * d + 2 * r * pos**2 * heads
        about = dict(zip(("rows", "length", "n_layers", "d_model", "n_heads"), shape, strict=True))
        rows.append({**about, "alive_bytes": 4 * whole, "checkpointed_alive_bytes": 4 * checkpointed})
    table = pd.DataFrame(rows)
    for checkpointed, planted_ in ((False, [20, 3]), (True, [1, 30, 2])):
        found, worst = large.fitted(table, checkpointed)
        assert found == pytest.approx(planted_, rel=1e-6) and worst < 1e-6
    _, out = large.at_seven_billion(table)
    assert out["whole"] == pytest.approx(2 * (20 * 16 * 512 * 32 * 4096 + 3 * 16 * 512**2 * 32 * 32))
    assert out["device_checkpointed"] - out["checkpointed"] == pytest.approx(6 * 6.74e9)


def test_what_autograd_keeps_is_counted_once_and_let_go() -> None:
    cost = load_module(ROOT / "experiments" / "benchmarks" / "ledger.py")
    weight = torch.randn(8, 8)
    held = cost.SavedBytes({weight.untyped_storage().data_ptr()})
    x = torch.randn(5, 8, requires_grad=True)
    with held.counting():
        y = (x @ weight).sin()  # keeps the sine's input: 5 x 8 numbers; the weight is not counted
        z = (y * y).sum()  # keeps y, twice
    assert held.peak == held.now == 2 * 5 * 8 * 4
    z.backward()
    assert held.now == 0 and held.peak == 2 * 5 * 8 * 4
