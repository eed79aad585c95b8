"""What a mind answers, in one sitting: E on contrasts, and the answer it gives after swapped chains and whole ones.

This is all of a mind's behaviour that `severance.location.locate` asks for; `compare` reads far more of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from reasoninterp.faithfulness.effect import contrast_effects
from reasoninterp.models.context import Context, Item, gold
from reasoninterp.severance.location.rival import Answers
from reasoninterp.stats import Estimate, mean, proportion


def read_answers(context: Context, items: Sequence[Item], mind: str) -> Answers:
    """Read contrasts and swaps of some items in a mind.

    Args:
        context: the minds and the tokenizer; `items` need not be its own.
        items: traces with their contrasts; those without a contrast, or without a swap, are left out of that reading.
        mind: a mind's name.
    """
    contrasts = [i.contrast for i in items if i.contrast is not None]
    swaps = [(i, i.swap) for i in items if i.swap is not None]
    with context.open(mind):
        effects = contrast_effects(context, contrasts) if contrasts else []
        chains = [i.trace.with_steps(s.corrupt.steps) for i, s in swaps]
        given = context.read([*chains, *(i.trace for i, _ in swaps)]) if swaps else []
    after, whole = given[: len(swaps)], given[len(swaps) :]
    follow = _array([r.says(s.corrupt.answer) for r, (_, s) in zip(after, swaps, strict=True)])
    return Answers(
        effect=_array([e["effect"] for e in effects]),
        follow_two=_array([e["follow"] for e in effects]),
        follow=follow,
        # a swapped chain may imply the right answer where the trace's own is wrong
        stay=_array([r.says(gold(i.trace)) for r, (i, _) in zip(after, swaps, strict=True)]) * (1 - follow),
        unreadable=_array([r.status != "ok" for r in after]),
        right=_array([r.says(gold(i.trace)) for r, (i, _) in zip(whole, swaps, strict=True)]),
    )


def answer_table(answers: dict[tuple[str, str], Answers], *, seed: int = 0) -> pd.DataFrame:
    """`mind, traces, measure, value, ci_low, ci_high, n, method` of every mind on every set of traces.

    Args:
        answers: by (mind, set of traces).
        seed: of the bootstrap.
    """
    rows = []
    for (mind, traces), a in answers.items():
        measured = {
            "E": mean(a.effect, seed=seed),
            "follow between the two answers": proportion(a.follow_two),
            "follow": proportion(a.follow),
            "stay": proportion(a.stay),
            "unreadable": proportion(a.unreadable),
            "right with its chain whole": proportion(a.right),
        }
        rows += [{"mind": mind, "traces": traces, "measure": m, **e._asdict()} for m, e in measured.items() if e.n]
    return pd.DataFrame(rows, columns=["mind", "traces", "measure", *Estimate._fields])


def _array(values: Sequence[float | bool]) -> NDArray[np.float64]:
    return np.asarray(values, dtype=np.float64)
