"""Rival methods that look at weights alone: where did tuning move them most?

For a Unit c with weights θ_c (a tied embedding is one Unit):

    weight_norm            ‖θ_tuned,c − θ_base,c‖            severity: ‖θ_tuned − θ_base‖ / ‖θ_base‖ of the whole model
    weight_norm_relative   the same over ‖θ_base,c‖          severity: the largest over blocks

Frobenius norms in float32, summed in float64.  Not invariant under changes of gauge: align the minds first
(`severance.gauge.align`), or see what that costs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from reasoninterp.models.context import Context
from reasoninterp.models.units import Unit, units


class WeightChange(NamedTuple):
    """Norms by Unit, and over all of the Units asked for."""

    change: dict[str, float]
    base: dict[str, float]


def weight_change(context: Context, chosen: Sequence[Unit], *, from_mind: str, to_mind: str) -> WeightChange:
    """Frobenius norms of each Unit's difference and of its weights in `from_mind`."""
    delta = dict(context.minds.delta(from_mind, to_mind))
    held = context.minds.weights(from_mind)
    return WeightChange({u.name: _norm(u, delta) for u in chosen}, {u.name: _norm(u, held) for u in chosen})


def weight_norm(
    context: Context, chosen: Sequence[Unit], *, from_mind: str, to_mind: str
) -> tuple[dict[str, float], float]:
    """Scores by Unit and severity; see the module."""
    found = weight_change(context, chosen, from_mind=from_mind, to_mind=to_mind)
    layers = weight_change(context, _partition(context, "layer"), from_mind=from_mind, to_mind=to_mind)
    whole, own = _together(layers.change.values()), _together(layers.base.values())
    return found.change, whole / own if own > 0 else float("nan")


def weight_norm_relative(
    context: Context, chosen: Sequence[Unit], *, from_mind: str, to_mind: str
) -> tuple[dict[str, float], float]:
    """Scores by Unit (NaN where the base's weights are all zero) and severity; see the module."""
    found = weight_change(context, [*chosen, *_partition(context, "block")], from_mind=from_mind, to_mind=to_mind)
    share = {n: c / found.base[n] if found.base[n] > 0 else float("nan") for n, c in found.change.items()}
    severity = max((share[u.name] for u in _partition(context, "block") if share[u.name] == share[u.name]), default=0.0)
    return {u.name: share[u.name] for u in chosen}, severity


def _partition(context: Context, level: str) -> list[Unit]:
    return units(context.minds.body, "layer" if level == "layer" else "block")


def _norm(unit: Unit, tensors: Mapping[str, Tensor]) -> float:
    """Norm of a Unit's parts of some tensors; a missing tensor is zero."""
    return _together(float(p.of(tensors[p.param]).float().norm()) for p in unit.parts if p.param in tensors)


def _together(norms: Iterable[float]) -> float:
    return float(sum(n * n for n in norms) ** 0.5)
