"""The ledger's core: a readout's change between two minds, split over Units by integrated gradients in weight space.

With `θ(α) = θ_from + α (θ_to − θ_from)` and a readout E (`severance.ledger.readouts`; by default the effect of the chain),

    A_c = ∫₀¹ ⟨∂E/∂θ_c at θ(α), θ_to,c − θ_from,c⟩ dα        Σ_c A_c = E(to) − E(from)

1. Nodes by Clenshaw–Curtis, whose rule with twice as many intervals contains all nodes of the one before: no gradient
   is thrown away when the rule is refined, and the two ends, whose E is wanted anyway, are nodes too.
2. At a node, one forward and one backward pass over all contrasts, in batches, and one leaf product for each leaf
   (`severance.ledger.products`); the gradient of no weight is formed.
3. Intervals are doubled until `|Σ_c A_c − (E(to) − E(from))|` is within the tolerance, relative to the larger |E|.
   `settled` is a second opinion on the entries themselves: how far the rule with half as many intervals, which comes
   for free, is from the last one.

Integrated gradients: Sundararajan et al. 2017 (arXiv:1703.01365), here along weights instead of inputs.  A positive
entry is gained by the way from `from_mind` to `to_mind`, a negative one lost; nats of the readout.
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
from reasoninterp.models.minds import blend
from reasoninterp.models.units import LEVELS
from reasoninterp.severance.ledger.products import Atom, LedgerUnit, Products, home_of, ledger_units, membership
from reasoninterp.severance.ledger.readouts import Readout, reliance
from reasoninterp.traces.contrast import Contrast

FLOOR = 1e-4  # nats: a residual below this is within the tolerance whatever the scale of the readout


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


def nodes(n: int) -> list[tuple[float, float]]:
    """Clenshaw–Curtis nodes on [0, 1] for `n` intervals (n + 1 nodes) with their weights, which sum to 1.

    Exact for polynomials up to degree n; the nodes for n are among those for 2 n, bit for bit.  Waldvogel 2006 (BIT
    46:195) and Trefethen 2008 (SIAM Review 50:67), who finds it as good as Gauss's rule in practice.
    """
    k = np.arange(n + 1)
    j = np.arange(1, n // 2 + 1)
    b = np.where(2 * j == n, 1.0, 2.0)
    w = 1 - (b / (4 * j**2 - 1) * np.cos(2 * np.outer(k, j) * np.pi / n)).sum(1)
    w *= np.where((k == 0) | (k == n), 0.5, 1.0) / n
    alphas = (1 - np.cos(k * np.pi / n)) / 2
    alphas = np.where(2 * k < n, alphas, np.where(2 * k > n, 1 - alphas[::-1], 0.5))  # symmetric to the last bit
    return [(float(a), float(b)) for a, b in zip(alphas, w, strict=True)]


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


def difference_of(context: Context, base: str, tuned: str) -> dict[str, Tensor]:
    """`θ_tuned − θ_base` by parameter name, float32, on the body's device; the last pair's is kept."""
    kept: dict[tuple[str, str], dict[str, Tensor]] = context.__dict__.setdefault("_differences", {})
    if (base, tuned) not in kept:
        kept.clear()  # one context may hold many tuned minds; their differences are as large as the model
        kept[base, tuned] = {k: d.to(context.minds.body.device) for k, d in context.minds.delta(base, tuned)}
    return kept[base, tuned]


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
        total = float(sum(w * known[a].by_unit.sum(1).mean() for a, w in rule(n)))
        e_from, e_to = known[0.0].values, known[1.0].values
        if within(total, float(e_from.mean()), float(e_to.mean()), tolerance) or 2 * n > max_nodes:
            break
        n *= 2
    with context.open(from_mind) as body:
        places, modules = tuple(ledger_units(body)), tuple(modules_of(body))
    return collect(known, n, places, modules)


def collect(
    known: Mapping[float, Entries], n: int, places: tuple[LedgerUnit, ...], modules: tuple[str, ...]
) -> Integral:
    """The integral from what is known at the nodes for `n` intervals."""
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
    )


def check(nodes: int, max_nodes: int, tolerance: float) -> None:
    """Raise a UserError where the numbers of a quadrature are out of range."""
    if nodes < 1 or max_nodes < nodes or tolerance <= 0:
        raise UserError("ledger: --nodes must be at least 1, --max-nodes not less, and --tolerance above 0.")


def within(total: float, e_from: float, e_to: float, tolerance: float) -> bool:
    """Whether the entries sum to the change of the readout closely enough."""
    scale = max(abs(e_from), abs(e_to))
    return abs(total - (e_to - e_from)) <= max(tolerance * scale, FLOOR)


def _sum(parts: Iterable[NDArray[np.float64]]) -> NDArray[np.float64]:
    found = list(parts)
    return np.sum(found, axis=0)


rule = nodes  # `integrate` has an argument of that name
