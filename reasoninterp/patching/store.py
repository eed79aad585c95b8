"""Stored runs: what a sweep restarts from.

A `Store` holds, of some rows of token ids under one mind, the keys and values of every layer, the residual stream
before the layers that are asked for (and behind the last), and any further sites by name: nothing else.  Rows may
have different lengths (padding is never run).  A row that begins as a row of another store does is run from its first
own token on only.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from reasoninterp.models.body import Body, Hook, site
from reasoninterp.models.packed import Group, Memory, Packed
from reasoninterp.patching.lanes import Ints

SiteKey = tuple[str, int]
BLOCK_SITES = ("resid_mid", "attn_out", "mlp_out", "z", "q", "k", "v")


@dataclass
class Store:
    """Activations of some rows.

    Attributes:
        memory: keys and values by layer, [row, kv_head, pos, d_head].
        resid: `resid_pre` by layer, [row, pos, d_model]; key `n_layers` is the last block's `resid_post`.
        sites: other activations by (component, layer), [row, pos, ...].
        hidden: last residual stream where it is read, [row, read, d_model].
        lengths: tokens of each row.
    """

    memory: Memory
    resid: dict[int, Tensor]
    sites: dict[SiteKey, Tensor] = field(default_factory=dict)
    hidden: Tensor = field(default_factory=lambda: torch.empty(0))
    lengths: Ints = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    def at(self, component: str, layer: int) -> Float[Tensor, "row pos ..."]:
        """A site's activations.

        Raises:
            KeyError: it was not recorded.
        """
        if component == "resid_pre":
            return self.resid[layer]
        if component == "resid_post":
            return self.resid[layer + 1]
        return self.sites[component, layer]


def record(
    body: Body,
    ids: Int[Tensor, "row pos"],
    lengths: Ints,
    reads: Int[Tensor, "row read"],
    wanted: Collection[SiteKey],
    *,
    like: Store | None = None,
    starts: Ints | None = None,
    hooks: Iterable[tuple[str, Hook]] = (),
    max_tokens: int = 8192,
) -> Store:
    """Run rows once and keep what is wanted.

    Args:
        body: the network, at a mind.
        ids: token ids, padded on the right.
        lengths: how many tokens of each row to run (up to the last that is read).
        reads: positions whose last residual stream is kept.
        wanted: (component, layer) to keep; `resid_pre` at `n_layers` stands for the last `resid_post`.
        like: a store of the same sites whose rows begin as these do; with `starts`, the first position of each row
            that differs.
        starts: see `like`.
        hooks: (site, f) that act on every block's packed activations, [1, token, ...].
        max_tokens: tokens run at once.
    """
    n_rows, width, dev = ids.shape[0], int(lengths.max()), body.device
    keep = {(c, layer) for c, layer in wanted if c not in ("resid_pre", "resid_post")}
    layers = {layer + (c == "resid_post") for c, layer in wanted if c in ("resid_pre", "resid_post")}
    kv = (n_rows, body.n_kv_heads, width, body.d_head)
    # Padding must be finite, since attention gives it the weight 0; without any, nothing need be cleared.
    new = torch.empty if bool((lengths == width).all()) else torch.zeros
    memory = Memory(*([new(kv, dtype=body.dtype, device=dev) for _ in range(body.n_layers)] for _ in "kv"))
    store = Store(memory, {}, {}, torch.zeros(*reads.shape, body.d_model, dtype=body.dtype, device=dev), lengths)
    for layer in layers:
        store.resid[layer] = new(n_rows, width, body.d_model, dtype=body.dtype, device=dev)
    first = np.zeros(n_rows, dtype=np.int64) if starts is None else np.minimum(starts, lengths - 1)
    if like is not None:
        _copy_beginnings(store, like, first)
    packed = Packed(body, memory if like is not None else None)
    packed.keep = memory
    ids, reads = ids.to(dev), reads.to(dev)
    with packed.installed():
        for rows in _chunks(first, lengths, max_tokens):
            groups = _groups(rows, first, lengths, dev)
            packed.set_groups(groups)
            at_row = torch.cat([g.rows.repeat_interleave(g.length) for g in groups])
            at_pos = torch.cat([g.positions() for g in groups])
            h = packed.embed(ids[at_row, at_pos])
            for layer in range(body.n_layers):
                if layer in store.resid:
                    put_rows(store.resid[layer], groups, h[0])
                keepers = _keepers(store, body, keep, layer, at_row, at_pos)
                named = [*keepers, *((n, f) for n, f in hooks if n.startswith(f"blocks.{layer}."))]
                if layer == body.n_layers - 1 and not named and body.n_layers not in store.resid:
                    rows_read = torch.cat([g.rows for g in groups])
                    store.hidden[rows_read] = packed.last(h, _places(groups, reads))[0].view(
                        -1, *store.hidden.shape[1:]
                    )
                    break
                with ExitStack() as stack:
                    if named:
                        stack.enter_context(body.block_hooks(named))
                    h = packed.block(layer, h)
            else:
                if body.n_layers in store.resid:
                    put_rows(store.resid[body.n_layers], groups, h[0])
                rows_read = torch.cat([g.rows for g in groups])
                store.hidden[rows_read] = h[0, _places(groups, reads)].view(-1, *store.hidden.shape[1:])
    if like is not None:
        for key in keep:
            for row, n in enumerate(first):
                store.sites[key][row, :n] = like.sites[key][row, :n]
    return store


def _copy_beginnings(store: Store, like: Store, first: Ints) -> None:
    """The shared beginning of every row: keys, values and residual stream."""
    longest = int(first.max())
    for mine, theirs in ((store.memory.keys, like.memory.keys), (store.memory.values, like.memory.values)):
        for a, b in zip(mine, theirs, strict=True):
            a[:, :, :longest] = b[:, :, :longest]
    for layer, tensor in store.resid.items():
        tensor[:, :longest] = like.resid[layer][:, :longest]


def _chunks(first: Ints, lengths: Ints, max_tokens: int) -> list[Ints]:
    """Rows in the order of their tokens to run, at most `max_tokens` at once (or one row)."""
    order = np.argsort(lengths - first, kind="stable")
    out: list[list[int]] = []
    n = 0
    for row in order.tolist():
        own = int(lengths[row] - first[row])
        if not out or n + own > max_tokens:
            out.append([])
            n = 0
        out[-1].append(row)
        n += own
    return [np.array(rows) for rows in out]


def _groups(rows: Ints, first: Ints, lengths: Ints, device: torch.device) -> list[Group]:
    own = lengths[rows] - first[rows]
    out = []
    for n in np.unique(own):
        mine = np.sort(rows[own == n])
        out.append(Group(torch.as_tensor(mine, device=device), torch.as_tensor(first[mine], device=device), int(n), 1))
    return out


def _keepers(
    store: Store, body: Body, keep: set[SiteKey], layer: int, at_row: Tensor, at_pos: Tensor
) -> list[tuple[str, Hook]]:
    def keeper(component: str) -> Hook:
        def f(act: Tensor) -> None:
            new = act[0].detach()
            key = (component, layer)
            if key not in store.sites:
                shape = (len(store.lengths), int(store.lengths.max()), *new.shape[1:])
                store.sites[key] = torch.zeros(shape, dtype=new.dtype, device=new.device)
            store.sites[key][at_row, at_pos] = new

        return f

    return [(site(c, layer), keeper(c)) for c in BLOCK_SITES if (c, layer) in keep]


def put_rows(store: Float[Tensor, "row pos ..."], groups: Sequence[Group], new: Float[Tensor, "token ..."]) -> None:
    """Write packed tokens of groups of one lane a stem to their rows and positions."""
    at = 0
    for g in groups:
        slab = new[at : at + g.n_tokens].view(g.n_stems, g.length, *new.shape[1:])
        first, start = int(g.rows[0]), int(g.starts[0])
        if int(g.rows[-1]) - first == g.n_stems - 1 and bool((g.starts == start).all()):  # rows are sorted
            store[first : first + g.n_stems, start : start + g.length] = slab
        else:
            store[g.rows[:, None], g.positions(1).view(g.n_stems, g.length)] = slab
        at += g.n_tokens


def _places(groups: Sequence[Group], reads: Tensor) -> Int[Tensor, " read"]:
    """Where in the packed tensor the rows are read, row by row."""
    out, at = [], 0
    for g in groups:
        offset = (reads[g.rows] - g.starts[:, None]).clamp(min=0)
        out.append((at + g.length * torch.arange(g.n_stems, device=offset.device)[:, None] + offset).flatten())
        at += g.n_tokens
    return torch.cat(out)
