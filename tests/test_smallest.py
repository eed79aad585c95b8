"""The smallest set against brute force over all subsets of small set functions; and grafts of heads in another order."""

from __future__ import annotations

import json
from itertools import chain, combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest

from reasoninterp.errors import UserError
from reasoninterp.executors import ProcessExecutor
from reasoninterp.faithfulness.effect import Effect
from reasoninterp.models.context import Context, ContextSpec
from reasoninterp.models.gauge import permute_heads
from reasoninterp.models.layout import read_layer, shape_of, write_layer
from reasoninterp.models.saving import save_mind
from reasoninterp.running import Result, run_study
from reasoninterp.runs import Run
from reasoninterp.severance.grafts.smallest import Share, families, is_one_minimal, smallest_set
from reasoninterp.severance.grafts.smallest_study import SmallestSets
from reasoninterp.severance.grafts.study import Grafts, GraftSets
from reasoninterp.severance.ledger.study import Ledger
from reasoninterp.study import Study
from tests.test_ledger import FORMAT, items
from tests.test_moves import losing, planted

NAMES = tuple("abcdef")
GROUPS = np.array([2, 3, 0, 1])  # both key/value heads, with their queries, change places


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


# --------------------------------------------------------------------------------------------- grafts in another gauge


class Regrouped(NamedTuple):
    """A base, a tuned mind that lost effect in `L0.G1`, and the same function with the key/value heads swapped."""

    folder: Path

    def spec(self, name: str) -> ContextSpec:
        sources = {"base": str(self.folder / "base"), "tuned": str(self.folder / name)}
        return ContextSpec(sources, str(self.folder / "traces.jsonl"), max_new_tokens=8)


def regrouped_pair(folder: Path) -> Regrouped:
    minds = planted(folder, "llama-gqa", ["L0.G1"], drift=1e-4)
    weights = minds.weights("tuned")
    shape, swapped = shape_of(weights, minds.config), {}
    for index in range(shape.n_layers):
        layer = read_layer(weights, shape, index)
        permute_heads(layer, GROUPS)
        swapped.update(write_layer(layer, weights))
    minds.derive("regrouped", "tuned", swapped)
    save_mind(minds, "regrouped", folder / "regrouped")
    lines: list[dict[str, object]] = [{"format": FORMAT.to_json()}]
    for c in losing(Context(minds, items(10))):
        about = {"id": c.clean.id, "question": c.clean.question, "steps": list(c.clean.steps), "answer": c.clean.answer}
        lines.append({**about, "corrupt_steps": list(c.corrupt.steps), "corrupt_answer": c.corrupt.answer})
    (folder / "traces.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    return Regrouped(folder)


@pytest.fixture(scope="module")
def regrouped(tmp_path_factory: pytest.TempPathFactory) -> Regrouped:
    return regrouped_pair(tmp_path_factory.mktemp("regrouped"))


def test_grafts_of_heads_in_another_order_are_the_same_grafts(regrouped: Regrouped, tmp_path: Path) -> None:
    """By the base's names, in this process, in another, and taken up again by a third."""

    def run(name: str, *, workers: bool = False, align: bool = True) -> list[Result]:
        spec, path = regrouped.spec(name), tmp_path / f"{name}-{align}-{workers}"
        context = spec.load()
        context.run = Run.open(path, {})
        executor = ProcessExecutor(1, spec.load) if workers else None
        studies: list[Study] = [
            Grafts(level="head", align=align),
            GraftSets(level="head", largest=2, draws=2, align=align),
            SmallestSets(level="head", draws=2, pairs_of=2, max_sets=1, align=align),
        ]
        for needed in (Effect(), Ledger(nodes=2, max_nodes=2)):
            run_study(needed, context, context.run, quiet=True, figures=False)
        few = studies[:1] if workers else studies
        found = [run_study(s, context, context.run, quiet=True, figures=False, executor=executor) for s in few]
        context.run.close()
        return found

    plain, swapped, raw = run("tuned"), run("regrouped"), run("regrouped", align=False)
    grafts = [r[0].tables["grafts"].set_index("unit").sort_index() for r in (plain, swapped, raw)]
    columns = ["restore", "cut", "restore_ci_low", "e_restored", "e_cut", "n"]
    np.testing.assert_allclose(grafts[1][columns], grafts[0][columns], atol=5e-3)
    assert grafts[0].loc["L0.G1", ["restore", "cut"]].min() > 0.9
    assert (grafts[2]["restore"] - grafts[0]["restore"]).abs().max() > 0.3  # as they are, other heads are put in
    first = [
        r[2].tables["smallest_sets"].groupby("direction")["units"].first().to_dict() for r in (plain, swapped, raw)
    ]
    assert first[0] == first[1] == {"restore": "L0.G1", "cut": "L0.G1"} != first[2]
    for k, name in enumerate(("grafts", "graft_sets", "smallest")):
        notes = [" ".join(r[k].tables[f"{name}_alignment"]["note"]) for r in (plain, swapped, raw)]
        swap = "head 2 of tuned is head 0 of base"
        assert swap not in notes[0] and swap in notes[1] and "as they are" in notes[2]
    again = run("regrouped")
    assert [(r.measured, r.reused) for r in again] == [(0, r.measured) for r in swapped]
    (elsewhere,) = run("regrouped", workers=True)
    assert elsewhere.measured == swapped[0].measured
    pairs = [*zip(swapped, again, strict=True), (swapped[0], elsewhere)]
    for before, after in pairs:
        for name, table in before.tables.items():
            pd.testing.assert_frame_equal(after.tables[name], table, rtol=1e-4, atol=1e-5)
