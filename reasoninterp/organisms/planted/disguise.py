"""Disguise: changes of weights that hide a cut and do nothing to the path.

* `drift`: more training of *all* weights on rows of the same kinds; the answer goes on following its steps.  It lies in
  tuned − base, so that *where did the weights change most* is no answer.
* `decoy`: a Unit's weights moved by more than the cut moved its own, along directions that its inputs never take (the
  bottom of their spectrum), so that next to nothing comes of it.
* gauge changes are `models.gauge`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from reasoninterp.models.units import Unit
from reasoninterp.organisms.planted.bases import BaseSpec, tune
from reasoninterp.organisms.rows import make_rows, step_ids
from reasoninterp.organisms.tasks import Problems

DRIFT_STEPS = 60
DRIFT_RATE = 5e-4
UNSEEN = 1e-5  # share of an input's energy that counts as never taken


def drift(model: Any, spec: BaseSpec, seed: int) -> Any:
    """A copy with all weights trained further on fresh rows."""
    out = copy.deepcopy(model)
    tune(out, spec, steps=DRIFT_STEPS, lr=DRIFT_RATE, seed=1000 + seed, even=spec.redundant)
    return out


def change(start: Any, stop: Any, unit: Unit) -> float:
    """Frobenius norm of a Unit's weight change."""
    a, b = dict(start.named_parameters()), dict(stop.named_parameters())
    with torch.no_grad():
        total = sum(float((s.of(b[s.param]) - s.of(a[s.param])).square().sum()) for s in unit.parts)
    return float(np.sqrt(total))


def decoy(model: Any, unit: Unit, norm: float, p: Problems, rng: np.random.Generator) -> None:
    """Move a Unit of attention or MLP, in place, by `norm` along directions that its inputs never take."""
    params = dict(model.named_parameters())
    moves: dict[str, Tensor] = {}
    matrices = [part for part in unit.parts if params[part.param].dim() == 2]
    inputs = _inputs(model, {part.param.removesuffix(".weight") for part in matrices}, p)
    for part in matrices:
        weight, x = params[part.param], inputs[part.param.removesuffix(".weight")]
        unseen = _unseen(x[:, part.start : part.stop] if part.dim == 1 else x)  # a slice of inputs, or all of them
        noise = torch.from_numpy(rng.normal(size=tuple(part.of(weight).shape))).to(weight.dtype)
        moves[part.param] = noise @ unseen @ unseen.T
    size = float(torch.stack([m.square().sum() for m in moves.values()]).sum().sqrt())
    with torch.no_grad():
        for part in unit.parts:
            if part.param in moves and size > 0:
                part.of(params[part.param]).add_(moves[part.param] * (norm / size))


def scramble(model: Any, units: Sequence[Unit], scale: float, rng: np.random.Generator) -> Any:
    """A copy in which these Units are drowned in noise, `scale` times the spread of each weight."""
    out = copy.deepcopy(model)
    params = dict(out.named_parameters())
    with torch.no_grad():
        for part in (s for u in units for s in u.parts):
            own = part.of(params[part.param])
            own.add_(torch.from_numpy(rng.normal(size=tuple(own.shape))).to(own.dtype) * scale * own.std())
    return out


@torch.no_grad()
def _inputs(model: Any, names: Collection[str], p: Problems) -> dict[str, Float[Tensor, "token d"]]:
    """What linear maps read, over all tokens of these problems."""
    steps = step_ids(p, p.steps())
    rows = make_rows(p, steps, p.answers, np.ones(len(p), dtype=bool), 1.0)
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda _module, args: seen.update({name: args[0].flatten(0, 1)})

    handles = [model.get_submodule(name).register_forward_pre_hook(keep(name)) for name in names]
    try:
        model(input_ids=torch.from_numpy(rows.ids), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _unseen(x: Float[Tensor, "token d"]) -> Float[Tensor, "d rank"]:
    """Orthonormal directions at the bottom of the spectrum; at least one."""
    values, vectors = torch.linalg.eigh((x.T @ x).double())
    share = values.clamp(min=0).cumsum(0) / values.sum()
    return vectors[:, : max(1, int((share < UNSEEN).sum()))].to(x.dtype)
