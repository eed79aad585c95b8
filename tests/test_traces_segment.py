"""Segmenting loses no character, and cuts where a reader would."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reasoninterp.errors import UserError
from reasoninterp.traces.segment import SEGMENTERS, join_pieces, segment, split_chain, split_think
from reasoninterp.traces.trace import Format, Trace

PIECES = [
    "<think>",
    "</think>",
    "<<1+1=2>>",
    "1. ",
    "2) ",
    "Step 3: ",
    "e.g. ",
    "3.5",
    "\\boxed{4}",
    "#### 7",
    "\n",
    "\n\n",
]


def texts(n: int, seed: int) -> list[str]:
    """Arbitrary text: any characters (surrogates apart), with the segmenters' own marks mixed in."""
    draw, out = random.Random(seed), []
    for _ in range(n):
        text = ""
        for _ in range(draw.randrange(40)):
            kind = draw.random()
            if kind < 0.25:
                text += draw.choice(PIECES)
            elif kind < 0.8:
                text += draw.choice("ab .!?\n\t01,<>=/-()\"'…。\r\x0b\x0c\x85\u2028\u00a0\u200b*#")
            else:
                text += chr(draw.choice([draw.randrange(1, 0xD800), draw.randrange(0xE000, 0x110000)]))
        out.append(text)
    return out


def check_partition(text: str, how: str) -> None:
    pieces = segment(text, how)
    assert "".join(pieces) == text and all(pieces)
    joined = join_pieces(pieces)
    trace = Trace("a", "q", joined.steps, "1", Format("", "", joined.between_steps, "", ""))
    assert trace.text == "q" + text + "1"
    if how != "think" and text.strip():
        assert all(piece.strip() for piece in pieces), "a blank piece would be a step without a token"


@pytest.mark.parametrize("how", SEGMENTERS)
def test_pieces_join_to_the_text(how: str) -> None:
    for text in texts(700, seed=len(how)):
        check_partition(text, how)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=8))).map("".join), st.sampled_from(SEGMENTERS))
def test_pieces_of_arbitrary_text_join_to_it(text: str, how: str) -> None:
    check_partition(text, how)


@pytest.mark.parametrize("extractor", ["hash", "boxed", "last-number", "letter", "exact"])
@pytest.mark.parametrize("how", ["lines", "sentences", "think"])
def test_a_minds_output_is_cut_without_loss(how: str, extractor: str) -> None:
    statuses = set()
    for text in texts(400, seed=7):
        cut = split_chain(text, how, extractor)
        whole = cut.head + cut.between_steps.join(cut.steps) + cut.before_answer + cut.answer + cut.tail
        assert whole == text
        assert (cut.status == "ok") == bool(cut.answer) or cut.status == "no steps"
        statuses.add(cut.status)
    assert {"no steps"} < statuses


def test_lines() -> None:
    assert segment("a\n\nb\nc", "lines") == ["a\n\n", "b\n", "c"]
    assert segment("", "lines") == [] and segment("\n\na", "lines") == ["\n\na"]
    assert join_pieces(["a\n", "b\n", "c"]) == (("a", "b", "c"), "\n")
    assert join_pieces(["a\n\n", "b \n", "c"]) == (("a\n", "b ", "c"), "\n")
    assert join_pieces(["a\n", "b ", "c"]) == (("a\n", "b ", "c"), "")


def test_sentences_are_not_cut_at_decimals_or_abbreviations() -> None:
    text = "The ratio is 3.5 to 1, e.g. for Dr. Hill. It costs $.5 each.  That is 1. Then 2 is left! Done"
    assert segment(text, "sentences") == [
        "The ratio is 3.5 to 1, e.g. for Dr. Hill. ",
        "It costs $.5 each.  ",
        "That is 1. ",
        "Then 2 is left! ",
        "Done",
    ]


def test_numbered_lists_keep_what_belongs_to_an_item() -> None:
    text = "We go on:\n1. First\n  more 2. not here\n2) Second\n**Step 3:** third\n3.5 is no item\n(4) fourth"
    assert segment(text, "numbered") == [
        "We go on:\n",
        "1. First\n  more 2. not here\n",
        "2) Second\n",
        "**Step 3:** third\n3.5 is no item\n",
        "(4) fourth",
    ]


def test_calculations_on_one_line_are_parted_between_sentences() -> None:
    text = "He has 2+3=<<2+3=5>>5 cats. They eat. Each eats 2*5=<<2*5=10>>10 cans.\nOne line <<1+1=2>>2 and <<2+2=4>>4"
    assert segment(text, "calculator") == [
        "He has 2+3=<<2+3=5>>5 cats. They eat. ",
        "Each eats 2*5=<<2*5=10>>10 cans.\n",
        "One line <<1+1=2>>2 and <<2+2=4>>4",
    ]


def test_think_blocks() -> None:
    assert split_think("<think>\na\n</think>\n\n4") == ("<think>\n", "a", "\n</think>\n\n4", True, True)
    assert split_think("a\n</think>4") == ("", "a", "\n</think>4", True, True)
    assert split_think("<think>a\nb") == ("<think>", "a\nb", "", False, True)
    assert split_think("plain") == ("", "", "plain", False, False)
    assert segment("<think>\na\nb\n</think>\n4", "think") == ["<think>\n", "a\nb", "\n</think>\n4"]


def test_outputs_by_hand() -> None:
    cut = split_chain("a b\nc d\n#### 18\nmore", "lines", "hash")
    assert cut == ("", ("a b", "c d"), "\n", "\n#### ", "18", "\nmore", "ok")
    cut = split_chain("a\nb\nSo the answer is \\boxed{18}.", "lines", "boxed")
    assert cut == ("", ("a", "b"), "\n", "\nSo the answer is \\boxed{", "18", "}.", "ok")
    cut = split_chain("<think>\na\nb\n</think>\n\nThe answer is 18.", "think", "last-number")
    assert cut == ("<think>\n", ("a", "b"), "\n", "\n</think>\n\nThe answer is ", "18", ".", "ok")
    assert split_chain("<think>\na\nb #### 3", "lines", "hash").status == "unclosed"
    assert split_chain("a\nb", "lines", "hash") == ("", ("a", "b"), "\n", "", "", "", "missing")
    assert split_chain("#### 3", "lines", "hash").status == "no steps"


def test_real_chains_of_thought_keep_every_character() -> None:
    folder = Path(__file__).resolve().parents[2] / "shared" / "data" / "thought_anchors"
    files = sorted(folder.glob("*/*/*/base_solution.json"))[:8]
    if not files:
        pytest.skip("the data folder is not here")
    import json

    for file in files:
        text = json.loads(file.read_text())["full_cot"]
        for how in SEGMENTERS:
            assert "".join(segment(text, how)) == text
        assert len(segment(text, "sentences")) > 10


def test_an_unknown_segmenter_is_named() -> None:
    with pytest.raises(UserError, match=r"'words'.*lines, sentences"):
        segment("a", "words")
