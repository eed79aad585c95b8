"""Smallest sets: which few Units together return (or take away) a given share of what was lost.

Given `share(S)` for any set S of Units, an order of the Units (the ledger's) and a threshold, find S with
`share(S) ≥ threshold` that is *1-minimal*: without any one member it is below the threshold.

1. *Grow.*  The shortest prefix of the order that reaches the threshold, found by galloping (1, 2, 4, … Units) and then
   halving.  Its last Unit is kept: without it the prefix is below.
2. *Shrink.*  With the kept Units in, the shortest prefix of the rest that reaches is found in the same way, and its last
   Unit kept too, until the kept ones reach by themselves.  For a share that only grows with its set this ends in a
   1-minimal set after about `|S| log n` evaluations.
3. *Verify.*  Shares of real networks may fall as sets grow.  Each member is taken out by itself; where the rest still
   reaches, it is left out and all are tried again, until every one is needed.
4. *Fall back.*  Where galloping reaches nothing, every prefix is tried; where that reaches nothing, or nothing short of
   all Units, a second order is tried: by each Unit's share alone, largest first.

A 1-minimal set need not be the smallest there is, nor the only one: `families` looks for others.

Step 2 is the progression of Marques-Silva, Janota and Belov (2013), "Minimal sets over monotone predicates";
`families` is the hitting-set tree of Reiter (1987), "A theory of diagnosis from first principles".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from reasoninterp.errors import UserError

Share = Callable[[frozenset[str]], float]
_SLACK = 1e-9  # a share that is the threshold but for rounding reaches it


class Smallest(NamedTuple):
    """A 1-minimal set in the order of the search.

    `share` is the set's; where nothing `reached`, `units` is empty and `share` is that of all Units together.
    `evaluations` counts the sets that were evaluated for it and not before.
    """

    units: tuple[str, ...]
    share: float
    evaluations: int
    reached: bool


class Families(NamedTuple):
    """1-minimal sets, the first found first.

    `complete` says that the search was not broken off; if the share never falls as sets grow, `sets` are then all
    1-minimal sets there are.  `evaluations` counts distinct sets over the whole search.
    """

    sets: tuple[Smallest, ...]
    evaluations: int
    complete: bool


class Counted:
    """A share that is remembered, so that each set is evaluated once, and counted."""

    def __init__(self, share: Share, threshold: float) -> None:
        self._share, self._threshold = share, threshold
        self._memo: dict[frozenset[str], float] = {}

    @property
    def evaluations(self) -> int:
        """Distinct sets so far."""
        return len(self._memo)

    def __call__(self, names: Sequence[str]) -> float:
        """The share of a set."""
        key = frozenset(names)
        if key not in self._memo:
            self._memo[key] = float(self._share(key))
        return self._memo[key]

    def reaches(self, names: Sequence[str]) -> bool:
        """Whether a set reaches the threshold; NaN does not."""
        return self(names) >= self._threshold - _SLACK


def smallest_set(share: Share, order: Sequence[str], *, threshold: float = 0.9) -> Smallest:
    """A 1-minimal set of Units whose share is at least `threshold`.

    Args:
        share: of any set of Units; need not grow with its set.
        order: all Units that may be in it, those first that are likely to be.
        threshold: what counts as enough.

    Raises:
        UserError: a Unit that stands twice in the order, or a threshold that is not above 0.
    """
    return _search(_checked(share, order, threshold), list(order), thorough=True)


def families(
    share: Share,
    order: Sequence[str],
    *,
    threshold: float = 0.9,
    max_sets: int = 8,
    max_evaluations: int = 500,
) -> Families:
    """The smallest set and others beside it: 1-minimal sets that avoid members of those already found.

    1. Sets disjoint from all found before, as long as there are any (places of which any one suffices).
    2. Then, for every set found and each of its members, a set without that member; and for that one the same, with
       what was excluded before still excluded.

    Args:
        share, order, threshold: as for `smallest_set`.
        max_sets: how many sets are enough.
        max_evaluations: no further set is looked for after so many.

    Raises:
        UserError: as `smallest_set`.
    """
    counted = _checked(share, order, threshold)
    first = _search(counted, list(order), thorough=True)
    found = [first] if first.reached else []
    if not first.reached or not first.units:
        return Families(tuple(found), counted.evaluations, True)

    def enough() -> bool:
        return len(found) >= max_sets or counted.evaluations >= max_evaluations

    def without(excluded: frozenset[str]) -> Smallest | None:
        """A set that avoids what is excluded: one found before if there is one, else a new one."""
        for known in found:
            if not excluded & set(known.units):
                return known
        new = _search(counted, [name for name in order if name not in excluded], thorough=False)
        if not new.reached:
            return None
        found.append(new)
        return new

    while not enough() and without(frozenset(name for s in found for name in s.units)) is not None:
        pass
    queue: list[frozenset[str]] = [frozenset()]
    seen = set(queue)
    while queue:
        excluded = queue.pop(0)
        if enough():
            return Families(tuple(found), counted.evaluations, False)
        here = without(excluded)
        for member in here.units if here is not None else ():
            branch = excluded | {member}
            if branch not in seen:
                seen.add(branch)
                queue.append(branch)
    return Families(tuple(found), counted.evaluations, True)


def is_one_minimal(share: Share, names: Sequence[str], *, threshold: float = 0.9) -> bool:
    """Whether a set reaches the threshold and no set with one member fewer does."""
    counted = Counted(share, threshold)
    return counted.reaches(names) and not any(counted.reaches([m for m in names if m != name]) for name in names)


def _checked(share: Share, order: Sequence[str], threshold: float) -> Counted:
    if len(set(order)) != len(order):
        raise UserError("order: a Unit stands in it twice; give each once.")
    if not (threshold > 0 and math.isfinite(threshold)):
        raise UserError(f"threshold {threshold}: give a share above 0, e.g. 0.9.")
    return Counted(share, threshold)


def _search(counted: Counted, order: list[str], *, thorough: bool) -> Smallest:
    """One 1-minimal set within `order`; `thorough` tries every prefix and a second order where it must."""
    before = counted.evaluations
    found = _along(counted, order)
    if thorough and found is None:
        found = _every_prefix(counted, order)
    if thorough and len(order) > 1 and (found is None or len(found) == len(order)):
        alone = {name: counted([name]) for name in order}
        second = sorted(order, key=lambda name: -alone[name] if math.isfinite(alone[name]) else math.inf)
        other = _along(counted, second)
        if other is None and found is None:
            other = _every_prefix(counted, second)
        if other is not None and (found is None or len(other) < len(found)):
            found = other
    if found is None:
        return Smallest((), counted(order), counted.evaluations - before, False)
    units = tuple(name for name in order if name in set(found))
    share = counted(units)
    return Smallest(units, share, counted.evaluations - before, True)


def _along(counted: Counted, order: Sequence[str]) -> list[str] | None:
    """A 1-minimal set by growing and shrinking along an order; None where galloping reaches nothing."""
    kept: list[str] = []
    rest = list(order)
    while not counted.reaches(kept):
        length = _shortest(counted, kept, rest)
        if length is None:
            return None
        kept.append(rest[length - 1])
        rest = rest[: length - 1]
    return _pruned(counted, kept[::-1])


def _shortest(counted: Counted, kept: Sequence[str], rest: Sequence[str]) -> int | None:
    """How many of `rest` the kept ones need to reach: 1, 2, 4, … and then by halving."""
    low, high = 0, 1
    while not counted.reaches([*kept, *rest[: min(high, len(rest))]]):
        if high >= len(rest):
            return None
        low, high = high, 2 * high
    high = min(high, len(rest))
    while high - low > 1:
        middle = (low + high) // 2
        if counted.reaches([*kept, *rest[:middle]]):
            high = middle
        else:
            low = middle
    return high if rest else None


def _every_prefix(counted: Counted, order: Sequence[str]) -> list[str] | None:
    """As `_along`, from the first of all prefixes that reaches; None where none does."""
    for length in range(1, len(order) + 1):
        if counted.reaches(order[:length]):
            return _pruned(counted, list(order[:length]))
    return None


def _pruned(counted: Counted, members: list[str]) -> list[str]:
    """Members (in order) without those that the others do not need, the last tried first, until all are needed."""
    again = True
    while again:
        again = False
        for name in reversed(list(members)):
            fewer = [m for m in members if m != name]
            if counted.reaches(fewer):
                members, again = fewer, True
    return members
