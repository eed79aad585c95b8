"""What a patched run answers: every metric of one pass, from the logits where the answer is read.

Of the two answers of a contrast (see `models.read`):

`logit_diff`  m = log P(corrupt answer) − log P(clean answer), nats: of two single tokens, a difference of logits;
`logp`        log₂ P of each whole answer, bits;
`rank`        rank of the first token in which the answers part, 0 the most probable;
`kl`          KL(plain run ‖ patched run) over the full vocabulary, bits, at the token where the answers part.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from reasoninterp.errors import UserError
from reasoninterp.models.read import MarginPlan
from reasoninterp.patching.lanes import Ints

Metric = Literal["logit_diff", "logp", "rank", "kl"]
VALUES: dict[str, tuple[str, ...]] = {
    "logit_diff": ("margin",),
    "logp": ("logp_clean", "logp_corrupt"),
    "rank": ("rank_clean", "rank_corrupt"),
    "kl": ("kl",),
}
_BITS = 1 / math.log(2)


class Reader:
    """Reads patched rows of one side of a contrast plan.

    Args:
        plan: the side's rows and tokens.
        metrics: which of `VALUES` to read.

    Raises:
        UserError: an unknown metric.
    """

    def __init__(self, plan: MarginPlan, metrics: Sequence[str] = ("logit_diff",)) -> None:
        unknown = [m for m in metrics if m not in get_args(Metric)]
        if unknown or not metrics:
            raise UserError(f"metrics={list(metrics)}: give one or more of {', '.join(get_args(Metric))}.")
        self.plan, self.metrics = plan, tuple(metrics)
        self.names = [name for m in metrics for name in VALUES[m]]
        n_rows, n_read = plan.positions.shape
        per_row: list[list[int]] = [[] for _ in range(n_rows)]
        for token, row in enumerate(plan.read_row.tolist()):
            per_row[row].append(token)
        most = max((len(t) for t in per_row), default=0)
        self._token = torch.tensor([[*t, *[-1] * (most - len(t))] for t in per_row], dtype=torch.long)
        part = plan.part
        sign = (part == 2).long() - (part == 1).long()
        self._share = torch.zeros(n_rows, n_read).index_put(
            (plan.read_row, plan.read_slot), sign.float(), accumulate=True
        )
        self._first, self._fork, self._heads = self._forks()
        self._plain: Tensor | None = None

    def _forks(self) -> tuple[Tensor, Tensor, Tensor]:
        """For each item: its first row, the slot where the answers part, and their first tokens [item, 2]."""
        plan, n = self.plan, self.plan.n_items
        first, fork, heads = torch.zeros(n), torch.zeros(n), torch.zeros(n, 2)
        seen: set[tuple[int, int]] = set()
        tokens = zip(
            *(t.tolist() for t in (plan.item, plan.part, plan.read_row, plan.read_slot, plan.target)), strict=True
        )
        for item, part, row, slot, target in tokens:
            if part and (item, part) not in seen:
                seen.add((item, part))
                heads[item, part - 1] = target
                if part == 1:
                    first[item], fork[item] = row, slot
        return first.long(), fork.long(), heads.long()

    def set_plain(self, logits: Float[Tensor, "row read vocab"]) -> None:
        """The logits of the unpatched rows, against which `kl` is read."""
        if "kl" in self.metrics:
            self._plain = logits[self._first.to(logits.device), self._fork.to(logits.device)].float().log_softmax(-1)

    def read(
        self,
        rows: Ints,
        cells: Ints,
        n_cells: int,
        logits: Float[Tensor, "lane read vocab"],
    ) -> dict[str, Float[Tensor, " cell"]]:
        """Each metric's share of these lanes; summed over all lanes of a cell it is the cell's value.

        Args:
            rows: the plan's row that each lane is.
            cells: the cell that each lane belongs to.
            n_cells: cells in all.
            logits: of the lanes where they are read.
        """
        logits = logits.float()
        dev = logits.device
        row, cell = torch.as_tensor(rows, device=dev), torch.as_tensor(cells, device=dev)
        token = self._token.to(dev)[row]
        live = token >= 0
        slot, target, part = (getattr(self.plan, f).to(dev)[token] for f in ("read_slot", "target", "part"))
        lane = torch.arange(len(row), device=dev)[:, None]
        raw = torch.where(live, logits[lane, slot, target], 0.0)
        share = self._share.to(dev)[row]
        normaliser = logits.logsumexp(-1) if "logp" in self.metrics or bool(share.any()) else torch.zeros_like(share)
        found: dict[str, Tensor] = {}
        if "logit_diff" in self.metrics:
            sign = ((part == 2).float() - (part == 1).float()) * live
            found["margin"] = (sign * raw).sum(1) - (share * normaliser).sum(1)
        if "logp" in self.metrics:
            logp = torch.where(live, raw - normaliser.gather(1, slot), 0.0) * _BITS
            common = (logp * (part == 0)).sum(1)
            found["logp_clean"] = common + (logp * (part == 1)).sum(1)
            found["logp_corrupt"] = common + (logp * (part == 2)).sum(1)
        if "rank" in self.metrics or "kl" in self.metrics:
            found |= self._at_fork(row, logits)
        out = {}
        for name in self.names:
            out[name] = torch.zeros(n_cells, device=dev).index_add(0, cell, found[name].float()).cpu()
        return out

    def _at_fork(self, row: Tensor, logits: Tensor) -> dict[str, Tensor]:
        dev = logits.device
        item = self.plan.item_of_row.to(dev)[row]
        first = self._first.to(dev)[item] == row
        at = logits[torch.arange(len(row), device=dev), self._fork.to(dev)[item]]
        found = {}
        for k, name in enumerate(("rank_clean", "rank_corrupt")):
            own = at.gather(1, self._heads.to(dev)[item][:, k : k + 1])
            found[name] = torch.where(first, (at > own).sum(1), 0)
        if self._plain is not None:
            plain = self._plain[item]
            kl = (plain.exp() * (plain - at.log_softmax(-1))).sum(-1) * _BITS
            found["kl"] = torch.where(first, kl.clamp(min=0.0), 0.0)
        return found
