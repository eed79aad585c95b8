"""Decoding: writing on after prompts, in batches, with a key/value cache.

1. Prompts of similar length go into one batch, padded on the left, with the attention mask and positions that make
   the padding invisible.
2. The cache is built afresh for each batch (the network extends it in place); rows that have ended are dropped from it
   once they are half of the batch.
3. What comes next is chosen row by row, so that a row's tokens do not depend on the rows beside it (but for rounding:
   logits of batches of another shape differ by some 1e-6, which can only matter where two tokens tie).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from reasoninterp.errors import UserError
from reasoninterp.models.body import Body, Hook

Choose = Callable[[int, Tensor], int]  # (row, logits [vocab]) -> token
Stop = Callable[[int, Sequence[int]], bool]  # (row, tokens so far) -> whether the row has ended
Process = Callable[[Sequence[int], Sequence[Sequence[int]], Tensor], Tensor]  # (rows, tokens so far, logits) -> logits


@dataclass(frozen=True)
class Decoded:
    """Tokens written after one prompt; `stopped` is False where the budget or the network's length ran out."""

    ids: tuple[int, ...]
    stopped: bool


def decode(
    body: Body,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop: Stop,
    choose: Choose | None = None,
    process: Process | None = None,
    batch_size: int = 32,
    hooks: Sequence[tuple[str, Hook]] = (),
) -> list[Decoded]:
    """Write on after each prompt, until `stop` says so or `max_new_tokens` are written.

    Args:
        body: at the mind that writes.
        prompts: token ids, not empty.
        max_new_tokens: budget per row.
        stop: asked after each token, with the row's number and what it has written (the new token included).
        choose: picks the next token from a row's logits (default: the largest).
        process: changes the logits [row, vocab] before the choice.
        batch_size: rows at once.
        hooks: act on every forward: first on all of the (left-padded) prompt, then on one position at a time.

    Raises:
        UserError: a prompt without tokens.
    """
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise UserError(f"prompt {i}: no token stands before the steps; give a format with text before them.")
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    out: dict[int, Decoded] = {}
    for at in range(0, len(order), batch_size):
        rows = order[at : at + batch_size]
        out.update(_batch(body, rows, prompts, max_new_tokens, stop, choose, process, hooks))
    return [out[i] for i in range(len(prompts))]


def _batch(
    body: Body,
    rows: list[int],
    prompts: Sequence[Sequence[int]],
    budget: int,
    stop: Stop,
    choose: Choose | None,
    process: Process | None,
    hooks: Sequence[tuple[str, Hook]],
) -> dict[int, Decoded]:
    ids, mask = _left_padded([prompts[i] for i in rows], body.device)
    if body.max_positions is not None:
        budget = min(budget, body.max_positions - ids.shape[1] + 1)
    past = _new_cache() if budget > 1 else None
    last = torch.full((len(rows), 1), -1)
    written: dict[int, list[int]] = {i: [] for i in rows}
    out: dict[int, Decoded] = {}
    for step in range(budget):
        logits = body.forward(ids, positions=last, attention_mask=mask, past=past, hooks=hooks)[:, -1].float()
        if process is not None:
            logits = process(rows, [written[i] for i in rows], logits)
        tokens = _next(rows, logits, choose)
        for i, token in zip(rows, tokens, strict=True):
            written[i].append(token)
            if i not in out and stop(i, written[i]):
                out[i] = Decoded(tuple(written[i]), True)
        live = [k for k, i in enumerate(rows) if i not in out]
        if not live or step == budget - 1:
            break
        if past is not None and 2 * len(live) <= len(rows):  # copying the cache is worth it
            keep = torch.tensor(live, device=body.device)
            past.batch_select_indices(keep)
            rows, tokens, mask, last = [rows[k] for k in live], [tokens[k] for k in live], mask[keep], last[: len(live)]
        ids = torch.tensor(tokens, device=body.device)[:, None]
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
    return {i: out.get(i, Decoded(tuple(ids_), False)) for i, ids_ in written.items()}


def _next(rows: Sequence[int], logits: Float[Tensor, "row vocab"], choose: Choose | None) -> list[int]:
    if choose is None:
        best: list[int] = logits.argmax(-1).tolist()
        return best
    return [choose(i, row) for i, row in zip(rows, logits.cpu(), strict=True)]


def _left_padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids [row, pos] padded on the left, and the mask of the real ones."""
    longest = max(len(p) for p in prompts)
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros(len(prompts), longest, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(list(prompt))
        mask[row, longest - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


def _new_cache() -> Any:
    from transformers import DynamicCache

    return DynamicCache()


def new_text(tokenizer: Any, prompt: Sequence[int], ids: Sequence[int]) -> str:
    """The text that `ids` add behind `prompt` (special tokens included); a word-level blank between them is kept."""
    before = to_text(tokenizer, prompt)
    whole = to_text(tokenizer, [*prompt, *ids])
    return whole[len(before) :] if whole.startswith(before) else to_text(tokenizer, ids)


def to_text(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of `ids`, special tokens included, blanks as they are."""
    text: str = tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def ends_with(tokenizer: Any, strings: Sequence[str]) -> Callable[[Sequence[int]], bool]:
    """Whether the text of some ids has one of `strings` in its last few tokens."""
    window = max((len(s) for s in strings), default=0) + 4

    def check(ids: Sequence[int]) -> bool:
        if not strings:
            return False
        tail = to_text(tokenizer, ids[-window:])
        return any(s in tail for s in strings)

    return check


def end_ids(tokenizer: Any, body: Body | None = None) -> frozenset[int]:
    """Tokens that end what a mind writes: the tokenizer's end of sequence and those the model's configuration names."""
    found: set[int] = set()
    config = getattr(body, "config", None)
    for value in (tokenizer.eos_token_id, getattr(config, "eos_token_id", None)):
        if value is not None:
            found.update(value if isinstance(value, (list, tuple)) else [value])
    return frozenset(found)
