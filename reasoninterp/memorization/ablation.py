"""What a token loses when a part of its context is taken out: the causal side of a source.

1. A part is a set of positions of the context: the local window w, the question, the chain so far (`parts_of`), or as many
   other positions drawn at random (the control: that many tokens, wherever they stand).  Parts do not overlap: what is
   in the window belongs to no other part, though it may reach into the chain or the question.
2. *Taken out*: the residual stream before the first layer is replaced, at the part's positions, by its mean over the
   tokens of all traces (mean ablation).  That keeps positions and attention as they are and removes which tokens stood
   there.  Cutting attention to the part would not do for the window: its last token makes the prediction from its own
   stream, whatever is cut.  (In networks with learned positions the mean holds the mean position too.)
3. Two effects on the distribution that predicts the target, in bits: `kl`, `KL(whole ‖ without the part)` over the
   vocabulary that all minds share; and `drop`, `log₂ P(target) − log₂ P(target, without)`, positive where the part made the
   target more probable.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import log
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from reasoninterp.memorization.alternatives import Place, check_places
from reasoninterp.memorization.names import CONTROL
from reasoninterp.models.body import Body, site
from reasoninterp.patching.knockout import kl_bits
from reasoninterp.traces.trace import Span


class Effect(NamedTuple):
    """What taking a part out does, in bits (see the module)."""

    kl: float
    drop: float


def mean_embedding(body: Body, rows: Sequence[Sequence[int]], *, max_rows: int = 32) -> Float[Tensor, " d_model"]:
    """Mean residual stream before the first layer over all tokens of some rows."""
    total, count = torch.zeros(body.d_model, dtype=torch.float64), 0
    name = site("resid_pre", 0)
    for start in range(0, len(rows), max_rows):
        some = rows[start : start + max_rows]
        stream = body.cache(_padded(some), [name])[name].double().cpu()
        for row, line in zip(some, stream, strict=True):
            total += line[: len(row)].sum(0)
            count += len(row)
    return (total / count).to(body.dtype)


def parts_of(
    position: int, window: int, question: Span, chain: Span, rng: np.random.Generator
) -> dict[str, tuple[int, ...]]:
    """The positions of each part of a context; a part without any is left out.

    Args:
        position: of the target; the context is what stands before it.
        window: length of the local window, 0 for none.
        question, chain: their tokens in the context.
        rng: draws the control: as many positions outside the window as it has, fewer where there are not as many.
    """
    start = position - window
    outside = np.arange(1, start)  # the first token stays: attention that reads nothing goes there
    drawn = rng.choice(outside, size=min(window, len(outside)), replace=False) if window else outside[:0]
    found = {
        "local": tuple(range(start, position)),
        "mid": tuple(range(chain.start, min(chain.stop, start))),
        "long": tuple(range(question.start, min(question.stop, start))),
        CONTROL: tuple(sorted(int(p) for p in drawn)),
    }
    return {name: positions for name, positions in found.items() if positions}


def part_effects(
    body: Body,
    places: Sequence[Place],
    parts: Sequence[Mapping[str, Sequence[int]]],
    mean: Float[Tensor, " d_model"],
    *,
    max_rows: int = 32,
) -> list[dict[str, Effect]]:
    """What each place's prediction loses by each of its parts; one dictionary a place, in order.

    Args:
        body: the mind that is read.
        places: the targets.
        parts: for each place, positions of its context by name.
        mean: what is put there (`mean_embedding`).
        max_rows: at most so many rows in one forward pass.

    Raises:
        UserError: a place that nothing predicts.
    """
    check_places(places)
    out: list[dict[str, Effect]] = [{} for _ in places]
    asked = [(i, name, tuple(positions)) for i, some in enumerate(parts) for name, positions in some.items()]
    whole: dict[int, Tensor] = {}
    for start in range(0, len(asked), max_rows):
        some = asked[start : start + max_rows]
        new = [i for i in dict.fromkeys(i for i, *_ in some) if i not in whole]
        whole = {i: whole[i] for i, *_ in some if i in whole}  # a place's parts follow each other: older ones are done
        if new:
            whole.update(zip(new, _log_probs(body, [places[i] for i in new], None, mean), strict=True))
        without = _log_probs(body, [places[i] for i, *_ in some], [positions for *_, positions in some], mean)
        before = torch.stack([whole[i] for i, *_ in some])
        for (i, name, _), kl, lost in zip(some, kl_bits(before, without), before - without, strict=True):
            out[i][name] = Effect(float(kl), float(lost[places[i].target]) / log(2))
    return out


def _log_probs(
    body: Body, places: Sequence[Place], gone: Sequence[Sequence[int]] | None, mean: Float[Tensor, " d_model"]
) -> Float[Tensor, "place vocab"]:
    """Log-probabilities at each place, in float64 on the CPU, with positions taken out."""
    ids = _padded([place.context for place in places])
    hooks = []
    if gone is not None:
        mask = torch.zeros(ids.shape, dtype=torch.bool)
        for row, positions in zip(mask, gone, strict=True):
            row[list(positions)] = True
        mask, mean = mask[..., None].to(body.device), mean.to(body.device)
        hooks = [(site("resid_pre", 0), lambda stream: torch.where(mask, mean, stream))]
    last = torch.tensor([[place.position - 1] for place in places])
    return body.forward(ids, hooks=hooks, positions=last)[:, 0].double().log_softmax(-1).cpu()


def _padded(rows: Sequence[Sequence[int]]) -> Tensor:
    """Rows of ids as one tensor, padded on the right."""
    longest = max(map(len, rows), default=0)
    return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], dtype=torch.long)
