"""Readers: data sets and samplers' output as traces, with a count of everything that could not be one.

`convert(kind, path)` for `gsm8k`, `aqua`, `svamp`, `prontoqa`, `vllm`; each gives a `Conversion`: the traces, and for
each reason how many rows were refused and the first few of them.  A file that is not of the kind at all is a
`UserError`.

What becomes what:

`gsm8k`      one step a line of the solution, the answer behind `####`.  Also the Socratic file (same keys) and
             `example_model_solutions.jsonl`: there `model` chooses whose solution, and `meta` says whether it is right.
`aqua`       one step a line of the rationale; a last line that only names the letter is the answer's place and is left
             out (counted in `notes`).  The options are part of the question, and by themselves in `meta`.
`svamp`      has no rationale: one step made of the equation, `meta["steps_from"] = "equation"`.
`prontoqa`   the proof's sentences; the question is the facts and the query.
`vllm`       a sampler's JSON Lines (see `samples.py`).
"""

from __future__ import annotations

import json
import os
import random
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from reasoninterp.errors import UserError
from reasoninterp.traces.calculator import evaluate
from reasoninterp.traces.formats import PRESETS
from reasoninterp.traces.io import iter_json_lines, read_text
from reasoninterp.traces.segment import join_pieces, segment
from reasoninterp.traces.trace import Trace

SHOWN = 5
"""How many refused rows of each reason are named."""

_OPTION = re.compile(r"^\s*([A-J])\s*[).:]\s*(.*)$", re.DOTALL)
_ONLY_LETTER = re.compile(
    r"^\W*(?:(?:so|hence|therefore|thus)?\W*(?:the\s+)?(?:correct\s+|right\s+|final\s+)?"
    r"(?:answer|option|choice|ans)s?(?:\s+(?:is|option|choice|will\s+be))*\W*)?\(?([A-J])\)?\W*$",
    re.IGNORECASE,
)
_CUED = re.compile(
    r"(?P<cue>\b(?:answer|option|choice|ans)s?\b(?:\s+(?:is|option|choice|will\s+be))*\s*[:=\-\u2013.]*\s*[(\[]?)"
    r"(?P<letter>[A-J])(?![\w'\u2019])",
    re.IGNORECASE,
)
_PINNED = re.compile(r"\b(?:none|all|both|neither)\b.*\b(?:these|above|those)\b", re.IGNORECASE)


@dataclass
class Conversion:
    """Traces out of a file, and what did not become one.

    Attributes:
        traces: in file order.
        rows: how many rows were read.
        refused: reason → number of rows.
        examples: reason → the first few rows refused for it, by name.
        notes: what was changed on the way, counted.
    """

    traces: list[Trace] = field(default_factory=list)
    rows: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    notes: Counter[str] = field(default_factory=Counter)

    def refuse(self, row: str, reason: str) -> None:
        """Count a row that is no trace."""
        self.refused[reason] += 1
        if self.refused[reason] <= SHOWN:
            self.examples.setdefault(reason, []).append(row)

    def summary(self) -> str:
        """A few lines for the terminal: rows, traces, steps, refusals by reason, notes."""
        steps = sum(len(t.steps) for t in self.traces)
        lines = [f"{self.rows} rows: {len(self.traces)} traces with {steps} steps, {self.refused.total()} refused"]
        for reason, n in self.refused.most_common():
            lines.append(f"  refused, {reason}: {n} (such as {', '.join(self.examples[reason])})")
        lines += [f"  note, {note}: {n}" for note, n in self.notes.most_common()]
        return "\n".join(lines)


def convert(kind: str, path: str | os.PathLike[str], **options: Any) -> Conversion:
    """Read `path` as `kind` (see the module), with the reader's own options.

    Raises:
        UserError: an unknown kind, or a file that is missing, empty, or not of that kind.
    """
    if kind not in READERS:
        raise UserError(f"unknown source {kind!r}; choose one of {', '.join(READERS)}.")
    return READERS[kind](path, **options)


def _rows(path: str | os.PathLike[str], keys: Sequence[str], kind: str) -> list[tuple[str, dict[str, Any]]]:
    """(name, row) of a JSON Lines file whose first row must have `keys`."""
    rows = []
    for number, value in iter_json_lines(path):
        missing = [k for k in keys if not isinstance(value, dict) or k not in value]
        if missing:
            raise UserError(f"{path}, line {number}: not a {kind} row; the key {missing[0]!r} is missing.")
        rows.append((f"line {number}", value))
    return rows


def read_gsm8k(path: str | os.PathLike[str], *, model: str | None = None, segmenter: str = "lines") -> Conversion:
    """GSM8K's train, test or Socratic file, or with `model` a model's solutions from `example_model_solutions.jsonl`.

    Raises:
        UserError: bad file, or no such model in it.
    """
    stem = Path(path).stem
    out = Conversion()
    for k, (name, row) in enumerate(_rows(path, ["question"], "GSM8K")):
        out.rows += 1
        meta: dict[str, Any] = {}
        if "answer" in row and model is None:
            text, marker = row["answer"], "#### "
        elif "ground_truth" in row:
            models = [key for key, value in row.items() if isinstance(value, dict) and "solution" in value]
            chosen = model or "ground_truth"
            if chosen not in [*models, "ground_truth"]:
                known = ", ".join([*models, "ground_truth"])
                raise UserError(f"{path}, {name}: no solution of model {model!r}; choose one of {known}.")
            solution = row[chosen]
            text, marker = (solution if chosen == "ground_truth" else solution["solution"]), "A: "
            gold = str(row["ground_truth"]).rpartition("A: ")[2].strip()
            meta = {"mind": chosen, "gold": gold}
            if chosen != "ground_truth":
                meta["is_correct"] = bool(solution.get("is_correct"))
        else:
            raise UserError(f"{path}, {name}: not a GSM8K row; the key 'answer' is missing.")
        if not isinstance(text, str) or not isinstance(row["question"], str):
            raise UserError(f"{path}, {name}: question and answer must be strings.")
        chain, found, answer = text.rpartition(marker)
        if not found or (chain and not chain.endswith("\n")):
            out.refuse(name, "no answer line")
        elif not answer.strip() or "\n" in answer.strip():
            out.refuse(name, "no answer behind the marker")
        elif not chain.strip():
            out.refuse(name, "no steps")
        else:
            out.traces.append(_gsm8k(f"{stem}-{k}", row["question"], chain, answer.strip(), segmenter, meta))
    return out


def _gsm8k(name: str, question: str, chain: str, answer: str, segmenter: str, meta: Mapping[str, Any]) -> Trace:
    joined = join_pieces(segment(chain.rstrip("\n"), segmenter))
    steps = joined.steps
    fmt = PRESETS["gsm8k"]
    if len(steps) > 1 and joined.between_steps != fmt.between_steps:
        fmt = replace(fmt, between_steps=joined.between_steps)
    return Trace(name, question, steps, answer, fmt, dict(meta))


def read_aqua(path: str | os.PathLike[str], *, segmenter: str = "lines") -> Conversion:
    """AQuA (plain or tokenised file): options in the question, the right letter as answer.

    Raises:
        UserError: bad file.
    """
    stem = Path(path).stem.replace(".", "-")
    out = Conversion()
    for k, (name, row) in enumerate(_rows(path, ["question", "options", "rationale", "correct"], "AQuA")):
        out.rows += 1
        options = [_OPTION.match(str(o)) for o in row["options"]]
        letters = [m.group(1) for m in options if m]
        correct = str(row["correct"]).strip()
        steps = list(join_pieces(segment(str(row["rationale"]).strip("\n"), segmenter)).steps)
        steps = [s.strip() for s in steps if s.strip()]
        if None in options or letters != [chr(65 + i) for i in range(len(letters))]:
            out.refuse(name, "options that are not lettered in order")
            continue
        if correct not in letters:
            out.refuse(name, "the right letter is none of the options'")
            continue
        last = _ONLY_LETTER.match(steps[-1]) if steps and len(steps[-1]) < 80 else None
        if last and last.group(1).upper() == correct:
            steps.pop()
            out.notes["a last line that only names the answer became the answer"] += 1
        elif last:
            out.refuse(name, "the rationale names another letter than the key")
            continue
        if not steps:
            out.refuse(name, "no steps")
            continue
        texts = [m.group(2).strip() for m in options if m]
        meta = {"stem": str(row["question"]), "options": texts}
        question = with_options(str(row["question"]), texts)
        out.traces.append(Trace(f"aqua-{stem}-{k}", question, tuple(steps), correct, PRESETS["answer"], meta))
    return out


def with_options(stem: str, options: Sequence[str]) -> str:
    """A multiple-choice question as text: the stem, then one option a line, lettered from A."""
    return "\n".join([stem.rstrip("\n"), *(f"{chr(65 + i)}) {option}" for i, option in enumerate(options))])


def shuffle_options(trace: Trace, seed: int) -> Trace:
    """The same question with its options in another seeded order; the answer's letter goes with its option.

    Where a step names an option's letter behind a word such as "answer" or "option", that letter is changed too;
    elsewhere letters (a person called A) stay.  Options such as "None of these" keep their place.  `meta["order"]` says
    which old option stands at each new place.

    Raises:
        UserError: the trace has no options in `meta` (as `read_aqua` writes them) or its answer is not one of them.
    """
    options, stem = trace.meta.get("options"), trace.meta.get("stem")
    if not isinstance(options, list) or not isinstance(stem, str):
        raise UserError(f"trace {trace.id!r}: no options to shuffle; meta needs 'stem' and 'options'.")
    place = ord(trace.answer) - 65 if len(trace.answer) == 1 else -1
    if not 0 <= place < len(options):
        raise UserError(f"trace {trace.id!r}: the answer {trace.answer!r} is no letter of its {len(options)} options.")
    free = [i for i, option in enumerate(options) if not _PINNED.search(option)]
    drawn = random.Random(f"{seed}:{trace.id}").sample(free, len(free))
    order = list(range(len(options)))
    for at, old in zip(free, drawn, strict=True):
        order[at] = old
    new = {chr(65 + old): chr(65 + at) for at, old in enumerate(order)}

    def relabel(match: re.Match[str]) -> str:
        letter = match.group("letter")
        return match.group("cue") + (new.get(letter, letter))

    shuffled = [options[old] for old in order]
    return replace(
        trace,
        question=with_options(stem, shuffled),
        steps=tuple(_CUED.sub(relabel, step) for step in trace.steps),
        answer=new[trace.answer],
        meta={**trace.meta, "options": shuffled, "order": order},
    )


def read_svamp(path: str | os.PathLike[str]) -> Conversion:
    """SVAMP: it has equations and no rationale, so each trace has one step, the equation and its value.

    Raises:
        UserError: bad file.
    """
    rows = _json(path)
    if not isinstance(rows, list):
        raise UserError(f"{path}: expected a list of SVAMP problems.")
    out = Conversion()
    for k, row in enumerate(rows):
        out.rows += 1
        keys = ("Body", "Question", "Equation", "Answer")
        missing = [key for key in keys if not isinstance(row, dict) or key not in row]
        if missing:
            raise UserError(f"{path}, problem {k + 1}: not a SVAMP problem; the key {missing[0]!r} is missing.")
        name = str(row.get("ID", f"problem {k + 1}"))
        value = evaluate(str(row["Equation"]))
        answer = _shown(row["Answer"])
        if value is None:
            out.refuse(name, "an equation that cannot be read")
        elif answer is None or value != Fraction(answer):
            out.refuse(name, "the equation does not give the answer")
        else:
            body = str(row["Body"]).strip()
            stop = "" if body.endswith((".", "?", "!", ",")) else ","
            question = f"{body}{stop} {str(row['Question']).strip()}"
            steps = (f"{row['Equation']} = {row['Answer']}",)
            meta = {"steps_from": "equation", "type": row.get("Type")}
            out.traces.append(Trace(name, question, steps, answer, PRESETS["answer"], meta))
    return out


def _shown(value: Any) -> str | None:
    """A JSON number as it is written: whole numbers without decimals."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return str(int(value)) if float(value).is_integer() else repr(value)


def read_prontoqa(path: str | os.PathLike[str]) -> Conversion:
    """PrOntoQA's generated JSON: facts and query as question, the proof's sentences as steps, True or False.

    Raises:
        UserError: bad file.
    """
    value = _json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected an object of PrOntoQA examples.")
    out = Conversion()
    for name, example in value.items():
        out.rows += 1
        row = example.get("test_example") if isinstance(example, dict) else None
        keys = ("question", "query", "chain_of_thought", "answer")
        missing = [key for key in keys if not isinstance(row, dict) or key not in row]
        if row is None or missing:
            raise UserError(f"{path}, {name!r}: not a PrOntoQA example; the key {(missing or keys)[0]!r} is missing.")
        steps = tuple(s for s in row["chain_of_thought"] if isinstance(s, str) and s.strip())
        if not steps:
            out.refuse(name, "no steps")
        elif len(steps) != len(row["chain_of_thought"]):
            out.refuse(name, "a step that is blank or no string")
        else:
            question = f"{row['question']}\n{row['query']}"
            out.traces.append(Trace(f"prontoqa-{name}", question, steps, str(row["answer"]), PRESETS["answer"]))
    return out


def _json(path: str | os.PathLike[str]) -> Any:
    """The value of a JSON file."""
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as problem:
        raise UserError(f"{path}, line {problem.lineno}: malformed JSON ({problem.msg}).") from None


def _vllm(path: str | os.PathLike[str], **options: Any) -> Conversion:
    from reasoninterp.traces.samples import read_vllm

    return read_vllm(path, **options)


READERS: dict[str, Callable[..., Conversion]] = {
    "gsm8k": read_gsm8k,
    "aqua": read_aqua,
    "svamp": read_svamp,
    "prontoqa": read_prontoqa,
    "vllm": _vllm,
}
