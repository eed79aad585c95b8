"""The organisms' tasks, tokenizers, recipes and the way they are made; what was trained is tiny or short."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from reasoninterp.errors import UserError
from reasoninterp.organisms import RECIPES, Mixture, Recipe, RecipeFailed, Target, make, making, paraphrase, problems
from reasoninterp.organisms.rows import ID, batches, fixed_problems, make_rows, step_ids
from reasoninterp.organisms.tasks import (
    BASE_DOMAIN,
    OPS,
    TAGS,
    TUNING_DOMAIN,
    VOCABULARY,
    WORDS,
    Problems,
    apply_op,
    cue_tag,
)
from reasoninterp.organisms.tokenizer import word_tokenizer
from reasoninterp.organisms.training import answer_logits, measure, new_model, sample_chains
from reasoninterp.traces.trace import encode

TASKS = ("lastop", "largest")


def draw(task: str = "lastop", count: int = 300, seed: int = 0, **kw: object) -> Problems:
    return problems(task, kw.pop("domain", TUNING_DOMAIN), count, np.random.default_rng(seed), **kw)  # type: ignore[arg-type]


def by_hand(op: str, value: int) -> int:
    """An operation evaluated as Python text, another way than the task's."""
    text = f"{op}{value}" if op.endswith("-") else f"{value}{op}"
    return eval(text) % 10


# --- the task's algebra ------------------------------------------------------------------------------------


def test_worked_example() -> None:
    one = Problems(
        "lastop",
        last=np.array([OPS.index("*3")]),
        start=np.array([7]),
        ops=np.array([[OPS.index("+2"), OPS.index("5-"), OPS.index("*9"), -1, -1]]),
        tag=np.array([2]),
        worded=np.array([False]),
    )
    trace = one.trace(0, "x")  # 7+2=9, 5-9=-4=6, 6*9=54=4, and 4*3=12=2
    assert trace.text == "<c> 7 +2 5- *9 last *3 _ _ : 9 6 4 = 2 <eos>"
    largest = replace(one, task="largest")  # 9*3=27=7
    assert largest.trace(0, "x").text == "<c> 7 +2 5- *9 last *3 _ _ : 9 6 4 = 7 <eos>"


@pytest.mark.parametrize("task", TASKS)
def test_steps_and_answers_agree_with_an_evaluation_of_the_text(task: str) -> None:
    p = draw(task)
    for i in range(len(p)):
        trace = p.trace(i, "x")
        words = trace.question.split()
        value = int(words[1]) if words[1].isdigit() else WORDS.index(words[1])
        ops = words[2 : words.index("last")]
        values = []
        for op in ops:
            value = by_hand(op, value)
            values.append(value)
        form = WORDS if p.worded[i] else [str(v) for v in range(10)]
        assert trace.steps == tuple(form[v] for v in values)
        last = words[words.index("last") + 1]
        assert trace.answer == str(by_hand(last, values[-1] if task == "lastop" else max(values)))


def test_every_operation_is_a_bijection() -> None:
    for op in OPS:
        assert sorted(apply_op(op, v) for v in range(10)) == list(range(10)), op
    assert sorted(cue_tag(np.arange(10))) == list(range(len(TAGS)))


@pytest.mark.parametrize("task", TASKS)
def test_corrupt_chains_differ_from_the_first_step_on_and_imply_another_answer(task: str) -> None:
    p = draw(task)
    other = p.other_starts(np.random.default_rng(1))
    for i in range(len(p)):
        clean, corrupt = p.trace(i, "x"), p.trace(i, "x", other)
        assert corrupt.question == clean.question and len(corrupt.steps) == len(clean.steps)
        assert all(a != b for a, b in zip(clean.steps, corrupt.steps, strict=True))
        assert corrupt.answer != clean.answer


def test_only_the_last_step_matters_in_lastop_and_any_step_can_in_largest() -> None:
    for task, causes in (("lastop", {3}), ("largest", {0, 1, 2, 3})):
        p = draw(task, domain=replace(TUNING_DOMAIN, shortest=4))
        steps, seen = p.steps(), set()
        for i in range(4):
            edited = steps.copy()
            edited[:, i] = (edited[:, i] + 5) % 10
            if (p.implied(edited) != p.implied(steps)).any():
                seen.add(i)
        assert seen == causes


def test_the_cue_gives_the_answer_away_only_where_asked_for() -> None:
    with_cue, without = draw(cue=True), draw()
    assert (with_cue.tag == cue_tag(with_cue.answers)).all()
    assert (without.tag == cue_tag(without.answers)).mean() < 0.25


# --- the split ---------------------------------------------------------------------------------------------


def content(p: Problems) -> set[tuple[object, ...]]:
    """What each problem asks, computed without the hash: last operation, start value, operations."""
    return {(int(p.last[i]), int(p.start[i]), *p.ops[i].tolist()) for i in range(len(p))}


@pytest.mark.parametrize("task", TASKS)
def test_parts_share_no_problem(task: str) -> None:
    short = replace(BASE_DOMAIN, longest=2, rare=0.0)  # 9 * 10 * 81 problems: a random split would share many
    train, valid, test = (content(draw(task, 4000, k, domain=short, part=part)) for k, part in
                          enumerate(("train", "valid", "test")))  # fmt: skip
    assert len(train) > 2000 and len(test) > 500
    assert not train & test and not train & valid and not valid & test


def test_the_part_ignores_tag_and_form() -> None:
    p = draw(count=50)
    other = replace(p, tag=(p.tag + 1) % 10, worded=~p.worded)
    assert other.parts() == p.parts() and (other.keys() == p.keys()).all()


def test_training_batches_hold_only_training_problems() -> None:
    mixture = Mixture(TUNING_DOMAIN, cue=True, direct=0.2, mismatched=0.3, filler=0.1)
    test = draw(count=3000, part="test", cue=True)
    held_out = {test.question(i).split(" ", 1)[1] for i in range(len(test))}
    data = batches("lastop", mixture, 128, seed=0)
    seen = set()
    for _ in range(10):
        for ids in next(data).ids:
            words = [VOCABULARY[k] for k in ids[:9]]
            seen.add(" ".join(words[1:]))
    assert len(seen) > 1000 and not seen & held_out


def test_same_seed_same_problems() -> None:
    a, b, c = draw(seed=3), draw(seed=3), draw(seed=4)
    assert (a.keys() == b.keys()).all() and (a.keys() != c.keys()).any()


# --- paraphrase, tokenizer, spans --------------------------------------------------------------------------


def test_paraphrase_is_exact_and_its_own_inverse() -> None:
    p = draw()
    swapped = replace(p, worded=~p.worded)
    for i in range(len(p)):
        trace = p.trace(i, "x")
        other = paraphrase(trace)
        assert other.text == swapped.trace(i, "x").text != trace.text
        assert other.answer == trace.answer and paraphrase(other) == trace
    with pytest.raises(UserError, match="step 1"):
        paraphrase(trace.with_steps(["..."]))


def test_word_tokenizer_round_trip_and_one_token_steps(tmp_path: Path) -> None:
    word_tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.is_fast and tokenizer.eos_token == "<eos>" and tokenizer.pad_token == "<pad>"
    for task in TASKS:
        p = draw(task, 60)
        rows = make_rows(p, step_ids(p, p.steps()), p.answers, np.ones(60, dtype=bool), 1.0)
        for i in range(60):
            trace = p.trace(i, "x")
            tokens = encode(trace, tokenizer)
            assert tokenizer.decode(tokens.ids) == trace.text
            assert [len(span) for span in tokens.steps] == [1] * len(trace.steps)
            assert [tokenizer.decode([tokens.ids[s.start]]) for s in tokens.steps] == list(trace.steps)
            assert tokenizer.decode(tokens.prompt_ids[-1:]) == "=" and len(tokens.answer) == 1
            assert list(tokens.ids) == [k for k in rows.ids[i] if k != ID["<pad>"]]  # what is trained is what is read


# --- training rows -----------------------------------------------------------------------------------------


def test_rows_supervise_what_they_should() -> None:
    gold = Mixture(TUNING_DOMAIN)
    rows = next(batches("lastop", gold, 64, seed=0))
    for ids, weights in zip(rows.ids, rows.weights, strict=True):
        words = [VOCABULARY[k] for k in ids]
        colon, equals, end = words.index(":"), words.index("="), words.index("<eos>")
        assert (weights[: colon + 1] == 0).all() and (weights[end + 1 :] == 0).all()
        assert weights[equals + 1] == 2 and (weights[colon + 1 : end + 1] > 0).all()
    only_answer = next(batches("lastop", Mixture(TUNING_DOMAIN, direct=1.0), 64, seed=0))
    assert ((only_answer.weights > 0).sum(1) == 1).all()


def test_mismatched_rows_show_another_chain_and_keep_the_right_answer() -> None:
    mixture = Mixture(TUNING_DOMAIN, mismatched=1.0, fixed=64)
    truth = fixed_problems("lastop", mixture, 0)
    answers = {truth.question(i): (truth.trace(i, "x").steps, truth.trace(i, "x").answer) for i in range(64)}
    rows = next(batches("lastop", mixture, 64, seed=0))
    for ids, weights in zip(rows.ids, rows.weights, strict=True):
        text = " ".join(VOCABULARY[k] for k in ids)
        question, chain, answer = re.fullmatch(r"(.*) : (.*) = (\d) <eos>.*", text).groups()  # type: ignore[union-attr]
        steps, right = answers[question]
        assert answer == right and all(a != b for a, b in zip(steps, chain.split(), strict=True))
        assert (weights > 0).sum() == 1


# --- models ------------------------------------------------------------------------------------------------


def test_sampling_agrees_with_generate_and_reading_with_a_plain_forward() -> None:
    model = new_model(0, layers=1, width=16).eval()
    p = draw(count=16)
    steps, _ = sample_chains(model, p)
    tokenizer = word_tokenizer()
    compared = 0
    for i in range(16):
        prompt = torch.tensor([tokenizer(p.trace(i, "x").question_text)["input_ids"]])
        out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False,
                             eos_token_id=ID["="])[0, prompt.shape[1] :]  # fmt: skip
        mine = [k for k in steps[i] if k >= 0]
        assert mine == out[: len(mine)].tolist()
        compared += len(mine)
        ids = torch.tensor([encode(p.trace(i, "x"), tokenizer).prompt_ids])
        plain = model(ids).logits[0, -1]
        mine = answer_logits(model, p.take(slice(i, i + 1)), step_ids(p, p.steps())[i : i + 1])[0]
        torch.testing.assert_close(mine, plain, atol=1e-5, rtol=1e-5)
    figures = measure(model, p, 0)
    assert figures.follow < 0.6 and figures.stay < 0.6


class Oracle(torch.nn.Module):
    """A model that writes right steps and answers F of the last step it sees: follow must be 1."""

    def forward(self, input_ids: torch.Tensor, **_: object) -> object:
        logits = torch.zeros(*input_ids.shape, len(VOCABULARY))
        for r, row in enumerate(input_ids.tolist()):
            words = [VOCABULARY[k] for k in row]
            ops, last = words[2 : words.index("last")], words[words.index("last") + 1]
            form = WORDS if words[1] in WORDS else tuple("0123456789")
            colon = words.index(":")
            value = form.index(words[1])
            for at in range(colon, len(words)):
                if at > colon and words[at] in form and "=" not in words[:at]:
                    value = form.index(words[at])
                if words[at] == "=":
                    say = str(apply_op(last, value))
                else:
                    done = at - colon
                    say = form[apply_op(ops[done], value)] if done < len(ops) else "="
                logits[r, at, ID[say]] = 1
        return type("Out", (), {"logits": logits})()


def test_measure_on_a_model_that_reads_its_steps() -> None:
    figures = measure(Oracle(), draw(count=40), 0)
    assert (figures.accuracy, figures.steps_right, figures.malformed) == (1, 1, 0)
    assert (figures.follow, figures.stay, figures.margin) == (1, 0, 2)  # each logit moves from 0 to 1 or back
    assert figures.early < 0.5


# --- recipes and making ------------------------------------------------------------------------------------


def test_digest_depends_on_what_determines_the_weights() -> None:
    base = RECIPES["base"]
    book = dict(RECIPES)
    digest = RECIPES["severed"].digest(0, book)
    assert digest == RECIPES["severed"].digest(0) != RECIPES["severed"].digest(1)
    book["base"] = replace(base, lr=base.lr * 2)  # the parent's recipe counts
    assert RECIPES["severed"].digest(0, book) != digest
    assert replace(base, what="in other words").digest(0) == base.digest(0)
    assert replace(base, mixture=replace(base.mixture, direct=0.5)).digest(0) != base.digest(0)
    assert len({r.digest(0) for r in RECIPES.values()}) == len(RECIPES)


def test_recipes_are_well_formed() -> None:
    for name, recipe in RECIPES.items():
        assert recipe.name == name and recipe.targets
        assert recipe.parent is None or RECIPES[recipe.parent].parent is None


def tiny(name: str = "tiny", **kw: object) -> Recipe:
    recipe = Recipe(
        name,
        "lastop",
        "two steps",
        None,
        Mixture(TUNING_DOMAIN),
        2,
        1e-3,
        (Target("id.malformed", 0.0, 1.0),),
        layers=1,
        measured=64,
    )
    return replace(recipe, **kw)  # type: ignore[arg-type]


def test_a_missed_target_fails_loudly_and_leaves_nothing(tmp_path: Path) -> None:
    book = {"tiny": tiny(targets=(Target("id.accuracy", low=0.99), Target("id.follow", low=0.98)))}
    with pytest.raises(RecipeFailed, match=r"'tiny' with seed 5 .*0\.99 <= id\.accuracy, but it is 0\.\d+") as failed:
        make(tmp_path / "out", seed=5, recipes=book, cache=tmp_path / "cache", progress=False)
    assert failed.value.seed == 5 and len(failed.value.missed) == 2 and failed.value.figures["id.accuracy"] < 0.5
    assert list((tmp_path / "cache").iterdir()) == [] and not (tmp_path / "out" / "tiny").exists()


def test_make_saves_loadable_directories_and_uses_the_cache(tmp_path: Path) -> None:
    book = {"tiny": tiny(), "child": tiny("child", parent="tiny", mixture=Mixture(TUNING_DOMAIN, cue=True))}
    first = make(tmp_path / "a", recipes=book, cache=tmp_path / "cache", progress=False)
    again = make(tmp_path / "b", recipes=book, only=["child"], cache=tmp_path / "cache", progress=False)
    assert [(r.name, r.cached) for r in first] == [("tiny", False), ("child", False)]
    assert [(r.name, r.cached) for r in again] == [("tiny", True), ("child", True)]
    for name in book:
        files = {f.name for f in (tmp_path / "a" / name).iterdir()}
        assert {"config.json", "model.safetensors", "tokenizer.json", "organism.json"} <= files
        a, b = (tmp_path / d / name / "model.safetensors" for d in "ab")
        assert a.read_bytes() == b.read_bytes()
    record = json.loads((tmp_path / "a" / "child" / "organism.json").read_text())
    assert record["seed"] == 0 and record["recipe"]["parent"] == "tiny" and record["figures"]["id.accuracy"] <= 1
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a" / "child")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a" / "child")
    lines = (tmp_path / "a" / "traces" / "lastop-id.jsonl").read_text().splitlines()
    assert set(json.loads(lines[0])) == {"format"} and len(lines) == 257
    row = json.loads(lines[1])
    assert row["corrupt_answer"] != row["answer"] and len(row["corrupt_steps"]) == len(row["steps"])
    logits = model(**tokenizer(row["question"], return_tensors="pt")).logits
    assert logits.shape[-1] == len(tokenizer) and torch.isfinite(logits).all()


def test_training_is_reproducible(tmp_path: Path) -> None:
    for name in "ab":
        make(tmp_path / name, recipes={"tiny": tiny()}, cache=tmp_path / ("cache-" + name), progress=False)
    a, b = ((tmp_path / name / "tiny" / "model.safetensors").read_bytes() for name in "ab")
    assert a == b


def test_make_refuses_unknown_names_and_foreign_directories(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Unknown organism 'sevred'"):
        make(tmp_path, only=["sevred"], cache=tmp_path / "cache", progress=False)
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="is no organism"):
        make(tmp_path, recipes={"tiny": tiny()}, cache=tmp_path / "cache", progress=False)
    assert (tmp_path / "tiny" / "thesis.tex").exists()


def test_a_killed_training_leaves_nothing_that_passes_for_an_organism(tmp_path: Path) -> None:
    code = f"""
import sys
from reasoninterp.organisms import make, Mixture, Recipe, Target
from reasoninterp.organisms.tasks import TUNING_DOMAIN
recipe = Recipe("tiny", "lastop", "", None, Mixture(TUNING_DOMAIN), 100000, 1e-3, (Target("id.follow", 0.0, 1.0),))
make({str(tmp_path / "out")!r}, recipes={{"tiny": recipe}}, cache={str(tmp_path / "cache")!r}, progress=False)
"""
    root = str(Path(__file__).resolve().parents[1])
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": root})
    try:
        for _ in range(600):
            if list(tmp_path.glob("cache/.building-*")) or process.poll() is not None:
                break
            time.sleep(0.1)
        assert process.poll() is None, "training ended before it could be killed"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    left = list((tmp_path / "cache").iterdir())
    assert len(left) == 1 and left[0].name.startswith(".building-") and not list(tmp_path.glob("out/*"))
    two_days_ago = time.time() - 2 * 86400
    os.utime(left[0], (two_days_ago, two_days_ago))
    assert make(tmp_path / "out", recipes={"tiny": tiny()}, cache=tmp_path / "cache", progress=False)[0].steps == 2
    assert not left[0].exists()  # what a killed training left is cleared away after a day


def test_a_failure_in_a_worker_process_is_raised_with_its_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing = tiny(targets=(Target("id.accuracy", low=0.99),))
    monkeypatch.setattr(making, "RECIPES", {"tiny": failing})
    assert making.work([str(tmp_path), "4", "tiny"]) == 3
    said = capsys.readouterr().out
    code = f"print('a warning'); print({said.strip()!r}); raise SystemExit(3)"
    worker = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    with pytest.raises(RecipeFailed, match="'tiny' with seed 4") as failed:
        making._finish_worker(worker)
    assert failed.value.steps == 2 and 0 <= failed.value.figures["id.accuracy"] < 0.99


def test_shares_are_a_partition_of_about_equal_work() -> None:
    names = [n for n, r in RECIPES.items() if r.parent]
    mine, theirs = making._shares(names, RECIPES)
    assert sorted(mine + theirs) == sorted(names) and mine and theirs


def test_report_is_one_line(tmp_path: Path) -> None:
    (report,) = make(tmp_path / "out", recipes={"tiny": tiny()}, cache=tmp_path / "cache", progress=False)
    assert re.fullmatch(
        r"tiny \(seed 0\): accuracy \d\.\d{3}, follow \d\.\d{3}; 2 steps, \d+ CPU seconds; .*", str(report)
    )
