"""A chain of thought as data: `Format`, `Step`, `Trace`, `Span`, and the same as token ids.

1. A `Trace` is a question, ordered steps and an answer; a `Format` says, as five strings, how they are
   joined.  `Trace.parts()` lists every piece in order, and joining the pieces gives the text back,
   character for character.
2. `encode(trace, tokenizer)` tokenises the *joined* text once (never part by part: a byte-level BPE merges
   across boundaries) and puts each token in the part that holds its first non-blank character (its first
   character, if it is all blank).  Positions of that character never decrease from token to token, so every
   part is one half-open `Span` of tokens, and the spans partition the sequence.
3. The answer's tokens are those of its span: a token such as `" 18"` that carries the blank before the answer
   belongs to the answer, which is how a model would have written it.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, NamedTuple

from reasoninterp.errors import UserError

PartKind = Literal[
    "before_question",
    "question",
    "after_question",
    "step",
    "between_steps",
    "before_answer",
    "answer",
    "after_answer",
]


class Span(NamedTuple):
    """Half-open range `[start, stop)` of characters or of tokens."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def shift(self, by: int) -> Span:
        """The same span, `by` positions further right."""
        return Span(self.start + by, self.stop + by)


@dataclass(frozen=True)
class Format:
    """The strings that join question, steps and answer; data, not code.

    `text = before_question + question + after_question + between_steps.join(steps) + before_answer + answer
    + after_answer`.
    """

    before_question: str = ""
    after_question: str = "\n"
    between_steps: str = "\n"
    before_answer: str = "\n#### "
    after_answer: str = "\n"

    @classmethod
    def from_json(cls, value: Any, where: str = "format") -> Format:
        """A format from a JSON object; unknown keys and non-strings are a `UserError` that names `where`."""
        if not isinstance(value, Mapping):
            raise UserError(f"{where}: a format is an object of strings, not {type(value).__name__}.")
        known = {f.name for f in fields(cls)}
        for key, text in value.items():
            if key not in known:
                raise UserError(f"{where}: unknown format key {key!r}; the keys are {', '.join(sorted(known))}.")
            if not isinstance(text, str):
                raise UserError(f"{where}: format key {key!r} must be a string, not {type(text).__name__}.")
        return cls(**value)

    def to_json(self) -> dict[str, str]:
        """The five strings by name."""
        return asdict(self)


@dataclass(frozen=True)
class Step:
    """One step of the chain: its place in the chain, its text and its characters in the joined text."""

    index: int
    text: str
    chars: Span


@dataclass(frozen=True)
class Part:
    """One piece of the joined text. `index` counts steps and separators and is 0 elsewhere."""

    kind: PartKind
    index: int
    text: str
    chars: Span


@dataclass(frozen=True)
class Trace:
    """A question, the steps of a chain of thought, and an answer.

    `meta` holds what a reader knows besides (the mind that wrote the chain, the prompt, options of a
    multiple-choice question, organism labels); it takes no part in joining.
    """

    id: str
    question: str
    steps: tuple[str, ...]
    answer: str
    format: Format = field(default_factory=Format)
    meta: Mapping[str, Any] = field(default_factory=dict)

    def parts(self) -> list[Part]:
        """All pieces in order; `"".join(p.text for p in parts()) == text`."""
        f = self.format
        pieces: list[tuple[PartKind, int, str]] = [
            ("before_question", 0, f.before_question),
            ("question", 0, self.question),
            ("after_question", 0, f.after_question),
        ]
        for i, step in enumerate(self.steps):
            if i:
                pieces.append(("between_steps", i - 1, f.between_steps))
            pieces.append(("step", i, step))
        pieces += [
            ("before_answer", 0, f.before_answer),
            ("answer", 0, self.answer),
            ("after_answer", 0, f.after_answer),
        ]
        out, at = [], 0
        for kind, index, text in pieces:
            out.append(Part(kind, index, text, Span(at, at + len(text))))
            at += len(text)
        return out

    @property
    def text(self) -> str:
        """The joined text."""
        return "".join(p.text for p in self.parts())

    @property
    def question_text(self) -> str:
        """Everything before the first step: where a mind starts to write its own chain."""
        return self.format.before_question + self.question + self.format.after_question

    @property
    def prompt(self) -> str:
        """Everything before the answer: where a mind is asked for it."""
        chain = self.format.between_steps.join(self.steps)
        return self.question_text + chain + self.format.before_answer

    def step_list(self) -> list[Step]:
        """The steps with their characters in the joined text."""
        return [Step(p.index, p.text, p.chars) for p in self.parts() if p.kind == "step"]

    def with_steps(self, steps: Sequence[str], **changes: Any) -> Trace:
        """The same trace with another chain (and, by keyword, another answer, id or meta)."""
        return replace(self, steps=tuple(steps), **changes)

    def digest(self) -> str:
        """Hash of everything that reaches a model: id, parts and format."""
        value = [self.id, self.question, list(self.steps), self.answer, self.format.to_json()]
        return hashlib.sha256(json.dumps(value, ensure_ascii=False).encode()).hexdigest()


@dataclass(frozen=True)
class TokenTrace:
    """A trace as token ids, with the span of every part.

    `ids` has the tokenizer's own leading special tokens (they belong to `before_question`) and no trailing
    ones.  `spans` partition `range(len(ids))` in order; a part that got no token of its own has an empty span.
    """

    trace: Trace
    ids: tuple[int, ...]
    spans: Mapping[tuple[PartKind, int], Span]

    @property
    def answer(self) -> Span:
        """Tokens of the answer; the token before `answer.start` is where the answer is read."""
        return self.spans["answer", 0]

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """Ids of everything before the answer."""
        return self.ids[: self.answer.start]

    @property
    def answer_ids(self) -> tuple[int, ...]:
        """Ids of the answer."""
        return self.ids[self.answer.start : self.answer.stop]

    @property
    def chain(self) -> Span:
        """Tokens from the first step to the last, separators included."""
        steps = self.steps
        return Span(steps[0].start, steps[-1].stop) if steps else Span(self.answer.start, self.answer.start)

    @property
    def steps(self) -> list[Span]:
        """Tokens of each step."""
        return [self.spans["step", i] for i in range(len(self.trace.steps))]

    @property
    def question(self) -> Span:
        """Tokens of the question."""
        return self.spans["question", 0]


def encode(trace: Trace, tokenizer: Any) -> TokenTrace:
    """Token ids of the joined text with the span of every part.

    Args:
        trace: the trace.
        tokenizer: a fast Hugging Face tokenizer (offsets are needed).

    Raises:
        UserError: the tokenizer is not a fast one, or the answer gets no token.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise UserError("The tokenizer is not a fast one (no tokenizer.json), so steps cannot be found in its tokens.")
    text = trace.text
    ids, offsets = _tokenized(text, tokenizer)
    parts = trace.parts()
    homes = _homes(text, ids, offsets, parts, set(tokenizer.all_special_ids))
    spans: dict[tuple[PartKind, int], Span] = {}
    at = 0
    for k, part in enumerate(parts):
        stop = at
        while stop < len(homes) and homes[stop] <= k:
            stop += 1
        spans[part.kind, part.index] = Span(at, stop)
        at = stop
    out = TokenTrace(trace, tuple(ids), spans)
    if not len(out.answer):
        raise UserError(f"trace {trace.id!r}: the answer {trace.answer!r} gets no token of its own in this tokenizer.")
    return out


def token_chars(encoded: TokenTrace, tokenizer: Any) -> list[Span]:
    """The characters of each token, with those that no token covers (trimmed blanks) given to the token behind them.

    The spans follow each other, so that joining the tokens' texts gives the trace's text up to the last token.  Of tokens
    that share a character (bytes of one letter), the first has it.

    Args:
        encoded: the trace as `encode` left it.
        tokenizer: the same one.
    """
    _, offsets = _tokenized(encoded.trace.text, tokenizer)
    out, end = [], 0
    for _, stop in offsets:
        out.append(Span(end, max(end, stop)))
        end = out[-1].stop
    return out


def _tokenized(text: str, tokenizer: Any) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids and offsets of a text, without a token that the tokenizer appends."""
    starts_special = has_leading_special(text, tokenizer)
    enc = tokenizer(text, add_special_tokens=not starts_special, return_offsets_mapping=True)
    ids, offsets = list(enc["input_ids"]), list(enc["offset_mapping"])
    while ids and ids[-1] in tokenizer.all_special_ids and offsets[-1][1] == offsets[-1][0]:
        ids.pop(), offsets.pop()  # an end-of-sequence token the tokenizer appends is no part of the text
    return ids, offsets


def has_leading_special(text: str, tokenizer: Any) -> bool:
    """Whether the text already starts with the tokenizer's own opening token (as chat templates write it)."""
    bos = getattr(tokenizer, "bos_token", None)
    return bool(bos) and text.startswith(str(bos))


def _homes(
    text: str, ids: Sequence[int], offsets: Sequence[tuple[int, int]], parts: Sequence[Part], special: set[int]
) -> list[int]:
    """For each token the index of the part that holds its first non-blank character (see the module's step 2).

    Some tokenizers trim blanks off their offsets, so that a token of blanks alone seems to have no characters: its true
    ones start where the token before it stops.  A special token without characters (which the tokenizer adds) goes with
    the token before it, or to the first part.
    """
    stops = [part.chars.stop for part in parts]
    out: list[int] = []
    end = 0
    for token, (start, stop) in zip(ids, offsets, strict=True):
        if start < stop:
            out.append(_home(text, start, stop, stops))
        elif token in special:
            out.append(out[-1] if out else 0)
        else:
            out.append(_home(text, end, end, stops))
            stop = max(stop, end + 1)
        end = max(end, stop)
    return out


def _home(text: str, start: int, stop: int, stops: Sequence[int]) -> int:
    """Index of the part that holds the first non-blank character of `[start, stop)`, or its first if all are blank."""
    at = next((i for i in range(start, stop) if not text[i].isspace()), start)
    return min(bisect_right(stops, at), len(stops) - 1)


def iter_tokens(encoded: TokenTrace) -> Iterator[tuple[int, PartKind, int]]:
    """Every token position with the kind and index of its part, in order."""
    for (kind, index), span in encoded.spans.items():
        for position in range(*span):
            yield position, kind, index
