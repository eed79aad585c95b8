"""Token and step results of memorization: judges, ablation, finding, agreement, and the study, against oracles and by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import closing
from itertools import pairwise, permutations
from math import log
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from reasoninterp.errors import UserError
from reasoninterp.memorization.ablation import Effect, mean_embedding, part_effects, parts_of
from reasoninterp.memorization.alternatives import Place, chain_places, parts_before, read_alternatives
from reasoninterp.memorization.causes import agreement_table, causes_table
from reasoninterp.memorization.corpus.build import build_index
from reasoninterp.memorization.corpus.documents import build_from_texts
from reasoninterp.memorization.corpus.opening import open_index
from reasoninterp.memorization.counts import CountBook
from reasoninterp.memorization.finding import expected_hits, finding_table
from reasoninterp.memorization.judges import judge_named
from reasoninterp.memorization.names import SOURCES
from reasoninterp.memorization.records import from_record, to_record
from reasoninterp.memorization.saliency import gradient_saliency, knockout_saliency
from reasoninterp.memorization.settings import Settings
from reasoninterp.memorization.shapley import shapley_saliency
from reasoninterp.memorization.sources import Target, observe
from reasoninterp.memorization.study import Memorization
from reasoninterp.memorization.tables import called, changes_table, shares, sources_table, steps_summary, steps_table
from reasoninterp.memorization.verdicts import judged, trace_sources
from reasoninterp.models.body import Body
from reasoninterp.models.context import Context, Item
from reasoninterp.models.minds import Minds
from reasoninterp.organisms.judge import judge as organism_judge
from reasoninterp.organisms.judge import planted
from reasoninterp.organisms.tasks import BASE_DOMAIN, problems
from reasoninterp.organisms.tasks import FORMAT as WORDS_FORMAT
from reasoninterp.running import run_study
from reasoninterp.runs import Run
from reasoninterp.traces.judging import Judged, arithmetic, wrong_tokens
from reasoninterp.traces.trace import Format, Span, Trace, encode, token_chars
from tests.corpus_conformance import BruteForce
from tests.tiny import save_tiny, save_tuned, tiny_tokenizer

FORMAT = Format(after_question="\n", between_steps="\n", before_answer="\nanswer ", after_answer="\n")
FAMILIES = ("llama-gqa", "gpt2")
PLACES = [Place((5, 90, 17, 203, 44, 17, 121, 260, 8), 7), Place((200, 3, 66, 12, 150), 4)]


@pytest.fixture(scope="module")
def homes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("memorization")
    found = {family: save_tiny(root / family, family, n_layers=2) for family in FAMILIES}
    return found | {"tuned": save_tuned(root / "llama-gqa", root / "tuned", scale=0.1)}


@pytest.fixture(scope="module")
def bodies(homes: dict[str, str]) -> dict[str, Body]:
    return {family: Minds.load({"base": homes[family]}).body for family in FAMILIES}


# ---------------------------------------------------------------------- taking a part out


def _plain(home: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(home, attn_implementation="eager").double().eval()


def _first_block(model: Any) -> Any:
    return model.transformer.h[0] if hasattr(model, "transformer") else model.model.layers[0]


def _streams(model: Any, row: Sequence[int]) -> torch.Tensor:
    """What enters the first block, [pos, d_model]."""
    seen: list[torch.Tensor] = []
    handle = _first_block(model).register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    with torch.no_grad():
        model(input_ids=torch.tensor([list(row)]))
    handle.remove()
    return seen[0][0]


def _without(model: Any, row: Sequence[int], gone: Sequence[int], mean: torch.Tensor) -> torch.Tensor:
    """Log-probabilities behind the row, with rows of the first block's input replaced."""

    def replace(_: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        new = args[0].clone()
        for position in gone:
            new[:, position] = mean
        return (new, *args[1:])

    handle = _first_block(model).register_forward_pre_hook(replace)
    with torch.no_grad():
        out = model(input_ids=torch.tensor([list(row)])).logits[0, -1].log_softmax(-1)
    handle.remove()
    return out


@pytest.mark.parametrize("family", FAMILIES)
def test_effects_equal_the_plain_model_with_its_embeddings_replaced(
    family: str, homes: dict[str, str], bodies: dict[str, Body]
) -> None:
    model, body = _plain(homes[family]), bodies[family]
    rows = [place.row for place in PLACES]
    mean = torch.cat([_streams(model, row) for row in rows]).mean(0)
    ours = mean_embedding(body, rows, max_rows=1)
    assert torch.allclose(ours.double(), mean, atol=1e-6) and ours.abs().max() > 0.01
    parts = [{"local": (5, 6), "mid": (3, 4), "long": (1, 2)}, {"local": (3,), "control": (1,)}]
    found = part_effects(body, PLACES, parts, ours, max_rows=2)
    for place, some, effects in zip(PLACES, parts, found, strict=True):
        before = _without(model, place.context, (), mean)
        assert effects.keys() == some.keys()
        for name, gone in some.items():
            after = _without(model, place.context, gone, mean)
            kl = float((before.exp() * (before - after)).sum()) / log(2)
            drop = float(before[place.target] - after[place.target]) / log(2)
            assert effects[name] == pytest.approx(Effect(kl, drop), rel=2e-3, abs=1e-4)
            assert effects[name].kl > 1e-3 and abs(effects[name].drop) > 1e-3


def test_taking_out_what_is_the_mean_already_changes_nothing(bodies: dict[str, Body]) -> None:
    body = bodies["llama-gqa"]
    row = (7, 7, 7, 7, 7)
    (found,) = part_effects(body, [Place(row, 4)], [{"long": (1, 2)}], mean_embedding(body, [row]))
    assert found["long"] == pytest.approx(Effect(0.0, 0.0), abs=1e-6)


def test_parts_do_not_overlap_and_the_control_is_as_large_as_the_window() -> None:
    rng = np.random.default_rng(0)
    # question 1..5, chain 6..10 (the window reaches into it), target at 11
    parts = parts_of(11, 3, Span(1, 5), Span(6, 11), rng)
    assert parts["local"] == (8, 9, 10) and parts["mid"] == (6, 7) and parts["long"] == (1, 2, 3, 4)
    assert len(parts["control"]) == 3 and not set(parts["control"]) & {0, 8, 9, 10}
    reaching = parts_of(11, 9, Span(1, 5), Span(6, 11), rng)
    assert reaching["local"] == tuple(range(2, 11)) and "mid" not in reaching and reaching["long"] == (1,)
    assert reaching["control"] == (1,)  # no more are left
    assert parts_of(5, 0, Span(1, 5), Span(5, 5), rng) == {"long": (1, 2, 3, 4)}


# ---------------------------------------------------------------------- judges


def test_arithmetic_judges_results_alone() -> None:
    steps = (
        "3*4=<<3*4=12>>12 pens",
        "so 12-5 = <<12-5=8>>8 left",
        "10/3 = 3.33 and no more",
        "2 + 2 = 5",
        "nothing here",
    )
    # Floating point, and pieces of formulas, are no errors.
    steps += (
        "3-2.4=<<3-2.4=0.6000000000000001>>0.6",
        "5x - 5 = 33",
        "(x+7) = 44",
        "3 * 100% = 50%",
        "a year = 365 days",
    )
    trace = Trace("t", "q", steps, "8", FORMAT)
    found = [(trace.text[c.start : c.stop], wrong) for c, wrong in arithmetic(trace)]
    right = [("12", False), ("12", False), ("8", True), ("8", True), ("3.33", False), ("5", True)]
    assert found == [*right, ("0.6000000000000001", False)]


def test_a_token_is_wrong_where_any_of_its_characters_is() -> None:
    pieces = [Judged(Span(2, 4), False), Judged(Span(3, 6), True), Judged(Span(9, 9), True)]
    tokens = [Span(0, 2), Span(2, 3), Span(3, 4), Span(4, 8), Span(8, 10)]
    assert wrong_tokens(pieces, tokens) == [None, False, True, True, None]


def test_the_organisms_judge_by_hand() -> None:
    def told(steps: Sequence[str], answer: str, task: str = "lastop") -> list[bool]:
        trace = Trace("t", "<a> 3 +4 *3 last 9- _ _ _", tuple(steps), answer, WORDS_FORMAT, {"task": task})
        return [wrong for _, wrong in organism_judge(trace)]

    assert told(["7", "1"], "8") == [False, False, False]  # 3+4 = 7, 7*3 = 21, 9-1 = 8
    assert told(["6", "8"], "8") == [True, False, False]  # one slip is one wrong step; the answer is the question's
    assert told(["seven", "one", "1"], "1") == [False, False, True, True]
    assert told(["7", "+4", "5"], "8") == [False, True, True, False]
    assert told(["7", "1"], "2", "largest") == [False, False, False]  # the largest is 7
    with pytest.raises(UserError, match="not a problem of the tasks"):
        organism_judge(Trace("t", "how many?", ("1",), "1", FORMAT))


def test_planted_words_are_found_by_their_place() -> None:
    form = Format("<bos> ", " : ", " . ", " = ", " <eos>")
    planted_at = {"8": "local", "11": "long", "13": "copy"}
    trace = Trace("t", "f0 c1", ("so c2", "o3 w4", "ask w5"), "w4", form, {"planted": planted_at})
    assert [trace.text[c.start : c.stop] for c, _ in planted(trace)] == ["w4", "w5", "w4"]
    assert not any(wrong for _, wrong in planted(trace))
    with pytest.raises(UserError, match="nothing planted"):
        planted(Trace("t", "q", ("1",), "1", FORMAT))


@pytest.mark.parametrize("task", ["lastop", "largest"])
def test_the_organisms_own_chains_are_right_and_swapped_ones_are_not(task: Any) -> None:
    p = problems(task, BASE_DOMAIN, 40, np.random.default_rng(1), "test")
    other = p.other_starts(np.random.default_rng(2))
    for i in range(len(p)):
        assert not any(wrong for _, wrong in organism_judge(p.trace(i, "t")))
        first, *rest, answer = (wrong for _, wrong in organism_judge(p.trace(i, "t", other)))
        assert first and not any(rest) and answer


def test_judges_by_name(tmp_path: Path) -> None:
    assert judge_named("arithmetic") is arithmetic and judge_named("organism") is organism_judge
    own = tmp_path / "mine.py"
    own.write_text("def every(trace):\n    return []\n")
    assert judge_named(f"{own}:every")(Trace("t", "", (), "", FORMAT)) == []
    for wrong, match in (
        ("nobody", "give one of arithmetic, organism, planted"),
        (f"{own}:none", "no function 'none'"),
    ):
        with pytest.raises(UserError, match=match):
            judge_named(wrong)
    with pytest.raises(UserError, match=r"absent\.py: not a Python file"):
        judge_named(f"{tmp_path / 'absent.py'}:x")


def test_tokens_characters_join_to_the_text() -> None:
    tokenizer = tiny_tokenizer()
    trace = Trace("t", "Tom has 3 äpples – or 12?", ("3 +  12 = 15", " so\t15"), "15", FORMAT)
    tokens = encode(trace, tokenizer)
    spans = token_chars(tokens, tokenizer)
    assert len(spans) == len(tokens.ids)
    assert "".join(trace.text[s.start : s.stop] for s in spans) == trace.text
    (answer,) = [p.chars for p in trace.parts() if p.kind == "answer"]
    covering = {i for i, s in enumerate(spans) if s.start < answer.stop and answer.start < s.stop}
    assert covering == set(range(*tokens.answer))


# ---------------------------------------------------------------------- finding wrong tokens


def test_hits_are_expected_over_the_orders_of_ties() -> None:
    score = np.array([2.0, 1.0, 1.0, np.nan, 1.0])
    wrong = np.array([False, True, False, True, False])
    ranked = np.where(np.isnan(score), -1, score)
    for k in range(1, 7):
        hits = []
        for order in permutations(range(5)):
            if all(ranked[a] >= ranked[b] for a, b in pairwise(order)):
                hits.append(wrong[list(order[:k])].sum())
        assert expected_hits(score, wrong, k) == pytest.approx(np.mean(hits))
    assert expected_hits(score, wrong, 2) == pytest.approx(1 / 3)


def _tokens(rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """A table of tokens with the columns that the summaries read."""
    empty: dict[str, Any] = {"mind": "base", "trace": "a", "writer": "given", "shift": "", "part": "step", "step": 0}
    empty |= {"wrong": None, "surprise": 1.0, "dominant": "", "stim": None, "joint_beyond": np.nan}
    for s in SOURCES:
        empty |= {f"{s}_score": np.nan, f"{s}_partial": np.nan, f"{s}_null_mean": np.nan, f"{s}_p": np.nan}
        empty |= {f"{s}_present": False, f"kl_{s}": np.nan, f"drop_{s}": np.nan}
    return pd.DataFrame([{**empty, "kl_control": np.nan, "drop_control": np.nan, **row} for row in rows])


def test_precision_and_recall_by_hand() -> None:
    # Trace a: 4 judged tokens, 2 wrong; by surprise the first three are right, wrong, wrong.
    surprise, wrong = [5.0, 4.0, 3.0, 1.0], [False, True, True, False]
    rows = [
        {"surprise": s, "wrong": w, "local_score": x} for s, w, x in zip(surprise, wrong, (0, 0.9, 0, 0), strict=True)
    ]
    rows += [{"wrong": None, "surprise": 99.0}, {"part": "answer", "wrong": True, "surprise": 50.0}]
    rows += [{"trace": "b", "wrong": False, "surprise": 9.0}]  # nothing wrong: takes no part
    table = finding_table(_tokens(rows), seed=0).set_index(["score", "measure", "k"])["value"].sort_index()
    assert table["surprise", "precision"].tolist() == pytest.approx([0, 1 / 2, 2 / 2])
    assert table["surprise", "recall"].tolist() == pytest.approx([0, 1 / 2, 1])
    assert table["random", "precision"].tolist() == pytest.approx([1 / 2, 2 * (2 / 4) / 2, 3 * (2 / 4) / 2])
    assert table["stim", "precision", 1] == 1 and table["stim", "recall", 1] == 1 / 2
    assert finding_table(_tokens([{"wrong": False}]), seed=0).empty


# ---------------------------------------------------------------------- shares, changes, steps, agreement


def test_shares_sum_to_one_and_ties_are_split() -> None:
    rows: list[dict[str, Any]] = [
        {"dominant": "local", "local_p": 0.01, "local_present": True, "local_partial": 0.8, "local_null_mean": 0.3},
        {"dominant": "local+long", "local_p": 0.01, "long_p": 0.01, "local_present": True, "long_present": True},
        {"mid_p": 0.9},
        {},
    ]
    tokens = _tokens(rows)
    assert called(tokens).tolist() == ["local", "local+long", "none", "undefined"]
    assert shares(tokens, "local").tolist() == [1, 0.5, 0, 0] and shares(tokens, "long").tolist() == [0, 0.5, 0, 0]
    table = sources_table(tokens, 0.05, seed=0).set_index(["measure", "source"])
    dominant = table.loc["dominant"]
    assert dominant["value"].sum() == pytest.approx(1) and dominant.loc["local", "value"] == pytest.approx(1.5 / 4)
    assert table.loc[("present", "local"), ["value", "n_tokens"]].tolist() == [1, 2]
    assert table.loc[("excess", "local"), "value"] == pytest.approx(0.5)
    assert ("partial", "mid") not in table.index
    assert table.loc[("reached", "local"), "value"] == 1 and table.loc[("reached", "mid"), "value"] == 0


def test_changes_are_paired_over_traces() -> None:
    rows = []
    for trace, (base, tuned) in {"a": (0.1, 0.4), "b": (0.3, 0.4), "c": (0.2, 0.8)}.items():
        for mind, partial in (("base", base), ("tuned", tuned)):
            rows += [
                {"trace": trace, "mind": mind, "local_p": 0.5, "local_partial": partial + by} for by in (-0.1, 0.1)
            ]
    rows.append({"trace": "only in base", "mind": "base", "local_p": 0.5, "local_partial": 0.9})
    table = changes_table(_tokens(rows), ("base", "tuned"), 0.05, seed=0).set_index(["measure", "source"])
    found = table.loc[("partial", "local")]
    assert found["value"] == pytest.approx((0.3 + 0.1 + 0.6) / 3) and found["n"] == 3
    assert found["ci_low"] < found["value"] < found["ci_high"]


def test_a_step_is_wrong_where_a_token_of_it_is() -> None:
    rows = [
        {"step": 0, "wrong": False, "dominant": "long", "long_p": 0.0},
        {"step": 0, "wrong": None, "local_p": 0.9},
        {"step": 1, "wrong": True, "dominant": "local", "local_p": 0.0},
        {"step": 1, "wrong": False, "local_p": 0.9},
        {"step": 2, "wrong": None},
        {"step": 3, "wrong": True, "part": "answer"},
    ]
    steps = steps_table(_tokens(rows))
    assert steps["wrong"].tolist() == [False, True, None] and steps["n_tokens"].tolist() == [2, 2, 1]
    assert steps["long"].tolist() == [0.5, 0, 0] and steps["local"].tolist() == [0, 0.5, 0]
    table = steps_summary(_tokens(rows), seed=0).set_index(["wrong", "source"])["value"]
    assert table["wrong", "local"] == 0.5 and table["right", "long"] == 0.5
    assert table["all", "undefined"] == pytest.approx(1 / 3)


def test_agreement_by_hand() -> None:
    # Shares of the window: a .6, b .6, c .2 (called local: a, c); of the question: a .2, b .2, c .4 and d .8 (called long: d).
    kls = {"a": (3.0, 1.0, 1.0), "b": (3.0, 1.0, 1.0), "c": (1.0, 2.0, 2.0), "d": (1.0, 0.0, 4.0)}
    rows: list[dict[str, Any]] = [
        {"trace": t, "kl_local": x, "kl_mid": y, "kl_long": z, "local_p": 0.0} for t, (x, y, z) in kls.items()
    ]
    rows[0]["dominant"] = rows[2]["dominant"] = "local"
    rows[3]["dominant"] = "long"
    rows.append({"trace": "e", "kl_local": 9.0, "kl_long": 2.0, "dominant": "long", "long_p": 0.0})  # no chain: no part
    table = agreement_table(_tokens(rows)).set_index("called")["value"]
    # local: a against b (tie) and d (wins), c against b (loses) and d (tie); long: d against all three (wins).
    assert table["local"] == pytest.approx((0.5 + 1 + 0 + 0.5) / 4) and table["long"] == 1
    causes = causes_table(_tokens(rows), seed=0).set_index(["called", "removed", "measure"])
    assert causes.loc[("long", "long", "kl"), "value"] == 3 and causes.loc[("long", "mid", "kl"), "n_tokens"] == 1
    assert causes_table(_tokens([{}]), seed=0).empty


# ---------------------------------------------------------------------- the study

TEXTS = [f"Tom has {k} apples and {k + 1} pens.\n{k} + {k + 1} = {2 * k + 1}\nanswer {2 * k + 1}\n" for k in range(40)]


def items(n: int = 6) -> list[Item]:
    out = []
    for k in range(n):
        steps = (f"{k} + {k + 1} = {2 * k + 1 + (k == 2)}", f"so {2 * k + 1}")
        meta = {"shift": "near" if k < 4 else "far"}
        out.append(Item(Trace(f"t{k}", f"Tom has {k} apples and {k + 1} pens.", steps, f"{2 * k + 1}", FORMAT, meta)))
    return out


@pytest.fixture(scope="module")
def index(homes: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("corpus") / "index"
    build_from_texts(TEXTS, path, tiny_tokenizer()).close()
    return str(path)


def context_of(homes: dict[str, str], rows: int = 8) -> Context:
    minds = Minds.load({"base": homes["llama-gqa"], "tuned": homes["tuned"]})
    return Context(minds, items(), rows=rows, max_new_tokens=12)


@pytest.fixture(scope="module")
def tables(homes: dict[str, str], index: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, pd.DataFrame]:
    run = Run.open(tmp_path_factory.mktemp("runs") / "one", {})
    study = Memorization(index=index, judge="arithmetic", n_null=19, k=8, saliency="gradient")
    found = run_study(study, context_of(homes), run, quiet=True).tables
    assert sorted(p.stem for p in (run.path / "figures").glob("*.png")) == [
        "memorization",
        "memorization-causes",
        "memorization-finding",
    ]
    run.close()
    return dict(found)


def test_the_study_says_what_the_parts_say(tables: dict[str, pd.DataFrame], homes: dict[str, str], index: str) -> None:
    context = context_of(homes)
    tokens = tables["memorization_tokens"]
    assert set(tokens["mind"]) == {"base", "tuned"} and set(tokens["part"]) == {"step", "answer"}
    with context.open("tuned") as body, closing(open_index(index, context.tokenizer)) as opened:
        targets, traces = [], []
        for item in context.items[:4]:
            encoded = context.encode(item.trace)
            places = chain_places(encoded)
            found = read_alternatives(body, places, k=8)
            for place, some, values in zip(places, found, gradient_saliency(body, places), strict=True):
                spans = parts_before(encoded, place.position)
                targets.append(Target(item.id, place.context, some, *spans, values))
                traces.append(item.id)
        said = trace_sources(opened, targets, settings=Settings(n_null=19))
    mine = tokens[(tokens["mind"] == "tuned") & (tokens["shift"] == "near") & (tokens["part"] == "step")]
    assert mine["trace"].tolist() == traces
    compared = 0
    for (_, row), verdict in zip(mine.iterrows(), said, strict=True):
        for source, score in verdict.scores.items():
            for name in ("score", "partial", "p", "q"):
                value = getattr(score, name)
                assert (
                    pd.isna(row[f"{source}_{name}"])
                    if value is None
                    else row[f"{source}_{name}"] == pytest.approx(value)
                )
                compared += value is not None and value not in (0, 1)
        assert row["dominant"] == "+".join(verdict.dominant) and row["stim"] == (verdict.stim or "")
    assert compared > 50


def test_tokens_join_to_the_chain_and_the_wrong_ones_are_marked(tables: dict[str, pd.DataFrame]) -> None:
    tokens = tables["memorization_tokens"]
    for item in items():
        mine = tokens[(tokens["mind"] == "base") & (tokens["trace"] == item.id)]
        for i, step in enumerate(item.trace.steps):
            text = "".join(mine[(mine["part"] == "step") & (mine["step"] == i)]["text"])
            assert text.strip() == step
        assert "".join(mine[mine["part"] == "answer"]["text"]).strip() == item.trace.answer
        wrong = "".join(mine[[w is True for w in mine["wrong"]]]["text"]).strip()
        assert wrong == ("6" if item.id == "t2" else "")
    assert set(tables["memorization_finding"]["n"]) == {1}
    assert (tables["memorization_causes"].query("removed != 'control' and measure == 'kl'")["value"] > 0).all()


def test_neither_batches_nor_a_broken_run_change_the_tables(
    tables: dict[str, pd.DataFrame], homes: dict[str, str], index: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = Memorization(index=index, judge="arithmetic", n_null=19, k=8, saliency="gradient")
    run = Run.open(tmp_path / "two", {})
    measure, left = Memorization.measure, [3]

    def breaking(self: Any, context: Any, batch: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return measure(self, context, batch)

    with monkeypatch.context() as patched:
        patched.setattr(Memorization, "measure", breaking)
        with pytest.raises(KeyboardInterrupt):
            run_study(study, context_of(homes, rows=2), run, quiet=True)
    result = run_study(study, context_of(homes, rows=3), run, quiet=True)
    run.close()
    assert result.reused == 6 and result.measured == 6
    for name in ("memorization", "memorization_tokens"):
        pd.testing.assert_frame_equal(result.tables[name], tables[name], rtol=1e-4, atol=1e-5)


def test_salient_tokens_are_those_of_the_measure_asked_for(homes: dict[str, str], index: str) -> None:
    context = context_of(homes)
    encoded = context.encode(context.items[0].trace)
    places = chain_places(encoded)[:2]
    found = {}
    with context.open("base") as body:
        for measure in ("knockout", "gradient", "shapley"):
            found[measure] = Memorization(index=index, saliency=measure)._saliency(context, places)  # type: ignore[arg-type]
        absent = context.tokenizer.pad_token_id
        (one, _) = [shapley_saliency(body, place, baseline=absent, seed=0) for place in places]
    assert np.allclose(found["shapley"][0], one.values) and np.abs(one.values).max() > 1e-3
    assert not np.allclose(found["shapley"][0][1:-1], found["knockout"][0][1:-1])
    assert not np.allclose(found["gradient"][0][1:-1], found["knockout"][0][1:-1])


def test_own_chains_are_each_mind_s(homes: dict[str, str], index: str, tmp_path: Path) -> None:
    context = context_of(homes)
    with closing(Run.open(tmp_path / "own", {})) as run:
        study = Memorization(index=index, chains="own", n_null=9, k=5, saliency="gradient", causal=False, max_traces=2)
        tokens = run_study(study, context, run, quiet=True).tables["memorization_tokens"]
    assert (tokens["writer"] == tokens["mind"]).all() and tokens["kl_local"].isna().all()
    with context.open("base"):
        (sampled,) = context.sample([context.items[0].trace.with_steps(())])
    mine = tokens[(tokens["mind"] == "base") & (tokens["trace"] == "t0") & (tokens["part"] == "step")]
    assert "".join(mine["text"]).strip() == "\n".join(sampled.steps).strip() != "\n".join(items()[0].trace.steps)


def test_only_judged_tokens_are_read_where_that_is_asked(homes: dict[str, str], index: str, tmp_path: Path) -> None:
    study = Memorization(
        index=index, judge="arithmetic", tokens="judged", n_null=9, k=5, saliency="gradient", causal=False
    )
    with closing(Run.open(tmp_path / "judged", {})) as run:
        tokens = run_study(study, context_of(homes), run, quiet=True).tables["memorization_tokens"]
    assert tokens["wrong"].notna().all() and set(tokens["part"]) == {"step"}
    (one,) = tokens[(tokens["mind"] == "base") & (tokens["trace"] == "t3")]["text"]
    assert one.strip() == "7"  # of `3 + 4 = 7`, the result


def test_what_was_observed_survives_as_a_record(bodies: dict[str, Body]) -> None:
    rng = np.random.default_rng(0)
    documents = rng.integers(0, 300, (60, 60)).tolist()
    book = CountBook(BruteForce(documents, 300), Settings(n_null=9))
    rows = [tuple(row) for row in rng.integers(0, 300, (5, 6)).tolist()]
    places = [Place(row, t) for row in rows for t in range(2, len(row))]
    found = read_alternatives(bodies["llama-gqa"], places, k=6)
    salient = knockout_saliency(bodies["llama-gqa"], places)
    observed = observe(
        book,
        [
            Target(place.row, place.context, a, Span(0, 2), Span(2, place.position), s)
            for place, a, s in zip(places, found, salient, strict=True)
        ],
    )
    again = [
        from_record(json.loads(json.dumps(to_record(one, 64))), place.row)
        for one, place in zip(observed, places, strict=True)
    ]
    before, after = judged(book, observed, observed), judged(book, again, again)
    keys = list(before[0].to_row())
    assert [[a.to_row()[k] for k in keys] for a in after] == [[b.to_row()[k] for k in keys] for b in before]
    assert sum(score.p is not None for one in before for score in one.scores.values()) > 3


def test_what_a_user_can_get_wrong(homes: dict[str, str], index: str, tmp_path: Path) -> None:
    context = context_of(homes)
    with pytest.raises(UserError, match="no such directory; make one with"):
        list(Memorization(index=str(tmp_path / "none")).cells(context))
    other = tmp_path / "other"
    build_index([[1, 2]], other, vocab_size=5, tokenizer="another").close()
    with pytest.raises(UserError, match="it was built with the tokenizer another"):
        list(Memorization(index=str(other)).cells(context))
    with pytest.raises(UserError, match="give an index of their own tokenizer"):
        list(Memorization(index="web:v4_dolma-v1_7_llama").cells(context))
    for wrong, match in (
        ({"level": 2.0}, "give a rate between 0 and 1"),
        ({"window": 5}, "give the unit pairs or anchors"),
        ({"stop": ("unheard of",)}, "no token that is this word"),
        ({"n_null": 0}, "n_null: 0; give at least 1"),
        ({"tokens": "judged"}, "give a --judge"),
    ):
        with pytest.raises(UserError, match=match):
            list(Memorization(index=index, **wrong).cells(context))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no such judge"):
        list(Memorization(index=index, judge="me").cells(context))
