"""Prompts: the same traces asked raw, after worked examples, or through the tokenizer's chat template.

The prompt is part of a trace's `Format`, so it is chosen once and every mind reads the same ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, get_args, overload

from reasoninterp.errors import UserError
from reasoninterp.traces.formats import chat_format, fewshot
from reasoninterp.traces.io import TraceFile
from reasoninterp.traces.trace import Format, Trace

PromptKind = Literal["raw", "fewshot", "chat"]


@overload
def with_prompt(
    traces: TraceFile,
    kind: str,
    tokenizer: Any,
    *,
    shots: int = ...,
    examples: Sequence[Trace] | None = ...,
    system: str | None = ...,
) -> TraceFile: ...
@overload
def with_prompt(
    traces: Sequence[Trace],
    kind: str,
    tokenizer: Any,
    *,
    shots: int = ...,
    examples: Sequence[Trace] | None = ...,
    system: str | None = ...,
) -> list[Trace]: ...


def with_prompt(
    traces: TraceFile | Sequence[Trace],
    kind: str,
    tokenizer: Any,
    *,
    shots: int = 3,
    examples: Sequence[Trace] | None = None,
    system: str | None = None,
) -> TraceFile | list[Trace]:
    """The same traces in the format of a prompt.

    Args:
        traces: a list, or a file's traces with their pairs (then a file is returned).
        kind: `raw` (as they are), `fewshot` (worked examples before each question, in the trace's own format) or
            `chat` (the tokenizer's chat template, the chain inside `<think>`).
        tokenizer: its chat template is used by `chat`.
        shots: number of examples, where none are given.
        examples: the worked examples.  Without them the first `shots` traces serve as examples and are left out of
            what is returned, since a mind would have their answers before its eyes.
        system: a system message for `chat`.

    Raises:
        UserError: an unknown kind, too few traces, or no chat template.
    """
    found = list(traces)
    formats: list[Format]
    if kind == "raw":
        return traces if isinstance(traces, TraceFile) else found
    if kind == "chat":
        chat = chat_format(tokenizer, system)
        formats = [chat] * len(found)
    elif kind == "fewshot":
        if examples is None:
            if len(found) <= shots:
                raise UserError(f"--prompt fewshot: {shots} examples leave no trace of {len(found)}; give more traces.")
            examples, found = found[:shots], found[shots:]
        # one format a distinct format, so that traces which share theirs still do
        made = {t.format: fewshot(t.format, examples) for t in found}
        formats = [made[t.format] for t in found]
    else:
        raise UserError(f"--prompt {kind}: unknown prompt; choose one of {', '.join(get_args(PromptKind))}.")
    asked = [replace(t, format=f) for t, f in zip(found, formats, strict=True)]
    if not isinstance(traces, TraceFile):
        return asked
    ids = {t.id for t in asked}
    pairs = {k: v for k, v in traces.pairs.items() if k in ids}
    return replace(traces, traces=tuple(asked), pairs=pairs, format=asked[0].format if asked else traces.format)
