"""Formats: presets, files, few-shot prompts, and strings read off chat templates."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from reasoninterp.errors import UserError
from reasoninterp.traces.formats import PRESETS, chat_format, fewshot, resolve_format
from reasoninterp.traces.trace import Format, Trace, encode

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OPENS = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}<U>{{ m['content'] | trim }}"
    "{% else %}<A>{{ m['content'].split('</think>')[-1] }}<E>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<A><think>\n{% endif %}"
)
SKIPS = OPENS.replace("<A><think>\n", "<A><think>\n\n</think>\n\n")
REFUSES = "{{ raise_exception('no') }}"
TWICE = "{% for m in messages %}{{ m['content'] }}{{ m['content'] }}{% endfor %}"
COUNTS = "{% for m in messages %}{{ m['content'] | length }}:{{ m['content'] }};{% endfor %}"


def tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    letters = {chr(c): c for c in range(32, 127)} | {"\n": 1, "<unk>": 0, "<s>": 2}
    tok = Tokenizer(models.WordLevel(letters, unk_token="<unk>"))
    tok.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tok, unk_token="<unk>", bos_token="<s>")
    fast.chat_template = template
    return fast


@pytest.mark.parametrize("template", [CHATML, OPENS, SKIPS])
def test_a_trace_in_chat_format_starts_as_the_template_renders_its_question(template: str) -> None:
    tok = tokenizer(template)
    trace = Trace("a", "How many {{ cups }}?", ("one", "two"), "7", chat_format(tok))
    rendered = tok.apply_chat_template(
        [{"role": "user", "content": trace.question}], tokenize=False, add_generation_prompt=True
    )
    assert trace.text.startswith(rendered)
    chain = trace.text[len(trace.format.before_question) :]
    assert chain.count("<think>") - chain.count("</think>") == 0
    assert "<think>\none\ntwo\n</think>\n\n\\boxed{7}" in chain
    assert encode(trace, tok).ids.count(2) <= 1, "one opening token, also where the template writes it"


def test_the_end_of_turn_is_the_templates() -> None:
    assert chat_format(tokenizer(CHATML)).after_answer == "}<|im_end|>\n"
    assert chat_format(tokenizer(OPENS)).after_answer == "}<E>"


def test_a_system_message_is_part_of_what_precedes_the_question() -> None:
    fmt = resolve_format("chat", tokenizer(CHATML), system="Be brief.")
    assert fmt.before_question == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "no chat template"),
        (REFUSES, "refuses"),
        (TWICE, "once and unchanged"),
        (COUNTS, "depends on the message"),
    ],
)
def test_templates_that_cannot_be_a_format(template: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        chat_format(tokenizer(template))


def test_presets_and_files(tmp_path: Path) -> None:
    trace = Trace("a", "Q", ("s", "t"), "7")
    texts = {name: replace(trace, format=fmt).text for name, fmt in PRESETS.items()}
    assert texts["gsm8k"] == "Q\ns\nt\n#### 7\n"
    assert texts["boxed"].endswith("\\boxed{7}.")
    assert texts["think"] == "Q\n<think>\ns\nt\n</think>\n\n7\n"
    assert PRESETS["gsm8k"] == Format()
    path = tmp_path / "f.json"
    path.write_text(json.dumps({"before_answer": " = "}))
    assert resolve_format(str(path)) == Format(before_answer=" = ")
    path.write_text(json.dumps({"format": {"before_answer": " = "}}))
    assert resolve_format(str(path)) == Format(before_answer=" = ")


def test_bad_formats(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither a preset"):
        resolve_format("gsm9k")
    with pytest.raises(UserError, match="needs a model's tokenizer"):
        resolve_format("chat")
    path = tmp_path / "f.json"
    for text, message in {'{"a":': "malformed", "[]": "one JSON object", '{"x": "y"}': "unknown format key"}.items():
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            resolve_format(str(path))


def test_few_shot_examples_stand_before_the_question_in_the_same_format() -> None:
    examples = [Trace("e", "1+1?", ("1+1=2",), "2", PRESETS["boxed"]), Trace("f", "2+2?", ("2+2=4",), "4")]
    fmt = fewshot(PRESETS["gsm8k"], examples)
    text = replace(Trace("a", "3+3?", ("3+3=6",), "6"), format=fmt).text
    assert text == "1+1?\n1+1=2\n#### 2\n\n2+2?\n2+2=4\n#### 4\n\n3+3?\n3+3=6\n#### 6\n"
    with pytest.raises(UserError, match="at least one example"):
        fewshot(Format(), [])
