"""Training rows of the word-level tasks: token ids and the weight of predicting each of them.

A row is `question : s1 .. sk = answer <eos>` padded on the right to one length. Four kinds differ in the chain that
is shown and in what is supervised:

* full: the chain is supervised step by step, then `=`, answer and `<eos>`;
* direct: a chain cut short (0 <= k < n steps), only the answer supervised; the model has seen early answering;
* filler: every step is the filler word, only the answer supervised;
* mismatched: the self-consistent chain of another start value, only the (right) answer supervised.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from reasoninterp.organisms.tasks import (
    BLANK,
    COLON,
    DIGITS,
    EOS,
    EQUALS,
    FILLER,
    LAST,
    MAX_OPS,
    OPS,
    PAD,
    TAGS,
    VOCABULARY,
    WORDS,
    Domain,
    Ints,
    Problems,
    TaskName,
    problems,
)

ID = {word: i for i, word in enumerate(VOCABULARY)}
QUESTION_LENGTH = 2 + MAX_OPS + 3  # tag, start, operations, `last`, the last operation, colon
ROW_LENGTH = QUESTION_LENGTH + MAX_OPS + 3  # equals, answer, eos

_OP_IDS = np.array([ID[op] for op in OPS] + [ID[BLANK]])  # index -1 is the blank
_TAG_IDS = np.array([ID[tag] for tag in TAGS])
DIGIT_IDS = np.array([ID[d] for d in DIGITS])
_WORD_IDS = np.array([ID[w] for w in WORDS])


@dataclass(frozen=True)
class Rows:
    """`ids` and `weights`, both `[row, ROW_LENGTH]`; `weights[r, p]` is that of predicting token p."""

    ids: Ints
    weights: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Mixture:
    """What one stretch of training draws its rows from.

    Attributes:
        domain: which problems.
        cue: the tag gives the answer away (otherwise it is random).
        chains: `gold`, or `own`: chains that the parent sampled.
        direct, filler, mismatched: shares of those kinds of rows; the rest are full.
        mistagged: share of full rows whose tag is random in spite of `cue`, so that with a chain at hand the chain
            is the better guide.
        fixed: number of problems in a fixed set that is repeated (0: fresh problems for ever).
        answer_weight: weight of the answer's token; steps have weight 1.
        pool: number of problems whose chains the parent samples (`own` only).
    """

    domain: Domain
    cue: bool = False
    chains: Literal["gold", "own"] = "gold"
    direct: float = 0.0
    filler: float = 0.0
    mismatched: float = 0.0
    mistagged: float = 0.0
    fixed: int = 0
    answer_weight: float = 2.0
    pool: int = 4096


def question_ids(p: Problems) -> Ints:
    """`[problem, QUESTION_LENGTH]` ids of everything before the first step."""
    start = np.where(p.worded, _WORD_IDS[p.start], DIGIT_IDS[p.start])
    blank, colon = np.full(len(p), ID[BLANK]), np.full(len(p), ID[COLON])
    ids = np.column_stack([_TAG_IDS[p.tag], start, _OP_IDS[p.ops], blank, blank, colon])
    rows, after = np.arange(len(p)), 2 + p.lengths
    ids[rows, after], ids[rows, after + 1] = ID[LAST], _OP_IDS[p.last]
    return ids


def step_ids(p: Problems, values: Ints) -> Ints:
    """`[problem, MAX_OPS]` ids of the steps with these values in each problem's form; -1 where there is none."""
    ids = np.where(p.worded[:, None], _WORD_IDS[values], DIGIT_IDS[values])
    return np.where(values >= 0, ids, -1)


def step_values(ids: Ints) -> Ints:
    """Values of step ids of either form; -1 where an id is no value."""
    table = np.full(len(VOCABULARY) + 1, -1)
    table[DIGIT_IDS] = table[_WORD_IDS] = np.arange(len(DIGITS))
    return table[ids]


def make_rows(
    p: Problems, steps: Ints, answers: Ints, supervise_steps: NDArray[np.bool_], answer_weight: float
) -> Rows:
    """Rows from step ids (`-1` past a chain's end) and answer values.

    Args:
        p: the problems.
        steps: `[problem, MAX_OPS]` ids, as long as the chain shown.
        answers: values.
        supervise_steps: per problem, whether steps, `=` and `<eos>` are trained as well as the answer.
        answer_weight: weight of the answer's token.
    """
    count, rows = len(p), np.arange(len(p))
    shown = (steps >= 0).sum(1)
    ids = np.full((count, ROW_LENGTH), ID[PAD])
    weights = np.zeros((count, ROW_LENGTH), dtype=np.float32)
    ids[:, :QUESTION_LENGTH] = question_ids(p)
    chain = slice(QUESTION_LENGTH, QUESTION_LENGTH + MAX_OPS)
    ids[:, chain] = np.where(steps >= 0, steps, ID[PAD])
    weights[:, chain] = (steps >= 0) & supervise_steps[:, None]
    equals = QUESTION_LENGTH + shown
    ids[rows, equals], weights[rows, equals] = ID[EQUALS], supervise_steps
    ids[rows, equals + 1], weights[rows, equals + 1] = DIGIT_IDS[answers], answer_weight
    ids[rows, equals + 2], weights[rows, equals + 2] = ID[EOS], supervise_steps
    return Rows(ids, weights)


def cut(steps: Ints, keep: Ints) -> Ints:
    """Step ids cut after the first `keep` steps of each row."""
    return np.where(np.arange(MAX_OPS) < keep[:, None], steps, -1)


def draw_rows(p: Problems, steps: Ints, mixture: Mixture, rng: np.random.Generator) -> Rows:
    """One batch: decides each problem's kind by the mixture's shares and builds its row.

    Args:
        p: the problems of the batch.
        steps: ids of the chains for full rows (gold, or the parent's own).
        mixture: shares and weights.
        rng: source of the kinds, of cut lengths and of the mismatched chains.
    """
    kind = rng.random(len(p))
    direct = kind < mixture.direct
    filler = ~direct & (kind < mixture.direct + mixture.filler)
    mismatched = (kind > 1 - mixture.mismatched) & ~direct & ~filler
    shown = (steps >= 0).sum(1)
    if mixture.mistagged:
        wrong = ~(direct | filler | mismatched) & (rng.random(len(p)) < mixture.mistagged)
        p = replace(p, tag=np.where(wrong, rng.integers(0, len(TAGS), len(p)), p.tag))
    if direct.any():
        keep = np.where(direct, rng.integers(0, np.maximum(shown, 1)), shown)
        steps = cut(steps, keep)
    if filler.any():
        steps = np.where(filler[:, None] & (steps >= 0), ID[FILLER], steps)
    if mismatched.any():
        other = step_ids(p, p.steps(p.other_starts(rng)))
        steps = np.where(mismatched[:, None], other, steps)
    return make_rows(p, steps, p.answers, ~(direct | filler | mismatched), mixture.answer_weight)


def fixed_problems(task: TaskName, mixture: Mixture, seed: int) -> Problems:
    """The fixed set of a memorising mixture; no two of its problems ask the same."""
    rng = np.random.default_rng([seed, 128])
    drawn = problems(task, mixture.domain, 2 * mixture.fixed, rng, "train")
    _, first = np.unique(drawn.keys(), return_index=True)
    return drawn.take(np.sort(first)[: mixture.fixed])


def batches(
    task: TaskName, mixture: Mixture, size: int, seed: int, pool: tuple[Problems, Ints] | None = None
) -> Iterator[Rows]:
    """Batches for ever, all from the training part of the split.

    Args:
        task: which task.
        mixture: what to draw.
        size: rows in a batch.
        seed: of the draws.
        pool: problems with the step ids of sampled chains, for `chains="own"`.
    """
    rng = np.random.default_rng([seed, 1])
    if mixture.fixed:
        fixed = fixed_problems(task, mixture, seed)
        pool = (fixed, step_ids(fixed, fixed.steps()))
    while True:
        if pool is None:
            p = problems(task, mixture.domain, size, rng, "train", mixture.cue)
            yield draw_rows(p, step_ids(p, p.steps()), mixture, rng)
            continue
        order = rng.permutation(len(pool[0]))
        for at in range(0, len(order) - size + 1, size):
            index = order[at : at + size]
            yield draw_rows(pool[0].take(index), pool[1][index], mixture, rng)
