"""Reading answers: how far a mind prefers one answer to another, and what it answers when asked.

The margin of a prompt and a pair of answers is

    m = log P(tail of a_corrupt | context) - log P(tail of a_clean | context)

1. The context is the prompt and the tokens with which both answers begin; the tails are the rest.  Where one answer is
   the beginning of the other, the token that ends an answer is appended to both, so that they part.
2. Two tails of one token each share one row, and m is exactly the difference of two logits.  Otherwise each tail has a
   row of its own, and m is the difference of their summed log-probabilities (natural logarithms).
3. Rows are padded on the right: later tokens cannot reach earlier positions.  Only the positions that are read reach
   the unembedding.

`plan_margins` does steps 1 and 2 once, on ids alone; `margins_from_logits` is differentiable; `margins` does both in
batches.  `greedy` writes short answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reasoninterp.errors import UserError
from reasoninterp.models.body import Body, Hook
from reasoninterp.models.decode import decode, end_ids, ends_with, new_text

Ids = Sequence[int]


class AnswerPair(NamedTuple):
    """Token ids of two answers to one prompt: the clean chain's and the corrupt chain's."""

    clean: Ids
    corrupt: Ids


@dataclass(frozen=True)
class MarginPlan:
    """Rows to run and what to read in them, for `n_items` prompts with a pair of answers each.

    `positions` are padded by repeating a row's last one.  The tokens whose log-probability counts are listed in
    parallel: the logits at `[read_row, read_slot]`, the token's id `target`, the `item` that it belongs to and its
    `part` (0: common beginning, 1: clean tail, 2: corrupt tail).
    """

    ids: Int[Tensor, "row pos"]
    positions: Int[Tensor, "row read"]
    read_row: Int[Tensor, " token"]
    read_slot: Int[Tensor, " token"]
    target: Int[Tensor, " token"]
    item: Int[Tensor, " token"]
    part: Int[Tensor, " token"]
    item_of_row: Int[Tensor, " row"]
    n_items: int


@dataclass(frozen=True)
class Margins:
    """Per item: the margin, and the log-probabilities (nats) of which it is made.

    `logp_clean` and `logp_corrupt` are those of the whole answers given the prompt: the common beginning,
    `logp_common`, is part of both (0 where the answers part at once).
    """

    margin: Float[Tensor, " item"]
    logp_clean: Float[Tensor, " item"]
    logp_corrupt: Float[Tensor, " item"]
    logp_common: Float[Tensor, " item"]

    @property
    def p_clean(self) -> Float[Tensor, " item"]:
        """Probability of the clean answer."""
        return self.logp_clean.exp()

    @property
    def p_corrupt(self) -> Float[Tensor, " item"]:
        """Probability of the corrupt answer."""
        return self.logp_corrupt.exp()


class Tails(NamedTuple):
    """Two answers from the token in which they part."""

    common: tuple[int, ...]
    clean: tuple[int, ...]
    corrupt: tuple[int, ...]


def part_answers(pair: AnswerPair, end_id: int | None) -> Tails:
    """Where two answers part.

    Args:
        pair: the answers' ids.
        end_id: the token that ends an answer; used only where one answer is the beginning of the other.

    Raises:
        UserError: the answers are the same, or one begins the other and nothing ends it.
    """
    clean, corrupt = tuple(pair.clean), tuple(pair.corrupt)
    if clean == corrupt:
        raise UserError(f"The clean and the corrupt answer are both {list(clean)}; give answers that differ.")
    at = _common(clean, corrupt)
    if at == min(len(clean), len(corrupt)):
        if end_id is None:
            raise UserError(
                f"The answer {list(clean)} and the answer {list(corrupt)} begin alike and no token ends them; "
                "give a format with text after the answer."
            )
        clean, corrupt = (*clean, end_id), (*corrupt, end_id)
        at = _common(clean, corrupt)
        if at == min(len(clean), len(corrupt)):
            raise UserError(
                f"The answers {list(pair.clean)} and {list(pair.corrupt)} differ only in the token that ends them; "
                "give answers that differ."
            )
    return Tails(clean[:at], clean[at:], corrupt[at:])


def plan_margins(prompts: Sequence[Ids], pairs: Sequence[AnswerPair], end_id: int | None = None) -> MarginPlan:
    """The rows to run and the tokens to read for prompts with a pair of answers each.

    Args:
        prompts: ids before the answer, not empty.
        pairs: the two answers of each prompt.
        end_id: the token that ends an answer (see `part_answers`).

    Raises:
        UserError: an empty prompt, or answers that do not part.
    """
    rows: list[list[int]] = []
    reads: list[list[int]] = []
    owners: list[int] = []
    tokens: list[tuple[int, int, int, int, int]] = []  # row, slot, target, item, part
    for item, (prompt, pair) in enumerate(zip(prompts, pairs, strict=True)):
        if not len(prompt):
            raise UserError(f"prompt {item}: there is no token before the answer; give a format with text before it.")
        tails = part_answers(AnswerPair(*pair), end_id)
        start = len(prompt) - 1  # the logits here are of the first token after the prompt
        context = [*prompt, *tails.common]
        here = len(rows)
        tokens += [(here, k, t, item, 0) for k, t in enumerate(tails.common)]
        fork = len(tails.common)
        if len(tails.clean) == len(tails.corrupt) == 1:
            rows.append(context)
            reads.append(list(range(start, start + fork + 1)))
            owners.append(item)
            tokens += [(here, fork, tails.clean[0], item, 1), (here, fork, tails.corrupt[0], item, 2)]
            continue
        for part, tail in ((1, tails.clean), (2, tails.corrupt)):
            skip = fork if part == 2 else 0  # the common beginning is read once, in the clean row
            tokens += [(len(rows), fork - skip + k, t, item, part) for k, t in enumerate(tail)]
            rows.append([*context, *tail[:-1]])
            reads.append(list(range(start + skip, start + fork + len(tail))))
            owners.append(item)
    return _as_plan(rows, reads, owners, tokens, len(prompts))


def margins_from_logits(plan: MarginPlan, logits: Float[Tensor, "row read vocab"]) -> Margins:
    """Margins from the logits at `plan.positions`; differentiable.

    The logarithm's normaliser enters the margin only where it does not cancel, so that of two single tokens exactly
    the difference of logits remains.
    """
    device = logits.device
    logits = logits.float()
    normaliser = logits.logsumexp(-1)
    row, slot, item, part = (t.to(device) for t in (plan.read_row, plan.read_slot, plan.item, plan.part))
    raw = logits[row, slot, plan.target.to(device)]
    sums = logits.new_zeros(3, plan.n_items).index_put((part, item), raw - normaliser[row, slot], accumulate=True)
    sign = ((part == 2).long() - (part == 1).long()).float()
    share = torch.zeros_like(normaliser).index_put((row, slot), sign, accumulate=True)
    margin = logits.new_zeros(plan.n_items).index_put((item,), sign * raw, accumulate=True)
    owner = plan.item_of_row.to(device)
    margin = margin.index_put((owner,), -(share * normaliser).sum(1), accumulate=True)
    return Margins(margin, sums[0] + sums[1], sums[0] + sums[2], sums[0])


def margins(
    body: Body,
    prompts: Sequence[Ids],
    pairs: Sequence[AnswerPair],
    *,
    end_id: int | None = None,
    batch_size: int = 32,
    hooks: Sequence[tuple[str, Hook]] = (),
    grad: bool = False,
) -> Margins:
    """Margins of the mind that the body is at, in the order of `prompts`.

    Args:
        body: the hooked network.
        prompts: ids before the answer.
        pairs: the two answers of each prompt.
        end_id: the token that ends an answer (see `part_answers`).
        batch_size: prompts at once (each has one row or two).
        hooks: act on every batch; a hook that depends on the row wants `plan_margins` and one batch of its own.
        grad: keep the graph.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    found: list[Margins] = []
    for at in range(0, len(order), batch_size):
        chunk = order[at : at + batch_size]
        plan = plan_margins([prompts[i] for i in chunk], [pairs[i] for i in chunk], end_id)
        logits = body.forward(plan.ids, positions=plan.positions, hooks=hooks, grad=grad)
        found.append(margins_from_logits(plan, logits))
    if not found:
        empty = torch.zeros(0)
        return Margins(empty, empty, empty, empty)
    back = torch.empty(len(order), dtype=torch.long)
    back[torch.tensor(order)] = torch.arange(len(order))

    def whole(name: str) -> Tensor:
        return torch.cat([getattr(m, name) for m in found])[back.to(found[0].margin.device)]

    return Margins(whole("margin"), whole("logp_clean"), whole("logp_corrupt"), whole("logp_common"))


def greedy(
    body: Body,
    prompts: Sequence[Ids],
    *,
    tokenizer: Any,
    max_new_tokens: int,
    stop_strings: Sequence[str] = (),
    stop_ids: Sequence[int] = (),
    batch_size: int = 32,
    hooks: Sequence[tuple[str, Hook]] = (),
) -> list[str]:
    """The text that the mind writes after each prompt, the most probable token at a time.

    It ends before the first of `stop_strings`, a token of `stop_ids` or the tokenizer's end of sequence, or after
    `max_new_tokens`.
    """
    strings = [s for s in stop_strings if s]
    ends = frozenset(stop_ids) | end_ids(tokenizer, body)
    written = greedy_ids(
        body, prompts, tokenizer=tokenizer, max_new_tokens=max_new_tokens, stop_strings=strings, stop_ids=stop_ids,
        batch_size=batch_size, hooks=hooks,
    )  # fmt: skip
    out = []
    for prompt, ids in zip(prompts, written, strict=True):
        kept = ids[:-1] if ids and ids[-1] in ends else ids
        text = new_text(tokenizer, prompt, kept)
        out.append(text[: min((text.find(s) for s in strings if s in text), default=len(text))])
    return out


def greedy_ids(
    body: Body,
    prompts: Sequence[Ids],
    *,
    max_new_tokens: int,
    tokenizer: Any = None,
    stop_strings: Sequence[str] = (),
    stop_ids: Sequence[int] = (),
    batch_size: int = 32,
    hooks: Sequence[tuple[str, Hook]] = (),
) -> list[tuple[int, ...]]:
    """As `greedy`, but the ids that were written, the one that ended a row included; `tokenizer` may be left out."""
    ends = frozenset(stop_ids) | (end_ids(tokenizer, body) if tokenizer is not None else frozenset())
    has_string = ends_with(tokenizer, [s for s in stop_strings if s])

    def stop(_row: int, ids: Ids) -> bool:
        return ids[-1] in ends or has_string(ids)

    found = decode(body, prompts, max_new_tokens=max_new_tokens, stop=stop, batch_size=batch_size, hooks=hooks)
    return [d.ids for d in found]


def _common(a: Ids, b: Ids) -> int:
    return next((k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _as_plan(
    rows: list[list[int]],
    reads: list[list[int]],
    owners: list[int],
    tokens: list[tuple[int, int, int, int, int]],
    n_items: int,
) -> MarginPlan:
    longest = max((len(r) for r in rows), default=0)
    ids = torch.tensor([[*r, *[0] * (longest - len(r))] for r in rows], dtype=torch.long)
    widest = max((len(r) for r in reads), default=0)
    positions = torch.tensor([[*r, *[r[-1]] * (widest - len(r))] for r in reads], dtype=torch.long)
    row, slot, target, item, part = torch.tensor(tokens, dtype=torch.long).reshape(-1, 5).unbind(1)
    return MarginPlan(ids, positions, row, slot, target, item, part, torch.tensor(owners, dtype=torch.long), n_items)
