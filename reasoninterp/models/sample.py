"""Sampling chains: a mind writes steps and an answer after a question, and says how it ended.

1. The prompt is the trace's text up to its first step, or up to the end of the steps that it already has.  Blanks at
   its end are left to the mind, since most tokenizers put a blank in front of the next word's token.
2. The mind writes until the format's `before_answer` and then, behind it, `after_answer` (or an end token), for at
   most `max_new_tokens` tokens.
3. What stands before the marker is cut into steps at `between_steps` (blank pieces stay with the step before, so that
   joining gives the text back); what stands behind it is the answer.

Statuses: `ok`; `no marker` (the mind ended without `before_answer`); `too long` (the budget ran out); `unclosed think`
(a `<think>` block without its end); `no answer` (nothing stands behind the marker).  Only `ok` has an answer.

At a temperature of 0 the most probable token is taken.  Otherwise the draw depends on the seed, the trace's id and the
number of the sample alone, not on the batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from reasoninterp.models.body import Body
from reasoninterp.models.decode import Decoded, decode, end_ids, ends_with, new_text, to_text
from reasoninterp.traces.trace import Format, Trace, has_leading_special

Status = Literal["ok", "no marker", "too long", "unclosed think", "no answer"]


@dataclass(frozen=True)
class Sampled:
    """A chain that a mind wrote.

    Attributes:
        trace: the question with the steps and the answer ("" where there is none); who wrote it and how is in `meta`.
        status: how it ended (see the module).
        text: all that was written.
        answer_text: what stands behind the marker, as written.
        n_tokens: number of tokens written.
    """

    trace: Trace
    status: Status
    text: str
    answer_text: str
    n_tokens: int

    @property
    def steps(self) -> tuple[str, ...]:
        """The steps, those that the prompt had included."""
        return self.trace.steps

    @property
    def answer(self) -> str | None:
        """The answer, or None where the status is not `ok`."""
        return self.trace.answer if self.status == "ok" else None


def sample_chains(
    body: Body,
    tokenizer: Any,
    traces: Sequence[Trace],
    *,
    format: Format | None = None,
    n: int = 1,
    temperature: float = 0.0,
    max_new_tokens: int = 256,
    seed: int = 0,
    batch_size: int = 32,
) -> list[Sampled]:
    """Chains of the mind that the body is at: `n` for each trace, one after another.

    Args:
        body: the hooked network.
        tokenizer: the mind's.
        traces: questions; a trace that has steps is continued after them, its answer is not used.
        format: how the parts are joined (default: each trace's own format).
        n: samples per trace; with more than one, `#k` is added to the trace's id.
        temperature: 0 takes the most probable token.
        max_new_tokens: budget per sample.
        seed: of the draws.
        batch_size: rows at once.
    """
    asked = [replace(t, format=format) if format else t for t in traces for _ in range(n)]
    numbers = [k for _ in traces for k in range(n)]
    prompts = [prompt_ids(tokenizer, _given(t)) for t in asked]
    rules = [_Rule(tokenizer, t.format, end_ids(tokenizer, body)) for t in asked]
    choose = None
    if temperature > 0:
        draws = [_generator(seed, t.id, k) for t, k in zip(asked, numbers, strict=True)]

        def choose(row: int, logits: Tensor) -> int:
            return _draw(logits / temperature, draws[row])

    def stop(row: int, ids: Sequence[int]) -> bool:
        return rules[row].ended(ids)

    found = decode(body, prompts, max_new_tokens=max_new_tokens, stop=stop, choose=choose, batch_size=batch_size)
    settings = {"temperature": temperature, "seed": seed, "max_new_tokens": max_new_tokens}
    out = []
    for trace, k, prompt, rule, decoded in zip(asked, numbers, prompts, rules, found, strict=True):
        sample = _read(trace, tokenizer, prompt, decoded, rule)
        about = {"mind": body.label, "prompt": _given(trace), "sampling": settings, "status": sample.status}
        meta = {**trace.meta, **about}
        name = trace.id if n == 1 else f"{trace.id}#{k}"
        out.append(replace(sample, trace=replace(sample.trace, id=name, meta=meta)))
    return out


def prompt_ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    """Ids of a prompt: with the tokenizer's opening token, without an ending one, blanks at the end left out."""
    add = not has_leading_special(text, tokenizer)
    ids = list(tokenizer(text.rstrip(" "), add_special_tokens=add)["input_ids"])
    while add and ids and ids[-1] == tokenizer.eos_token_id and not text.rstrip().endswith(str(tokenizer.eos_token)):
        ids.pop()
    return tuple(ids)


class _Rule:
    """When a row has ended: at an end token, or at `after_answer` behind `before_answer`."""

    def __init__(self, tokenizer: Any, format: Format, ends: frozenset[int]) -> None:
        self.ends = set(ends)
        self.marker = format.before_answer
        self.after = format.after_answer.strip(" ")
        special = set(tokenizer.all_special_ids)
        self.ends.update(i for i in tokenizer(self.after, add_special_tokens=False)["input_ids"] if i in special)
        self._tokenizer = tokenizer
        self._opening = self.marker.rstrip()  # blanks behind it may be part of the answer's first token
        self._sees_marker = ends_with(tokenizer, [self._opening] if self._opening else [])
        self._sees_end = ends_with(tokenizer, [self.after] if self.after else [])
        self._marked = -1  # number of tokens when the marker was whole

    def ended(self, ids: Sequence[int]) -> bool:
        """Whether a row that has written `ids` has ended; asked once for every token."""
        if ids[-1] in self.ends:
            return True
        if self._marked < 0:
            if self._sees_marker(ids) or self._starts_with_marker(ids):
                self._marked = len(ids)
            return False
        # the answer has begun: what ends it must follow some of it
        behind = ids[self._marked :]
        return bool(to_text(self._tokenizer, behind).strip()) and self._sees_end(behind)

    def _starts_with_marker(self, ids: Sequence[int]) -> bool:
        """Whether a chain without steps begins with the marker, whose first blanks then stand in the prompt."""
        core = self.marker.strip()
        if not core or len(ids) > len(core) + 4:
            return False
        return to_text(self._tokenizer, ids).lstrip().startswith(core)


def _given(trace: Trace) -> str:
    return trace.question_text + trace.format.between_steps.join(trace.steps)


def _read(trace: Trace, tokenizer: Any, prompt: Sequence[int], decoded: Decoded, rule: _Rule) -> Sampled:
    """Cut what a mind wrote into steps and answer."""
    ended_by_token = bool(decoded.ids) and decoded.ids[-1] in rule.ends
    ids = decoded.ids[:-1] if ended_by_token else decoded.ids
    text = new_text(tokenizer, prompt, ids)
    given = trace.format.between_steps.join(trace.steps)
    blanks = _trailing_blanks(_given(trace))
    # the blanks that end the prompt may open the marker: a chain without steps starts with it
    lead = _trailing_blanks(_given(trace).rstrip(" "))
    whole = lead + text
    opening = rule.marker.rstrip()
    at = whole.find(opening) if opening else -1
    chain = whole if at < 0 else whole[:at]
    chain = chain[len(blanks) :] if chain.startswith(blanks) else chain.lstrip() if not given else chain[len(lead) :]
    steps = _steps(given + chain, trace.format.between_steps)
    behind = "" if at < 0 else whole[at + len(opening) :]
    answer = _cut(behind, rule.after)
    status: Status = "ok"
    if at < 0:
        opened = "</think>" in rule.marker and "</think>" not in whole
        status = "unclosed think" if opened else "no marker" if decoded.stopped else "too long"
    elif not decoded.stopped and rule.after not in behind:
        status = "too long"
    elif not answer:
        status = "no answer"
    made = replace(trace, steps=steps, answer=answer if status == "ok" else "")
    return Sampled(made, status, text, behind, len(decoded.ids))


def _steps(chain: str, between: str) -> tuple[str, ...]:
    """The chain cut at `between`; blank pieces stay with the step before (the one after, at the start)."""
    if not chain.strip():
        return ()
    if not between:
        between, ends = "\n", "\n"
    else:
        ends = ""
    out: list[str] = []
    for piece in chain.rstrip().split(between) if not ends else chain.rstrip().splitlines(keepends=True):
        if out and (not piece.strip() or not out[-1].strip()):
            out[-1] += (between if not ends else "") + piece
        else:
            out.append(piece)
    return tuple(out)


def _cut(text: str, after: str) -> str:
    """The answer in what stands behind the marker: up to `after`, or without a beginning of it at the end."""
    body = text.lstrip()
    if after and after in body:
        return body[: body.find(after)].strip()
    for k in range(len(after), 0, -1):
        if body.endswith(after[:k]):
            return body[: -k or None].strip()
    return body.strip()


def _trailing_blanks(text: str) -> str:
    return text[len(text.rstrip()) :]


def _generator(seed: int, name: str, k: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}/{k}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def _draw(logits: Tensor, generator: torch.Generator) -> int:
    """One token by inverting the distribution function at a uniform number of the row's own."""
    upto = logits.float().softmax(-1).double().cumsum(-1)
    at = torch.rand(1, generator=generator, dtype=torch.float64) * upto[-1]
    return int(torch.searchsorted(upto, at).clamp(max=len(upto) - 1))
