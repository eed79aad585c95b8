"""Body: one hooked network, through which every mind of a comparison is read.

A thin adapter over TransformerLens' TransformerBridge.  What it adds to the bridge:

1. `forward` takes token ids only, gives every row its own position ids (from the attention mask, so that left
   padding is right), and can gather the hidden states to be read *before* the unembedding, so that logits of the
   full sequence are never built.
2. Every hook is counted: one that did not fire exactly once per forward is an error, never a silent no-op.
3. `resid_mid` can be written.  In the bridge this name is the input of the MLP's norm, and an edit there leaves the
   residual stream as it was; here the edit reaches both.
4. `leaves` lists the modules that own parameters, with the parameters of the plain model that they use, and lets
   one watch each leaf's input and output where they are really computed.

Weights never require gradients: with `grad=True` the graph starts at the embeddings' outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reasoninterp.errors import UserError
from reasoninterp.models.leaves import Leaf, find_leaves

Hook = Callable[[Tensor], "Tensor | None"]
Component = Literal[
    "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z", "q", "k", "v", "pattern", "attn_scores"
]
_IN_BLOCK = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
_IN_ATTENTION = ("z", "q", "k", "v", "pattern", "attn_scores")


def site(component: Component | str, layer: int) -> str:
    """The name of a component of a layer, as `Body.forward(hooks=...)` and `Body.cache` take it.

    Shapes: `resid_*`, `attn_out`, `mlp_out` are [row, pos, d_model]; `z` and `q` [row, pos, head, d_head]; `k` and
    `v` [row, pos, kv_head, d_head]; `pattern` and `attn_scores` [row, head, query, key], masked scores being the
    dtype's minimum.

    Raises:
        ValueError: no such component.
    """
    if component in _IN_BLOCK:
        return f"blocks.{layer}.hook_{component}"
    if component in _IN_ATTENTION:
        return f"blocks.{layer}.attn.hook_{component}"
    raise ValueError(f"no component {component!r}; there are {', '.join(_IN_BLOCK + _IN_ATTENTION)}")


class Body:
    """A hooked network in evaluation mode.  Made by `Minds.load`; its weights are those of the mind it is at (`label`).

    Attributes:
        config: the Hugging Face configuration.
        param_shapes: by name, the shapes of the plain model's parameters.
        n_layers, n_heads, n_kv_heads, d_model, d_head: sizes.
        n_vocab_shared: token ids below this are known to every mind.
        tied: whether embedding and unembedding are one parameter.
        label: name of the weights that are in.
    """

    def __init__(self, bridge: Any, config: Any, params: Mapping[str, torch.nn.Parameter], n_vocab_shared: int) -> None:
        self._bridge = bridge
        self._model = bridge.original_model
        self._forwards = 0
        self.label = ""
        self.config = config
        self.n_vocab_shared = n_vocab_shared
        self.param_shapes: dict[str, tuple[int, ...]] = {k: tuple(p.shape) for k, p in params.items()}
        self.n_layers = int(config.num_hidden_layers)
        self.n_heads = int(config.num_attention_heads)
        self.n_kv_heads = int(getattr(config, "num_key_value_heads", None) or self.n_heads)
        self.d_model = int(config.hidden_size)
        self.d_head = int(getattr(config, "head_dim", None) or self.d_model // self.n_heads)
        self.tied = not any(name.startswith("lm_head.") for name in params)
        first = next(iter(params.values()))
        self.device, self.dtype = first.device, first.dtype
        for p in bridge.parameters():  # GPT-2's split q, k and v are parameters of their own
            p.requires_grad_(False)
        self._leaves = find_leaves(bridge, params, self._probe)
        self._embeddings = [leaf for leaf in self._leaves if leaf.kind == "embedding"]

    @property
    def is_gqa(self) -> bool:
        """Whether several query heads share one key and value head."""
        return self.n_kv_heads != self.n_heads

    @property
    def max_positions(self) -> int | None:
        """The longest sequence the network's positions reach, where it has such a bound (learned positions)."""
        return self.param_shapes["transformer.wpe.weight"][0] if "transformer.wpe.weight" in self.param_shapes else None

    def leaves(self) -> list[Leaf]:
        """Every module that owns parameters and runs in the forward pass, in its order (see `models.leaves`)."""
        return list(self._leaves)

    def forward(
        self,
        ids: Int[Tensor, "row pos"],
        *,
        hooks: Sequence[tuple[str, Hook]] = (),
        positions: Int[Tensor, "row read"] | None = None,
        grad: bool = False,
        attention_mask: Tensor | None = None,
        past: Any = None,
    ) -> Float[Tensor, "row read vocab"]:
        """Logits over the vocabulary that all minds share, at every position or at `positions` only.

        Args:
            ids: token ids.  Rows of different length are padded on the right (no mask needed: later tokens cannot
                reach earlier ones) or on the left (with `attention_mask`).
            hooks: (site, f) with `f(activation) -> activation | None`; None leaves it as it is.  Only what `f`
                returns counts as an edit.  With `grad`, an `f` that returns its argument puts that very tensor on
                the path to the logits, so that gradients reach it.
            positions: per row, the positions to read; negative ones count from the end.
            grad: keep the graph (from the embeddings on).  Off by default.
            attention_mask: [row, key], 1 for real tokens; or additive [row, 1, query, key].
            past: a key/value cache that this call extends in place; `attention_mask` then has its full length.

        Raises:
            RuntimeError: a hook did not fire exactly once.
            UserError: more tokens than the network has positions.
        """
        ids = ids.to(self.device)
        self.check_length(ids.shape[1] + (past.get_seq_length() if past is not None else 0))
        attention_mask = attention_mask.to(self.device) if attention_mask is not None else None
        with ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(grad))
            if grad:
                for leaf in self._embeddings:
                    stack.enter_context(leaf.starting_graph())
            if hooks:
                stack.enter_context(self.hooks(hooks))
            if positions is not None:
                stack.enter_context(self._reading(positions.to(self.device)))
            out = self._model(
                input_ids=ids,
                attention_mask=attention_mask,
                position_ids=_position_ids(ids, attention_mask, past),
                past_key_values=past,
                use_cache=past is not None,
            )
            self._forwards += 1
        logits: Tensor = out.logits
        return logits[..., : self.n_vocab_shared]

    @contextmanager
    def hooks(self, hooks: Sequence[tuple[str, Hook]]) -> Iterator[None]:
        """Hooks that act on every forward inside the block; each must fire once per forward.

        Raises:
            RuntimeError: one fired more or less often.
            KeyError: no such site.
        """
        counts = [0] * len(hooks)
        before = self._forwards
        wrapped = [(name, self._counted(name, f, counts, i)) for i, (name, f) in enumerate(hooks)]
        with self._bridge.hooks(fwd_hooks=wrapped):
            yield
        n_forwards = self._forwards - before
        for (name, _), count in zip(hooks, counts, strict=True):
            if count != n_forwards:
                raise RuntimeError(f"the hook at {name} fired {count} times in {n_forwards} forward passes")

    def logits(self, hidden: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch vocab"]:
        """Logits of a last residual stream, over the vocabulary that all minds share; without a graph."""
        with torch.no_grad():
            out: Tensor = self._bridge.unembed(self._bridge.ln_final(hidden))
        return out[..., : self.n_vocab_shared]

    @contextmanager
    def block_hooks(self, hooks: Sequence[tuple[str, Hook]]) -> Iterator[None]:
        """Hooks for one pass of the blocks they sit in, driven one by one (`models.packed`); each must fire once.

        Raises:
            RuntimeError: one fired more or less often.
            KeyError: no such site.
        """
        counts = [0] * len(hooks)
        wrapped = [(name, self._counted(name, f, counts, i)) for i, (name, f) in enumerate(hooks)]
        with self._bridge.hooks(fwd_hooks=wrapped):
            yield
        for (name, _), count in zip(hooks, counts, strict=True):
            if count != 1:
                raise RuntimeError(f"the hook at {name} fired {count} times in one pass of its block")

    def cache(
        self, ids: Int[Tensor, "row pos"], names: Iterable[str], *, attention_mask: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Activations at the named sites (see `site`), detached copies."""
        store: dict[str, Tensor] = {}

        def keep(name: str) -> Hook:
            def f(act: Tensor) -> None:
                store[name] = act.detach().clone()

            return f

        last = torch.full((ids.shape[0], 1), ids.shape[1] - 1)
        self.forward(ids, hooks=[(n, keep(n)) for n in names], positions=last, attention_mask=attention_mask)
        return store

    def _counted(self, name: str, f: Hook, counts: list[int], i: int) -> Callable[..., Tensor | None]:
        writes_stream = name.endswith(".hook_resid_mid")

        def hooked(act: Tensor, *, hook: Any) -> Tensor | None:
            counts[i] += 1
            if not writes_stream:
                return f(act)
            # The block adds this very tensor to the MLP's output later on, so an edit in place reaches the
            # residual stream as well as the norm; `f` gets a copy, which no edit changes.
            new = f(act.clone())
            if new is not None:
                act.copy_(new)
            return None

        return hooked

    @contextmanager
    def _reading(self, positions: Int[Tensor, "row read"]) -> Iterator[None]:
        """Gather the hidden states at `positions` before the unembedding."""

        def gather(_module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            hidden = args[0]
            at = positions % hidden.shape[1]
            return (hidden.gather(1, at[..., None].expand(*at.shape, hidden.shape[-1])), *args[1:])

        handle = self._bridge.unembed.register_forward_pre_hook(gather)
        try:
            yield
        finally:
            handle.remove()

    def check_length(self, length: int) -> None:
        """Raise a UserError where a sequence has more tokens than the network has positions."""
        if self.max_positions is not None and length > self.max_positions:
            raise UserError(
                f"A sequence of {length} tokens does not fit the model's {self.max_positions} positions; "
                "shorten the traces or the prompt."
            )

    def _probe(self) -> None:
        """One short forward, in which the leaves see which of their modules really run."""
        with torch.no_grad():
            self._model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=self.device), use_cache=False)


def _position_ids(ids: Tensor, attention_mask: Tensor | None, past: Any) -> Tensor:
    """Row-wise position ids; rows get their own even where all agree, so that no activation is shared by rows."""
    if attention_mask is not None and attention_mask.dim() == 2:
        counted = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
        return counted[:, -ids.shape[1] :]
    seen = past.get_seq_length() if past is not None else 0
    return torch.arange(seen, seen + ids.shape[1], device=ids.device).expand(ids.shape)
