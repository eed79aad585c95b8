"""Path patching: what a sender writes reaches a receiver by the residual stream alone, and nothing else is changed.

Wang et al. 2022 (arXiv:2211.00593, section 3.1) and Goldowsky-Dill et al. 2023 (arXiv:2304.05969).  For the contrasts
of a plan and a direction (`residual.SIDES`: the run patched *into* and the *source* run):

1. The sender's change of the residual stream at its tokens is `Δ = source − into`: of the activation itself for
   `embed`, `resid_pre`, `attn_out` and `mlp_out`; pushed through the head's own rows of W_O, without the bias, for `z`.
2. A receiver's input is the residual stream that it reads, plus the Δ of the senders before it; its activation is
   recomputed through its own norm and projection.  `q`, `k` and `v` are those of `models.body.site`: before rotary
   positions and before query and key norms, which the network applies itself; `k` and `v` have one head a KV group.
   `mlp` is the MLP's input; `logits` the final norm's.
3. That activation is put into the run at the tokens where Δ is not 0, and everything after it runs freely.
4. A path may lead through named receivers on its way: the change of what these write (their heads' z through W_O,
   their MLP's output), all else frozen, is the Δ of the next hop.

Several receivers at once can read in two ways, which agree wherever none comes after another:

* `frozen` (Wang et al.): every receiver reads the into-run's own stream plus Δ, as if it were the only one;
* `running` (edges of Goldowsky-Dill et al.): a receiver also sees what earlier receivers have changed.  So all
  receivers after a sender together are exactly the plain patch of that sender.

Logits read the patched run's stream plus Δ either way: nothing comes after them that could be frozen.  MLPs between
sender and receiver are frozen; with `mlps="recomputed"` the Δ also passes through them (as in Wang et al.; attention
stays frozen).  Values are `sign · (patched margin − plain margin)`: from 0 to the contrast's effect, as in `residual`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from reasoninterp.errors import UserError
from reasoninterp.models.body import Body, Hook, site
from reasoninterp.patching.metric import SIDES, ContrastPlan
from reasoninterp.patching.plain import span_mask
from reasoninterp.patching.stream import (
    Change,
    Receiver,
    ReceiverComponent,
    Sender,
    check_path,
    module_of,
    sender_site,
    stream_of,
    through_o,
)
from reasoninterp.traces.trace import Span

Reading = Literal["frozen", "running"]
Mlps = Literal["frozen", "recomputed"]
Spans = Sequence[Span | None]


def path_effects(
    body: Body,
    plan: ContrastPlan,
    direction: str,
    senders: Sequence[Sender],
    receivers: Sequence[Receiver],
    spans: Spans,
    *,
    through: Sequence[Sequence[Receiver]] = (),
    at: Spans | None = None,
    reading: Reading = "frozen",
    mlps: Mlps = "frozen",
) -> Float[Tensor, " contrast"]:
    """Effect of the paths from `senders` (through named receivers) to `receivers`, in nats of the margin.

    Args:
        body: the mind that is read.
        plan: aligned contrasts.
        direction: `denoising` or `noising`.
        senders: whose change is sent; a receiver gets the sum over those before it.
        receivers: what reads it in the end.
        spans: per contrast, the tokens at which the senders write; None sends nothing there.
        through: sets of receivers (no logits) on the way, in order; the first reads the senders.
        at: per contrast, tokens outside of which the last receivers read nothing changed; by default no limit.
        reading: how several receivers in different layers read (see the module).
        mlps: whether the change passes through the MLPs between.

    Raises:
        UserError: contrasts not aligned, no such component, layer or head, a receiver before every sender, or a
            network whose blocks do not add attention and MLP to the stream one after the other.
    """
    sides = SIDES[direction]
    plain = run_margins(body, plan, sides.into)
    patched = path_margins(
        body, plan, direction, senders, receivers, spans, through=through, at=at, reading=reading, mlps=mlps
    )
    return sides.sign * (patched - plain)


def path_margins(
    body: Body,
    plan: ContrastPlan,
    direction: str,
    senders: Sequence[Sender],
    receivers: Sequence[Receiver],
    spans: Spans,
    *,
    through: Sequence[Sequence[Receiver]] = (),
    at: Spans | None = None,
    reading: Reading = "frozen",
    mlps: Mlps = "frozen",
) -> Float[Tensor, " contrast"]:
    """Margins of the run in which only these paths carry the source run's values; arguments as in `path_effects`."""
    check_path(body, plan, senders, [*through, receivers])
    for name, value, known in (("reading", reading, ("frozen", "running")), ("mlps", mlps, ("frozen", "recomputed"))):
        if value not in known:
            raise UserError(f"{name} {value!r}: not one of {', '.join(known)}.")
    into = SIDES[direction].into
    where = span_mask(plan, into, at) if at is not None else None
    changes = sent(body, plan, direction, senders, spans)
    for hop in through:
        carried = passed_on(body, plan, into, changes, hop) if mlps == "recomputed" else changes
        changes = relayed(body, plan, into, carried, hop)
    if mlps == "recomputed":
        changes = passed_on(body, plan, into, changes, receivers)
    return run_margins(body, plan, into, receiving(body, plan, into, changes, receivers, reading, where))


def edge_effects(
    body: Body, plan: ContrastPlan, direction: str, edges: Sequence[tuple[Sender, Receiver]], spans: Spans
) -> Float[Tensor, "edge contrast"]:
    """Exact effect of each edge by itself, one forward pass an edge; arguments and errors as in `path_effects`.

    Edges of one sender share its Δ, so give them one after the other.
    """
    for sender, receiver in edges:
        check_path(body, plan, [sender], [[receiver]])
    sides = SIDES[direction]
    plain = run_margins(body, plan, sides.into)
    out = torch.zeros(len(edges), plan.n)
    last: Sender | None = None
    changes: list[Change] = []
    for k, (sender, receiver) in enumerate(edges):
        if sender != last:
            last, changes = sender, sent(body, plan, direction, [sender], spans)
        # Alone, a receiver reads the same stream running as frozen; running needs no cache of it.
        hooks = receiving(body, plan, sides.into, changes, [receiver], "running")
        out[k] = sides.sign * (run_margins(body, plan, sides.into, hooks) - plain)
    return out


def direct_paths(
    body: Body, plan: ContrastPlan, direction: str, sender: Sender, component: ReceiverComponent | str, spans: Spans
) -> Float[Tensor, "layer head contrast"]:
    """Effects from one sender to the `q`, `k` or `v` of every head by itself; NaN for heads that cannot read it.

    `head` runs over KV heads for `k` and `v`.
    """
    n_heads = body.n_heads if component == "q" else body.n_kv_heads
    places = [(layer, head) for layer in range(body.n_layers) for head in range(n_heads)]
    edges = [(sender, Receiver(component, *place)) for place in places if 2 * place[0] >= sender.stage]
    out = torch.full((body.n_layers, n_heads, plan.n), torch.nan)
    for (_, receiver), values in zip(edges, edge_effects(body, plan, direction, edges, spans), strict=True):
        out[receiver.layer, receiver.head] = values
    return out


def run_margins(
    body: Body, plan: ContrastPlan, side: int, hooks: Sequence[tuple[str, Hook]] = ()
) -> Float[Tensor, " contrast"]:
    """Margins of one side under hooks: the one place from which paths and routes run the network."""
    return plan.margins(body, side, hooks=hooks)


# ---------------------------------------------------------------------------------------------- what is sent


def sent(body: Body, plan: ContrastPlan, direction: str, senders: Sequence[Sender], spans: Spans) -> list[Change]:
    """The senders' changes of the residual stream at their tokens (step 1), one for each."""
    sides = SIDES[direction]
    names = list(dict.fromkeys(sender_site(s) for s in senders))
    source = body.cache(plan.ids(sides.source), names)
    into = body.cache(plan.ids(sides.into), names)
    mask = span_mask(plan, sides.into, spans).to(body.device)[..., None]
    out = []
    for sender in senders:
        name = sender_site(sender)
        delta = source[name] - into[name]
        if sender.component == "z":
            heads = range(body.n_heads) if sender.head is None else [sender.head]
            delta = through_o(body, sender.layer, delta, heads)
        out.append(Change(sender.stage, torch.where(mask, delta, torch.zeros_like(delta))))
    return out


def relayed(
    body: Body, plan: ContrastPlan, into: int, changes: Sequence[Change], receivers: Sequence[Receiver]
) -> list[Change]:
    """What receivers that got `changes` change in turn, each layer's by itself with all else frozen (step 4)."""
    out = []
    for layer, is_mlp in sorted({(r.layer, r.component == "mlp") for r in receivers}):
        here = [r for r in receivers if r.layer == layer and (r.component == "mlp") == is_mlp]
        name = site("mlp_out" if is_mlp else "z", layer)
        store: dict[str, Tensor] = {}
        hooks = receiving(body, plan, into, changes, here, "running")
        run_margins(body, plan, into, [*hooks, _keep(store, name)])
        delta = store[name] - body.cache(plan.ids(into), [name])[name]
        if not is_mlp:  # heads that read nothing changed have a difference of 0
            delta = through_o(body, layer, delta, range(body.n_heads))
        out.append(Change(2 * layer + 1 + is_mlp, delta))
    return out


def passed_on(
    body: Body, plan: ContrastPlan, into: int, changes: Sequence[Change], receivers: Sequence[Receiver]
) -> list[Change]:
    """The change that arrives at each receiver when the MLPs between are recomputed and attention is frozen.

    Of the changes returned, those of one stage stand for all that reaches it: each cancels what came before.
    """
    stages = sorted({r.stage(body.n_layers) for r in receivers})
    layers = range(body.n_layers)
    frozen = body.cache(plan.ids(into), [site("z", layer) for layer in layers])
    names = {2 * layer: site("resid_pre", layer) for layer in layers}
    names |= {2 * layer + 1: site("resid_mid", layer) for layer in layers}
    names[2 * body.n_layers] = site("resid_post", body.n_layers - 1)
    plain = body.cache(plan.ids(into), [names[stage] for stage in stages])
    hooks: list[tuple[str, Hook]] = [_put(name, z) for name, z in frozen.items()]
    hooks += [_add(names[c.stage], c.delta) for c in changes]
    store: dict[str, Tensor] = {}
    hooks += [_keep(store, names[stage]) for stage in stages]
    run_margins(body, plan, into, hooks)
    out: list[Change] = []
    for stage in stages:
        delta = store[names[stage]] - plain[names[stage]]
        out.append(Change(stage, delta - sum(c.delta for c in out)))
    return out


# ---------------------------------------------------------------------------------------------- what is received


def receiving(
    body: Body,
    plan: ContrastPlan,
    into: int,
    changes: Sequence[Change],
    receivers: Sequence[Receiver],
    reading: Reading,
    where: Bool[Tensor, "row pos"] | None = None,
) -> list[tuple[str, Hook]]:
    """Hooks that make the receivers, and only them, read the stream with `changes` added (steps 2 and 3)."""
    hooks: list[tuple[str, Hook]] = []
    for layer, stream in sorted({(r.layer, stream_of(body, r)) for r in receivers}):
        here = [r for r in receivers if r.layer == layer and stream_of(body, r) == stream]
        delta = sum(c.delta for c in changes if c.stage <= here[0].stage(body.n_layers))
        if not isinstance(delta, Tensor):
            continue
        if where is not None:
            delta = torch.where(where.to(delta.device)[..., None], delta, torch.zeros_like(delta))
        if here[0].component == "logits":
            hooks.append(_add(stream, delta))
            continue
        kept: dict[str, Tensor] = {}
        if reading == "running":
            hooks.append(_keep(kept, stream))
        else:
            kept.update(body.cache(plan.ids(into), [stream]))
        for component in dict.fromkeys(r.component for r in here):
            heads = [r.head for r in here if r.component == component]
            hooks.append(_receiver_hook(body, component, layer, heads, partial(kept.__getitem__, stream), delta))
    return hooks


def _receiver_hook(
    body: Body,
    component: str,
    layer: int,
    heads: Sequence[int | None],
    stream: Callable[[], Tensor],
    delta: Float[Tensor, "row pos d_model"],
) -> tuple[str, Hook]:
    """The hook that recomputes one component of one layer from `stream() + delta` where delta is not 0."""
    norm = module_of(body, "ln2" if component == "mlp" else "ln1", layer)
    changed = delta.ne(0).any(-1)

    def read_mlp(act: Tensor) -> Tensor:
        return torch.where(changed[..., None], norm(stream() + delta), act)

    if component == "mlp":
        return f"blocks.{layer}.mlp.hook_in", read_mlp
    project = module_of(body, component, layer)
    n_heads = body.n_heads if component == "q" else body.n_kv_heads
    named = torch.zeros(n_heads, dtype=torch.bool, device=delta.device)
    for head in heads:
        named[slice(None) if head is None else head] = True
    at = changed[:, :, None, None] & named[None, None, :, None]

    def read_attention(act: Tensor) -> Tensor:
        new = project(norm(stream() + delta))
        return torch.where(at, rearrange(new, "row pos (head d_head) -> row pos head d_head", head=n_heads), act)

    return site(component, layer), read_attention


def _keep(store: dict[str, Tensor], name: str) -> tuple[str, Hook]:
    def keep(act: Tensor) -> None:
        store[name] = act.detach().clone()

    return name, keep


def _put(name: str, value: Tensor) -> tuple[str, Hook]:
    return name, lambda act: value


def _add(name: str, delta: Tensor) -> tuple[str, Hook]:
    return name, lambda act: act + delta
