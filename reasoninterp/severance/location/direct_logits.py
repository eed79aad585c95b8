"""Direct logit contributions after the corrupt chain: which components argue for the chain, which for the rival.

The last residual stream is a sum of what the components write: the embeddings, each head, each attention's output
bias, each MLP.  With the final norm's scale frozen at the value that it has, the logits are linear in them, so

    logit[a_corrupt] − logit[a_clean]  =  Σ_components ⟨written, direction⟩ + bias

where the direction is the difference of the two answers' rows of the unembedding, taken back through the norm's gain.

1. Read where the two answers part, after the corrupt chain: positive argues for the chain, negative for the answer that
   the question implies.  Nats of the log-odds of the two tokens in which the answers part.
2. A component is shown for the base, for the tuned mind and as the difference; means over contrasts with bootstrap
   intervals.

3. *Who argues for the rival* (`leading_rival`): a component whose contribution in the tuned mind lies below 0, whose
   change does so beyond chance (one-sided t-test over contrasts, Holm's correction over components), and whose change
   is at least `LEAST_SHARE` of the margin that was lost.

It names a component and no more: one can carry the path, or hide it, without writing to the answer itself.
Elhage et al. (2021), A Mathematical Framework for Transformer Circuits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from einops import einsum
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from reasoninterp.attention.maps import output_weights
from reasoninterp.models.body import Body, site
from reasoninterp.models.context import Context
from reasoninterp.models.leaves import Leaf
from reasoninterp.models.read import MarginPlan
from reasoninterp.patching.metric import CORRUPT, ContrastPlan, contrast_plan
from reasoninterp.stats import CONFIDENCE, Estimate, corrected, matrix_intervals
from reasoninterp.traces.contrast import Contrast

LEAST_SHARE = 0.25  # of the lost margin: a component that moved less did not take the answer away
ALPHA = 1 - CONFIDENCE
ENDS = [f"{mind}{end}" for mind in ("base", "tuned", "change") for end in ("", "_ci_low", "_ci_high")]


class Direct(NamedTuple):
    """Contributions of one mind: `values` [contrast, component] sum to `margin` [contrast]; nats."""

    components: tuple[str, ...]
    values: NDArray[np.float64]
    margin: NDArray[np.float64]


def direct_contributions(context: Context, contrasts: Sequence[Contrast], mind: str) -> Direct:
    """What each component of a mind writes towards the corrupt answer and against the clean one, after the corrupt chain.

    Args:
        context: the minds and the tokenizer.
        contrasts: what is read; at least one.
        mind: a mind's name.
    """
    values, margins = [], []
    size = max(1, context.rows // 2)
    with context.open(mind) as body, torch.no_grad():
        for at in range(0, len(contrasts), size):
            plan = contrast_plan(context, contrasts[at : at + size]).sides[CORRUPT]
            names, found, margin = _of_batch(body, plan)
            values.append(found.double().cpu().numpy())
            margins.append(margin.double().cpu().numpy())
    return Direct(names, np.concatenate(values), np.concatenate(margins))


@dataclass(frozen=True)
class CorruptPlan:
    """The margin of each contrast after its corrupt chain, as a readout of `severance.ledger.integrate`."""

    plan: ContrastPlan

    @property
    def owner(self) -> list[int]:
        """The contrast that each row belongs to."""
        return self.plan.owners(CORRUPT)

    @property
    def positions(self) -> Int[Tensor, "row read"]:
        """Where the unembedding reads."""
        return self.plan.sides[CORRUPT].positions

    @property
    def ids(self) -> Int[Tensor, "row pos"]:
        """Token ids."""
        return self.plan.ids(CORRUPT)

    def values(self, body: Body, grad: bool = False) -> Float[Tensor, " contrast"]:
        """`m(corrupt chain)`, nats: above 0 the chain's answer is preferred to the question's."""
        return self.plan.margins(body, CORRUPT, grad=grad)


def corrupt_margin(context: Context, contrasts: Sequence[Contrast]) -> CorruptPlan:
    """The margin after the corrupt chain: what an overridden path loses, though E is whole."""
    return CorruptPlan(contrast_plan(context, contrasts))


def direct_table(base: Direct, tuned: Direct, *, seed: int = 0) -> pd.DataFrame:
    """`component`, then `base`, `tuned` and `change` (tuned − base), each with its interval, `share`, `p` and `n`.

    `share` is the component's part of the margin that was lost (NaN where none was), `p` that of a change below 0,
    corrected over components.
    """
    table = pd.DataFrame({"component": base.components})
    for name, values in (("base", base.values), ("tuned", tuned.values), ("change", tuned.values - base.values)):
        low, high = matrix_intervals(values, seed=seed)
        table[name], table[f"{name}_ci_low"], table[f"{name}_ci_high"] = values.mean(0), low, high
    change = tuned.values - base.values
    lost = float(change.sum(1).mean())
    table["share"] = change.mean(0) / lost if lost < 0 else np.nan
    table["p"] = corrected(_below_zero(change), "holm")
    return table.assign(n=len(base.values))[["component", *ENDS, "share", "p", "n"]]


def _below_zero(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """p of a mean below 0, by column; a column without spread is below 0 or is not."""
    from scipy.stats import t

    if len(values) < 2:
        return np.ones(values.shape[1])
    middle, error = values.mean(0), values.std(0, ddof=1) / np.sqrt(len(values))
    p = np.where(middle < 0, 0.0, 1.0)
    moves = error > 0
    p[moves] = t.cdf(middle[moves] / error[moves], len(values) - 1)
    return p


def leading_rival(table: pd.DataFrame) -> tuple[str, Estimate] | None:
    """The component whose contribution moved most towards the rival's answer; None where none did (step 3)."""
    argues = (table["tuned_ci_high"] < 0) & (table["p"] < ALPHA) & (table["share"] >= LEAST_SHARE)
    down = table[argues & (table["component"] != "bias")]
    if not len(down):
        return None
    row = down.loc[down["change"].idxmin()]
    value, low, high = (float(row[f"change{end}"]) for end in ("", "_ci_low", "_ci_high"))
    return str(row["component"]), Estimate(value, low, high, int(row["n"]), "bootstrap")


def _of_batch(
    body: Body, plan: MarginPlan
) -> tuple[tuple[str, ...], Float[Tensor, "item component"], Float[Tensor, " item"]]:
    rows, at, clean, corrupt = _forks(plan)
    layers = range(body.n_layers)
    inside = [site(c, layer) for layer in layers for c in ("z", "attn_out", "mlp_out")]
    last = site("resid_post", body.n_layers - 1)
    cache = body.cache(plan.ids, [site("resid_pre", 0), *inside, last])
    here = {name: act[rows, at].float() for name, act in cache.items()}
    has_bias = any(leaf.role == "o" and leaf.bias is not None for leaf in body.leaves())
    direction, bias = _direction(body, here[last], clean, corrupt)
    names, written = ["embed"], [here[site("resid_pre", 0)]]
    for layer in layers:
        heads = einsum(
            here[site("z", layer)], output_weights(body, layer).float(), "item head e, head e d -> item head d"
        )
        names += [f"L{layer}.H{head}" for head in range(body.n_heads)]
        written += list(heads.unbind(1))
        if has_bias:
            names.append(f"L{layer}.attn.b_O")
            written.append(here[site("attn_out", layer)] - heads.sum(1))
        names.append(f"L{layer}.mlp")
        written.append(here[site("mlp_out", layer)])
    values = einsum(torch.stack(written, 1), direction, "item component d, item d -> item component")
    logits = body.logits(cache[last][rows, at]).float()
    margin = logits.gather(1, corrupt[:, None]) - logits.gather(1, clean[:, None])
    return (*names, "bias"), torch.cat([values, bias[:, None]], 1), margin[:, 0]


def _forks(plan: MarginPlan) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row and position where each item's two answers part, and the token of either answer there."""
    first: dict[tuple[int, int], int] = {}
    for k, key in enumerate(zip(plan.item.tolist(), plan.part.tolist(), strict=True)):
        first.setdefault(key, k)
    clean = torch.tensor([first[i, 1] for i in range(plan.n_items)])
    corrupt = torch.tensor([first[i, 2] for i in range(plan.n_items)])
    rows = plan.read_row[clean]
    return rows, plan.positions[rows, plan.read_slot[clean]], plan.target[clean], plan.target[corrupt]


def _direction(
    body: Body, stream: Float[Tensor, "item d"], clean: Tensor, corrupt: Tensor
) -> tuple[Float[Tensor, "item d"], Float[Tensor, " item"]]:
    """The direction of the last stream that moves the margin, with the norm's scale as it is, and the constant term."""
    leaves = {leaf.role: leaf for leaf in body.leaves() if leaf.layer is None}
    norm, unembed = leaves["ln_final"], leaves["unembed"]
    rows = _tensor(unembed, "weight")
    difference = rows[corrupt.to(rows.device)].float() - rows[clean.to(rows.device)].float()
    centred = stream - stream.mean(-1, keepdim=True) if norm.centred else stream
    scale = torch.rsqrt(centred.square().mean(-1, keepdim=True) + norm.eps)
    direction = difference * _tensor(norm, "weight").float() * scale
    if norm.centred:
        direction = direction - direction.mean(-1, keepdim=True)
    bias = torch.zeros(len(stream), device=stream.device)
    if norm.bias is not None:
        bias = bias + difference @ _tensor(norm, "bias").float()
    if unembed.bias is not None:
        offset = _tensor(unembed, "bias").float()
        bias = bias + offset[corrupt.to(rows.device)] - offset[clean.to(rows.device)]
    return direction, bias


def _tensor(leaf: Leaf, name: str) -> Tensor:
    found: Tensor = getattr(leaf._module, name)
    return found
