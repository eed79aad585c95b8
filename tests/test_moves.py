"""Moves of sets of Units: laws of grafts, planted truth, controls and interactions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from reasoninterp.errors import UserError
from reasoninterp.faithfulness.effect import Effect, contrast_effects
from reasoninterp.models.context import Context, Item, Reading
from reasoninterp.models.minds import Minds, graft, mind
from reasoninterp.models.units import Level, Unit, unit_named
from reasoninterp.running import run_study
from reasoninterp.runs import Run
from reasoninterp.severance.grafts.controls import (
    DRAWS,
    NO_SAME_ANSWER,
    control,
    random_sets,
    same_answer_contrasts,
    share_over_draws,
)
from reasoninterp.severance.grafts.interactions import interactions, word_of
from reasoninterp.severance.grafts.moves import WAYS, Moves, Read, Reader
from reasoninterp.severance.grafts.smallest import families, smallest_set
from reasoninterp.severance.grafts.smallest_study import NO_LOSS, SmallestSets
from reasoninterp.severance.grafts.study import GraftSets, unit_entries
from reasoninterp.severance.ledger.study import Ledger
from reasoninterp.stats import Estimate, ratio
from reasoninterp.traces.contrast import Contrast, contrast
from reasoninterp.traces.trace import Trace
from tests.test_ledger import FORMAT, items
from tests.tiny import save_tiny, save_tuned


def planted(folder: Path, family: str, names: list[str], *, drift: float = 0.0, strength: float = 1.0) -> Minds:
    """A base, and a copy in which only these Units are other random weights, and all others drift a little."""
    from transformers import AutoModelForCausalLM

    base, tuned = save_tiny(folder / "base", family, n_layers=2), folder / "tuned"
    save_tuned(base, tuned, scale=drift)
    minds = Minds.load({"base": base})
    slices = [part for name in names for part in unit_named(minds.body, name).parts]
    model = AutoModelForCausalLM.from_pretrained(str(tuned))
    params: dict[str, Any] = dict(model.named_parameters())
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for part in slices:
            piece = part.of(params[part.param])
            piece.add_(strength * 0.3 * torch.randn(piece.shape, generator=generator))
    model.save_pretrained(str(tuned))
    return Minds.load({"base": base, "tuned": str(tuned)})


def contrasts_of(context: Context) -> list[Contrast]:
    return [i.contrast for i in context.items if i.contrast is not None]


def losing(context: Context) -> list[Contrast]:
    """Contrasts with their two answers exchanged where tuning made the effect larger: every one loses effect."""
    found = contrasts_of(context)
    base, tuned = (Reader(context, found)(mind(name)).effect for name in ("base", "tuned"))
    return [c if lost > 0 else exchanged(c) for c, lost in zip(found, base - tuned, strict=True)]


def exchanged(c: Contrast) -> Contrast:
    clean, corrupt = replace(c.clean, answer=c.corrupt.answer), replace(c.corrupt, answer=c.clean.answer)
    return replace(c, clean=clean, corrupt=corrupt)


def moves_of(minds: Minds, level: Level = "block", n: int = 12) -> Moves:
    context = Context(minds, items(n))
    return Moves(context, losing(context), minds.units(level))


@pytest.fixture(scope="module")
def drifted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Minds]:
    """A pair of each family in which every weight differs."""
    known: dict[str, Minds] = {}

    def get(family: str) -> Minds:
        if family not in known:
            known[family] = planted(tmp_path_factory.mktemp(family), family, [], drift=0.05)
        return known[family]

    return get


@pytest.mark.parametrize("family", ["llama-gqa", "qwen3", "gpt2"])
def test_a_move_reads_what_the_graft_answers(drifted: Callable[[str], Minds], family: str) -> None:
    minds = drifted(family)
    context = Context(minds, items(5), rows=4)  # several batches, of rows in another order
    contrasts = contrasts_of(context)
    moves = Moves(context, contrasts, minds.units("block"))
    chosen: list[Unit] = [moves.units["L0.attn"], moves.units["L1.mlp"]]
    for handle, read in (
        (mind("base"), moves.base),
        (graft("tuned", "base", chosen), moves.restored(["L1.mlp", "L0.attn"])),
        (graft("base", "tuned", chosen), moves.cut(["L0.attn", "L1.mlp"])),
    ):
        with context.open(handle):
            expected = contrast_effects(context, contrasts)
        np.testing.assert_allclose(read.effect, [e["effect"] for e in expected], atol=2e-4)
        assert read.follow.tolist() == [e["follow"] for e in expected]
        assert np.abs(read.effect).min() > 1e-3
    assert not np.allclose(moves.restored(["L0.attn"]).effect, moves.tuned.effect, atol=1e-3)


def test_nothing_moves_nothing_everything_moves_all_and_a_set_is_read_once(drifted: Callable[[str], Minds]) -> None:
    minds = drifted("llama-gqa")
    context = Context(minds, items(3))
    asked: list[str] = []
    reader = Reader(context, contrasts_of(context))

    def read(handle: Any) -> Any:
        asked.append(handle.label)
        return reader(handle)

    moves = Moves(context, contrasts_of(context), minds.units("block"), read=read)
    assert moves.restored([]) is moves.tuned and moves.cut([]) is moves.base
    assert moves.restored(moves.names) is moves.base and moves.cut(moves.names) is moves.tuned
    assert moves.evaluations == 2
    some, rest = ["L0.attn", "embed"], [n for n in moves.names if n not in ("L0.attn", "embed")]
    assert moves.restored(some) is moves.restored(some[::-1]) is moves.cut(rest)  # one and the same mind
    assert moves.evaluations == 3 == len(asked) == len(set(asked))
    part = Moves(context, contrasts_of(context), [moves.units["L0.attn"], moves.units["embed"]])
    np.testing.assert_allclose(part.restored(some).effect, moves.restored(some).effect, atol=1e-5)
    np.testing.assert_allclose(part.cut(["embed"]).effect, moves.cut(["embed"]).effect, atol=1e-5)
    assert not np.allclose(part.restored(part.names).effect, part.base.effect, atol=1e-3)  # these two are not all


@pytest.mark.parametrize(("family", "name"), [("llama-gqa", "L0.mlp"), ("qwen3", "L1.attn"), ("gpt2", "L0.attn")])
def test_one_planted_unit_is_both_smallest_sets(tmp_path: Path, family: str, name: str) -> None:
    moves = moves_of(planted(tmp_path, family, [name]))
    assert moves.moved == (name,)
    _is_found(moves, (name,))


@pytest.mark.parametrize("family", ["llama-gqa", "gpt2"])
def test_two_planted_circuits_under_drift_are_the_restoring_set(tmp_path: Path, family: str) -> None:
    letter = "G" if family == "llama-gqa" else "H"
    wanted = (f"L0.{letter}1.OV", "L1.mlp")
    moves = moves_of(planted(tmp_path, family, list(wanted), drift=1e-4), "circuit")
    assert moves.moved == moves.names  # all weights differ
    _is_found(moves, wanted)
    both = moves.share("restore", wanted)
    assert both == pytest.approx(1, abs=0.05)
    for name in wanted:
        assert moves.share("restore", [name]) < 0.9
        # What one returns and what the other takes away add up: nothing else was planted.
        other = next(n for n in wanted if n != name)
        assert moves.share("restore", [name]) + moves.share("cut", [other]) == pytest.approx(1, abs=0.05)


def test_interactions_are_what_two_units_do_beyond_each(tmp_path: Path) -> None:
    wanted = ["L0.G1.OV", "L1.mlp"]
    moves = moves_of(planted(tmp_path, "llama-gqa", wanted, drift=1e-4), "circuit")
    table = interactions(moves, [*wanted, "L1.norms"]).set_index(["direction", "a", "b"])
    assert len(table) == 2 * 3
    for way in WAYS:
        row = table.loc[(way, *wanted)]
        alone = [moves.share(way, [name]) for name in wanted]
        assert row["value"] == pytest.approx(moves.share(way, wanted) - sum(alone), abs=1e-9)
        assert row["ci_low"] <= row["value"] <= row["ci_high"] and row["n"] == 12
        assert abs(row["value"]) > 0.01
        assert table.loc[(way, wanted[0], "L1.norms"), "word"] == "independent"
    # Restoring both and cutting both move the same weights: the two interactions are opposite.
    assert table["value"].xs(wanted[1], level="b").sum() == pytest.approx(0, abs=0.01)


@pytest.mark.parametrize(
    ("low", "high", "alone", "word"),
    [
        (0.2, 0.4, 0.1, "takes both"),
        (-0.9, -0.7, 0.95, "either suffices"),
        (-0.4, -0.2, 0.6, "overlap"),
        (-0.05, 0.08, 0.5, "independent"),
        (-0.15, 0.05, 0.5, "undecided"),
    ],
)
def test_words_of_interactions(low: float, high: float, alone: float, word: str) -> None:
    assert word_of(Estimate((low + high) / 2, low, high, 9, ""), alone, alone, 1.0) == word


def test_random_sets_stand_outside_and_match_in_size_or_norm() -> None:
    norms = {f"u{k}": float(k % 5) for k in range(20)}  # four Units do not change
    located = ["u4", "u9", "u1"]
    same = random_sets(norms, located, draws=6, seed=3)
    assert len({frozenset(s) for s in same}) == 6
    for chosen in same:
        assert len(chosen) == 3 and not set(chosen) & set(located) and all(norms[n] > 0 for n in chosen)
    assert same == random_sets(norms, located, draws=6, seed=3) != random_sets(norms, located, draws=6, seed=4)
    wanted = (16 + 16 + 1) ** 0.5
    for chosen in random_sets(norms, located, match="norm", draws=6):
        assert not set(chosen) & set(located)
        assert sum(norms[n] ** 2 for n in chosen) ** 0.5 == pytest.approx(wanted, rel=0.15)
    assert random_sets({"a": 1.0, "b": 1.0, "c": 1.0}, ["a", "b"]) == []
    assert len(random_sets({"a": 1.0, "b": 1.0, "c": 1.0}, ["a"])) == 2  # there are no more


def test_the_interval_over_draws_is_that_of_traces_where_draws_agree_and_wider_where_not() -> None:
    rng = np.random.default_rng(0)
    lost = rng.normal(5, 1, 200)
    gained = 0.3 * lost + rng.normal(0, 1, 200)
    alike = share_over_draws(np.stack([gained] * 5), lost)
    single = ratio(gained, lost)
    assert alike.value == pytest.approx(single.value)
    assert (alike.ci_low, alike.ci_high) == pytest.approx((single.ci_low, single.ci_high), abs=0.01)
    apart = share_over_draws(np.stack([gained + k for k in (-1, 0, 1)]), lost)
    assert apart.value == pytest.approx(single.value)
    assert apart.ci_high - apart.ci_low > 2 * (alike.ci_high - alike.ci_low)


def test_a_control_of_the_units_that_drifted_does_nothing(tmp_path: Path) -> None:
    moves = moves_of(planted(tmp_path, "gpt2", ["L0.attn"], drift=1e-4))
    found = control(moves, "restore", ["L0.attn"], "size")
    assert len(found.sets) == DRAWS and all("L0.attn" not in s for s in found.sets)
    assert abs(found.share.value) < 0.02 < moves.share("restore", ["L0.attn"])
    assert found.share.n == 12 and found.norm_ratio < 0.1
    by_hand = np.mean([moves.share("restore", s) for s in found.sets])
    assert found.share.value == pytest.approx(by_hand, abs=1e-9)


def test_a_partner_is_a_chain_after_which_the_base_says_the_clean_answer(
    drifted: Callable[[str], Minds], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = ["0", "6", "7"]
    clean = [Trace(f"t{k}", f"start with {k}", (f"now {k}", f"now {k + 3}"), right[k % 3], FORMAT) for k in range(9)]
    found = [Item(t, contrast("propagated", t, t.with_steps(("now 0", "now 0"), answer="8"))) for t in clean]
    context = Context(drifted("llama-gqa"), found)
    opened: list[str] = []

    def read(traces: list[Trace]) -> list[Reading]:
        opened.append(context.minds.inside.label)
        # Says the clean answer, except after the chain that begins with 3.
        return [Reading("", "99" if t.steps[0] == "now 3" else right[int(t.id[1:]) % 3], "ok") for t in traces]

    monkeypatch.setattr(context, "read", read)
    partners = same_answer_contrasts(context, contrasts_of(context))
    assert len(partners) == 9 and set(opened) == {"base"}
    for c in partners.contrasts:
        source = int(c.corrupt.steps[0].split()[1])
        assert right[source % 3] == c.clean.answer and source != 3 and f"t{source}" != c.clean.id
        assert c.corrupt.answer == "8" and c.clean.question == c.corrupt.question
    assert same_answer_contrasts(context, contrasts_of(context)) is partners
    lone = Context(drifted("llama-gqa"), found[:2])
    refused = same_answer_contrasts(lone, contrasts_of(lone))
    assert not refused.contrasts and refused.reasons() == {NO_SAME_ANSWER: 2}


def study_context(minds: Minds, run: Run) -> Context:
    context = Context(minds, items(12), run=run)
    kept = [Item(c.clean, c) for c in losing(context)]
    return Context(minds, kept, run=run)


def test_the_study_finds_the_planted_unit_and_takes_up_where_it_stood(tmp_path: Path) -> None:
    run = Run.open(tmp_path / "run", {})
    context = study_context(planted(tmp_path, "llama-gqa", ["L1.attn"], drift=1e-4), run)
    for study in (Effect(), Ledger(nodes=2, max_nodes=2)):
        run_study(study, context, run, quiet=True, figures=False)
    first = run_study(SmallestSets(pairs_of=2), context, run, quiet=True)
    tables = first.tables
    for way in WAYS:
        sets, curve = (t[t["direction"] == way] for t in (tables["smallest_sets"], tables["smallest_curve"]))
        row = sets.iloc[0]
        assert row["units"] == "L1.attn" and row["one_minimal"] and row["share"] > 0.9
        assert row["control_size_ci_high"] < 0.1 and row["control_size_draws"] == DRAWS
        assert row["evaluations"] == 2 and row["norm_share"] > 0.9  # it leads the ledger: it alone, and nothing
        assert curve["added"].iloc[0] == "L1.attn" and curve["size"].tolist() == [1, 2, 3, 4, 5, 6]
    assert len(tables["interactions"]) == 2 and tables["smallest_loss"]["note"].iloc[0] == ""
    assert (run.path / "figures" / "smallest-sets.png").exists()
    again = run_study(SmallestSets(pairs_of=2), context, run, quiet=True)
    assert again.measured == 0 and again.reused == first.measured > 0
    for name, table in tables.items():
        pd.testing.assert_frame_equal(table, again.tables[name])

    graft_sets_are_means_of_draws(context, run)


def graft_sets_are_means_of_draws(context: Context, run: Run) -> None:
    """Beside each set of the ledger one row of several random sets, and each level's entries sum to the ledger."""
    total = run.table("ledger_total")["total"].iloc[0]
    for level in ("block", "head", "circuit", "layer"):
        entry = unit_entries(context, context.minds.units(level))
        assert sum(entry.values()) == pytest.approx(total, abs=1e-6) and abs(total) > 0.1
    found = run_study(GraftSets(largest=2), context, run, quiet=True)
    moves = Moves(context, contrasts_of(context), context.minds.units("block"))
    table = found.tables["graft_sets"].set_index(["chosen", "size"])
    assert table.index.is_unique and set(table.index) == {(c, k) for c in ("ledger", "random") for k in (1, 2)}
    for chosen, size in (("ledger", 1), ("random", 2)):
        rows = found.rows.query("chosen == @chosen and size == @size")
        drawn = [s.split("+") for s in rows["units"].unique()]
        assert len(drawn) == (1 if chosen == "ledger" else DRAWS)
        for way in WAYS:
            by_hand = np.mean([moves.share(way, s) for s in drawn])
            assert table.loc[(chosen, size), way] == pytest.approx(by_hand, abs=1e-3)
    assert table.loc[("random", 2), "units"] == f"{DRAWS} random sets" and table.loc[("ledger", 1), "restore"] > 0.9
    assert (found.tables["graft_sets_norm"]["chosen"] == "same norm").all()


def test_the_study_says_so_where_nothing_was_lost(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", "gpt2", n_layers=2)
    run = Run.open(tmp_path / "run", {})
    context = Context(Minds.load({"base": base, "tuned": base}), items(3), run=run)
    for study in (Effect(), Ledger(nodes=2)):
        run_study(study, context, run, quiet=True, figures=False)
    tables = run_study(SmallestSets(), context, run, quiet=True).tables
    assert tables["smallest_loss"]["note"].iloc[0] == NO_LOSS
    assert not len(tables["smallest_sets"]) and not len(tables["interactions"])


def _is_found(moves: Moves, wanted: tuple[str, ...]) -> None:
    assert moves.safe()
    for way in WAYS:
        for order in (moves.names, moves.names[::-1]):
            found = smallest_set(lambda s, way=way: moves.share(way, s), order)  # type: ignore[misc]
            if way == "restore" or len(wanted) == 1:
                assert set(found.units) == set(wanted), (way, found)
            else:
                assert set(found.units) <= set(wanted), (way, found)
        assert moves.share(way, wanted) == pytest.approx(moves.interval(way, wanted).value, abs=1e-12)


def test_redundant_places_are_a_family() -> None:
    found = families(lambda s: float(bool(s & {"L0.attn", "L1.attn"})), ("L0.mlp", "L0.attn", "L1.mlp", "L1.attn"))
    assert [s.units for s in found.sets] == [("L0.attn",), ("L1.attn",)]


def test_shares_of_an_unsafe_loss_are_not_given(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", "qwen3", n_layers=2)
    minds = Minds.load({"base": base, "tuned": base})
    moves = moves_of(minds, n=3)
    assert not moves.safe() and moves.moved == ()
    assert np.isnan(moves.share("restore", ["L0.attn"])) and np.isnan(moves.interval("cut", ["L0.attn"]).value)
    assert np.isnan(moves.share_follow("cut", ["L0.attn"]))
    assert moves.restored(["L0.attn"]) is moves.tuned


def test_what_cannot_be_moved_is_refused(drifted: Callable[[str], Minds]) -> None:
    minds = drifted("llama-gqa")
    moves = moves_of(minds, n=2)
    with pytest.raises(UserError, match="L9"):
        moves.restored(["L9.attn"])
    with pytest.raises(UserError, match="contrasts"):
        Moves(Context(minds, items(2)), [], minds.units("block"))
    with pytest.raises(UserError, match="units"):
        Moves(Context(minds, items(2)), contrasts_of(Context(minds, items(2))), [])


def test_norms_are_those_of_the_difference(drifted: Callable[[str], Minds]) -> None:
    minds = drifted("gpt2")
    moves = moves_of(minds, "circuit", n=2)
    whole = sum(float(d.double().square().sum()) for _, d in minds.delta("base", "tuned")) ** 0.5
    assert moves.norm(moves.names) == pytest.approx(whole, rel=1e-6)
    assert moves.norm(["embed"]) == pytest.approx(
        float(dict(minds.delta("base", "tuned"))["transformer.wte.weight"].norm())
    )


def test_a_follow_rate_of_one_has_an_interval_with_a_width(drifted: Callable[[str], Minds]) -> None:
    minds = drifted("llama-gqa")
    n = 40
    context = Context(minds, items(3))
    levels = {"base": 1.0, "tuned": 0.0}

    def read(handle: Any) -> Read:
        rate = levels.get(handle.name if handle.kind == "mind" else "", 1.0)
        return Read(10 * rate + np.linspace(0, 1, n), np.full(n, rate))

    moves = Moves(context, [], minds.units("block"), read=read)
    part = moves.interval("restore", ["L0.attn"], of="follow")
    assert part.value == 1.0 and part.n == n and part.method == "jeffreys"
    assert 0.85 < part.ci_low < 0.99 and part.ci_low < 1.0 < part.ci_high
    whole, nothing = moves.estimates("restore", [moves.names, []], of="follow")
    assert whole[:3] == (1.0, 1.0, 1.0) and nothing[:3] == (0.0, 0.0, 0.0)  # the ends themselves, not other draws
    drawn = moves.draws("cut", [["L0.attn"], ["L1.mlp"]])
    assert drawn.shape[1] == 2 and moves.interval("cut", ["L0.attn"]).ci_low == pytest.approx(
        min(np.quantile(drawn[:, 0], 0.025), moves.share("cut", ["L0.attn"]))
    )
