"""Attention sinks: tokens that receive a head's attention for where they stand, not for what they say.

Heads that have nothing to read put their weight on the first token or on delimiters (Xiao et al. 2023,
arXiv:2309.17453, "attention sinks").  Here, in one head of one row of T tokens:

1. What key token k *receives* is its mean attention over the queries that stand behind it,
   `received_k = mean_{q = k+1 … T−1} α_qk`, given only where at least `min_queries` tokens stand behind it.  (Gu et
   al. 2024, arXiv:2410.10781, use the same mean with the token's own query in it, and the threshold 0.3.)
2. k is *heavy* if `received_k > share`.
3. A heavy token is a *sink* if it is one of the first `n_first` tokens (`first`) or a delimiter: a special token, or
   blanks and punctuation that part text (`delimiter`).  A heavy token of any other kind (`content`) is no sink: it may
   be the very step that all later ones read.  It is reported and never left out.

Leaving sinks out of a map sets their attention to 0 in the heads and rows in which they are sinks.  By default nothing
is rescaled, so that a map without sinks is the part of the attention that went elsewhere; with `renormalise` each
query's remaining attention sums to 1 again (NaN where nothing remains).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from reasoninterp.errors import UserError

CONTENT, FIRST, DELIMITER = 0, 1, 2
KIND_NAMES = ("content", "first", "delimiter")
# Signs of arithmetic are not among them: in a calculation they are content.
DELIMITERS = frozenset(".,;:!?()[]{}<>|\"'`’“”…#")


@dataclass(frozen=True)
class SinkRule:
    """What counts as a sink.

    Attributes:
        share: a token is heavy that receives more than this on average (0…1).
        n_first: so many tokens at the beginning are `first`.
        min_queries: tokens with fewer tokens behind them are not judged.
    """

    share: float = 0.3
    n_first: int = 1
    min_queries: int = 4

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise UserError(f"share: {self.share} is not between 0 and 1; give the mean attention that makes a sink.")
        if self.n_first < 0 or self.min_queries < 1:
            raise UserError("n_first, min_queries: counts of tokens are wanted, the latter at least 1.")


class Heavy(NamedTuple):
    """A token that receives more than the rule's share in one head of one row; `kind` is one of `KIND_NAMES`."""

    layer: int
    row: int
    head: int
    position: int
    kind: str
    received: float


def token_kinds(ids: Sequence[int], tokenizer: Any, rule: SinkRule) -> Int[Tensor, " pos"]:
    """`FIRST`, `DELIMITER` or `CONTENT` for each token of one row.

    Raises:
        TypeError: the tokenizer cannot decode.
    """
    special = frozenset(tokenizer.all_special_ids)

    @cache
    def parts_text(token: int) -> bool:
        return token in special or all(c.isspace() or c in DELIMITERS for c in tokenizer.decode([token]))

    kinds = [FIRST if k < rule.n_first else DELIMITER if parts_text(int(t)) else CONTENT for k, t in enumerate(ids)]
    return torch.tensor(kinds, dtype=torch.long)


def kinds_of_rows(rows: Sequence[Sequence[int]], tokenizer: Any, rule: SinkRule) -> Int[Tensor, "row pos"]:
    """`token_kinds` of rows padded on the right (padding counts as content, and receives nothing that is judged)."""
    found = [token_kinds(row, tokenizer, rule) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(found, batch_first=True, padding_value=CONTENT)


def received(
    pattern: Float[Tensor, "row head query key"], lengths: Int[Tensor, " row"], min_queries: int = 1
) -> Float[Tensor, "row head key"]:
    """Mean attention that each key token receives from the tokens behind it; NaN where they are too few, or padding."""
    n_pos = pattern.shape[-1]
    at = torch.arange(n_pos, device=pattern.device)
    lengths = lengths.to(pattern.device)
    real = (at < lengths[:, None]).to(pattern.dtype)
    total = torch.einsum("rhqk,rq->rhk", pattern, real) - pattern.diagonal(dim1=-2, dim2=-1)
    behind = lengths[:, None] - 1 - at
    mean = total / behind.clamp(min=1)[:, None].to(pattern.dtype)
    return mean.masked_fill((behind < min_queries)[:, None], torch.nan)


def sink_mask(
    heavy: Float[Tensor, "row head key"], kinds: Int[Tensor, "row pos"], rule: SinkRule
) -> Bool[Tensor, "row head key"]:
    """Which key tokens are sinks, from what they receive (`received`; NaN is no sink)."""
    return (heavy > rule.share) & (kinds != CONTENT).to(heavy.device)[:, None]


def list_heavy(
    layer: int, got: Float[Tensor, "row head key"], kinds: Int[Tensor, "row pos"], rule: SinkRule
) -> list[Heavy]:
    """Every heavy token of a layer, sinks and content alike."""
    out = []
    for row, head, key in (got > rule.share).nonzero().tolist():
        kind = KIND_NAMES[int(kinds[row, key])]
        out.append(Heavy(layer, row, head, key, kind, float(got[row, head, key])))
    return out


def without(
    pattern: Float[Tensor, "row head query key"], sinks: Bool[Tensor, "row head key"], *, renormalise: bool = False
) -> Float[Tensor, "row head query key"]:
    """The pattern with the sinks' columns at 0; with `renormalise`, rows sum to 1 again (NaN where nothing is left)."""
    kept = pattern.masked_fill(sinks[:, :, None, :], 0.0)
    if not renormalise:
        return kept
    rest = kept.sum(-1, keepdim=True)
    return kept / rest.masked_fill(rest <= 0, torch.nan)
