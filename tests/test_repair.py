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
from reasoninterp.models.minds import Handle, Minds, blend, graft
from reasoninterp.models.saving import save_mind
from reasoninterp.models.units import unit_named
from reasoninterp.running import run_study
from reasoninterp.runs import Run
from reasoninterp.severance.grafts.repair import (
    RANDOM,
    SAME_NORM,
    SET,
    WHOLE,
    candidates,
    recommend,
    repair_command,
    repaired,
    scores,
    units_of,
    weight_changes,
)
from reasoninterp.severance.grafts.repair_study import HERE, Repair, draw_repair, repair_table
from reasoninterp.study import load_module
from reasoninterp.traces.contrast import contrast
from reasoninterp.traces.trace import Format, Trace
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
    found = weight_changes(minds, every, "base", "tuned")
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
    change = weight_changes(minds, every, "base", "tuned")
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
    change = weight_changes(context.minds, every, "base", "tuned")
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
    lines = repair_command(spec_of(tmp_path), ["L1.attn"], 0.0, tmp_path / "mended")
    assert "L1.attn" in lines[0] and str(tmp_path / "mended") in lines[-1] and len(lines) == 7
    minds = Minds.load({"base": str(tmp_path / "base"), "tuned": str(tmp_path / "mended")})
    assert minds.hashes["base"] == minds.hashes["tuned"]
    with pytest.raises(UserError, match="not empty"):
        repair_command(spec_of(tmp_path), ["L1.attn"], 0.0, tmp_path / "mended")


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
    (run,) = script.run(tmp_path, only=("memorised",), limit=16, alphas=(0.0, 0.5), draws=1, quiet=True)
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
