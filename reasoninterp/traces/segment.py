r"""Cutting a text into steps without losing a character.

`segment(text, how)` is a lossless partition: `"".join(segment(text, how)) == text`, no piece is empty, and blank
characters between two steps belong to the piece before them.  The segmenters:

`lines`        one step a line; blank lines go to the line before.
`sentences`    pysbd within each line; its sentences are looked up in the text again, and only the places where
               they start are used, so what it alters or loses stays in the text.  A boundary needs the end of a
               sentence and a blank before it, so `3.5` is never cut.
`numbered`     a step starts where a line starts with `1.`, `2)`, `(3)`, `Step 4:` (also inside `**…**`).
`calculator`   one step a line, and a line with several `<<a=b>>` is cut between the sentences that hold them.
`think`        three pieces: all up to and with `<think>`, the chain, and all from `</think>` on.

`join_pieces` turns pieces into the steps of a `Trace`.  A `Format` has one string between steps: the blanks in which
all pieces but the last end alike become `between_steps`, and what a piece has beyond them stays at the end of its step.
So `between_steps.join(steps)` is the text, character for character, however the blanks vary.

`split_chain` cuts a mind's output into what precedes the chain, the chain, and the answer's surroundings.
"""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from reasoninterp.errors import UserError
from reasoninterp.traces.answers import extract

SEGMENTERS = ("lines", "sentences", "numbered", "think", "calculator")

_ITEM = re.compile(r"^[ \t]*[*_#]*[ \t]*(?:\(?\d{1,3}[.)](?=\s)|\(\d{1,3}\)|step[ \t]+\d{1,3}\b)", re.IGNORECASE)
_ENDS = (".", "!", "?", ":", ";", "…", "。", '"', "'", "\u201d", "\u2019", ")", "]", "*", "$")
_OPEN, _CLOSE = "<think>", "</think>"


class Think(NamedTuple):
    """A text around its `<think>` block: `head + chain + tail` is the text.

    `closed` is False where the chain was not ended (cut off by a length limit): all the rest is chain.
    `present` is False where the text has neither tag: then all of it is `tail`.
    """

    head: str
    chain: str
    tail: str
    closed: bool
    present: bool


def segment(text: str, how: str) -> list[str]:
    """Non-empty pieces of `text` in order; joining them gives the text back.

    Raises:
        UserError: an unknown segmenter.
    """
    if how == "lines":
        return _lines(text)
    if how == "sentences":
        return [piece for line in _lines(text) for piece in _sentences(line)]
    if how == "numbered":
        return _numbered(text)
    if how == "calculator":
        return [piece for line in _lines(text) for piece in _calculations(line)]
    if how == "think":
        think = split_think(text)
        return [piece for piece in think[:3] if piece]
    raise UserError(f"unknown segmenter {how!r}; choose one of {', '.join(SEGMENTERS)}.")


def _cut(text: str, starts: Sequence[int]) -> list[str]:
    """The text cut at the given places."""
    places = sorted({0, *starts, len(text)})
    return [text[a:b] for a, b in itertools.pairwise(places)]


def _merge_blank(pieces: Sequence[str]) -> list[str]:
    """Blank pieces joined to the piece before (leading ones to the piece after)."""
    out: list[str] = []
    for piece in pieces:
        if out and (not piece.strip() or not out[-1].strip()):
            out[-1] += piece
        elif piece:
            out.append(piece)
    return out


def _lines(text: str) -> list[str]:
    return _merge_blank(re.findall(r"[^\n]*\n|[^\n]+", text))


@lru_cache(maxsize=1)
def _splitter() -> Any:
    """The sentence splitter, made once; importing it is slow enough to wait until it is needed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its patterns use escapes that newer interpreters warn about
        import pysbd

        return pysbd.Segmenter(language="en", clean=False)


def _sentences(line: str) -> list[str]:
    """Sentences of one line.

    Each sentence that pysbd gives is looked up behind the one before it.  One that is not found (pysbd has changed
    it), that starts without a blank before it, or that follows no end of a sentence (pysbd cuts before a number in
    running text such as "That is 1. Then") is not a boundary: its characters stay with the piece before.
    """
    if not line.strip():
        return [line] if line else []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = _splitter().segment(line)
    except (re.error, IndexError, ValueError, TypeError):
        return [line]  # pysbd builds patterns from the text, and some texts break them
    starts, at = [], 0
    for sentence in found:
        wanted = sentence.strip()
        place = line.find(wanted, at) if wanted else -1
        if place < 0:
            continue
        if line[:place].rstrip().endswith(_ENDS) and line[place - 1].isspace():
            starts.append(place)
        at = place + len(wanted)
    return _merge_blank(_cut(line, starts))


def _numbered(text: str) -> list[str]:
    out: list[str] = []
    for line in _lines(text):
        if out and not _ITEM.match(line.lstrip("\n")):
            out[-1] += line
        else:
            out.append(line)
    return out


def _calculations(line: str) -> list[str]:
    """One line cut between sentences so that no two calculations share a piece, where sentences allow it."""
    if line.count("<<") < 2:
        return [line]
    out: list[str] = []
    for sentence in _sentences(line):
        if out and not ("<<" in sentence and "<<" in out[-1]):
            out[-1] += sentence
        else:
            out.append(sentence)
    return out


def split_think(text: str) -> Think:
    """A text around its first `<think>` block.

    A chat template may have opened the block already: then the text has only `</think>`, and the chain starts at once.
    Blanks next to the tags belong to head and tail.
    """
    start, stop = text.find(_OPEN), text.find(_CLOSE)
    if start < 0 and stop < 0:
        return Think("", "", text, closed=False, present=False)
    begin = start + len(_OPEN) if start >= 0 and (stop < 0 or start < stop) else 0
    end = stop if stop >= 0 else len(text)
    chain = text[begin:end]
    begin += len(chain) - len(chain.lstrip())
    end = max(begin, end - (len(chain) - len(chain.rstrip())))
    return Think(text[:begin], text[begin:end], text[end:], closed=stop >= 0, present=True)


class Joined(NamedTuple):
    """Steps and the one string that joins them."""

    steps: tuple[str, ...]
    between_steps: str


def join_pieces(pieces: Sequence[str]) -> Joined:
    """Pieces as steps: `between_steps.join(steps) == "".join(pieces)` (see the module)."""
    if len(pieces) < 2:
        return Joined(tuple(pieces), "\n")
    backwards = [piece[len(piece.rstrip()) :][::-1] for piece in pieces[:-1]]
    alike = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*backwards, strict=False))
    shared = "".join(column[0] for column in alike)[::-1]
    if not shared or not all(piece[: len(piece) - len(shared)].strip() for piece in pieces[:-1]):
        return Joined(tuple(pieces), "")
    return Joined((*(piece[: len(piece) - len(shared)] for piece in pieces[:-1]), pieces[-1]), shared)


class Split(NamedTuple):
    """A mind's output in parts: `head + between_steps.join(steps) + before_answer + answer + tail` is the text.

    `status` is `ok`; `missing` (no answer found); `unclosed` (a `<think>` block without an end, hence no answer);
    or `no steps`.  Unless it is `ok`, `answer` and `tail` are empty and `before_answer` is what follows the chain.
    """

    head: str
    steps: tuple[str, ...]
    between_steps: str
    before_answer: str
    answer: str
    tail: str
    status: str


_MARKER = re.compile(
    r"\s*(?:####[ \t]*|A:[ \t]*|[$]*\\f?boxed\s*\{\s*"
    r"|(?:(?:so|therefore|thus|hence),?[ \t]+)?(?:the[ \t]+)?(?:final[ \t]+|correct[ \t]+)?answers?(?:[ \t]+is)?"
    r"[ \t]*[:\-]?[ \t]*(?:option[ \t]+)?[$*(\[\"']*(?:\\f?boxed\s*\{\s*)?)[$]*$",
    re.IGNORECASE,
)
"""What leads to an answer, at the end of the text before it."""


def split_chain(text: str, how: str = "lines", extractor: str = "hash") -> Split:
    """Cut a mind's output into chain and answer.

    Where the text has a `<think>` block, the chain is its inside and the answer is looked for behind it.  Elsewhere the
    answer is looked for in the whole text, and the chain ends where the answer's marker (`####`, `the answer is`,
    `\\boxed{`) starts; where there is no marker, where the answer itself starts.

    Args:
        text: what the mind wrote after the prompt.
        how: the segmenter of the chain (`think` means: `<think>` block, then lines).
        extractor: how the answer is found (`answers.extract`).
    """
    think = split_think(text)
    inner = "lines" if how == "think" else how
    if think.present:
        joined = join_pieces(segment(think.chain, inner))
        found = extract(think.tail.replace(_CLOSE, " " * len(_CLOSE), 1), extractor) if think.closed else None
        if found is None or found.chars is None or not joined.steps:
            status = "no steps" if not joined.steps else "missing" if think.closed else "unclosed"
            return Split(think.head, *joined, think.tail, "", "", status)
        start, stop = found.chars
        return Split(think.head, *joined, think.tail[:start], think.tail[start:stop], think.tail[stop:], "ok")
    head = text[: len(text) - len(text.lstrip())]
    body = text[len(head) :]
    found = extract(body, extractor)
    if found.chars is None:
        joined = join_pieces(segment(body.rstrip(), inner))
        tail = body[len(body.rstrip()) :]
        return Split(head, *joined, tail, "", "", "missing" if joined.steps else "no steps")
    start, stop = found.chars
    near = max(0, start - 200)  # a marker is short, and a search from the start is slow on long chains
    marker = _MARKER.search(body[near:start])
    chain = body[: near + marker.start()] if marker else body[:start].rstrip()
    if not chain.strip():
        return Split(head, (), "\n", body, "", "", "no steps")
    joined = join_pieces(segment(chain, inner))
    return Split(head, *joined, body[len(chain) : start], body[start:stop], body[stop:], "ok")
