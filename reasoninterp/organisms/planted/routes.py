"""Attention of a Hugging Face model in which single edges can be closed and single heads silenced, row by row.

`Routes(model)` gives the model an attention function that computes what `sdpa` computes, unless

* `closed[layer]` ([row, kv_group, query, key], boolean): those edges get no attention, the rest of the row renormalises;
* `silent[layer]` ([row, kv_group, query], boolean): the heads of that group write nothing there.

It is how a base is trained so that its steps reach the answer by one named head and by no other way (in the spirit of
interchange intervention training, Geiger et al. 2022, arXiv:2112.00826, with knock-outs in place of interchanges).
Rows are padded on the right, so causality alone is the mask.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from einops import rearrange, repeat
from jaxtyping import Bool
from torch import Tensor

NAME = "reasoninterp_routed"


class Routes:
    """Closed edges and silenced heads of one model; `with routes.of(closed, silent):` holds for the passes inside."""

    def __init__(self, model: Any) -> None:
        _register()
        model.set_attn_implementation(NAME)
        self.model = model
        for layer in model.model.layers:
            layer.self_attn.routes = self
        self.closed: Mapping[int, Bool[Tensor, "row group query key"]] = {}
        self.silent: Mapping[int, Bool[Tensor, "row group query"]] = {}

    @contextmanager
    def of(self, closed: Mapping[int, Tensor], silent: Mapping[int, Tensor] | None = None) -> Iterator[None]:
        """Close these edges and silence these heads inside."""
        self.closed, self.silent = closed, silent or {}
        try:
            yield
        finally:
            self.closed, self.silent = {}, {}

    def leave(self) -> None:
        """Give the model its ordinary attention back."""
        self.model.set_attn_implementation("sdpa")
        for layer in self.model.model.layers:
            del layer.self_attn.routes


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls; tensors are [row, head, pos, d_head]."""
    size = module.num_key_value_groups
    k, v = (repeat(t, "row group pos d -> row (group size) pos d", size=size) for t in (key, value))
    closed, silent = module.routes.closed.get(module.layer_idx), module.routes.silent.get(module.layer_idx)
    if closed is None:
        out = torch.nn.functional.scaled_dot_product_attention(query, k, v, is_causal=query.shape[2] > 1, scale=scaling)
    else:
        causal = torch.ones(query.shape[2], k.shape[2], dtype=torch.bool).tril()
        open_ = causal & ~repeat(closed, "row group q k -> row (group size) q k", size=size)
        out = torch.nn.functional.scaled_dot_product_attention(query, k, v, attn_mask=open_, scale=scaling)
    if silent is not None:
        out = out.masked_fill(repeat(silent, "row group q -> row (group size) q 1", size=size), 0.0)
    return rearrange(out, "row head pos d -> row pos head d").contiguous(), None


def _register() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, lambda *_, **__: None)
