"""The sentences and the evidence of a location.  Each says what would have reversed it, and what its interval covers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from reasoninterp.severance.location.location import LocatedSet, Location
from reasoninterp.severance.location.rank import leading
from reasoninterp.severance.location.rival import Answers, Told
from reasoninterp.severance.verdict import (
    MARGIN,
    MIN_BASE_FOLLOW,
    SEVERED_KEEPS,
    Evidence,
    number,
    share,
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
    "weakened": f"a loss across 0, or less than {SEVERED_KEEPS:.0%} of the base's follow rate kept",
    "severed": f"{SEVERED_KEEPS:.0%} of the base's follow rate kept",
    "overridden": "E lost, or a follow rate like the base's",
    "undecided": "more traces, or answers that can be read",
    "not interpretable": f"a base above chance that follows other chains in at least {MIN_BASE_FOLLOW:.0%}",
}
PERCENT_OF = {"effect": "lost E", "follow": "lost follow rate"}


def put_into_words(location: Location, base: Answers, tuned: Answers, told: Told | None) -> Location:
    """The location with its sentences and its evidence."""
    sentences = tuple(_sentences(location, base, tuned, told))
    return replace(location, sentences=sentences, evidence=tuple(_evidence(location, base, tuned, told)))


def _sentences(found: Location, base: Answers, tuned: Answers, told: Told | None) -> Iterator[str]:
    """What happened; severed or overridden; where; how; and whether ledger and grafts agree."""
    yield _said(f"{OPENINGS[found.verdict]}; {_behaviour(found, base, tuned)}", REVERSED[found.verdict])
    if told is not None:
        yield _said(f"Cut or overridden: {told.reason}", told.would_reverse)
    of = PERCENT_OF.get(found.shares_of or "", "")
    for one, verb in ((found.restoring, "returns"), (found.cutting, "takes away")):
        if one is None:
            continue
        its = "its" if len(one.units) == 1 else "their"
        whose = (
            f"{its} base weights given back" if one.direction == "restore" else f"{its} tuned weights put into the base"
        )
        if not one.reached:
            yield _said(f"No set of Units {verb} enough of the {of}", "a threshold that some set reaches")
            continue
        e = one.share_follow if found.shares_of == "follow" else one.share
        others = f"; so would {' or '.join(_names(u) for u in one.alternatives)}" if one.alternatives else ""
        yield _said(
            f"{_names(one.units)}, with {whose}, {verb} {share(e)} of the {of} over {e.n} traces{others}",
            "a share under the threshold" + (", or a member that is not needed" if len(one.units) > 1 else ""),
        )
    if found.mechanism is not None:
        yield _said(f"Mechanism, {found.mechanism.word}: {found.mechanism.sentence}", found.mechanism.would_reverse)
    if len(found.ranking):
        yield _said(*agreement(found))


def agreement(found: Location) -> tuple[str, str]:
    """Whether the ledger's and the grafts' leading Units lie in the located sets, and what would have reversed it."""
    ranking = found.ranking.set_index("unit")
    led, grafted = leading(found.ranking, "rank_ledger"), leading(found.ranking, "rank_grafts")
    members = {name for s in (found.restoring, found.cutting) if s is not None for name in s.units}
    parts = []
    if led:
        row = ranking.loc[led]
        entry = Estimate(row["ledger"], row["ledger_ci_low"], row["ledger_ci_high"], int(row["n"]), "")
        parts.append(f"the ledger's largest loss is {led} ({number(entry)} nats)")
    if grafted:
        row = ranking.loc[grafted]
        parts.append(
            f"the single graft that moves most is {grafted} (restore {row['restore']:.2f}, cut {row['cut']:.2f})"
        )
    if not parts:
        return "Neither ledger nor grafts name a Unit", "a loss that some Unit carries"
    outside = [name for name in dict.fromkeys((led, grafted)) if name and name not in members]
    if not members:
        return f"{_capital('; '.join(parts))}; there is no located set to agree with", "a located set"
    if outside:
        text = f"Ledger, grafts and sets differ: {'; '.join(parts)}; {' and '.join(outside)} in neither set"
        return text.replace("-", "−"), "leading Units that are members of the sets"
    same = "agree on the leading Unit" if led == grafted else "name members of the located sets"
    return f"Ledger and grafts {same}: {'; '.join(parts)}".replace("-", "−"), "a leading Unit outside the located sets"


def _behaviour(found: Location, base: Answers, tuned: Answers) -> str:
    a, b = proportion(base.follow), proportion(tuned.follow)
    if found.verdict == "not interpretable" and found.notes:
        return found.notes[0]
    names = found.minds
    e = mean(base.effect), mean(tuned.effect)
    neither = f", {names[1]} gives neither answer in {tuned.neither:.0%} of the swaps" if tuned.neither > 0.5 else ""
    return (
        f"with another chain under the question, {names[0]} follows it in {share(a)} of {a.n} traces, {names[1]} in "
        f"{share(b)}{neither}; E went from {number(e[0])} to {number(e[1])} nats"
    )


def _evidence(found: Location, base: Answers, tuned: Answers, told: Told | None) -> Iterator[Evidence]:
    names = found.minds
    rows: list[tuple[str, Estimate, str]] = [
        (f"follow rate of the swap, {names[0]}", proportion(base.follow), f"a lower end under {MIN_BASE_FOLLOW:.0%}"),
        (f"follow rate of the swap, {names[1]}", proportion(tuned.follow), "a rate like the base's"),
        ("loss of follow rate, paired", paired_shares(base.follow, tuned.follow), REVERSED[found.verdict]),
        (f"stays with the question, {names[1]}", proportion(tuned.stay), "does not decide the word"),
        (f"right with its chain whole, {names[0]}", proportion(base.right), "a lower end at chance"),
        (f"E, {names[0]} (nats)", mean(base.effect), "does not decide the word by itself"),
        (f"E, {names[1]} (nats)", mean(tuned.effect), "does not decide the word by itself"),
    ]
    rival = found.rival.to_dict("records") if told is not None else []
    for r in rival:
        e = Estimate(r["value"], r["ci_low"], r["ci_high"], int(r["n"]), "")
        rows.append((f"{r['measure']}: share {r['quantity']}", e, told.would_reverse if told else ""))
    rows += _set_rows(found.restoring, "returned") + _set_rows(found.cutting, "taken away")
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
        (f"share of the lost follow rate {verb} by {name}", found.share_follow, why),
    ]


def _said(text: str, reverse: str) -> str:
    return f"{text} (would be reversed by {reverse}; {COVERS})."


def _names(units: tuple[str, ...]) -> str:
    return " + ".join(units)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
