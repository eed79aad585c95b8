"""The verdict: one word, two sentences a colleague can quote, and what each rests on.

Decided by the follow rate of the whole-chain swap (bounded, so that the scale of logits, which tuning inflates, does
not enter), for the tuned mind against the base, paired over traces:

1. *not interpretable here*: the base is at floor, or does not follow its own steps (lower end of its follow rate under
   `MIN_BASE_FOLLOW`), or there are fewer than `MIN_TRACES` swaps.  A path that is not there cannot be cut.
2. *no damage found*: the loss of follow rate is under `MARGIN` (upper end of its interval): an equivalence claim, or a
   gain.
3. *undecided*: the tuned mind gives neither answer, or none that can be read, in most swaps: what it lost is its answers,
   and whether its steps still drive them cannot be told from this.
4. *severed*: it keeps less than `SEVERED_KEEPS` of the base's follow rate (upper end over lower end).
5. *weakened*: it lost more than 0, but keeps more than that.
6. *undecided*: anything else; more traces would tell.  With fewer than `traces_for_intact()` swaps, 2. cannot be said
   even of two minds that answer alike.

E is reported beside it: a margin can shrink while the answer still follows.  Where both minds were read with the rival
removed too (a table `rival`, see `severance.location.rival`), *severed* and *weakened* are told apart from *overridden*: the path
survives underneath.  Without that table the word is that of the follow rate, and the verdict says so.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from reasoninterp.severance.location.rival import RETURNED, Told, tell_apart
from reasoninterp.stats import Estimate, paired_shares, proportion

NOT_INTERPRETABLE = "not interpretable here"
NO_DAMAGE = "no damage found"
MARGIN = 0.10
SEVERED_KEEPS = 0.25
MIN_BASE_FOLLOW = 0.50
MIN_TRACES = 20


@dataclass(frozen=True)
class Evidence:
    """One claim with its number and what would have reversed it."""

    claim: str
    value: float
    ci_low: float
    ci_high: float
    n: int
    would_reverse: str


@dataclass(frozen=True)
class Verdict:
    """A word, two sentences, caveats and the evidence."""

    word: str
    sentences: tuple[str, str]
    caveats: tuple[str, ...] = ()
    evidence: tuple[Evidence, ...] = field(default_factory=tuple)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


class Tables:
    """The tables a verdict reads, with the few look-ups it needs."""

    def __init__(self, tables: dict[str, pd.DataFrame], base: str, tuned: str) -> None:
        self.tables, self.base, self.tuned = tables, base, tuned

    def behaviour(self, mind: str, test: str) -> Estimate:
        """A number of the behaviour table; n = 0 where it is not there."""
        return self._number("behaviour", mind, "test", test)

    @property
    def told(self) -> Told | None:
        """Severed, weakened or overridden, where both minds were read with the rival removed."""
        table = self.tables.get("rival")
        if table is None or not (table["quantity"] == RETURNED).any():
            return None
        a, b = self.follows()
        word, _ = word_of(a, b, 0.0)
        return (
            tell_apart(cast(Literal["severed", "weakened"], word), table) if word in ("severed", "weakened") else None
        )

    def effect(self, mind: str, measure: str = "E") -> Estimate:
        """A number of the effect table; n = 0 where it is not there."""
        return self._number("effect", mind, "measure", measure)

    def _number(self, name: str, mind: str, column: str, value: str) -> Estimate:
        table = self.tables.get(name, pd.DataFrame())
        row = table[(table["mind"] == mind) & (table[column] == value)] if len(table) else table
        if not len(row):
            return Estimate(np.nan, np.nan, np.nan, 0, "")
        r = row.iloc[0]
        return Estimate(float(r["value"]), float(r["ci_low"]), float(r["ci_high"]), int(r["n"]), str(r["method"]))

    def follows(self) -> tuple[np.ndarray, np.ndarray]:
        """Follow (0/1) per trace for base and tuned, paired."""
        rows = self.tables["readings"]
        swap = rows[rows["test"] == "swap"].assign(follows=lambda d: pd.to_numeric(d["follows"]))
        wide = swap.pivot(index="trace", columns="mind", values="follows").dropna()
        if not len(wide):
            return np.array([]), np.array([])
        return wide[self.base].to_numpy(dtype=float), wide[self.tuned].to_numpy(dtype=float)


def word_of(base: ArrayLike, tuned: ArrayLike, neither: float) -> tuple[str, Estimate]:
    """The word that follow rates alone give, of a base that is interpretable, and the paired loss of follow rate.

    Args:
        base, tuned: follow (0/1) per trace, paired.
        neither: share of swaps in which the tuned mind gives neither answer.
    """
    loss = paired_shares(base, tuned)
    # Both ends at their worst for the claim: the bootstrap of a share at 0 or 1 is a point.
    kept_at_most = proportion(tuned).ci_high / max(proportion(base).ci_low, 1e-9)
    if loss.ci_high < MARGIN:
        return NO_DAMAGE, loss
    if neither > 0.5:
        return "undecided", loss
    if kept_at_most < SEVERED_KEEPS:
        return "severed", loss
    return ("weakened" if loss.ci_low > 0 else "undecided"), loss


@cache
def traces_for_intact() -> int:
    """Fewest swaps from which *no damage found* can be said, of two minds that both follow in all of them."""
    n = MIN_TRACES
    while word_of(np.ones(n), np.ones(n), 0.0)[0] != NO_DAMAGE:
        n += 1
    return n


class Problem(NamedTuple):
    """Why nothing can be told of a base's path, what to do about it, and what would reverse this; no full stops."""

    said: str
    mend: str
    would_reverse: str


def not_interpretable(base: str, follow: Estimate, floor: str | None) -> Problem | None:
    """Whether a base has no path that could be cut, or is not shown to have one.

    Args:
        base: its name.
        follow: its follow rate of the swap.
        floor: why it counts as being at floor; None where it does not.
    """
    if floor is not None:
        return Problem(
            f"{base} is at floor on these traces ({floor})",
            "a path from steps to answer that the base does not have cannot be cut; choose traces that the base solves",
            f"traces that {base} solves above chance",
        )
    if follow.n < MIN_TRACES:
        return Problem(
            f"only {counted(follow.n, 'whole-chain swap')} could be made, fewer than {MIN_TRACES}",
            "give more traces, or traces whose chains can be swapped or corrupted (see the refusals by reason)",
            f"at least {MIN_TRACES} swaps",
        )
    if not follow.ci_low >= MIN_BASE_FOLLOW:
        below = follow.ci_high < MIN_BASE_FOLLOW
        why = f"{'so its steps do not' if below else 'too few to say that its steps'} drive its answer"
        return Problem(
            f"{base} follows another chain in {share(follow)} of {counted(follow.n, 'trace')}, {why}",
            "a path from steps to answer that the base is not shown to have cannot be shown to be cut",
            f"{base} shown to follow other chains in at least {percent(MIN_BASE_FOLLOW)} of the traces",
        )
    return None


def decide(tables: dict[str, pd.DataFrame], *, base: str = "base", tuned: str = "tuned") -> Verdict:
    """The verdict from the tables `behaviour`, `gate`, `readings`, `effect` and, if there, `ledger*`, `grafts`, `rival`."""
    t = Tables(tables, base, tuned)
    gate = {row["mind"]: row for row in tables["gate"].to_dict("records")}
    follow_base, follow_tuned = t.behaviour(base, "swap_follow"), t.behaviour(tuned, "swap_follow")
    floor = f"{gate[base]['reason']}; n = {gate[base]['n']}" if gate[base]["label"] == "at floor" else None
    if problem := not_interpretable(base, follow_base, floor):
        said = f"Not interpretable here: {problem.said}.", f"{problem.mend[:1].upper()}{problem.mend[1:]}."
        return Verdict(NOT_INTERPRETABLE, said, _caveats(t, gate), _evidence(t, None))
    a, b = t.follows()
    neither = t.behaviour(tuned, "swap_other").value + t.behaviour(tuned, "swap_unreadable").value
    word, loss = word_of(a, b, neither)
    opening = None
    if word == "undecided" and neither > 0.5:
        opening = f"Undecided: {tuned} gives neither answer in {percent(neither)} of the swaps"
    if word in ("severed", "weakened") and t.told is not None:
        word, opening = _apart(t, word)
    elif word == "undecided" and loss.n < traces_for_intact():
        opening = f"Undecided: {few_for_intact(loss.n)}"
    sentences = (_first_sentence(t, word, follow_base, follow_tuned, opening), _second_sentence(t, word, loss))
    return Verdict(word, sentences, _caveats(t, gate), _evidence(t, loss))


def _apart(t: Tables, word: str) -> tuple[str, str | None]:
    """The word once the rival was removed, and the sentence's opening where it differs from the word's own."""
    told = t.told
    assert told is not None
    if told.word == word:
        return word, None
    opening = {
        "overridden": f"Overridden: another source of the answer wins over the steps in {t.tuned}, whose path is still there",
        "undecided": f"Undecided: {t.tuned} no longer follows its steps, but whether the path is cut or overridden stays open",
    }[told.word]
    return told.word, opening


def _first_sentence(t: Tables, word: str, base: Estimate, tuned: Estimate, said: str | None) -> str:
    accuracy = t.behaviour(t.base, "accuracy_own_chain"), t.behaviour(t.tuned, "accuracy_own_chain")
    opening = (
        said
        or {
            "severed": "Fine-tuning cut the steps off from the answer",
            "weakened": "Fine-tuning weakened the path from the steps to the answer",
            "no damage found": "No damage found: the answer follows the steps after fine-tuning as before",
            "undecided": "Undecided: these traces do not tell whether fine-tuning damaged the path from steps to answer",
        }[word]
    )
    return (
        f"{opening}: with another chain under the question, {t.base} follows that chain in {share(base)} of "
        f"{counted(base.n, 'trace')} and {t.tuned} in {share(tuned)}, while accuracy with their own chains went from "
        f"{share(accuracy[0])} to {share(accuracy[1])}."
    )


def _second_sentence(t: Tables, word: str, loss: Estimate) -> str:
    e = t.effect(t.base), t.effect(t.tuned)
    effects = f"the effect of the chain on the answer, E, went from {number(e[0])} to {number(e[1])} nats"
    if word == "no damage found":
        inside = f"The loss of follow rate is {points(loss)}, under the stated margin of {100 * MARGIN:.0f} points"
        return f"{inside}{' (it rose)' if loss.ci_high < 0 else ''}; {effects}."
    ledger, grafts = t.tables.get("ledger"), t.tables.get("grafts")
    if ledger is None or grafts is None or not len(ledger) or not len(grafts):
        return f"The loss of follow rate is {points(loss)}; {effects}."
    blocks = ledger[ledger["level"] == "block"].sort_values("attribution")
    first = blocks.iloc[0]
    entry = Estimate(first["attribution"], first["ci_low"], first["ci_high"], int(first["n"]), "")
    text = f"{effects[0].upper()}{effects[1:]}; the ledger's largest loss is {first['unit']} ({number(entry)} nats)"
    row = grafts[grafts["unit"] == first["unit"]]
    if len(row) and np.isfinite(row.iloc[0]["restore"]):
        g = row.iloc[0]
        back = Estimate(g["restore"], g["restore_ci_low"], g["restore_ci_high"], int(g["n"]), "")
        cut = Estimate(g["cut"], g["cut_ci_low"], g["cut_ci_high"], int(g["n"]), "")
        text += (
            f": giving that Unit its base weights back returns {share(back)} of the loss, and its tuned weights alone "
            f"take away {share(cut)}"
        )
        text += _together(t)
    return text + "."


def _together(t: Tables) -> str:
    """How many leading Units together return at least half of the loss, where sets were grafted."""
    sets = t.tables.get("graft_sets")
    if sets is None or not len(sets) or sets["restore"].isna().all():
        return ""
    enough = sets[sets["restore"] >= 0.5]
    g = (enough if len(enough) else sets.sort_values("size")).iloc[0 if len(enough) else -1]
    back = Estimate(g["restore"], g["restore_ci_low"], g["restore_ci_high"], int(g["n"]), "")
    return f"; {g['units'].replace('+', ', ')} together return {share(back)}" if g["size"] > 1 else ""


def _caveats(t: Tables, gate: dict[str, dict[str, Any]]) -> tuple[str, ...]:
    untested = "Whether a lost path survives underneath a rival (overridden) was not tested: the rival was not removed."
    out = [
        "Intervals are 95 % and cover the choice of traces, not training seeds.",
        f"The rival was removed: {t.told.reason}; what would reverse this: {t.told.would_reverse}."
        if t.told
        else untested,
    ]
    for mind in (t.base, t.tuned):
        if gate[mind]["label"] != "interpretable":
            out.append(
                f"{mind} is '{gate[mind]['label']}' ({gate[mind]['reason']}): its truncation, filler and area scores do "
                "not say whether it uses its steps."
            )
    total = t.tables.get("ledger_total")
    if total is not None and len(total) and total.iloc[0]["warning"]:
        out.append(f"Ledger: {total.iloc[0]['warning']}.")
    e = t.effect(t.base), t.effect(t.tuned)
    if e[0].n and e[0].value > 0 > e[1].ci_high:
        out.append(f"E changed its sign: after the changed chain {t.tuned} prefers the unchanged answer all the more.")
    elif e[0].n and e[0].value > 0 and e[1].ci_high < 0.5 * e[0].value:
        out.append(
            f"The margin E fell to {percent(e[1].value / e[0].value)} of the base's, whatever the answer still follows."
        )
    return tuple(out)


def _evidence(t: Tables, loss: Estimate | None) -> tuple[Evidence, ...]:
    rows = [
        (
            "follow rate of the swap, base",
            t.behaviour(t.base, "swap_follow"),
            f"a lower end under {percent(MIN_BASE_FOLLOW)}",
        ),
        ("follow rate of the swap, tuned", t.behaviour(t.tuned, "swap_follow"), "a rate like the base's"),
        ("accuracy with its own chain, base", t.behaviour(t.base, "accuracy_own_chain"), "a lower end at chance"),
        ("accuracy with its own chain, tuned", t.behaviour(t.tuned, "accuracy_own_chain"), "does not decide the word"),
        ("E, base (nats)", t.effect(t.base), "does not decide the word"),
        ("E, tuned (nats)", t.effect(t.tuned), "does not decide the word"),
    ]
    if loss is not None:
        rows.insert(2, ("loss of follow rate, paired", loss, f"an interval across ±{100 * MARGIN:.0f} points"))
    return tuple(Evidence(c, e.value, e.ci_low, e.ci_high, e.n, w) for c, e, w in rows if e.n)


def few_for_intact(n: int) -> str:
    """That so few swaps cannot show a path to be intact."""
    return (
        f"{counted(n, 'swap')} cannot exclude a loss of {100 * MARGIN:.0f} points; at least {traces_for_intact()} can"
    )


def counted(n: int, what: str) -> str:
    """`1 swap`, `2 swaps`."""
    return f"{n} {what}{'' if n == 1 else 's'}"


def percent(value: float) -> str:
    """`25 %`."""
    return f"{_hundredths(value)} %"


def share(e: Estimate) -> str:
    """`98 % [95, 99]`."""
    return f"{percent(e.value)} [{_hundredths(e.ci_low)}, {_hundredths(e.ci_high)}]"


def _hundredths(value: float) -> str:
    return f"{100 * value:z.0f}".replace("-", "−")  # z: no minus before a zero


def points(e: Estimate) -> str:
    """`1.2 points [−0.4, 2.7]`."""
    return f"{100 * e.value:.1f} points [{100 * e.ci_low:.1f}, {100 * e.ci_high:.1f}]".replace("-", "−")


def number(e: Estimate) -> str:
    """`−13.1 [−13.6, −12.5]`."""
    return f"{e.value:.1f} [{e.ci_low:.1f}, {e.ci_high:.1f}]".replace("-", "−")
