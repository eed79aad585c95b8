"""Severed or overridden: hand-made answers for every word, and direct contributions that sum to the margin."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from reasoninterp.models.context import Context
from reasoninterp.severance.location.direct_logits import (
    Direct,
    corrupt_margin,
    direct_contributions,
    direct_table,
    leading_rival,
)
from reasoninterp.severance.location.rival import KEPT_WITH, RETURNED, Answers, rival_table, share_returned, tell_apart
from tests import planted_copy
from tests.test_ledger import items, pair


def answers(e: float, follow: float, *, stay: float = 0.0, n: int = 100, seed: int = 0) -> Answers:
    """A mind with mean E exactly `e`, which follows in the first `follow` of n traces and stays in the last ones."""
    noise = np.random.default_rng(seed).normal(size=n)
    hits = (np.arange(n) < round(follow * n)).astype(float)
    stays = (np.arange(n) >= n - round(stay * n)).astype(float)
    zero = np.zeros(n)
    return Answers(e + noise - noise.mean(), hits, hits, stays, zero, zero + 1)


BASE = answers(16, 1.0)


@pytest.mark.parametrize(
    ("word", "tuned", "free", "found"),
    [
        ("severed", answers(0.5, 0.0), None, "severed"),  # E lost: severed, though a rival that hides E may be there
        ("severed", answers(15, 0.0), None, "overridden"),  # E survives underneath
        ("severed", answers(8, 0.0), None, "undecided"),  # E on neither side of one half
        ("severed", answers(0.5, 0.0), answers(0.6, 0.05), "severed"),
        ("severed", answers(0.5, 0.0), answers(0.6, 0.95), "overridden"),  # the follow rate returns
        ("severed", answers(0.5, 0.0), answers(14, 0.05), "overridden"),  # E returns
        ("severed", answers(0.5, 0.0), answers(0.6, 0.5), "undecided"),  # half of it returns
        ("weakened", answers(6, 0.6), None, "weakened"),
        ("weakened", answers(6, 0.6), answers(6, 0.6), "weakened"),
        ("weakened", answers(16, 0.6), None, "overridden"),  # whole underneath
        ("weakened", answers(6, 0.4), answers(6, 1.0), "overridden"),
    ],
)
def test_words(word: str, tuned: Answers, free: Answers | None, found: str) -> None:
    table = rival_table(BASE, tuned, BASE if free else None, free)
    told = tell_apart(word, table)  # type: ignore[arg-type]
    assert told.word == found
    assert told.would_reverse
    assert ("not excluded" in told.reason) == (free is None and found == "severed")


def test_what_is_kept_and_what_returned_by_hand() -> None:
    table = rival_table(BASE, answers(4, 0.2), BASE, answers(10, 0.6)).set_index(["measure", "quantity"])
    assert table.loc[("E", KEPT_WITH), "value"] == pytest.approx(4 / 16)
    assert table.loc[("E", RETURNED), "value"] == pytest.approx((10 / 16 - 4 / 16) / (1 - 4 / 16))
    assert table.loc[("follow", RETURNED), "value"] == pytest.approx((0.6 - 0.2) / 0.8)
    for _, row in table.iterrows():
        assert row["ci_low"] < row["value"] < row["ci_high"]
    assert share_returned(table.reset_index()) == pytest.approx(0.5)
    # A share at 0 has an interval with a width all the same.
    none = rival_table(BASE, answers(0.5, 0.0)).set_index(["measure", "quantity"]).loc[("follow", KEPT_WITH)]
    assert none["value"] == 0 < none["ci_high"] < 0.1


def test_traces_without_the_rival_that_lack_a_measure_take_away_only_what_they_cannot_tell() -> None:
    no_contrasts = [a._replace(effect=a.effect[:0], follow_two=a.follow_two[:0]) for a in (BASE, answers(0.5, 0.05))]
    table = rival_table(BASE, answers(0.5, 0.0), *no_contrasts)
    assert set(zip(table["measure"], table["quantity"], strict=True)) >= {("E", KEPT_WITH), ("follow", RETURNED)}
    assert ("E", RETURNED) not in set(zip(table["measure"], table["quantity"], strict=True))
    told = tell_apart("severed", table)
    assert told.word == "severed" and "not read" not in told.reason


def test_what_survives_and_returns_is_reversed_only_by_both_going() -> None:
    told = tell_apart("severed", rival_table(BASE, answers(14, 0.0), BASE, answers(15, 0.95)))
    assert told.word == "overridden"
    assert "less than 50 % of E underneath and less than 50 % of the lost" in told.would_reverse


def test_nothing_lost_is_no_denominator() -> None:
    table = rival_table(BASE, answers(16, 1.0), BASE, answers(15, 1.0)).set_index(["measure", "quantity"])
    assert np.isnan(table.loc[("E", RETURNED), "value"])
    assert table.loc[("E", RETURNED), "decision"] == "cannot tell"
    assert share_returned(table.reset_index()) == 0.0


@pytest.mark.parametrize("family", ["llama-gqa", "qwen3", "gpt2", "llama-tied"])
def test_direct_contributions_sum_to_the_margin(tmp_path: Path, family: str) -> None:
    context = Context(pair(tmp_path, family), items())
    contrasts = [i.contrast for i in context.items if i.contrast is not None]
    for mind in ("base", "tuned"):
        found = direct_contributions(context, contrasts, mind)
        assert np.abs(found.margin).min() > 1e-3
        np.testing.assert_allclose(found.values.sum(1), found.margin, rtol=1e-4, atol=1e-4)
        assert (np.abs(found.values).mean(0) > 1e-3).mean() > 0.7


def test_a_planted_rival_is_what_argues_against_the_chain(tmp_path: Path) -> None:
    context = planted_copy.context(tmp_path, {"overridden": {"rival": 3.0}}, n=24)
    contrasts = [i.contrast for i in context.items if i.contrast is not None]
    base, tuned = (direct_contributions(context, contrasts, m) for m in ("base", "overridden"))
    lead = leading_rival(direct_table(base, tuned))
    assert lead is not None
    assert lead[0] == "L0.H1"
    assert lead[1].ci_high < -10
    with context.open("base") as body:  # answers of one token: the readout is the very margin
        margins = corrupt_margin(context, contrasts).values(body)
    np.testing.assert_allclose(margins.numpy(), base.margin, rtol=1e-5)


def contributions(values: dict[str, float], n: int = 24, noise: float = 0.1) -> Direct:
    """Contributions around these means."""
    rng = np.random.default_rng(0)
    found = np.array(list(values.values())) + noise * rng.normal(size=(n, len(values)))
    return Direct(tuple(values), found, found.sum(1))


@pytest.mark.parametrize(
    ("tuned", "leads"),
    [
        ({"path": 5.0, "rival": -9.0, "other": 0.0}, True),
        ({"path": 5.0, "rival": 1.0, "other": 0.0}, False),  # argues less for the chain, and not for the rival
        ({"path": -6.0, "rival": -1.5, "other": 0.0}, False),  # moved, by an eighth of what was lost
        ({"path": 9.0, "rival": -2.0, "other": 0.0}, False),  # no margin was lost at all
    ],
)
def test_a_shortcut_wins_only_if_it_argues_for_the_rival_and_moved_enough(tuned: dict[str, float], leads: bool) -> None:
    base = {"path": 5.0, "rival": 2.0 if tuned["rival"] == 1.0 else 0.0, "other": 0.0}
    found = leading_rival(direct_table(contributions(base), contributions(tuned)))
    named = found[0] if found is not None else None
    assert named == ("rival" if leads else "path" if tuned["path"] < 0 else None)
    assert (found is not None) == (leads or tuned["path"] < 0)


def test_chance_among_many_components_names_none() -> None:
    rng = np.random.default_rng(1)
    names = tuple(f"c{k}" for k in range(200))
    base, tuned = (Direct(names, rng.normal(-1.0, 1.0, size=(30, 200)), np.zeros(30)) for _ in range(2))
    table = direct_table(base, tuned)
    assert (table["change_ci_high"] < 0).any()  # by its own interval, some component always moved
    assert (table["p"] > 0.05).all() and leading_rival(table) is None
