"""Align: the tuned mind in the base's gauge, so that the straight path between them changes function and not basis.

Weights of one function are many (`models.gauge`); a path in weight space, a weight difference and a graft of part of
a gauge orbit are not the same for all of them.  Layer by layer, with the norms' gains folded into what reads them:

1. Heads are matched by what no gauge changes: cosines of `W_V W_O` and of `W_Q W_Kᵀ`, by linear assignment.
2. Values and outputs of each key/value head: the change of basis that brings both nearest (`severance.gauge.bases`).
3. Queries and keys likewise, within what commutes with the positions and with the norms of queries and keys.
4. Neurons of the MLP are matched by what they read and write, scaled alike; then their scale is brought back.
5. The gains are divided from what reads them so that both are nearest to the base's.

Steps 2 to 4 are taken, head by head, only where they are *clear*: where they shrink ‖tuned − base‖ of that piece by a
stated share more than as many free parameters would shrink pure noise.  What is not clearly a change of gauge stays as
it is, bit for bit.  A gain is shared by Units, so that one that is left in another gauge makes every one of them look
cut; and whatever else was done to its many readers hides it from that test.  So step 5 is also taken where the gains
moved and what became of their readers is likelier if it was a change of gauge than if the gains were tuned
(`bases.gain_evidence`).  At the end the logits are compared on probe ids.

Several gauges may be nearly as near: where tuning changed one matrix, what shares a gauge with it decides, so that the
change stays where it was made (`bases`).

Matching by assignment follows Ainsworth et al. 2023 (Git Re-Basin), here against a base that the other comes from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from reasoninterp.errors import UserError
from reasoninterp.models import gauge
from reasoninterp.models.layout import (
    Array,
    Final,
    Layer,
    read_final,
    read_layer,
    shape_of,
    write_final,
    write_layer,
)
from reasoninterp.models.minds import Minds
from reasoninterp.severance.gauge import bases
from reasoninterp.severance.gauge.bases import squared
from reasoninterp.severance.gauge.invariants import folded, head_costs, neuron_vectors, squared_distances

# Fine-tuning by gradients also drifts a little along the gauge: measured up to 0.21 (the last norm of small models).
MIN_GAIN = 0.30
# Of the cost of staying, what a reordering of heads may cost.  Heads of one base are strangers to each other (cosines
# near 0), so what little is left of a head tells it (`experiments/LOG.md` has what a half instead of a fifth misses).
KEEP = 0.8
# Share of its norm by which a gain must have moved where only the evidence of its readers speaks.  Tuning by gradients
# moves gains by a few hundredths (`experiments/LOG.md`), now and then along the gauge.
MOVED = 0.05
TOLERANCE = 1e-3  # largest change of a logit, relative to the logits' standard deviation, that passes as rounding
EXACT = (torch.float32, torch.float64)
_CIRCUITS = {"OV": ("v", "o"), "QK": ("q", "k")}


@dataclass(frozen=True)
class Alignment:
    """A tuned mind in the base's gauge.

    Attributes:
        mind: its name among the minds; the tuned mind's own where nothing was gained.
        heads: per layer, for each head of the tuned mind the head that it is in the base and in `mind`.
        distance_before, distance_after: Frobenius norm of tuned − base and of mind − base, over all parameters.
        notes: what was done, in sentences.
    """

    mind: str
    heads: tuple[tuple[int, ...], ...]
    distance_before: float
    distance_after: float
    notes: tuple[str, ...]


def align(
    minds: Minds, from_mind: str, to_mind: str, *, name: str | None = None, min_gain: float = MIN_GAIN
) -> Alignment:
    """Bring a mind into another's gauge and register the result, which computes what the mind computed, as a mind.

    Minds in bfloat16 or float16 are left as they are: another basis would be rounded to 2⁻⁹ of each weight, which is
    more than tuning changes.

    Args:
        minds: where both are and where the result is added.
        from_mind: the base.
        to_mind: the tuned mind.
        name: of the result (default: `<to_mind>-aligned`); not used where nothing is gained.
        min_gain: share of the norm of a piece's change that a step must explain, beyond chance, to be taken.

    Raises:
        UserError: no such mind, the name is taken, or an architecture whose gauge is not known.
    """
    name = name or f"{to_mind}-aligned"
    if name in (*minds.names, *minds.derived):
        raise UserError(f"name: a mind {name!r} is here already; choose another name.")
    if not 0 < min_gain < 1:
        raise UserError(f"min_gain: {min_gain:g} is not between 0 and 1.")
    shape = shape_of(minds.body.param_shapes, minds.config)
    stay = tuple(tuple(range(shape.n_heads)) for _ in range(shape.n_layers))
    before = _distance(minds, from_mind, to_mind)

    def unchanged(*notes: str) -> Alignment:
        return Alignment(to_mind, stay, before, before, notes)

    if before == 0:
        return unchanged(f"{to_mind} has the weights of {from_mind}.")
    if minds.dtype not in EXACT:
        return unchanged(
            f"Not aligned: in {str(minds.dtype).removeprefix('torch.')} a change of basis would be rounded by more "
            "than tuning changes; load the minds in float32 to align them."
        )
    new, heads, notes = _align_weights(minds, from_mind, to_mind, min_gain)
    if not new:
        return unchanged("No change of gauge explains what tuning changed; nothing was aligned.", *notes)
    minds.derive(name, to_mind, new)
    gap, after = _gap(minds, to_mind, name), _distance(minds, from_mind, name)
    if gap > TOLERANCE or after >= before:
        minds.discard(name)
        why = f"logits would change by {gap:.1g} of their standard deviation" if gap > TOLERANCE else "it is no nearer"
        return unchanged(f"Not aligned: {why} (at most {TOLERANCE:g} is rounding).", *notes)
    share = f"‖tuned − base‖ went from {before:.3g} to {after:.3g}; logits moved by {gap:.1g} of their deviation."
    return Alignment(name, heads, before, after, (*notes, share))


def _align_weights(
    minds: Minds, from_mind: str, to_mind: str, min_gain: float
) -> tuple[dict[str, Tensor], tuple[tuple[int, ...], ...], list[str]]:
    """The tensors that change, the heads and the notes."""
    base, tuned = minds.weights(from_mind), minds.weights(to_mind)
    shape = shape_of(base, minds.config)
    new: dict[str, Tensor] = {}
    heads, notes = [], []
    for index in range(shape.n_layers):
        step = _LayerAlignment(read_layer(base, shape, index), read_layer(tuned, shape, index), min_gain)
        step.run()
        new.update(write_layer(step.work, tuned))
        heads.append(tuple(int(i) for i in np.argsort(step.order)))
        notes += step.notes
    if not (shape.is_gpt2 or shape.rotates_all):
        notes.append("Queries and keys were left as they are: positions rotate only some of their coordinates.")
    start, final = read_final(base, shape), read_final(tuned, shape)
    if start is not None and final is not None:
        notes += _align_final(start, final, minds.body.n_vocab_shared, min_gain)
        new.update(write_final(final, shape, tuned))
    return new, tuple(heads), notes


class _LayerAlignment:
    """One layer: `work` is the tuned layer and becomes the aligned one; `order[i]` is the tuned head at place i."""

    def __init__(self, base: Layer, tuned: Layer, min_gain: float) -> None:
        self.base, self.tuned, self.work = base, tuned, tuned.copy()
        self.min_gain = min_gain
        self.order = np.arange(base.shape.n_heads)
        self.notes: list[str] = []
        self._name = f"L{base.index}"

    def run(self) -> None:
        """All steps; undone where the layer as a whole comes no nearer."""
        self._heads()
        for group in range(self.base.shape.n_kv_heads):
            self._circuit(group, "OV")
            self._circuit(group, "QK")
        self._neurons()
        for norm in gauge.READERS:
            self._gain(norm)
        if self.notes and _layer_distance(self.work, self.base) >= _layer_distance(self.tuned, self.base):
            self.work, self.order = self.tuned, np.arange(self.base.shape.n_heads)
            self.notes = [f"{self._name}: aligned it came no nearer to the base; it was left as it was."]

    def _heads(self) -> None:
        shape = self.base.shape
        cost = head_costs(self.base, self.work)
        blocks = cost.reshape(shape.n_kv_heads, shape.n_queries, shape.n_kv_heads, shape.n_queries).swapaxes(1, 2)
        best = np.array([[bases.least_cost(block) for block in row] for row in blocks])
        groups = bases.match(best, KEEP)
        within = [bases.match(blocks[i, j], KEEP) for i, j in enumerate(groups)]
        order = np.concatenate([j * shape.n_queries + w for j, w in zip(groups, within, strict=True)])
        for place in np.flatnonzero(order != self.order):
            self.notes.append(f"{self._name}: head {order[place]} of tuned is head {place} of base.")
        gauge.permute_heads(self.work, order)
        self.order = order

    def _circuit(self, group: int, circuit: str) -> None:
        shape, (left, right) = self.base.shape, _CIRCUITS[circuit]
        if circuit == "QK" and not (shape.is_gpt2 or shape.rotates_all):
            return
        rows, onto = ([self._rows(layer, role, group) for role in (left, right)] for layer in (self.work, self.base))
        pieces = (1, shape.n_queries) if circuit == "OV" else (shape.n_queries, 1)
        dof = shape.d_head**2
        if circuit == "OV" or shape.is_gpt2:
            basis = bases.nearest_basis(*rows, *onto, pieces=pieces)
        elif shape.normed:
            basis, dof = bases.rotary_basis(bases.signs(*rows, *onto)), shape.d_head
        else:
            basis, dof = bases.nearest_rotary(*rows, *onto, pieces=pieces), shape.d_head
        if basis is None:
            return
        before = sum(squared(a - b) for a, b in zip(rows, onto, strict=True))
        after = squared(basis @ rows[0] - onto[0]) + squared(np.linalg.solve(basis.T, rows[1]) - onto[1])
        if self._clear(before, after, dof, [*rows, *onto]):
            letter = "G" if shape.n_kv_heads != shape.n_heads else "H"
            (gauge.ov_basis if circuit == "OV" else gauge.qk_basis)(self.work, group, basis)
            self._say(f".{letter}{group}.{circuit}", "a change of basis", before, after)

    def _rows(self, layer: Layer, role: str, group: int) -> Array:
        """Rows of a key/value head: of q and o those of all its query heads, side by side."""
        heads = [group] if role in ("k", "v") else list(gauge.heads_of(layer.shape, group))
        rows = layer.at["o"][heads] if role == "o" else folded(layer, role, "ln1")[heads]
        return np.concatenate(list(rows), axis=1)

    def _neurons(self) -> None:
        shape = self.base.shape
        scales = shape.gated or shape.homogeneous
        mine, theirs = (neuron_vectors(layer, balanced=scales) for layer in (self.work, self.base))
        cost = squared_distances(theirs, mine)
        order = bases.match(cost, (1 - self.min_gain) ** 2)
        moved = int((order != np.arange(len(order))).sum())
        if moved:
            gauge.permute_neurons(self.work, order)
            self.notes.append(f"{self._name}.mlp: {moved} of {len(order)} neurons are others of the base.")
        if not scales:
            return
        (up, down), (to_up, to_down) = ((folded(y, "up", "ln2"), y.at["down"]) for y in (self.work, self.base))
        s = bases.nearest_neuron_scales(up, down, to_up, to_down)
        before = squared(up - to_up) + squared(down - to_down)
        after = squared(up * s[:, None] - to_up) + squared(down / s[:, None] - to_down)
        if self._clear(before, after, len(s), [up, down, to_up, to_down]):
            gauge.scale_neurons(self.work, s)
            self._say(".mlp", "the scale of its neurons", before, after)

    def _gain(self, norm: str) -> None:
        mine, theirs = (
            _reading(y.at, norm, [r for r in gauge.READERS[norm] if r in y.at]) for y in (self.work, self.base)
        )
        s, note = _gain_step(mine, theirs, self.min_gain)
        if note:
            gauge.scale_gain(self.work, norm, s)
            self.notes.append(f"{self._name}.{norm}: {note}")

    def _clear(self, before: float, after: float, dof: int, of: list[Array]) -> bool:
        return is_clear(before, after, dof, of, self.min_gain)

    def _say(self, where: str, what: str, before: float, after: float) -> None:
        self.notes.append(f"{self._name}{where}: {_explained(what, before, after)}")


def _align_final(base: Final, final: Final, n_vocab: int, min_gain: float) -> list[str]:
    """Scale the last gain, in place; the notes."""
    # Rows of the vocabulary that the minds do not share are zeros in one of them.
    mine, theirs = (_reading({**f.at, "unembed": f.at["unembed"][:n_vocab]}, "ln", ["unembed"]) for f in (final, base))
    s, note = _gain_step(mine, theirs, min_gain)
    if not note:
        return []
    gauge.scale_final(final, s)
    return [f"ln_final: {note}"]


def is_clear(before: float, after: float, dof: int, of: list[Array], min_gain: float) -> bool:
    """Whether a step with `dof` free parameters explains more of a piece's change than chance by `min_gain`.

    Fitting `dof` parameters to noise in n weights leaves a share 1 − dof/n of its square; of what is left, the step
    must explain `min_gain` of the norm.  A change that is rounding is no change.

    Args:
        before, after: squared norms of tuned − base.
        dof: free parameters of the step.
        of: arrays of the piece, the tuned mind's and then the base's.
        min_gain: share of the norm.
    """
    n = sum(x.size for x in of) / 2
    size = sum(squared(x) for x in of)
    return before > 1e-12 * size and after <= (1 - min_gain) ** 2 * max(0.0, 1 - dof / n) * before


def _reading(at: Mapping[str, Array], norm: str, readers: list[str]) -> tuple[Array, Array]:
    """A norm's gain and bias [rows, d_model], and the rows that read it [rows, d_model]."""
    gains = np.stack([at[r] for r in (norm, f"b_{norm}") if r in at])
    return gains, np.concatenate([at[r].reshape(-1, gains.shape[1]) for r in readers])


def _gain_step(mine: tuple[Array, Array], theirs: tuple[Array, Array], min_gain: float) -> tuple[Array, str]:
    """s [d_model] for gains s g and readers / s, and what is said of it: nothing where the step is not to be taken."""
    (gains, rows), (to_gains, to_rows) = mine, theirs
    s = bases.nearest_gain(gains, rows, to_gains, to_rows)
    moved = squared(gains - to_gains)
    before = moved + squared(rows - to_rows)
    after = squared(gains * s - to_gains) + squared(rows / s - to_rows)
    if is_clear(before, after, len(s), [*mine, *theirs], min_gain):
        return s, _explained("the scale of its gain", before, after)
    evidence = bases.gain_evidence(gains, rows, to_gains, to_rows)
    if moved <= MOVED**2 * squared(to_gains) or evidence <= 0:
        return s, ""
    # So much else was done to the rows that they would move the gains anywhere: the gains decide.
    note = f"the scale of its gain explained {evidence:.2g} nats of each row that reads it."
    return bases.gain_ratio(gains, to_gains), note


def _explained(what: str, before: float, after: float) -> str:
    return f"{what} explained {1 - np.sqrt(after / before):.0%} of its weight change."


def _layer_distance(a: Layer, b: Layer) -> float:
    return sum(squared(a.at[role] - b.at[role]) for role in a.at)


def _distance(minds: Minds, start: str, stop: str) -> float:
    """Frobenius norm of the difference, over the shared rows of the vocabulary."""
    return float(np.sqrt(sum(float(d.double().square().sum()) for _, d in minds.delta(start, stop))))


def _gap(minds: Minds, one: str, other: str) -> float:
    """Largest difference of logits on random ids, relative to their standard deviation."""
    body = minds.body
    length = min(32, body.max_positions or 32)
    ids = torch.randint(body.n_vocab_shared, (4, length), generator=torch.Generator().manual_seed(0))
    logits = []
    for which in (one, other):
        with minds.at(which):
            logits.append(body.forward(ids).double())
    return float((logits[0] - logits[1]).abs().max() / logits[0].std())
