"""E: what a changed chain does to the answer, raw first.

`m = log P(corrupt answer) − log P(clean answer)`, read where the answer stands (for answers of one token that is the
logit difference; see `models.read` for longer ones).  `E = mean over contrasts of m(corrupt chain) − m(clean chain)`,
in nats: large if the answer follows its steps, near 0 if it is cut off.  Beside it

* `delta_probability`: change of the probability of the corrupt answer (a margin can shrink while the answer follows);
* `follow`: share of contrasts in which the corrupt answer is preferred after the corrupt chain and not after the clean
  one, between the two answers alone;
* `E_withheld`: the same E with the steps that state the answer left out of both chains, given where the last step
  states the answer in both chains of at least `STATED_SHARE` of the contrasts: there E by itself measures copying.
"""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd

from reasoninterp.models.context import Context
from reasoninterp.stats import estimate
from reasoninterp.study import Batch, Cell, Row, Study
from reasoninterp.traces.contrast import Contrast, states_answer, withheld

STATED_SHARE = 0.5


class Effect(Study):
    """E: how far a consistently changed chain moves the answer, per mind."""

    def cells(self, context: Context) -> Iterable[Cell]:
        """Every mind × item that has a contrast."""
        return context.contrast_cells()

    def measure(self, context: Context, batch: Batch) -> Iterable[Row]:
        """One row per cell, and one more where steps that state the answer were withheld."""
        asked: list[tuple[Cell, str, Contrast]] = []
        for cell in batch:
            asked.append((cell, "whole", cell.item.contrast))
            without = withheld(cell.item.contrast)
            if without is not None and last_step_states_answer(cell.item.contrast):
                asked.append((cell, "withheld", without))
        for (cell, form, contrast), values in zip(
            asked, contrast_effects(context, [c for *_, c in asked]), strict=True
        ):
            yield cell.row(form=form, contrast=contrast.kind, **values)

    def summarise(self, rows: pd.DataFrame, context: Context) -> pd.DataFrame:
        """`effect`: mind, contrast, measure, value, ci_low, ci_high, n."""
        out = []
        for measure, form, column in (
            ("E", "whole", "effect"),
            ("E_withheld", "withheld", "effect"),
            ("delta_probability", "whole", "delta_probability"),
            ("follow", "whole", "follow"),
        ):
            part = rows[rows["form"] == form] if len(rows) else rows
            if len(part) and (form == "whole" or part["trace"].nunique() >= STATED_SHARE * rows["trace"].nunique()):
                kind = "share" if measure == "follow" else "mean"
                table = estimate(part, by=["mind", "contrast"], value=column, kind=kind, seed=context.seed)
                out.append(table.assign(measure=measure))
        columns = ["mind", "contrast", "measure", "value", "ci_low", "ci_high", "n", "method"]
        return pd.concat(out)[columns] if out else pd.DataFrame(columns=columns)


def last_step_states_answer(contrast: Contrast) -> bool:
    """Whether the last step states the answer in the clean and in the corrupt chain."""
    return all(states_answer(t.steps[-1], t.answer) for t in (contrast.clean, contrast.corrupt))


def contrast_effects(context: Context, contrasts: list[Contrast]) -> list[dict[str, float]]:
    """For each contrast, for the mind that is in: `m_clean, m_corrupt, effect, delta_probability, follow`."""
    answers = [(c.clean.answer, c.corrupt.answer) for c in contrasts]
    found = context.margins([c.clean for c in contrasts] + [c.corrupt for c in contrasts], answers * 2)
    n = len(contrasts)
    margin, p_corrupt = found.margin.tolist(), found.logp_corrupt.exp().tolist()
    return [
        {
            "m_clean": margin[i],
            "m_corrupt": margin[n + i],
            "effect": margin[n + i] - margin[i],
            "delta_probability": p_corrupt[n + i] - p_corrupt[i],
            "follow": float(margin[n + i] > 0 > margin[i]),
        }
        for i in range(n)
    ]
