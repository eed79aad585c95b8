"""The sentences and the evidence of a location.  Each says what would have reversed it, and what its interval covers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from reasoninterp.severance.location.behaviour import SAME_WEIGHTS, Judged
from reasoninterp.severance.location.location import LocatedSet, Location
from reasoninterp.severance.location.rank import leading
from reasoninterp.severance.location.rival import Answers
from reasoninterp.severance.verdict import (
    MARGIN,
    MIN_BASE_FOLLOW,
    SEVERED_KEEPS,
    Evidence,
    counted,
    few_for_intact,
    number,
    percent,
    share,
    traces_for_intact,
)
from reasoninterp.stats import Estimate, mean, paired_shares, proportion

COVERS = "intervals cover traces, not training seeds"
OPENINGS = {
    "intact": "Intact, no damage found: the answer follows the steps as before",
    "weakened": "Weakened: the answer follows the steps less than before",
    "severed": "Severed: the answer no longer follows the steps",
    "overridden": "Overridden: the path from the steps to the answer is there, but something else wins",
    "undecided": "Undecided: these traces do not tell whether the path from steps to answer is cut",
    "not interpretable": "Not interpretable on these traces",
}
REVERSED = {
    "intact": f"a loss of follow rate of {100 * MARGIN:.0f} points or more",
    "weakened": f"a loss across 0, or less than {percent(SEVERED_KEEPS)} of the base's follow rate kept",
    "severed": f"{percent(SEVERED_KEEPS)} of the base's follow rate kept",
    "overridden": "E lost, or a follow rate like the base's",
    "undecided": "more traces, or answers that can be read",
}
FOLLOW_TWO = "lost follow between the two answers"
PERCENT_OF = {"effect": "lost E", "follow": FOLLOW_TWO}


def put_into_words(location: Location, base: Answers, tuned: Answers, judged: Judged) -> Location:
    """The location with its sentences and its evidence."""
    sentences = tuple(_sentences(location, base, tuned, judged))
    return replace(location, sentences=sentences, evidence=tuple(_evidence(location, base, tuned, judged)))


def _sentences(found: Location, base: Answers, tuned: Answers, judged: Judged) -> Iterator[str]:
    """What happened; severed or overridden; where; how; and whether ledger and grafts agree."""
    yield _said(f"{OPENINGS[found.verdict]}; {_behaviour(found, base, tuned, judged)}", _reversal(found, judged))
    if judged.told is not None:
        yield _said(f"Cut or overridden: {judged.told.reason}", judged.told.would_reverse)
    for one, verb in ((found.restoring, "return"), (found.cutting, "take away")):
        if one is not None:
            yield _said(*_of_set(found, one, verb))
    if found.mechanism is not None:
        yield _said(f"Mechanism, {found.mechanism.word}: {found.mechanism.sentence}", found.mechanism.would_reverse)
    if len(found.ranking):
        yield _said(*agreement(found))


def _reversal(found: Location, judged: Judged) -> str:
    if judged.problem is not None:
        return judged.problem.would_reverse
    return "a weight that differs" if judged.same else REVERSED[found.verdict]


def _of_set(found: Location, one: LocatedSet, verb: str) -> tuple[str, str]:
    """The sentence of a set, with its controls, and what would reverse it."""
    of = PERCENT_OF.get(found.shares_of or "", "")
    if not one.reached:
        no = f"No set of Units {verb}s {percent(one.threshold)} of the {of}"
        return no, "a set that does" if one.complete else "a set that does; the search was broken off"
    many = len(one.units) > 1
    its = "their" if many else "its"
    whose = f"{its} base weights given back" if one.direction == "restore" else f"{its} tuned weights put into the base"
    e = one.share_follow if found.shares_of == "follow" else one.share
    crosses = ", interval crosses it" if e.ci_low < one.threshold <= e.ci_high else ""
    text = (
        f"{_names(one.units)}, with {whose}, {verb}{'' if many else 's'} {share(e)} of the {of} over "
        f"{counted(e.n, 'trace')} (threshold {percent(one.threshold)}{crosses}; searched on the same traces)"
    )
    if one.alternatives:
        text += f"; so would {' or '.join(_names(u) for u in one.alternatives)}"
    if not one.complete:
        text += "; the search for others was broken off"
    row = found.controls[found.controls["match"] == "size"] if len(found.controls) else found.controls
    if len(row) and row["n"].iloc[0] and row["direction"].iloc[0] == one.direction:
        name = "share_follow" if found.shares_of == "follow" else "share"
        drawn = int(row["draws"].iloc[0])
        text += f"; {counted(drawn, 'random set')} of as many {'moves' if drawn == 1 else 'move'} {_row_share(row.iloc[0], name)}"
    return text, "a share under the threshold" + (", or a member that is not needed" if many else "")


def agreement(found: Location) -> tuple[str, str]:
    """Whether the ledger's and the grafts' leading Units lie in the located sets, and what would have reversed it."""
    ranking = found.ranking.set_index("unit")
    led, grafted = leading(found.ranking, "rank_ledger"), leading(found.ranking, "rank_grafts")
    members = {name for s in (found.restoring, found.cutting) if s is not None for name in s.units}
    parts = []
    if led:
        row = ranking.loc[led]
        n = len(found.integral.e_from) if found.integral is not None else int(row["n"])
        entry = Estimate(row["ledger"], row["ledger_ci_low"], row["ledger_ci_high"], n, "")
        parts.append(f"the ledger's largest loss is {led} ({number(entry)} nats, n = {entry.n})")
    if grafted:
        row = ranking.loc[grafted]
        parts.append(
            f"the single graft that moves most is {grafted} (returns {_row_share(row, 'restore')}, takes away "
            f"{_row_share(row, 'cut')}, n = {int(row['n'])})"
        )
    if not parts:
        return "Neither ledger nor grafts name a Unit", "a loss that some Unit carries"
    outside = [name for name in dict.fromkeys((led, grafted)) if name and name not in members]
    if not members:
        return f"{_capital('; '.join(parts))}; there is no located set to agree with", "a located set"
    if outside:
        text = f"Ledger, grafts and sets differ: {'; '.join(parts)}; {' and '.join(outside)} in neither set"
        return text, "leading Units that are members of the sets"
    same = "agree on the leading Unit" if led == grafted else "name members of the located sets"
    return f"Ledger and grafts {same}: {'; '.join(parts)}", "a leading Unit outside the located sets"


def _behaviour(found: Location, base: Answers, tuned: Answers, judged: Judged) -> str:
    if judged.problem is not None:
        return judged.problem.said
    if judged.same:
        return SAME_WEIGHTS
    a, b = proportion(base.follow), proportion(tuned.follow)
    names = found.minds
    e = mean(base.effect), mean(tuned.effect)
    neither = (
        f", {names[1]} gives neither answer in {percent(tuned.neither)} of the swaps" if tuned.neither > 0.5 else ""
    )
    few = f"; {few_for_intact(a.n)}" if found.verdict == "undecided" and a.n < traces_for_intact() else ""
    return (
        f"with another chain under the question, {names[0]} follows it in {share(a)} of {counted(a.n, 'trace')}, "
        f"{names[1]} in {share(b)}{neither}; E went from {number(e[0])} to {number(e[1])} nats{few}"
    )


def _evidence(found: Location, base: Answers, tuned: Answers, judged: Judged) -> Iterator[Evidence]:
    names, reversal, told = found.minds, _reversal(found, judged), judged.told
    least = f"a lower end under {percent(MIN_BASE_FOLLOW)}"
    rows: list[tuple[str, Estimate, str]] = [
        (f"follow rate of the swap, {names[0]}", proportion(base.follow), least),
        (f"follow rate of the swap, {names[1]}", proportion(tuned.follow), "a rate like the base's"),
        ("loss of follow rate, paired", paired_shares(base.follow, tuned.follow), reversal),
        (f"stays with the question, {names[1]}", proportion(tuned.stay), "does not decide the word"),
        (f"right with its chain whole, {names[0]}", proportion(base.right), "a lower end at chance"),
        (f"E, {names[0]} (nats)", mean(base.effect), "does not decide the word by itself"),
        (f"E, {names[1]} (nats)", mean(tuned.effect), "does not decide the word by itself"),
    ]
    for r in found.rival.to_dict("records") if told is not None else []:
        e = Estimate(r["value"], r["ci_low"], r["ci_high"], int(r["n"]), "")
        rows.append((f"{r['measure']}: share {r['quantity']}", e, told.would_reverse if told else ""))
    rows += _set_rows(found.restoring, "returned") + _set_rows(found.cutting, "taken away") + _control_rows(found)
    if found.mechanism is not None and found.mechanism.attention_head:
        head, why = found.mechanism.attention_head, "does not decide the mechanism"
        for name, e in zip((*names, "change"), found.mechanism.attention, strict=True):
            rows.append((f"attention of {head} from the answer to its step, {name}", e, why))
    for claim, e, why in rows:
        if e.n and np.isfinite(e.value):
            yield Evidence(claim, float(e.value), float(e.ci_low), float(e.ci_high), int(e.n), why)


def _set_rows(found: LocatedSet | None, verb: str) -> list[tuple[str, Estimate, str]]:
    if found is None or not found.reached:
        return []
    name, why = _names(found.units), "a share under the threshold"
    return [
        (f"share of the lost E {verb} by {name}", found.share, why),
        (f"share of the {FOLLOW_TWO} {verb} by {name}", found.share_follow, why),
    ]


def _control_rows(found: Location) -> list[tuple[str, Estimate, str]]:
    """What random sets move, of what the located set was looked for by."""
    name, out = "share_follow" if found.shares_of == "follow" else "share", []
    for row in found.controls.to_dict("records"):
        verb = "returned" if row["direction"] == "restore" else "taken away"
        like = "as many Units" if row["match"] == "size" else f"{row['norm_ratio']:.2f} of its weight change"
        claim = f"share of the {PERCENT_OF[found.shares_of or 'effect']} {verb} by {counted(row['draws'], 'random set')} of {like}"
        e = Estimate(row[name], row[f"{name}_ci_low"], row[f"{name}_ci_high"], int(row["n"]), "")
        out.append((claim, e, "a share like the located set's"))
    return out


def _row_share(row: Mapping[str, Any] | pd.Series, name: str) -> str:
    return share(Estimate(row[name], row[f"{name}_ci_low"], row[f"{name}_ci_high"], 0, ""))


def _said(text: str, reverse: str) -> str:
    return f"{text} (would be reversed by {reverse}; {COVERS})."


def _names(units: tuple[str, ...]) -> str:
    return " + ".join(units)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
