"""Span-to-span attention of every head: plain, and weighted by what is carried.

For a row, a head, a destination D and a source S (token spans, `grid`), with attention α and values v:

* `plain`: `mean_{q∈D} Σ_{k∈S} α_qk`, the share of a reading token's attention that goes to the source.  Where the
  sources partition the row it sums to 1 over them.  It grows with the number of tokens in the source.
* `plain_per_key`: `Σ_{q∈D, k∈S, k≤q} α_qk / #{(q, k)}`, the mean over the pairs that causality allows: what one key
  token gets.  It falls with the number of tokens that are there to be read.
* `value_weighted`: `mean_{q∈D} ‖Σ_{k∈S} α_qk v_k W_O‖`, the norm of what the head writes from the source into the
  residual stream (Kobayashi et al. 2020, arXiv:2004.10102, whose vectors are here summed over the span before the
  norm is taken), in units of the residual stream.  The bias of the output projection comes from no source and is left
  out; those of the values are in.
* `value_share`: the same with each query's norms divided by their sum over the sources, so that layers and heads
  stand on one scale.

`‖u W_O‖` needs no vector of the model's width: with the thin factorisation `W_Oᵀ = Q R` it is `‖R u‖`, where `RᵀR`
is the Gram matrix of W_O's rows, and `u` has the head's width.  Under grouped queries a head takes its group's v.

Patterns are reduced to spans inside the hook, layer by layer; no two layers' patterns are held at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from einops import repeat
from jaxtyping import Float, Int
from torch import Tensor

from reasoninterp.attention.grid import SpanGrid, members, places
from reasoninterp.attention.sinks import Heavy, SinkRule, list_heavy, received, sink_mask, without
from reasoninterp.errors import UserError
from reasoninterp.models.body import Body, Hook, site

KINDS = ("plain", "plain_per_key", "value_weighted", "value_share")


@dataclass(frozen=True)
class AttentionMaps:
    """Maps of some layers.

    Attributes:
        layers: the layers, in the order of the maps' first axis.
        kept: by kind, the maps of the attention as it is; NaN where `SpanGrid.visible` is false.
        excluded: by kind, the same with sinks left out (empty if no rule was given).
        heavy: every token that receives more than the rule's share, by layer, row and head.
    """

    layers: tuple[int, ...]
    kept: Mapping[str, Float[Tensor, "layer row head dst src"]]
    excluded: Mapping[str, Float[Tensor, "layer row head dst src"]]
    heavy: tuple[Heavy, ...]


def attention_maps(
    body: Body,
    ids: Int[Tensor, "row pos"],
    grid: SpanGrid,
    *,
    kinds: Sequence[str] = KINDS,
    layers: Sequence[int] | None = None,
    sinks: SinkRule | None = None,
    token_kinds: Int[Tensor, "row pos"] | None = None,
    renormalise: bool = False,
) -> AttentionMaps:
    """Maps of every head from one forward pass, on the CPU.

    Args:
        body: the mind that is read.
        ids: rows padded on the right.
        grid: the spans of each row.
        kinds: any of `KINDS`.
        layers: which layers; by default all.
        sinks: if given, sinks are found by this rule in each row and head, and each map is made without them too.
        token_kinds: what each token is (`sinks.kinds_of_rows`); needed with `sinks`.
        renormalise: without the sinks, let each query's attention sum to 1 again.

    Raises:
        UserError: an unknown kind or layer, or a rule for sinks without the tokens' kinds.
    """
    chosen = checked_layers(body, layers)
    if unknown := [k for k in kinds if k not in KINDS]:
        raise UserError(f"kinds: {unknown[0]!r} is not one of {', '.join(KINDS)}.")
    if sinks is not None and token_kinds is None:
        raise UserError("token_kinds: a rule for sinks needs to know the tokens; give `kinds_of_rows(...)`.")
    grid = grid.to(body.device)
    kept: dict[int, dict[str, Tensor]] = {}
    excluded: dict[int, dict[str, Tensor]] = {}
    heavy: list[Heavy] = []
    values: dict[int, Tensor] = {}
    weighted = any(kind.startswith("value") for kind in kinds)

    def keep_value(layer: int) -> Hook:
        def hook(v: Tensor) -> None:
            values[layer] = v

        return hook

    def reduce(layer: int) -> Hook:
        def hook(pattern: Tensor) -> None:
            pattern = at_least_float(pattern)
            v = at_least_float(values.pop(layer)) if weighted else None
            factor = norm_factor(output_weights(body, layer)) if weighted else None
            kept[layer] = _all_kinds(pattern, v, factor, grid, kinds)
            if sinks is not None and token_kinds is not None:
                got = received(pattern, grid.lengths, sinks.min_queries)
                heavy.extend(list_heavy(layer, got.cpu(), token_kinds, sinks))
                rest = without(pattern, sink_mask(got, token_kinds, sinks), renormalise=renormalise)
                excluded[layer] = _all_kinds(rest, v, factor, grid, kinds)

        return hook

    hooks = [(site("v", layer), keep_value(layer)) for layer in chosen if weighted]
    hooks += [(site("pattern", layer), reduce(layer)) for layer in chosen]
    body.forward(ids, hooks=hooks, positions=torch.zeros(len(ids), 1, dtype=torch.long))
    return AttentionMaps(chosen, _stack(kept, chosen, kinds), _stack(excluded, chosen, kinds), tuple(heavy))


def plain_map(
    pattern: Float[Tensor, "row head query key"], grid: SpanGrid, *, per_key: bool = False
) -> Float[Tensor, "row head dst src"]:
    """Attention from span to span: summed over the source's keys, or (`per_key`) averaged over allowed pairs."""
    n_pos = pattern.shape[-1]
    lost = pattern.isnan().any(-1)  # queries of which nothing is left without the sinks count in no mean
    reads = members(grid.destinations, n_pos).to(pattern.dtype)[:, None] * ~lost[:, :, None]
    read = members(grid.sources, n_pos).to(pattern.dtype)
    total = reads @ pattern.nan_to_num() @ read.mT[:, None]
    count = reads @ read.cumsum(-1).mT[:, None] if per_key else reads.sum(-1, keepdim=True)
    return (total / count).masked_fill(~grid.visible[:, None], torch.nan)


def value_maps(
    pattern: Float[Tensor, "row head query key"],
    v: Float[Tensor, "row key kv_head d_head"],
    factor: Float[Tensor, "head rank d_head"],
    grid: SpanGrid,
) -> tuple[Float[Tensor, "row head dst src"], Float[Tensor, "row head dst src"]]:
    """`value_weighted` and `value_share` of one layer.

    Args:
        pattern: attention.
        v: values of the key/value heads.
        factor: `norm_factor` of the heads' output weights.
        grid: spans.
    """
    n_rows, n_heads = pattern.shape[:2]
    v = repeat(v, "row key kv d -> row (kv group) key d", group=n_heads // v.shape[2])
    visible, somewhere = grid.visible, grid.visible.any(0).tolist()
    row, head = torch.arange(n_rows, device=pattern.device), torch.arange(n_heads, device=pattern.device)
    shape = (n_rows, n_heads, *visible.shape[1:])
    norms_out, shares_out = pattern.new_full(shape, torch.nan), pattern.new_full(shape, torch.nan)
    for d in range(visible.shape[1]):
        queries, reads = places(grid.destinations[:, d])
        norms = pattern.new_zeros(n_rows, n_heads, queries.shape[1], visible.shape[2])
        for s in range(visible.shape[2]):
            if not somewhere[d][s]:
                continue
            keys, real = places(grid.sources[:, s])
            block = pattern[
                row[:, None, None, None], head[:, None, None], queries[:, None, :, None], keys[:, None, None]
            ]
            carried = (block * real[:, None, None]) @ v[row[:, None, None], head[:, None], keys[:, None]]
            norms[..., s] = torch.einsum("rhqd,hed->rhqe", carried, factor).norm(dim=-1)
        # Filling counts in no mean, nor do queries of which nothing is left without the sinks.
        norms = norms.masked_fill(~reads[:, None, :, None], torch.nan)
        norms_out[:, :, d] = norms.nanmean(2)
        shares_out[:, :, d] = (norms / norms.sum(-1, keepdim=True)).nanmean(2)
    hidden = ~visible[:, None]
    return norms_out.masked_fill(hidden, torch.nan), shares_out.masked_fill(hidden, torch.nan)


def output_weights(body: Body, layer: int) -> Float[Tensor, "head d_head d_model"]:
    """The rows of the output projection that belong to each head of a layer, of the mind that is in.

    Raises:
        RuntimeError: the projection is not of the body's sizes.
    """
    weights: Tensor = body._bridge.blocks[layer].attn.W_O.detach()
    if weights.shape != (body.n_heads, body.d_head, body.d_model):
        raise RuntimeError(f"the output projection of layer {layer} has shape {tuple(weights.shape)}")
    return weights


def norm_factor(w_o: Float[Tensor, "head d_head d_model"]) -> Float[Tensor, "head rank d_head"]:
    """R with `‖u W_O‖ = ‖R u‖` for every u: its square is W_O's Gram matrix, but no digits are lost in squaring."""
    factor: Tensor = torch.linalg.qr(at_least_float(w_o).mT, mode="r").R
    return factor


def checked_layers(body: Body, layers: Sequence[int] | None) -> tuple[int, ...]:
    """The layers asked for, all of them by default.

    Raises:
        UserError: there is no such layer.
    """
    chosen = tuple(range(body.n_layers) if layers is None else layers)
    if wrong := [layer for layer in chosen if not 0 <= layer < body.n_layers]:
        raise UserError(f"layers: there is no layer {wrong[0]}; the model has layers 0 to {body.n_layers - 1}.")
    return chosen


def at_least_float(x: Tensor) -> Tensor:
    """Half precision as float32; float32 and float64 as they are."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _all_kinds(
    pattern: Tensor, v: Tensor | None, factor: Tensor | None, grid: SpanGrid, kinds: Sequence[str]
) -> dict[str, Tensor]:
    """The maps of one layer, on the CPU."""
    found: dict[str, Tensor] = {}
    if "plain" in kinds:
        found["plain"] = plain_map(pattern, grid)
    if "plain_per_key" in kinds:
        found["plain_per_key"] = plain_map(pattern, grid, per_key=True)
    if v is not None and factor is not None:
        found["value_weighted"], found["value_share"] = value_maps(pattern, v, factor, grid)
    return {kind: found[kind].cpu() for kind in kinds}


def _stack(by_layer: Mapping[int, Mapping[str, Tensor]], layers: Sequence[int], kinds: Sequence[str]) -> dict:
    if not by_layer:
        return {}
    return {kind: torch.stack([by_layer[layer][kind] for layer in layers]) for kind in kinds}
