"""Numbers in prose: where they stand, what they are worth, and how a new value is written in the style of the old.

1. `occurrences(text)` finds every number written in digits, with its characters and exact value.  A number that is part
   of a word, a time or a longer code (`2nd`, `x2`, `3:00`) is found too, but marked `glued`.
2. `word_values(text)` gives the values that a text states in words: `three`, `twenty-five`, `half`, `twice`, `dozen`.
3. `given_values(text)` gives everything that a question may hand over: its numbers, its number words, what goes with
   its units (a week has 7 days), and, where it speaks of percent, each number `p` also as `p/100`, `1 ± p/100`,
   `100 ± p`.
4. `write_like(old, value)` writes a value with the commas, leading zero and decimals of `old`; None if it cannot.
5. `candidate_values` draws other values that can be written as the old one is.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

from reasoninterp.traces.answers import LONGEST_NUMBER, NUMBER
from reasoninterp.traces.trace import Span

_NUMBER = re.compile(NUMBER)

_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"

WORDS: dict[str, int] = {word: n for n, word in enumerate(_ONES.split())}
WORDS |= {word: 10 * (n + 2) for n, word in enumerate(_TENS.split())}
"""Number words of one part."""

_FRACTION_WORDS = {
    2: "half halve halved halves halving twice double doubled doubles doubling both couple pair pairs second",
    3: "triple tripled triples thrice third thirds tripling",
    4: "quarter quarters quadruple quadrupled fourth fourths",
    5: "fifth fifths quintuple",
    6: "sixth sixths half-dozen",
    7: "seventh sevenths week weeks weekly daily",
    8: "eighth eighths",
    9: "ninth ninths",
    10: "tenth tenths decade decades",
    12: "dozen dozens year years yearly annual annually month months monthly foot feet inch inches noon midnight",
    14: "fortnight",
    16: "pound pounds ounce ounces",
    20: "score",
    24: "day days daily hour hours",
    25: "quarter quarters",
    28: "february",
    30: "month months monthly",
    31: "month months monthly",
    36: "yard yards inches",
    52: "year years yearly annual annually week weeks weekly",
    60: "hour hours hourly minute minutes second seconds",
    90: "right",
    100: "percent percentage hundred hundreds century cent cents dollar dollars meter meters centimeter centimeters",
    180: "triangle degrees",
    360: "circle degrees",
    365: "year years yearly annual annually day days daily",
    1000: "thousand thousands kilometer kilometers km meters liter liters ml grams kilograms kg",
    1000000: "million millions",
}
_BY_WORD: dict[str, set[int]] = {}
for _value, _words in _FRACTION_WORDS.items():
    for _word in _words.split():
        _BY_WORD.setdefault(_word, set()).add(_value)


@dataclass(frozen=True)
class Occurrence:
    """A number in a text: its characters, its value, and whether it is glued to letters, a colon or the like."""

    chars: Span
    text: str
    value: Fraction
    glued: bool


def occurrences(text: str) -> list[Occurrence]:
    """Every number in digits, from left to right; a sign is not part of it."""
    out = []
    for match in _NUMBER.finditer(text):
        if len(match.group()) > LONGEST_NUMBER:
            continue
        before, after = text[: match.start()][-1:], text[match.end() : match.end() + 2]
        times = re.match(r"x\s?[\d$.]", text[match.end() : match.end() + 3]) is not None
        timed = re.search(r"[\d)]\s?x$", text[max(0, match.start() - 3) : match.start()]) is not None
        glued = (
            (before.isalpha() and not timed)
            or before in ("_", "#")
            or (after[:1].isalpha() and not times)
            or (before == ":" and text[: match.start() - 1][-1:].isdigit())
            or (after[:1] == ":" and after[1:].isdigit())
            or (before in (".", ",") and text[: match.start() - 1][-1:].isdigit())
        )
        out.append(Occurrence(Span(*match.span()), match.group(), Fraction(match.group().replace(",", "")), glued))
    return out


def word_values(text: str) -> set[Fraction]:
    """Values that the text writes as number words (`three`, `twenty-five`); units are not meant here."""
    found: set[Fraction] = set()
    for match in re.finditer(r"[a-z]+(?:-[a-z]+)?", text.lower()):
        first, _, second = match.group().partition("-")
        if first in WORDS:
            both = second in WORDS and WORDS[first] >= 20 and 0 < WORDS[second] < 10
            found.add(Fraction(WORDS[first] + (WORDS[second] if both else 0)))
            if second in WORDS and not both:
                found.add(Fraction(WORDS[second]))
        elif second in WORDS:
            found.add(Fraction(WORDS[second]))
    return found


def stated_values(text: str) -> set[Fraction]:
    """Values that the text states in digits or in number words."""
    return {o.value for o in occurrences(text)} | word_values(text)


def given_values(text: str) -> set[Fraction]:
    """Values for which the text may be the source (see the module's step 3); 0, 1, 2 and 100 are always given."""
    found = stated_values(text) | implied_values(text) | {Fraction(n) for n in (0, 1, 2, 100)}
    if re.search(r"%|percent", text):
        for p in stated_values(text):
            found |= {p / 100, 1 + p / 100, 1 - p / 100, 100 - p, 100 + p}
    return found


def implied_values(text: str) -> set[Fraction]:
    """Values that go with the text's units and words of proportion: 12 with `dozen`, 7 with `week`, 3 with `third`."""
    found: set[Fraction] = set()
    for word in re.findall(r"[a-z]+(?:-[a-z]+)?", text.lower()):
        for part in {word, *word.split("-")}:
            found |= {Fraction(n) for n in _BY_WORD.get(part, ())}
            if part.endswith("s") and part[:-1] in WORDS:
                found.add(Fraction(WORDS[part[:-1]]))
    return found


def decimals(text: str) -> int:
    """How many digits stand behind the decimal point."""
    return len(text.partition(".")[2])


def write_like(old: str, value: Fraction) -> str | None:
    """`value` written as `old` is: its commas (if it has any), leading zero and decimals.

    None where the value has more decimals than `old` shows (a whole number stays whole) or is negative.
    """
    if value < 0:
        return None
    places = decimals(old)
    scaled = value * 10**places
    if scaled.denominator != 1:
        return None
    digits = str(int(scaled)).rjust(places + 1, "0")
    whole, behind = (digits[:-places], digits[-places:]) if places else (digits, "")
    if "," in old:
        whole = f"{int(whole):,}"
    if old.startswith(".") and whole == "0":
        whole = ""
    return f"{whole}.{behind}" if places else whole


def candidate_values(old: Fraction, text: str, seed: str, limit: int = 40) -> Iterator[Fraction]:
    """New values for a result written as `text`: positive, as many digits before and behind the point, seeded order.

    A whole number stays whole, also where it is written with decimals (`51.0`).

    Half are drawn from all such values, half are the old one plus or minus a multiple of 60 or 12 or 10, which later
    divisions are likelier to leave whole.
    """
    if old <= 0:
        return
    places = 0 if old.denominator == 1 else decimals(text)
    unit = Fraction(1, 10**places)
    whole = int(old / unit)
    digits = len(str(int(old)))
    low = 10 ** (digits - 1 + places) if old >= 1 else 1
    high = (10**digits if old >= 1 else 1) * 10**places - 1
    draw = random.Random(seed)
    near = [whole + sign * k * m for m in (60, 12, 10) for k in range(1, 8) for sign in (1, -1)]
    if high - low <= 4 * limit:
        pool = list(range(low, high + 1))
        draw.shuffle(pool)
    else:
        pool = [draw.randint(low, high) for _ in range(limit)]
        draw.shuffle(near)
        pool = [x for pair in zip(pool, near, strict=False) for x in pair]
    seen = {whole}
    count = 0
    for x in pool:
        if x in seen or not low <= x <= high or count >= limit:
            continue
        seen.add(x)
        count += 1
        yield x * unit
