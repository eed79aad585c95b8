"""What a sweep stands on: a batch of contrasts as rows, and what has to be stored of their runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from reasoninterp.errors import UserError
from reasoninterp.models.body import Body, Hook, site
from reasoninterp.models.context import Context
from reasoninterp.patching.cells import Sites
from reasoninterp.patching.lanes import Ints
from reasoninterp.patching.metric import ContrastPlan
from reasoninterp.patching.staircase import IN_FLIGHT
from reasoninterp.patching.store import SiteKey, Store, record
from reasoninterp.traces.contrast import Contrast
from reasoninterp.traces.trace import TokenTrace

CROSS = "cross_mind"  # the direction of a sweep whose source is another mind


@dataclass
class Setting:
    """Everything about a batch of contrasts that does not depend on what is patched."""

    context: Context
    contrasts: Sequence[Contrast]
    plan: ContrastPlan
    tokens: list[TokenTrace]
    hooks: Sequence[tuple[str, Hook]]
    metrics: tuple[str, ...]
    max_tokens: int
    stores: dict[tuple[str, int], Store] = field(default_factory=dict)

    @property
    def body(self) -> Body:
        """The mind that is read."""
        return self.context.body

    def rows_of(self, side: int) -> list[list[int]]:
        """For each contrast, its rows on a side."""
        out: list[list[int]] = [[] for _ in self.contrasts]
        for row, owner in enumerate(self.plan.owners(side)):
            out[owner].append(row)
        return out

    def stops(self, side: int) -> Ints:
        """For each row, the token behind the last that is read."""
        found: Ints = self.plan.sides[side].positions.max(1).values.numpy() + 1
        return found

    def record(self, wanted: set[SiteKey]) -> None:
        """Run both chains of every contrast, the corrupt one from its first changed token on."""
        label, plan = self.body.label, self.plan
        clean, corrupt = plan.sides
        kwargs: dict[str, Any] = {"hooks": self.hooks, "max_tokens": self.max_tokens}
        store = record(self.body, clean.ids, self.stops(0), clean.positions, wanted, **kwargs)
        shared = clean.ids.shape == corrupt.ids.shape and plan.owners(0) == plan.owners(1)
        if shared:
            first = np.array(plan.first_difference())[plan.owners(1)]
            first = np.minimum(first, corrupt.positions.min(1).values.numpy())
            kwargs |= {"like": store, "starts": first}
        self.stores[label, 0] = store
        self.stores[label, 1] = record(self.body, corrupt.ids, self.stops(1), corrupt.positions, wanted, **kwargs)


def wanted_sites(sites: Sites, body: Body, hooked: bool) -> set[SiteKey]:
    """What has to be stored of each run for a sweep of `sites`."""
    keys: set[SiteKey] = set()
    for c, n in sites.keys(body):
        if c != "pattern":
            keys.add((c, n))
        if c in ("resid_pre", "q", "k", "v") or hooked:
            keys.add(("resid_pre", n))
        if c in ("resid_mid", "mlp_out", "attn_out", "z", "pattern", "resid_post"):
            keys.add(("resid_post", n))
        if c in ("attn_out", "z", "pattern"):
            keys.add(("resid_pre", n))
        if c == "mlp_out":
            keys.add(("resid_mid", n))
        if c == "pattern":
            keys.add(("z", n))
    return keys


def check_hooks(hooks: Sequence[tuple[str, Hook]], n_layers: int) -> None:
    """Raise a UserError for a hook that would not act in packed blocks."""
    known = {site(c, n) for c in IN_FLIGHT for n in range(n_layers)} | {site("resid_post", n) for n in range(n_layers)}
    for name, _ in hooks:
        if name not in known:
            raise UserError(
                f"hooks: {name!r} does not act in a sweep; give site(component, layer) of a layer from 0 to "
                f"{n_layers - 1} and one of {', '.join(IN_FLIGHT)} or resid_post."
            )
