"""The staircase: every patched run of a sweep, restarted from stored activations, on one way up the layers.

For a chunk of lanes (see `lanes`), with `h` the packed residual stream:

1. at layer k, the lanes that join there come in: the stored `resid_pre` from their first changed token on, with the
   patch put in.  A patch of `resid_pre` is put in as it is; one of `resid_mid`, `attn_out`, `mlp_out`, `z` or
   `pattern` at layer k−1 changes `resid_post` at the span's own tokens only, so just these are computed (through W_O
   and the MLP) and the lane joins at k;
2. edits of `q`, `k` and `v`, and those of higher layers of a window, act as hooks on `bridge.blocks[k]`;
3. block k runs over all lanes that have joined; each attends to its stem's stored keys and values before its start;
4. the last block and the unembedding run where the logits are read.

No lane computes a layer or a token that its patch cannot reach.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from reasoninterp.models.body import Body, Hook, site
from reasoninterp.models.packed import Cut, Group, Packed
from reasoninterp.patching.lanes import Block, Ints, Lanes, arrange, ragged
from reasoninterp.patching.store import Store

ENTERS_ABOVE = ("resid_mid", "attn_out", "mlp_out", "z", "pattern", "resid_post")
IN_FLIGHT = ("resid_pre", "resid_mid", "attn_out", "mlp_out", "z", "q", "k", "v")


@runtime_checkable
class Source(Protocol):
    """Activations that are put in."""

    def values(self, component: str, layer: int, rows: Tensor, positions: Tensor) -> Tensor:
        """[token, ...] at the given rows and positions; for `pattern`, [token, head, key]."""


@dataclass(frozen=True)
class Edits:
    """Parallel arrays over edits: put the source's activations in at a site, in one lane.

    `component` holds names; `head` is -1 for all heads (KV heads for `k` and `v`); `start` and `stop` are positions of
    the lane's run; the source is read at `source_row` and at positions shifted by `shift`.  An edit with `enters` is
    the one with which its lane joins; a lane has at most one.
    """

    lane: Ints
    component: NDArray[np.object_]
    layer: Ints
    head: Ints
    start: Ints
    stop: Ints
    source_row: Ints
    shift: Ints
    enters: NDArray[np.bool_]


@dataclass(frozen=True)
class LaneCut:
    """An attention edge hidden in one lane: keys from queries (half-open positions), at layers, in heads (None: all)."""

    lane: int
    layers: tuple[int, ...]
    queries: tuple[int, int]
    keys: tuple[int, int]
    heads: tuple[int, ...] | None = None


def climb(
    body: Body,
    store: Store,
    lanes: Lanes,
    edits: Edits | None,
    source: Source | None,
    reads: Int[Tensor, "row read"],
    *,
    cuts: Sequence[LaneCut] = (),
    hooks: Sequence[tuple[str, Hook]] = (),
    max_tokens: int = 4096,
) -> Iterator[tuple[Ints, Float[Tensor, "lane read d_model"]]]:
    """Run all lanes; yields, chunk by chunk, which lanes, and their last residual stream where they are read.

    Args:
        body: the network, at the mind of the store.
        store: the runs that are patched.
        lanes: see `lanes`.
        edits: what is put in; None if there are only cuts.
        source: where from.
        reads: positions to read of each row, those with which the store was recorded; one before a lane's start reads as
            the stored run does.
        cuts: attention edges hidden in lanes.
        hooks: (site, f) that act on every block's packed activations as well.
        max_tokens: tokens run at once.
    """
    packed = Packed(body, store.memory)
    way = _Way(body, store, lanes, edits or no_edits(), source, reads.to(body.device), packed, list(cuts), list(hooks))
    with packed.installed():
        for chunk in arrange(lanes, max_tokens):
            yield way.up(chunk)


def no_edits() -> Edits:
    """Edits of nothing."""
    none = np.zeros(0, dtype=np.int64)
    return Edits(none, none.astype(object), none, none, none, none, none, none, none.astype(bool))


class _Way:
    """One climb: its tables, by lane and by layer."""

    def __init__(
        self,
        body: Body,
        store: Store,
        lanes: Lanes,
        edits: Edits,
        source: Source | None,
        reads: Tensor,
        packed: Packed,
        cuts: list[LaneCut],
        hooks: list[tuple[str, Hook]],
    ) -> None:
        self.body, self.store, self.lanes, self.edits, self.source = body, store, lanes, edits, source
        self.reads, self.packed, self.cuts, self.hooks = reads, packed, cuts, hooks
        self.entry = np.full(len(lanes), -1)
        self.entry[edits.lane[edits.enters]] = np.nonzero(edits.enters)[0]
        self.later = np.nonzero(~edits.enters)[0]
        self.reads_np = reads.cpu().numpy()

    def up(self, chunk: list[Block]) -> tuple[Ints, Tensor]:
        """Lanes of one chunk, in the order of the second value, and their hidden states where they are read."""
        body, n_layers = self.body, self.body.n_layers
        dev = body.device
        groups = []
        for block in chunk:
            first = block.lanes[0]
            rows = torch.as_tensor(self.lanes.row[first], device=dev)
            groups.append(Group(rows, torch.as_tensor(self.lanes.start[first], device=dev), block.length))
        h = torch.empty(1, 0, body.d_model, dtype=body.dtype, device=dev)
        for layer in range(int(min(b.joins[0] for b in chunk)), n_layers):
            h = self._join(layer, chunk, groups, h)
            if not h.shape[1]:
                continue
            h = self._block(layer, chunk, groups, h)
        return self._finish(chunk, groups, h)

    def _join(self, layer: int, chunk: list[Block], groups: list[Group], h: Tensor) -> Tensor:
        """The lanes that join at a layer, behind those of their group that are there already."""
        pieces, at, new_lanes = [], 0, []
        for block, group in zip(chunk, groups, strict=True):
            have = group.n_lanes
            n = int(np.searchsorted(block.joins, layer, side="right")) - have
            pieces.append(h[0, at : at + group.n_tokens])
            at += group.n_tokens
            new_lanes.append(block.lanes[have : have + n].reshape(-1))
            group.n_lanes += n
        joining = np.concatenate(new_lanes)
        if not len(joining):
            return h
        owner, position = ragged(self.lanes.start[joining], self.lanes.stop[joining])
        new = self._enter(layer, joining[owner], position)
        out, at = [], 0
        for block, lanes, old in zip(chunk, new_lanes, pieces, strict=True):
            n = len(lanes) * block.length
            out += [old, new[at : at + n]]
            at += n
        self.packed.set_groups(groups)
        return torch.cat(out)[None]

    def _enter(self, layer: int, lane: Ints, position: Ints) -> Float[Tensor, "token d_model"]:
        """Residual stream before a layer (or behind the last) of lanes that join there."""
        at_row, at_pos = self._index(self.lanes.row[lane]), self._index(position)
        h = self.store.resid[layer][at_row, at_pos]
        if not len(self.edits.lane):
            return h
        edit = self.entry[lane]
        inside = (edit >= 0) & (position >= self.edits.start[edit]) & (position < self.edits.stop[edit])
        places = np.nonzero(inside)[0]
        for component in sorted(set(self.edits.component[edit[places]])):
            mine = places[self.edits.component[edit[places]] == component]
            values = self._resid_from(component, layer, edit[mine], lane[mine], position[mine])
            h[self._index(mine)] = values.to(h.dtype)
        return h

    def _resid_from(
        self, component: str, layer: int, edit: Ints, lane: Ints, position: Ints
    ) -> Float[Tensor, "token d_model"]:
        """The residual stream before `layer` that an edit makes, at tokens of its span."""
        if component == "resid_pre":
            return self._source(component, layer, edit, position)
        below = layer - 1
        put = self._source(component, below, edit, position)
        if component == "resid_post":
            return put
        row, pos = self._index(self.lanes.row[lane]), self._index(position)
        if component == "mlp_out":
            return self.store.at("resid_mid", below)[row, pos] + put
        if component == "resid_mid":
            mid = put
        else:
            if component in ("z", "pattern"):
                put = self._attn_out(component, below, edit, put, row, pos)
            mid = self.store.resid[below][row, pos] + put
        return self.packed.from_mid(below, mid[None])[0]

    def _attn_out(self, component: str, layer: int, edit: Ints, put: Tensor, row: Tensor, pos: Tensor) -> Tensor:
        """`attn_out` where some heads' `z`, or pattern, is another's."""
        z = self.store.at("z", layer)[row, pos]
        if component == "pattern":
            put = self._z_of_pattern(layer, put, row)
        head = self._index(self.edits.head[edit])
        chosen = (torch.arange(self.body.n_heads, device=z.device) == head[:, None]) | (head[:, None] < 0)
        z = torch.where(chosen[..., None], put.to(z.dtype), z)
        return self.packed.project(layer, z[None])[0]

    def _z_of_pattern(self, layer: int, pattern: Float[Tensor, "token head key"], row: Tensor) -> Tensor:
        values = self.store.memory.values[layer]
        n_keys = min(pattern.shape[-1], values.shape[2])
        per_kv = self.body.n_heads // self.body.n_kv_heads
        grouped = rearrange(pattern[..., :n_keys], "t (kv g) k -> t kv g k", g=per_kv).to(values.dtype)
        out = torch.empty(*pattern.shape[:2], self.body.d_head, dtype=values.dtype, device=values.device)
        for r in row.unique():  # one row's values at a time: nothing of size [token, key, d_head] is made
            mine = row == r
            z = torch.einsum("tvgk,vkd->tvgd", grouped[mine], values[r, :, :n_keys])
            out[mine] = rearrange(z, "t v g d -> t (v g) d")
        return out

    def _source(self, component: str, layer: int, edit: Ints, position: Ints) -> Tensor:
        assert self.source is not None
        rows = self._index(self.edits.source_row[edit])
        return self.source.values(component, layer, rows, self._index(position + self.edits.shift[edit]))

    def _index(self, values: Ints | NDArray[np.bool_]) -> Tensor:
        return torch.as_tensor(values, device=self.body.device)

    # ------------------------------------------------------------------ one block

    def _block(self, layer: int, chunk: list[Block], groups: list[Group], h: Tensor) -> Tensor:
        edits = self.later[self.edits.layer[self.later] == layer]
        cuts = [x for x in self.cuts if layer in x.layers]
        base = self._bases(chunk, groups) if len(edits) or cuts else {}
        edits = np.array([e for e in edits if int(self.edits.lane[e]) in base], dtype=np.int64)
        self.packed.cuts = {layer: self._group_cuts(cuts, base)} if cuts else {}
        by_component = {c: edits[self.edits.component[edits] == c] for c in set(self.edits.component[edits])}
        if "resid_pre" in by_component:
            tokens, values = self._puts("resid_pre", layer, by_component.pop("resid_pre"), base)
            h = h.clone()
            h[0, tokens] = values
        named = [(site(c, layer), self._putter(c, layer, e, base)) for c, e in sorted(by_component.items())]
        named += [(n, f) for n, f in self.hooks if n.startswith(f"blocks.{layer}.")]
        with ExitStack() as stack:
            if named:
                stack.enter_context(self.body.block_hooks(named))
            if layer < self.body.n_layers - 1:
                return self.packed.block(layer, h)
            return self.packed.last(h, self._read_places(groups))

    def _bases(self, chunk: list[Block], groups: list[Group]) -> dict[int, tuple[int, int, int, int]]:
        """For every lane that has joined: (place of its first token, group, lane, stem)."""
        out, at = {}, 0
        live = 0
        for block, group in zip(chunk, groups, strict=True):
            if not group.n_lanes:
                continue
            for r in range(group.n_lanes):
                for c, lane in enumerate(block.lanes[r].tolist()):
                    out[lane] = (at, live, r, c)
                    at += group.length
            live += 1
        return out

    def _puts(self, component: str, layer: int, edits: Ints, base: dict[int, Any]) -> tuple[Tensor, Tensor]:
        """Places in the packed tensor and the values that go there."""
        lane = self.edits.lane[edits]
        owner, position = ragged(self.edits.start[edits], self.edits.stop[edits])
        first = np.array([base[int(x)][0] for x in lane])
        places = first[owner] + position - self.lanes.start[lane[owner]]
        return self._index(places), self._source(component, layer, edits[owner], position)

    def _putter(self, component: str, layer: int, edits: Ints, base: dict[int, Any]) -> Hook:
        def f(act: Tensor) -> Tensor:
            places, values = self._puts(component, layer, edits, base)
            new = act.clone()
            if component not in ("z", "q", "k", "v"):
                new[0, places] = values.to(new.dtype)
                return new
            owner, _ = ragged(self.edits.start[edits], self.edits.stop[edits])
            head = self._index(self.edits.head[edits[owner]])
            chosen = (torch.arange(new.shape[2], device=new.device) == head[:, None]) | (head[:, None] < 0)
            new[0, places] = torch.where(chosen[..., None], values.to(new.dtype), new[0, places])
            return new

        return f

    def _group_cuts(self, cuts: list[LaneCut], base: dict[int, tuple[int, int, int, int]]) -> list[Cut]:
        found = []
        for x in cuts:
            if x.lane in base:
                _, group, lane, stem = base[x.lane]
                found.append(Cut(group, lane, stem, x.queries, x.keys, x.heads))
        return found

    # ------------------------------------------------------------------ the end

    def _read_places(self, groups: list[Group]) -> Int[Tensor, " read"]:
        """Places in the packed tensor that are read, lane by lane."""
        out, at = [], 0
        for g in groups:
            if not g.n_lanes:
                continue
            offset = (self.reads[g.rows] - g.starts[:, None]).clamp(min=0)  # [stem, read]
            first = at + g.length * torch.arange(g.n_lanes * g.n_stems, device=offset.device)
            out.append((first.view(g.n_lanes, g.n_stems, 1) + offset).reshape(-1))
            at += g.n_tokens
        return torch.cat(out)

    def _finish(self, chunk: list[Block], groups: list[Group], h: Tensor) -> tuple[Ints, Tensor]:
        n_read = self.reads.shape[1]
        ran = [b.lanes[: g.n_lanes].reshape(-1) for b, g in zip(chunk, groups, strict=True)]
        late = [b.lanes[g.n_lanes :].reshape(-1) for b, g in zip(chunk, groups, strict=True)]
        lanes, last = np.concatenate(ran), np.concatenate(late)
        hidden = [h[0].view(len(lanes), n_read, -1)] if len(lanes) else []
        if len(last):
            lane = np.repeat(last, n_read)
            position = self.reads_np[self.lanes.row[last]].reshape(-1)
            hidden.append(self._enter(self.body.n_layers, lane, position).view(len(last), n_read, -1))
        every, out = np.concatenate([lanes, last]), torch.cat(hidden)
        row = self.lanes.row[every]
        before = self.reads_np[row] < self.lanes.start[every][:, None]
        if before.any():  # what is read before a lane's start is the stored run's own
            kept = self.store.hidden[self._index(row)]
            out = torch.where(self._index(before)[..., None], kept, out)
        return every, out
