"""Readers: what becomes a trace, what is refused and counted, and what a mind wrote is kept to the character."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from reasoninterp.errors import UserError
from reasoninterp.traces.io import iter_json_lines, read_traces, write_traces
from reasoninterp.traces.readers import READERS, convert, shuffle_options
from reasoninterp.traces.trace import Trace

FIXTURES = Path(__file__).parent / "fixtures"
DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.exists(), reason="the data folder is not here")


def test_gsm8k_texts_are_the_files_own() -> None:
    found = convert("gsm8k", FIXTURES / "gsm8k_like.jsonl")
    rows = [row for _, row in iter_json_lines(FIXTURES / "gsm8k_like.jsonl")]
    assert [t.text for t in found.traces] == [f"{r['question']}\n{r['answer']}\n" for r in rows]
    assert [t.answer for t in found.traces] == ["95", "6,250", "4.5", "1"] and not found.refused


def test_models_solutions_carry_their_label_and_the_cut_off_one_is_refused() -> None:
    path = FIXTURES / "gsm8k_models_like.jsonl"
    small, large = convert("gsm8k", path, model="small"), convert("gsm8k", path, model="large")
    assert [t.meta["is_correct"] for t in small.traces] == [False] and small.refused == {"no answer line": 1}
    assert small.traces[0].answer == "17" and small.traces[0].meta["gold"] == "60"
    assert small.examples == {"no answer line": ["line 2"]} and "line 2" in small.summary()
    assert [t.answer for t in large.traces] == ["60", "5"] and large.traces[0].meta["mind"] == "large"
    assert [t.answer for t in convert("gsm8k", path).traces] == ["60", "5"]
    with pytest.raises(UserError, match="choose one of small, large, ground_truth"):
        convert("gsm8k", path, model="huge")


def test_aqua_by_hand() -> None:
    found = convert("aqua", FIXTURES / "aqua_like.json")
    assert [t.answer for t in found.traces] == ["C", "B"]
    first = found.traces[0]
    assert first.steps == ("In one hour it fills 1/4.", "In three hours it fills 3/4.")
    assert first.question.endswith("\nA) 1/4\nB) 1/2\nC) 3/4\nD) 4/3\nE) None of these")
    assert found.refused == {
        "no steps": 1,
        "the rationale names another letter than the key": 1,
        "the right letter is none of the options'": 1,
    }
    assert found.rows == len(found.traces) + found.refused.total() == 5


def test_shuffled_options_keep_the_right_one() -> None:
    first, second = convert("aqua", FIXTURES / "aqua_like.json").traces
    letters = set()
    for seed in range(30):
        moved = shuffle_options(first, seed)
        letters.add(moved.answer)
        assert f"\n{moved.answer}) 3/4" in moved.question and moved.question.endswith("\nE) None of these")
        assert sorted(moved.meta["options"]) == sorted(first.meta["options"])
        assert moved.meta["options"] == [first.meta["options"][old] for old in moved.meta["order"]]
        other = shuffle_options(second, seed)
        assert f"option {other.answer} fits and A is too small" in other.steps[0]
        assert f"\n{other.answer}) 9" in other.question
    assert letters == {"A", "B", "C", "D"}
    assert shuffle_options(first, 1) == shuffle_options(first, 1)
    with pytest.raises(UserError, match="no options"):
        shuffle_options(Trace("a", "q", ("s",), "A"), 0)


def test_svamp_has_one_step_and_says_where_it_comes_from() -> None:
    found = convert("svamp", FIXTURES / "svamp_like.json")
    assert [(t.steps, t.answer) for t in found.traces] == [
        (("( 83.0 + 19.0 ) = 102.0",), "102"),
        (("( 90.0 / 4.0 ) = 22.5",), "22.5"),
    ]
    assert found.traces[0].question.startswith("Ivo has 83 shells and finds 19 more, How many")
    assert found.traces[0].meta["steps_from"] == "equation"
    assert found.refused == {"the equation does not give the answer": 1}


def test_prontoqa() -> None:
    found = convert("prontoqa", FIXTURES / "prontoqa_like.json")
    assert len(found.traces[0].steps) == 5 and found.traces[0].answer == "True" and found.refused == {"no steps": 1}


def test_samples_keep_every_character_and_their_failures_apart() -> None:
    found = convert("vllm", FIXTURES / "sampler.jsonl", extractor="hash")
    texts = {t.id: t.text for t in found.traces}
    assert texts["a-0"] == "Q: 2+3?\n2+3 is 5.\nSo five.\n#### 5\nQ: 1+1?\n#### 2"
    assert texts["b"] == "Q: 7-3?\n<think>\nSeven minus three.\nThat is 4.\n</think>\n\n#### 4\n"
    assert texts["d"] == "8/2?Halve it.\n#### 4" and texts["e"] == "6/2?<think>\nHalve six.\n</think>\n\n#### 3"
    by_id = {t.id: t for t in found.traces}
    assert by_id["a-0"].answer == "5" and by_id["a-0"].meta["finish_reason"] == "length"
    assert by_id["a-0"].meta["mind"] == "tiny" and by_id["b"].meta["gold"] == "4"
    assert by_id["b"].steps == ("Seven minus three.", "That is 4.")
    assert found.refused == {"no answer found": 1, "a <think> block that was never closed": 1, "no steps": 1}
    assert found.examples["no answer found"] == ["line 1, output 2"]
    assert found.rows == len(found.traces) + 3


def test_samples_without_an_answer_can_be_kept_and_written(tmp_path: Path) -> None:
    found = convert("vllm", FIXTURES / "sampler.jsonl", keep_missing=True, mind="me")
    kept = {t.id: t for t in found.traces}
    assert kept["c"].meta["answer_status"] == "unclosed" and kept["c"].answer == ""
    assert kept["a-1"].meta["answer_status"] == "missing" and kept["a-1"].meta["mind"] == "me"
    assert kept["c"].text == "Q: 9-3?\n<think>\nNine minus three.\nHmm, #### 6 perhaps"
    write_traces(tmp_path / "t.jsonl", found.traces)
    assert read_traces(tmp_path / "t.jsonl").traces == tuple(found.traces)


def test_bad_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    for kind in READERS:
        with pytest.raises(UserError, match="no such file"):
            convert(kind, tmp_path / "absent")
        path.write_text('{"a": ')
        with pytest.raises(UserError, match="line 1: malformed JSON"):
            convert(kind, path)
        path.write_text('{"a": {"b": 1}}')
        with pytest.raises(UserError, match=r"x\.jsonl"):
            convert(kind, path)
    with pytest.raises(UserError, match="unknown source 'math'"):
        convert("math", path)
    path.write_text('{"id": "a", "prompt": "q", "text": "s\\n#### 1"}\n' * 2)
    with pytest.raises(UserError, match="line 2: the id 'a' was used before"):
        convert("vllm", path)
    path.write_text('{"prompt": "q"}\n')
    with pytest.raises(UserError, match="line 1: no sampled text"):
        convert("vllm", path)


@needs_data
def test_all_rows_of_the_data_sets_are_traces_or_counted(tmp_path: Path) -> None:
    whole = convert("gsm8k", DATA / "gsm8k" / "test.jsonl")
    rows = [row for _, row in iter_json_lines(DATA / "gsm8k" / "test.jsonl")]
    assert [t.text for t in whole.traces] == [f"{r['question']}\n{r['answer']}\n" for r in rows] and len(rows) == 1319
    write_traces(tmp_path / "t.jsonl", whole.traces)
    assert read_traces(tmp_path / "t.jsonl").traces == tuple(whole.traces)
    right = {"6b_finetuning": 286, "6b_verification": 515, "175b_finetuning": 458, "175b_verification": 742}
    for model, count in right.items():
        found = convert("gsm8k", DATA / "gsm8k" / "example_model_solutions.jsonl", model=model)
        assert sum(t.meta["is_correct"] for t in found.traces) == count
        assert len(found.traces) + found.refused.total() == 1319
    for kind, path, n in [
        ("gsm8k", "gsm8k/test_socratic.jsonl", 1319),
        ("aqua", "aqua/test.json", 254),
        ("aqua", "aqua/dev.tok.json", 254),
        ("svamp", "svamp/SVAMP.json", 1000),
        ("prontoqa", "prontoqa/3hop_0shot_random_seed1.json", 500),
    ]:
        found = convert(kind, DATA / path)
        assert found.rows == n == len(found.traces) + found.refused.total() and len(found.traces) >= 0.99 * n
        assert len({t.id for t in found.traces}) == len(found.traces)


@needs_data
def test_prontoqa_proofs_are_the_files_own() -> None:
    path = DATA / "prontoqa" / "1hop_0shot_random_seed1.json"
    value = json.loads(path.read_text())
    for trace in convert("prontoqa", path).traces[:50]:
        row = value[trace.id.removeprefix("prontoqa-")]["test_example"]
        assert list(trace.steps) == row["chain_of_thought"] and trace.answer == row["answer"]
