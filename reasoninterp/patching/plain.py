"""The plain sweep: one forward pass of the network per cell.

Slow, and simple enough to check the fast one by; it also serves networks whose blocks cannot be driven one by one.
Here are only the other run and another mind sources, single layers, and the logit difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from reasoninterp.errors import UserError
from reasoninterp.models.body import Body, Hook, site
from reasoninterp.patching.cells import PER_HEAD, Sites, cells_of
from reasoninterp.patching.metric import SIDES, ContrastPlan
from reasoninterp.patching.setting import CROSS, Setting
from reasoninterp.traces.trace import Span


def span_mask(plan: ContrastPlan, side: int, spans: Sequence[Span | None]) -> Bool[Tensor, "row pos"]:
    """Positions to patch in each row of one side: the span of the row's contrast, none where it is None."""
    ids = plan.ids(side)
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    for row, owner in enumerate(plan.owners(side)):
        span = spans[owner]
        if span is not None:
            mask[row, span.start : span.stop] = True
    return mask


def patched_margins(
    body: Body, plan: ContrastPlan, direction: str, name: str, source: Tensor, mask: Tensor
) -> Float[Tensor, " contrast"]:
    """Margins of the patched run, `source` put in at site `name` where `mask` is true, by a whole forward pass.

    Args:
        body: the mind that is read.
        plan: the contrasts.
        direction: `denoising` or `noising`.
        name: the site, as `site(component, layer)` gives it.
        source: activations at that site, [row, pos, ...].
        mask: [row, pos], or of the activation's full shape.
    """
    return plan.margins(body, SIDES[direction].into, hooks=[(name, _put(source, mask))])


def _put(source: Tensor, mask: Tensor) -> Hook:
    where = mask.to(source.device)
    while where.dim() < source.dim():
        where = where[..., None]
    return lambda act: torch.where(where, source, act)


def plain_sweep(
    setting: Setting, sites: Sites, directions: Sequence[str], source: str, *, why: str = ""
) -> pd.DataFrame:
    """As `sweep`, for the other run or another mind, single layers and `logit_diff`.

    Raises:
        UserError: something that only the fast sweep does, with the reason why that cannot run here (`why`).
    """
    context = setting.context
    other = source if source in context.minds.names else ""
    if (not other and source != "other_run") or sites.window > 1 or setting.metrics != ("logit_diff",) or setting.hooks:
        raise UserError(
            f"sweep: this network is swept plainly ({why}); give source='other_run' or a mind, window=1, "
            "metrics=('logit_diff',) and no hooks."
        )
    body, plan = setting.body, setting.plan
    cells = cells_of(body, setting.tokens, sites)
    table = cells.table
    whole = (plan.margins(body, 1) - plan.margins(body, 0)).numpy()
    found = []
    runs = [(CROSS, 1, 1, 1.0), (CROSS, 0, 0, -1.0)] if other else [(d, *SIDES[d]) for d in directions]
    for direction, into, side, sign in runs:
        plain = plan.margins(body, into).numpy()
        value = np.zeros(len(table))
        sites_of = table.groupby(["component", "layer", "head", "column_index", "column"]).indices
        for (component, layer, head, *_), at in sites_of.items():
            name = site(str(component), int(layer))
            with context.minds.at(other or body.label):
                given = body.cache(plan.ids(side), [name])[name]
            spans: list[Span | None] = [None] * plan.n
            for k in at.tolist():
                spans[int(table["contrast"].iloc[k])] = Span(int(cells.start[k]), int(cells.stop[k]))
            mask = _shaped(span_mask(plan, into, spans), str(component), int(head), given)
            margin = plan.margins(body, into, hooks=[(name, _put(given, mask))]).numpy()
            mine = table["contrast"].to_numpy()[at]
            value[at] = sign * (margin - plain)[mine]
        out: dict[str, Any] = {"value": value, "effect": whole[table["contrast"].to_numpy()]}
        out |= {"direction": direction, "source": source, "window": 1, "n_tokens": cells.stop - cells.start}
        found.append(table.assign(**out))
    if other:
        found = [found[0].assign(value=found[0]["value"] + found[1]["value"])]
    return pd.concat(found, ignore_index=True)


def _shaped(mask: Tensor, component: str, head: int, like: Tensor) -> Tensor:
    """The mask over a site's full shape, one head only where one is named."""
    if component not in PER_HEAD:
        return mask
    n_heads = like.shape[1] if component == "pattern" else like.shape[2]
    one = torch.ones(n_heads, dtype=torch.bool) if head < 0 else torch.arange(n_heads) == head
    if component == "pattern":
        return mask[:, None, :, None] & one[None, :, None, None]
    return mask[:, :, None, None] & one[None, None, :, None]
