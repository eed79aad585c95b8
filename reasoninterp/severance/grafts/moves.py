"""Moves: sets of Units moved between two minds, both ways, each set read once and remembered.

    restored(S) = E and follow of `tuned` with the Units S from `base`        (does S suffice to give the effect back?)
    cut(S)      = E and follow of `base` with the Units S from `tuned`        (does S suffice to take it away?)

    share("restore", S) = (E(restored(S)) − E(tuned)) / (E(base) − E(tuned))
    share("cut", S)     = (E(base) − E(cut(S))) / (E(base) − E(tuned))

1. `base` and `tuned` stand for `from_mind` and `to_mind`.  Both shares are 0 for no Unit and 1 for all of them; they
   are not bounded by 0 and 1 between.
2. A Unit in which the two minds have the same weights is left out of every set before it is looked up; where the Units
   partition all that differs, `cut(S)` is `restored(all but S)`, the same mind, and is read once.
3. One *evaluation* is one pass over all contrasts in one mind, the two ends included.
4. A share is NaN where the loss it stands over is not safely away from zero (`severance.effects`).

E is the effect of the chain in nats (`patching.metric`); `follow` is 1 where the corrupt answer is preferred to the
clean one after the corrupt chain and not after the clean one, between these two answers (`faithfulness.effect`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray

from reasoninterp.errors import UserError
from reasoninterp.models.context import Context
from reasoninterp.models.minds import Handle, graft, mind
from reasoninterp.models.read import margins_from_logits
from reasoninterp.models.units import Slice, Unit
from reasoninterp.patching.metric import ContrastPlan, contrast_plan
from reasoninterp.severance.effects import is_safe
from reasoninterp.stats import CONFIDENCE, N_RESAMPLES, Estimate, derive_seed
from reasoninterp.traces.contrast import Contrast

Way = Literal["restore", "cut"]
Of = Literal["effect", "follow"]
WAYS: tuple[Way, Way] = ("restore", "cut")
NOT_SAFE = Estimate(np.nan, np.nan, np.nan, 0, "")


class Read(NamedTuple):
    """What one mind does with every contrast: `effect` [contrast] in nats and `follow` [contrast], 0 or 1."""

    effect: NDArray[np.float64]
    follow: NDArray[np.float64]


class Reader:
    """Reads all contrasts in one mind after another, in batches of at most `context.rows` rows."""

    def __init__(self, context: Context, contrasts: Sequence[Contrast]) -> None:
        self.context, self.contrasts = context, list(contrasts)
        self._plans: list[tuple[list[int], ContrastPlan]] = []
        self._rows = 0

    def __call__(self, handle: Handle) -> Read:
        """Effect and follow of every contrast, in their order, in one mind."""
        effect, follow = (np.zeros(len(self.contrasts)) for _ in range(2))
        with self.context.open(handle) as body, torch.no_grad():
            for places, plan in self._batches():
                logits = body.forward(plan.both.ids, positions=plan.both.positions)
                margin = margins_from_logits(plan.both, logits).margin.double().cpu().numpy()
                clean, corrupt = margin[: plan.n], margin[plan.n :]
                effect[places] = corrupt - clean
                follow[places] = (corrupt > 0) & (clean < 0)
        return Read(effect, follow)

    def _batches(self) -> list[tuple[list[int], ContrastPlan]]:
        """Plans of contrasts of like length; made anew where the context has had to take fewer rows."""
        if self._rows != self.context.rows:
            self._rows = self.context.rows
            lengths = [len(self.context.encode(c.clean).ids) for c in self.contrasts]
            order = sorted(range(len(lengths)), key=lambda i: lengths[i])
            size = max(1, self._rows // 2)
            chunks = [order[at : at + size] for at in range(0, len(order), size)]
            self._plans = [(c, contrast_plan(self.context, [self.contrasts[i] for i in c])) for c in chunks]
        return self._plans


class Moves:
    """Grafts of sets of Units between two minds, remembered.

    Attributes:
        names: the Units' names, in the order given.
        moved: those of them in which the two minds differ.
        norms: by name, the Frobenius norm of `tuned − base` on the Unit.
        evaluations: passes over all contrasts so far.
    """

    def __init__(
        self,
        context: Context,
        contrasts: Sequence[Contrast],
        units: Sequence[Unit],
        *,
        from_mind: str = "base",
        to_mind: str = "tuned",
        read: Callable[[Handle], Read] | None = None,
    ) -> None:
        """
        Args:
            context: the minds and the tokenizer.
            contrasts: what every mind is read with, at least one (not looked at where `read` is given).
            units: what can be moved; their slices must not overlap.
            from_mind: the mind with the path (`base`).
            to_mind: the mind in which it may be cut (`tuned`).
            read: reads a mind; by default `Reader(context, contrasts)` (a study puts its memo here).

        Raises:
            UserError: no contrasts, no Units, or two Units of one name.
        """
        if not len(contrasts) and read is None:
            raise UserError("contrasts: none is given; give traces of which contrasts can be made.")
        self.names = tuple(u.name for u in units)
        if not units or len(set(self.names)) != len(units):
            raise UserError("units: give at least one Unit, each once, of one level.")
        self.from_mind, self.to_mind, self.seed = from_mind, to_mind, context.seed
        self.units = {u.name: u for u in units}
        self.evaluations = 0
        self._read = read or Reader(context, contrasts)
        self._memo: dict[tuple[Way, frozenset[str]], Read] = {}
        self.norms, self._is_partition = unit_norms(context, units, from_mind, to_mind)
        self.moved = tuple(name for name in self.names if self.norms[name] > 0)

    @cached_property
    def base(self) -> Read:
        """The mind with the path as it is."""
        return self._at(mind(self.from_mind))

    @cached_property
    def tuned(self) -> Read:
        """The mind in which the path may be cut, as it is."""
        return self._at(mind(self.to_mind))

    def restored(self, names: Iterable[str]) -> Read:
        """`tuned` with these Units from `base`."""
        return self.read("restore", names)

    def cut(self, names: Iterable[str]) -> Read:
        """`base` with these Units from `tuned`."""
        return self.read("cut", names)

    def read(self, way: Way, names: Iterable[str]) -> Read:
        """`restored` or `cut`.

        Raises:
            UserError: a name that is no Unit's.
        """
        asked = frozenset(names)
        if unknown := sorted(asked - set(self.names)):
            raise UserError(f"unit {unknown[0]!r}: not one of the Units that can be moved, e.g. {self.names[0]}.")
        chosen = asked & frozenset(self.moved)
        if not chosen:
            return self.tuned if way == "restore" else self.base
        key: tuple[Way, frozenset[str]] = (way, chosen)
        if self._is_partition:
            if way == "cut":
                key = ("restore", frozenset(self.moved) - chosen)
            if len(key[1]) in (0, len(self.moved)):
                return self.base if key[1] else self.tuned
        if key not in self._memo:
            self._memo[key] = self._at(self.handle(way, chosen))
        return self._memo[key]

    def handle(self, way: Way, names: Iterable[str]) -> Handle:
        """The grafted mind itself; an end where nothing that differs is moved."""
        chosen = frozenset(names) & frozenset(self.moved)
        onto, source = (self.to_mind, self.from_mind) if way == "restore" else (self.from_mind, self.to_mind)
        return graft(onto, source, [u for n, u in self.units.items() if n in chosen]) if chosen else mind(onto)

    def share(self, way: Way, names: Iterable[str]) -> float:
        """Share of the loss of E that the set returns or takes away; NaN where the loss is not safe."""
        return self._share("effect", way, names)

    def share_follow(self, way: Way, names: Iterable[str]) -> float:
        """Share of the loss of the follow rate; NaN where that loss is not safe."""
        return self._share("follow", way, names)

    def least_share(self, way: Way, names: Iterable[str]) -> float:
        """The smaller of `share` and `share_follow`, where both losses are safe; else `share`."""
        names = tuple(names)
        shares = [self.share(way, names), *([self.share_follow(way, names)] if self.safe("follow") else [])]
        return min(shares)

    def interval(self, way: Way, names: Iterable[str], *, of: Of = "effect") -> Estimate:
        """`share` (or `share_follow`) with its interval over traces (see `draws`); NaN where the loss is not safe."""
        names = tuple(names)
        return self.estimates(way, [names], of=of)[0]

    def estimates(self, way: Way, sets: Sequence[Iterable[str]], *, of: Of = "effect") -> list[Estimate]:
        """`interval` of several sets."""
        if not self.safe(of):
            return [NOT_SAFE] * len(sets)
        kept = [tuple(names) for names in sets]
        n, method = len(self.base.effect), "bootstrap" if of == "effect" else "jeffreys"
        low, high = np.quantile(self.draws(way, kept, of=of), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=0)
        out = []
        for names, a, b in zip(kept, low, high, strict=True):
            value = self._share(of, way, names)
            # Where every trace gives one value, its share lies outside the quantiles of the posterior.
            out.append(Estimate(value, float(np.minimum(a, value)), float(np.maximum(b, value)), n, method))
        return out

    def draws(self, way: Way, sets: Sequence[Iterable[str]], *, of: Of = "effect") -> Float[np.ndarray, "draw set"]:
        """Shares of several sets, drawn `N_RESAMPLES` times; NaN where there is a single trace.

        Of E, by bootstrap: the same resampled traces serve all sets and both ways.  Of the follow rate, with each
        mind's rate from Jeffreys' posterior: the bootstrap of a rate at 0 or 1 is a point.  The minds' rates are drawn
        independently of each other, which makes these intervals wider than pairs would.
        """
        kept = [tuple(names) for names in sets]
        n = len(self.base.effect)
        if n < 2 or not kept:
            return np.full((N_RESAMPLES, len(kept)), np.nan)
        if of == "follow":
            ends = self._rates(self.base, "base"), self._rates(self.tuned, "tuned")
            moved = [self._rates(self.read(way, names), f"{way} {sorted(names)}") for names in kept]
            start, sign = (ends[1], 1) if way == "restore" else (ends[0], -1)
            with np.errstate(all="ignore"):
                return np.stack([sign * (now - start) / (ends[0] - ends[1]) for now in moved], axis=1)
        rng = np.random.default_rng(derive_seed(self.seed, "bootstrap"))
        counts = rng.multinomial(n, np.full(n, 1 / n), size=N_RESAMPLES)
        pairs = [self.gained(way, names) for names in kept]
        with np.errstate(all="ignore"):
            drawn: NDArray[np.float64] = (
                counts @ np.stack([g for g, _ in pairs], axis=1) / (counts @ pairs[0][1])[:, None]
            )
        return drawn

    def _rates(self, read: Read, name: str) -> NDArray[np.float64]:
        """Draws of a mind's follow rate; those of an end are the same wherever it stands."""
        name = "base" if read is self.base else "tuned" if read is self.tuned else name
        hits, n = float(read.follow.sum()), len(read.follow)
        rng = np.random.default_rng(derive_seed(self.seed, "follow", name))
        return rng.beta(hits + 0.5, n - hits + 0.5, size=N_RESAMPLES)

    def gained(
        self, way: Way, names: Iterable[str], *, of: Of = "effect"
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Per contrast, what the set moves and what was lost: numerator and denominator of the share."""
        base, tuned, now = getattr(self.base, of), getattr(self.tuned, of), getattr(self.read(way, names), of)
        return (now - tuned if way == "restore" else base - now), base - tuned

    def safe(self, of: Of = "effect") -> bool:
        """Whether a loss is safely away from zero, so that shares of it mean something."""
        return self._safe[of]

    @cached_property
    def _safe(self) -> dict[str, bool]:
        ends = self.base, self.tuned
        return {
            "effect": is_safe(ends[0].effect, ends[1].effect, seed=self.seed),
            "follow": is_safe(ends[0].follow, ends[1].follow, seed=self.seed),
        }

    def norm(self, names: Iterable[str]) -> float:
        """Frobenius norm of `tuned − base` on these Units."""
        return float(np.sqrt(sum(self.norms[name] ** 2 for name in set(names))))

    def _share(self, of: Of, way: Way, names: Iterable[str]) -> float:
        if not self.safe(of):
            return float("nan")
        gained, lost = self.gained(way, names, of=of)
        return float(gained.mean() / lost.mean())

    def _at(self, handle: Handle) -> Read:
        self.evaluations += 1
        return self._read(handle)


def unit_norms(context: Context, units: Sequence[Unit], from_mind: str, to_mind: str) -> tuple[dict[str, float], bool]:
    """By Unit, the norm of its weight change; and whether the Units' slices fill every parameter that differs."""
    squares, whole = dict.fromkeys((u.name for u in units), 0.0), True
    parts: dict[str, list[tuple[str, Slice]]] = {}
    for unit in units:
        for part in unit.parts:
            parts.setdefault(part.param, []).append((unit.name, part))
    for param, delta in context.minds.delta(from_mind, to_mind):
        covered = 0
        for name, part in parts.get(param, []):
            piece = part.of(delta)
            squares[name] += float(piece.double().square().sum())
            covered += piece.numel()
        whole = whole and covered == delta.numel()
    return {name: float(np.sqrt(square)) for name, square in squares.items()}, whole
