"""What writes the residual stream and what reads it: senders, receivers, and whether a path between them exists.

Readers stand in an order of stages: 2l is the attention of layer l, 2l + 1 its MLP, and the logits come last.  What a
sender writes is read from its own stage on.  All this supposes that a block adds z W_O, and then the MLP's output, to
the stream; `check_path` measures that it does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple
from weakref import WeakSet

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from reasoninterp.errors import UserError
from reasoninterp.models.body import Body, site
from reasoninterp.patching.metric import ContrastPlan

SenderComponent = Literal["embed", "resid_pre", "attn_out", "mlp_out", "z"]
ReceiverComponent = Literal["q", "k", "v", "mlp", "logits"]
SENDERS = ("embed", "resid_pre", "attn_out", "mlp_out", "z")
RECEIVERS = ("q", "k", "v", "mlp", "logits")
_CHECKED: WeakSet[Body] = WeakSet()


@dataclass(frozen=True)
class Sender:
    """What writes: a component of a layer (`embed` has none); for `z` one head, or all of the layer's if None."""

    component: SenderComponent | str
    layer: int = 0
    head: int | None = None

    @property
    def stage(self) -> int:
        """The first reader that sees it: 2l is layer l's attention, 2l + 1 its MLP."""
        return 2 * self.layer + {"attn_out": 1, "z": 1, "mlp_out": 2}.get(self.component, 0)


@dataclass(frozen=True)
class Receiver:
    """What reads: `q`, `k`, `v` of one head (KV head for `k` and `v`) or of all if None, `mlp`, or `logits`."""

    component: ReceiverComponent | str
    layer: int = 0
    head: int | None = None

    def stage(self, n_layers: int) -> int:
        """Its place in the order of readers (see `Sender.stage`); the logits come last."""
        return 2 * n_layers if self.component == "logits" else 2 * self.layer + (self.component == "mlp")


class Change(NamedTuple):
    """What is added to the residual stream, for readers from `stage` on; [row, pos, d_model], 0 where nothing is."""

    stage: int
    delta: Tensor


def receivers_after(body: Body, sender: Sender) -> list[Receiver]:
    """Everything that reads the stream after a sender: q, k and v of all heads and the MLP of each layer, the logits."""
    found: list[Receiver] = []
    for layer in range(body.n_layers):
        found += [Receiver("q", layer), Receiver("k", layer), Receiver("v", layer), Receiver("mlp", layer)]
    return [r for r in [*found, Receiver("logits")] if r.stage(body.n_layers) >= sender.stage]


def stream_of(body: Body, receiver: Receiver) -> str:
    """The site of the residual stream that a receiver reads."""
    if receiver.component == "logits":
        return site("resid_post", body.n_layers - 1)
    return site("resid_mid" if receiver.component == "mlp" else "resid_pre", receiver.layer)


def sender_site(sender: Sender) -> str:
    return site("resid_pre", 0) if sender.component == "embed" else site(sender.component, sender.layer)


def through_o(
    body: Body, layer: int, z: Float[Tensor, "row pos head d_head"], heads: Sequence[int]
) -> Float[Tensor, "row pos d_model"]:
    """What a difference of z in some heads adds to the stream: through W_O without its bias."""
    kept = torch.zeros_like(z)
    kept[:, :, list(heads)] = z[:, :, list(heads)]
    flat = rearrange(kept, "row pos head d_head -> row pos (head d_head)")
    o = module_of(body, "o", layer)
    weight: Tensor = o.weight  # type: ignore[assignment]
    return flat @ (weight.T if isinstance(o, torch.nn.Linear) else weight)


def module_of(body: Body, role: str, layer: int) -> torch.nn.Module:
    """The torch module of a block's norm or projection: called by itself, it fires none of the bridge's hooks."""
    return next(leaf for leaf in body.leaves() if leaf.role == role and leaf.layer == layer)._module


def check_path(body: Body, plan: ContrastPlan, senders: Sequence[Sender], hops: Sequence[Sequence[Receiver]]) -> None:
    """Every part exists, and each hop's receivers come after something that the hop before it writes."""
    check_aligned(plan)
    _check_stream(body)
    if not senders:
        raise UserError("senders: there is none; name at least one sender of a path.")
    for sender in senders:
        _check_part(body, "sender", SENDERS, sender.component, sender.layer, sender.head)
    first = min(sender.stage for sender in senders)
    for k, hop in enumerate(hops):
        if not hop:
            raise UserError("receivers: there is none; name at least one receiver in every hop of a path.")
        for r in hop:
            _check_part(body, "receiver", RECEIVERS, r.component, r.layer, r.head)
            if r.component == "logits" and k < len(hops) - 1:
                raise UserError("receiver logits: nothing comes after them; name them in the last hop only.")
            if r.stage(body.n_layers) < first:
                raise UserError(
                    f"receiver {r.component} of layer {r.layer} comes before what it reads; take a later one."
                )
        first = min(r.stage(body.n_layers) for r in hop) + 1


def _check_part(body: Body, what: str, known: Sequence[str], component: str, layer: int, head: int | None) -> None:
    if component not in known:
        raise UserError(f"{what} {component!r}: not one of {', '.join(known)}.")
    if not 0 <= layer < body.n_layers:
        raise UserError(f"{what} layer {layer}: the model's layers are 0 to {body.n_layers - 1}.")
    n = {"z": body.n_heads, "q": body.n_heads, "k": body.n_kv_heads, "v": body.n_kv_heads}.get(component, 0)
    if head is not None and not 0 <= head < n:
        have = f"{component} has heads 0 to {n - 1}" if n else f"{component} has no heads"
        raise UserError(f"{what} head {head}: {have} in this model.")


def check_aligned(plan: ContrastPlan) -> None:
    """A `UserError` unless the two prompts of every contrast have as many tokens."""
    for k, (clean, corrupt) in enumerate(zip(*plan.prompts, strict=True)):
        if len(clean) != len(corrupt):
            raise UserError(
                f"contrast {k} has {len(clean)} and {len(corrupt)} tokens before the answer; paths need aligned ones."
            )


def _check_stream(body: Body) -> None:
    """Blocks must add z W_O to the stream, and then the MLP's output: else a Δ is not what a sender writes."""
    if body in _CHECKED:
        return
    last = body.n_layers - 1
    parts = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z")
    try:
        cache = body.cache(torch.tensor([[1, 2]]), [site(part, last) for part in parts])
    except (KeyError, RuntimeError):
        cache = {}
    fits = False
    if cache:
        pre, mid, post, attn, mlp, z = (cache[site(part, last)] for part in parts)
        change = through_o(body, last, z[:, 1:] - z[:, :1], range(body.n_heads))
        slack = 1e-4 if body.dtype == torch.float32 else 0.05

        def near(a: Tensor, b: Tensor) -> bool:
            return bool((a - b).abs().max() <= slack * max(1.0, float(b.abs().max())))

        fits = near(pre + attn, mid) and near(mid + mlp, post) and near(change, attn[:, 1:] - attn[:, :1])
    if not fits:
        raise UserError(
            "Paths need a model whose blocks add attention, then the MLP, to the residual stream, as Llama, Qwen and "
            "GPT-2 do; this one does not."
        )
    _CHECKED.add(body)
