"""The study `receiver-heads`: heads whose later steps all read the same few steps, for each mind (see `receivers`).

Traces with fewer than `proximity` + 4 steps have no score (NaN), and the tables say how many there were.  How far the
scores can be believed stands in `receiver_reliability`: a low value means that other traces would name other heads.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch

from reasoninterp.attention.grid import span_grid
from reasoninterp.attention.maps import attention_maps
from reasoninterp.attention.receivers import (
    PROXIMITY,
    head_scores,
    split_half,
    steps_needed,
    vertical_scores,
)
from reasoninterp.attention.sinks import SinkRule, kinds_of_rows
from reasoninterp.models.context import Context
from reasoninterp.stats import estimate
from reasoninterp.study import Batch, Cell, Row, Study

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_HEAD_COLUMNS = ["mind", "layer", "head", "value", "ci_low", "ci_high", "n", "n_traces", "n_too_short", "top_step"]
_RELIABILITY = [
    "mind", "value", "ci_low", "ci_high", "half", "n", "n_heads", "n_splits", "seed", "n_traces", "n_too_short", "note"
]  # fmt: skip


class ReceiverHeads(Study):
    """Receiver heads: kurtosis of the vertical scores of step-to-step attention, with split-half reliability.

    Parameters:
        max_traces: at most so many traces a mind.
        proximity: a step's readers are the steps at least so much later.
        control: `none`, `depth` (rows multiplied by the steps they can read) or `rank` (ranks within a row).
        exclude_sinks: leave attention sinks out (a step that holds a delimiter can be read for that alone).
    """

    max_traces: int = 128
    proximity: int = PROXIMITY
    control: str = "none"
    exclude_sinks: bool = False

    def cells(self, context: Context) -> Iterable[Cell]:
        """Every mind × trace, up to `max_traces`."""
        for mind in context.minds.names:
            for item in context.items[: self.max_traces]:
                yield context.cell(mind, item)

    def measure(self, context: Context, batch: Batch) -> Iterable[Row]:
        """One row per cell, layer and head: kurtosis, and the step (from 1) with the highest vertical score, or NaN."""
        encoded = [context.encode(cell.item.trace) for cell in batch]
        grid = span_grid([tokens.steps for tokens in encoded], lengths=[len(t.prompt_ids) for t in encoded])
        rows = [torch.tensor(tokens.prompt_ids, dtype=torch.long) for tokens in encoded]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        rule = SinkRule() if self.exclude_sinks else None
        kinds = kinds_of_rows([t.prompt_ids for t in encoded], context.tokenizer, rule) if rule else None
        found = attention_maps(context.body, ids, grid, kinds=["plain_per_key"], sinks=rule, token_kinds=kinds)
        maps = (found.excluded if rule else found.kept)["plain_per_key"].double().numpy()
        for k, cell in enumerate(batch):
            n_steps = len(encoded[k].steps)
            matrix = maps[:, k, :, :n_steps, :n_steps]
            vertical = vertical_scores(matrix, proximity=self.proximity, control=self.control)
            scores = head_scores(vertical)
            scored = (~np.isnan(vertical)).any((0, 1)).sum() if n_steps else 0
            for layer, head in np.ndindex(scores.shape):
                column = vertical[layer, head]
                yield cell.row(
                    layer=layer,
                    head=head,
                    value=float(scores[layer, head]),
                    top_step=float(np.nanargmax(column) + 1) if scored else np.nan,
                    n_steps=n_steps,
                    n_scored=int(scored),
                )

    def summarise(self, rows: pd.DataFrame, context: Context) -> dict[str, pd.DataFrame]:
        """`receiver_heads`: mean kurtosis per mind, layer and head over the `n` traces that are long enough.

        `n_too_short` of `n_traces` traces have too few steps; `top_step` is the step that most often has the highest
        vertical score.  `receiver_reliability`: split-half reliability over traces, per mind.
        """
        if not len(rows):
            return {
                "receiver_heads": pd.DataFrame(columns=_HEAD_COLUMNS),
                "receiver_reliability": pd.DataFrame(columns=_RELIABILITY),
            }
        short = rows.assign(short=rows["n_steps"] < steps_needed(self.proximity)).drop_duplicates(["mind", "trace"])
        counts = short.groupby("mind", sort=False)["short"].agg(["size", "sum"])
        by = ["mind", "layer", "head"]
        heads = estimate(rows, by=by, value="value", kind="mean", seed=context.seed)
        common = rows[rows["value"].notna()].groupby(by)["top_step"].agg(lambda s: s.mode().min())
        heads["top_step"] = [common.get(tuple(place), np.nan) for place in heads[by].itertuples(index=False)]
        heads["n_traces"] = heads["mind"].map(counts["size"])
        heads["n_too_short"] = heads["mind"].map(counts["sum"]).astype(int)
        heads = heads.sort_values(["mind", "value"], ascending=[True, False], ignore_index=True)
        found = []
        for mind, part in rows.groupby("mind", sort=False):
            wide = part.pivot(index="trace", columns=["layer", "head"], values="value").to_numpy(float)
            got = split_half(wide, seed=context.seed)._asdict()
            n_traces, n_short = (int(v) for v in counts.loc[mind])
            if got["note"] and n_short:
                got["note"] += f" ({n_short} of {n_traces} have fewer than {steps_needed(self.proximity)} steps)"
            found.append({"mind": mind, **got, "n_traces": n_traces, "n_too_short": n_short})
        return {"receiver_heads": heads[_HEAD_COLUMNS], "receiver_reliability": pd.DataFrame(found)[_RELIABILITY]}

    def draw(self, summary: dict[str, pd.DataFrame]) -> dict[str, Figure]:
        """Mean kurtosis over layers and heads, one map a mind; none where no trace is long enough."""
        from reasoninterp.figures import heatmap

        table = summary["receiver_heads"]
        if not table["value"].notna().any():
            return {}
        return {"receiver_heads": heatmap(table, "head", "layer", unit="kurtosis of vertical scores (0: normal)")}
