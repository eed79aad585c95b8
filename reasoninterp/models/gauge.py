"""Gauge: changes of a decoder's weights that leave its function as it is.

Two sets of weights with one function differ by a gauge.  For one layer (Elhage et al. 2021 for heads; what commutes
with rotary positions follows from Su et al. 2021):

* `ov`: values of a key/value head v → R v, outputs of its query heads o → R⁻ᵀ o (rows), R invertible d_head × d_head.
* `qk`: queries q → G q, keys k → G⁻ᵀ k.  With rotary positions G must commute with the rotations: coordinates i and
  i + d_head/2 are one complex number, q → c q and k → k / c̄ with one c for each such pair.  Where queries and keys are
  normalised (Qwen3), only c = ±1 is used: signs alone commute with the root mean square and with any gain.
* `heads`: query heads within a key/value head, and key/value heads with their query heads, in another order.
* `neurons`: neurons of the MLP in another order.
* `neuron_scale`: up → s up, down → down / s with s > 0, where the MLP is gated (or its activation a ReLU).
* `gain`: a norm's gain (and bias) times s, what reads it divided by s; s ≠ 0 by coordinate.  A last norm before a tied
  unembedding stays.

Left out: shifts of biases that nothing can see (GPT-2's key bias; its value bias against its output bias), which are
no change of basis, and rotations of the whole residual stream, which a norm with gains does not commute with.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import scipy.linalg
from numpy.typing import NDArray
from torch import Tensor

from reasoninterp.errors import UserError
from reasoninterp.models.layout import (
    Array,
    Final,
    Layer,
    Shape,
    read_final,
    read_layer,
    shape_of,
    write_final,
    write_layer,
)
from reasoninterp.severance.gauge.bases import rotary_basis

Kind = Literal["ov", "qk", "heads", "neurons", "neuron_scale", "gain"]
KINDS: tuple[Kind, ...] = get_args(Kind)
READERS = {"ln1": ("q", "k", "v"), "ln2": ("gate", "up")}


class Gauged(NamedTuple):
    """Weights after a change of gauge; `heads[layer][j]` is the head that head j of that layer was before."""

    params: dict[str, Tensor]
    heads: tuple[tuple[int, ...], ...]


def random_gauge(
    params: Mapping[str, Tensor],
    config: Any,
    kinds: Collection[str] = KINDS,
    rng: np.random.Generator | int = 0,
    strength: float = 1.0,
) -> Gauged:
    """The same function with other weights: a random change of gauge of each of `kinds`, in every layer.

    Args:
        params: plain Hugging Face parameters by name; they are not changed.
        config: the model's Hugging Face configuration.
        kinds: which changes (see the module); one that the architecture does not allow changes nothing.
        rng: a generator, or a seed.
        strength: 0 changes nothing; at 1, bases turn by angles of order 1 and scales have a log of standard deviation
            0.5; permutations move a share min(1, strength) of the heads and neurons, and at least two.

    Returns:
        All parameters, in their own dtype, and what became of the heads.

    Raises:
        UserError: an unknown kind, a negative strength, or an architecture whose gauge is not known.
    """
    if unknown := sorted(set(kinds) - set(KINDS)):
        raise UserError(f"kinds: {unknown[0]!r} is not one of {', '.join(KINDS)}.")
    if strength < 0:
        raise UserError(f"strength: {strength:g} is negative; give 0 or more.")
    rng = np.random.default_rng(rng)
    shape = shape_of(params, config)
    out, heads = dict(params), []
    for index in range(shape.n_layers):
        layer = read_layer(params, shape, index)
        heads.append(_disguise(layer, kinds, rng, strength))
        out.update(write_layer(layer, params))
    final = read_final(params, shape)
    if final is not None and "gain" in kinds:
        scale_final(final, _scales(rng, len(final.at["ln"]), strength))
        out.update(write_final(final, shape, params))
    return Gauged(out, tuple(heads))


def ov_basis(layer: Layer, group: int, basis: Array) -> None:
    """Give the values of a key/value head another basis: v → R v, o → R⁻ᵀ o; `basis` is R [d_head, d_head]."""
    at, inverse = layer.at, np.linalg.inv(basis).T
    at["v"][group] = basis @ at["v"][group]
    if "bv" in at:
        at["bv"][group] = basis @ at["bv"][group]
    for head in heads_of(layer.shape, group):
        at["o"][head] = inverse @ at["o"][head]


def qk_basis(layer: Layer, group: int, basis: Array) -> None:
    """Give queries and keys another basis: q → G q, k → G⁻ᵀ k; without rotary positions and norms any G will do."""
    at, inverse = layer.at, np.linalg.inv(basis).T
    for head in heads_of(layer.shape, group):
        at["q"][head] = basis @ at["q"][head]
        if "bq" in at:
            at["bq"][head] = basis @ at["bq"][head]
    at["k"][group] = inverse @ at["k"][group]
    if "bk" in at:
        at["bk"][group] = inverse @ at["bk"][group]


def permute_heads(layer: Layer, order: NDArray[np.int64]) -> None:
    """Put query head `order[j]` in place j, and the key/value heads along with them.

    Raises:
        ValueError: the query heads of a key/value head would be torn apart.
    """
    groups = order.reshape(layer.shape.n_kv_heads, -1) // layer.shape.n_queries
    if not (groups == groups[:, :1]).all():
        raise ValueError(f"the order {order.tolist()} tears a key/value head's query heads apart")
    for role, indices in (("q", order), ("bq", order), ("o", order), *((r, groups[:, 0]) for r in _KEYED)):
        if role in layer.at:
            layer.at[role] = layer.at[role][indices]


def permute_neurons(layer: Layer, order: NDArray[np.int64]) -> None:
    """Put neuron `order[j]` in place j."""
    for role in ("gate", "b_gate", "up", "b_up", "down"):
        if role in layer.at:
            layer.at[role] = layer.at[role][order]


def scale_neurons(layer: Layer, scales: Array) -> None:
    """up → s up, down → down / s; `scales` is s [neuron]."""
    layer.at["up"] *= scales[:, None]
    if "b_up" in layer.at:
        layer.at["b_up"] *= scales
    layer.at["down"] /= scales[:, None]


def scale_gain(layer: Layer, norm: str, scales: Array) -> None:
    """A norm's gain and bias times s, what reads it divided by s; `norm` is "ln1" or "ln2", `scales` s [d_model]."""
    layer.at[norm] *= scales
    if f"b_{norm}" in layer.at:
        layer.at[f"b_{norm}"] *= scales
    for role in READERS[norm]:
        if role in layer.at:
            layer.at[role] /= scales


def scale_final(final: Final, scales: Array) -> None:
    """The last norm's gain and bias times s, the unembedding divided by s."""
    final.at["ln"] *= scales
    if "b_ln" in final.at:
        final.at["b_ln"] *= scales
    final.at["unembed"] /= scales


def heads_of(shape: Shape, group: int) -> range:
    """The query heads of a key/value head."""
    return range(group * shape.n_queries, (group + 1) * shape.n_queries)


_KEYED = ("k", "bk", "v", "bv")


def _disguise(layer: Layer, kinds: Collection[str], rng: np.random.Generator, strength: float) -> tuple[int, ...]:
    """Change a layer's gauge at random; returns which head each head was."""
    shape = layer.shape
    order = np.arange(shape.n_heads)
    if "heads" in kinds:
        order = _head_order(shape, rng, strength)
        permute_heads(layer, order)
    for group in range(shape.n_kv_heads):
        if "ov" in kinds:
            ov_basis(layer, group, _basis(rng, shape.d_head, strength))
        if "qk" in kinds and (shape.is_gpt2 or shape.rotates_all):
            qk_basis(layer, group, _qk_draw(shape, rng, strength))
    n_neurons = len(layer.at["up"])
    if "neurons" in kinds:
        permute_neurons(layer, _cycle(rng, n_neurons, strength))
    if "neuron_scale" in kinds and (shape.gated or shape.homogeneous):
        scale_neurons(layer, _scales(rng, n_neurons, strength))
    if "gain" in kinds:
        for norm in READERS:
            scale_gain(layer, norm, _scales(rng, len(layer.at[norm]), strength))
    return tuple(int(i) for i in order)


def _qk_draw(shape: Shape, rng: np.random.Generator, strength: float) -> Array:
    if shape.is_gpt2:
        return _basis(rng, shape.d_head, strength)
    pairs = shape.d_head // 2
    if shape.normed:
        return rotary_basis(np.where(rng.random(pairs) < 0.5 * min(1.0, strength), -1.0, 1.0).astype(complex))
    return rotary_basis(_scales(rng, pairs, strength) * np.exp(1j * strength * rng.normal(size=pairs)))


def _head_order(shape: Shape, rng: np.random.Generator, strength: float) -> NDArray[np.int64]:
    """Groups in another order, and the query heads within each."""
    groups = _cycle(rng, shape.n_kv_heads, strength)
    within = [_cycle(rng, shape.n_queries, strength) for _ in groups]
    return np.concatenate([g * shape.n_queries + w for g, w in zip(groups, within, strict=True)])


def _cycle(rng: np.random.Generator, n: int, strength: float) -> NDArray[np.int64]:
    """A permutation that moves a share of n things round in one cycle, so that it is never the identity (n > 1)."""
    order = np.arange(n)
    moved = min(n, max(2, round(n * min(1.0, strength))))
    if strength == 0 or n < 2:
        return order
    chosen = rng.permutation(n)[:moved]
    order[chosen] = np.roll(chosen, 1)
    return order


def _scales(rng: np.random.Generator, n: int, strength: float) -> Array:
    return np.exp(0.5 * strength * rng.normal(size=n))


def _basis(rng: np.random.Generator, n: int, strength: float) -> Array:
    """A rotation by angles of order `strength`, after a stretch whose logs have standard deviation 0.5 at strength 1.

    The stretch stops growing at strength 1, since rounding in the weights' dtype grows with the condition number.
    """
    skew, stretch = rng.normal(size=(2, n, n)) / np.sqrt(n)
    rotation = scipy.linalg.expm(strength * (skew - skew.T))
    symmetric = (stretch + stretch.T) / np.sqrt(2)
    return np.asarray(rotation @ scipy.linalg.expm(0.5 * min(1.0, strength) * symmetric))
