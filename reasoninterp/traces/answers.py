r"""Answers: found in a text, and compared.

1. `extract(text, how)` looks for the answer in what a mind wrote and gives an `Extracted`: the answer and its
   characters, or the status `missing`.  Missing is a class of its own: it is counted beside right and wrong.
2. `normalise` brings an answer to the form in which two are compared: `$1,000.` and `1000.0` are both `1000`.
3. `same_answer` compares by value where both are numbers and as text otherwise.

The extractors, and which match counts where there are several:

====================  ===========================================================  ==========
`hash`                the rest of the line behind `####` (GSM8K)                   first
`boxed`               the inside of `\boxed{…}`, braces balanced                   last
`letter`              an option's letter: "answer is (C)", "(C)", "C." alone       last
`last-number`         a number                                                     last
`regex:PATTERN`       the pattern's one group                                      first
`exact`               the whole text without surrounding blanks                    -
====================  ===========================================================  ==========

First for `hash` and a user's pattern, since a mind that is not stopped goes on to write another problem; last for
the others, since chains box or name intermediate results.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from reasoninterp.errors import UserError
from reasoninterp.traces.trace import Span

EXTRACTORS = ("hash", "boxed", "letter", "last-number", "exact")

NUMBER = r"(?:\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"
LONGEST_NUMBER = 300
"""Characters beyond which digits are no number: a mind that loops writes thousands of them."""

_HASH = re.compile(r"####[ \t]*([^\n]*)")
_LAST_NUMBER = re.compile(rf"(?<![\w.])-?\$?{NUMBER}(?:/\d+)?")
_CUED_LETTER = re.compile(
    r"(?:answers?|options?|choices?|ans)\b(?:[ \t]+is)?[ \t]*[:=\-\u2013]?[ \t]*(?:option[ \t]+)?"
    r"[\(\[\*\"']*([A-J])(?![\w'\u2019])",
    re.IGNORECASE,
)
_BRACKETED_LETTER = re.compile(r"[\(\[]([A-J])[\)\]]")
_LONE_LETTER = re.compile(r"^[ \t]*[\*\(\[]*([A-J])[\)\]\.:\*]*[ \t]*$", re.MULTILINE)


@dataclass(frozen=True)
class Extracted:
    """An answer found in a text.

    Attributes:
        value: the answer as written, without surrounding blanks; None where it is missing.
        status: `ok` or `missing`.
        chars: the answer's characters in the text.
    """

    value: str | None
    status: Literal["ok", "missing"]
    chars: Span | None = None


MISSING = Extracted(None, "missing")


def extract(text: str, how: str) -> Extracted:
    """The answer in `text` by the extractor `how` (see the module).

    Raises:
        UserError: an unknown extractor, or a pattern that does not compile or has not exactly one group.
    """
    if how.startswith("regex:"):
        match = compile_pattern(how.removeprefix("regex:")).search(text)
        return _trimmed(text, *match.span(1)) if match and match.group(1) is not None else MISSING
    if how == "hash":
        match = _HASH.search(text)
        return _trimmed(text, *match.span(1)) if match else MISSING
    if how == "boxed":
        return _boxed(text)
    if how == "letter":
        return _letter(text)
    if how == "last-number":
        found = list(_LAST_NUMBER.finditer(text))
        return _trimmed(text, *found[-1].span()) if found else MISSING
    if how == "exact":
        return _trimmed(text, 0, len(text))
    raise UserError(f"unknown answer extractor {how!r}; choose one of {', '.join(EXTRACTORS)} or regex:PATTERN.")


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """A user's pattern, checked.

    Raises:
        UserError: it does not compile, or has not exactly one group.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as problem:
        raise UserError(f"answer pattern {pattern!r} is not a regular expression: {problem}.") from None
    if compiled.groups != 1:
        raise UserError(
            f"answer pattern {pattern!r} has {compiled.groups} groups; put exactly one (…) around the answer."
        )
    return compiled


def _trimmed(text: str, start: int, stop: int) -> Extracted:
    """The characters from `start` to `stop` without blanks at either end; missing if nothing is left."""
    while start < stop and text[start].isspace():
        start += 1
    while stop > start and text[stop - 1].isspace():
        stop -= 1
    return Extracted(text[start:stop], "ok", Span(start, stop)) if stop > start else MISSING


def _boxed(text: str) -> Extracted:
    r"""The last `\boxed{…}` whose braces close; an escaped brace does not count."""
    found, last = MISSING, -1
    open_braces: list[tuple[int, bool]] = []  # where each starts, and whether it is a box's
    for match in re.finditer(r"\\f?boxed\s*\{|\\.|[{}]", text, re.DOTALL):
        mark = match.group()
        if mark == "}" and open_braces:
            start, boxed = open_braces.pop()
            inside = _trimmed(text, start, match.start())
            if boxed and start > last and inside.status == "ok":
                found, last = inside, start
        elif mark[-1] == "{" and mark != "\\{":
            open_braces.append((match.end(), mark != "{"))
    return found


def _letter(text: str) -> Extracted:
    """The last letter behind a cue word; else the last bracketed one; else the last that has a line to itself."""
    for pattern in (_CUED_LETTER, _BRACKETED_LETTER, _LONE_LETTER):
        found = [m for m in pattern.finditer(text) if m.group(1).isupper()]
        if found:
            return _trimmed(text, *found[-1].span(1))
    return MISSING


def as_number(answer: str) -> Fraction | None:
    r"""The exact value of an answer that is a number; None for any other.

    Read are: a sign, `$`, `%` (dropped: `50%` is 50), thousands' commas, decimals, `a/b`, `\frac{a}{b}` and a full
    stop at the end.
    """
    text = _plain(answer)
    text = re.sub(r"^(-?)\$", r"\1", text).rstrip("%").strip()
    match = re.fullmatch(rf"(-?)({NUMBER})(?:\s*/\s*({NUMBER}))?", text)
    if not match or len(text) > LONGEST_NUMBER:
        return None
    value = Fraction(match.group(2).replace(",", ""))
    if match.group(3):
        below = Fraction(match.group(3).replace(",", ""))
        if below == 0:
            return None
        value /= below
    return -value if match.group(1) else value


def _plain(answer: str) -> str:
    """An answer without LaTeX wrapping, surrounding blanks and full stops."""
    text = answer.strip().strip("$").strip() if answer.strip().startswith("$") else answer.strip()
    text = re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\d?t?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"\1/\2", text)
    text = text.replace("\\$", "").replace("\\%", "%").replace("\\!", "").replace("\u2212", "-")
    return text.rstrip(".").strip()


def normalise(answer: str) -> str:
    """The form in which answers are compared: numbers in lowest terms, other text without case and extra blanks."""
    value = as_number(answer)
    if value is not None:
        return str(value)
    return re.sub(r"\s+", " ", _plain(answer)).casefold()


def same_answer(a: str, b: str) -> bool:
    """Whether two answers are the same: by value where both are numbers, as text otherwise."""
    return normalise(a) == normalise(b)
