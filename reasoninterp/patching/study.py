"""Any sweep from the command line: `reasoninterp run sweep --components z --spans answer --source base`.

One row per mind × trace × direction × cell, as `sweep` gives them, and a table of means over traces: the effect in nats
first, with its standardised size and its p-value, then the other metrics.  With a mind as source this is cross-model
patching: each other mind is read with that mind's activations put in, on the same chains.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import pandas as pd

from reasoninterp.models.context import Context
from reasoninterp.patching.budget import Sweeping
from reasoninterp.patching.cells import PER_HEAD, Sites
from reasoninterp.patching.metric import DIRECTIONS
from reasoninterp.patching.setting import CROSS
from reasoninterp.patching.sweep import sweep_cells
from reasoninterp.stats import effect_sizes, estimate
from reasoninterp.study import Batch, Cell, Row, Study

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BY = ["mind", "direction", "source", "component", "layer", "window", "head", "site", "column", "column_index"]
UNSIGNED = ("kl", "rank_clean", "rank_corrupt")  # no null about which their signs could flip
MEASURES = ("value", "logp_clean", "logp_corrupt", *UNSIGNED)


class SweepStudy(Sweeping, Study):
    """Exact activation patching of chosen sites and spans, from the other chain, another mind, a mean or zero.

    Parameters:
        components: resid_pre, resid_mid, resid_post, attn_out, mlp_out, z, q, k, v, pattern.
        layers: which layers; all if none are given.
        heads: each head by itself, or all together.
        window: layers patched at once.
        spans: columns (question, every step, answer position), tokens, chain, question or answer.
        directions: denoising patches the corrupt run, noising the clean one.
        source: other_run, zero, mean, same_answer, random, or a mind's name.
        metrics: logit_diff, logp, rank, kl.
        max_traces: at most so many aligned contrasts a mind; 0 for all.
    """

    name: ClassVar[str] = "sweep"

    components: tuple[str, ...] = ("resid_pre",)
    layers: tuple[int, ...] = ()
    heads: Literal["each", "all"] = "each"
    window: int = 1
    spans: Literal["columns", "tokens", "chain", "question", "answer"] = "columns"
    directions: Literal["both", "denoising", "noising"] = "both"
    source: str = "other_run"
    metrics: tuple[str, ...] = ("logit_diff",)
    max_traces: int = 128

    def cells(self, context: Context) -> Iterable[Cell]:
        """Every mind (but the source) × item whose contrast is aligned."""
        cells = context.contrast_cells(aligned=True, most=self.max_traces or None)
        return (cell for cell in cells if cell.group != self.source)

    def measure(self, context: Context, batch: Batch) -> Iterable[Row]:
        """The sweep's rows."""
        return sweep_cells(context, batch, **self.sweep_arguments())

    def sweep_arguments(self) -> dict[str, Any]:
        """What the parameters say, as `sweep` takes it."""
        return {
            "sites": Sites(self.components, self.layers or None, self.heads, self.window, self.spans),
            "directions": DIRECTIONS if self.directions == "both" else (self.directions,),
            "source": self.source,
            "metrics": self.metrics,
        }

    def summarise(self, rows: pd.DataFrame, context: Context) -> pd.DataFrame:
        """`sweep`: mind, direction, source, component, layer, window, head, site, column, column_index, measure, value,
        ci_low, ci_high, n, method, d, p, p_corrected.

        `measure` is `value` (the effect in nats), `logp_*` (changes in bits), `rank_*` or `kl` (bits); p-values are
        corrected (Benjamini–Hochberg) over the map of one mind, direction and component.
        """
        sizes = ["measure", "value", "ci_low", "ci_high", "n", "method", "d", "p", "p_corrected"]
        if not len(rows):
            return pd.DataFrame(columns=[*BY, *sizes])
        head = ("H" + rows["head"].astype(str)).where(rows["head"] >= 0, "")
        frame = rows.assign(site="L" + rows["layer"].astype(str) + head)
        parts = []
        for name in (m for m in MEASURES if m in frame):
            live = frame[frame[name].notna()]
            if not len(live):
                continue
            if name in UNSIGNED:
                found = estimate(live, by=BY, value=name, kind="mean", seed=context.seed)
            else:
                family = ["mind", "direction", "component"]
                found = effect_sizes(live, BY, name, family=family, seed=context.seed)
            parts.append(found.assign(measure=name))
        if not parts:
            return pd.DataFrame(columns=[*BY, *sizes])
        table = pd.concat(parts, ignore_index=True).reindex(columns=[*BY, *sizes])
        rank = {order: k for k, order in enumerate(sorted(table["column_index"].unique()))}
        table["column_index"] = table["column_index"].map(rank)
        return table

    def draw(self, summary: pd.DataFrame) -> dict[str, Figure]:
        """One map a component and direction: layers (and heads) × columns, one panel a mind."""
        from reasoninterp.figures import heatmap

        out: dict[str, Figure] = {}
        effects = summary[summary["measure"] == "value"]
        for (component, direction), rows in effects.groupby(["component", "direction"], sort=False):
            by_head = component in PER_HEAD and self.heads == "each"
            said = f"from {self.source}" if direction == CROSS else f"{direction}"
            out[f"sweep-{component}-{direction}"] = heatmap(
                rows.sort_values(["layer", "head"], kind="stable"),
                "column",
                "site" if by_head else "layer",
                title=partial("{1}: {0}".format, f"{component}, {said}"),
                ylabel="head" if by_head else "layer",
                unit="effect in nats",
            )
        return out
