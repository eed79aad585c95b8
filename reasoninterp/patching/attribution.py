"""Gradient attribution: the whole map of patching effects from one backward pass.

Patching an activation from the run `into` to the run `source` changes the margin m by about ⟨source − into, ∂m/∂act⟩
(attribution patching: Nanda 2023; Syed, Rager & Conmy 2023, arXiv:2310.10348).

1. A forward pass over the source run keeps the activations of the asked sites.
2. A forward pass with graph over the run that is patched turns each of them, in place, into the difference
   `source − into` as its site is reached.
3. One backward pass of the summed margins; at every site the gradient is multiplied by the difference and summed over
   features as it comes, and the difference is let go.  Rows do not meet, so each contrast gets its own values; the two
   rows of an answer of several tokens are added.
4. Integrated gradients (`steps` > 0; inputs as in Hanna, Pezzelle & Belinkov 2024, arXiv:2403.17806): the gradient
   is averaged over runs whose embeddings lie on the straight line between the two runs' embeddings, at Gauss–Legendre
   nodes.  On the line's own input, `resid_pre` of layer 0, values then sum over tokens to the whole effect (up to the
   quadrature), and both directions coincide everywhere, the line being the same.

Values have the signs of `patching.residual` (`SIDES`): denoising `m(corrupt) − m(patched)`, noising `m(patched) −
m(clean)`, in nats.  A linear approximation: read it with its agreement (`patching.agreement`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from reasoninterp.errors import UserError
from reasoninterp.models.body import Body, Hook, site
from reasoninterp.patching.agreement import HEADED, Spans
from reasoninterp.patching.metric import SIDES, ContrastPlan

COMPONENTS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z", "q", "k", "v", "pattern")


@dataclass(frozen=True)
class Attributed:
    """Attributed values of a plan's contrasts in one direction.

    Attributes:
        direction: `denoising` or `noising`.
        layers: the layers, in the order of the values' second axis.
        steps: nodes of the integrated gradient; 0 for the gradient at the patched run alone.
        values: by component, nats.  `head` has one entry where there are no heads, the key/value heads for `k` and
            `v`; `token` is the position in the prompt, for `pattern` the query's.  Positions behind a contrast's
            prompt hold what its answer's own tokens carry (answers of several tokens), then 0 (padding).
    """

    direction: str
    layers: tuple[int, ...]
    steps: int
    values: Mapping[str, Float[Tensor, "contrast layer head token"]]

    @property
    def method(self) -> str:
        """What the values are."""
        return method_name(self.steps)


def method_name(steps: int) -> str:
    """What values with so many nodes are called in tables."""
    return f"integrated gradients, {steps} nodes" if steps else "attribution patching"


def attribute(
    body: Body,
    plan: ContrastPlan,
    direction: str,
    components: Sequence[str] = COMPONENTS[:-1],
    *,
    layers: Sequence[int] | None = None,
    steps: int = 0,
) -> Attributed:
    """Attributed patching effects of every layer, head and token, for each contrast of the plan.

    Args:
        body: the mind that is read.
        plan: the contrasts; each must have two prompts of one length.
        direction: `denoising` or `noising`.
        components: any of `COMPONENTS`; differences of `pattern` are quadratic in the length.
        layers: all by default.
        steps: nodes of the integrated gradient (each costs a forward and a backward pass); 0 for the gradient at the
            patched run.

    Raises:
        UserError: an unknown component or direction, a negative `steps`, or prompts of different length.
    """
    if unknown := [c for c in components if c not in COMPONENTS]:
        raise UserError(f"components: no attribution for {unknown[0]!r}; there are {', '.join(COMPONENTS)}.")
    check_plan(plan, direction, steps)
    chosen = tuple(range(body.n_layers)) if layers is None else tuple(layers)
    names = {site(c, layer): (c, k) for c in components for k, layer in enumerate(chosen)}
    found = {name: torch.zeros(()) for name in names}

    def collect(name: str, difference: Tensor, gradient: Tensor, weight: float) -> None:
        product = (difference.float() * gradient.float()).sum(-1)
        found[name] = found[name] + weight * product.cpu()

    run_attribution(body, plan, direction, list(names), collect, steps)
    owner = torch.tensor(plan.owners(SIDES[direction].into))
    values: dict[str, Tensor] = {}
    for component in components:
        per_layer = []
        for layer in chosen:
            x = SIDES[direction].sign * found.pop(site(component, layer))
            x = _head_first(component, x)
            per_layer.append(x.new_zeros(plan.n, *x.shape[1:]).index_add_(0, owner, x))
        values[component] = torch.stack(per_layer, dim=1)
    return Attributed(direction, chosen, steps, values)


def run_attribution(
    body: Body,
    plan: ContrastPlan,
    direction: str,
    names: Sequence[str],
    collect: Callable[[str, Tensor, Tensor, float], None],
    steps: int = 0,
) -> None:
    """Steps 1 to 4: call `collect(name, source − into, ∂m/∂act, weight)` for every site and node.

    Tensors have the activation's shape, [row, ...]; weights sum to 1 over the nodes.
    """
    sides = SIDES[direction]
    entry = site("resid_pre", 0)
    wanted = list(dict.fromkeys([*names, entry] if steps else names))
    store = body.cache(plan.ids(sides.source), wanted)

    def subtract(name: str) -> Hook:
        def f(act: Tensor) -> None:
            store[name].sub_(act.detach())

        return f

    if steps:
        plan.margins(body, sides.into, hooks=[(name, subtract(name)) for name in wanted])

    def watch(name: str, alpha: float, weight: float) -> Hook:
        def f(act: Tensor) -> Tensor:
            if not steps:
                store[name].sub_(act.detach())
            elif name == entry:
                act = act + alpha * store[name]
            if name in names:
                act.register_hook(lambda gradient: arrive(name, gradient, weight))
            return act

        return f

    def arrive(name: str, gradient: Tensor, weight: float) -> None:
        collect(name, store[name] if steps else store.pop(name), gradient, weight)

    for alpha, weight in nodes(steps):
        hooks = [(name, watch(name, alpha, weight)) for name in wanted]
        plan.margins(body, sides.into, hooks=hooks, grad=True).sum().backward()


def nodes(steps: int) -> list[tuple[float, float]]:
    """Places on the line from the patched run (0) to the source (1) and their weights, which sum to 1.

    Gauss–Legendre; for 0 steps the patched run itself.
    """
    if not steps:
        return [(0.0, 1.0)]
    x, w = np.polynomial.legendre.leggauss(steps)
    return [(float((a + 1) / 2), float(b / 2)) for a, b in zip(x, w, strict=True)]


def span_sums(
    values: Float[Tensor, "contrast layer head token"], spans: Spans
) -> Float[Tensor, "contrast layer head column"]:
    """Values summed over spans of tokens; NaN where a contrast has no such span.

    Args:
        values: as `Attributed.values` gives them.
        spans: by contrast, one span a column or None; the same number of columns for all.
    """
    masks = span_masks(spans, values.shape[-1])
    out = torch.einsum("clht,cst->clhs", values, masks.to(values))
    gone = torch.tensor([[span is None for span in row] for row in spans])
    return out.masked_fill(gone[:, None, None, :], float("nan"))


def span_masks(spans: Spans, n_tokens: int) -> Float[Tensor, "contrast column token"]:
    """1 at the tokens of each span, 0 elsewhere."""
    masks = torch.zeros(len(spans), len(spans[0]) if spans else 0, n_tokens)
    for k, row in enumerate(spans):
        for column, span in enumerate(row):
            if span is not None:
                masks[k, column, span.start : span.stop] = 1.0
    return masks


def check_plan(plan: ContrastPlan, direction: str, steps: int) -> None:
    """Refuse what attribution cannot read.

    Raises:
        UserError: no such direction, a negative number of steps, or a contrast whose two prompts differ in length.
    """
    if direction not in SIDES:
        raise UserError(f"direction: {direction!r} is not one of {', '.join(SIDES)}.")
    if steps < 0:
        raise UserError(f"steps: {steps} is negative; give 0 for the plain gradient or the number of nodes.")
    for k, (clean, corrupt) in enumerate(zip(*plan.prompts, strict=True)):
        if len(clean) != len(corrupt):
            raise UserError(
                f"contrast {k}: its prompts have {len(clean)} and {len(corrupt)} tokens; attribution needs aligned "
                "contrasts, so leave it out."
            )
    if plan.ids(0).shape != plan.ids(1).shape or plan.owners(0) != plan.owners(1):
        raise UserError("plan: the answers are split into other tokens after one chain than after the other.")


def _head_first(component: str, x: Tensor) -> Tensor:
    """[row, pos], [row, pos, head] or, for patterns, [row, head, query] as [row, head, pos]."""
    if component not in HEADED:
        return x[:, None]
    return x if component == "pattern" else x.transpose(1, 2)
