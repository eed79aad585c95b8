"""What a sweep will take, told before it runs: bytes, lanes, block-tokens and floating-point work.

Everything follows from the network's sizes and the contrasts' token ids alone; nothing is run.

1. *Lanes.*  The table of cells is the sweep's own (`cells`), and so is its division into lanes, with one thing
   foreseen instead of measured: the two runs differ at a site from the first token in which they part (before the
   first block: exactly at the tokens that differ).  With another mind as source they differ everywhere.
2. *Stored bytes.*  Keys and values of every layer, the residual streams and sites that `wanted_sites` keeps, and the
   hidden states that are read; both sides, and both minds where another mind is the source.
3. *Chunk bytes.*  The most that is alive at once while at most `max_tokens` packed tokens go up: inside a block (its
   attention, with the scores where they are written down, or its MLP), where lanes join (their patches go through
   W_O and the MLP), at the last block, or where logits are read (lanes × reads × vocabulary).
4. *Choice.*  Among `max_tokens` and contrasts per batch, halved in turn from what is fastest, the first pair whose
   peak keeps within the budget.

Peaks are upper estimates: what is counted (`counted`, `tests/test_budget.py`) lies between half of them and them.
Weights are not counted; tables are, apart from the rows that a run keeps.  The sums are in `footprint`, the lanes in
`forecast`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from reasoninterp.errors import UserError
from reasoninterp.models.context import LEAST_SWEEP_TOKENS, Context
from reasoninterp.models.packed import supported
from reasoninterp.patching.cells import Sites
from reasoninterp.patching.forecast import Forecast, Taken, Work
from reasoninterp.patching.metric import DIRECTIONS, Direction
from reasoninterp.patching.setting import wanted_sites
from reasoninterp.study import Study
from reasoninterp.traces.contrast import Contrast


@dataclass(frozen=True)
class SweepPlan:
    """What a sweep will take.

    Attributes:
        n_contrasts: contrasts in all.
        per_batch: contrasts measured at once.
        max_tokens: packed tokens run at once.
        budget: bytes that may be taken.
        one: stored bytes of the largest contrast.
        taken: bytes of the worst batch.
        work: of all contrasts, for each mind that is swept.
        n_minds: minds that are swept.
    """

    n_contrasts: int
    per_batch: int
    max_tokens: int
    budget: int
    one: int
    taken: Taken
    work: Work
    n_minds: int = 1

    @property
    def peak_bytes(self) -> int:
        """Tensors alive at once, at most."""
        return self.taken.stored + self.taken.chunk

    @property
    def total_bytes(self) -> int:
        """Tensors and tables."""
        return sum(self.taken)

    @property
    def saving(self) -> float:
        """Floating-point work of one forward pass a cell, over the sweep's."""
        return self.work.plain_flops / self.work.flops

    def describe(self) -> list[str]:
        """A few lines for a reader."""
        work, taken = self.work, self.taken
        minds = f" for each of {self.n_minds} minds" if self.n_minds > 1 else ""
        return [
            f"{work.n_cells} cells of {self.n_contrasts} contrasts{minds}, {work.n_cells - work.n_run} of them 0 "
            f"without a run; {work.n_lanes} patched rows, {work.block_tokens} tokens × layers",
            f"{work.flops / 1e9:.3g} GFLOP; one forward pass a cell would be {self.saving:.1f} times as much",
            f"at most {human(self.total_bytes)} of {human(self.budget)}: stored runs {human(taken.stored)} "
            f"({self.per_batch} contrasts at once, {human(self.one)} the largest), {self.max_tokens} tokens at once "
            f"{human(taken.chunk)}, tables {human(taken.tables)}",
        ]


def human(n: int | float) -> str:
    """Bytes for a reader: `8 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(n) < 1024 or unit == "GiB":
            return f"{n:.3g} {unit}" if n < 1000 else f"{n:,.0f} {unit}"
        n /= 1024
    raise AssertionError


def plan_sweep(
    context: Context,
    contrasts: Sequence[Contrast],
    sites: Sites | str = "resid_pre",
    *,
    directions: Sequence[Direction] = DIRECTIONS,
    source: str = "other_run",
    metrics: Sequence[str] = ("logit_diff",),
    hooked: bool = False,
    budget: int | None = None,
    max_tokens: int | None = None,
    per_batch: int | None = None,
) -> SweepPlan:
    """Plan `sweep(context, contrasts, sites, ...)`; nothing is run and no mind needs to be in.

    Args:
        context, contrasts, sites, directions, source, metrics: as `sweep`.
        hooked: whether other hooks act in every run.
        budget: bytes that tensors and tables may take; `context.memory()` if None.
        max_tokens, per_batch: most packed tokens and contrasts at once, to begin with: `context.sweep_tokens()`
            and `context.rows` if None.

    Raises:
        UserError: one contrast alone does not fit.
    """
    sites = Sites((sites,)) if isinstance(sites, str) else sites
    budget = context.memory() if budget is None else budget
    wanted = wanted_sites(sites, context.minds.body, hooked)
    forecast = Forecast(context, contrasts, sites, wanted, tuple(directions), source, tuple(metrics), hooked)
    tokens = max_tokens or context.sweep_tokens()
    batch = max(1, min(per_batch or context.rows, len(contrasts)))
    taken = forecast.taken(batch, tokens)
    while sum(taken) > budget:
        if batch == 1 and tokens <= LEAST_SWEEP_TOKENS:
            raise UserError(
                f"--memory {human(budget)}: the sweep needs {human(sum(taken))} for its largest contrast "
                f"({forecast.longest} tokens); give that much, or sweep fewer sites."
            )
        if tokens > LEAST_SWEEP_TOKENS and (batch == 1 or taken.chunk >= taken.stored + taken.tables):
            tokens = max(LEAST_SWEEP_TOKENS, tokens // 2)
        else:
            batch //= 2
        taken = forecast.taken(batch, tokens)
    one = forecast.taken(1, tokens).stored
    return SweepPlan(len(contrasts), batch, tokens, budget, one, taken, forecast.work())


class Sweeping:
    """What makes a study one that sweeps: put it before `Study`, and say `sites` (or `sweep_arguments`).

    The memory budget then decides how many contrasts are measured at once, and `--plan` says what the study will take.
    """

    sites: ClassVar[Sites]

    def sweep_arguments(self) -> dict[str, Any]:
        """What the study gives to `sweep` beside contrasts."""
        return {"sites": self.sites}

    def batch_size(self, context: Context) -> int | None:
        """As many cells as the budget holds; it also sets the tokens that a sweep runs at once.

        Raises:
            UserError: one contrast alone does not fit.
        """
        plan = plan_study(context, self)
        if plan is None:
            return None
        context.set_sweep_tokens(plan.max_tokens)
        return plan.per_batch


def plan_study(context: Context, study: Study | Sweeping) -> SweepPlan | None:
    """The plan of a study that sweeps over the context's aligned contrasts.

    None for a study that does not, and for networks that are swept plainly, one forward pass a cell.

    Raises:
        UserError: one contrast alone does not fit.
    """
    if not isinstance(study, Sweeping):
        return None
    most = getattr(study, "max_traces", 0) or None
    chosen = [i.contrast for i in context.items if i.contrast is not None and i.contrast.aligned][:most]
    if not chosen or supported(context.minds.body):
        return None
    arguments = study.sweep_arguments()
    n_minds = len(set(context.minds.names) - {arguments.get("source")})
    return replace(plan_sweep(context, chosen, **arguments), n_minds=n_minds)
