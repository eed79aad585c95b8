"""Competitors: simple methods that rank Units by how much they suspect tuning to have cut the path there.

Each is a fair version of what one would try first, on the same pairs, prompts and Units as the ledger and the grafts:

    weight_norm, weight_norm_relative                   where weights moved most            (`weights`)
    activation_cosine, activation_cka                   whose outputs changed most          (`activations`)
    logit_lens_kl                                       where predictions part              (`activations`)
    attention_mass                                      which heads stopped reading steps   (`activations`)
    cross_patch                                         whose output restores or cuts E     (`effects`)
    attribution_difference                              whose share in E changed            (`effects`)
    random                                              chance

1. A score is higher for a Unit that is more suspected, and NaN where the method says nothing of it (`scores` ranks it
   last).  Only the order within a pair matters.
2. `severity` is the method's single number for the pair, the same at every level: how severed it is.
3. Methods that read outputs cannot tell apart what writes one output, a head's QK and its OV: both get its score.
4. Costs are passes over both chains of all contrasts in one mind.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from reasoninterp.errors import UserError
from reasoninterp.models.context import Context
from reasoninterp.models.units import Level, Unit, units
from reasoninterp.severance.scoring import activations, effects
from reasoninterp.severance.scoring.activations import Found, Output, output_of
from reasoninterp.severance.scoring.weights import weight_norm, weight_norm_relative
from reasoninterp.stats import derive_seed
from reasoninterp.traces.contrast import Contrast


class Ranking(NamedTuple):
    """What a method says of a pair at one level.

    Attributes:
        scores: by Unit, in forward order; higher = more suspected, NaN = nothing is said.
        severity: how severed the pair is; higher = more.
        forward_passes, backward_passes: over both chains of all contrasts, in one mind.
        n: contrasts that were read (0 for methods that read none).
    """

    scores: dict[str, float]
    severity: float
    forward_passes: int
    backward_passes: int
    n: int


_ByWeights = Callable[..., tuple[dict[str, float], float]]
_ByOutputs = Callable[..., Found]
_WEIGHTS: Mapping[str, _ByWeights] = {"weight_norm": weight_norm, "weight_norm_relative": weight_norm_relative}
_OUTPUTS: Mapping[str, _ByOutputs] = {
    "activation_cosine": activations.activation_cosine,
    "activation_cka": activations.activation_cka,
    "logit_lens_kl": activations.logit_lens_kl,
    "attention_mass": activations.attention_mass,
    "cross_patch": effects.cross_patch,
    "attribution_difference": effects.attribution_difference,
}
COMPETITORS: tuple[str, ...] = (*_WEIGHTS, *_OUTPUTS, "random")


def rank(
    name: str,
    context: Context,
    contrasts: Sequence[Contrast],
    level: Level,
    *,
    from_mind: str = "base",
    to_mind: str = "tuned",
    seed: int = 0,
) -> Ranking:
    """Rank the Units of one level by one method; see `rank_levels`."""
    found = rank_levels(name, context, contrasts, [level], from_mind=from_mind, to_mind=to_mind, seed=seed)
    return found[level]


def rank_levels(
    name: str,
    context: Context,
    contrasts: Sequence[Contrast],
    levels: Sequence[Level],
    *,
    from_mind: str = "base",
    to_mind: str = "tuned",
    seed: int = 0,
) -> dict[Level, Ranking]:
    """Rank the Units of several levels by one method; what levels share is computed once.

    Args:
        name: one of `COMPETITORS`.
        context: holds both minds.
        contrasts: what is read; not empty.
        levels: of Units; each is scored as if it had been asked for alone.
        from_mind: the mind with the path.
        to_mind: the mind in which it may be cut.
        seed: of `random`; no other method draws.

    Raises:
        UserError: no such method, or no contrasts.
    """
    if name not in COMPETITORS:
        raise UserError(f"name: {name!r} is no competitor; there are {', '.join(COMPETITORS)}.")
    if not contrasts:
        raise UserError("contrasts: there are none; give at least one contrast to read.")
    by_level = {level: units(context.minds.body, level) for level in levels}
    every = list({u.name: u for chosen in by_level.values() for u in chosen}.values())
    minds = {"from_mind": from_mind, "to_mind": to_mind}
    if name == "random":
        severity = _draw(seed, "severity", to_mind)
        return {
            level: Ranking({u.name: _draw(seed, u.name, to_mind) for u in chosen}, severity, 0, 0, 0)
            for level, chosen in by_level.items()
        }
    if name in _WEIGHTS:
        scores, severity = _WEIGHTS[name](context, every, **minds)
        return {
            level: Ranking({u.name: scores[u.name] for u in chosen}, severity, 0, 0, 0)
            for level, chosen in by_level.items()
        }
    outputs = list(dict.fromkeys(o for u in every if (o := output_of(u)) is not None))
    found = _OUTPUTS[name](context, contrasts, outputs, **minds)
    return {level: _ranking(found, chosen, len(outputs)) for level, chosen in by_level.items()}


def _ranking(found: Found, chosen: Sequence[Unit], n_all: int) -> Ranking:
    """One level's part of what was found for several; its passes are those that it alone would have taken."""
    places: dict[str, Output | None] = {u.name: output_of(u) for u in chosen}
    scores = {name: float("nan") if o is None else found.scores[o] for name, o in places.items()}
    spared = found.passes_each * (n_all - len({o for o in places.values() if o is not None}))
    return Ranking(scores, found.severity, found.forward_passes - spared, found.backward_passes, found.n)


def _draw(seed: int, *labels: str) -> float:
    return float(np.random.default_rng(derive_seed(seed, "random competitor", *labels)).random())
