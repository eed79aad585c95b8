"""Shapley values of a context's tokens for the token that a mind wrote next, by sampled orders.

After LERG-S (Tuan et al. 2021, arXiv:2106.06528), with the payoff aligned with the distribution that predicts the target:

1. A coalition S is a set of tokens that stay; every other *player* is replaced by the token `baseline`, in place, so that
   positions do not move.  Tokens that are no players always stay.
2. The payoff is `v(S) = log P(target | context with S)`, in nats.
3. Players are added one by one in a random order; each gets the change of v that it makes.  Each order is also run
   backwards, which cancels part of the noise.  The value is the mean over orders: Shapley's, without bias.
4. Within each order the changes sum to `v(all) − v(none)`, so the values do as well, whatever the number of orders.

The cost is `2 × n_orders × (players − 1) + 2` rows for each target, less coalitions that recur.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float64

from reasoninterp.errors import UserError
from reasoninterp.memorization.alternatives import Place, check_places
from reasoninterp.models.body import Body
from reasoninterp.stats import derive_seed


@dataclass(frozen=True)
class Shapley:
    """Shapley values of one context, nats.

    Attributes:
        values: of each token of the context; NaN for those that are no players.
        errors: their standard errors over pairs of an order and its reverse; NaN where there is one pair.
        total: `v(all) − v(none)`, which the values sum to.
        n_orders: pairs of orders.
    """

    values: Float64[np.ndarray, " pos"]
    errors: Float64[np.ndarray, " pos"]
    total: float
    n_orders: int


def shapley_saliency(
    body: Body,
    place: Place,
    *,
    baseline: int,
    players: Sequence[int] | None = None,
    n_orders: int = 25,
    seed: int = 0,
    max_rows: int = 64,
) -> Shapley:
    """Shapley values of the tokens of one place's context.

    Args:
        body: the mind that is read.
        place: the target.
        baseline: the id that stands in for a token that is not there.
        players: positions that get a value; by default all of the context.
        n_orders: random orders, each run forwards and backwards.
        seed: of the orders.
        max_rows: at most so many rows in one forward pass.

    Raises:
        UserError: a place that nothing predicts, a player that is no position of the context or stands there twice, no
            player, or no orders.
    """
    check_places([place])
    who = list(range(place.position)) if players is None else list(players)
    if not who or len(set(who)) < len(who) or min(who) < 0 or max(who) >= place.position:
        raise UserError(f"players: give different positions of the context's {place.position}, at least one.")
    if n_orders < 1:
        raise UserError(f"n_orders: {n_orders}; give at least 1.")
    rng = np.random.default_rng(derive_seed(seed, "shapley", *place.row[: place.position + 1]))
    orders = [rng.permutation(len(who)) for _ in range(n_orders)]
    orders = [direction for order in orders for direction in (order, order[::-1])]
    # [order, step, player]: who is there after the first, second, … player has come.
    place_in = np.argsort(orders, axis=1)
    there = place_in[:, None, :] < np.arange(len(who) + 1)[None, :, None]
    coalitions, which = np.unique(there.reshape(-1, len(who)), axis=0, return_inverse=True)
    payoff = _payoffs(body, place, np.array(who), coalitions, baseline, max_rows)[which].reshape(there.shape[:2])
    gains = np.take_along_axis(np.diff(payoff, axis=1), place_in, axis=1)  # [order, player]
    pairs = gains.reshape(n_orders, 2, len(who)).mean(1)
    values, errors = np.full((2, place.position), np.nan)
    values[who] = pairs.mean(0)
    if n_orders > 1:
        errors[who] = pairs.std(0, ddof=1) / np.sqrt(n_orders)
    return Shapley(values, errors, float(payoff[0, -1] - payoff[0, 0]), n_orders)


def _payoffs(
    body: Body,
    place: Place,
    who: np.ndarray,
    coalitions: Bool[np.ndarray, "coalition player"],
    baseline: int,
    max_rows: int,
) -> Float64[np.ndarray, " coalition"]:
    """log P(target) with each coalition."""
    rows = np.tile(np.array(place.context, dtype=np.int64), (len(coalitions), 1))
    rows[:, who] = np.where(coalitions, rows[:, who], baseline)
    out = []
    for some in torch.from_numpy(rows).split(max_rows):
        logits = body.forward(some, positions=torch.full((len(some), 1), place.position - 1))
        out.append(logits[:, 0].double().log_softmax(-1)[:, place.target].cpu().numpy())
    return np.concatenate(out)
