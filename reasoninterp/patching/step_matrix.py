"""The step × step causal matrix: what each later step, and the answer, lose when a step may no longer be attended to.

After Bogdan et al. 2025, *Thought Anchors* (arXiv:2506.19143), attention suppression:

1. For each step i, its tokens are cut as keys from every position behind the step, in all layers and heads
   (`knockout`).  Positions inside the step still read it: the step itself is not changed.
2. Token t of the text is predicted at position t − 1.  Entry (i, j) is the mean of `KL(base ‖ cut)` over the tokens of
   step j, each read at the position that predicts it: `steps[j].start − 1 … steps[j].stop − 2`.  A position that lies
   inside step i (the first token behind the step, where nothing stands between two steps) is not cut, so it is left
   out; `n_tokens` counts what remains.
3. The last column is the answer: the prompt's last position, which predicts the answer's first token.
4. Entries j ≤ i are NaN: no step can act on itself or on what came before.  So is an entry without tokens.

Values are exact: bits, over the whole vocabulary that all minds share, at temperature 1 (the paper: temperature 0.6 and
the 100 largest logits).  `log2_kl` is the mean of `log2(KL + 1e-9)`, which weighs tokens as the paper does.  The entry
is a direct and indirect effect at once: later positions, themselves without step i, are read by still later ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from reasoninterp.models.body import Body
from reasoninterp.models.context import Context
from reasoninterp.patching.attention_edges import Edge
from reasoninterp.patching.knockout import knockout, reading_plan
from reasoninterp.stats import estimate
from reasoninterp.study import Batch, Cell, Row, Study
from reasoninterp.traces.trace import Span, TokenTrace

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOG_FLOOR = 1e-9  # bits
ANSWER = "answer"


@dataclass(frozen=True)
class CausalMatrix:
    """The matrix of one trace: `[n_steps, n_steps + 1]`, row the step that is cut, column the later step, last the answer.

    Attributes:
        kl: mean KL in bits.
        log2_kl: mean of `log2(KL + 1e-9)`.
        n_tokens: tokens behind each entry.
    """

    kl: NDArray[np.float64]
    log2_kl: NDArray[np.float64]
    n_tokens: NDArray[np.int64]


def predictors(tokens: TokenTrace, cut: int, later: int) -> range:
    """Positions that predict the tokens of a later step (or of the answer: `later == n_steps`) and lie behind the cut.

    Args:
        tokens: the trace.
        cut: index of the step that is cut.
        later: index of the step that is read; one that is not later has no such positions.
    """
    steps = tokens.steps
    if later <= cut:
        return range(0)
    span = Span(tokens.answer.start, tokens.answer.start + 1) if later == len(steps) else steps[later]
    return range(max(span.start - 1, steps[cut].stop), span.stop - 1)


def step_matrices(body: Body, traces: Sequence[TokenTrace], *, max_rows: int = 32) -> list[CausalMatrix]:
    """The causal matrix of each trace; all steps of all traces are rows of common batches.

    Args:
        body: the mind that is read.
        traces: the traces as tokens.
        max_rows: at most so many rows in one forward pass.

    Raises:
        UserError: an architecture whose attention scores cannot be edited.
    """
    prompts = [t.prompt_ids for t in traces]
    # From the first token behind the first step on; the prompt's last token in any case.
    first = [min([t.steps[0].stop] * bool(t.steps) + [len(p) - 1]) for t, p in zip(traces, prompts, strict=True)]
    plan = reading_plan(prompts, [range(start, len(p)) for start, p in zip(first, prompts, strict=True)])
    where = [(k, i) for k, t in enumerate(traces) for i in range(len(t.steps))]
    cells = [[Edge(Span(traces[k].steps[i].stop, len(prompts[k])), traces[k].steps[i])] for k, i in where]
    found = knockout(body, plan, cells, [k for k, _ in where], max_rows=max_rows)
    out = []
    for t in traces:
        shape = (len(t.steps), len(t.steps) + 1)
        out.append(CausalMatrix(np.full(shape, np.nan), np.full(shape, np.nan), np.zeros(shape, dtype=np.int64)))
    for (k, i), kl in zip(where, found.kl.numpy(), strict=True):
        if not len(traces[k].steps[i]):
            continue
        for j in range(i + 1, len(traces[k].steps) + 1):
            read = [kl[p - first[k]] for p in predictors(traces[k], i, j)]
            if read:
                out[k].kl[i, j] = np.mean(read)
                out[k].log2_kl[i, j] = np.mean(np.log2(np.array(read) + LOG_FLOOR))
                out[k].n_tokens[i, j] = len(read)
    return out


def centred(values: NDArray[np.float64], by: Literal["row", "column", "both"]) -> NDArray[np.float64]:
    """A matrix less the means of its rows, of its columns or of both, over what is not NaN; for plots only.

    What is left says which entry stands out in its row (column), no longer how large it is.  With `"both"`, rows and
    columns are centred in turn until neither moves (with gaps, one round does not do).
    """
    out = values.astype(float)
    for _ in range(200 if by == "both" else 1):
        before = out.copy()
        for name, axis in (("row", 1), ("column", 0)):
            if by in (name, "both"):
                n = np.maximum((~np.isnan(out)).sum(axis=axis, keepdims=True), 1)
                out = out - np.nansum(out, axis=axis, keepdims=True) / n
        if np.nanmax(np.abs(out - before), initial=0.0) < 1e-12:
            break
    return out


class StepMatrix(Study):
    """The step × step causal matrix by attention suppression, for each mind: means over traces by place in the chain.

    Parameters:
        max_traces: at most so many traces a mind: each takes a row of a forward pass per step.
        log: average `log2(KL + 1e-9)` over tokens instead of the KL.
    """

    max_traces: int = 64
    log: bool = False

    def cells(self, context: Context) -> Iterable[Cell]:
        """Every mind × the first traces."""
        for mind in context.minds.names:
            for item in context.items[: self.max_traces]:
                yield context.cell(mind, item)

    def measure(self, context: Context, batch: Batch) -> Iterable[Row]:
        """One row per cell, step that is cut and later step (or answer); NaN where nothing can act."""
        tokens = [context.encode(cell.item.trace) for cell in batch]
        found = step_matrices(context.body, tokens, max_rows=context.rows)
        for cell, matrix in zip(batch, found, strict=True):
            n = len(matrix.kl)
            for i, j in np.ndindex(matrix.kl.shape):
                later = ANSWER if j == n else f"step {j + 1}"
                yield cell.row(
                    step=f"step {i + 1}",
                    step_index=i,
                    later=later,
                    later_index=10_000 if j == n else j,  # the answer follows every step of any trace
                    kl=float(matrix.kl[i, j]),
                    log2_kl=float(matrix.log2_kl[i, j]),
                    n_tokens=int(matrix.n_tokens[i, j]),
                )

    def summarise(self, rows: pd.DataFrame, context: Context) -> pd.DataFrame:
        """`step-matrix`: mind, step, step_index, later, later_index, measure, value, ci_low, ci_high, n, method.

        `value` is the mean over traces of the KL in bits (or of its logarithm), `n` the traces behind the entry.  No
        p-values: a KL cannot be negative, so there is no null about which its sign could flip.
        """
        by = ["mind", "step", "step_index", "later", "later_index"]
        if not len(rows):
            return pd.DataFrame(columns=[*by, "measure", "value", "ci_low", "ci_high", "n", "method"])
        measure = "log2_kl" if self.log else "kl"
        table = estimate(rows, by=by, value=measure, kind="mean", seed=context.seed)
        table.insert(len(by), "measure", measure)
        return table.sort_values(["mind", "step_index", "later_index"], kind="stable").reset_index(drop=True)

    def draw(self, summary: pd.DataFrame) -> Figure | None:
        """One map a mind: the step that is cut from the bottom up, the later step from left to right."""
        from reasoninterp.figures import heatmap, short

        if not len(summary):
            return None
        if self.log:  # logarithms have no zero of their own; shown is what stands out in its row
            drawn = [
                part.assign(value=_centred_rows(part)).drop(columns=["ci_low", "ci_high"])
                for _, part in summary.groupby("mind", sort=False)
            ]
            summary = pd.concat(drawn)
        n = summary["n"]
        counts = f"n = {n[n > 0].min()}–{n.max()} traces an entry" if n.any() else "no entries"
        return heatmap(
            summary,
            "later",
            "step",
            title=lambda mind: f"{short(mind)}: what later steps lose",
            xlabel=f"step that is read ({counts})",
            ylabel="step that is cut",
            unit="log2 KL, less the row's mean" if self.log else "KL in bits",
        )


def _centred_rows(part: pd.DataFrame) -> pd.Series:
    """The values of one mind's entries less the means of their rows."""
    grid = part.pivot(index="step_index", columns="later_index", values="value")
    found = pd.DataFrame(centred(grid.to_numpy(float), "row"), index=grid.index, columns=grid.columns)
    places = zip(part["step_index"], part["later_index"], strict=True)
    return pd.Series([found.at[i, j] for i, j in places], index=part.index)
