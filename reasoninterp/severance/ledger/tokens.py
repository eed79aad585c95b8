"""The heat of the loss over the text: a trace's ledger entries by the token at which the changed weights act.

A leaf product `⟨∂E/∂y_t, f(x_t; Δθ)⟩` belongs to a position t: what the difference of the weights, applied at that
token, does to the effect in the end.  Summed over Units and integrated along the straight path, the entries of all
positions of the clean and the corrupt chain sum to the trace's own change of E.  A head's `v` counts at the token that
is read, its `q` and `o` at the token that reads; the unembedding at the tokens before the answer's.  Where tuning only
scaled what a head reads or writes, an aligned mind may bear the change in `v` or in `o`: the Unit's entry is the same,
its tokens are not.

Answers of several tokens are read in two rows, which share the prompt: its positions are summed over both, and those
of the answers are listed by whose answer they hold (`answer` is `clean` or `corrupt`, else "").

Entries of a trace have no interval; each table says by how much the trace's sum misses its own change of E (`residual`,
nats).  Parts of the text that traces have in common are averaged over them, with intervals (`ledger_token_parts`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import pandas as pd
from torch import Tensor

from reasoninterp.models.body import Body
from reasoninterp.models.context import Context
from reasoninterp.models.minds import blend
from reasoninterp.patching.metric import ContrastPlan, contrast_plan
from reasoninterp.severance.gauge.aligned import Asked, aligned, alignment_table, each_mind, group_of
from reasoninterp.severance.ledger.integrate import difference_along
from reasoninterp.severance.ledger.products import Products
from reasoninterp.severance.ledger.quadrature import nodes
from reasoninterp.stats import matrix_intervals
from reasoninterp.study import Batch, Cell, Row, Study
from reasoninterp.traces.contrast import Contrast

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIDES = ("clean", "corrupt")


class Place(NamedTuple):
    """A token of one side of a contrast."""

    side: str
    answer: str
    pos: int


class Heat(NamedTuple):
    """Of one contrast at one node: its entries by place and block, and its effect; nats."""

    entries: dict[Place, dict[str, float]]
    effect: float


def token_entries(body: Body, delta: Mapping[str, Tensor], plan: ContrastPlan) -> list[Heat]:
    """Directional derivatives of each contrast's effect by token and block, at the weights that are in.

    Args:
        body: at θ(α).
        delta: `θ_to − θ_from` by parameter name, float32.
        plan: the contrasts' rows.

    Returns:
        For each contrast by place and block, nats, and its effect; they sum to the contrast's entries.
    """
    products = Products(body, delta, tokens=True)
    with products.watch(len(plan.both.ids), plan.both.positions) as sums:
        effects = plan.effects(body, grad=True)
        effects.sum().backward()  # type: ignore[no-untyped-call]
    found = {block: t.cpu().numpy() for block, t in sums.per_token.items()}
    out: list[dict[Place, dict[str, float]]] = [{} for _ in range(plan.n)]
    seen: dict[int, int] = {}
    for row, item in enumerate(plan.both.item_of_row.tolist()):
        side, owner = divmod(item, plan.n)
        which = seen[item] = seen.get(item, -1) + 1
        prompt = len(plan.prompts[side][owner])
        for block, heat in found.items():
            for pos in np.flatnonzero(heat[row]):
                answer = "" if pos < prompt else SIDES[which]
                place = out[owner].setdefault(Place(SIDES[side], answer, int(pos)), {})
                place[block] = place.get(block, 0.0) + float(heat[row, pos])
    return [Heat(entries, effect) for entries, effect in zip(out, effects.tolist(), strict=True)]


def texts_of(context: Context, contrast: Contrast, place: Place) -> tuple[str, str]:
    """The token at a place, and the part of the trace that it belongs to (`step 0`, `question`, `answer`, …)."""
    from dataclasses import replace

    trace = contrast.clean if place.side == "clean" else contrast.corrupt
    if place.answer:
        trace = replace(trace, answer=contrast.clean.answer if place.answer == "clean" else contrast.corrupt.answer)
    tokens = context.encode(trace)
    if place.pos >= len(tokens.ids):
        return "", "after_answer"
    part = next(key for key, span in tokens.spans.items() if span.start <= place.pos < span.stop)
    name = f"step {part[1]}" if part[0] == "step" else part[0]
    return str(context.tokenizer.decode([tokens.ids[place.pos]])), name


class LedgerTokens(Study):
    """The heat of the loss over the text: ledger entries of some traces, token by token.

    Parameters:
        traces: how many traces (the first ones that have a contrast).
        nodes: intervals between nodes; 0 takes as many as the ledger needed.
        from_mind: the mind where the path begins.
        to_mind: the mind where it ends.
        align: bring the tuned mind into the base's gauge first (`severance.gauge.aligned`).
    """

    needs: ClassVar[tuple[str, ...]] = ("ledger",)
    traces: int = 8
    nodes: int = 0
    from_mind: str = "base"
    to_mind: str = "tuned"
    align: bool = True

    def cells(self, context: Context) -> Iterable[Cell]:
        """Every node × trace."""
        items = [i for i in context.items if i.contrast is not None][: self.traces]
        if not items:
            return
        n = self.nodes or int(context.table("ledger_total")["n_nodes"].iloc[0]) - 1
        end = aligned(context, self.from_mind, self.to_mind, align=self.align).mind
        for alpha, weight in nodes(n):
            handle = blend(self.from_mind, end, alpha)
            for item in items:
                yield Cell(
                    key=f"{n}/{alpha!r}/{item.id}/{item.digest[:8]}",
                    group=group_of(context, handle),
                    labels={"trace": item.id, "alpha": alpha, "weight": weight},
                    item=Asked(handle, item),
                )

    def measure(self, context: Context, batch: Batch) -> Iterable[Row]:
        """One row per token and block, at this node."""
        for part in each_mind(context, batch, self.from_mind, self.to_mind, align=self.align):
            yield from self._at_node(context, part)

    def _at_node(self, context: Context, batch: Batch) -> Iterable[Row]:
        """Rows of cells that share a node, whose weights are in."""
        delta = difference_along(context, batch[0].item.handle)
        contrasts = [asked.item.contrast for asked in batch.items]
        found = token_entries(context.body, delta, contrast_plan(context, contrasts))
        for cell, contrast, heat in zip(batch, contrasts, found, strict=True):
            for place in sorted(heat.entries):
                token, part = texts_of(context, contrast, place)
                for block, value in heat.entries[place].items():
                    about = {**place._asdict(), "token": token, "part": part, "unit": block}
                    yield cell.row(**about, entry=value, effect=heat.effect)

    def summarise(self, rows: pd.DataFrame, context: Context) -> dict[str, pd.DataFrame]:
        """`ledger_tokens` (a token a row; all Units), `ledger_token_units` (part of a trace × block),
        `ledger_token_parts` (part × block, mean over the traces that have the part), `ledger_tokens_alignment` (notes)."""
        notes = alignment_table(aligned(context, self.from_mind, self.to_mind, align=self.align))
        by = ["trace", "side", "answer", "pos", "token", "part"]
        if not len(rows):
            empty = pd.DataFrame(columns=[*by, "attribution", "residual", "n_nodes"])
            tables = {
                "ledger_tokens": empty,
                "ledger_token_units": pd.DataFrame(),
                "ledger_token_parts": pd.DataFrame(),
            }
            return {**tables, "ledger_tokens_alignment": notes}
        rows = rows.assign(attribution=rows["weight"] * rows["entry"])
        about = checks(rows)
        tokens = rows.groupby(by, as_index=False)["attribution"].sum().merge(about, on="trace")
        tokens = tokens.sort_values(["trace", "side", "pos", "answer"], ignore_index=True)
        where = ["trace", "side", "part", "unit"]
        n_tokens = rows.drop_duplicates([*by, "unit"]).groupby(where, as_index=False).size()
        blocks = rows.groupby(where, as_index=False)["attribution"].sum()
        blocks = blocks.merge(n_tokens.rename(columns={"size": "n_tokens"}), on=where).merge(about, on="trace")
        means = part_means(blocks, context.seed)
        tables = {"ledger_tokens": tokens, "ledger_token_units": blocks, "ledger_token_parts": means}
        return {**tables, "ledger_tokens_alignment": notes}

    def draw(self, summary: Any) -> Figure | None:
        """The text of the trace with the largest heat, each token on its colour."""
        table = summary["ledger_tokens"]
        if not len(table):
            return None
        heat = table.assign(size=table["attribution"].abs()).groupby("trace")["size"].sum()
        return draw_heat(table[table["trace"] == heat.idxmax()])


def checks(rows: pd.DataFrame) -> pd.DataFrame:
    """By trace: `residual`, the sum of its entries less its change of E in nats, and `n_nodes`."""
    out = []
    for trace, mine in rows.groupby("trace", sort=False):
        ends = mine.groupby("alpha")["effect"].first().reindex([0.0, 1.0])
        change = float(ends[1.0] - ends[0.0])
        total = float(mine["attribution"].sum())
        out.append({"trace": trace, "residual": total - change, "n_nodes": rows["alpha"].nunique()})
    return pd.DataFrame(out)


def part_means(blocks: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Mean entries of each side's parts by block, over the `n` traces that have the part, with intervals."""
    out = []
    for (side, part), mine in blocks.groupby(["side", "part"], sort=False):
        # a block that did nothing on a part of a trace has no row there
        wide = mine.pivot(index="trace", columns="unit", values="attribution").fillna(0.0)
        low, high = matrix_intervals(wide.to_numpy(np.float64), seed=seed)
        columns = {"unit": wide.columns, "attribution": wide.mean().to_numpy(), "ci_low": low, "ci_high": high}
        residual = float(mine.drop_duplicates("trace")["residual"].abs().max())
        out.append(pd.DataFrame(columns).assign(side=side, part=part, n=len(wide), largest_residual=residual))
    order = ["side", "part", "unit", "attribution", "ci_low", "ci_high", "largest_residual", "n"]
    return pd.concat(out, ignore_index=True)[order]


def draw_heat(table: pd.DataFrame, columns: int = 24) -> Figure:
    """Heat over the text of one trace, clean chain above the corrupt one; purple is effect lost, green gained."""
    from reasoninterp.figures import diverging, figure, style

    limit = float(table["attribution"].abs().max()) or 1.0
    lines = {side: _lines(table[table["side"] == side], columns) for side in SIDES}
    with style():
        height = 1.0 + 0.42 * sum(len(rows) for rows in lines.values())
        fig = figure(9.6, height)
        axes = fig.subplots(2, 1, height_ratios=[max(1, len(lines[s])) for s in SIDES])
        for ax, side in zip(axes, SIDES, strict=True):
            ax.set_xlim(0, columns)
            ax.set_ylim(len(lines[side]), 0)
            ax.axis("off")
            ax.set_title(f"{side} chain", loc="left")
            for y, line in enumerate(lines[side]):
                for x, (token, value) in enumerate(line):
                    colour = diverging()(0.5 + 0.5 * value / limit)
                    box = {"facecolor": colour, "edgecolor": "none", "boxstyle": "square,pad=0.25"}
                    shown = token.replace("\n", "⏎").replace(" ", "␣").replace("$", r"\$")
                    dark = sum(colour[:3]) < 1.5
                    ax.text(
                        x + 0.5, y + 0.5, shown, ha="center", va="center", fontsize=8, bbox=box,
                        color="white" if dark else "black",
                    )  # fmt: skip
        fig.supxlabel(f"entry of the weights' difference at each token, nats (full colour: {limit:.2f})", fontsize=8)
    return fig


def _lines(table: pd.DataFrame, columns: int) -> Sequence[Sequence[tuple[str, float]]]:
    cells = list(zip(table["token"], table["attribution"], strict=True))
    return [cells[at : at + columns] for at in range(0, len(cells), columns)]
