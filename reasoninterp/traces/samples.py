"""Chains that a sampler wrote, as traces.

One JSON object a line, in any of the shapes in which samplers write them:

`{"prompt", "outputs": [{"text"}, …]}` (vLLM),
`{"prompt", "completion" | "text" | "response" | "output" | "generated_text"}` (strings, or lists of strings for several
samples), `{"messages": [… , {"role": "assistant", "content"}]}`, and
`{"messages" | "prompt", "choices": [{"message": {"content"}} | {"text"}]}` (OpenAI's shape; `reasoning_content` beside
`content` is the chain of thought of servers that split it off).

Each output is cut losslessly (`segment.split_chain`): the prompt, the steps, what leads to the answer, the answer and
what follows it join to exactly what the mind read and wrote, so each trace has a format of its own.  What cannot be cut
is refused by its own reason: no steps, no answer found, a `<think>` block that was never closed.  With `keep_missing`
the last two become traces with an empty answer and `meta["answer_status"] = "missing"` or "unclosed".
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from reasoninterp.errors import UserError
from reasoninterp.traces.io import iter_json_lines
from reasoninterp.traces.readers import Conversion
from reasoninterp.traces.segment import SEGMENTERS, split_chain
from reasoninterp.traces.trace import Format, Trace

_TEXT_KEYS = ("completion", "text", "response", "output", "generated_text")
_REASONS = {
    "missing": "no answer found",
    "unclosed": "a <think> block that was never closed",
    "no steps": "no steps",
}


def read_vllm(
    path: str | os.PathLike[str],
    *,
    segmenter: str = "lines",
    extractor: str = "hash",
    mind: str | None = None,
    keep_missing: bool = False,
) -> Conversion:
    """A sampler's JSON Lines.

    Args:
        path: the file.
        segmenter: how chains are cut into steps.
        extractor: how answers are found.
        mind: who wrote the chains; default: the row's "model".
        keep_missing: keep chains without an answer.

    Raises:
        UserError: bad file, or a row in none of the known shapes.
    """
    if segmenter not in SEGMENTERS:
        raise UserError(f"unknown segmenter {segmenter!r}; choose one of {', '.join(SEGMENTERS)}.")
    out = Conversion()
    used: set[str] = set()
    for number, row in iter_json_lines(path):
        where = f"{path}, line {number}"
        if not isinstance(row, dict):
            raise UserError(f"{where}: expected a JSON object of a prompt and what was sampled.")
        prompt, texts = _prompt(row, where), _texts(row, where)
        stem = str(row.get("id", row.get("request_id", row.get("custom_id", f"sample-{number}"))))
        for k, text in enumerate(texts):
            out.rows += 1
            name = stem if len(texts) == 1 else f"{stem}-{k}"
            if name in used:
                raise UserError(f"{where}: the id {name!r} was used before; ids must be unique.")
            used.add(name)
            meta: dict[str, Any] = {"mind": mind or row.get("model"), "segmenter": segmenter, "extractor": extractor}
            gold = [row[key] for key in ("gold", "answer", "target") if isinstance(row.get(key), str | int | float)]
            if gold:
                meta["gold"] = str(gold[0])
            finished = _finish(row, k)
            if finished is not None:
                meta["finish_reason"] = finished
            trace = trace_of_sample(name, prompt, text, segmenter=segmenter, extractor=extractor, meta=meta)
            status = trace.meta["answer_status"]
            if status == "no steps" or (status != "ok" and not keep_missing):
                out.refuse(f"line {number}" if len(texts) == 1 else f"line {number}, output {k + 1}", _REASONS[status])
            else:
                out.traces.append(trace)
    return out


def trace_of_sample(
    id: str,
    prompt: str,
    text: str,
    *,
    segmenter: str = "lines",
    extractor: str = "hash",
    meta: Mapping[str, Any] | None = None,
    before_question: str = "",
    after_question: str = "",
) -> Trace:
    """What a mind read and wrote as a trace whose text is `before_question + prompt + after_question + text`.

    `meta["answer_status"]` is `ok`, `missing`, `unclosed` or `no steps` (`segment.Split`).
    """
    cut = split_chain(text, segmenter, extractor)
    fmt = Format(before_question, after_question + cut.head, cut.between_steps, cut.before_answer, cut.tail)
    return Trace(id, prompt, cut.steps, cut.answer, fmt, {**(meta or {}), "answer_status": cut.status})


def _prompt(row: Mapping[str, Any], where: str) -> str:
    """What the mind was given, as text; of a list of messages the last of the user's."""
    if isinstance(row.get("prompt"), str):
        return str(row["prompt"])
    messages = row.get("messages", row.get("prompt"))
    if isinstance(messages, list):
        said = [m for m in messages if isinstance(m, dict) and m.get("role") == "user"]
        if said and isinstance(said[-1].get("content"), str):
            return str(said[-1]["content"])
    if isinstance(row.get("question"), str):
        return str(row["question"])
    raise UserError(f"{where}: no prompt; a row needs 'prompt' (a string), 'question' or 'messages'.")


def _texts(row: Mapping[str, Any], where: str) -> list[str]:
    """What the mind wrote, one text a sample."""
    found: list[Any] = []
    for key in ("outputs", "choices"):
        for item in row[key] if isinstance(row.get(key), list) else []:
            inner = item.get("message", item) if isinstance(item, dict) else item
            found.append(_said(inner) if isinstance(inner, dict) else inner)
    if not found:
        for key in _TEXT_KEYS:
            if key in row:
                found = row[key] if isinstance(row[key], list) else [row[key]]
                break
    if not found and isinstance(row.get("messages"), list) and row["messages"]:
        last = row["messages"][-1]
        if isinstance(last, dict) and last.get("role") == "assistant":
            found = [_said(last)]
    if not found or not all(isinstance(text, str) for text in found):
        raise UserError(
            f"{where}: no sampled text; a row needs 'outputs', 'choices', an assistant message, or one of "
            f"{', '.join(_TEXT_KEYS)}."
        )
    return found


def _said(message: Mapping[str, Any]) -> Any:
    """A message's text, with the chain of thought that some servers put beside it back in its tags."""
    text = message.get("text", message.get("content"))
    thought = message.get("reasoning_content", message.get("reasoning"))
    return f"<think>\n{thought}\n</think>\n\n{text}" if isinstance(thought, str) and isinstance(text, str) else text


def _finish(row: Mapping[str, Any], k: int) -> str | None:
    """Why the sampler stopped, where it says so."""
    for key in ("outputs", "choices"):
        items = row.get(key)
        if isinstance(items, list) and k < len(items) and isinstance(items[k], dict):
            reason = items[k].get("finish_reason")
            return str(reason) if reason is not None else None
    return None
