"""GSM8K's calculator annotations: `<<48/2=24>>` read, evaluated exactly, and compared with what they claim.

1. `find_annotations(text)` finds every `<<a=b>>` with the characters of its two sides.
2. `evaluate(a)` works out an expression in exact fractions, on the syntax tree that Python's own parser gives; only
   numbers, `+ - * / // ^`, brackets, `%` (hundredths), `$`, `x` and the signs for times and divided by are allowed.
3. `agreement(annotation)` says whether the sides agree: `exact`; `rounded` (`b` is `a` rounded to the decimals that
   `b` shows); `near` (within 1 %); `wrong`; or `unreadable`.
4. `find_equations(text)` finds plain equations (`9 - 2 = 7`) in a text without annotations, for the chains that have
   none and to check those that have.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, NamedTuple

from reasoninterp.traces.answers import LONGEST_NUMBER, NUMBER
from reasoninterp.traces.quantities import decimals
from reasoninterp.traces.trace import Span

Agreement = Literal["exact", "rounded", "near", "wrong", "unreadable"]

_ANNOTATION = re.compile(r"<<([^<>\n]*)>>")
_COPY = re.compile(rf"[ ]?\$?[ ]?({NUMBER})")
# Every blank can be matched in one way only, repetitions are possessive and bounded: else a long row of "1 = 1 = ..."
# takes exponential time.
_ITEM = rf"(?:\( {{0,2}}){{0,9}}+-?\$?(?: (?=[\d.]))?(?>{NUMBER})(?!\d)(?: ?%)?+(?: {{0,2}}\)){{0,9}}+"
_EXPRESSION = rf"{_ITEM}(?: {{0,2}}[-+*/x\u00d7\u00f7^] {{0,2}}{_ITEM}){{0,40}}+"
_EQUATION = re.compile(
    rf"(?<![\w.,]){_EXPRESSION}(?: {{0,2}}= {{0,2}}{_EXPRESSION}){{1,8}}+(?![\d]|[.,]\d| {{0,2}}[*/+\u00d7\u00f7^=])"
)
_OPERATORS: dict[type[ast.AST], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: lambda a, b: Fraction(a // b),
}
_LONGEST = 400


@dataclass(frozen=True)
class Annotation:
    """`<<left=right>>` in a text: the characters of the whole, of both sides, and of the number written out behind it.

    `copy` is None where no number equal to `right` follows at once.  An annotation without `=` has `right` empty; where
    there are several, `right` is what follows the last.
    """

    chars: Span
    left: Span
    right: Span
    copy: Span | None
    left_text: str
    right_text: str


class Equation(NamedTuple):
    """`a = b (= c …)` in a text: its characters and those of each side."""

    chars: Span
    sides: tuple[Span, ...]


def find_annotations(text: str) -> list[Annotation]:
    """Every calculator annotation, from left to right."""
    out = []
    for match in _ANNOTATION.finditer(text):
        inside = match.group(1)
        cut = inside.rfind("=")
        at = match.start(1)
        left = Span(at, at + (cut if cut >= 0 else len(inside)))
        right = Span(left.stop + (1 if cut >= 0 else 0), match.end(1))
        right_text = text[right.start : right.stop]
        follows = _COPY.match(text, match.end())
        copy = None
        if follows and number(follows.group(1)) == number(right_text):
            copy = Span(*follows.span(1))
        out.append(Annotation(Span(*match.span()), left, right, copy, text[left.start : left.stop], right_text))
    return out


def number(text: str) -> Fraction | None:
    """The value of a plain number with optional sign, `$` and thousands' commas; None for anything else."""
    match = re.fullmatch(rf"\s*(-?)\s*\$?\s*({NUMBER})\s*", text)
    if not match or len(text) > LONGEST_NUMBER:
        return None
    value = Fraction(match.group(2).replace(",", ""))
    return -value if match.group(1) else value


def evaluate(expression: str) -> Fraction | None:
    """The exact value of an expression; None where it cannot be read (or divides by zero)."""
    if len(expression) > _LONGEST:
        return None
    text = _balanced(expression)
    text = re.sub(rf"{NUMBER}", lambda m: m.group().replace(",", ""), text).replace("$", "")
    text = re.sub(r"(?<=[\d).\s])[x\u00d7](?=[\s\d(.\-])", "*", text)
    text = text.replace("\u00f7", "/").replace("\u2212", "-").replace("^", "**")
    text = re.sub(r"(?<![\d.])0+(?=\d)", "", text)  # Python reads no leading zeros
    text = re.sub(r"([\d.]+|\))\s*%(?!\s*[\d(])", r"(\1/100)" if "(" not in text else r"\1/100", text)
    try:
        return _value(ast.parse(text.strip(), mode="eval").body, text.strip())
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def _balanced(text: str) -> str:
    """Without the brackets at either end that have no partner, as in `(5 + 3 = 8)`."""
    text = text.strip()
    while text.startswith("(") and text.count("(") > text.count(")"):
        text = text[1:].lstrip()
    while text.endswith(")") and text.count(")") > text.count("("):
        text = text[:-1].rstrip()
    return text


def _value(node: ast.AST, source: str) -> Fraction:
    """A syntax tree's value; ValueError on anything but arithmetic."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return Fraction(ast.get_source_segment(source, node) or "")  # the digits as written, not a float
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        inner = _value(node.operand, source)
        return -inner if isinstance(node.op, ast.USub) else inner
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left, source), _value(node.right, source)
        if isinstance(node.op, ast.Pow):
            if right.denominator != 1 or abs(right) > 64 or abs(left) > 10**6:
                raise ValueError("power too large")
            return left ** int(right)
        if type(node.op) in _OPERATORS:
            return _OPERATORS[type(node.op)](left, right)
    raise ValueError("not arithmetic")


def agreement(left: str, right: str) -> Agreement:
    """Whether an expression and what it is claimed to be agree (see the module's step 3)."""
    a, b = evaluate(left), evaluate(right)
    if a is None or b is None:
        return "unreadable"
    if a == b:
        return "exact"
    if is_rounded(a, b, decimals(right)):
        return "rounded"
    return "near" if abs(a - b) <= abs(a) / 100 else "wrong"


def is_rounded(exact: Fraction, shown: Fraction, places: int) -> bool:
    """Whether `shown` is `exact` rounded to a positive number of decimals (to whole numbers is a step of its own)."""
    return places > 0 and abs(exact - shown) <= Fraction(1, 2 * 10**places)


def without_annotations(text: str) -> tuple[str, list[int]]:
    """The text without its `<<…>>`, and for each of its characters (and its end) the place in the full text."""
    kept: list[str] = []
    places: list[int] = []
    at = 0
    for match in _ANNOTATION.finditer(text):
        kept.append(text[at : match.start()])
        places.extend(range(at, match.start()))
        at = match.end()
    kept.append(text[at:])
    places.extend(range(at, len(text) + 1))
    return "".join(kept), places


def find_equations(text: str) -> list[Equation]:
    """Plain equations in the text without its annotations; all characters are the full text's."""
    plain, places = without_annotations(text)
    if "=" not in plain:
        return []
    out = []
    for match in _EQUATION.finditer(plain):
        sides, at = [], match.start()
        for side in match.group().split("="):
            blank = len(side) - len(side.lstrip())
            start, stop = at + blank, at + len(side.rstrip())
            sides.append(Span(places[start], places[stop - 1] + 1))
            at += len(side) + 1
        out.append(Equation(Span(sides[0].start, sides[-1].stop), tuple(sides)))
    return out


def side_text(text: str, side: Span) -> str:
    """One side of an equation without the annotations inside it."""
    return without_annotations(text[side.start : side.stop])[0]


def holds(text: str, equation: Equation) -> bool:
    """Whether every side of an equation agrees, exactly or rounded, with its last."""
    sides = [side_text(text, side) for side in equation.sides]
    return all(agreement(side, sides[-1]) in ("exact", "rounded") for side in sides[:-1])
