"""Cross-model patching in 2×2 form: is it this layer's own weights that changed, or what reaches them?

For one mind that runs (the *host*), one layer k, one component and some tokens, four runs, named by whose weights the
layer has and on whose upstream it works (b: base, t: tuned):

    e_bb, e_bt, e_tb, e_tt      E of the host with the component's output there from own weights (first letter),
                                computed on the input that the mind upstream (second letter) brings to them

    own         = ((e_tb − e_bb) + (e_tt − e_bt)) / 2       the tuned weights of this component for the base's
    upstream    = ((e_bt − e_bb) + (e_tt − e_tb)) / 2       the tuned input of this component for the base's
    interaction = e_tt − e_tb − e_bt + e_bb                 what takes both;  own + upstream = e_tt − e_bb

1. Both minds read both chains of every contrast; what enters each component is kept: `resid_pre` for `attn_out`, `z`
   and `resid_post` (the whole layer's output), `resid_mid` for `mlp_out`.
2. Each mind runs once more for every layer with the *other* mind's input put in at all tokens of that layer, and the
   layer's outputs are kept: weights of one on the upstream of the other.  All tokens, since attention reads them all.
3. The host runs with the component's output replaced at the tokens of one column (question, each step, the answer
   position with what follows it, or all); the rest of its stream and all that lies above are its own.
4. E is read as everywhere (`m(corrupt chain) − m(clean chain)`, nats), each chain patched from the same chain, so that
   contrasts need not be aligned.

The host's own corner (e_tt in tuned, e_bb in base) is the host as it is.  With `resid_post` at all tokens the run is the
graft whose embedding and layers below k come from the mind upstream, layer k from the mind of the weights, and the rest
from the host (a tied embedding has the upstream's weights where tokens enter and the host's where answers are read).

Patching between models after Prakash et al. 2024 (arXiv:2402.14811); the 2×2 keeps a layer's own change apart from what
it is fed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

from reasoninterp import figures
from reasoninterp.errors import UserError
from reasoninterp.models.body import Body, Hook, site
from reasoninterp.models.context import Context
from reasoninterp.models.read import margins_from_logits
from reasoninterp.patching.columns import ANSWER, columns
from reasoninterp.patching.metric import ContrastPlan, contrast_plan
from reasoninterp.severance.gauge.aligned import aligned, alignment_table
from reasoninterp.stats import estimate
from reasoninterp.study import Batch, Cell, Row, Study
from reasoninterp.traces.contrast import Contrast

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ALL = "all"
ENTERS = {"attn_out": "resid_pre", "z": "resid_pre", "resid_post": "resid_pre", "mlp_out": "resid_mid"}
CORNERS = tuple(f"{own}{up}" for own, up in product("bt", "bt"))
EFFECTS = ("own", "upstream", "interaction")
PLACE = ["host", "component", "layer", "head", "column", "column_index"]

Kept = dict[tuple[str, int], Tensor]  # (component, layer) -> [row, pos, ...]


class Where(NamedTuple):
    """A column: its label, its place, its tokens, and the contrasts whose two chains both have it."""

    label: str
    order: int
    mask: Bool[Tensor, "row pos"]
    has: NDArray[np.bool_]


class _Put(NamedTuple):
    """What is put in at a site, and where."""

    mask: Bool[Tensor, "row pos"]
    value: Tensor


def crossing(
    context: Context,
    contrasts: Sequence[Contrast],
    *,
    host: str = "tuned",
    from_mind: str = "base",
    to_mind: str = "tuned",
    components: Sequence[str] = ("attn_out", "mlp_out", "resid_post"),
    layers: Sequence[int] | None = None,
) -> pd.DataFrame:
    """The four runs at every layer, component and column.

    Args:
        context: the minds and the tokenizer.
        contrasts: what is read; need not be aligned.
        host: the mind that runs, `from_mind` or `to_mind`.
        from_mind, to_mind: base (b) and tuned (t).
        components: among `attn_out`, `mlp_out`, `resid_post`, `z` (each head by itself).
        layers: which; None for all.

    Returns:
        One row per contrast × component × layer × head × column: `contrast` (its place), `host`, `component`, `layer`,
        `head` (-1: all), `column`, `column_index`, `e_bb, e_bt, e_tb, e_tt, own, upstream, interaction` (nats).  A
        column that one of a contrast's chains lacks has no row for it.

    Raises:
        UserError: an unknown component, layer or host.
    """
    body = context.minds.body
    if wrong := [c for c in components if c not in ENTERS]:
        raise UserError(f"components: {wrong[0]!r} is not one of {', '.join(ENTERS)}.")
    if host not in (from_mind, to_mind):
        raise UserError(f"host {host!r}: give {from_mind} or {to_mind}.")
    chosen = list(range(body.n_layers)) if layers is None else list(layers)
    if wrong_layers := [k for k in chosen if not 0 <= k < body.n_layers]:
        raise UserError(f"layers: {wrong_layers[0]} is not one of 0 to {body.n_layers - 1}.")
    size = max(1, context.rows // 2)
    minds = {"b": from_mind, "t": to_mind}
    found = []
    for at in range(0, len(contrasts), size):
        table = _chunk(context, contrasts[at : at + size], host, minds, components, chosen)
        found.append(table.assign(contrast=table["contrast"] + at))
    return pd.concat(found, ignore_index=True) if found else pd.DataFrame()


def _chunk(
    context: Context,
    contrasts: Sequence[Contrast],
    host: str,
    minds: Mapping[str, str],
    components: Sequence[str],
    layers: Sequence[int],
) -> pd.DataFrame:
    """`crossing` for contrasts that fit in one forward pass."""
    plan = contrast_plan(context, contrasts)
    with torch.no_grad():
        outputs = _outputs(context, plan, minds, components, layers)
        wheres = _columns(context, plan, contrasts)
        rows = []
        with context.open(host) as body:
            own = _effects(body, plan)
            for component, layer in product(components, layers):
                for head in range(body.n_heads) if component == "z" else [-1]:
                    to_run = [(w, c) for w in wheres for c in CORNERS if not minds[c[0]] == minds[c[1]] == host]
                    puts = [_Put(w.mask, outputs[corner][component, layer]) for w, corner in to_run]
                    patched = _patched(body, plan, site(component, layer), head, puts, context.rows)
                    e = {(w.label, corner): row for (w, corner), row in zip(to_run, patched, strict=True)}
                    for where in wheres:
                        corners = {corner: e.get((where.label, corner), own) for corner in CORNERS}
                        place = dict(zip(PLACE, (host, component, layer, head, where.label, where.order), strict=True))
                        table = pd.DataFrame({"contrast": range(plan.n), **place, **_decomposed(corners)})
                        rows.append(table[where.has])
    return pd.concat(rows, ignore_index=True)


def _decomposed(e: Mapping[str, NDArray[np.float64]]) -> dict[str, NDArray[np.float64]]:
    """The four corners, both main effects and the interaction, per contrast."""
    return {
        **{f"e_{corner}": e[corner] for corner in CORNERS},
        "own": ((e["tb"] - e["bb"]) + (e["tt"] - e["bt"])) / 2,
        "upstream": ((e["bt"] - e["bb"]) + (e["tt"] - e["tb"])) / 2,
        "interaction": e["tt"] - e["tb"] - e["bt"] + e["bb"],
    }


def _outputs(
    context: Context, plan: ContrastPlan, minds: Mapping[str, str], components: Sequence[str], layers: Sequence[int]
) -> dict[str, Kept]:
    """Outputs of every component of every layer, by corner: own weights, upstream."""
    inputs: dict[str, Kept] = {}
    out: dict[str, Kept] = {}
    for letter, name in minds.items():
        with context.open(name) as body:
            wanted = {(c, k) for c, k in product({*components, *(ENTERS[c] for c in components)}, layers)}
            inputs[letter] = _record(body, plan, wanted)
            out[letter * 2] = inputs[letter]
    for own, up in (("b", "t"), ("t", "b")):
        kept = out[own + up] = {}
        with context.open(minds[own]) as body:
            for layer, enters in product(layers, sorted({ENTERS[c] for c in components})):
                wanted = {(c, layer) for c in components if ENTERS[c] == enters}
                x = inputs[up][enters, layer]
                kept |= _record(body, plan, wanted, [(site(enters, layer), _constant(x))])
    return out


def _constant(value: Tensor) -> Hook:
    return lambda _: value


def _record(
    body: Body, plan: ContrastPlan, wanted: Iterable[tuple[str, int]], hooks: Sequence[tuple[str, Hook]] = ()
) -> Kept:
    """Activations of one run, after `hooks` have acted."""
    kept: Kept = {}

    def keep(key: tuple[str, int]) -> Hook:
        def f(act: Tensor) -> None:
            kept[key] = act.detach().clone()

        return f

    watch: list[tuple[str, Hook]] = [(site(c, k), keep((c, k))) for c, k in wanted]
    body.forward(plan.both.ids, positions=plan.both.positions, hooks=[*hooks, *watch])
    return kept


def _patched(
    body: Body, plan: ContrastPlan, name: str, head: int, puts: Sequence[_Put], most_rows: int
) -> list[NDArray[np.float64]]:
    """E of every contrast, for each of some edits at one site; as many edits in one forward pass as fit."""
    at_once = max(1, most_rows // len(plan.both.ids))
    out: list[NDArray[np.float64]] = []
    for start in range(0, len(puts), at_once):
        some = puts[start : start + at_once]

        def edit(act: Tensor, some: Sequence[_Put] = some) -> Tensor:
            act = act.clone()
            for rows, put in zip(act.chunk(len(some)), some, strict=True):
                mask = put.mask.to(act.device)
                here, value = (t[..., head, :] if head >= 0 else t for t in (rows, put.value))
                here[mask] = value[mask]
            return act

        ids, positions = (t.repeat(len(some), 1) for t in (plan.both.ids, plan.both.positions))
        logits = body.forward(ids, positions=positions, hooks=[(name, edit)])
        out += [_read(plan, part) for part in logits.chunk(len(some))]
    return out


def _effects(body: Body, plan: ContrastPlan) -> NDArray[np.float64]:
    """E of every contrast without an edit, in nats."""
    return _read(plan, body.forward(plan.both.ids, positions=plan.both.positions))


def _read(plan: ContrastPlan, logits: Float[Tensor, "row read vocab"]) -> NDArray[np.float64]:
    margin = margins_from_logits(plan.both, logits).margin.double().cpu().numpy()
    found: NDArray[np.float64] = margin[plan.n :] - margin[: plan.n]
    return found


def _columns(context: Context, plan: ContrastPlan, contrasts: Sequence[Contrast]) -> list[Where]:
    """The columns of all contrasts, with masks over the rows of both sides, and last the column of all tokens."""
    n_rows, n_pos = plan.both.ids.shape
    side_of_item = [(c, side) for side in (0, 1) for c in contrasts]
    masks: dict[str, Tensor] = {}
    order: dict[str, int] = {}
    seen: dict[str, NDArray[np.int64]] = {}
    for row, item in enumerate(plan.both.item_of_row.tolist()):
        c, side = side_of_item[item]
        for column in columns(context.encode((c.clean, c.corrupt)[side])):
            mask = masks.setdefault(column.label, torch.zeros(n_rows, n_pos, dtype=torch.bool))
            stop = n_pos if column.label == ANSWER else column.span.stop  # an answer's own tokens follow its position
            mask[row, column.span.start : stop] = True
            order[column.label] = column.order
            sides = seen.setdefault(column.label, np.zeros((plan.n, 2), dtype=np.int64))
            sides[item % plan.n, side] = 1
    labels = sorted(masks, key=lambda label: order[label])
    found = [Where(label, order[label], masks[label], seen[label].min(1) > 0) for label in labels]
    whole = torch.ones(n_rows, n_pos, dtype=torch.bool)
    return [*found, Where(ALL, 10_002, whole, np.ones(plan.n, dtype=bool))]


class CrossPatch(Study):
    """Cross-model patching, 2×2: a layer's own weights against what reaches them, at each step and the answer.

    Parameters:
        components: which outputs, separated by commas: attn_out, mlp_out, resid_post, z (head by head).
        max_traces: at most so many contrasts; 0 for all.
        from_mind: the mind with the path.
        to_mind: the mind in which it may be cut.
        align: bring the tuned mind into the base's gauge first, so that a head `z` of both is one head in one basis.
    """

    components: str = "attn_out,mlp_out,resid_post"
    max_traces: int = 64
    from_mind: str = "base"
    to_mind: str = "tuned"
    align: bool = True

    def cells(self, context: Context) -> Iterator[Cell]:
        """Both minds as host × every item with a contrast."""
        items = [i for i in context.items if i.contrast is not None][: self.max_traces or None]
        for host, item in product((self.to_mind, self.from_mind), items):
            labels = {"host": host, "trace": item.id}
            yield Cell(key=f"{host}/{item.id}/{item.digest[:8]}", group=host, labels=labels, item=item)

    def measure(self, context: Context, batch: Batch) -> Iterator[Row]:
        """One row per cell, component, layer, head and column."""
        tuned = aligned(context, self.from_mind, self.to_mind, align=self.align).mind
        found = crossing(
            context,
            [item.contrast for item in batch.items],
            host=tuned if batch.mind == self.to_mind else batch.mind,
            from_mind=self.from_mind,
            to_mind=tuned,
            components=[c.strip() for c in self.components.split(",") if c.strip()],
        )
        for values in found.drop(columns="host").to_dict("records"):
            cell = batch[int(values.pop("contrast"))]
            yield cell.row(**{str(k): v for k, v in values.items()})

    def summarise(self, rows: pd.DataFrame, context: Context) -> dict[str, pd.DataFrame]:
        """`cross_patch`: one row per host, component, layer, head, column and effect (own, upstream, interaction).

        `value, ci_low, ci_high, n` in nats of E with bootstrap intervals over traces, and the means of the four runs.
        `cross_patch_alignment` has the notes of the alignment.
        """
        notes = alignment_table(aligned(context, self.from_mind, self.to_mind, align=self.align))
        if not len(rows):
            columns = [*PLACE, "effect", "value", "ci_low", "ci_high", "n"]
            return {"cross_patch": pd.DataFrame(columns=columns), "cross_patch_alignment": notes}
        means = rows.groupby(PLACE, sort=False)[[f"e_{corner}" for corner in CORNERS]].mean().reset_index()
        tables = [
            estimate(rows, by=PLACE, value=effect, kind="mean", seed=context.seed).assign(effect=effect)
            for effect in EFFECTS
        ]
        table = pd.concat(tables, ignore_index=True).merge(means, on=PLACE)
        rank = {order: k for k, order in enumerate(sorted(table["column_index"].unique()))}
        table["column_index"] = table["column_index"].map(rank)
        return {"cross_patch": table, "cross_patch_alignment": notes}

    def draw(self, summary: Mapping[str, pd.DataFrame]) -> dict[str, Figure]:
        """One map a host and effect: layer × column, a panel a component."""
        table = summary["cross_patch"]
        table = table[table["head"] < 0]
        out: dict[str, Any] = {}
        for (host, effect), part in table.groupby(["host", "effect"], sort=False):
            name = f"cross_patch_{effect}_in_{host}"
            words = partial("{1}, in {0}".format, host)
            unit = f"{effect}, nats of E"
            out[name] = figures.heatmap(part, "column", "layer", panel="component", title=words, unit=unit)
        return out
