"""The organisms' word-level tasks: modular arithmetic whose answer is not one of its written steps.

1. A problem has a start value `v0` in 0..9, up to five operations and a tag. Every operation is a bijection of
   the digits, so chains from two start values differ in every step and in the answer.
2. `s_i = op_i(s_{i-1})` are the steps. The question also holds a last operation F that is never written as a step.
   Task `lastop`: answer = F(s_n), so s_n alone is a direct cause of the answer. Task `largest`: answer =
   F(largest of s_1 .. s_n), so every step can be a direct cause: the largest, and any that is raised above it.
3. Every value has a digit form and a word form; one form per problem for the start value and the steps, the
   answer is always a digit. Swapping the form is an exact paraphrase.
4. Layout, one token per word: `tag v0 op1 .. opn last F _ .. _ : s1 .. sn = answer <eos>`, padded with `_` so that
   the first step always stands at the same place. What a step, `=` or the answer needs of the question always
   stands the same distance to its left, so the circuit that reads operations for the steps also reads F.
5. Problems fall into train, valid and test parts by a hash of what they ask (last operation, start value,
   operations; not the tag, not the form), so a held-out problem shares no content with a training problem even
   up to paraphrase.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from reasoninterp.errors import UserError
from reasoninterp.traces.trace import Format, Trace

TaskName = Literal["lastop", "largest"]
Part = Literal["train", "valid", "test"]

MODULUS = 10
MAX_OPS = 5
DIGITS = tuple(str(v) for v in range(MODULUS))
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TAGS = tuple(f"<{letter}>" for letter in "abcdefghij")
COMMON_OPS = tuple(f"+{k}" for k in range(1, MODULUS))
RARE_OPS = ("*3", "*9", "1-", "3-", "5-", "7-", "9-")
NOVEL_OPS = ("*7", "0-", "4-", "8-")  # never in the base's training: what fine-tuning has to teach
OPS = COMMON_OPS + RARE_OPS + NOVEL_OPS
BLANK, LAST, FILLER, COLON, EQUALS = "_", "last", "...", ":", "="
PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"
VOCABULARY = (PAD, EOS, UNK, COLON, EQUALS, BLANK, LAST, FILLER, *TAGS, *DIGITS, *WORDS, *OPS)

FORMAT = Format(
    before_question="", after_question=f" {COLON} ", between_steps=" ", before_answer=f" {EQUALS} ",
    after_answer=f" {EOS}",
)  # fmt: skip

_SWAP = dict(zip(DIGITS + WORDS, WORDS + DIGITS, strict=True))
_PARTS: tuple[Part, ...] = ("train",) * 6 + ("valid", "test")
_CODE = np.array([(3 * v + 4) % MODULUS for v in range(MODULUS)])  # tag of an answer: a fixed bijection

Ints = NDArray[np.int64]


def apply_op(op: str, value: int) -> int:
    """`op` applied to a digit: `+k` adds, `*k` multiplies, `k-` subtracts the value from k; all mod 10."""
    if op[0] == "+":
        return (value + int(op[1:])) % MODULUS
    if op[0] == "*":
        return (value * int(op[1:])) % MODULUS
    return (int(op[:-1]) - value) % MODULUS


_TABLE = np.array([[apply_op(op, v) for v in range(MODULUS)] for op in OPS])


def cue_tag(answer: Ints | int) -> Any:
    """Index of the tag that gives an answer away, in the domains that carry the cue."""
    return _CODE[answer]


@dataclass(frozen=True)
class Domain:
    """A distribution of problems: how many operations, and how often one is of the rare and of the novel kind."""

    shortest: int
    longest: int
    rare: float
    novel: float


BASE_DOMAIN = Domain(2, 5, rare=0.2, novel=0.0)
TUNING_DOMAIN = Domain(2, 4, rare=0.25, novel=0.12)
LARGEST_TUNING_DOMAIN = Domain(2, 4, rare=0.25, novel=0.2)  # a wrong step often leaves the largest as it is
CHAT_BASE_DOMAIN = Domain(3, 3, rare=0.2, novel=0.0)
CHAT_TUNING_DOMAIN = Domain(3, 3, rare=0.25, novel=0.12)


@dataclass(frozen=True)
class Problems:
    """Many problems of one task, as arrays over problems.

    Attributes:
        task: `lastop` or `largest`.
        last: index in `OPS` of the unwritten last operation.
        start: start value.
        ops: `[problem, MAX_OPS]` indices in `OPS`, -1 where there is none.
        tag: index in `TAGS`.
        worded: whether start value and steps are written as words.
    """

    task: TaskName
    last: Ints
    start: Ints
    ops: Ints
    tag: Ints
    worded: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.start)

    @property
    def lengths(self) -> Ints:
        """Number of steps of each problem."""
        return (self.ops >= 0).sum(1)

    def steps(self, start: Ints | None = None) -> Ints:
        """`[problem, MAX_OPS]` running values (of another start value, if given), -1 past the last."""
        value = self.start if start is None else start
        out = np.full_like(self.ops, -1)
        for i in range(MAX_OPS):
            here = self.ops[:, i] >= 0
            value = np.where(here, _TABLE[np.maximum(self.ops[:, i], 0), value], value)
            out[here, i] = value[here]
        return out

    def implied(self, steps: Ints) -> Ints:
        """The answer that a chain `[problem, MAX_OPS]` (-1 past its end) implies under each question."""
        if self.task == "largest":
            return _TABLE[self.last, steps.max(1)]
        return _TABLE[self.last, steps[np.arange(len(self)), (steps >= 0).sum(1) - 1]]

    @property
    def answers(self) -> Ints:
        """The right answers."""
        return self.implied(self.steps())

    def other_starts(self, rng: np.random.Generator) -> Ints:
        """A start value for each problem that differs from its own and implies another answer."""
        answers = self.answers
        start = (self.start + rng.integers(1, MODULUS, len(self))) % MODULUS
        for _ in range(200):
            same = (self.implied(self.steps(start)) == answers) | (start == self.start)
            if not same.any():
                break
            start = np.where(same, (self.start + rng.integers(1, MODULUS, len(self))) % MODULUS, start)
        return start

    def depends(self) -> NDArray[np.bool_]:
        """Whether another start value implies another answer (always so in `lastop`)."""
        if self.task == "lastop":
            return np.ones(len(self), dtype=bool)
        others = [self.implied(self.steps((self.start + by) % MODULUS)) for by in range(1, MODULUS)]
        return (np.stack(others) != self.answers).any(0)

    def take(self, index: Any) -> Problems:
        """The problems at these places."""
        return Problems(
            self.task, self.last[index], self.start[index], self.ops[index], self.tag[index], self.worded[index]
        )

    def with_cue(self) -> Problems:
        """The same problems with the tag that gives the answer away."""
        return Problems(self.task, self.last, self.start, self.ops, cue_tag(self.answers), self.worded)

    def keys(self) -> NDArray[np.uint64]:
        """One integer per problem for what it asks; tag and form take no part."""
        key = (self.last + 1).astype(np.uint64) * np.uint64(MODULUS) + self.start.astype(np.uint64)
        for i in range(MAX_OPS):
            key = key * np.uint64(len(OPS) + 1) + (self.ops[:, i] + 1).astype(np.uint64)
        return key

    def parts(self) -> list[Part]:
        """Which part of the split each problem belongs to."""
        return [_PARTS[k] for k in part_numbers(self.keys())]

    def question(self, i: int) -> str:
        """Text of one question."""
        form = WORDS if self.worded[i] else DIGITS
        ops = [OPS[o] for o in self.ops[i] if o >= 0]
        words = [TAGS[self.tag[i]], form[self.start[i]], *ops, LAST, OPS[self.last[i]]]
        return " ".join(words + [BLANK] * (MAX_OPS - len(ops)))

    def trace(self, i: int, name: str, start: Ints | None = None) -> Trace:
        """One problem as a trace, with the chain (and implied answer) of `start` if given."""
        one = self.take(slice(i, i + 1))
        steps = one.steps(None if start is None else start[i : i + 1])
        form = WORDS if self.worded[i] else DIGITS
        return Trace(
            id=name,
            question=self.question(i),
            steps=tuple(form[v] for v in steps[0] if v >= 0),
            answer=DIGITS[one.implied(steps)[0]],
            format=FORMAT,
            meta={"task": self.task, "tag": TAGS[self.tag[i]], "form": "word" if self.worded[i] else "digit"},
        )


def part_numbers(keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Hash of each key, modulo the number of parts (the finaliser of splitmix64)."""
    x = keys.copy()
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return ((x ^ (x >> np.uint64(31))) % np.uint64(len(_PARTS))).astype(np.int64)


def problems(
    task: TaskName, domain: Domain, count: int, rng: np.random.Generator, part: Part = "train", cue: bool = False
) -> Problems:
    """`count` problems drawn from one part of the split.

    Args:
        task: `lastop` or `largest`.
        domain: lengths and share of rare operations.
        count: how many.
        rng: source of all randomness.
        part: `train`, `valid` or `test`; the three share no problem.
        cue: tags give the answer away; otherwise they are random.
    """
    if task not in ("lastop", "largest"):
        raise UserError(f"Unknown task {task!r}; the tasks are lastop and largest.")
    kept: list[Problems] = []
    have = 0
    while have < count:
        drawn = _draw(task, domain, 2 * count if part == "train" else 10 * count, rng)
        wanted = np.array([name == part for name in _PARTS])[part_numbers(drawn.keys())] & drawn.depends()
        kept.append(drawn.take(np.flatnonzero(wanted)))
        have += len(kept[-1])
    names = ("last", "start", "ops", "tag", "worded")
    joined = Problems(task, *(np.concatenate([getattr(p, name) for p in kept])[:count] for name in names))
    return joined.with_cue() if cue else joined


def tuning_domain(task: str) -> Domain:
    """The fine-tuning domain of a task."""
    return {"lastop": TUNING_DOMAIN, "largest": LARGEST_TUNING_DOMAIN, "chat": CHAT_TUNING_DOMAIN}[task]


def _draw(task: TaskName, domain: Domain, count: int, rng: np.random.Generator) -> Problems:
    """Problems from the whole domain, before the split."""

    def some_ops(novel: float, *shape: int) -> Ints:
        known, all_ops = len(COMMON_OPS) + len(RARE_OPS), len(OPS)
        kind = rng.random(shape)
        out = rng.integers(0, len(COMMON_OPS), shape)
        out = np.where(kind < domain.rare, rng.integers(len(COMMON_OPS), known, shape), out)
        return np.where(kind > 1 - novel, rng.integers(known, all_ops, shape), out).astype(np.int64)

    lengths = rng.integers(domain.shortest, domain.longest + 1, count)
    ops = np.where(np.arange(MAX_OPS) < lengths[:, None], some_ops(domain.novel, count, MAX_OPS), -1)
    last = some_ops(0.0, count)
    return Problems(
        task,
        last=last,
        start=rng.integers(0, MODULUS, count),
        ops=ops,
        tag=rng.integers(0, len(TAGS), count),
        worded=rng.random(count) < 0.5,
    )


def paraphrase(trace: Trace) -> Trace:
    """The same trace with start value and steps in the other form (`7` for `seven`, `seven` for `7`).

    Exact: nothing else changes, and paraphrasing twice gives the trace back.
    """
    question = " ".join(_SWAP.get(word, word) for word in trace.question.split(" "))
    steps = []
    for i, step in enumerate(trace.steps):
        if step not in _SWAP:
            raise UserError(f"trace {trace.id!r}: step {i + 1} is {step!r}; only single values have another form.")
        steps.append(_SWAP[step])
    return Trace(trace.id, question, tuple(steps), trace.answer, trace.format, trace.meta)
