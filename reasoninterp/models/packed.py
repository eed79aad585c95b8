"""Blocks over packed rows: many rows that continue known runs, each from its own token on, in one tensor.

A *stem* is a run whose keys and values are known (`keys`, `values` of every layer) and a position `start` in it.  A
*lane* is one way to go on from a stem: tokens `start .. start + length` with activations of their own.  All tokens of
all lanes lie one behind the other in a tensor [1, token, d_model], without padding, so that every linear map and norm
of `bridge.blocks[k]` is one call, and TransformerLens' hooks fire on it in that shape.

1. Lanes of equal length whose stems have equally many lanes form a `Group`, laid out as [lane, stem, position].
2. `Packed.block(k, h)` calls `bridge.blocks[k]` with its attention's forward replaced by one that sees, for each
   lane, the stem's keys before `start` (shared by all lanes of the stem: one matrix product, nothing is copied) and
   the lane's own keys from there on.  Where no hook sits in the block, the modules that the bridge wraps are called
   by themselves (`raw_block`): the same sums without the bridge's bookkeeping.
3. `Packed.last(h)` runs the last block where the logits are read only: keys and values of every token, all else at
   the tokens that are read.

Networks: pre-norm decoders whose attention the bridge computes from separate q, k, v and o (Llama, Mistral, Qwen2,
Qwen3, GPT-2); `supported` says whether a body is one, and that its packed logits equal its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from reasoninterp.models.body import Body

_ROTARY = ("LlamaAttention", "MistralAttention", "Qwen2Attention", "Qwen3Attention")
_LEARNED = ("GPT2Attention",)
_RMS = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm")
_SCORES = 4_000_000  # attention scores held at once (float32: 16 MB), so that they stay near the processor


@dataclass
class Group:
    """Lanes of equal length: `n_lanes` on each of the stems, laid out [lane, stem, position].

    Attributes:
        rows: the run that each stem continues (row of the keys and values).
        starts: each stem's first token.
        length: tokens of a lane.
        n_lanes: lanes on each stem at present.
    """

    rows: Int[Tensor, " stem"]
    starts: Int[Tensor, " stem"]
    length: int
    n_lanes: int = 0

    @property
    def n_stems(self) -> int:
        """Stems of the group."""
        return len(self.rows)

    @property
    def n_tokens(self) -> int:
        """Tokens that the group takes."""
        return self.n_lanes * self.n_stems * self.length

    def positions(self, n_lanes: int | None = None) -> Int[Tensor, " token"]:
        """The position of every token in its run."""
        lanes = self.n_lanes if n_lanes is None else n_lanes
        steps = torch.arange(self.length, device=self.starts.device)
        return (self.starts[:, None] + steps).expand(lanes, -1, -1).reshape(-1)


@dataclass(frozen=True)
class Cut:
    """Keys hidden from queries of one lane: scores of `heads` (None: all) become the dtype's minimum.

    `queries` and `keys` are half-open ranges of positions in the run.
    """

    group: int
    lane: int
    stem: int
    queries: tuple[int, int]
    keys: tuple[int, int]
    heads: tuple[int, ...] | None = None


@dataclass
class Memory:
    """Keys and values of known runs, by layer: [row, kv_head, pos, d_head], after norms and rotary embedding."""

    keys: list[Tensor]
    values: list[Tensor]


class Packed:
    """Drives the blocks of a body over packed lanes.  Use as a context: inside, the blocks' attention is replaced.

    Args:
        body: the network, at any mind.
        memory: keys and values of the runs that the stems continue; None if every lane starts at 0.
    """

    def __init__(self, body: Body, memory: Memory | None = None) -> None:
        self.body = body
        self.memory = memory
        self.groups: list[Group] = []
        self.cuts: dict[int, list[Cut]] = {}
        self.keep: Memory | None = None  # where given, keys and values of the packed tokens are noted here, by layer
        self._bridge = body._bridge
        self._hook_points = _points(body)
        if body not in _RAW:
            _RAW[body] = [raw_block(block) for block in body._bridge.blocks]
        self._raw = _RAW[body]
        self._rotary = getattr(body._bridge, "rotary_emb", None)
        self._read: Tensor | None = None
        self._positions: Tensor | None = None
        self._cos_sin: tuple[Tensor, Tensor] | None = None

    @contextmanager
    def installed(self) -> Iterator[Packed]:
        """Replace every block's attention by the packed one; on exit put its own back."""
        replaced: list[Any] = []

        def replace(module: Any, forward: Callable[..., Any]) -> None:
            # The bridge's own __setattr__ would hand the attribute on to the module that it wraps.
            object.__setattr__(module, "forward", forward)
            replaced.append(module)

        try:
            for layer, block in enumerate(self._bridge.blocks):
                replace(block.attn, self._forward_of(layer, block.attn))
            with torch.no_grad():
                yield self
        finally:
            for module in replaced:
                module.__dict__.pop("forward", None)

    # ------------------------------------------------------------------ the way up

    def set_groups(self, groups: Sequence[Group]) -> None:
        """The lanes that the next calls speak of."""
        self.groups = [g for g in groups if g.n_lanes]
        positions = torch.cat([g.positions() for g in self.groups])
        self._positions = positions
        self._cos_sin = self._rotate_by(positions)

    def embed(self, ids: Int[Tensor, " token"]) -> Float[Tensor, "1 token d_model"]:
        """Residual stream before the first block, of the tokens of the groups that are set.

        Raises:
            UserError: more tokens than the network has positions.
        """
        assert self._positions is not None
        self.body.check_length(int(self._positions.max()) + 1)
        h: Tensor = self._bridge.embed(ids[None])
        if hasattr(self._bridge, "pos_embed") and self._rotary is None:
            h = h + self._bridge.pos_embed(self._positions[None])
        return h

    def block(self, layer: int, h: Float[Tensor, "1 token d_model"]) -> Float[Tensor, "1 token d_model"]:
        """One block over all lanes."""
        self._read = None
        if self._hooked(layer):
            return self._call(layer, h, self._positions, self._cos_sin)
        raw = self._raw[layer]
        normed = raw.ln1(h)
        q = self._heads(raw.q(normed), self.body.n_heads, raw.q_norm)
        k = self._heads(raw.k(normed), self.body.n_kv_heads, raw.k_norm)
        v = self._heads(raw.v(normed), self.body.n_kv_heads, None)
        k = _rotated(k, self._cos_sin)
        self._note(layer, k, v)
        z = self._attend(layer, _rotated(q, self._cos_sin), k, v, raw.scale or self.body.d_head**-0.5)
        mid = h + raw.o(z.reshape(1, h.shape[1], -1))
        return mid + raw.mlp(raw.ln2(mid))

    def _hooked(self, layer: int) -> bool:
        return any(p.fwd_hooks for p in self._hook_points[layer])

    def _heads(self, x: Tensor, n_heads: int, norm: Any) -> Float[Tensor, "token head d_head"]:
        x = x.view(-1, n_heads, self.body.d_head)
        return x if norm is None else norm(x)

    def last(self, h: Float[Tensor, "1 token d_model"], read: Int[Tensor, " read"]) -> Float[Tensor, "1 read d_model"]:
        """The last block at the tokens `read` (places in the packed tensor, grouped as the lanes are).

        Every lane must be read equally often within its group.
        """
        layer = self.body.n_layers - 1
        if self._hooked(layer):
            return self.block(layer, h)[:, read]
        raw, cos_sin = self._raw[layer], self._cos_sin
        normed = raw.ln1(h)
        k = _rotated(self._heads(raw.k(normed), self.body.n_kv_heads, raw.k_norm), cos_sin)
        v = self._heads(raw.v(normed), self.body.n_kv_heads, None)
        self._note(layer, k, v)
        q = self._heads(raw.q(normed[:, read]), self.body.n_heads, raw.q_norm)
        q = _rotated(q, (cos_sin[0][:, read], cos_sin[1][:, read]) if cos_sin else None)
        self._read = read
        z = self._attend(layer, q, k, v, raw.scale or self.body.d_head**-0.5)
        self._read = None
        mid = h[:, read] + raw.o(z.reshape(1, len(read), -1))
        return mid + raw.mlp(raw.ln2(mid))

    def from_mid(self, layer: int, mid: Float[Tensor, "1 token d_model"]) -> Float[Tensor, "1 token d_model"]:
        """`resid_post` from `resid_mid`: the MLP of a block, by itself."""
        raw = self._raw[layer]
        return mid + raw.mlp(raw.ln2(mid))

    def project(self, layer: int, z: Float[Tensor, "1 token head d_head"]) -> Float[Tensor, "1 token d_model"]:
        """`attn_out` from `z`."""
        out: Tensor = self._raw[layer].o(z.flatten(2))
        return out

    def place(self, group: int, lane: int, stem: int) -> int:
        """Place in the packed tensor of a lane's first token."""
        before = sum(g.n_tokens for g in self.groups[:group])
        g = self.groups[group]
        return before + (lane * g.n_stems + stem) * g.length

    # ------------------------------------------------------------------ inside a block

    def _call(self, layer: int, h: Tensor, positions: Tensor | None, cos_sin: Any) -> Tensor:
        assert positions is not None
        kwargs: dict[str, Any] = {"attention_mask": None, "use_cache": False}
        if self._rotary is not None:
            kwargs.update(position_ids=positions[None], position_embeddings=cos_sin)
        out = self._bridge.blocks[layer](h, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    def _rotate_by(self, positions: Tensor) -> tuple[Tensor, Tensor] | None:
        if self._rotary is None:
            return None
        like = torch.empty(1, dtype=self.body.dtype, device=self.body.device)
        rotary = getattr(self._rotary, "original_component", None) or self._rotary
        cos, sin = rotary(like, positions[None])
        return cos, sin

    def _forward_of(self, layer: int, attn: Any) -> Callable[..., tuple[Tensor, None]]:
        def forward(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
            hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            hidden = attn.hook_in(hidden)
            cos_sin = kwargs.get("position_embeddings")
            n = hidden.shape[1]
            q = attn.q(hidden).view(n, self.body.n_heads, self.body.d_head)
            k, v = self._keys_values(attn, hidden, cos_sin)
            self._note(layer, k, v)
            if "q_norm" in attn.submodules:
                q = attn.q_norm(q[None].transpose(1, 2)).transpose(1, 2)[0]
            z = self._attend(layer, _rotated(q, cos_sin), k, v, self._scale(attn))
            out: Tensor = attn.o(z.reshape(1, n, -1))
            return attn.hook_out(out), None

        return forward

    def _keys_values(self, attn: Any, hidden: Tensor, cos_sin: Any) -> tuple[Tensor, Tensor]:
        n = hidden.shape[1]
        k = attn.k(hidden).view(n, self.body.n_kv_heads, self.body.d_head)
        v = attn.v(hidden).view(n, self.body.n_kv_heads, self.body.d_head)
        if "k_norm" in attn.submodules:
            k = attn.k_norm(k[None].transpose(1, 2)).transpose(1, 2)[0]
        return _rotated(k, cos_sin), v

    def _note(self, layer: int, k: Tensor, v: Tensor) -> None:
        if self.keep is None:
            return
        at = 0
        for g in self.groups:
            n = g.n_tokens
            first, start = int(g.rows[0]), int(g.starts[0])
            one_slab = int(g.rows[-1]) - first == g.n_stems - 1 and bool((g.starts == start).all())
            for store, new in ((self.keep.keys[layer], k), (self.keep.values[layer], v)):
                shaped = new[at : at + n].view(g.n_stems, g.length, *new.shape[1:])
                if one_slab:
                    store[first : first + g.n_stems, :, start : start + g.length] = shaped.transpose(1, 2)
                else:
                    store[g.rows[:, None], :, g.positions(1).view(g.n_stems, g.length)] = shaped
            at += n

    def _scale(self, attn: Any) -> float:
        scaling = getattr(attn.original_component, "scaling", None)
        return float(scaling) if scaling is not None else self.body.d_head**-0.5

    def _attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """z [token, head, d_head] of the packed queries, group by group."""
        out = torch.empty_like(q)
        at = q_at = 0
        for index, g in enumerate(self.groups):
            n = g.n_tokens
            n_q = n if self._read is None else int(((self._read >= at) & (self._read < at + n)).sum())
            cuts = [c for c in self.cuts.get(layer, ()) if c.group == index]
            offsets = None if self._read is None else self._offsets(g, q_at, n_q, at)
            out[q_at : q_at + n_q] = self._attend_group(
                layer, g, q[q_at : q_at + n_q], k[at : at + n], v[at : at + n], scale, offsets, cuts
            )
            at, q_at = at + n, q_at + n_q
        return out

    def _offsets(self, g: Group, q_at: int, n_q: int, at: int) -> Int[Tensor, "stem query"]:
        """Where in its lane each query stands, from the places that are read."""
        assert self._read is not None
        within = (self._read[q_at : q_at + n_q] - at) % g.length
        return within.view(g.n_lanes, g.n_stems, -1)[0]

    def _attend_group(
        self,
        layer: int,
        g: Group,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        offsets: Tensor | None,
        cuts: list[Cut],
    ) -> Tensor:
        c, s, kv, dh = g.n_stems, g.length, self.body.n_kv_heads, self.body.d_head
        n_q = q.shape[0] // (g.n_lanes * c)
        q = q.view(g.n_lanes, c, n_q, kv, self.body.n_heads // kv, dh)
        k, v = k.view(g.n_lanes, c, s, kv, dh), v.view(g.n_lanes, c, s, kv, dh)
        n_prefix = int(g.starts.max()) if self.memory is not None else 0
        if not n_prefix and offsets is None and not cuts:
            return _causal(q, k, v, scale)
        by_kernel = _FLASH is not None and q.device.type == "cpu" and q.dtype == torch.float32
        if by_kernel and offsets is None and not cuts and bool((g.starts == n_prefix).all()):
            return _merged(q, k, v, self._prefix(layer, g, slice(0, c), n_prefix), scale)
        q = q * scale
        out = torch.empty_like(q)
        per_stem = self.body.n_heads * n_q * (n_prefix + s)
        lanes = max(1, min(g.n_lanes, _SCORES // per_stem))
        stems = max(1, min(c, _SCORES // (per_stem * lanes)))
        for c0 in range(0, c, stems):
            cs = slice(c0, c0 + stems)
            prefix = self._prefix(layer, g, cs, n_prefix)
            for r0 in range(0, g.n_lanes, lanes):
                rs = slice(r0, r0 + lanes)
                mine = [x for x in cuts if cs.start <= x.stem < cs.stop and rs.start <= x.lane < rs.stop]
                out[rs, cs] = self._attend_shared(g, q[rs, cs], k[rs, cs], v[rs, cs], prefix, cs, rs, offsets, mine)
        return out.view(-1, self.body.n_heads, dh)

    def _prefix(self, layer: int, g: Group, cs: slice, n_prefix: int) -> tuple[Tensor, Tensor] | None:
        """Keys and values [stem · kv_head, n_prefix, d_head] before the lanes' tokens: views where the rows allow."""
        if not n_prefix or self.memory is None:
            return None
        rows = g.rows[cs]
        first, n = int(rows[0]), len(rows)
        in_order = bool((rows == torch.arange(first, first + n, device=rows.device)).all())
        k, v = self.memory.keys[layer], self.memory.values[layer]
        k, v = (k[first : first + n], v[first : first + n]) if in_order else (k[rows], v[rows])
        return k.flatten(0, 1)[:, :n_prefix], v.flatten(0, 1)[:, :n_prefix]

    def _attend_shared(
        self,
        g: Group,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        prefix: tuple[Tensor, Tensor] | None,
        cs: slice,
        rs: slice,
        offsets: Tensor | None,
        cuts: list[Cut],
    ) -> Tensor:
        """z of some lanes on some stems: [lane, stem, query, kv_head, head, d_head]."""
        n_r, n_c, n_q, kv, heads, dh = q.shape  # q is scaled already
        s = k.shape[2]
        q = q.permute(1, 3, 0, 4, 2, 5).reshape(n_c * kv, n_r * heads * n_q, dh)
        k = k.permute(1, 3, 0, 2, 4).reshape(n_c * kv * n_r, s, dh)
        v = v.permute(1, 3, 0, 2, 4).reshape(n_c * kv * n_r, s, dh)
        own = torch.bmm(q.reshape(n_c * kv * n_r, heads * n_q, dh), k.transpose(1, 2))
        own = own.view(n_c, kv, n_r, heads, n_q, s)
        low = torch.finfo(own.dtype).min
        steps = torch.arange(s, device=q.device)
        if offsets is None:
            own += torch.full((s, s), low, dtype=own.dtype, device=q.device).triu(1)
        else:
            own.masked_fill_((steps > offsets[cs, :, None])[:, None, None, None], low)
        n_prefix = 0
        scores = own.view(n_c * kv, n_r * heads * n_q, s)
        if prefix is not None:
            n_prefix = prefix[0].shape[1]
            before = torch.bmm(q, prefix[0].transpose(1, 2))
            if int(g.starts[cs].min()) < n_prefix:
                beyond = torch.arange(n_prefix, device=q.device) >= g.starts[cs, None]
                before.view(n_c, kv, -1, n_prefix).masked_fill_(beyond[:, None, None], low)
            scores = torch.cat([before, scores], dim=-1)
        if cuts:
            self._cut(scores.view(n_c, kv, n_r, heads, n_q, n_prefix + s), g, cuts, cs, rs, offsets, n_prefix)
        weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(v.dtype)
        own_weights = weights[..., n_prefix:].reshape(n_c * kv * n_r, heads * n_q, s)
        z = torch.bmm(own_weights, v).view(n_c * kv, n_r * heads * n_q, dh)
        if prefix is not None:
            z = torch.baddbmm(z, weights[..., :n_prefix], prefix[1])
        return z.view(n_c, kv, n_r, heads, n_q, dh).permute(2, 0, 4, 1, 3, 5)

    def _cut(
        self, scores: Tensor, g: Group, cuts: list[Cut], cs: slice, rs: slice, offsets: Tensor | None, n_prefix: int
    ) -> None:
        """Hide keys from queries, in place; scores [stem, kv_head, lane, head, query, key]."""
        low = torch.finfo(scores.dtype).min
        per_kv = scores.shape[3]
        for x in cuts:
            start = int(g.starts[x.stem])
            rows = torch.arange(g.length) if offsets is None else offsets[x.stem].cpu()
            at = ((rows + start >= x.queries[0]) & (rows + start < x.queries[1])).nonzero().flatten()
            if not len(at):
                continue
            # Positions before `start` are columns of the prefix; from there on they are the lane's own.
            spans = [(min(x.keys[0], start), min(x.keys[1], start))]
            spans.append(tuple(max(e - start, 0) + n_prefix for e in x.keys))  # type: ignore[arg-type]
            mine = scores[x.stem - cs.start, :, x.lane - rs.start, :, at[0] : at[-1] + 1]  # [kv_head, head, query, key]
            for a, b in spans:
                if b > a and x.heads is None:
                    mine[..., a:b] = low
                elif b > a:
                    for head in x.heads or ():
                        mine[head // per_kv, head % per_kv, :, a:b] = low


_FLASH = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)


def _causal(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention of lanes without a prefix, by torch's own kernel."""
    n_r, n_c, s, kv, heads, dh = q.shape
    q = q.reshape(n_r * n_c, s, kv * heads, dh).transpose(1, 2)
    k, v = (x.reshape(n_r * n_c, s, kv, dh).transpose(1, 2) for x in (k, v))
    z = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=heads > 1)
    return z.transpose(1, 2).reshape(-1, kv * heads, dh)


def _merged(q: Tensor, k: Tensor, v: Tensor, prefix: tuple[Tensor, Tensor] | None, scale: float) -> Tensor:
    """As `_attend_shared`, without writing scores down: attention to the prefix and to the lane's own tokens apart.

    Softmax over both is the mean of the two outputs, weighted by their sums of exponentials, of which torch's kernel
    gives the logarithms (Dao et al. 2022, arXiv:2205.14135).
    """
    assert prefix is not None and _FLASH is not None
    n_r, n_c, s, kv, heads, dh = q.shape
    before = (x.view(n_c, kv, -1, dh) for x in prefix)
    folded = q.permute(1, 3, 0, 4, 2, 5).reshape(n_c, kv, n_r * heads * s, dh)
    z, log_sum = _FLASH(folded, *before, scale=scale)
    z = z.view(n_c, kv, n_r, heads, s, dh).permute(2, 0, 4, 1, 3, 5)
    log_sum = log_sum.view(n_c, kv, n_r, heads, s).permute(2, 0, 4, 1, 3)
    own_q = q.reshape(n_r * n_c, s, kv * heads, dh).transpose(1, 2)
    k, v = (x.reshape(n_r * n_c, s, kv, dh).transpose(1, 2) for x in (k, v))
    if heads > 1:
        k, v = (x.repeat_interleave(heads, dim=1) for x in (k, v))
    own, own_log_sum = _FLASH(own_q, k, v, is_causal=True, scale=scale)
    own = own.transpose(1, 2).reshape(n_r, n_c, s, kv, heads, dh)
    own_log_sum = own_log_sum.transpose(1, 2).reshape(n_r, n_c, s, kv, heads)
    weight = torch.sigmoid(log_sum - own_log_sum)[..., None]
    return torch.lerp(own, z, weight).reshape(-1, kv * heads, dh)


def _rotated(x: Float[Tensor, "token head d_head"], cos_sin: tuple[Tensor, Tensor] | None) -> Tensor:
    """Rotary embedding, halves paired (Su et al. 2021, arXiv:2104.09864, in Llama's layout)."""
    if cos_sin is None:
        return x
    half = x.shape[-1] // 2
    cos, sin = cos_sin[0][0][:, None], cos_sin[1][0][:, None]
    out = x * cos
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1.0)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return out


@dataclass(frozen=True)
class RawBlock:
    """What a block computes, module by module, without hooks.  `q_norm`, `k_norm` act on [token, head, d_head]."""

    ln1: Callable[[Tensor], Tensor]
    ln2: Callable[[Tensor], Tensor]
    q: Callable[[Tensor], Tensor]
    k: Callable[[Tensor], Tensor]
    v: Callable[[Tensor], Tensor]
    o: Callable[[Tensor], Tensor]
    mlp: Callable[[Tensor], Tensor]
    q_norm: Callable[[Tensor], Tensor] | None
    k_norm: Callable[[Tensor], Tensor] | None
    scale: float | None


def _one_kernel(norm: Any, width: Any) -> Callable[[Tensor], Tensor]:
    """A norm's module; torch's own kernel where that computes the same (float32 only, for the order of roundings)."""
    plain = norm.original_component
    eps = getattr(plain, "variance_epsilon", None)
    if type(plain).__name__ not in _RMS or eps is None or plain.weight.dtype != torch.float32:
        return plain  # type: ignore[no-any-return]
    return lambda x: F.rms_norm(x, width, plain.weight, eps)


def raw_block(block: Any) -> RawBlock:
    """The modules that a bridge's block wraps."""
    attn, mlp = block.attn, block.mlp

    def inner(component: Any, name: str) -> Any:
        return component.submodules[name].original_component if name in component.submodules else None

    plain = mlp.original_component
    activation = getattr(plain, "act_fn", None) or plain.act
    if type(activation).__name__ == "NewGELUActivation":  # torch has it as one kernel

        def activation(x: Tensor) -> Tensor:
            return F.gelu(x, approximate="tanh")

    width = block.ln1.original_component.weight.shape
    fused = {name: _one_kernel(norm, width) for name, norm in (("ln1", block.ln1), ("ln2", block.ln2))}
    up, down, gate = inner(mlp, "in"), inner(mlp, "out"), inner(mlp, "gate")

    def plain_mlp(x: Tensor) -> Tensor:
        out: Tensor = down(activation(up(x)))
        return out

    def gated_mlp(x: Tensor) -> Tensor:
        out: Tensor = down(activation(gate(x)).mul_(up(x)))
        return out

    return RawBlock(
        **fused,
        **{name: inner(attn, name) for name in ("q", "k", "v", "o", "q_norm", "k_norm")},
        mlp=plain_mlp if gate is None else gated_mlp,
        scale=getattr(attn.original_component, "scaling", None),
    )


# By body, whose modules stay the same whatever weights are in: walking them takes longer than a small block.
_POINTS: WeakKeyDictionary[Body, list[list[Any]]] = WeakKeyDictionary()
_RAW: WeakKeyDictionary[Body, list[RawBlock]] = WeakKeyDictionary()
_REASONS: WeakKeyDictionary[Body, str | None] = WeakKeyDictionary()


def _points(body: Body) -> list[list[Any]]:
    """The hook points of every block."""
    from transformer_lens.hook_points import HookPoint

    if body not in _POINTS:
        blocks = body._bridge.blocks
        _POINTS[body] = [[m for m in block.modules() if isinstance(m, HookPoint)] for block in blocks]
    return _POINTS[body]


def supported(body: Body) -> str | None:
    """Why the blocks of this body cannot be driven packed; None if they can.

    The architecture is looked at first, then a short random input is run both ways; once for each body.
    """
    if any(p.fwd_hooks for points in _points(body) for p in points):
        return "hooks act in it that may count on rows and positions"
    if body not in _REASONS:
        _REASONS[body] = _why_not(body)
    return _REASONS[body]


def _why_not(body: Body) -> str | None:
    config = body.config
    for block in body._bridge.blocks:
        if sorted(block.submodules) != ["attn", "ln1", "ln2", "mlp"]:
            return "its blocks are not attention and MLP, each behind one norm"
        kind = type(block.attn.original_component).__name__
        if kind not in _ROTARY + _LEARNED:
            return f"its attention is {kind}"
    if getattr(config, "use_sliding_window", False) or (
        getattr(config, "sliding_window", None) and getattr(config, "model_type", "") == "mistral"
    ):
        return "its attention has a sliding window"
    if getattr(config, "scale_attn_by_inverse_layer_idx", False) or getattr(config, "reorder_and_upcast_attn", False):
        return "its attention is scaled by layer"
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if rope.get("rope_type", rope.get("type")) in ("dynamic", "longrope"):
        return "its rotary embedding depends on the length of what is run"
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, body.n_vocab_shared, (2, 7), generator=generator).to(body.device)
    packed = Packed(body)
    with packed.installed():
        rows = torch.arange(2, device=body.device)
        packed.set_groups([Group(rows, torch.zeros_like(rows), 7, 1)])
        h = packed.embed(ids.flatten())
        for layer in range(body.n_layers):
            h = packed.block(layer, h)
        got = body.logits(h)[0].view(2, 7, -1).float()
    want = body.forward(ids).float()
    worst, scale = float((got - want).abs().max()), float(want.abs().max())
    tolerance = 1e-4 if body.dtype == torch.float32 else 5e-2
    return None if worst <= tolerance * max(1.0, scale) else f"its packed logits are off by {worst:.2g}"
