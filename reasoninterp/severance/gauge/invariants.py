"""Invariants: what no change of gauge alters, by which heads and neurons of two minds are told to be the same.

1. `folded`: rows with the gain of the norm they read multiplied in; no scaling of the gain changes them.
2. `head_costs`: how unlike two heads are by their products `W_V W_O` and `W_Q W_Kᵀ`; no basis of a head changes them.
3. `neuron_vectors`: what a neuron reads and writes, at one scale.
"""

from __future__ import annotations

import numpy as np

from reasoninterp.models.layout import Array, Layer


def head_costs(base: Layer, tuned: Layer) -> Array:
    """[head of base, head of tuned]: 2 − cosine of the products `W_V W_O` − cosine of `W_Q W_Kᵀ`.

    The products are formed by their d_head × d_head inner products only.  A head that writes nothing has cosine 0.
    """
    n_queries, cost = base.shape.n_queries, np.zeros((base.shape.n_heads, base.shape.n_heads))
    for keyed, headed in (("v", "o"), ("k", "q")):
        a, b = ((_heads_rows(y, keyed).repeat(n_queries, 0), _heads_rows(y, headed)) for y in (base, tuned))
        own = [_products(*x, *x, diagonal=True) for x in (a, b)]
        norms = np.sqrt(np.outer(*own))
        product = _products(*a, *b)
        cost = cost + 1 - np.divide(product, norms, out=np.zeros_like(product), where=norms > 0)
    return np.maximum(cost, 0.0)


def _heads_rows(layer: Layer, role: str) -> Array:
    return layer.at["o"] if role == "o" else folded(layer, role, "ln1")


def _products(keyed: Array, headed: Array, to_keyed: Array, to_headed: Array, *, diagonal: bool = False) -> Array:
    """Frobenius inner products of `keyedᵀ headed` of each head with each of the others (or with its own)."""
    if diagonal:
        return np.asarray(((keyed @ to_keyed.swapaxes(1, 2)) * (headed @ to_headed.swapaxes(1, 2))).sum((1, 2)))
    rows = []
    for one, other in zip(keyed, headed, strict=True):
        rows.append(((one @ to_keyed.swapaxes(1, 2)) * (other @ to_headed.swapaxes(1, 2))).sum((1, 2)))
    return np.stack(rows)


def folded(layer: Layer, role: str, norm: str) -> Array:
    """What rows read, with the norm's gain multiplied in: [..., d_model + 1], the last column being the bias.

    No scaling of the gain changes it, and a change of basis acts on it as on the rows themselves.
    """
    rows = layer.at[role]
    bias = rows @ layer.at[f"b_{norm}"] if f"b_{norm}" in layer.at else np.zeros(rows.shape[:-1])
    for name in (f"b{role}", f"b_{role}"):
        bias = bias + layer.at.get(name, 0.0)
    return np.concatenate([rows * layer.at[norm], bias[..., None]], axis=-1)


def neuron_vectors(layer: Layer, *, balanced: bool) -> Array:
    """[neuron, features]: what each neuron reads and writes; with `balanced`, up and down scaled to one length."""
    up, down = folded(layer, "up", "ln2"), layer.at["down"]
    if balanced:
        lengths = np.linalg.norm(up, axis=1), np.linalg.norm(down, axis=1)
        alive = (lengths[0] > 0) & (lengths[1] > 0)
        s = np.sqrt(np.divide(lengths[1], lengths[0], out=np.ones(len(up)), where=alive))
        s[~alive] = 1.0
        up, down = up * s[:, None], down / s[:, None]
    gate = [folded(layer, "gate", "ln2")] if "gate" in layer.at else []
    return np.concatenate([*gate, up, down], axis=1)


def squared_distances(a: Array, b: Array) -> Array:
    """[n, m] squared distances between rows."""
    cross = a @ b.T
    return np.maximum((a * a).sum(1)[:, None] + (b * b).sum(1) - 2 * cross, 0.0)
