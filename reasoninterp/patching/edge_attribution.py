"""Edge attribution: for every contrast and token, how much each writer matters to each reader.

The residual stream is a sum of *writers*: the embedding, each head's output z_h W_O^h, each MLP.  *Readers* take it in
through a norm: each head's query, each key/value head's key and value, each MLP, and the logits.  An edge's score at a
token is ⟨Δwriter, ∂m/∂(the reader's own input)⟩, with Δ = source − into and the gradient taken at the residual stream
before the reader's norm: the first-order effect of giving this reader alone the other run's writer (edge attribution
patching: Syed, Rager & Conmy 2023, arXiv:2310.10348; with `steps`, gradients averaged along the line between the two
runs' embeddings: Hanna, Pezzelle & Belinkov 2024, arXiv:2403.17806).

No activation is split by head on the way:

1. The source run leaves z, the MLPs' outputs and the embedding; the patched run turns them into differences.  One
   backward pass brings the gradients at q, k, v (before any rotation or norm of their own), at the second norm's
   output and at the last residual.
2. For some hundred tokens at a time (`_tokens_at_once`), over the layers upwards: the gradient at head h's query is
   taken back through W_Q^h with the norm's gain folded in (one batched product for all heads of q, k and v), and all
   writers below are contracted with all readers of the layer in one batched product.  Then the layer's writers join.
3. The norm's Jacobian is the identity less projections, over the scale s: with x̂ the normalised input,
   ⟨u, Jᵀa⟩ = (⟨u, a⟩ − ⟨u, x̂⟩⟨x̂, a⟩ / d_model) / s, where LayerNorm also centres a.  So it never touches more than
   numbers: x̂ joins the product of step 2 as one more reader.
4. Tokens before a contrast's first difference, where every Δ is 0, and behind the last position that is read, where
   every gradient is, are left out.

Signs are those of `patching.residual`, in nats.  Laws: over the readers of a writer, scores sum to the writer's own
attribution; over the writers of a reader, to that of its input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from reasoninterp.models.body import Body, Hook, site
from reasoninterp.models.leaves import Leaf
from reasoninterp.patching.agreement import Spans
from reasoninterp.patching.attribution import check_plan, nodes
from reasoninterp.patching.edge_graph import EdgeScores, edge_mask, graph
from reasoninterp.patching.metric import SIDES, ContrastPlan
from reasoninterp.patching.stream import Receiver, Sender, check_path

_FLOATS_AT_ONCE = {"cpu": 2**23, "cuda": 2**27}


def edge_attribution(
    body: Body, plan: ContrastPlan, direction: str, *, spans: Spans | None = None, steps: int = 0
) -> EdgeScores:
    """Scores of every edge at every token, or summed over spans, for each contrast of the plan.

    Args:
        body: the mind that is read.
        plan: the contrasts; each must have two prompts of one length.
        direction: `denoising` or `noising`.
        spans: by contrast, one span a place or None; the scores are then summed over each.
        steps: nodes of the integrated gradient; 0 for the gradient at the patched run.

    Raises:
        UserError: prompts of different length, a bad direction or number of steps, or a model whose blocks do not add
            attention and MLP to the stream one after the other.
    """
    check_plan(plan, direction, steps)
    check_path(body, plan, [Sender("embed")], [[Receiver("logits")]])
    parts = _Parts(body)
    writers, readers = graph(body)
    n_places = plan.ids(0).shape[1] if spans is None else len(spans[0])
    out = torch.zeros(plan.n * n_places, len(writers) * len(readers))
    tokens = _active(plan, SIDES[direction].into)
    targets = _targets(tokens, n_places, spans)
    for weight, run in _runs(body, plan, direction, parts, steps):
        _contract(body, parts, run, tokens, targets, weight * SIDES[direction].sign, out)
    scores = out.view(plan.n, n_places, len(writers), len(readers))
    present = _present(plan, n_places, spans)
    return EdgeScores(direction, steps, scores, present, writers, readers, edge_mask(writers, readers, body.n_layers))


class _Run(NamedTuple):
    """What one node leaves, by layer: differences of the writers, norms' inputs, gradients; [row, pos, ...]."""

    embed: Tensor
    z: dict[int, Tensor]
    mlp: dict[int, Tensor]
    before: dict[str, Tensor]
    gradients: dict[str, Tensor]


class _Parts:
    """A body's leaves by name, and its weights as the contraction wants them."""

    def __init__(self, body: Body) -> None:
        self.leaves = {leaf.name: leaf for leaf in body.leaves()}
        self.read: list[Tensor] = []
        self.write: list[Tensor] = []
        for layer in range(body.n_layers):
            heads = [rearrange(_matrix(self[layer, c]), "(h e) d -> h e d", e=body.d_head) for c in ("q", "k", "v")]
            self.read.append(self.folded(self[layer, "ln1"], torch.cat(heads)))
            self.write.append(rearrange(_matrix(self[layer, "o"]), "d (h e) -> h e d", e=body.d_head).float())

    def __getitem__(self, key: tuple[int, str]) -> Leaf:
        return self.leaves[f"L{key[0]}.{key[1]}"]

    @staticmethod
    def folded(norm: Leaf, a: Tensor) -> Tensor:
        """Vectors read behind a norm, as vectors read before its gain and its centring."""
        gain: Tensor = getattr(norm._module, "weight")  # noqa: B009  (torch types it as Tensor | Module)
        a = a.float() * gain.float()
        return a - a.mean(-1, keepdim=True) if norm.centred else a


def _matrix(leaf: Leaf) -> Float[Tensor, "out in"]:
    weight: Tensor = getattr(leaf._module, "weight")  # noqa: B009
    return weight.T if leaf.kind == "conv1d" else weight


def _runs(body: Body, plan: ContrastPlan, direction: str, parts: _Parts, steps: int) -> Iterator[tuple[float, _Run]]:
    """Yield each node's weight and what its forward and backward pass left (step 1)."""
    sides = SIDES[direction]
    delta: dict[str, Tensor] = {}
    writers = {"embed": site("resid_pre", 0)}

    def subtract(name: str, now: Tensor) -> None:
        delta[name].sub_(now.detach())

    _forward(body, plan, sides.source, parts, lambda name, now: delta.__setitem__(name, now.detach()))
    if steps:
        _forward(body, plan, sides.into, parts, subtract)
    for alpha, weight in nodes(steps):
        before: dict[str, Tensor] = {}
        gradients: dict[str, Tensor] = {}
        hooks: list[tuple[str, Hook]] = []
        if steps:
            hooks.append((writers["embed"], lambda act, a=alpha: act + a * delta["embed"]))  # type: ignore[misc]
        with ExitStack() as stack:
            for leaf in parts.leaves.values():
                stack.enter_context(leaf.watch(_watcher(leaf, before, gradients)))
            margins = _forward(body, plan, sides.into, parts, None if steps else subtract, hooks, grad=True)
        margins.sum().backward()
        del margins
        layers = range(body.n_layers)
        yield (
            weight,
            _Run(
                delta["embed"],
                {k: delta[f"L{k}.o"] for k in layers},
                {k: delta[f"L{k}.mlp.out"] for k in layers},
                before,
                gradients,
            ),
        )


def _forward(
    body: Body,
    plan: ContrastPlan,
    side: int,
    parts: _Parts,
    see: Callable[[str, Tensor], None] | None,
    hooks: Sequence[tuple[str, Hook]] = (),
    grad: bool = False,
) -> Float[Tensor, " contrast"]:
    """One forward pass; `see` is called with every writer's name and value."""
    with ExitStack() as stack:
        if see is not None:
            for leaf in parts.leaves.values():
                if leaf.name == "L0.ln1":
                    stack.enter_context(leaf.watch(lambda x, _: see("embed", x)))
                elif leaf.role == "o":
                    stack.enter_context(leaf.watch(lambda x, _, name=leaf.name: see(name, x)))  # type: ignore[misc]
                elif leaf.role == "mlp.out":
                    stack.enter_context(leaf.watch(lambda _, y, name=leaf.name: see(name, y)))  # type: ignore[misc]
        return plan.margins(body, side, hooks=hooks, grad=grad)


def _watcher(leaf: Leaf, before: dict[str, Tensor], gradients: dict[str, Tensor]) -> Callable[[Tensor, Tensor], None]:
    """Keep what the contraction needs of one leaf: a norm's input, or the gradient where a reader begins."""

    def keep(gradient: Tensor) -> None:
        gradients[leaf.name] = gradient

    def f(x: Tensor, y: Tensor) -> None:
        if leaf.role in ("ln1", "ln2"):
            before[leaf.name] = x.detach()
        if leaf.role == "ln_final":
            x.register_hook(keep)
        elif leaf.role in ("q", "k", "v", "ln2"):
            y.register_hook(keep)

    return f


class _Tokens(NamedTuple):
    """The tokens that can have an edge: flat index into [row, pos], contrast and position of each."""

    flat: Int[Tensor, " token"]
    contrast: Int[Tensor, " token"]
    position: Int[Tensor, " token"]


def _active(plan: ContrastPlan, side: int) -> _Tokens:
    """Step 4: from each contrast's first difference to the last position that its row is read at."""
    n_tokens = plan.ids(side).shape[1]
    last = plan.sides[side].positions.amax(1).tolist()
    first, owners = plan.first_difference(), plan.owners(side)
    found = [(r * n_tokens + p, c, p) for r, c in enumerate(owners) for p in range(first[c], last[r] + 1)]
    return _Tokens(*torch.tensor(found, dtype=torch.long).reshape(-1, 3).unbind(1))


def _present(plan: ContrastPlan, n_places: int, spans: Spans | None) -> Bool[Tensor, "contrast place"]:
    """Whether each contrast has each place: a token of its prompt, or the span."""
    if spans is not None:
        return torch.tensor([[span is not None for span in row] for row in spans])
    return torch.arange(n_places) < torch.tensor([len(p) for p in plan.prompts[0]])[:, None]


def _targets(tokens: _Tokens, n_places: int, spans: Spans | None) -> Int[Tensor, "pair 2"]:
    """Pairs (token, contrast × place): where each token's scores are added; a token may lie in several spans."""
    if spans is None:
        every = torch.arange(len(tokens.flat))
        return torch.stack([every, tokens.contrast * n_places + tokens.position], dim=1)
    pairs = [
        (k, c * n_places + place)
        for k, (c, p) in enumerate(zip(tokens.contrast.tolist(), tokens.position.tolist(), strict=True))
        for place, span in enumerate(spans[c])
        if span is not None and span.start <= p < span.stop
    ]
    return torch.tensor(pairs, dtype=torch.long).reshape(-1, 2)


def _contract(
    body: Body,
    parts: _Parts,
    run: _Run,
    tokens: _Tokens,
    targets: Int[Tensor, "pair 2"],
    weight: float,
    out: Float[Tensor, "place edge"],
) -> None:
    """Steps 2 and 3: add `weight` times every edge's score at every token to its places."""
    n_writers, per_layer = 1 + body.n_layers * (body.n_heads + 1), body.n_heads + 2 * body.n_kv_heads + 1
    n_readers = body.n_layers * per_layer + 1
    used = targets[:, 0].unique()  # with spans, a token may belong to none
    size = _tokens_at_once(n_writers * body.d_model, body.device.type)
    for at in used.split(size):
        take = _Taker(tokens.flat[at].to(body.device))
        n = len(at)
        scores = torch.zeros(n, n_writers, n_readers, device=body.device)
        wrote = torch.empty(n, n_writers, body.d_model, device=body.device)
        wrote[:, 0] = take(run.embed)
        upto = 1
        for layer in range(body.n_layers):
            r = layer * per_layer
            gradient = torch.cat([take.heads(run.gradients[f"L{layer}.{c}"], body.d_head) for c in "qkv"], dim=1)
            norm = parts[layer, "ln1"]
            a = torch.bmm(gradient.transpose(0, 1), parts.read[layer])
            _read(norm, take(run.before[norm.name]), a, wrote[:, :upto], scores[:, :upto, r : r + per_layer - 1])
            z = take.heads(run.z[layer], body.d_head)
            wrote[:, upto : upto + body.n_heads] = torch.bmm(z.transpose(0, 1), parts.write[layer]).transpose(0, 1)
            upto += body.n_heads
            norm = parts[layer, "ln2"]
            a = parts.folded(norm, take(run.gradients[norm.name]))[None]
            r += per_layer - 1
            _read(norm, take(run.before[norm.name]), a, wrote[:, :upto], scores[:, :upto, r : r + 1])
            wrote[:, upto] = take(run.mlp[layer])
            upto += 1
        scores[:, :, -1] = torch.bmm(wrote, take(run.gradients["ln_final"])[:, :, None])[..., 0]
        chosen = torch.isin(targets[:, 0], at)
        rows = torch.searchsorted(at, targets[chosen, 0])
        out.index_add_(0, targets[chosen, 1], scores.flatten(1).cpu()[rows], alpha=weight)


class _Taker:
    """Takes some tokens out of [row, pos, feature] as float32 [token, feature]."""

    def __init__(self, flat: Int[Tensor, " token"]) -> None:
        self.flat = flat

    def __call__(self, x: Tensor) -> Float[Tensor, "token feature"]:
        return x.flatten(0, 1)[self.flat].float()

    def heads(self, x: Tensor, d_head: int) -> Float[Tensor, "token head d_head"]:
        """The same, split by head."""
        return rearrange(self(x), "t (h e) -> t h e", e=d_head)


def _read(
    norm: Leaf,
    before: Float[Tensor, "token d_model"],
    a: Float[Tensor, "reader token d_model"],
    wrote: Float[Tensor, "token writer d_model"],
    out: Float[Tensor, "token writer reader"],
) -> None:
    """Step 3 for all readers behind one norm; `a` are their gradients behind its scale, gain folded in."""
    x = norm.normalised(before)
    centred = before - before.mean(-1, keepdim=True) if norm.centred else before
    scale = (centred.pow(2).mean(-1) + norm.eps).sqrt()
    product = torch.bmm(wrote, torch.cat([a, x[None]]).permute(1, 2, 0))
    along = torch.einsum("rtd,td->tr", a, x) / x.shape[-1]
    out.copy_(torch.baddbmm(product[..., :-1], product[..., -1:], along[:, None], alpha=-1) / scale[:, None, None])


def _tokens_at_once(floats_a_token: int, device: str) -> int:
    """Tokens contracted together: their writers' outputs stay within some megabytes, near the processor's caches."""
    return max(8, min(256, _FLOATS_AT_ONCE.get(device, 2**23) // floats_a_token))
