"""The verdict from tables written by hand: every word, and what reverses it."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from reasoninterp.severance.effects import is_safe
from reasoninterp.severance.location.rival import KEPT_WITH, RETURNED
from reasoninterp.severance.verdict import decide, traces_for_intact
from reasoninterp.stats import proportion


def tables(
    base: float, tuned: float, *, n: int = 200, label: str = "interpretable", e: tuple[float, float] = (15.0, 1.0)
) -> dict[str, pd.DataFrame]:
    """Follow rates `base` and `tuned` on n traces, nested (who follows when tuned followed before)."""
    rows, behaviour, effect = [], [], []
    for mind, rate, size in (("base", base, e[0]), ("tuned", tuned, e[1])):
        hits = [float(k < round(rate * n)) for k in range(n)]
        rows += [{"mind": mind, "trace": f"t{k}", "test": "swap", "follows": h} for k, h in enumerate(hits)]
        for test, share in (("swap_follow", hits), ("accuracy_own_chain", [1.0] * (n - 10) + [0.0] * 10)):
            behaviour.append({"mind": mind, "test": test, **proportion(share)._asdict()})
        effect.append(
            {
                "mind": mind,
                "measure": "E",
                "value": size,
                "ci_low": size - 0.3,
                "ci_high": size + 0.3,
                "n": n,
                "method": "bootstrap",
            }
        )
    gate = [
        {"mind": m, "label": label if m == "base" else "interpretable", "reason": "because", "n": n}
        for m in ("base", "tuned")
    ]
    return {
        name: pd.DataFrame(t)
        for name, t in (("readings", rows), ("behaviour", behaviour), ("effect", effect), ("gate", gate))
    }


@pytest.mark.parametrize(
    ("base", "tuned", "n", "word"),
    [
        (0.99, 0.02, 200, "severed"),
        (0.99, 0.50, 200, "weakened"),
        (0.99, 0.98, 200, "no damage found"),
        (0.99, 1.00, 200, "no damage found"),
        (0.65, 1.00, 200, "no damage found"),  # a gain is no damage
        (1.00, 1.00, 60, "no damage found"),
        (1.00, 1.00, 20, "undecided"),  # no loss was seen, but 20 traces cannot exclude one of 10 points
        (0.95, 0.90, 20, "undecided"),
        (0.30, 0.02, 200, "not interpretable here"),
        (0.99, 0.02, 10, "not interpretable here"),
    ],
)
def test_words(base: float, tuned: float, n: int, word: str) -> None:
    verdict = decide(tables(base, tuned, n=n))
    assert verdict.word == word
    assert len(verdict.sentences) == 2
    if word not in ("not interpretable here",):
        assert f"{100 * round(tuned * n) / n:.0f} % [" in verdict.sentences[0]


def test_a_mind_that_lost_its_answers_is_not_called_severed() -> None:
    found = tables(0.99, 0.02)
    more = [
        {"mind": "tuned", "test": test, **proportion([1.0] * k + [0.0] * (200 - k))._asdict()}
        for test, k in (("swap_other", 150), ("swap_unreadable", 20))
    ]
    found["behaviour"] = pd.concat([found["behaviour"], pd.DataFrame(more)], ignore_index=True)
    verdict = decide(found)
    assert verdict.word == "undecided"
    assert "neither answer in 85 %" in verdict.sentences[0]
    turned = decide(tables(0.99, 0.02, e=(15.0, -15.0)))
    assert any("changed its sign" in c for c in turned.caveats)


def rival(kept: float, returned: float) -> pd.DataFrame:
    """A rival's table in which E is kept so far, and so much of the lost follow rate returns."""
    rows = [("E", KEPT_WITH, kept, "survives", "lost"), ("follow", RETURNED, returned, "returns", "does not return")]
    return pd.DataFrame(
        [
            {
                "measure": m,
                "quantity": q,
                "value": v,
                "ci_low": v - 0.05,
                "ci_high": v + 0.05,
                "n": 200,
                "decision": above if v > 0.55 else below if v < 0.45 else "cannot tell",
            }
            for m, q, v, above, below in rows
        ]
    )


@pytest.mark.parametrize(
    ("tuned", "kept", "returned", "word"),
    [
        (0.02, 0.05, 0.05, "severed"),
        (0.02, 0.90, 0.05, "overridden"),
        (0.02, 0.05, 0.90, "overridden"),
        (0.02, 0.05, 0.50, "undecided"),
        (0.50, 0.50, 0.10, "weakened"),
        (0.50, 0.98, 0.10, "overridden"),
        (0.98, 0.98, 0.90, "no damage found"),
    ],
)
def test_where_the_rival_was_removed_severed_and_overridden_are_told_apart(
    tuned: float, kept: float, returned: float, word: str
) -> None:
    verdict = decide(tables(0.99, tuned) | {"rival": rival(kept, returned)})
    assert verdict.word == word
    removed = [c for c in verdict.caveats if "The rival was removed" in c]
    assert len(removed) == (word != "no damage found")
    assert all("what would reverse this" in c for c in removed)


def test_a_base_that_is_not_shown_to_follow_is_told_apart_from_one_that_does_not() -> None:
    assert "too few to say" in decide(tables(0.70, 0.1, n=20)).sentences[0]
    assert "do not drive its answer" in decide(tables(0.20, 0.1, n=200)).sentences[0]


def test_too_few_traces_for_an_equivalence_claim_are_told_with_how_many_it_takes() -> None:
    n = traces_for_intact()
    assert decide(tables(1.0, 1.0, n=n)).word == "no damage found"
    few = decide(tables(1.0, 1.0, n=n - 1))
    assert few.word == "undecided" and f"at least {n} can" in few.sentences[0]
    assert "only 1 whole-chain swap could be made" in decide(tables(1.0, 1.0, n=1)).sentences[0]


def test_a_base_at_floor_is_not_interpretable_whatever_the_follow_rates() -> None:
    verdict = decide(tables(0.99, 0.02, label="at floor"))
    assert verdict.word == "not interpretable here"
    assert "at floor" in verdict.sentences[0]


def test_every_claim_says_what_would_reverse_it_and_that_intervals_cover_traces() -> None:
    verdict = decide(tables(0.99, 0.02))
    assert len(verdict.evidence) >= 6
    assert all(e.would_reverse and e.n > 0 and e.ci_low <= e.value <= e.ci_high for e in verdict.evidence)
    assert any("not training seeds" in c for c in verdict.caveats)
    assert any("overridden" in c for c in verdict.caveats)


def test_a_shrunken_margin_is_told_though_the_answer_still_follows() -> None:
    verdict = decide(tables(0.99, 0.99, e=(15.0, 3.0)))
    assert verdict.word == "no damage found"
    assert any("margin E fell to 20 %" in c for c in verdict.caveats)


def test_a_loss_may_stand_in_a_denominator_only_where_it_is_away_from_zero() -> None:
    rng = np.random.default_rng(0)
    base = 15 + rng.normal(size=100)
    assert is_safe(base, base - 14)
    assert not is_safe(base, base + rng.normal(size=100))
    assert not is_safe(base, base - 0.5)  # certain, but small
