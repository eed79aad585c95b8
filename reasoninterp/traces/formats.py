"""Formats: how question, steps and answer are joined, by name, by file, or from a tokenizer's chat template.

`resolve_format` takes what a user writes behind `--format`: a preset (`gsm8k`, `boxed`, `answer`, `think`, `chat`)
or the path of a JSON file with any of `Format`'s five strings.

`chat_format` reads the strings off the tokenizer's own chat template:

1. render a user message that is a sentinel, with the generation prompt; what stands before the sentinel is
   `before_question`, what follows it is `after_question`;
2. where the template has not opened a `<think>` block, open it;
3. render the same with an assistant message that is a second sentinel; what follows it closes the turn and goes to the
   end of `after_answer`;
4. do it again with other sentinels: the strings must not depend on what is said.

`fewshot` puts worked examples, written in the same format, before the question.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from reasoninterp.errors import UserError
from reasoninterp.traces.io import read_text
from reasoninterp.traces.trace import Format, Trace

PRESETS: dict[str, Format] = {
    "gsm8k": Format("", "\n", "\n", "\n#### ", "\n"),
    "boxed": Format("", "\n\n", "\n\n", "\n\nThe final answer is \\boxed{", "}."),
    "answer": Format("", "\n", "\n", "\nThe answer is ", ".\n"),
    "think": Format("", "\n<think>\n", "\n", "\n</think>\n\n", "\n"),
}
"""Formats that need no tokenizer; `chat` is the one that does."""

_SENTINELS = (("QsentinelQ", "AsentinelA"), ("Zwhat9Z", "Yother7Y"))


def resolve_format(name_or_path: str, tokenizer: Any = None, *, system: str | None = None) -> Format:
    """The format that a user names.

    Args:
        name_or_path: a preset's name, `chat`, or the path of a JSON file with format strings (with or without a
            surrounding `{"format": …}`).
        tokenizer: needed for `chat`.
        system: a system message for `chat`.

    Raises:
        UserError: neither a preset nor a file; a file that is not a format; `chat` without tokenizer or template.
    """
    if name_or_path in PRESETS:
        return PRESETS[name_or_path]
    if name_or_path == "chat":
        if tokenizer is None:
            raise UserError("format 'chat' needs a model's tokenizer, since the strings are its chat template's.")
        return chat_format(tokenizer, system)
    if not Path(name_or_path).exists():
        raise UserError(
            f"format {name_or_path!r} is neither a preset ({', '.join([*PRESETS, 'chat'])}) nor a file that exists."
        )
    try:
        value = json.loads(read_text(name_or_path))
    except json.JSONDecodeError as problem:
        raise UserError(f"{name_or_path}, line {problem.lineno}: malformed JSON ({problem.msg}).") from None
    if isinstance(value, dict) and set(value) == {"format"}:
        value = value["format"]
    if not isinstance(value, dict):
        raise UserError(f"{name_or_path}: expected one JSON object with the format's strings.")
    return Format.from_json(value, name_or_path)


def chat_format(
    tokenizer: Any,
    system: str | None = None,
    *,
    before_answer: str = "\n</think>\n\n\\boxed{",
    after_answer: str = "}",
) -> Format:
    """The tokenizer's chat template as a format, with the chain inside `<think>…</think>`.

    Args:
        tokenizer: a Hugging Face tokenizer with a chat template.
        system: the system message; None for the template's own default.
        before_answer: ends the chain and opens the answer.
        after_answer: closes the answer; the template's end of turn is added behind it.

    Raises:
        UserError: no template; a template that refuses these messages or changes what is said.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            "format 'chat': the tokenizer has no chat template; use --format gsm8k, boxed or a JSON file instead."
        )
    first, second = (_chat_strings(tokenizer, system, *pair) for pair in _SENTINELS)
    if first != second:
        raise UserError("format 'chat': what the chat template puts around a message depends on the message itself.")
    before_question, after_question, end_of_turn = first
    if after_question.rfind("<think>") <= after_question.rfind("</think>"):
        after_question += "<think>\n"
    elif after_question.endswith("<think>"):
        after_question += "\n"
    return Format(before_question, after_question, "\n", before_answer, after_answer + end_of_turn)


def _chat_strings(tokenizer: Any, system: str | None, user: str, assistant: str) -> tuple[str, str, str]:
    """What the template puts before the user's words, behind them, and behind the assistant's words."""
    opening = [] if system is None else [{"role": "system", "content": system}]
    asked = [*opening, {"role": "user", "content": user}]
    replied = [*asked, {"role": "assistant", "content": assistant}]
    try:
        prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(replied, tokenize=False, add_generation_prompt=False)
    except Exception as problem:  # templates raise whatever their author chose
        raise UserError(f"format 'chat': the chat template refuses these messages ({problem}).") from None
    if prompt.count(user) != 1 or whole.count(assistant) != 1:
        raise UserError("format 'chat': the chat template does not write a message out once and unchanged.")
    before, _, after = prompt.partition(user)
    return before, after, whole.partition(assistant)[2]


def fewshot(format: Format, examples: Sequence[Trace]) -> Format:
    """The same format with worked examples before the question, each in that format, a blank line between them.

    Raises:
        UserError: no examples.
    """
    if not examples:
        raise UserError("few-shot prompting needs at least one example; give a trace file with some.")
    shots = "".join(replace(example, format=format).text.rstrip("\n") + "\n\n" for example in examples)
    return replace(format, before_question=shots + format.before_question)
