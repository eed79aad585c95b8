"""Rival methods that look at what outputs do to the answer: cross-model and attribution patching.

Outputs are those of `activations`, but for a layer: its resid_post holds all that came before, so that here
a layer's output is what it writes, attn_out and mlp_out.

1. `cross_patch` (CMAP: Prakash et al. 2024, arXiv:2402.14811): the output of one mind is put in the place of the
   other's, at every token of the same prompt, and E is read: `restore = E(tuned ← output of base) − E(tuned)` and
   `cut = E(base) − E(base ← output of tuned)`, in nats; the score is their mean.  Divided by the loss these are shares,
   in the same order; the loss itself may be near 0.  A head's z W_O is exchanged inside attn_out, each in its own
   mind's weights.  Unlike a graft of weights, a Unit's output carries what was changed upstream of it: the whole of a
   severed path downstream of the cut is restored too.
2. `attribution_difference`: `|A(base) − A(tuned)|`, where A is the attribution-patching estimate of an output's share
   in the effect of the chain (`patching.attribution`; Nanda 2023), summed over tokens, denoising and noising averaged,
   mean over contrasts.  Contrasts whose two prompts differ in length have none and are left out (`n` counts the rest).

Severity: for the first, the share of E(base) that is lost, `1 − E(tuned)/E(base)`; for the second, the sum of the
differences over attentions and MLPs relative to the sum of |A(base)|.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from reasoninterp.models.body import Body, Hook, site
from reasoninterp.models.context import Context
from reasoninterp.models.read import margins_from_logits
from reasoninterp.patching.attribution import attribute
from reasoninterp.patching.metric import DIRECTIONS, ContrastPlan, contrast_plan
from reasoninterp.severance.scoring.activations import Found, Output, batches, head_output, site_of
from reasoninterp.traces.contrast import Contrast


def cross_patch(
    context: Context, contrasts: Sequence[Contrast], outputs: Sequence[Output], *, from_mind: str, to_mind: str
) -> Found:
    """What each output of one mind does in the other, both ways; see the module."""
    total = dict.fromkeys(outputs, 0.0)
    plain = {from_mind: 0.0, to_mind: 0.0}
    for chunk in batches(context, contrasts):
        plan = contrast_plan(context, chunk)
        runs = {}
        for mind in (from_mind, to_mind):
            with context.open(mind) as body:
                runs[mind] = _Run(body, plan, outputs)
            plain[mind] += float(runs[mind].effects.sum())
        for into, source, sign in ((to_mind, from_mind, 0.5), (from_mind, to_mind, -0.5)):
            with context.open(into) as body:
                for output in outputs:
                    found = _effects(body, plan, runs[source].hooks_into(runs[into], output))
                    total[output] += sign * float((found - runs[into].effects).sum())
    n = len(contrasts)
    e_from, e_to = plain[from_mind], plain[to_mind]
    severity = 1.0 - e_to / e_from if e_from != 0 else float("nan")
    return Found({o: v / n for o, v in total.items()}, severity, 2 + 2 * len(outputs), 0, n, passes_each=2)


class _Run:
    """Outputs and effects of one mind on the rows of a plan, from one forward pass."""

    def __init__(self, body: Body, plan: ContrastPlan, outputs: Sequence[Output]) -> None:
        self.store: dict[str, Tensor] = {}
        names = [name for output in outputs for name in _sites(output)]
        self.effects = _effects(body, plan, [(name, self._keep(name)) for name in dict.fromkeys(names)])
        # The heads' outputs are formed while their mind's weights are in.
        self.heads = {o: head_output(body, self.store[site_of(o)], o) for o in outputs if o.kind == "head"}

    def _keep(self, name: str) -> Hook:
        def hook(act: Tensor) -> None:
            self.store[name] = act.detach().clone()

        return hook

    def hooks_into(self, into: _Run, output: Output) -> list[tuple[str, Hook]]:
        """Hooks that put this mind's output in the place of the other's."""
        if output.kind == "head":
            change = self.heads[output] - into.heads[output]
            return [(site("attn_out", output.layer), lambda act: act + change.to(act))]
        return [(name, _put(self.store[name])) for name in _sites(output)]


def _put(value: Tensor) -> Hook:
    return lambda _act: value


def _sites(output: Output) -> list[str]:
    """The sites that make up an output; a layer's are its two writes."""
    if output.kind == "layer":
        return [site("attn_out", output.layer), site("mlp_out", output.layer)]
    return [site_of(output)]


def _effects(body: Body, plan: ContrastPlan, hooks: Sequence[tuple[str, Hook]]) -> Float[Tensor, " contrast"]:
    """E of every contrast in one forward pass over both sides, with hooks that see the rows of `plan.both`."""
    logits = body.forward(plan.both.ids, positions=plan.both.positions, hooks=hooks)
    margin = margins_from_logits(plan.both, logits).margin.double().cpu()
    return margin[plan.n :] - margin[: plan.n]


def attribution_difference(
    context: Context, contrasts: Sequence[Contrast], outputs: Sequence[Output], *, from_mind: str, to_mind: str
) -> Found:
    """How far the two minds' attributions of the effect differ; see the module."""
    aligned = [c for c in contrasts if _equally_long(context, c)]
    with context.open(from_mind) as body:
        blocks = [Output(kind, layer) for layer in range(body.n_layers) for kind in ("attn", "mlp")]
    if not aligned:
        return Found(dict.fromkeys(outputs, float("nan")), float("nan"), 0, 0, 0)
    wanted = list(dict.fromkeys([*outputs, *blocks]))
    found = []
    for mind in (from_mind, to_mind):
        sums = dict.fromkeys(wanted, 0.0)
        with context.open(mind) as body:
            for chunk in batches(context, aligned):
                plan = contrast_plan(context, chunk)
                for direction in DIRECTIONS:
                    for output, value in _attributions(body, plan, direction, wanted).items():
                        sums[output] += value / len(DIRECTIONS) / len(aligned)
        found.append(sums)
    scores = {o: abs(found[0][o] - found[1][o]) for o in wanted}
    scale = sum(abs(found[0][o]) for o in blocks)
    severity = sum(scores[o] for o in blocks) / scale if scale > 0 else float("nan")
    # A direction is a pass over one chain to keep its activations, and one forward and backward over the other.
    return Found({o: scores[o] for o in outputs}, severity, 4, 2, len(aligned))


def _equally_long(context: Context, contrast: Contrast) -> bool:
    clean, corrupt = (len(context.encode(t).prompt_ids) for t in (contrast.clean, contrast.corrupt))
    return clean == corrupt


def _attributions(body: Body, plan: ContrastPlan, direction: str, outputs: Sequence[Output]) -> dict[Output, float]:
    """Each output's attributed effect, summed over tokens and contrasts.

    An attribution is linear in the output, so that ⟨Δz, ∂m/∂z⟩ is that of z W_O, and a layer's is that of its writes.
    """
    kinds = {o.kind for o in outputs}
    components = ["attn_out", "mlp_out", *(["z"] if "head" in kinds else [])]
    values = {c: v.sum((0, 3)) for c, v in attribute(body, plan, direction, components).values.items()}
    group = body.n_heads // body.n_kv_heads
    first = attribute(body, plan, direction, ["resid_pre"], layers=[0]) if "embed" in kinds else None

    def of(o: Output) -> float:
        if o.kind == "embed" and first is not None:
            return float(first.values["resid_pre"].sum())
        if o.kind == "head":
            return float(values["z"][o.layer, o.head * group : (o.head + 1) * group].sum())
        writes = {"attn": ("attn_out",), "mlp": ("mlp_out",), "layer": ("attn_out", "mlp_out")}[o.kind]
        return sum(float(values[c][o.layer].sum()) for c in writes)

    return {o: of(o) for o in outputs}
