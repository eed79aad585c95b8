"""Bases: the closed forms by which one set of weights is brought nearest to another within its gauge.

1. `nearest_basis` (d × d): rows left → R left, right → R⁻ᵀ right.  Only `leftᵀ right` is a matter of function.  Both
   minds are brought into the basis in which `left leftᵀ = right rightᵀ`; there, what is left of the gauge is orthogonal,
   and orthogonal Procrustes (Schönemann 1966) finds it; it is carried back into the base's own basis.  Where tuning
   changed one piece of it, the others alone, by least squares, find R exactly.
2. `nearest_scales`: s > 0 that minimises `A s² − 2 B s − 2 C / s + D / s²`, by the real roots of a quartic.  Scalings
   of neurons, and the rotary case, are of this form.
3. `rotary`: one complex c for each pair of coordinates, by alternating its phase and (2) its size.
4. `nearest_gain`: one scale a feature, from what gains and rows tell of it; `gain_evidence`: whether it is one at all.
5. `match`: assignment by cost, taken cycle by cycle, and only where a cycle is clearly cheaper than staying.

Of several candidates the one with the least *sum of norms* over pieces (a matrix of one head, a row) is taken, and
not the least sum of squares: squares would spread a change that tuning made in one piece over all that share its gauge.
"""

from __future__ import annotations

import numpy as np
import scipy.linalg
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from reasoninterp.models.layout import Array

TINY = 1e-300
MAX_CONDITION = 1e4  # of a change of basis: beyond it, float32 weights lose the function to rounding


def nearest_basis(
    left: Array, right: Array, to_left: Array, to_right: Array, *, pieces: tuple[int, int] = (1, 1)
) -> Array | None:
    """R that brings `R left` and `R⁻ᵀ right` nearest to the base's; None where no well-conditioned one is found.

    Args:
        left, right: the tuned mind's rows [d, n] and [d, m], of which `leftᵀ right` is a matter of function.
        to_left, to_right: the base's.
        pieces: of how many matrices, side by side, left and right are made.
    """
    candidates = [_balanced(left, right, to_left, to_right)]
    candidates += [_least_squares(a, b) for a, b in _pairs(left, to_left, pieces[0])]
    candidates += [_inverse_transposed(_least_squares(a, b)) for a, b in _pairs(right, to_right, pieces[1])]
    return _nearest([b for b in candidates if b is not None], (left, right), (to_left, to_right), pieces)


def nearest_scales(square: Array, linear: Array, inverse: Array, inverse_square: Array) -> Array:
    """Per entry, the s > 0 that minimises `A s² − 2 B s − 2 C / s + D / s²`; 1 where A or D is 0.

    Args:
        square, linear, inverse, inverse_square: A, B, C, D [n].
    """
    out = np.ones_like(square)
    usable = (square > 0) & (inverse_square > 0)
    if not usable.any():
        return out
    a, b, c, d = (x[usable] for x in (square, linear, inverse, inverse_square))
    # the derivative times s³ / 2:  A s⁴ − B s³ + C s − D = 0; it has a positive root, since it is −D < 0 at 0
    companion = np.zeros((len(a), 4, 4))
    companion[:, 1:, :3] = np.eye(3)
    companion[:, :, 3] = np.stack([d / a, -c / a, np.zeros_like(a), b / a], axis=1)
    roots = np.linalg.eigvals(companion)
    s = np.where((np.abs(roots.imag) < 1e-6 * np.abs(roots)) & (roots.real > 0), roots.real, np.nan)
    value = a[:, None] * s**2 - 2 * b[:, None] * s - 2 * c[:, None] / s + d[:, None] / s**2
    best = np.nanargmin(np.where(np.isnan(value), np.inf, value), axis=1)
    chosen = s[np.arange(len(a)), best]
    out[usable] = np.where(np.isnan(chosen), 1.0, chosen)
    return out


def nearest_gain(gains: Array, rows: Array, to_gains: Array, to_rows: Array) -> Array:
    """s [d_model] for which `s gains` and `rows / s` are nearest to the base's, feature by feature.

    Gains and rows each tell s by least squares.  Their logs are averaged by the inverse of their variances: of the
    rows' that of a slope; of the gains' what rows and gains differ by beyond it, which is one number for all features.
    So where much was done to all rows the gains decide, and where the gains were tuned too the rows do.  Where tuning
    changed some rows only, the gains alone, as the other candidate, are exact.

    Args:
        gains, rows: the tuned mind's gain (and bias) [1 or 2, d_model] and what reads it [n, d_model].
        to_gains, to_rows: the base's.
    """
    by_gains = gain_ratio(gains, to_gains)
    size, by_rows = (to_rows * to_rows).sum(0), (rows * to_rows).sum(0)
    usable = ((gains * to_gains).sum(0) > 0) & (by_rows > 0)
    if not usable.any():
        return by_gains
    by_rows = np.divide(by_rows, size, out=np.ones_like(size), where=usable)
    left = ((rows - by_rows * to_rows) ** 2).sum(0) / max(len(rows) - 1, 1)
    doubt = np.divide(left, by_rows**2 * size, out=np.zeros_like(size), where=usable)
    x, y = np.log(by_gains), np.log(by_rows)
    spread = max(0.0, float(((x - y) ** 2 - doubt)[usable].mean()))
    trust = np.divide(doubt, doubt + spread, out=np.ones_like(doubt), where=doubt + spread > 0)
    both = np.exp(np.where(usable, trust * x + (1 - trust) * y, x))

    def distance(s: Array) -> float:
        return float(sum(np.linalg.norm(d, axis=1).sum() for d in (gains * s - to_gains, rows / s - to_rows)))

    return np.asarray(min((by_gains, both), key=distance))


def gain_ratio(gains: Array, to_gains: Array) -> Array:
    """s [d_model] for which `s gains` is nearest to the base's; 1 where their product is not above 0."""
    linear, square = (gains * to_gains).sum(0), (gains * gains).sum(0)
    return np.divide(linear, square, out=np.ones_like(square), where=(linear > 0) & (square > 0))


def gain_evidence(gains: Array, rows: Array, to_gains: Array, to_rows: Array) -> float:
    """Log likelihood of what became of the rows if the gains moved by a change of gauge, less that if by themselves.

    With s what the gains tell: rows = s (to_rows + noise), or rows = to_rows + noise, the noise being normal, alike in
    all features, of unknown size.  What else was done to the rows before a change of gauge was scaled along with them,
    so that even rows in which little of the base's is left tell the two apart.

    Args:
        gains, rows, to_gains, to_rows: as for `nearest_gain`.

    Returns:
        Nats per row; 0 where the gains did not move.
    """
    s = gain_ratio(gains, to_gains)
    floor = TINY + 1e-14 * squared(to_rows)
    alone, along = (max(squared(x), floor) for x in (rows - to_rows, rows / s - to_rows))
    return float(len(s) / 2 * np.log(alone / along) - np.log(s).sum())


def nearest_neuron_scales(up: Array, down: Array, to_up: Array, to_down: Array) -> Array:
    """s [neuron] for which `s up` and `down / s` are nearest to the base's, neuron by neuron; rows are neurons."""
    square, inverse_square = (up * up).sum(1), (down * down).sum(1)
    linear, inverse = (up * to_up).sum(1), (down * to_down).sum(1)
    both = nearest_scales(square, linear, inverse, inverse_square)
    by_up = np.divide(linear, square, out=both.copy(), where=(square > 0) & (linear > 0))
    by_down = np.divide(inverse_square, inverse, out=both.copy(), where=(inverse > 0) & (inverse_square > 0))
    candidates = np.stack([both, by_up, by_down])
    distances = [
        np.linalg.norm(up * s[:, None] - to_up, axis=1) + np.linalg.norm(down / s[:, None] - to_down, axis=1)
        for s in candidates
    ]
    return np.asarray(candidates[np.argmin(distances, axis=0), np.arange(len(up))])


def nearest_rotary(
    queries: Array, keys: Array, to_queries: Array, to_keys: Array, *, pieces: tuple[int, int] = (1, 1)
) -> Array | None:
    """As `nearest_basis` for what commutes with rotary positions.

    Args:
        queries, keys: the tuned mind's rows [d, n] and [d, m].
        to_queries, to_keys: the base's.
        pieces: of how many matrices, side by side, queries and keys are made.
    """
    candidates: list[NDArray[np.complex128]] = [rotary(queries, keys, to_queries, to_keys)]
    for a, b in _pairs(queries, to_queries, pieces[0]):
        q, to_q = _paired(a), _paired(b)
        candidates.append(np.asarray((to_q * q.conj()).sum(1) / np.maximum((np.abs(q) ** 2).sum(1), TINY), complex))
    for a, b in _pairs(keys, to_keys, pieces[1]):
        k, to_k = _paired(a), _paired(b)
        inverse = (to_k * k.conj()).sum(1) / np.maximum((np.abs(k) ** 2).sum(1), TINY)
        candidates.append(np.asarray(1 / np.where(np.abs(inverse) > 0, inverse, 1).conj(), complex))
    found = [rotary_basis(c) for c in candidates if (np.abs(c) > 0).all()]
    return _nearest(found, (queries, keys), (to_queries, to_keys), pieces)


def rotary_basis(factors: NDArray[np.complex128]) -> Array:
    """The R that multiplies the pair (i, i + d/2), read as a complex number, by `factors[i]`; [d, d]."""
    real, imaginary = np.diag(factors.real), np.diag(factors.imag)
    return np.block([[real, -imaginary], [imaginary, real]])


def rotary(queries: Array, keys: Array, to_queries: Array, to_keys: Array) -> NDArray[np.complex128]:
    """Per pair (i, i + d/2), the c for which `c q` and `k / c̄` are nearest to the base's.

    Args:
        queries, keys: the tuned mind's rows [d, n] and [d, m].
        to_queries, to_keys: the base's.
    """
    q, k, to_q, to_k = (_paired(x) for x in (queries, keys, to_queries, to_keys))
    a, b = (to_q.conj() * q).sum(1), (to_k.conj() * k).sum(1)
    square, inverse_square = (np.abs(q) ** 2).sum(1), (np.abs(k) ** 2).sum(1)
    # exact where tuned is the base in another gauge, since then |q| |k| is the base's
    size = np.sqrt(
        np.sqrt((np.abs(to_q) ** 2).sum(1) * inverse_square)
        / np.maximum(np.sqrt((np.abs(to_k) ** 2).sum(1) * square), TINY)
    )
    size = np.where((size > 1 / MAX_CONDITION) & (size < MAX_CONDITION), size, 1.0)
    phase = np.ones(len(size), dtype=complex)
    for _ in range(20):
        pull = size * a + b / size
        phase = np.where(np.abs(pull) > 0, pull.conj() / np.maximum(np.abs(pull), TINY), phase)
        size = nearest_scales(square, (phase * a).real, (phase * b).real, inverse_square)
    return np.asarray(size * phase)


def signs(queries: Array, keys: Array, to_queries: Array, to_keys: Array) -> NDArray[np.complex128]:
    """As `rotary` with c = ±1."""
    q, k, to_q, to_k = (_paired(x) for x in (queries, keys, to_queries, to_keys))
    pull = (to_q.conj() * q).sum(1).real + (to_k.conj() * k).sum(1).real
    return np.where(pull < 0, -1.0, 1.0).astype(complex)


def match(cost: Array, keep: float) -> NDArray[np.int64]:
    """For each row the column it goes with: an assignment of least cost, where it is clearly cheaper than staying.

    Args:
        cost: [n, n], not negative; staying is the diagonal.
        keep: a cycle of the assignment is taken only if its cost is below this share of its cost of staying.
    """
    n = len(cost)
    rows, columns = np.arange(n), cost.argmin(1)
    # Where a row and a column are each other's cheapest they go together; the assignment proper is cubic.
    agreed = cost.argmin(0)[columns] == rows
    target = np.where(agreed, columns, -1)
    if not agreed.all():
        left_rows, left_columns = rows[~agreed], np.setdiff1d(rows, columns[agreed])
        i, j = linear_sum_assignment(cost[np.ix_(left_rows, left_columns)])
        target[left_rows[i]] = left_columns[j]
    out, seen = rows.copy(), target == rows
    for start in rows:
        if seen[start]:
            continue
        cycle = [int(start)]
        while (after := int(target[cycle[-1]])) != start:
            cycle.append(after)
        seen[cycle] = True
        if cost[cycle, target[cycle]].sum() < keep * cost[cycle, cycle].sum():
            out[cycle] = target[cycle]
    return out


def least_cost(cost: Array) -> float:
    """Cost of the best assignment of rows to columns."""
    return float(cost[linear_sum_assignment(cost)].sum())


def squared(x: Array) -> float:
    """The sum of squares."""
    return float(np.vdot(x, x))


def _pairs(rows: Array, to_rows: Array, pieces: int) -> list[tuple[Array, Array]]:
    """The pieces of the tuned mind's rows with the base's."""
    return list(zip(np.split(rows, pieces, axis=1), np.split(to_rows, pieces, axis=1), strict=True))


def _nearest(
    candidates: list[Array], rows: tuple[Array, Array], onto: tuple[Array, Array], pieces: tuple[int, int]
) -> Array | None:
    """The well-conditioned basis with the least sum of norms over pieces."""
    found: list[tuple[float, int]] = []
    for i, basis in enumerate(candidates):
        if np.linalg.cond(basis) < MAX_CONDITION:
            moved: tuple[Array, Array] = basis @ rows[0], np.asarray(np.linalg.solve(basis.T, rows[1]), np.float64)
            distances = [
                np.linalg.norm(a - b) for side in (0, 1) for a, b in _pairs(moved[side], onto[side], pieces[side])
            ]
            found.append((float(np.sum(distances)), i))
    return candidates[min(found)[1]] if found else None


def _balanced(left: Array, right: Array, to_left: Array, to_right: Array) -> Array | None:
    mine, theirs = _balance(left, right), _balance(to_left, to_right)
    if mine is None or theirs is None:
        return None
    product = (theirs @ to_left) @ (mine @ left).T
    product += np.linalg.solve(theirs.T, to_right) @ np.linalg.solve(mine.T, right).T
    # `orthogonal_procrustes(a, b)` minimises ‖a Ω − b‖; it needs but aᵀ b, here given as (I, aᵀ b).
    omega, _ = scipy.linalg.orthogonal_procrustes(np.eye(len(product)), product)
    return np.asarray(np.linalg.solve(theirs, omega @ mine))


def _balance(left: Array, right: Array) -> Array | None:
    """S for which `S left leftᵀ Sᵀ = S⁻ᵀ right rightᵀ S⁻¹`; None where a factor is rank-deficient."""
    a, b = left @ left.T, right @ right.T
    if not (np.linalg.cond(a) < 1e12 and np.linalg.cond(b) < 1e12):
        return None
    # M = Sᵀ S solves M A M = B: the geometric mean of B and A⁻¹
    root = _power(a, 0.5)
    inverse = _power(a, -0.5)
    return _power(inverse @ _power(root @ b @ root, 0.5) @ inverse, 0.5)


def _power(matrix: Array, power: float) -> Array:
    """A power of a symmetric positive matrix."""
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    return np.asarray((vectors * np.maximum(values, TINY) ** power) @ vectors.T)


def _least_squares(rows: Array, to_rows: Array) -> Array | None:
    """R that brings `R rows` nearest to the base's rows."""
    gram = rows @ rows.T
    if not np.linalg.cond(gram) < 1e12:
        return None
    return np.asarray(np.linalg.solve(gram, rows @ to_rows.T).T)


def _inverse_transposed(basis: Array | None) -> Array | None:
    return None if basis is None or not np.linalg.cond(basis) < MAX_CONDITION else np.asarray(np.linalg.inv(basis).T)


def _paired(rows: Array) -> NDArray[np.complex128]:
    """Coordinates i and i + d/2 as one complex number."""
    half = len(rows) // 2
    return np.asarray(rows[:half] + 1j * rows[half:])
