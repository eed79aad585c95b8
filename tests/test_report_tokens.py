"""The token view of the report: colours follow the table, text is shown and never run, and the rules are those stated."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from reasoninterp.report import render, tokens
from reasoninterp.runs import Run
from tests.test_report import Page, blank

SOURCES = ("local", "mid", "long")
WORDS = ["3", "8", "+", "5", "=", "apples", "so", "she", "has", "left"]


def row(
    text: str = " 8", *, mind: str = "base", trace: str = "a", step: int = 0, position: int = 5, **more: Any
) -> dict[str, Any]:
    """One token that was tested by all sources and has none; `more` replaces columns."""
    alternatives = [text, *[w for w in WORDS if w != text.strip()][:9]]
    log_probs = [math.log(0.5), *[math.log(0.4 / 2**i) for i in range(1, 10)]]
    out: dict[str, Any] = {"mind": mind, "trace": trace, "writer": "given", "part": "step", "step": step}
    out |= {"position": position, "text": text, "shift": "", "wrong": None, "surprise": 1.0, "rank": 0}
    for source in SOURCES:
        out |= {f"{source}_score": 0.1, f"{source}_partial": 0.05, f"{source}_p": 0.3, f"{source}_q": 0.6}
        out |= {f"{source}_n_null": 199, f"{source}_n_same": 0, f"{source}_n_distinct": 4}
        out |= {f"{source}_reason": "", f"{source}_note": "", f"{source}_tokens": ["she", " has"]}
        out |= {f"{source}_counts": [float(40 - 4 * i) for i in range(10)]}
    out |= {"alternatives": alternatives, "log_probs": log_probs, "dominant": "", "stim": "local", "strength": np.nan}
    out |= {"joint_beyond": 0.1, "joint_unigram": 0.2, "joint_shared": 0.0, "joint_reason": ""}
    out |= dict.fromkeys(("kl_local", "kl_mid", "kl_long", "kl_control"), np.nan)
    return out | more


def found(source: str, strength: float) -> dict[str, Any]:
    """Columns of a token with one dominant source."""
    return {"dominant": source, "strength": strength, f"{source}_partial": strength, f"{source}_q": 0.01}


def undefined(reason: str = "too few alternatives") -> dict[str, Any]:
    """Columns of a token in which no source could be tested."""
    empty: dict[str, Any] = {"stim": None}
    for source in SOURCES:
        empty |= {f"{source}_{name}": np.nan for name in ("score", "partial", "p", "q")}
        empty |= {f"{source}_reason": reason, f"{source}_n_null": 0, f"{source}_counts": None, f"{source}_tokens": []}
    return empty


def page_of(path: Path, rows: Sequence[dict[str, Any]], tables: Mapping[str, pd.DataFrame] | None = None) -> str:
    """The report of a run with this table, and others if given."""
    run = Run.open(path, {"traces": "x"})
    for name, table in {"memorization_tokens": pd.DataFrame(rows), **(tables or {})}.items():
        run.save_table(name, table)
    text = render(run).read_text(encoding="utf-8")
    run.close()
    return text


def section(text: str) -> str:
    """The traces of the section, without its legend."""
    return text[text.index('<div class="traced">') : text.index('<h2 id="example">')]


def spans(text: str) -> list[tuple[str, str, str]]:
    """(classes, opacity, text) of each token in the page, in order."""
    pattern = r'<span class="tk ([^"]*)"(?: style="--s:([\d.]+)")? tabindex="0">(.*?)<span class="tc">'
    return [(c, s, html.unescape(t)) for c, s, t in re.findall(pattern, section(text))]


# --- colour and strength -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "look", "opacity"),
    [
        (found("local", 0.62), "local", "0.62"),
        (found("mid", 0.084), "mid", "0.08"),
        (found("long", 1.0), "long", "1.00"),
        ({"dominant": "local+long", "strength": 0.5}, "local long", "0.50"),
        ({"dominant": "mid", "strength": -0.2}, "mid", "0.00"),
        ({}, "none", ""),
        (undefined(), "undefined", ""),
        ({**undefined(), "mid_p": 0.4}, "none", ""),
    ],
)
def test_colour_is_the_dominant_source_and_opacity_its_strength(
    tmp_path: Path, more: dict[str, Any], look: str, opacity: str
) -> None:
    text = page_of(tmp_path / "r", [row(**more)])
    assert spans(text) == [(look, opacity, "·8")]
    for name in look.split():
        assert f".tk.{name}" in text  # the page has a rule for it


def test_what_is_not_defined_is_neither_none_nor_zero(tmp_path: Path) -> None:
    text = page_of(tmp_path / "r", [row(**undefined("all alternatives have the same count")), row(position=6)])
    assert [c for c, _, _ in spans(text)] == ["undefined", "none"]
    first, second = section(text).split('<span class="tk ')[1:]
    assert first.count("all alternatives have the same count") == 3
    assert "not defined: no source could be tested" in first and "none found" not in first
    # ρ, ρ given frequency, p, q and the number of null contexts of three sources; three counts of eight alternatives
    assert first.count("<td>–</td>") == 3 * 5 + 3 * 8
    assert "none found" in second and "<td>–</td>" not in second


# --- the card ------------------------------------------------------------------------------------------------------


def test_card_holds_counts_p_and_the_written_token(tmp_path: Path) -> None:
    words = [f"w{i}" for i in range(12)]
    probabilities = [0.3, 0.2, 0.1, 0.08, 0.07, 0.06, 0.05, 0.04, 0.03, 0.02, 0.01, 0.005]
    one = row(" w10", alternatives=words, log_probs=[math.log(p) for p in probabilities], surprise=-math.log2(0.01))
    one |= {"rank": 10, "local_counts": [float(7 * i) for i in range(12)], "mid_counts": [i / 3 for i in range(12)]}
    one |= {"long_counts": None, "long_reason": "not counted: no answer", "local_n_null": 199, "local_n_same": 12}
    one |= {"kl_local": 1.25, "kl_mid": 0.5, "kl_long": 0.0, "kl_control": 0.125, **found("local", 0.617)}
    text = page_of(tmp_path / "r", [one])
    card = Page(section(text)[: section(text).rindex("</div>") + 6]).text
    assert "surprise 6.64 bits, 10 more probable tokens" in card
    assert "local, strength 0.617" in card and "199, 12 same" in card and "not counted: no answer" in card
    assert "9 of 12 alternatives" in card
    shown = re.findall(r"<code>w(\d+)</code>( written)?", section(text))
    assert shown == [*((str(i), "") for i in range(8)), ("10", " written")]
    written = tokens.alternatives(one)[-1]
    assert written == {"text": "w10", "written": True, "numbers": ["0.010", "70", "3.33", "–"]}
    assert "local window 1.2, chain before it 0.50, question 0, random tokens 0.12" in card


def test_of_equally_probable_alternatives_the_written_one_is_that_of_its_text() -> None:
    one = row("b", alternatives=["a", " b", "c"], log_probs=[math.log(0.25)] * 3, surprise=2.0, rank=0)
    assert [a["written"] for a in tokens.alternatives(one)] == [False, True, False]


def test_text_is_shown_and_never_run(tmp_path: Path) -> None:
    evil = ["<eos>", " \"x\" & 'y'", "\n\n a", "<script>alert(1)</script>", "\t\u200b", ""]
    rows = [row(t, position=i, alternatives=[t or "<pad>", *WORDS[:9]]) for i, t in enumerate(evil)]
    rows = [{**r, "local_tokens": [t], "mid_reason": t, "trace": "<b>id"} for r, t in zip(rows, evil, strict=True)]
    text = page_of(
        tmp_path / "r",
        rows,
        {"memorization_questions": pd.DataFrame([["<b>id", "<i>How</i>\nmany?"]], columns=["trace", "question"])},
    )
    page = Page(text)
    assert "script" not in {tag for tag, _ in page.tags} and "eos" not in {tag for tag, _ in page.tags}
    shown = [t for _, _, t in spans(text)]
    assert shown == ["<eos>", "·\"x\"·&·'y'", "↵↵·a", "<script>alert(1)</script>", "⇥⟨200B⟩", "<pad>"]
    assert "<b>id" in page.text and "<i>How</i> many?" in page.text
    assert "http:" not in text and "url(" not in text


# --- which tokens, in which order ----------------------------------------------------------------------------------


def test_base_stands_above_tuned_and_the_same_token_called_otherwise_is_framed(tmp_path: Path) -> None:
    words = [" she", " has", " 8"]
    calls = {"tuned": ["local", "local", "local"], "base": ["local", "", "long"]}
    rows = [
        row(w, mind=mind, position=i, **(found(call, 0.4) if call else {}))
        for mind, some in calls.items()  # tuned first in the table
        for i, (w, call) in enumerate(zip(words, some, strict=True))
    ]
    rows += [row(" 8", mind=mind, position=4, step=1, part="answer") for mind in calls]
    text = page_of(tmp_path / "r", rows)
    columns = section(text).split('<span class="col')[1:]
    assert [c.startswith(" differs") for c in columns] == [False, True, True, False]
    assert [c for c, _, _ in spans(text)] == ["local", "local", "none", "local", "long", "local", "none", "none"]
    minds = re.findall(r'<span class="mind"[^>]*>(\w+)</span>', section(text).split('<div class="flow">')[0])
    assert minds == ["base", "tuned"]
    assert "sources differ in 2 of 4 tokens" in Page(text).text
    labels = re.findall(r'<span class="at">(.*?)</span>', text)
    assert labels == ["step 1", "→ answer"]


def test_alignment_by_hand() -> None:
    a, b = ["a", "b", "c", "d"], ["a", "x", "y", "d", "e"]
    assert tokens.aligned([a, b]) == [(0, 0), (1, 1), (2, 2), (3, 3), (None, 4)]
    assert tokens.aligned([["a", "b", "c"], ["a", "c"]]) == [(0, 0), (1, None), (2, 1)]
    assert tokens.aligned([["a"], ["a"], ["b", "a"]]) == [(None, None, 0), (0, 0, 1)]
    assert tokens.aligned([[], ["a"]]) == [(None, 0)]
    assert tokens.aligned([a, a]) == [(i, i) for i in range(4)]


def test_own_chains_keep_every_token_of_every_mind_in_order(tmp_path: Path) -> None:
    lines = {"base": [" 3", " +", " 5"], "tuned": [" so", " 3", " 5", " left"]}
    rows = [row(w, mind=mind, writer=mind, position=i) for mind, line in lines.items() for i, w in enumerate(line)] + [
        row(" 8", mind="tuned", writer="tuned", step=1, position=9)
    ]
    text = page_of(tmp_path / "r", rows)
    columns = [re.findall(r'<span class="tk ([^"]*)"', c) for c in section(text).split('<span class="col')[1:]]
    assert all(len(c) == 2 for c in columns)
    assert [sum(c[k] != "gap" for c in columns) for k in (0, 1)] == [3, 5]
    assert "Each mind reads the chain that it wrote" in text
    assert [t for _, _, t in spans(text)] == ["·so", "·3", "·3", "·+", "·5", "·5", "·left", "·8"]


def test_traces_that_differ_most_come_first_then_those_with_wrong_tokens() -> None:
    def trace(name: str, differing: int, wrong: int, n: int = 4) -> list[dict[str, Any]]:
        return [
            row(trace=name, mind=mind, position=i, wrong=mind == "base" and i < wrong)
            | (found("local", 0.5) if mind == "tuned" and i < differing else {})
            for mind in ("base", "tuned")
            for i in range(n)
        ]

    planned = [("p", 0, 0), ("q", 1, 0), ("r", 1, 3), ("s", 4, 0), ("t", 0, 1), ("u", 0, 0), ("v", 0, 0)]
    table = pd.DataFrame([r for some in planned for r in trace(*some)] + trace("w", 3, 0, n=16))
    assert tokens.chosen(table, ["base", "tuned"]) == (["s", "r", "q", "w", "t", "p"], 8)
    assert tokens.chosen(table, ["base", "tuned"], most=1) == (["s"], 8)
    shown = tokens.view({"memorization_tokens": table})
    assert shown is not None
    assert [t["name"] for t in shown["traces"]] == ["s", "r", "q", "w", "t", "p"] and shown["n"] == 8
    assert shown["traces"][1]["wrong"] == {"base": 3, "tuned": 0}
    assert shown["rule"].startswith(", those in which the largest share") and "picked" in shown["rule"]
    alike = tokens.view({"memorization_tokens": pd.DataFrame([r for i in range(7) for r in trace(str(i), 0, 0)])})
    assert alike is not None
    assert alike["rule"].startswith(", the first: no trace") and [t["name"] for t in alike["traces"]] == list("012345")
    few = tokens.view({"memorization_tokens": pd.DataFrame(trace("a", 1, 1))})
    assert few is not None and few["rule"] == ""


def test_steps_of_a_short_chain_share_a_line_and_long_ones_have_their_own(tmp_path: Path) -> None:
    for n, labels, starts in ((3, ["steps 1–3", "→ answer"], 2), (30, ["step 1", "step 2", "step 3", "→ answer"], 0)):
        rows = [row(f" {i}", position=i, step=3 * i // n) for i in range(n)]
        rows.append(row(" end", position=n, step=3, part="answer"))
        text = page_of(tmp_path / str(n), rows)
        assert re.findall(r'<span class="at">(.*?)</span>', text) == labels
        assert section(text).count('<span class="col starts">') == starts
        assert [t for _, _, t in spans(text)] == [*(f"·{i}" for i in range(n)), "·end"]
        assert "base, step 3, token" in text and "base, answer, token" in text


def test_wrong_tokens_are_marked_where_they_were_judged(tmp_path: Path) -> None:
    rows = [row(position=i, wrong=w) for i, w in enumerate((True, False, None))]
    text = page_of(tmp_path / "judged", rows)
    assert [c for c, _, _ in spans(text)] == ["none wrong", "none", "none"]
    assert section(text).count("judged wrong") == 1 and section(text).count("judged right") == 1
    text = page_of(tmp_path / "unjudged", [row()])
    assert "Nobody judged which tokens are wrong" in text and "wavy line" not in text


def test_a_long_chain_is_cut_and_says_so_but_keeps_its_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "MAX_TOKENS", 5)
    rows = [row(f" {i}", mind=m, position=i, step=i // 4) for m in ("base", "tuned") for i in range(12)]
    rows += [row(" end", mind=m, position=12, step=3, part="answer") for m in ("base", "tuned")]
    text = page_of(tmp_path / "r", rows)
    shown = [t for _, _, t in spans(text)]
    assert shown == [f"·{w}" for w in (0, 1, 2, 3, 4, "end") for _ in range(2)]
    assert "the first 5 of 12 tokens" in text
    assert "sources differ in 0 of 13 tokens" in Page(text).text


def test_shares_over_all_traces_stand_above_the_picked_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Run, "save_figure", blank)
    shares = pd.DataFrame({"source": [*SOURCES, "none", "undefined"], "value": [0.1, 0.2, 0.3, 0.3, 0.1]})
    shares = shares.assign(
        mind="base", shift="", part="step", wrong="all", measure="dominant", n=64, ci_low=0.0, ci_high=0.5
    )
    text = page_of(tmp_path / "r", [row()], tables={"memorization": shares})
    assert text.index("figures/memorization.svg") < text.index("Token by token")
    assert "n up to 64" in text


def test_without_the_table_there_is_no_section(tmp_path: Path) -> None:
    run = Run.open(tmp_path / "r", {"traces": "x"})
    run.save_table("gate", pd.DataFrame({"mind": ["base"], "label": ["interpretable"], "reason": ["r"]}))
    text = render(run).read_text(encoding="utf-8")
    run.close()
    assert 'id="tokens"' not in text and "#tokens" not in text and ".tk" not in text
