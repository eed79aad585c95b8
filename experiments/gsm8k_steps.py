"""GSM8K's model solutions as steps to be counted: a word-level tokenizer, and who says which step is wrong.

*Text.*  A document, and a solution, is question, steps and answer in the kit's GSM8K format.  The calculator's annotations
`<<48/2=24>>` stay, since that is the text on which the four models were tuned and which they wrote (`plain` leaves them
out of corpus and solutions alike).  Words are folded to small letters; a word, a number and a sign are a token each, and so
are `<<`, `>>`, `####` and the end of a line.  Numbers are compared by value: `1,000.00` is `1000`, `.5` is `0.5` and `2.50`
is `2.5`, since the calculator writes `20.0` where people write 20; decimals after the sixth are cut off.  With
`digits` each digit is a token instead.

*Labels* of a step, and of each calculation in it; None is unjudged:

1. `arithmetic`: a calculation is wrong where its result is neither what stands before `=`, nor that rounded, nor that up to
   one part in a million (the calculator's floating point); unreadable ones are unjudged.
2. `value`: a result is *off* where it is no value of the ground-truth solution.  Wrong is the first step of a wrong solution
   with a result that is off.  Right are the steps before it and those of right solutions (off or not: there is more than one
   way); what comes later, and steps without a calculation, are unjudged.
3. `solution`: every step of a wrong solution counts as wrong.
4. `detour`, a control for label 2: in right solutions alone, results that are off count as "wrong".  They are right, so
   what differs in them is what looking for other values than the ground truth's picks by itself.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

from reasoninterp.errors import UserError
from reasoninterp.traces.calculator import find_annotations, number, without_annotations
from reasoninterp.traces.judging import is_wrong
from reasoninterp.traces.quantities import stated_values
from reasoninterp.traces.trace import Span, Trace

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

LABELS = ("arithmetic", "value", "solution", "detour")
UNKNOWN = "[UNK]"
SAME_VALUE = Fraction(1, 100)  # a value of the ground truth may have been rounded to cents


def word_tokenizer(texts: Iterable[str], *, digits: bool = False) -> PreTrainedTokenizerFast:
    """A fast tokenizer of all words, numbers and signs of the texts, most frequent first; others are `[UNK]`."""
    from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    by_value = [(r"(?<=\d),(?=\d{3}(?!\d))", ""), (r"(?<!\d)\.(?=\d)", "0."), (r"(?<=\.\d{6})\d+", "")]
    by_value += [(rf"(?<=\.\d{{{k}}})0+(?!\d)", "") for k in range(1, 6)] + [(r"(?<=\d)\.0(?!\d)", "")]
    folded = [normalizers.Replace("’", "'"), normalizers.Lowercase()]
    normal = normalizers.Sequence([*folded, *[normalizers.Replace(Regex(old), new) for old, new in by_value]])
    numbers = r"\d" if digits else r"\d+(?:\.\d+)?"
    blanks = pre_tokenizers.Split(Regex(r"[^\S\n]+"), "removed")
    pieces = pre_tokenizers.Split(Regex(rf"####|<<|>>|\n+|[^\W\d_]+|{numbers}|\S"), "isolated")
    split = pre_tokenizers.Sequence([blanks, pieces])
    found = Counter(piece for text in texts for piece, _ in split.pre_tokenize_str(normal.normalize_str(text)))
    if not found:
        raise UserError("texts: there is no word in them; give at least one.")
    names = [UNKNOWN, *sorted(found, key=lambda piece: (-found[piece], piece))]
    raw = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token=UNKNOWN))
    raw.normalizer, raw.pre_tokenizer = normal, split
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token=UNKNOWN, clean_up_tokenization_spaces=False)


# ------------------------------------------------------------------------------------------------------- calculations


@dataclass(frozen=True)
class Calculation:
    """`<<a=b>>` in a step.

    Attributes:
        result: characters of the result in the step's text: of b, or without annotations of the number behind it (None
            where another number stands there).
        value: b; None where it cannot be read.
        wrong: whether b is not a; None where they cannot be read.
    """

    result: Span | None
    value: Fraction | None
    wrong: bool | None


def calculations(step: str, *, plain: bool = False) -> tuple[str, list[Calculation]]:
    """A step's text, without its annotations if it is to be `plain`, and the calculations that it annotates."""
    text, places = without_annotations(step)
    out = []
    for one in find_annotations(step):
        result: Span | None = one.right if len(one.right) else None
        if plain:
            result = one.copy and Span(*(bisect_left(places, at) for at in one.copy))
        out.append(Calculation(result, number(one.right_text), is_wrong(one.left_text, one.right_text)))
    return (text if plain else step), out


def true_values(solution: Trace) -> set[Fraction]:
    """The values that a ground-truth solution states, its answer among them."""
    found = set().union(*(stated_values(step) for step in solution.steps))
    answer = number(solution.answer)
    return found | ({answer} if answer is not None else set())


def is_off(value: Fraction, true: Collection[Fraction]) -> bool:
    """Whether a result is no value of the ground truth, up to a cent."""
    return all(abs(value - other) > SAME_VALUE for other in true)


def value_labels(
    steps: Sequence[Sequence[Calculation]], true: Collection[Fraction], correct: bool
) -> list[list[bool | None]]:
    """Label 2 of each calculation of each step; in the step that is wrong, results that are not off are unjudged."""
    if correct:
        return [[None if off is None else False for off in step] for step in off_labels(steps, true)]
    out: list[list[bool | None]] = []
    found = False
    for step in off_labels(steps, true):
        here = any(step)
        out.append([None if found or (here and not off) else off for off in step])
        found = found or here
    return out


def off_labels(steps: Sequence[Sequence[Calculation]], true: Collection[Fraction]) -> list[list[bool | None]]:
    """Whether each calculation's result is off."""
    return [[None if one.value is None else is_off(one.value, true) for one in step] for step in steps]


def together(labels: Iterable[bool | None]) -> bool | None:
    """A step's label from those of its calculations: wrong where any is, right where any is right and none is wrong."""
    judged = [one for one in labels if one is not None]
    return any(judged) if judged else None
