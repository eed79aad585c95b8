"""The smallest set against brute force over all subsets of small set functions."""

from __future__ import annotations

from itertools import chain, combinations

import numpy as np
import pytest

from reasoninterp.errors import UserError
from reasoninterp.severance.grafts.smallest import Share, families, is_one_minimal, smallest_set

NAMES = tuple("abcdef")


def subsets(names: tuple[str, ...]) -> list[frozenset[str]]:
    found = chain.from_iterable(combinations(names, k) for k in range(len(names) + 1))
    return [frozenset(s) for s in found]


def brute(share: Share, names: tuple[str, ...], threshold: float) -> list[frozenset[str]]:
    """All 1-minimal sets."""
    enough = {s for s in subsets(names) if share(s) >= threshold}
    return [s for s in enough if not any(s - {m} in enough for m in s)]


def monotone(seed: int) -> Share:
    """1 on every set that contains one of a few random sets, and a little less than that for each member had."""
    draw = np.random.default_rng(seed)
    sets = [frozenset(draw.choice(NAMES, draw.integers(1, 5), replace=False)) for _ in range(draw.integers(1, 4))]
    return lambda s: max(1.0 if known <= s else 0.8 * len(known & s) / len(known) for known in sets)


def rough(seed: int) -> Share:
    """Any value for any set; all together reach."""
    draw = np.random.default_rng(seed)
    values = {s: float(draw.uniform(0, 1.2)) for s in subsets(NAMES)}
    return lambda s: 1.0 if len(s) == len(NAMES) else 0.0 if not s else values[frozenset(s)]


@pytest.mark.parametrize("seed", range(40))
def test_a_set_that_is_found_is_one_minimal_whatever_the_share_and_the_order(seed: int) -> None:
    order = tuple(np.random.default_rng(seed).permutation(NAMES).tolist())
    for share in (monotone(seed), rough(seed)):
        asked: list[frozenset[str]] = []

        def watched(s: frozenset[str], share: Share = share, asked: list[frozenset[str]] = asked) -> float:
            asked.append(s)
            return share(s)

        found = smallest_set(watched, order)
        assert found.reached and found.share == share(frozenset(found.units)) >= 0.9
        assert frozenset(found.units) in brute(share, NAMES, 0.9)
        assert is_one_minimal(share, found.units)
        assert len(asked) == len(set(asked)) == found.evaluations  # nothing is evaluated twice


@pytest.mark.parametrize("seed", range(30))
def test_families_of_a_growing_share_are_all_its_one_minimal_sets(seed: int) -> None:
    share = monotone(seed)
    found = families(share, NAMES, max_sets=99)
    assert found.complete
    assert {frozenset(s.units) for s in found.sets} == set(brute(share, NAMES, 0.9))
    assert len(found.sets) == len({s.units for s in found.sets})
    assert found.evaluations <= 2 ** len(NAMES)


@pytest.mark.parametrize("seed", range(20))
def test_families_of_any_share_are_one_minimal(seed: int) -> None:
    share = rough(seed)
    for found in families(share, NAMES, max_sets=5).sets:
        assert is_one_minimal(share, found.units)


def test_a_long_order_costs_about_the_logarithm_of_its_length() -> None:
    names = [f"u{k}" for k in range(1000)]
    wanted = {"u3", "u40", "u700"}
    found = smallest_set(lambda s: len(s & wanted) / 3, names, threshold=0.99)
    assert set(found.units) == wanted
    assert found.evaluations < 3 * 2 * 11 + 4
    first = smallest_set(lambda s: float("u0" in s), names)
    assert first.units == ("u0",) and first.evaluations == 2  # it alone, and nothing


def test_of_redundant_places_each_is_found_alone_and_the_disjoint_ones_first() -> None:
    def share(s: frozenset[str]) -> float:
        return 1.0 if s & {"b", "e"} or {"c", "d"} <= s else 0.1

    found = families(share, NAMES)
    assert [s.units for s in found.sets] == [("b",), ("c", "d"), ("e",)]
    assert found.complete


def test_places_that_overlap_are_found_by_leaving_out_one_member_at_a_time() -> None:
    def share(s: frozenset[str]) -> float:
        return 1.0 if "a" in s and s & {"b", "c"} else 0.0

    assert [s.units for s in families(share, NAMES).sets] == [("a", "b"), ("a", "c")]
    one = families(share, NAMES, max_sets=1)
    assert len(one.sets) == 1 and not one.complete


def test_a_share_that_falls_with_more_units_is_found_by_the_fall_backs() -> None:
    # Only prefixes of three reach, which galloping 1, 2, 4, … steps over: every prefix is tried.
    found = smallest_set(lambda s: 1.0 if s in ({"a", "b", "c"}, {"a", "c"}) else 0.0, NAMES)
    assert found.units == ("a", "c")
    # No prefix reaches but all; the order by each Unit's own share does.
    found = smallest_set(lambda s: 1.0 if s in ({"d", "f"}, set(NAMES)) else 0.1 * len(s & {"d", "f"}), NAMES)
    assert found.units == ("d", "f")


def test_what_reaches_nowhere_says_so_and_nothing_is_enough_where_nothing_is_lost() -> None:
    never = smallest_set(lambda s: 0.1 * len(s), NAMES)
    assert not never.reached and never.units == () and never.share == pytest.approx(0.6)
    unknown = smallest_set(lambda s: float("nan"), NAMES)
    assert not unknown.reached and np.isnan(unknown.share)
    assert families(lambda s: 0.0, NAMES).sets == ()
    assert smallest_set(lambda s: 1.0, NAMES).units == ()
    assert smallest_set(lambda s: 1.0, ()).reached and not smallest_set(lambda s: 0.0, ()).reached


def test_a_unit_named_twice_and_a_threshold_of_nothing_are_refused() -> None:
    with pytest.raises(UserError, match="twice"):
        smallest_set(lambda s: 1.0, ["a", "a"])
    with pytest.raises(UserError, match="threshold"):
        families(lambda s: 1.0, ["a"], threshold=0.0)
