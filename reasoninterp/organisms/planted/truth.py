"""Truth of a planted pair: which sets of Units restore the path and which cut it, at every level.

A pair's truth is a pair of families of 1-minimal sets of Units, *restoring* and *cutting*, kept apart: where two
redundant places were cut, restoring either suffices ({A}, {B}) and only both together cut ({A, B}); where two places
in a row were cut, only both together restore ({A, B}) and either cuts ({A}, {B}).  It is known at the level at which
it was planted (`grain`) and at every coarser one; at a finer one it is not known.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from reasoninterp.models.units import Level

Names = frozenset[str]
Family = tuple[Names, ...]
GRAINS: tuple[Level, ...] = ("circuit", "head", "block", "layer")
_HEAD = re.compile(r"^(L\d+)\.[HG]\d+")


@dataclass(frozen=True)
class Truth:
    """Restoring and cutting families in the base's names, and the finest level at which they are known."""

    grain: Level
    restoring: Family
    cutting: Family

    def at(self, level: Level) -> Truth | None:
        """The truth at a level; None at one finer than the grain."""
        if level not in GRAINS or GRAINS.index(level) < GRAINS.index(self.grain):
            return None
        return Truth(level, coarsened(self.restoring, level), coarsened(self.cutting, level))

    @property
    def planted(self) -> Names:
        """Every Unit that is in some set."""
        return frozenset().union(*self.restoring, *self.cutting)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "grain": self.grain,
            "restoring": [sorted(s) for s in self.restoring],
            "cutting": [sorted(s) for s in self.cutting],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Truth:
        """The truth that `to_json` wrote."""
        families = [tuple(frozenset(s) for s in value[k]) for k in ("restoring", "cutting")]
        return cls(value["grain"], families[0], families[1])


def coarser(name: str, level: Level) -> str:
    """The Unit of a coarser level that holds this Unit."""
    if level in ("head", "circuit"):
        return name.removesuffix(".QK").removesuffix(".OV") if level == "head" else name
    head = _HEAD.match(name)
    if level == "block":
        return f"{head[1]}.attn" if head else name
    return name.split(".")[0]


def coarsened(family: Iterable[Names], level: Level) -> Family:
    """A family at a coarser level, without sets that hold another of it."""
    sets = {frozenset(coarser(n, level) for n in s) for s in family}
    return tuple(sorted((s for s in sets if not any(o < s for o in sets)), key=sorted))


def minimal(kept: Mapping[Names, float], places: Names, *, enough: float = 0.9) -> tuple[Family, Family]:
    """Restoring and cutting families from the share of E that is kept when a set of places is cut.

    Args:
        kept: for every subset of the places, the share kept with those cut.
        places: all places.
        enough: a set restores if at least this share is kept with the others cut, and cuts if at most `1 - enough`
            is kept with it cut.
    """

    def smallest(good: set[Names]) -> Family:
        return tuple(sorted((s for s in good if not any(o < s for o in good)), key=sorted))

    subsets = [frozenset(c) for n in range(1, len(places) + 1) for c in combinations(sorted(places), n)]
    restoring = {s for s in subsets if kept[places - s] >= enough}
    cutting = {s for s in subsets if kept[s] <= 1 - enough}
    return smallest(restoring), smallest(cutting)
