"""Rival methods that compare what two minds compute on the same prompts: cosine, CKA, logit lens, attention mass.

A Unit is judged by its *output*, what it writes into the residual stream:

    head or KV group   z W_O of its heads, in each mind's own weights: unlike z, not changed by a change of basis of V
    attention, MLP     attn_out, mlp_out
    layer              resid_post
    embed              resid_pre of layer 0

1. Prompts: both chains of every contrast.  Tokens: those of the steps, and the answer position (where the answer is
   read), which together count half each; else the answer position would drown among the steps' tokens.
2. `activation_cosine`: 1 − cosine between the two minds' outputs, averaged over tokens.
3. `activation_cka`: 1 − linear CKA (Kornblith et al. 2019, arXiv:1905.00414) over prompts at the answer position, and
   over all step tokens; the mean of both.  (Over all at once, the gulf between the two kinds of tokens would hide all.)
4. `logit_lens_kl`: KL(base ‖ tuned) between logit-lens distributions at the answer position, each through its own final
   norm and unembedding; a Unit is credited with the increase across the place where it writes (nostalgebraist 2020).
   All heads of a layer get their attention's.
5. `attention_mass`: how much of the attention from the answer position to the steps was lost, base − tuned; heads of a
   KV group, a block or a layer are summed.

Units finer than an output share its score: a head's QK and OV, the blocks of neurons of an MLP, token and position
embeddings.  Norms, output biases, the final norm and the unembedding have no output of these (NaN).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from reasoninterp.attention.grid import SpanGrid, span_grid
from reasoninterp.attention.maps import attention_maps, output_weights
from reasoninterp.models.body import Body, Hook, site
from reasoninterp.models.context import Context
from reasoninterp.models.units import Unit
from reasoninterp.traces.contrast import Contrast
from reasoninterp.traces.trace import Span


class Output(NamedTuple):
    """A place where Units write: `embed`, or in a layer `attn`, `head` (a KV group under GQA), `mlp`, `layer`."""

    kind: Literal["embed", "attn", "head", "mlp", "layer"]
    layer: int = 0
    head: int = 0


class Found(NamedTuple):
    """Scores by output, and the pair's severity; passes are over both chains of every contrast, in one mind.

    Of `forward_passes`, `passes_each` were spent on each output, and the rest once.  `n` counts contrasts read.
    """

    scores: dict[Output, float]
    severity: float
    forward_passes: int
    backward_passes: int
    n: int
    passes_each: int = 0


Distance = Callable[["Prompts", Float[Tensor, "point d_model"], Float[Tensor, "point d_model"]], float]


def output_of(unit: Unit) -> Output | None:
    """Where a Unit writes; None for norms, biases, the final norm and the unembedding."""
    if unit.kind == "embedding":
        return Output("embed")
    if unit.layer is None or unit.name.endswith((".b_O", ".b_out")) or unit.kind == "norms":
        return None
    if unit.kind == "head":
        return Output("head", unit.layer, int(unit.head or 0))
    return Output("layer" if unit.kind == "layer" else "mlp" if unit.kind == "mlp" else "attn", unit.layer)


@dataclass(frozen=True)
class Prompts:
    """Prompts padded on the right, and their tokens that are compared.

    Attributes:
        ids: both chains of some contrasts, up to the answer.
        row, position: of each compared token.
        last: whether it is an answer position.
        weight: of each compared token; sums to 1 over a prompt.
        grid: the answer position as destination, the steps as sources.
    """

    ids: Int[Tensor, "row pos"]
    row: Int[Tensor, " point"]
    position: Int[Tensor, " point"]
    last: Bool[Tensor, " point"]
    weight: Float[Tensor, " point"]
    grid: SpanGrid

    def at(self, x: Float[Tensor, "row pos ..."]) -> Float[Tensor, "point ..."]:
        """An activation at the compared tokens."""
        return x[self.row.to(x.device), self.position.to(x.device)]


def prompts_of(context: Context, contrasts: Sequence[Contrast]) -> Prompts:
    """The prompts of some contrasts, clean and corrupt chain of each."""
    rows: list[tuple[int, ...]] = []
    points: list[tuple[int, int, bool, float]] = []
    steps: list[list[Span]] = []
    for trace in [t for c in contrasts for t in (c.clean, c.corrupt)]:
        tokens = context.encode(trace)
        end = len(tokens.prompt_ids) - 1
        inside = [k for span in tokens.steps for k in range(span.start, span.stop) if k < end]
        share = 0.5 if inside else 1.0
        points += [(len(rows), k, False, 0.5 / len(inside)) for k in inside] + [(len(rows), end, True, share)]
        steps.append(tokens.steps)
        rows.append(tokens.prompt_ids)
    longest = max(len(r) for r in rows)
    row, position, last, weight = zip(*points, strict=True)
    return Prompts(
        torch.tensor([[*r, *[0] * (longest - len(r))] for r in rows]),
        torch.tensor(row),
        torch.tensor(position),
        torch.tensor(last),
        torch.tensor(weight),
        span_grid(steps, [[Span(len(r) - 1, len(r))] for r in rows], [len(r) for r in rows]),
    )


def batches(context: Context, contrasts: Sequence[Contrast]) -> Iterator[Sequence[Contrast]]:
    """Contrasts in batches whose two chains make at most `context.rows` rows."""
    size = max(1, context.rows // 2)
    for at in range(0, len(contrasts), size):
        yield contrasts[at : at + size]


def record(body: Body, prompts: Prompts, outputs: Iterable[Output]) -> dict[Output, Float[Tensor, "point d_model"]]:
    """The outputs at the compared tokens of the mind that is in, from one forward pass; float32, on the CPU."""
    wanted = list(dict.fromkeys(outputs))
    store: dict[str, Tensor] = {}

    def keep(name: str) -> Hook:
        def hook(act: Tensor) -> None:
            store[name] = prompts.at(act.detach()).float()

        return hook

    hooks = [(name, keep(name)) for name in dict.fromkeys(site_of(o) for o in wanted)]
    body.forward(prompts.ids, hooks=hooks, positions=torch.zeros(len(prompts.ids), 1, dtype=torch.long))
    found = {}
    for output in wanted:
        act = store[site_of(output)]
        found[output] = (head_output(body, act, output) if output.kind == "head" else act).cpu()
    return found


def site_of(output: Output) -> str:
    """Where an output is read: `z` for heads, `resid_post` for layers."""
    if output.kind == "embed":
        return site("resid_pre", 0)
    names = {"attn": "attn_out", "head": "z", "mlp": "mlp_out", "layer": "resid_post"}
    return site(names[output.kind], output.layer)


def head_output(body: Body, z: Float[Tensor, "*place head d_head"], output: Output) -> Float[Tensor, "*place d_model"]:
    """`z W_O` of a head, or summed over the heads of a KV group, of the mind that is in."""
    group = body.n_heads // body.n_kv_heads
    mine = slice(output.head * group, (output.head + 1) * group)
    w_o = output_weights(body, output.layer)[mine].float()
    return einsum(z[..., mine, :].float(), w_o, "... head d_head, head d_head d_model -> ... d_model")


def cosine_distance(prompts: Prompts, a: Float[Tensor, "point d"], b: Float[Tensor, "point d"]) -> float:
    """Weighted mean of 1 − cosine; 0 where both outputs are zero, 1 where only one is.  Exactly 0 for equal ones."""
    a, b = a.double(), b.double()
    lengths = a.norm(dim=1, keepdim=True), b.norm(dim=1, keepdim=True)
    # ½‖â − b̂‖² is 1 − cosine without the rounding that would make a difference between equal vectors.
    half = (a / lengths[0].clamp_min(1e-300) - b / lengths[1].clamp_min(1e-300)).square().sum(1) / 2
    one_zero = ((lengths[0] == 0) ^ (lengths[1] == 0))[:, 0]
    distance = torch.where(one_zero, torch.ones_like(half), half)
    return float((prompts.weight.double() * distance).sum() / prompts.weight.double().sum())


def cka_distance(prompts: Prompts, a: Float[Tensor, "point d"], b: Float[Tensor, "point d"]) -> float:
    """1 − linear CKA at the answer positions and at the step tokens, the mean of both (of the one there is)."""
    groups = [which for which in (prompts.last, ~prompts.last) if int(which.sum()) > 1]
    found = [_one_minus_cka(a[which].double(), b[which].double()) for which in groups]
    return sum(found) / len(found) if found else float("nan")


def _one_minus_cka(a: Float[Tensor, "point d"], b: Float[Tensor, "point d"]) -> float:
    """1 − ‖AᵀB‖² / (‖AᵀA‖ ‖BᵀB‖), centred; 0 where neither varies, 1 where only one does."""
    if torch.equal(a, b):
        return 0.0
    a, b = a - a.mean(0), b - b.mean(0)
    own = float((a.T @ a).norm() * (b.T @ b).norm())
    if own == 0:
        return float(bool(a.any()) != bool(b.any()))
    return max(0.0, 1.0 - float((a.T @ b).square().sum()) / own)


def _activation_distance(
    context: Context,
    contrasts: Sequence[Contrast],
    outputs: Sequence[Output],
    distance: Distance,
    *,
    from_mind: str,
    to_mind: str,
) -> Found:
    """A distance between two minds' outputs; severity: that of the last residual stream at the answer position."""
    with context.open(from_mind) as body:
        final = Output("layer", body.n_layers - 1)
    wanted = [*outputs, final]
    chunks = [prompts_of(context, chunk) for chunk in batches(context, contrasts)]
    seen: list[dict[Output, Tensor]] = []
    for mind in (from_mind, to_mind):
        with context.open(mind) as body:
            parts = [record(body, prompts, wanted) for prompts in chunks]
        seen.append({o: torch.cat([p[o] for p in parts]) for o in dict.fromkeys(wanted)})
    points = _joined(chunks)
    scores = {o: distance(points, seen[0][o], seen[1][o]) for o in outputs}
    end = _only_last(points)
    severity = distance(end, seen[0][final][points.last], seen[1][final][points.last])
    return Found(scores, severity, 2, 0, len(contrasts))


def _joined(chunks: Sequence[Prompts]) -> Prompts:
    """What distances need of several batches' points: their kind and weight (ids and places are the first batch's)."""
    first = chunks[0]
    last, weight = torch.cat([c.last for c in chunks]), torch.cat([c.weight for c in chunks])
    return Prompts(first.ids, torch.zeros_like(last).long(), torch.zeros_like(last).long(), last, weight, first.grid)


def _only_last(points: Prompts) -> Prompts:
    last = points.last
    return Prompts(points.ids, points.row[last], points.position[last], last[last], points.weight[last], points.grid)


def activation_cosine(
    context: Context, contrasts: Sequence[Contrast], outputs: Sequence[Output], *, from_mind: str, to_mind: str
) -> Found:
    """1 − cosine of each output; see the module."""
    return _activation_distance(context, contrasts, outputs, cosine_distance, from_mind=from_mind, to_mind=to_mind)


def activation_cka(
    context: Context, contrasts: Sequence[Contrast], outputs: Sequence[Output], *, from_mind: str, to_mind: str
) -> Found:
    """1 − linear CKA of each output; see the module."""
    return _activation_distance(context, contrasts, outputs, cka_distance, from_mind=from_mind, to_mind=to_mind)


def logit_lens_kl(
    context: Context, contrasts: Sequence[Contrast], outputs: Sequence[Output], *, from_mind: str, to_mind: str
) -> Found:
    """Increase, in nats, of the divergence between lenses across each output; severity: the final divergence."""
    chunks = [prompts_of(context, chunk) for chunk in batches(context, contrasts)]
    lenses: list[list[list[Tensor]]] = []
    for mind in (from_mind, to_mind):
        with context.open(mind) as body:
            n_layers = body.n_layers
            lenses.append([_lenses(body, prompts) for prompts in chunks])
    kl = [
        torch.cat([(a[k].exp() * (a[k] - b[k])).sum(-1) for a, b in zip(*lenses, strict=True)]).mean().item()
        for k in range(2 * n_layers + 1)
    ]

    def increase(o: Output) -> float:
        if o.kind == "embed":
            return kl[0]
        pre, mid, post = kl[2 * o.layer : 2 * o.layer + 3]
        return post - pre if o.kind == "layer" else post - mid if o.kind == "mlp" else mid - pre

    return Found({o: increase(o) for o in outputs}, kl[-1], 2, 0, len(contrasts))


def _lenses(body: Body, prompts: Prompts) -> list[Float[Tensor, "row vocab"]]:
    """Log-probabilities at the answer position through the lens: before layer 0, then twice for each layer."""
    names = [site(c, layer) for layer in range(body.n_layers) for c in ("resid_pre", "resid_mid")]
    names.append(site("resid_post", body.n_layers - 1))
    store: dict[str, Tensor] = {}
    end = _only_last(prompts)

    def keep(name: str) -> Hook:
        def hook(act: Tensor) -> None:
            store[name] = end.at(act.detach())

        return hook

    hooks = [(name, keep(name)) for name in names]
    body.forward(prompts.ids, hooks=hooks, positions=torch.zeros(len(prompts.ids), 1, dtype=torch.long))
    return [body.logits(store[name]).double().log_softmax(-1).cpu() for name in names]


def attention_mass(
    context: Context, contrasts: Sequence[Contrast], outputs: Sequence[Output], *, from_mind: str, to_mind: str
) -> Found:
    """Attention from the answer position to the steps that was lost; severity: the share lost in all."""
    chunks = [prompts_of(context, chunk) for chunk in batches(context, contrasts)]
    mass = []
    for mind in (from_mind, to_mind):
        with context.open(mind) as body:
            n_kv = body.n_kv_heads
            maps = [attention_maps(body, p.ids, p.grid, kinds=["plain"]).kept["plain"] for p in chunks]
        # NaN: a prompt without such a step
        per_row = torch.cat([rearrange(m.double().nansum(-1), "layer row head 1 -> row layer head") for m in maps])
        mass.append(rearrange(per_row.mean(0), "layer (kv group) -> layer kv group", kv=n_kv).sum(-1))
    lost = mass[0] - mass[1]

    def of(o: Output) -> float:
        if o.kind in ("embed", "mlp"):
            return float("nan")
        return float(lost[o.layer, o.head] if o.kind == "head" else lost[o.layer].sum())

    before = float(mass[0].sum())
    severity = float(lost.sum()) / before if before > 0 else float("nan")
    return Found({o: of(o) for o in outputs}, severity, 2, 0, len(contrasts))
