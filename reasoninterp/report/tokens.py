"""The token view: what each mind's tokens came from, one mind's line above the other's.

From the table `memorization_tokens` (one row a mind, trace and token; see the study `memorization`):

1. A token is *called* by its dominant sources (class `local`, `mid`, `long`, or several where they tie), `none` where at
   least one source was tested and none is present, `undefined` where none could be tested.  Its colour is the source; the
   colour's opacity is `strength`, the rank correlation of the dominant source given unigram counts, cut to 0 … 1.
2. Lines are aligned step by step (`aligned`): tokens that stand in all lines share a column, others stand above or below
   a gap or each other.  Where all minds read one chain, every column is one token.  Steps of a short chain share a line.
3. Of many traces a few are shown (`chosen`): first those in which the minds' dominant sources differ in the largest share
   of the columns that hold the same token in all minds; among equals, those with most wrong tokens, then as they come.
4. A token's card holds what was counted for it: the tokens that the corpus was asked about, the correlations, p and q or
   the reason why there are none, and the first alternatives with their counts.

Questions are read from the table `memorization_questions` (`trace`, `question`) where a run has it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

import numpy as np
import pandas as pd

from reasoninterp.figures import mind_order, number, short
from reasoninterp.memorization.names import GIVEN, NAMES, NONE, SOURCES, TAKEN_OUT, UNDEFINED
from reasoninterp.report.content import fixed

TABLE = "memorization_tokens"
QUESTIONS = "memorization_questions"
ANSWER_LABEL = "→ answer"
PLACED = ("mind", "part", "step", "position", "text", "dominant")  # what `parts` and `counts` read
MAX_TRACES = 6
MAX_TOKENS = 160  # of one mind's steps in one trace: each has a card, about 2 kB of the page
MAX_ALTERNATIVES = 8
MAX_INLINE = 16  # columns of a chain whose steps share a line
MAX_ASKED = 10  # tokens of a local window that are printed
SIGNS = {" ": "·", "\n": "↵", "\t": "⇥", "\r": "␍"}


@dataclass(frozen=True)
class Column:
    """Tokens that stand one above the other: a row of the table for each mind, or None where it has no token there."""

    rows: tuple[dict[str, Any] | None, ...]

    @property
    def same(self) -> bool:
        """Whether every mind has the same token here."""
        return len({None if row is None else row["text"] for row in self.rows}) == 1

    @property
    def differs(self) -> bool:
        """Whether the same token has another dominant source in another mind."""
        return self.same and len({row["dominant"] for row in self.rows if row is not None}) > 1


def view(tables: Mapping[str, pd.DataFrame]) -> dict[str, Any] | None:
    """What the section prints; None where the run has no table of tokens."""
    table = tables.get(TABLE)
    if table is None:
        return None
    minds = mind_order(table["mind"])
    questions = dict(tables[QUESTIONS][["trace", "question"]].to_numpy()) if QUESTIONS in tables else {}
    shown, n = chosen(table, minds)
    traces = [_trace(table[table["trace"] == name], minds, str(questions.get(name, ""))) for name in shown]
    return {
        "minds": minds,
        "n": n,
        "rule": rule(traces, n),
        "own": bool((table["writer"] != GIVEN).any()),
        "judged": bool(table["wrong"].notna().any()),
        "traces": traces,
    }


def chosen(table: pd.DataFrame, minds: Sequence[str], most: int = MAX_TRACES) -> tuple[list[str], int]:
    """The traces that are shown (step 3), and of how many."""
    order = []
    for at, (name, rows) in enumerate(table.groupby("trace", sort=False)):
        differing, same = counts([c for _, some in parts(rows[list(PLACED)], minds) for c in some])
        wrong = int((rows["wrong"] == True).sum())  # noqa: E712 (None where nobody judged)
        order.append((-differing / max(1, same), -wrong, at, str(name)))
    return [name for *_, name in sorted(order)[:most]], len(order)


def rule(traces: Sequence[Mapping[str, Any]], n: int) -> str:
    """Which of n traces are shown, in words; nothing where all are."""
    differ, wrong = any(t["differing"] for t in traces), any(any(t["wrong"].values()) for t in traces)
    if len(traces) == n:
        return ""
    if not differ and not wrong:
        return ", the first: no trace has a token that differs in its dominant source, or a wrong one"
    first = "in which the largest share of tokens differs in its dominant source between the minds"
    then = "with most wrong tokens"
    chosen_by = f"{first} (among equals, those {then})" if differ and wrong else first if differ else then
    return f", those {chosen_by}: they are picked, not typical"


def counts(columns: Sequence[Column]) -> tuple[int, int]:
    """In how many columns the dominant sources differ, of how many that hold one token in all minds."""
    return sum(c.differs for c in columns), sum(c.same for c in columns)


def parts(rows: pd.DataFrame, minds: Sequence[str]) -> list[tuple[str, list[Column]]]:
    """A trace's columns step by step, then those of its answer; each part with its label."""
    out = []
    steps = [(i, rows[(rows["part"] == "step") & (rows["step"] == i)]) for i in sorted(set(rows["step"]))]
    named = [(f"step {i + 1}", some) for i, some in steps] + [(ANSWER_LABEL, rows[rows["part"] == "answer"])]
    for label, some in named:
        lines = [some[some["mind"] == mind].sort_values("position").to_dict("records") for mind in minds]
        if any(lines):
            places = aligned([[row["text"] for row in line] for line in lines])
            columns = [
                Column(tuple(None if k is None else line[k] for line, k in zip(lines, at, strict=True)))
                for at in places
            ]
            out.append((label, columns))
    return out


def aligned(lines: Sequence[Sequence[str]]) -> list[tuple[int | None, ...]]:
    """Columns of several lines of tokens: for each line the index of its token, or None at a gap.

    Each line is laid against the columns so far; equal runs share columns, and where one run stands in place of another
    their tokens are paired in order.  Every line keeps its order, and no column is empty.
    """
    columns: list[tuple[int | None, ...]] = []
    texts: list[str] = []
    for n, line in enumerate(lines):
        merged, named = [], []
        for _, i, j, k, m in SequenceMatcher(None, texts, line, autojunk=False).get_opcodes():
            for step in range(max(j - i, m - k)):
                old = columns[i + step] if i + step < j else (None,) * n
                merged.append((*old, k + step if k + step < m else None))
                named.append(texts[i + step] if i + step < j else line[k + step])
        columns, texts = merged, named
    return columns


def _trace(rows: pd.DataFrame, minds: Sequence[str], question: str) -> dict[str, Any]:
    """A trace as printed: what is said of it, and its parts with their tokens."""
    steps = rows[rows["part"] == "step"].sort_values("position")
    within = steps.groupby("mind").cumcount() < MAX_TOKENS
    shown = rows.loc[[*steps.index[within], *rows.index[rows["part"] == "answer"]]]
    longest = int(steps.groupby("mind").size().max()) if len(steps) else 0
    differing, same = counts([c for _, some in parts(rows, minds) for c in some])
    wrong = {m: int((rows.loc[rows["mind"] == m, "wrong"] == True).sum()) for m in minds}  # noqa: E712
    return {
        "name": str(rows["trace"].iloc[0]),
        "shift": str(rows["shift"].iloc[0]),
        "question": question,
        "differing": differing,
        "same": same,
        "wrong": wrong,
        "cut": f"the first {MAX_TOKENS} of {longest:,} tokens" if longest > MAX_TOKENS else "",
        "lines": _lines(parts(shown, minds), minds),
    }


def _lines(shown: Sequence[tuple[str, list[Column]]], minds: Sequence[str]) -> list[dict[str, Any]]:
    """The lines of a trace: one a step, or all steps in one where they are short, and one of the answer."""
    printed = [(label, [_column(c, minds, label) for c in columns]) for label, columns in shown]
    steps = [(label, columns) for label, columns in printed if label != ANSWER_LABEL]
    if len(steps) > 1 and sum(len(columns) for _, columns in steps) <= MAX_INLINE:
        for _, columns in steps[1:]:
            columns[0]["starts"] = True
        label = f"steps {steps[0][0].split()[-1]}–{steps[-1][0].split()[-1]}"
        steps = [(label, [c for _, columns in steps for c in columns])]
    lines = [*steps, *((label, columns) for label, columns in printed if label == ANSWER_LABEL)]
    return [{"label": label, "answer": label == ANSWER_LABEL, "columns": columns} for label, columns in lines]


def _column(column: Column, minds: Sequence[str], label: str) -> dict[str, Any]:
    """Tokens one above the other; `starts` marks the first of a step within a line."""
    tokens = [None if r is None else _token(r, m, label) for m, r in zip(minds, column.rows, strict=True)]
    return {"differs": column.differs, "starts": False, "tokens": tokens}


def _token(row: Mapping[str, Any], mind: str, label: str) -> dict[str, Any]:
    """A token as printed, with its card."""
    own = str(row["text"]) or str(row["alternatives"][_written(row)])  # a special token may stand for no characters
    judged = None if pd.isna(row["wrong"]) else bool(row["wrong"])
    return {
        "text": short(visible(own), 40),
        "look": " ".join(called(row)),
        "opacity": opacity(row),
        "wrong": judged is True,
        "card": {
            "text": short(visible(own), 80),
            "mind": mind,
            "where": f"{label.lstrip('→ ')}, token {int(row['position'])}",
            "judged": {None: "", True: "judged wrong", False: "judged right"}[judged],
            "said": said(row),
            "surprise": number(row["surprise"], 3),
            "rank": _rank(int(row["rank"])),
            "stim": NAMES.get(row["stim"] or "", "no source"),
            "sources": [_source(row, source) for source in SOURCES],
            "alternatives": alternatives(row),
            "n": len(row["alternatives"]),
            "moved": [
                (what, number(kl, 2)) for s, what in TAKEN_OUT.items() if math.isfinite(kl := _float(row[f"kl_{s}"]))
            ],
        },
    }


def called(row: Mapping[str, Any]) -> list[str]:
    """The dominant sources, or `none`, or `undefined` where no source could be tested: a token's classes in the page."""
    if row["dominant"]:
        return str(row["dominant"]).split("+")
    tested = any(math.isfinite(_float(row[f"{source}_p"])) for source in SOURCES)
    return [NONE if tested else UNDEFINED]


def opacity(row: Mapping[str, Any]) -> str:
    """The opacity of a token's colour: its strength cut to 0 … 1, or nothing where it has no source."""
    strength = _float(row["strength"])
    return f"{min(1.0, max(0.0, strength)):.2f}" if row["dominant"] and math.isfinite(strength) else ""


def said(row: Mapping[str, Any]) -> str:
    """What is said of a token, in words."""
    names = called(row)
    if names == [UNDEFINED]:
        return "not defined: no source could be tested"
    if names == [NONE]:
        return "none found: no source goes beyond what other contexts give"
    return f"{' and '.join(NAMES[s] for s in names)}, strength {fixed(_float(row['strength']))}"


def alternatives(row: Mapping[str, Any], most: int = MAX_ALTERNATIVES) -> list[dict[str, Any]]:
    """The most probable alternatives and the token that was written, each with its probability and counts."""
    written = _written(row)
    shown = [i for i in range(len(row["alternatives"])) if i < most or i == written]
    by_source = [row[f"{source}_counts"] for source in SOURCES]
    return [
        {
            "text": short(visible(row["alternatives"][i]), 24),
            "written": i == written,
            "numbers": [
                number(math.exp(row["log_probs"][i]), 2),
                *("–" if some is None else _count(some[i]) for some in by_source),
            ],
        }
        for i in shown
    ]


def visible(text: str) -> str:
    """A text with its blanks, line breaks and other signs that print nothing made visible."""
    return "".join(SIGNS.get(c) or (c if c.isprintable() else f"⟨{ord(c):04X}⟩") for c in text)


def _source(row: Mapping[str, Any], source: str) -> dict[str, Any]:
    """One source in a token's card."""
    asked = [visible(t) for t in row[f"{source}_tokens"]]
    if source == "local" and len(asked) > MAX_ASKED:
        asked = [f"… {len(asked) - MAX_ASKED} before", *asked[-MAX_ASKED:]]
    p, q = (_float(row[f"{source}_{name}"]) for name in ("p", "q"))
    n, same = (int(row[f"{source}_{name}"]) for name in ("n_null", "n_same"))
    return {
        "key": source,
        "name": NAMES[source],
        "asked": " ".join(asked),
        "why": "; ".join(str(row[f"{source}_{name}"]) for name in ("reason", "note") if row[f"{source}_{name}"]),
        "numbers": [fixed(_float(row[f"{source}_{name}"])) for name in ("score", "partial")]
        + [number(p, 2), number(q, 2)],
        "null": f"{n:,}{f', {same:,} same' if same else ''}" if n else "–",
        "dominant": source in called(row),
    }


def _written(row: Mapping[str, Any]) -> int:
    """Which alternative was written: the one of its surprise, by its text where several are as probable."""
    gap = np.abs(np.asarray(row["log_probs"], dtype=float) / math.log(2) + float(row["surprise"]))
    near = np.flatnonzero(gap <= gap.min() + 1e-9)
    own = str(row["text"]).strip()
    return int(next((i for i in near if str(row["alternatives"][i]).strip() == own), near[0]))


def _rank(rank: int) -> str:
    return "the most probable token" if rank == 0 else f"{rank:,} more probable {'token' if rank == 1 else 'tokens'}"


def _count(value: Any) -> str:
    v = _float(value)
    return f"{v:,.0f}" if v.is_integer() else number(v, 3)


def _float(value: Any) -> float:
    """A cell as a number; NaN where it is empty."""
    return math.nan if value is None else float(value)
