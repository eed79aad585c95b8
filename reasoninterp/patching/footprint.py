"""Bytes and floating-point work of a network's parts, from its sizes alone.

What is counted is what `models.packed` keeps alive at once, tensor by tensor: `d` the residual stream, `q` all heads,
`k` the key heads, `m` the MLP's hidden layer, each times the packed tokens n.

    a block's MLP          stream, its norm, `resid_mid` and its norm (4 d), raw q and z (2 q), k and v, 2 m
    a block's attention    stream and norm (2 d), q raw and rotated and z (3 q), k and v; with a stored beginning, by torch's
                           kernel, 4 q more (6 where key heads are repeated), else 5 q, copies of k and v, and the scores
    logits                 lanes × reads × vocabulary, once more for each temporary that a metric makes
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from reasoninterp.models.body import Body
from reasoninterp.models.packed import _FLASH, _SCORES


class Group(NamedTuple):
    """Lanes that attend together: their tokens in all, one lane's, and the keys that its last token sees."""

    n_tokens: int
    length: int
    n_keys: int


@dataclass(frozen=True)
class Widths:
    """What a network's memory and time depend on; widths are per token, `itemsize` in bytes."""

    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_mlp: int
    gated: bool
    n_vocab: int
    itemsize: int
    kernel: bool  # whether attention to a stored beginning runs without writing scores down

    @classmethod
    def of(cls, body: Body) -> Widths:
        """The sizes of a body."""
        config = body.config
        d_mlp = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * body.d_model
        return cls(
            body.n_layers, body.d_model, body.n_heads, body.n_kv_heads, body.d_head, int(d_mlp),
            any(".gate_proj." in name for name in body.param_shapes), int(config.vocab_size), body.dtype.itemsize,
            _FLASH is not None and body.device.type == "cpu" and body.dtype == torch.float32,
        )  # fmt: skip

    @property
    def q(self) -> int:
        """Width of all heads."""
        return self.n_heads * self.d_head

    @property
    def kv(self) -> int:
        """Width of all key (or value) heads."""
        return self.n_kv_heads * self.d_head

    def site(self, component: str) -> int:
        """Width of a site."""
        return self.q if component in ("z", "q") else self.kv if component in ("k", "v") else self.d_model

    def token_flops(self) -> int:
        """Multiplications and additions of one token in one block, attention's scores apart."""
        return 2 * (self.d_model * (2 * self.q + 2 * self.kv) + (2 + self.gated) * self.d_model * self.d_mlp)

    def score_flops(self, start: Any, stop: Any) -> Any:
        """Those of scores and their weighted sum in one block, for queries from `start` to `stop` (causal)."""
        return 4 * self.q * (stop * (stop + 1) - start * (start + 1)) / 2

    def per_token(self) -> int:
        """Bytes of a packed token's positions, places and rotary tables."""
        return 4 * 8 + 2 * self.d_head * self.itemsize

    def block(self, n: int, group: Group, prefix: int, *, written: bool, hooked: bool, prefix_rows: int) -> int:
        """Bytes alive at the peak of one whole block over n tokens.

        Args:
            n: packed tokens.
            group: the largest group of lanes, which attend together.
            prefix: stored tokens before the lanes.
            written: whether scores are written down although torch's kernel could do without.
            hooked: whether the bridge's own block runs, because a hook sits in it.
            prefix_rows: rows whose stored keys and values have to be copied together.
        """
        mlp = n * ((4 + 2 * hooked) * self.d_model + 2 * self.q + 2 * self.kv + (2 + hooked) * self.d_mlp)
        if self.itemsize < 4:  # norms are made in float32, hooks see copies
            mlp = max(mlp, n * (3 * self.d_model + 2 * self.q + 2 * self.kv + 4 * self.d_model))
            mlp += hooked * n * 2 * self.d_model
        attention = n * (2 * self.d_model + 3 * self.q + 2 * self.kv)
        if not prefix:
            return self.itemsize * max(mlp, attention + group.n_tokens * 2 * self.q)
        attention += 2 * prefix_rows * prefix * self.kv
        if self.kernel and not written:
            repeated = 2 * self.q if self.n_heads > self.n_kv_heads else 0
            sums = 6 * self.n_heads  # of exponentials, and the weights that they give
            return self.itemsize * max(mlp, attention + group.n_tokens * (4 * self.q + repeated + sums))
        attention += group.n_tokens * (5 * self.q + 2 * self.kv)
        per_lane = self.n_heads * group.length * group.n_keys
        scores = self.scores(min(self.n_heads * group.n_tokens * group.n_keys, max(per_lane, _SCORES)))
        return max(self.itemsize * mlp, self.itemsize * attention + scores)

    def scores(self, n: int) -> int:
        """Bytes of n scores written down: in two parts, together, and their softmax, made in float32."""
        return n * (2 * self.itemsize + (8 if self.itemsize == 4 else 4 + self.itemsize))

    def logits(self, lanes: int, n_read: int, metrics: Collection[str]) -> int:
        """Bytes of the logits of so many lanes, and of what the metrics make of them."""
        read, fork = lanes * n_read * self.n_vocab, lanes * self.n_vocab
        summed = bool({"logp", "kl"} & set(metrics)) or n_read > 1
        at_fork = 5 if "kl" in metrics else 1 if "rank" in metrics else 0
        own = read * (self.itemsize + (4 if self.itemsize < 4 else 0)) + lanes * n_read * self.d_model * self.itemsize
        return own + 4 * max(read * summed, fork * at_fork)
