"""The ledger: the effect lost between two minds, split over Units by integrated gradients in weight space.

With `θ(α) = θ_base + α (θ_tuned − θ_base)` and E the effect of the chain on the answer (`faithfulness.effect`),

    A_c = ∫₀¹ ⟨∂E/∂θ_c at θ(α), θ_tuned,c − θ_base,c⟩ dα        Σ_c A_c = E(tuned) − E(base)

1. Nodes α and weights by Gauss–Legendre on [0, 1]; `θ(α)` is formed in float32, tensor by tensor.
2. At a node, one forward and one backward pass over clean and corrupt chains.  No gradient of a weight is formed: a
   leaf that is linear in its parameters, y = f(x; θ), has the entry `Σ_t ⟨∂E/∂y_t, f(x_t; Δθ)⟩`, which is a number per
   row and per output feature.  Features of q, k and v belong to heads; the output projection is split by its *inputs*.
   So one backward pass gives entries per trace, per head and per circuit, and the bootstrap over traces is free.
3. The sum over nodes and Units is compared with E(tuned) − E(base), computed by itself.  Where the residual, relative to
   max(|E(base)|, |E(tuned)|), exceeds the tolerance, the number of nodes is doubled.

Integrated gradients: Sundararajan et al. 2017 (arXiv:1703.01365), here along weights instead of inputs.  A positive
entry is effect gained by tuning, a negative one effect lost; both in nats of the answers' log-probability ratio.
A tied embedding has two entries, one for each use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from einops import rearrange, reduce
from jaxtyping import Float
from torch import Tensor

from reasoninterp.errors import UserError
from reasoninterp.models.body import Body
from reasoninterp.models.context import Context, Item
from reasoninterp.models.leaves import Leaf
from reasoninterp.models.minds import blend
from reasoninterp.models.units import units
from reasoninterp.patching.metric import contrast_plan
from reasoninterp.severance.effects import loss_of
from reasoninterp.stats import matrix_intervals
from reasoninterp.study import Batch, Cell, Row, Study


class LedgerUnit(NamedTuple):
    """A place in the ledger: the finest Unit, with the block that holds it."""

    name: str
    layer: int | None
    kind: str
    head: int | None
    circuit: str | None
    block: str


def ledger_units(body: Body) -> list[LedgerUnit]:
    """The finest Units in the order of the forward pass; a tied embedding is listed once for each use."""
    out = [
        LedgerUnit(u.name, u.layer, u.kind, u.head, u.circuit, _block(u.name, u.kind, u.layer))
        for u in units(body, "circuit")
    ]
    if body.tied:
        out.append(LedgerUnit("unembed", None, "unembed", None, None, "unembed"))
    return out


def _block(name: str, kind: str, layer: int | None) -> str:
    return f"L{layer}.attn" if kind in ("head", "attn") and layer is not None else name


def nodes(n: int) -> list[tuple[float, float]]:
    """Gauss–Legendre nodes on [0, 1] with their weights, which sum to 1."""
    x, w = np.polynomial.legendre.leggauss(n)
    return [(float((a + 1) / 2), float(b / 2)) for a, b in zip(x, w, strict=True)]


def entries(
    body: Body, delta: Mapping[str, Tensor], run: Callable[[], Float[Tensor, " contrast"]], rows: Sequence[int]
) -> tuple[Float[Tensor, "contrast unit"], Float[Tensor, " contrast"]]:
    """Directional derivatives of each contrast's effect along `delta`, one per finest Unit.

    Args:
        body: at the weights θ(α).
        delta: `θ_tuned − θ_base` by parameter name, float32.
        run: one forward pass with graph, giving the effect per contrast.
        rows: for each row of that forward pass, its contrast.

    Returns:
        `⟨∂E_i/∂θ_c, Δθ_c⟩` as [contrast, unit] in the order of `ledger_units`, and the effects [contrast].
    """
    order = {u.name: k for k, u in enumerate(ledger_units(body))}
    owner = torch.tensor(rows)
    out = torch.zeros(max(rows) + 1, len(order), dtype=torch.float64)

    def add(unit: str, per_row: Tensor) -> None:
        out[:, order[unit]].index_add_(0, owner, per_row.detach().double().cpu())

    with ExitStack() as stack:
        for leaf in body.leaves():
            if any(p.param in delta for p in leaf.params):
                stack.enter_context(leaf.watch(_watcher(body, leaf, delta, add)))
        effects = run()
        effects.sum().backward()
    return out, effects.detach()


def _watcher(
    body: Body, leaf: Leaf, delta: Mapping[str, Tensor], add: Callable[[str, Tensor], None]
) -> Callable[[Tensor, Tensor], None]:
    """Hooks a leaf's output so that its entries are added up during the backward pass."""

    def watch(x: Tensor, y: Tensor) -> None:
        x = x.detach()

        def on_gradient(g: Tensor) -> None:
            for unit, per_row in leaf_entries(body, leaf, x, g.float(), delta):
                add(unit, per_row)

        y.register_hook(on_gradient)

    return watch


def leaf_entries(
    body: Body, leaf: Leaf, x: Tensor, g: Tensor, delta: Mapping[str, Tensor]
) -> Iterator[tuple[str, Float[Tensor, " row"]]]:
    """Entries of one leaf: `⟨∂E/∂y, f(x; Δθ)⟩` per row, split over the Units that its features belong to."""
    letter = "G" if body.is_gqa else "H"
    if leaf.role == "o":
        weight = leaf.weight.of(delta[leaf.weight.param]) if leaf.weight.param in delta else None
        if weight is not None:
            weight = weight.T if leaf.kind == "conv1d" or leaf.transposed else weight  # [d_model, head * d_head]
            per_input = x.float() * (g @ weight)
            split = reduce(per_input, "row pos (group d) -> row group", "sum", group=body.n_kv_heads)
            for group in range(body.n_kv_heads):
                yield f"L{leaf.layer}.{letter}{group}.OV", split[:, group]
        if leaf.bias is not None and leaf.bias.param in delta:
            yield f"L{leaf.layer}.attn.b_O", (g @ leaf.bias.of(delta[leaf.bias.param])).sum(-1)
        return
    product = g * leaf.apply(x, delta)
    if leaf.role in ("q", "k", "v"):
        circuit = "OV" if leaf.role == "v" else "QK"
        split = reduce(product, "row pos (group d) -> row group", "sum", group=body.n_kv_heads)
        for group in range(body.n_kv_heads):
            yield f"L{leaf.layer}.{letter}{group}.{circuit}", split[:, group]
        return
    total = rearrange(product, "row ... -> row (...)").sum(-1)
    if leaf.layer is None:
        yield leaf.role, total
    else:
        yield f"L{leaf.layer}.{'mlp' if leaf.role.startswith('mlp') else 'norms'}", total


class Ledger(Study):
    """What tuning cost the effect of the chain, split over Units of weight; sums to the loss.

    Parameters:
        nodes: Gauss–Legendre nodes to begin with.
        max_nodes: where doubling ends.
        tolerance: largest residual, relative to the larger |E|, with which it is content.
        from_mind: the mind where the path begins.
        to_mind: the mind where it ends.
    """

    nodes: int = 16
    max_nodes: int = 64
    tolerance: float = 0.005
    from_mind: str = "base"
    to_mind: str = "tuned"

    def search(self, context: Context, evaluate: Callable[..., list[list[Row]]]) -> None:
        """Evaluate both ends, then nodes, doubling their number until the entries sum to the loss."""
        if self.nodes < 1 or self.tolerance <= 0:
            raise UserError("ledger: --nodes must be at least 1 and --tolerance above 0.")
        items = [i for i in context.items if i.contrast is not None]
        if not items:
            return
        e_base, e_tuned = (_mean(evaluate(*self._cells(context, items, a, 0)), "effect") for a in (0.0, 1.0))
        n = self.nodes
        while True:
            total = 0.0
            for alpha, weight in nodes(n):
                found = evaluate(*self._cells(context, items, alpha, n))
                total += weight * float(np.mean([np.sum(rows[0]["entries"]) for rows in found]))
            residual = abs(total - (e_tuned - e_base)) / max(abs(e_base), abs(e_tuned), 1e-12)
            if residual <= self.tolerance or 2 * n > self.max_nodes:
                return
            n *= 2

    def _cells(self, context: Context, items: Sequence[Item], alpha: float, n: int) -> list[Cell]:
        """One cell per contrast at one node (`n` = 0: an end, where only the effect is wanted)."""
        handle = blend(self.from_mind, self.to_mind, alpha)
        return [
            Cell(
                key=f"{n}/{alpha!r}/{item.id}/{item.digest[:8]}",
                group=handle,
                labels={"trace": item.id, "alpha": alpha, "n_nodes": n},
                item=item,
            )
            for item in items
        ]

    def measure(self, context: Context, batch: Batch) -> Iterable[Row]:
        """One row per contrast: its effect at this node and, inside the path, its entries."""
        plan = contrast_plan(context, [cell.item.contrast for cell in batch])
        if batch[0].labels["n_nodes"] == 0:
            with torch.no_grad():
                values = plan.effects(context.body)
            for cell, effect in zip(batch, values.tolist(), strict=True):
                yield cell.row(effect=effect, entries=[])
            return
        delta = difference_of(context, self.from_mind, self.to_mind)
        found, values = entries(context.body, delta, lambda: plan.effects(context.body, grad=True), plan.owner)
        for cell, effect, row in zip(batch, values.tolist(), found.tolist(), strict=True):
            yield cell.row(effect=effect, entries=row)

    def summarise(self, rows: pd.DataFrame, context: Context) -> dict[str, pd.DataFrame]:
        """`ledger` (circuits and blocks), `ledger_total` (one row) and `ledger_traces` (blocks per trace)."""
        with context.open(self.from_mind) as body:
            names = ledger_units(body)
            changes = weight_changes(body, difference_of(context, self.from_mind, self.to_mind))
        if not len(rows):
            return {"ledger": pd.DataFrame(columns=LEDGER_COLUMNS), "ledger_total": pd.DataFrame()}
        n = int(rows["n_nodes"].max())
        used = rows[rows["n_nodes"] == n]
        traces = list(dict.fromkeys(used["trace"]))
        place = {t: k for k, t in enumerate(traces)}
        weight = dict(nodes(n))
        values = np.zeros((len(traces), len(names)))
        for trace, alpha, row in zip(used["trace"], used["alpha"], used["entries"], strict=True):
            values[place[trace]] += weight[alpha] * np.asarray(row)
        blocks = list(dict.fromkeys(u.block for u in names))
        member = np.array([[float(u.block == b) for b in blocks] for u in names])
        at_blocks = values @ member
        block_info = {u.block: u for u in names}
        table = pd.concat(
            [
                _table(values, names, changes, "circuit", context.seed),
                _table(
                    at_blocks,
                    [_as_block(b, block_info[b]) for b in blocks],
                    {b: float(np.sqrt(sum(changes[u.name] ** 2 for u in names if u.block == b))) for b in blocks},
                    "block",
                    context.seed,
                ),
            ],
            ignore_index=True,
        )
        ends = rows[rows["n_nodes"] == 0].pivot(index="trace", columns="alpha", values="effect").loc[traces]
        along = used.groupby("alpha")["effect"].mean()
        total = _total(ends, values, n, self.tolerance, along, context.seed)
        long = pd.DataFrame(at_blocks, columns=blocks).assign(trace=traces)
        per_trace = long.melt(id_vars="trace", var_name="unit", value_name="attribution")
        return {"ledger": table, "ledger_total": total, "ledger_traces": per_trace}


LEDGER_COLUMNS = [
    "unit", "layer", "kind", "head", "circuit", "level", "attribution", "ci_low", "ci_high", "weight_change", "n",
]  # fmt: skip


def difference_of(context: Context, base: str, tuned: str) -> dict[str, Tensor]:
    """`θ_tuned − θ_base` by parameter name, float32, on the body's device; kept for the run."""
    kept: dict[tuple[str, str], dict[str, Tensor]] = context.__dict__.setdefault("_differences", {})
    if (base, tuned) not in kept:
        kept[base, tuned] = {k: d.to(context.minds.body.device) for k, d in context.minds.delta(base, tuned)}
    return kept[base, tuned]


def weight_changes(body: Body, delta: Mapping[str, Tensor]) -> dict[str, float]:
    """Frobenius norm of each finest Unit's weight change (a tied embedding counts in full for either use)."""
    out = {}
    for unit in units(body, "circuit"):
        parts = [part.of(delta[part.param]).square().sum() for part in unit.parts if part.param in delta]
        out[unit.name] = float(torch.stack(parts).sum().sqrt()) if parts else 0.0
    if body.tied:
        out["unembed"] = out["embed"]
    return out


def _as_block(name: str, unit: LedgerUnit) -> LedgerUnit:
    kind = "attn" if name.endswith(".attn") else unit.kind
    return LedgerUnit(name, unit.layer, kind, None, None, name)


def _table(
    values: np.ndarray, names: Sequence[LedgerUnit], changes: Mapping[str, float], level: str, seed: int
) -> pd.DataFrame:
    low, high = matrix_intervals(values, seed=seed)
    return pd.DataFrame(
        {
            "unit": [u.name for u in names],
            "layer": pd.array([u.layer for u in names], dtype="Int64"),
            "kind": [u.kind for u in names],
            "head": pd.array([u.head for u in names], dtype="Int64"),
            "circuit": [u.circuit or "" for u in names],
            "level": level,
            "attribution": values.mean(0),
            "ci_low": low,
            "ci_high": high,
            "weight_change": [changes[u.name] for u in names],
            "n": len(values),
        }
    )[LEDGER_COLUMNS]


def _total(
    ends: pd.DataFrame, values: np.ndarray, n_nodes: int, tolerance: float, along: pd.Series, seed: int
) -> pd.DataFrame:
    loss = loss_of(ends[0.0].to_numpy(), ends[1.0].to_numpy(), seed=seed)
    e_base, e_tuned = float(ends[0.0].mean()), float(ends[1.0].mean())
    total = float(values.mean(0).sum())
    residual = total - (e_tuned - e_base)
    relative = abs(residual) / max(abs(e_base), abs(e_tuned), 1e-12)
    warnings = []
    if relative > tolerance:
        warnings.append(f"the residual is above the tolerance of {tolerance:.1%}: use more nodes")
    if float(along.min()) < min(e_base, e_tuned) - 0.1 * max(abs(e_base), abs(e_tuned)):
        warnings.append(f"between the two minds E falls to {along.min():.2f}, below both ends")
    if float(along.max()) > max(e_base, e_tuned) + 0.1 * max(abs(e_base), abs(e_tuned)):
        warnings.append(f"between the two minds E rises to {along.max():.2f}, above both ends")
    row: dict[str, Any] = {
        "e_base": e_base,
        "e_tuned": e_tuned,
        "loss": e_tuned - e_base,
        "loss_ci_low": loss.ci_low,
        "loss_ci_high": loss.ci_high,
        "total": total,
        "residual": residual,
        "residual_relative": relative,
        "n_nodes": n_nodes,
        "n": len(values),
        "warning": "; ".join(warnings),
    }
    return pd.DataFrame([row])


def _mean(found: Sequence[Sequence[Row]], column: str) -> float:
    return float(np.mean([rows[0][column] for rows in found]))
