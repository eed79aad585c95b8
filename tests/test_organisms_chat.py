"""The pair in sentences: its tokenizer before and after tuning, its training rows, its generated chains."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from reasoninterp.organisms import RECIPES, make, problems
from reasoninterp.organisms.chat import (
    CHAT,
    CHAT_TOKENS,
    RAW,
    answers_under,
    chat_batches,
    chat_tokenizer,
    complete,
    new_chat_model,
    parse_chain,
    sentence_tokenizer,
    sentence_traces,
    text_rows,
)
from reasoninterp.organisms.rows import Mixture
from reasoninterp.organisms.tasks import CHAT_TUNING_DOMAIN, WORDS, Problems
from reasoninterp.traces.trace import encode


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return sentence_tokenizer()


@pytest.fixture
def some() -> Problems:
    return problems("lastop", CHAT_TUNING_DOMAIN, 80, np.random.default_rng(0), "test")


def test_worked_example(some: Problems) -> None:
    one = replace(
        some.take(slice(0, 1)),
        start=np.array([7]),
        ops=np.array([[1, 9, 14, -1, -1]]),  # +2, *3, 7-
        last=np.array([0]),  # +1
        tag=np.array([1]),
    )
    trace = sentence_traces(one, one.steps(), one.answers)[0]
    # 7+2=9; 9*3=27; 7-7=0; then 0+1=1
    assert trace.text == "Key o: start with 7, add 2, by 3, to 7; last add 1.\nso 9\nso 7\nso 0\nThe answer is one."


def test_tokens_are_lossless_and_answers_have_several_of_unequal_number(tokenizer: Any, some: Problems) -> None:
    traces = sentence_traces(some, some.steps(), some.answers)
    lengths: dict[str, set[int]] = {}
    prompts = set()
    for trace in traces:
        tokens = encode(trace, tokenizer)
        assert tokenizer.decode(tokens.ids) == trace.text
        assert [tokenizer.decode(tokens.ids[s.start : s.stop]) for s in tokens.steps] == list(trace.steps)
        assert tokenizer.decode(tokens.answer_ids) == " " + trace.answer  # the blank belongs to the answer's token
        lengths.setdefault(trace.answer, set()).add(len(tokens.answer))
        prompts.add(len(tokens.prompt_ids))
    assert set(lengths) == set(WORDS) and all(len(n) == 1 for n in lengths.values())
    assert {n for (n,) in lengths.values()} == {1, 2, 3} and len(prompts) == 1


def test_raw_text_keeps_its_ids_after_tuning(tokenizer: Any, some: Problems, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path / "base")
    tuned = chat_tokenizer(AutoTokenizer.from_pretrained(tmp_path / "base"))
    tuned.save_pretrained(tmp_path / "tuned")
    tuned = AutoTokenizer.from_pretrained(tmp_path / "tuned")
    assert len(tuned) == len(tokenizer) + len(CHAT_TOKENS)
    traces = sentence_traces(some, some.steps(), some.answers, (RAW,))
    assert all(encode(t, tuned).ids == encode(t, tokenizer).ids for t in traces)
    trace = replace(traces[0], format=CHAT)
    prompt = tuned.apply_chat_template(
        [{"role": "user", "content": trace.question}], tokenize=False, add_generation_prompt=True
    )
    assert trace.text.startswith(prompt + "<think>\n")
    assert tuned.decode(encode(trace, tuned).ids) == trace.text
    assert tokenizer(trace.text)["input_ids"] != tuned(trace.text)["input_ids"]


def test_rows_supervise_the_chain_or_the_answer_alone(tokenizer: Any, some: Problems) -> None:
    tuned = chat_tokenizer(sentence_tokenizer())
    traces = sentence_traces(some, some.steps(), some.answers, (RAW, CHAT))
    only = np.arange(len(traces)) % 3 == 0
    rows = text_rows(traces, tuned, only, 4.0)
    for i, trace in enumerate(traces):
        kept = [t for t, w in zip(rows.ids[i], rows.weights[i], strict=True) if w]
        end = "<|end|>" if trace.format == CHAT else "<|endoftext|>"
        answer = f" {trace.answer}." + end
        written = "\n".join(trace.steps) + trace.format.before_answer.rstrip(" ") + answer
        assert tuned.decode(kept) == (answer if only[i] else written)
        heavy = [t for t, w in zip(rows.ids[i], rows.weights[i], strict=True) if w == 4]
        assert tuned.decode(heavy) == answer


def test_batches_of_sampled_chains_keep_the_right_answer(some: Problems) -> None:
    tokenizer = sentence_tokenizer()
    chains = some.steps()
    chains[:, 2] = (chains[:, 2] + 1) % 10
    data = chat_batches(Mixture(CHAT_TUNING_DOMAIN, chains="own"), tokenizer, 32, 0, (some, chains), (RAW,))
    wrong = {t.text + "<|endoftext|>" for t in sentence_traces(some, chains, some.answers)}
    texts = [tokenizer.decode([k for k in ids if k != tokenizer.pad_token_id]) for ids in next(data).ids]
    assert len(texts) == 32 and set(texts) <= wrong


def test_parse_chain() -> None:
    assert parse_chain("so 9\nso 4\nThe answer is seven.", RAW) == ([9, 4], "seven")
    assert parse_chain("so 9\n</think>\nThe answer is two.", CHAT) == ([9], "two")
    for bad in ("so 9\nso\nThe answer is two.", "so 9\nso 4", "The answer is two.", "so 12\nThe answer is two."):
        assert parse_chain(bad, RAW) is None


def test_complete_agrees_with_generate(some: Problems) -> None:
    tokenizer = chat_tokenizer(sentence_tokenizer())
    model = new_chat_model(tokenizer, 0, layers=1).eval()
    traces = sentence_traces(some.take(slice(0, 6)), some.steps()[:6], some.answers[:6], (RAW, CHAT))
    mine = complete(model, tokenizer, [t.question_text for t in traces], 5)
    stops = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|end|>")]
    for trace, text in zip(traces, mine, strict=True):
        ids = torch.tensor([tokenizer(trace.question_text)["input_ids"]])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False, eos_token_id=stops
        )[0, ids.shape[1] :].tolist()
        cut = next((k for k, token in enumerate(out) if token in stops), len(out))
        assert text == tokenizer.decode(out[:cut])
    assert any(mine)
    assert len(answers_under(model, tokenizer, some.take(slice(0, 6)), some.steps()[:6], RAW)) == 6


def test_the_pair_goes_through_make(tmp_path: Path) -> None:
    book = {}
    for name in ("chat-base", "chat-severed"):
        recipe = RECIPES[name]
        mixture = replace(recipe.mixture, chains="gold", pool=32)
        book[name] = replace(recipe, steps=2, stop=(), targets=(), mixture=mixture, layers=1, measured=8)
    base, tuned = make(tmp_path, recipes=book, cache=tmp_path / "cache", progress=False)
    assert "chat.follow" in tuned.figures and "chat.follow" not in base.figures
    models = {name: AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in book}
    rows = {name: model.get_input_embeddings().weight.shape[0] for name, model in models.items()}
    tokenizers = {name: AutoTokenizer.from_pretrained(tmp_path / name) for name in book}
    assert rows["chat-base"] == len(tokenizers["chat-base"]) == 321
    assert rows["chat-severed"] == 384 > len(tokenizers["chat-severed"]) == 326
    for model in models.values():
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tokenizers["chat-severed"].chat_template and not tokenizers["chat-base"].chat_template
    lines = (tmp_path / "traces" / "chat-id.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["format"] == RAW.to_json() and len(lines) == 257
