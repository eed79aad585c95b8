"""The ledger's core: a readout's change between two minds, split over Units by integrated gradients in weight space.

With `θ(α) = θ_from + α (θ_to − θ_from)` and a readout E (`severance.ledger.readouts`; by default the effect of the chain),

    A_c = ∫₀¹ ⟨∂E/∂θ_c at θ(α), θ_to,c − θ_from,c⟩ dα        Σ_c A_c = E(to) − E(from)

1. Nodes by Clenshaw–Curtis, whose rule with twice as many intervals contains all nodes of the one before: no gradient
   is thrown away when the rule is refined, and the two ends, whose E is wanted anyway, are nodes too.
2. At a node, one forward and one backward pass over all contrasts, in batches, and one leaf product for each leaf
   (`severance.ledger.products`); the gradient of no weight is formed.
3. Intervals are doubled until `|Σ_c A_c − (E(to) − E(from))|` is within the tolerance, relative to the larger |E|.
   In bfloat16 and float16 doubling also ends where only rounding is left (`severance.ledger.quadrature`).  `settled` is
   a second opinion on the entries themselves: how far the rule with half as many intervals, which comes for free, is
   from the last one.

Integrated gradients: Sundararajan et al. 2017 (arXiv:1703.01365), here along weights instead of inputs.  A positive
entry is gained by the way from `from_mind` to `to_mind`, a negative one lost; nats of the readout.

Memory, in copies of the parameters that differ (P of them; w bytes a weight, 4 or 2).  Host: the two minds, 2 w P.
Device: the body, w P, its activations (`checkpoint` for one block's) and the float32 difference: on the CPU one tensor
of it at a time, so that 3 w P are held in all; on an accelerator the whole, w P + 4 P.  Both minds are kept because the
ends have to be theirs bit for bit, which `θ_from + 1 · (θ_to − θ_from)` in floating point is not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from reasoninterp.errors import UserError
from reasoninterp.models.body import Body
from reasoninterp.models.checkpoint import checkpointed
from reasoninterp.models.context import Context
from reasoninterp.models.minds import Handle, blend
from reasoninterp.models.units import LEVELS
from reasoninterp.severance.ledger.products import Atom, LedgerUnit, Products, home_of, ledger_units, membership
from reasoninterp.severance.ledger.quadrature import Means, check, enough, rounding_of
from reasoninterp.severance.ledger.quadrature import nodes as rule
from reasoninterp.severance.ledger.readouts import Readout, reliance
from reasoninterp.traces.contrast import Contrast

FORMED_ANEW = ("cpu",)  # devices on which a difference is not held: forming it costs less there than a leaf's product


class Integral(NamedTuple):
    """The entries of one readout along one path.

    Attributes:
        units: finest places in forward order (a tied embedding is listed once for each use).
        values: entries [contrast, unit], nats.
        e_from, e_to: the readout at the two ends [contrast], nats.
        alphas, along: nodes on [0, 1], and the readout's mean at each.
        n_nodes: how many there are.
        passes: forward and backward passes over all contrasts.
        residual: `|Σ entries − (e_to − e_from)|` of the means, relative to the larger |mean|.
        settled: largest change of a finest mean entry from the rule with half as many intervals, relative likewise.
        modules, by_module: the plain model's modules and their entries [contrast, module].
        rounding: the weights' dtype where its rounding, which no further node shrinks, keeps the residual up; else "".
    """

    units: tuple[LedgerUnit, ...]
    values: NDArray[np.float64]
    e_from: NDArray[np.float64]
    e_to: NDArray[np.float64]
    alphas: NDArray[np.float64]
    along: NDArray[np.float64]
    n_nodes: int
    passes: int
    residual: float
    settled: float
    modules: tuple[str, ...]
    by_module: NDArray[np.float64]
    rounding: str = ""

    def at(self, level: str) -> dict[str, NDArray[np.float64]]:
        """Entries [contrast] of every Unit of a level (`fine` to `layer`, or `module`), by its name.

        Raises:
            UserError: no such level.
        """
        if level == "module":
            return {name: self.by_module[:, k] for k, name in enumerate(self.modules)}
        if level not in LEVELS:
            raise UserError(f"level: {level!r} is not one of {', '.join(LEVELS)}, module.")
        out: dict[str, NDArray[np.float64]] = {}
        for k, unit in enumerate(self.units):
            name = home_of(unit, level).name
            out[name] = out[name] + self.values[:, k] if name in out else self.values[:, k].copy()
        return out


class Entries(NamedTuple):
    """What one node gives: entries [contrast, unit], [contrast, module] and the readout [contrast]."""

    by_unit: NDArray[np.float64]
    by_module: NDArray[np.float64]
    values: NDArray[np.float64]


def entries(
    body: Body,
    delta: Mapping[str, Tensor],
    run: Callable[[], Float[Tensor, " contrast"]],
    rows: Sequence[int],
    *,
    checkpoint: bool = False,
) -> tuple[Float[Tensor, "contrast unit"], Float[Tensor, " contrast"]]:
    """Directional derivatives of each contrast's readout along `delta`, one per finest Unit.

    Args:
        body: at the weights θ(α).
        delta: `θ_to − θ_from` by parameter name, float32.
        run: one forward pass with graph, giving the readout per contrast.
        rows: for each row of that forward pass, its contrast.
        checkpoint: keep one block's activations at a time (`models.checkpoint`); the entries are the same.

    Returns:
        `⟨∂E_i/∂θ_c, Δθ_c⟩` as [contrast, unit] in the order of `ledger_units`, and the readouts [contrast].
    """
    by_atom, names, values = by_atoms(body, delta, run, rows, checkpoint=checkpoint)
    return by_atom @ membership([a.unit for a in names], [u.name for u in ledger_units(body)]), values


def by_atoms(
    body: Body,
    delta: Mapping[str, Tensor],
    run: Callable[[], Float[Tensor, " contrast"]],
    rows: Sequence[int],
    *,
    checkpoint: bool = False,
) -> tuple[Float[Tensor, "contrast atom"], list[Atom], Float[Tensor, " contrast"]]:
    """As `entries`, one column for each atom (`severance.ledger.products`), from which every partition is summed."""
    products = Products(body, delta)
    with products.watch(len(rows)) as sums, checkpointed(body, checkpoint):
        values = run()
        values.sum().backward()  # type: ignore[no-untyped-call]
    out = torch.zeros(max(rows) + 1, len(products.atoms), dtype=torch.float64)
    out.index_add_(0, torch.tensor(rows), sums.per_row.cpu())
    return out, products.atoms, values.detach()


def difference_of(context: Context, base: str, tuned: str) -> Mapping[str, Tensor]:
    """`θ_tuned − θ_base` by parameter name, float32, on the body's device.

    On the CPU each tensor is formed when it is asked for; elsewhere, where that would move the model once a batch, all
    are formed once, and the last pair's are kept.
    """
    minds = context.minds
    if minds.body.device.type in FORMED_ANEW:
        return minds.difference(base, tuned)
    key = "difference", base, tuned
    if key not in minds.memo:
        for other in [k for k in minds.memo if k[0] == "difference"]:
            del minds.memo[other]  # minds may be many; their differences are as large as the model
        minds.memo[key] = {k: d.to(minds.body.device) for k, d in minds.delta(base, tuned)}
    kept: dict[str, Tensor] = minds.memo[key]
    return kept


def difference_along(context: Context, node: Handle) -> Mapping[str, Tensor]:
    """`θ_to − θ_from` of the two minds that a node is a blend of (see `difference_of`)."""
    assert node.first is not None and node.second is not None
    return difference_of(context, node.first.name, node.second.name)


def modules_of(body: Body) -> list[str]:
    """The plain model's modules in the order of the forward pass."""
    return list(dict.fromkeys(a.module for a in Products(body, {}).atoms))


def node_entries(
    context: Context,
    contrasts: Sequence[Contrast],
    alpha: float,
    *,
    from_mind: str,
    to_mind: str,
    readout: Readout | None = None,
    checkpoint: bool = False,
) -> Entries:
    """Entries and readouts of all contrasts at one node, in batches of at most `context.rows` contrasts."""
    delta = difference_of(context, from_mind, to_mind)
    found, values = [], []
    names: list[Atom] = []
    with context.open(blend(from_mind, to_mind, alpha)) as body:
        for chunk in batches(context, contrasts):
            plan = (readout or reliance)(context, chunk)
            run = _runner(plan, body)
            by_atom, names, value = by_atoms(body, delta, run, plan.owner, checkpoint=checkpoint)
            found.append(by_atom)
            values.append(value.double().cpu())
        whole = torch.cat(found)
        by_unit = whole @ membership([a.unit for a in names], [u.name for u in ledger_units(body)])
        by_module = whole @ membership([a.module for a in names], modules_of(body))
    return Entries(by_unit.numpy(), by_module.numpy(), torch.cat(values).numpy())


def _runner(plan: object, body: Body) -> Callable[[], Tensor]:
    return lambda: plan.values(body, grad=True)  # type: ignore[attr-defined,no-any-return]


def batches(context: Context, contrasts: Sequence[Contrast]) -> Iterable[Sequence[Contrast]]:
    """The contrasts, `context.rows` at a time."""
    return (contrasts[at : at + context.rows] for at in range(0, len(contrasts), context.rows))


def integrate(
    context: Context,
    contrasts: Sequence[Contrast],
    *,
    from_mind: str = "base",
    to_mind: str = "tuned",
    nodes: int = 8,
    max_nodes: int = 64,
    tolerance: float = 0.005,
    readout: Readout | None = None,
    checkpoint: bool = False,
) -> Integral:
    """The entries of a readout along the straight path from one mind to another.

    Args:
        context: holds the minds.
        contrasts: read in batches of `context.rows`.
        from_mind: where the path begins.
        to_mind: where it ends.
        nodes: intervals between nodes to begin with (nodes + 1 gradients, the two ends among them).
        max_nodes: most intervals.
        tolerance: largest residual, relative to the larger |E|, with which doubling ends.
        readout: see `severance.ledger.readouts`; None is reliance.
        checkpoint: keep one block's activations at a time.

    Raises:
        UserError: no contrasts, or numbers out of range.
    """
    check(nodes, max_nodes, tolerance)
    if not contrasts:
        raise UserError("contrasts: there is none to integrate over; give traces with corrupt steps or calculations.")
    known: dict[float, Entries] = {}
    n = nodes
    while True:
        for alpha, _ in rule(n):
            if alpha not in known:
                known[alpha] = node_entries(
                    context, contrasts, alpha, from_mind=from_mind, to_mind=to_mind, readout=readout,
                    checkpoint=checkpoint,
                )  # fmt: skip
        if 2 * n > max_nodes or enough(_means(known), n, tolerance, context.minds.dtype):
            break
        n *= 2
    with context.open(from_mind) as body:
        places, modules = tuple(ledger_units(body)), tuple(modules_of(body))
    return collect(known, n, places, modules, context.minds.dtype)


def collect(
    known: Mapping[float, Entries],
    n: int,
    places: tuple[LedgerUnit, ...],
    modules: tuple[str, ...],
    dtype: torch.dtype = torch.float32,
) -> Integral:
    """The integral from what is known at the nodes for `n` intervals, with weights of this dtype."""
    used = rule(n)
    values = _sum(w * known[a].by_unit for a, w in used)
    e_from, e_to = known[0.0].values, known[1.0].values
    scale = max(abs(float(e_from.mean())), abs(float(e_to.mean())), 1e-12)
    settled = float("nan")
    if n % 2 == 0:
        before = _sum(w * known[a].by_unit for a, w in rule(n // 2))
        settled = float(np.abs((values - before).mean(0)).max(initial=0.0)) / scale
    return Integral(
        units=places,
        values=values,
        e_from=e_from,
        e_to=e_to,
        alphas=np.array([a for a, _ in used]),
        along=np.array([known[a].values.mean() for a, _ in used]),
        n_nodes=len(used),
        passes=len(known),
        residual=abs(float(values.sum(1).mean()) - float((e_to - e_from).mean())) / scale,
        settled=settled,
        modules=modules,
        by_module=_sum(w * known[a].by_module for a, w in used),
        rounding=rounding_of(_means(known), n, dtype),
    )


def _sum(parts: Iterable[NDArray[np.float64]]) -> NDArray[np.float64]:
    found = list(parts)
    return np.sum(found, axis=0)


def _means(known: Mapping[float, Entries]) -> dict[float, Means]:
    return {a: Means(e.by_unit.mean(0), float(e.values.mean())) for a, e in known.items()}
