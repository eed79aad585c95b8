"""Contrasts: what is changed, what it implies, whether it aligns, and that nothing is lost on the way."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from reasoninterp.errors import UserError
from reasoninterp.traces import TraceFile, convert, read_traces
from reasoninterp.traces.contrast import (
    Contrast,
    ContrastSet,
    alignment,
    changed_steps,
    contrast,
    make_contrasts,
    states_answer,
    withheld,
)
from reasoninterp.traces.trace import Trace, encode

FIXTURES = Path(__file__).parent / "fixtures"
DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "gsm8k"


def byte_bpe(texts: list[str], size: int) -> PreTrainedTokenizerFast:
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.post_processor = processors.ByteLevel(trim_offsets=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tok.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=tok)


@pytest.fixture(scope="module")
def own() -> TraceFile:
    return TraceFile.of(convert("gsm8k", FIXTURES / "gsm8k_like.jsonl").traces)


@pytest.fixture(scope="module")
def gsm8k() -> TraceFile:
    if not DATA.exists():
        pytest.skip("the data folder is not here")
    return TraceFile.of(convert("gsm8k", DATA / "test.jsonl").traces)


def floats(text: str) -> list[tuple[float, float]]:
    """Both sides of every annotation by Python's own arithmetic: an oracle that shares nothing with the package."""
    return [(eval(a), eval(b)) for a, b in re.findall(r"<<([^<>=]+)=([^<>=]+)>>", text)]


def check(found: ContrastSet, traces: TraceFile) -> None:
    """What must hold of every propagated contrast."""
    assert len(found.contrasts) + len(found.refused) == len(traces)
    assert {c.clean.id for c in found.contrasts} | {r.trace_id for r in found.refused} == {t.id for t in traces}
    for c in found.contrasts:
        clean, corrupt = "\n".join(c.clean.steps), "\n".join(c.corrupt.steps)
        before, after = floats(clean), floats(corrupt)
        assert len(before) == len(after)
        wrong = [k for k, (a, b) in enumerate(after) if a != pytest.approx(b, abs=0.006)]
        was_wrong = [k for k, (a, b) in enumerate(before) if a != pytest.approx(b, abs=0.006)]
        planted = set(wrong) - set(was_wrong)
        assert len(planted) <= 1 and not set(was_wrong) - set(wrong), "only the planted mistake is a mistake"
        first = c.changed[0]
        here = range(len(floats("\n".join(c.clean.steps[:first]))), len(floats("\n".join(c.clean.steps[: first + 1]))))
        assert planted <= set(here), "and it stands in the first changed step"
        for a, b in re.findall(r"<<[^<>=]+=([\d.]+)>>\$? ?([\d,.]*\d)", corrupt):
            if float(a) != float(b.replace(",", "")):
                assert f">>{b}" in clean, "the number behind an annotation is its result unless it never was"
        assert re.sub(r"[\d.,]+", "#", clean) == re.sub(r"[\d.,]+", "#", corrupt), "nothing but numbers changes"
        assert c.changed == changed_steps(c.clean.steps, c.corrupt.steps) != ()
        assert c.clean.question == c.corrupt.question and c.clean.answer != c.corrupt.answer
        assert re.findall(r"\d+", c.corrupt.answer)


def test_own_fixture_by_name(own: TraceFile) -> None:
    found = make_contrasts(own)
    check(found, own)
    assert [c.clean.id for c in found.contrasts] == ["gsm8k_like-0", "gsm8k_like-1", "gsm8k_like-2"]
    assert found.reasons() == {"no calculation": 1}
    second = found.contrasts[1]
    assert second.changed == (0, 2, 3) and second.corrupt.steps[1] == second.clean.steps[1]
    assert second.corrupt.answer == second.corrupt.steps[3].split(">>")[1][:-1]
    assert second.corrupt.meta["corruption"]["old"] == "625"


def test_the_same_seed_gives_the_same_contrasts_and_another_seed_others(own: TraceFile) -> None:
    assert make_contrasts(own, seed=3) == make_contrasts(own, seed=3)
    assert make_contrasts(own, seed=3).contrasts != make_contrasts(own, seed=4).contrasts


def test_all_of_the_data_set_is_made_or_refused_and_consistent(gsm8k: TraceFile) -> None:
    found = make_contrasts(gsm8k)
    check(found, gsm8k)
    assert len(found) > 1000


def test_aligned_contrasts_have_the_same_spans(gsm8k: TraceFile) -> None:
    some = gsm8k.head(50)
    texts = [t.text for t in gsm8k.traces[:300]]
    tokenizer = byte_bpe(texts, 1000)
    found = make_contrasts(some, tokenizer=tokenizer, require_aligned=True)
    check(found, some)
    assert len(found) > 30
    for c in found.contrasts:
        a, b = encode(c.clean, tokenizer), encode(c.corrupt, tokenizer)
        assert c.aligned and len(a.ids) == len(b.ids) and dict(a.spans) == dict(b.spans) and a.ids != b.ids
        changed = {p for i in c.changed for p in range(*a.steps[i])} | set(range(*a.answer))
        assert all(x == y for p, (x, y) in enumerate(zip(a.ids, b.ids, strict=True)) if p not in changed)
    loose = make_contrasts(some, tokenizer=tokenizer)
    assert len(loose) >= len(found) and sum(c.aligned for c in loose.contrasts) == len(found)


def test_alignment_names_what_differs() -> None:
    tokenizer = byte_bpe(["7 12"], 257)
    base = Trace("a", "q", ("s 7", "t 12"), "12")
    tokens = encode(base, tokenizer)
    assert alignment(tokens, tokens) is None
    for other, reason in [
        (base.with_steps(["s 7"]), "numbers of steps"),
        (base.with_steps(["s 71", "t 2"]), "steps of different"),
        (base.with_steps(base.steps, answer="123"), "answers of different"),
        (replace(base, question="qq"), "steps of different"),
    ]:
        assert reason in (alignment(tokens, encode(other, tokenizer)) or "")


def test_the_files_own_corrupt_chains_are_used_as_they_stand() -> None:
    found = make_contrasts(read_traces(FIXTURES / "traces_small.jsonl"))
    assert found.contrasts[0].corrupt.steps == ("2 + 3 = 6", "6 * 4 = 24") and found.contrasts[0].corrupt.answer == "24"
    assert found.reasons() == {"no calculation": 1} and set(found.pairs()) == {"t1"}
    t = Trace("a", "q", ("s",), "1,000")
    for pair, reason in [
        ((("t",), "1000"), "the corrupt answer is the clean one"),
        ((("s",), "2"), "the corrupt steps"),
    ]:
        refused = make_contrasts(TraceFile.of([t], {"a": pair})).refused
        assert refused[0].reason.startswith(reason)


def test_forced_changes_one_step_and_keeps_the_implied_answer(own: TraceFile) -> None:
    propagated, forced = make_contrasts(own, seed=1), make_contrasts(own, kind="forced", seed=1)
    for p, f in zip(propagated.contrasts, forced.contrasts, strict=True):
        assert f.kind == "forced" and f.changed == p.changed[:1] and f.corrupt.answer == p.corrupt.answer
        assert f.corrupt.steps[f.changed[0]] == p.corrupt.steps[f.changed[0]]


def test_swaps_take_each_chain_once_where_answers_allow() -> None:
    traces = [Trace(f"t{k}", f"q{k}", (f"s{k}",), str(k % 4)) for k in range(40)]
    found = make_contrasts(TraceFile.of(traces), kind="swap", seed=2)
    assert [c.clean.id for c in found.contrasts] == [t.id for t in traces]
    for c in found.contrasts:
        assert c.corrupt.answer != c.clean.answer and c.corrupt.question == c.clean.question
        source = next(t for t in traces if t.id == c.corrupt.meta["corruption"]["source"])
        assert (source.steps, source.answer) == (c.corrupt.steps, c.corrupt.answer)
    assert len({c.corrupt.steps for c in found.contrasts}) >= 38
    alone = make_contrasts(TraceFile.of([traces[0], traces[4]]), kind="swap")
    assert alone.reasons() == {"no other trace has another answer": 2}


def test_aligned_swaps_have_chains_of_equal_token_lengths() -> None:
    tokenizer = byte_bpe(["abc"], 257)
    traces = [Trace(f"t{k}", "q" * k, ("s" * (1 + k % 3), str(k)), str(k)) for k in range(9)]
    found = make_contrasts(TraceFile.of(traces), kind="swap", tokenizer=tokenizer, require_aligned=True)
    assert len(found) == 9
    for c in found.contrasts:
        assert c.aligned and len(c.clean.steps[0]) == len(c.corrupt.steps[0])


def test_withheld_contrasts_no_longer_state_the_answer(gsm8k: TraceFile) -> None:
    seen = 0
    for c in make_contrasts(gsm8k.head(300)).contrasts:
        kept = withheld(c)
        if kept is None:
            continue
        seen += 1
        assert kept.changed and len(kept.clean.steps) == len(kept.corrupt.steps) < len(c.clean.steps)
        for i in kept.changed:
            number = re.escape(kept.clean.answer.replace(",", ""))
            assert not re.search(rf"(?<![\d.]){number}(?![\d]|\.\d)", kept.clean.steps[i].replace(",", ""))
    assert seen > 150


def test_withholding_by_hand() -> None:
    clean = Trace("a", "q", ("x 5", "so 1,000", "the end is 1000."), "1000")
    corrupt = clean.with_steps(["x 6", "so 1,200", "the end is 1200."], answer="1200")
    kept = withheld(contrast("propagated", clean, corrupt))
    assert kept is not None and kept.clean.steps == ("x 5",) and kept.corrupt.steps == ("x 6",) and kept.changed == (0,)
    assert withheld(kept) == replace(kept, id=kept.id + "/withheld", clean=kept.clean.with_steps(
        kept.clean.steps, meta={"withheld": []}), corrupt=kept.corrupt.with_steps(
        kept.corrupt.steps, meta={"withheld": []}))  # fmt: skip
    only = Contrast("c", "propagated", clean.with_steps(["so 1000"]), corrupt.with_steps(["so 1200"]), (0,))
    assert withheld(only) is None


def test_what_states_an_answer() -> None:
    yes = [
        ("it is 1,000.", "1000"),
        ("so seven cats", "7"),
        ("= 18.00", "18"),
        ("That is True.", "True"),
        ("(C) it is", "C"),
    ]
    no = [("it is 1000", "100"), ("Carl has 3", "C"), ("untrue", "true"), ("1.8", "18"), ("", "x")]
    assert all(states_answer(step, answer) for step, answer in yes)
    assert not any(states_answer(step, answer) for step, answer in no)


def test_bad_arguments_are_named(own: TraceFile) -> None:
    with pytest.raises(UserError, match="need a tokenizer"):
        make_contrasts(own, require_aligned=True)
    with pytest.raises(UserError, match="written by a mind"):
        make_contrasts(own, kind="regenerated")
    with pytest.raises(UserError, match="share question"):
        contrast("swap", own.traces[0], own.traces[1])


def test_contrasts_survive_a_trace_file(own: TraceFile, tmp_path: Path) -> None:
    from reasoninterp.traces import write_traces

    made = make_contrasts(own)
    write_traces(tmp_path / "t.jsonl", own.traces, made.pairs())
    again = make_contrasts(read_traces(tmp_path / "t.jsonl"))
    assert [c.corrupt.steps for c in again.contrasts] == [c.corrupt.steps for c in made.contrasts]
    assert json.loads((tmp_path / "t.jsonl").read_text().splitlines()[1])["corrupt_answer"]
