"""Contrasts: a clean and a corrupt trace of one question, what differs, and the answer that each implies.

Kinds, and where a contrast of that kind comes from:

`propagated`   the trace file's own `corrupt_steps`; else one calculator result corrupted and carried through to the
               answer (`propagate.py`).
`forced`       the first changed step of the propagated contrast, with all other steps held; its answer is the one that
               the change would lead to, were it carried through.
`swap`         the whole chain, and the answer, of another trace.
`regenerated`  a mind has written on after the change; such contrasts are built from its text with `contrast`.

A calculator contrast is searched for so:

1. nodes in the order of the text, since an early change is carried through most steps;
2. for each, seeded new values with as many digits (`quantities.candidate_values`);
3. with a tokenizer, the first whose tokens align with the clean trace's; where alignment is not required, the first
   that could be carried through stands in, marked `aligned=False`.

A trace without a contrast is a `Refusal` with its reason; nothing is left out in silence.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from reasoninterp.errors import UserError
from reasoninterp.traces import propagate
from reasoninterp.traces.answers import as_number, same_answer
from reasoninterp.traces.io import Pair, TraceFile
from reasoninterp.traces.propagate import CannotPropagate, read_chain
from reasoninterp.traces.quantities import candidate_values, stated_values
from reasoninterp.traces.trace import TokenTrace, Trace, encode

ContrastKind = Literal["forced", "propagated", "swap", "regenerated"]

SAME_ANSWER = "the corrupt answer is the clean one"
SAME_STEPS = "the corrupt steps are the clean ones"
NO_PARTNER = "no other trace has another answer"
NO_ALIGNED_PARTNER = "no other trace with another answer has the same token lengths"
NOT_ALIGNED = "not aligned"
_TRY_NEXT_VALUE = {propagate.NOT_WRITABLE, propagate.NOT_POSITIVE, propagate.UNCHANGED}


@dataclass(frozen=True)
class Contrast:
    """A clean and a corrupt trace.

    Attributes:
        id: the clean trace's id and the kind.
        kind: see the module.
        clean, corrupt: the traces; `clean.answer` and `corrupt.answer` are the answers that their steps imply.
        changed: places of the steps that differ.
        aligned: both have equally many tokens, in every part, under the tokenizer that was given; False if none was.
    """

    id: str
    kind: ContrastKind
    clean: Trace
    corrupt: Trace
    changed: tuple[int, ...]
    aligned: bool = False


@dataclass(frozen=True)
class Refusal:
    """A trace without a contrast, and why."""

    trace_id: str
    reason: str


@dataclass(frozen=True)
class ContrastSet:
    """Contrasts in the order of their traces, and the traces refused."""

    contrasts: tuple[Contrast, ...]
    refused: tuple[Refusal, ...]

    def __len__(self) -> int:
        return len(self.contrasts)

    def reasons(self) -> dict[str, int]:
        """How many traces were refused for each reason, most frequent first."""
        return dict(Counter(r.reason for r in self.refused).most_common())

    def pairs(self) -> dict[str, Pair]:
        """The corrupt chains by trace id, as `write_traces` takes them."""
        return {c.clean.id: (c.corrupt.steps, c.corrupt.answer) for c in self.contrasts}


def contrast(
    kind: ContrastKind, clean: Trace, corrupt: Trace, *, tokens: tuple[TokenTrace, TokenTrace] | None = None
) -> Contrast:
    """A contrast of two traces of one question.

    Args:
        tokens: both traces as tokens; with them `aligned` is found out.

    Raises:
        UserError: the questions or formats differ.
    """
    if clean.question != corrupt.question or clean.format != corrupt.format:
        raise UserError(f"trace {clean.id!r}: clean and corrupt trace must share question and format.")
    aligned = tokens is not None and alignment(*tokens) is None
    return Contrast(f"{clean.id}/{kind}", kind, clean, corrupt, changed_steps(clean.steps, corrupt.steps), aligned)


def changed_steps(clean: Sequence[str], corrupt: Sequence[str]) -> tuple[int, ...]:
    """Places at which two chains differ; where one is longer, its extra places too."""
    longest = max(len(clean), len(corrupt))
    return tuple(i for i in range(longest) if list(clean[i : i + 1]) != list(corrupt[i : i + 1]))


def alignment(clean: TokenTrace, corrupt: TokenTrace) -> str | None:
    """Why the tokens of two traces do not stand one under the other; None if they do.

    Wanted are equal numbers of steps, tokens before the answer, tokens in all, and the same span for every part.
    """
    if len(clean.trace.steps) != len(corrupt.trace.steps):
        return "different numbers of steps"
    if any(a != b for a, b in zip(clean.steps, corrupt.steps, strict=True)):
        return "steps of different token lengths"
    if len(clean.prompt_ids) != len(corrupt.prompt_ids):
        return "different numbers of tokens before the answer"
    if len(clean.ids) != len(corrupt.ids) or len(clean.answer) != len(corrupt.answer):
        return "answers of different token lengths"
    if dict(clean.spans) != dict(corrupt.spans):
        return "parts of different token lengths"
    return None


def make_contrasts(
    traces: TraceFile,
    *,
    kind: ContrastKind = "propagated",
    tokenizer: Any = None,
    require_aligned: bool = False,
    seed: int = 0,
    progress: Callable[[Sequence[Trace]], Iterable[Trace]] | None = None,
) -> ContrastSet:
    """At most one contrast for every trace (see the module).

    Args:
        traces: the traces, with the corrupt chains of their file.
        kind: `propagated`, `forced` or `swap`.
        tokenizer: a fast Hugging Face tokenizer; needed to find aligned contrasts.
        require_aligned: refuse what does not align.
        seed: draws new values and partners; the same seed gives the same contrasts.
        progress: wraps the traces in a progress bar (a tokenizer makes the search slow: some 10 ms a trace).

    Raises:
        UserError: an unknown kind; `regenerated`, which needs a mind; alignment required without a tokenizer; an
            answer that cannot be tokenised.
    """
    if kind not in get_args(ContrastKind):
        raise UserError(f"unknown contrast kind {kind!r}; choose propagated, forced or swap.")
    if kind == "regenerated":
        raise UserError("contrasts of kind 'regenerated' are written by a mind; make 'propagated' ones from traces.")
    if require_aligned and tokenizer is None:
        raise UserError("aligned contrasts need a tokenizer; give the model whose tokens must align.")
    if kind == "swap":
        return _swaps(traces, tokenizer, require_aligned, seed)
    made: list[Contrast] = []
    refused: list[Refusal] = []
    for trace in progress(traces.traces) if progress else traces.traces:
        found = (
            _given(trace, traces.pairs[trace.id], kind, tokenizer)
            if trace.id in traces.pairs
            else _calculated(trace, kind, tokenizer, seed)
        )
        if isinstance(found, str):
            refused.append(Refusal(trace.id, found))
        elif require_aligned and not found[0].aligned:
            refused.append(Refusal(trace.id, f"{NOT_ALIGNED}: {found[1]}"))
        else:
            made.append(found[0])
    return ContrastSet(tuple(made), tuple(refused))


Found = tuple[Contrast, str | None]
"""A contrast, and why it is not aligned (None if it is or if there is no tokenizer)."""


def _build(
    kind: ContrastKind,
    clean: Trace,
    steps: Sequence[str],
    answer: str,
    note: Mapping[str, Any],
    tokenizer: Any,
    tokens: TokenTrace | None,
) -> Found:
    """The contrast of a clean trace (and its tokens, if there is a tokenizer) with another chain and answer."""
    corrupt = clean.with_steps(
        steps, answer=answer, id=f"{clean.id}/corrupt", meta={**clean.meta, "corruption": {"kind": kind, **note}}
    )
    if tokens is None:
        return contrast(kind, clean, corrupt), None
    both = tokens, encode(corrupt, tokenizer)
    return contrast(kind, clean, corrupt, tokens=both), alignment(*both)


def _only_first(clean: Sequence[str], corrupt: Sequence[str]) -> list[str]:
    """The clean chain with the first changed step taken from the corrupt one."""
    first = changed_steps(clean, corrupt)[0]
    return [*clean[:first], *corrupt[first : first + 1], *clean[first + 1 :]]


def _given(trace: Trace, pair: Pair, kind: ContrastKind, tokenizer: Any) -> Found | str:
    """The contrast of the trace file's own corrupt chain."""
    steps, answer = pair
    if same_answer(trace.answer, answer):
        return SAME_ANSWER
    if tuple(steps) == trace.steps:
        return SAME_STEPS
    chain = steps if kind == "propagated" else _only_first(trace.steps, steps)
    return _build(kind, trace, chain, answer, {"source": "trace file"}, tokenizer, _tokens(trace, tokenizer))


def _tokens(trace: Trace, tokenizer: Any) -> TokenTrace | None:
    return None if tokenizer is None else encode(trace, tokenizer)


def _calculated(trace: Trace, kind: ContrastKind, tokenizer: Any, seed: int) -> Found | str:
    """The contrast of a calculator chain: the first that aligns, else the first that can be carried through."""
    chain = read_chain(trace.question, trace.steps, trace.answer)
    if not chain.nodes:
        return propagate.NO_CALCULATION
    tokens = _tokens(trace, tokenizer)
    stand_in: Found | None = None
    reasons: list[str] = []
    for n, node in enumerate(chain.nodes):
        shown = trace.steps[node.step][slice(*node.results[0])]
        reason = propagate.NOT_POSITIVE
        for value in candidate_values(node.value, shown, f"{seed}:{trace.id}:{n}"):
            try:
                corruption = chain.corrupt(n, value)
            except CannotPropagate as problem:
                reason = str(problem)
                if reason in _TRY_NEXT_VALUE:
                    continue
                break
            if same_answer(corruption.answer, trace.answer):
                reason = SAME_ANSWER
                continue
            steps = corruption.steps if kind == "propagated" else _only_first(trace.steps, corruption.steps)
            note = {"step": node.step, "old": shown, "new": str(value)}
            found = _build(kind, trace, steps, corruption.answer, note, tokenizer, tokens)
            if tokenizer is None or found[0].aligned:
                return found
            stand_in = stand_in or found
        reasons.append(reason)
    if stand_in is not None:
        return stand_in
    telling = [r for r in reasons if r not in (propagate.NOT_A_CALCULATION, propagate.DOES_NOT_REACH)]
    return (telling or reasons)[0]


def _swaps(traces: TraceFile, tokenizer: Any, require_aligned: bool, seed: int) -> ContrastSet:
    """For every trace the chain of another with a different answer.

    Traces stand in a seeded ring.  Each takes the next one that is not yet taken and fits; where all that fit are
    taken, the next that fits.  With a tokenizer, those with the same token lengths go first.
    """
    ring = list(traces.traces)
    random.Random(seed).shuffle(ring)
    tokens = {t.id: encode(t, tokenizer) for t in ring} if tokenizer is not None else {}
    shape = {t.id: _shape(tokens[t.id]) if t.id in tokens else () for t in ring}
    place = {t.id: k for k, t in enumerate(ring)}
    by_shape: dict[tuple[int, ...], list[Trace]] = {}
    for t in ring:
        by_shape.setdefault(shape[t.id], []).append(t)
    taken: set[str] = set()
    found: dict[str, Contrast] = {}
    for trace in ring:
        pools = [by_shape[shape[trace.id]]] if tokenizer is not None else []
        for pool in [*pools, *([] if require_aligned else [ring])]:
            start = place[trace.id] if pool is ring else pool.index(trace)
            other = _partner(trace, pool, start, taken)
            if other is None:
                continue
            note = {"source": other.id}
            built = _build("swap", trace, other.steps, other.answer, note, tokenizer, tokens.get(trace.id))[0]
            if built.aligned or pool is ring:
                taken.add(other.id)
                found[trace.id] = built
                break
    why = NO_ALIGNED_PARTNER if require_aligned else NO_PARTNER
    refused = tuple(Refusal(t.id, why) for t in traces if t.id not in found)
    return ContrastSet(tuple(found[t.id] for t in traces if t.id in found), refused)


def _partner(trace: Trace, pool: Sequence[Trace], start: int, taken: set[str]) -> Trace | None:
    """The next trace of the pool that fits and is not taken; else the next that fits."""
    second = None
    for k in range(1, len(pool)):
        other = pool[(start + k) % len(pool)]
        free = other.id not in taken
        if (free or second is None) and _can_swap(trace, other):
            if free:
                return other
            second = other
    return second


def _shape(tokens: TokenTrace) -> tuple[int, ...]:
    """Token lengths of all parts from the first step on."""
    return tuple(len(span) for (kind, _), span in tokens.spans.items() if "question" not in kind)


def _can_swap(trace: Trace, other: Trace) -> bool:
    return (
        trace.id != other.id
        and trace.format == other.format
        and trace.steps != other.steps
        and not same_answer(trace.answer, other.answer)
    )


def states_answer(step: str, answer: str) -> bool:
    """Whether a step states the answer: as a number of the same value, in digits or words, or as a word of its own."""
    value = as_number(answer)
    if value is not None:
        return abs(value) in stated_values(step)
    wanted = answer.strip()
    at = step.find(wanted)
    while wanted and at >= 0:
        before, after = step[:at][-1:], step[at + len(wanted) :][:1]
        if not before.isalnum() and not after.isalnum():
            return True
        at = step.find(wanted, at + 1)
    return False


def withheld(contrast: Contrast) -> Contrast | None:
    """The contrast without the changed steps that state an answer (else reading the answer is copying it).

    Left out of both chains are the changed places at which the clean chain states the clean answer or the corrupt chain
    the corrupt one; where the chains have different numbers of steps, each loses its own.  `aligned` is taken over:
    what aligned chains lose is as long in both.  None if no changed step remains, or no step at all in one chain.
    """
    clean, corrupt = contrast.clean, contrast.corrupt
    here, there = (
        {i for i in contrast.changed if i < len(t.steps) and states_answer(t.steps[i], t.answer)}
        for t in (clean, corrupt)
    )
    if len(clean.steps) == len(corrupt.steps):
        here = there = here | there
    cleaned, corrupted = _without(clean, here), _without(corrupt, there)
    changed = changed_steps(cleaned.steps, corrupted.steps)
    if not changed or not cleaned.steps or not corrupted.steps:
        return None
    return replace(contrast, id=f"{contrast.id}/withheld", clean=cleaned, corrupt=corrupted, changed=changed)


def _without(trace: Trace, places: set[int]) -> Trace:
    kept = [step for i, step in enumerate(trace.steps) if i not in places]
    return trace.with_steps(kept, meta={**trace.meta, "withheld": sorted(places)})
