"""Which tokens of a context are salient: distinct ids in the order of their saliency.

1. A position counts where its saliency is above 0: hiding it would make the target less probable.  (For a measure
   without a meaningful sign, pass absolute values.)
2. An id that stands at several positions has the largest saliency among them; each id is listed once.
3. Left out are ids of `stop`, the target itself (that it is copied says nothing of the corpus), and every position of
   the *local window*, the tokens of the longest suffix w: those are what the local source is about, and with them the
   mid-range source would count the same tokens again.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from jaxtyping import Float64

from reasoninterp.traces.trace import Span


def ranked_ids(
    context: Sequence[int],
    saliency: Float64[np.ndarray, " pos"],
    span: Span,
    *,
    window: int = 0,
    without: Collection[int] = (),
) -> tuple[int, ...]:
    """The salient ids of a part of a context, most salient first; ties by position.

    Args:
        context: the tokens before the target.
        saliency: of each of them for the target; NaN where it is not defined.
        span: the part.
        window: length of the local window at the context's end.
        without: ids that are left out.
    """
    stop = min(span.stop, len(context) - window)
    best: dict[int, float] = {}
    for position in range(span.start, stop):
        token, score = context[position], float(saliency[position])
        if score > 0 and token not in without:
            best[token] = max(score, best.get(token, 0.0))
    return tuple(sorted(best, key=lambda token: -best[token]))
