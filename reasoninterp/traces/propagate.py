"""Corrupt one result of a chain of calculations and carry it through to the answer.

A chain is read as a graph (`read_chain`):

1. Every `<<a=b>>`, and every plain equation that holds and whose result no annotation computes, is a *node*.
2. Every number in the steps is an *occurrence*: an operand of a node, a node's result, the copy behind `>>`, or plain.
3. An operand's or plain number's *sources* are the earlier nodes with that result (for a plain number also nodes of
   its own step: "she needs 77, because 110 x .7 = 77").  It may instead be *given*: the question states or implies its
   value (`quantities.given_values`), its step's words imply it, or the chain has used it before any node produced it.
   It is *unknown* if it has neither.

`Chain.corrupt(node, value)` then

4. writes the new value for the node's result, evaluates every later node one of whose operands has changed, and writes
   the new values wherever an occurrence's source has changed, in the style of the old number;
5. takes the answer from the last node whose result is the answer;
6. reads the new chain again from its text alone and checks that every annotation and equation that held before holds
   still, the corrupted node excepted (it is the planted mistake).

The rule for doubt is to refuse: `CannotPropagate` names the reason (the constants below).  In particular a number
whose source has changed is *ambiguous* if it may also be given, or also come from a node whose value is now another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from reasoninterp.traces.answers import as_number
from reasoninterp.traces.calculator import (
    agreement,
    evaluate,
    find_annotations,
    find_equations,
    holds,
    is_rounded,
    number,
    side_text,
    without_annotations,
)
from reasoninterp.traces.quantities import (
    Occurrence,
    decimals,
    given_values,
    implied_values,
    occurrences,
    word_values,
    write_like,
)
from reasoninterp.traces.trace import Span

NO_CALCULATION = "no calculation"
ANSWER_NOT_A_RESULT = "the answer is no step's result"
DOES_NOT_REACH = "the result does not reach the answer"
AMBIGUOUS = "ambiguous operand"
UNKNOWN = "number of unknown origin"
DOES_NOT_HOLD = "a later calculation does not hold"
NOT_WRITABLE = "a new result needs more decimals than the old"
NOT_POSITIVE = "a new result is not positive"
WORD = "a changed number is also written as a word"
GLUED = "a changed number is part of a word or a percentage"
UNCHANGED = "the answer comes out the same"
INCONSISTENT = "arithmetic outside the calculations"
NOT_A_CALCULATION = "the result restates a number"


class CannotPropagate(Exception):
    """A change that cannot be carried through; the message is one of this module's reasons."""


@dataclass(frozen=True)
class Node:
    """A calculation: its step, the characters of its expression, and every place where its result is written.

    `place` orders nodes: step, then character.  `results` are the right side and the copy behind `>>`.
    """

    step: int
    left: Span
    left_text: str
    value: Fraction
    results: tuple[Span, ...]
    place: tuple[int, int]
    annotated: bool

    @property
    def computes(self) -> bool:
        """Whether the expression is more than one number."""
        return number(self.left_text) is None


@dataclass(frozen=True)
class Use:
    """A number in a step that is no node's result, with where its value may come from.

    Attributes:
        step, occurrence: where it stands.
        operand_of: the node in whose expression it stands; None for a plain number.
        sources: nodes that produce its value.
        given: the value may come from the question, or was used before any node produced it.
    """

    step: int
    occurrence: Occurrence
    operand_of: int | None
    sources: tuple[int, ...]
    given: bool


@dataclass(frozen=True)
class Corruption:
    """A chain after a change was carried through.

    Attributes:
        steps, answer: the new chain and its answer.
        changed: places of the steps whose text differs.
        nodes: the nodes whose value differs, the corrupted one first.
        value: the corrupted node's new value.
    """

    steps: tuple[str, ...]
    answer: str
    changed: tuple[int, ...]
    nodes: tuple[int, ...]
    value: Fraction


@dataclass(frozen=True)
class Chain:
    """A chain of calculations as a graph (see the module); make it with `read_chain`."""

    steps: tuple[str, ...]
    answer: str
    nodes: tuple[Node, ...]
    uses: tuple[Use, ...]
    answer_node: int | None

    def reaches(self, source: int) -> bool:
        """Whether the answer's node depends on `source` at all."""
        if self.answer_node is None:
            return False
        hit = {source}
        for n in range(source + 1, len(self.nodes)):
            if any(u.operand_of == n and hit & set(u.sources) for u in self.uses):
                hit.add(n)
        return self.answer_node in hit

    def corrupt(self, source: int, value: Fraction) -> Corruption:
        """Give node `source` the result `value` and carry it through.

        Raises:
            CannotPropagate: with the reason.
        """
        node = self.nodes[source]
        if not node.computes:
            raise CannotPropagate(NOT_A_CALCULATION)
        if self.answer_node is None:
            raise CannotPropagate(ANSWER_NOT_A_RESULT)
        if not self.reaches(source):
            raise CannotPropagate(DOES_NOT_REACH)
        values = self._new_values(source, value)
        changed = [n for n in range(len(self.nodes)) if values[n] != self.nodes[n].value]
        if self.answer_node not in changed:
            raise CannotPropagate(UNCHANGED)
        self._refuse_hidden(changed)
        edits: list[list[tuple[Span, str]]] = [[] for _ in self.steps]
        for n in changed:
            for span in self.nodes[n].results:
                edits[self.nodes[n].step].append((span, _write(self._text(self.nodes[n].step, span), values[n])))
        for use in self.uses:
            new = self._new_use(use, values, node.step)
            if new is not None:
                edits[use.step].append((use.occurrence.chars, _write(use.occurrence.text, new)))
        steps = tuple(_apply(step, edit) for step, edit in zip(self.steps, edits, strict=True))
        answer = _write_answer(self.answer, values[self.answer_node])
        moved = tuple(i for i, (a, b) in enumerate(zip(self.steps, steps, strict=True)) if a != b)
        _verify(self.steps, steps, (node.step, node.results[0].start), edits)
        return Corruption(steps, answer, moved, (source, *(n for n in changed if n != source)), value)

    def _text(self, step: int, span: Span) -> str:
        return self.steps[step][span.start : span.stop]

    def _new_values(self, source: int, value: Fraction) -> list[Fraction]:
        """Every node's value after the change, evaluated in order."""
        values = [n.value for n in self.nodes]
        values[source] = value
        for n in range(source + 1, len(self.nodes)):
            node = self.nodes[n]
            edits = []
            for use in (u for u in self.uses if u.operand_of == n):
                new = self._new_use(use, values, self.nodes[source].step)
                if new is not None:
                    at = use.occurrence.chars
                    edits.append((at.shift(-node.left.start), _write(use.occurrence.text, new)))
            if not edits:
                continue
            shown = self._text(node.step, node.results[0])
            before, after = evaluate(node.left_text), evaluate(_apply(node.left_text, edits))
            if before is None or after is None or not _is(before, node.value, shown):
                raise CannotPropagate(DOES_NOT_HOLD)
            if after <= 0 < node.value:
                raise CannotPropagate(NOT_POSITIVE)
            if before != node.value:  # the old result was rounded, so the new one is
                after = round(after, decimals(shown))
            _write(shown, after)
            values[n] = after
        return values

    def _new_use(self, use: Use, values: Sequence[Fraction], first_step: int) -> Fraction | None:
        """The new value of a number that is no result; None if it stays.

        Raises:
            CannotPropagate: it may or may not be a number that has changed.
        """
        if use.step < first_step:
            return None
        if not use.sources and not use.given:
            raise CannotPropagate(UNKNOWN)
        new = {values[s] for s in use.sources}
        if new <= {use.occurrence.value}:
            return None
        if use.given or len(new) > 1:
            raise CannotPropagate(AMBIGUOUS)
        return new.pop()

    def _refuse_hidden(self, changed: Sequence[int]) -> None:
        """Refuse where a value that changes also stands in a form in which it would not be replaced."""
        first = min(self.nodes[n].step for n in changed)
        old = {self.nodes[n].value for n in changed}
        for step in self.steps[first:]:
            if word_values(step) & old:
                raise CannotPropagate(WORD)
            for o in occurrences(step):
                percent = step[o.chars.stop :].lstrip()[:1] == "%" or step[o.chars.stop :].startswith(" percent")
                if (o.glued and o.value in old) or (percent and {o.value, o.value / 100} & old):
                    raise CannotPropagate(GLUED)


def read_chain(question: str, steps: Sequence[str], answer: str) -> Chain:
    """The graph of a chain (see the module's steps 1 to 3)."""
    nodes = _nodes(steps)
    inside: dict[tuple[int, int], int] = {}
    result_places: set[tuple[int, int]] = set()
    for n, node in enumerate(nodes):
        result_places |= {(node.step, span.start) for span in node.results}
        for at in range(*node.left):
            inside[node.step, at] = n
    given = given_values(question)
    seen: set[Fraction] = set()
    uses = []
    for i, step in enumerate(steps):
        here = given | implied_values(step)
        for o in occurrences(step):
            if (i, o.chars.start) in result_places:
                continue
            operand_of = inside.get((i, o.chars.start))
            limit = nodes[operand_of].place if operand_of is not None else (i + 1, -1)
            sources = tuple(n for n, node in enumerate(nodes) if node.place < limit and node.value == o.value)
            uses.append(Use(i, o, operand_of, sources, o.value in here or o.value in seen))
            if not sources:
                seen.add(o.value)
    wanted = as_number(answer)
    final = [n for n, node in enumerate(nodes) if node.value == wanted]
    return Chain(tuple(steps), answer, tuple(nodes), tuple(uses), final[-1] if final else None)


def _nodes(steps: Sequence[str]) -> list[Node]:
    """Annotations, and the plain equations that hold and compute what no annotation does, in order."""
    out = []
    for i, step in enumerate(steps):
        written: set[int] = set()
        marked = find_annotations(step)
        for a in marked:
            value = number(a.right_text)
            blank = len(a.right_text) - len(a.right_text.lstrip(" $-"))
            if value is None or evaluate(a.left_text) is None:
                continue
            right = Span(a.right.start + blank, a.right.start + len(a.right_text.rstrip()))
            results = (right, a.copy) if a.copy else (right,)
            written |= {r.start for r in results}
            out.append(Node(i, a.left, a.left_text, value, results, (i, right.start), True))
        for e in find_equations(step):
            last = step[e.sides[-1].start : e.sides[-1].stop]
            found = occurrences(last)
            value = number(last)
            if value is None or len(found) != 1 or not holds(step, e):
                continue
            result = found[0].chars.shift(e.sides[-1].start)
            if result.start in written or any(a.chars.start < result.start < a.chars.stop for a in marked):
                continue
            left = e.sides[-2]
            out.append(Node(i, left, side_text(step, left), value, (result,), (i, result.start), False))
    return sorted(out, key=lambda node: node.place)


def _is(exact: Fraction, shown: Fraction, text: str) -> bool:
    """Whether a result is what its expression gives, as far as its decimals show."""
    return exact == shown or is_rounded(exact, shown, decimals(text))


def _write(old: str, value: Fraction) -> str:
    new = write_like(old, value)
    if new is None:
        raise CannotPropagate(NOT_WRITABLE if value >= 0 else NOT_POSITIVE)
    return new


def _write_answer(old: str, value: Fraction) -> str:
    """The answer with its number replaced; what stands around the number (`$`, a unit) stays."""
    found = occurrences(old)
    if len(found) != 1:
        raise CannotPropagate(ANSWER_NOT_A_RESULT)
    at = found[0].chars
    return old[: at.start] + _write(found[0].text, value) + old[at.stop :]


def _apply(text: str, edits: Sequence[tuple[Span, str]]) -> str:
    """The text with each span replaced."""
    for span, new in sorted(edits, reverse=True):
        text = text[: span.start] + new + text[span.stop :]
    return text


def _claims(step: str) -> list[tuple[int, bool]]:
    """(place of the result, whether it holds) of every annotation and equation of a step, in the step's own text."""
    good = ("exact", "rounded")
    out = [(a.right.start, agreement(a.left_text, a.right_text) in good) for a in find_annotations(step)]
    for e in find_equations(step):
        last = step[e.sides[-1].start : e.sides[-1].stop]
        inner = find_annotations(last)
        at = inner[0].right.start if inner else 0
        out.append((e.sides[-1].start + at, holds(step, e)))
    return out


def _verify(
    old: Sequence[str], new: Sequence[str], planted: tuple[int, int], edits: Sequence[Sequence[tuple[Span, str]]]
) -> None:
    """Step 6 of the module: what held before holds still, the planted mistake excepted."""
    for i, (a, b) in enumerate(zip(old, new, strict=True)):
        if a == b:
            continue
        before, after = _claims(a), _claims(b)
        if len(before) != len(after):
            raise CannotPropagate(INCONSISTENT)
        allowed = {planted[1]} if i == planted[0] else set()
        if allowed:  # the copy behind the annotation may close a plain equation of its own
            allowed |= _companions(a, planted[1])
        for (place, held), (_, now) in zip(before, after, strict=True):
            if held and not now and place not in allowed:
                raise CannotPropagate(INCONSISTENT)


def _companions(step: str, result: int) -> set[int]:
    """Places of the claims that end in the same result as the annotation or equation whose result stands there."""
    for a in find_annotations(step):
        if a.right.start <= result < a.chars.stop:
            ends = {a.right.start, a.copy.start if a.copy else -1}
            claims = {place for place, _ in _claims(step)}
            return {p for p in claims if p in ends or _first_digit_outside(step, p) in ends}
    return {e.sides[-1].start for e in find_equations(step) if e.sides[-1].start <= result < e.sides[-1].stop}


def _first_digit_outside(step: str, place: int) -> int:
    """The first digit at or after `place` outside annotations."""
    plain, places = without_annotations(step)
    return next((places[k] for k in range(len(plain)) if places[k] >= place and plain[k].isdigit()), -1)


def propagate(
    steps: Sequence[str], answer: str, at_step: int, new_value: Fraction | int, question: str = ""
) -> Corruption:
    """Corrupt the first result of step `at_step` and carry it through to the answer.

    Raises:
        CannotPropagate: with the reason.
    """
    chain = read_chain(question, steps, answer)
    here = [n for n, node in enumerate(chain.nodes) if node.step == at_step]
    if not here:
        raise CannotPropagate(NO_CALCULATION)
    return chain.corrupt(here[0], Fraction(new_value))
