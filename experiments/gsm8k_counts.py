"""Counts on real text: is a wrong step of a GSM8K solution more, or less, familiar to the corpus than a right one?

1. An index over GSM8K's train file, on which the four models of `example_model_solutions.jsonl` were tuned; a question and
   its solution are a document (`gsm8k_steps.py` says what a token is, and who says which step is wrong).
2. For each token of the steps of all their solutions (test questions, so not in the index) what is local and how it goes
   with the question's words, and with those of the chain before its local window (`memorization.familiarity`).  Words that
   stand in more than a tenth of the documents, numbers and signs are left out of both (`stop_words.txt`).
3. A row a step (means over its tokens), and a row a calculation (its result alone, the token that can be wrong).
4. Wrong against right, by measure, label and model: means, differences (on the same question, with model, frequency and
   place held fixed), and AUROCs for finding wrong steps (`gsm8k_tables.py`); the figure shows the AUROCs on one question.

There is no model here, so nothing is said of what a model preferred; and nothing of cause.

    python experiments/gsm8k_counts.py --out runs/gsm8k-counts [--data FOLDER] [--limit N] [--digits] [--plain]
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from math import log2
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
import pandas as pd
from gsm8k_steps import LABELS, calculations, off_labels, together, true_values, value_labels, word_tokenizer
from gsm8k_tables import GIVEN, MEASURES, SAME, aurocs, differences, judged, means
from tqdm import tqdm

from reasoninterp.errors import UserError
from reasoninterp.figures import FAINT, INK, MIND_COLOURS, MUTED, errors, figure, housed, label_rows, number
from reasoninterp.memorization.corpus.build import build_index
from reasoninterp.memorization.corpus.documents import encode_texts
from reasoninterp.memorization.corpus.embedded import EmbeddedIndex
from reasoninterp.memorization.corpus.tokenizer import tokenizer_identity
from reasoninterp.memorization.counts import CountBook
from reasoninterp.memorization.familiarity import Reader, associations
from reasoninterp.traces.readers import Conversion, read_gsm8k
from reasoninterp.traces.trace import Trace, encode

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "gsm8k"
TRAIN, SOLUTIONS = "train.jsonl", "example_model_solutions.jsonl"
MODELS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
COMMON = 0.1  # a word of more documents than this is a stop word


class Measured(NamedTuple):
    """What was counted.

    Attributes:
        units: rows of the units `step` and `result`.
        stop: words that were left out.
        read: what was read and refused, by model.
        corpus: `documents`, `tokens`, `vocabulary`.
    """

    units: dict[str, pd.DataFrame]
    stop: list[str]
    read: dict[str, Conversion]
    corpus: dict[str, int]


# ------------------------------------------------------------------------------------------------------------- counts


class Counting(NamedTuple):
    """What solutions are counted with.

    Attributes:
        tokenizer: of the index.
        reader: local counts.
        book: documents that hold two words.
        frequency: log₂ of each id's share of the corpus' tokens, NaN where it is in none.
        content: ids of words that are no stop words.
        n_docs: documents of the corpus.
    """

    tokenizer: Any
    reader: Reader
    book: CountBook
    frequency: np.ndarray
    content: set[int]
    n_docs: int


def measure(
    out: Path, data: Path, *, limit: int | None = None, digits: bool = False, plain: bool = False, quiet: bool = True
) -> Measured:
    """Index the train file under `out` and count for the solutions of the first `limit` questions."""
    if not data.is_dir():
        raise UserError(f"{data}: there is no such folder; give GSM8K's with --data.")
    if limit is not None and limit < 1:
        raise UserError(f"--limit {limit}: give at least one question.")
    truth = {t.id: true_values(t) for t in read_gsm8k(data / SOLUTIONS, model="ground_truth").traces[:limit]}
    read = {model: read_gsm8k(data / SOLUTIONS, model=model) for model in MODELS}
    texts = [shown(t, plain).text for t in read_gsm8k(data / TRAIN).traces]
    tokenizer = word_tokenizer(texts, digits=digits)
    documents = encode_texts(texts, tokenizer)
    names = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    holding = Counter(one for ids in documents for one in set(ids))
    words = {i for i, name in enumerate(names) if re.fullmatch(r"[^\W\d_]+", name)}
    stop = {i for i in words if holding[i] > COMMON * len(documents)}
    by_token = np.bincount([one for ids in documents for one in ids], minlength=len(names)).astype(float)
    frequency = np.log2(np.where(by_token > 0, by_token, np.nan) / by_token.sum())
    steps: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    with closing(opened(out, documents, tokenizer)) as index:
        counting = Counting(tokenizer, Reader(index), CountBook(index), frequency, words - stop, len(documents))
        traces = [(model, t) for model, found in read.items() for t in found.traces if t.id in truth]
        for model, trace in tqdm(traces, disable=quiet, unit="solution"):
            add_rows(model, trace, truth[trace.id], count_tokens(shown(trace, plain), counting), plain, steps, results)
    corpus = {"tokens": int(by_token.sum()), "documents": len(documents), "vocabulary": len(names) - 1}
    units = {"step": pd.DataFrame(steps), "result": pd.DataFrame(results)}
    return Measured(units, sorted(names[i] for i in stop), read, corpus)


def shown(trace: Trace, plain: bool) -> Trace:
    """A trace as it is counted."""
    return trace.with_steps([calculations(step, plain=plain)[0] for step in trace.steps])


def opened(out: Path, documents: Sequence[Sequence[int]], tokenizer: Any) -> EmbeddedIndex:
    """The index of the documents under `out`, built the first time."""
    identity = tokenizer_identity(tokenizer)
    folder = out / f"index-{identity}"
    if not folder.is_dir():
        build_index(documents, folder, vocab_size=len(tokenizer), tokenizer=identity).close()
    return EmbeddedIndex(folder, tokenizer=identity)


def count_tokens(trace: Trace, counting: Counting) -> pd.DataFrame:
    """The measures of each token of the steps, with its step, its characters there, and whether it has a digit."""
    encoded = encode(trace, counting.tokenizer)
    chars = counting.tokenizer(trace.text, return_offsets_mapping=True)["offset_mapping"]
    ids, local = encoded.ids, counting.reader.local(encoded.ids)
    rows, chains = [], []
    for step, span in zip(trace.step_list(), encoded.steps, strict=True):
        for t in range(*span):
            one, (first, last) = local[t], chars[t]
            row = {"step": step.index, "first": first - step.chars.start, "last": last - step.chars.start}
            row |= {"digit": any(c.isdigit() for c in trace.text[first:last]), "id": ids[t]}
            row |= {"suffix": one.length, "count": log2(one.count) if one.count else None, "share": one.share}
            row |= {"rank": None if one.rank is None else log2(1 + one.rank), "probability": one.probability}
            row |= {"expected": one.expected, "frequency": counting.frequency[ids[t]], "unseen": bool(one.reason)}
            rows.append(row)
            before = ids[encoded.chain.start : max(encoded.chain.start, t - (one.length or 0))]
            chains.append([other for other in before if other in counting.content])
    question = [ids[t] for t in range(*encoded.question) if ids[t] in counting.content]
    table, written = pd.DataFrame(rows), [row["id"] for row in rows]
    for name, sets in (("question", [question] * len(rows)), ("chain", chains)):
        table[name] = [one.bits for one in associations(counting.book, written, sets, counting.n_docs)]
    return table


def add_rows(
    model: str,
    trace: Trace,
    true: set[Any],
    tokens: pd.DataFrame,
    plain: bool,
    steps: list[dict[str, Any]],
    results: list[dict[str, Any]],
) -> None:
    """Add the steps of a solution, and their calculations, to the rows."""
    correct = bool(trace.meta["is_correct"])
    found = [calculations(step, plain=plain)[1] for step in trace.steps]
    by_value, off = value_labels(found, true, correct), off_labels(found, true)
    values, digit = tokens[list(MEASURES)].to_numpy(float), tokens["digit"].to_numpy(bool)
    first, last = tokens["first"].to_numpy(), tokens["last"].to_numpy()

    def row(which: np.ndarray, said: Sequence[bool | None]) -> dict[str, Any]:
        chosen = values[which]
        n = (~np.isnan(chosen)).sum(0)
        mean = np.nansum(chosen, 0) / np.where(n, n, np.nan)
        labels = {name: np.nan if one is None else float(one) for name, one in zip(LABELS, said, strict=True)}
        return {"question_id": trace.id, "model": model, "place": k, "correct": correct, "n_tokens": len(chosen)} | (
            labels | dict(zip(MEASURES, mean.tolist(), strict=True))
        )

    for k, some in enumerate(found):
        here = (tokens["step"] == k).to_numpy()
        detour = off[k] if correct else [None] * len(some)
        said = (together(one.wrong for one in some), together(by_value[k]), not correct, together(detour))
        steps.append(row(here, said) | {"text": trace.steps[k]})
        for one, *labels in zip(some, by_value[k], detour, strict=True):
            if one.result is not None:
                inside = here & digit & (first < one.result.stop) & (last > one.result.start)
                results.append(row(inside, (one.wrong, labels[0], not correct, labels[1])) | {"text": trace.steps[k]})


# ------------------------------------------------------------------------------------------------- figure and summary

UNITS = {"step": "Mean over a step's tokens", "result": "Result of a calculation"}
LESS = ("rank", "unseen")  # where more means less familiar
LOOKS = {
    "value": ("first step off the ground truth", MIND_COLOURS["tuned"], "o"),
    "solution": ("steps of wrong solutions", MIND_COLOURS["base"], "s"),
    "arithmetic": ("wrong arithmetic", MUTED, "D"),
    "detour": ("control: off in right solutions", FAINT, "v"),
}


@housed
def draw(table: pd.DataFrame) -> Figure:
    """AUROC on one question of every measure, by label: steps on the left, results on the right; measures of what is
    unfamiliar are turned round."""
    fig = figure(9.2, 5.8)
    axes = fig.subplots(1, 2, sharex=True, sharey=True)
    names = list(MEASURES)
    table = table[table["pairs"] == SAME]
    n = table.groupby(["label", "unit"])["n_wrong"].max()
    for ax, (unit, title) in zip(axes, UNITS.items(), strict=True):
        ax.axvline(0.5, color=INK, lw=0.9)
        for k, (label, (text, colour, marker)) in enumerate(LOOKS.items()):
            rows = table[(table["unit"] == unit) & (table["label"] == label)].set_index("measure").loc[names]
            x = rows[["value", "ci_low", "ci_high"]].copy()
            x[rows.index.isin(LESS)] = 1 - x.loc[rows.index.isin(LESS), ["value", "ci_high", "ci_low"]].to_numpy()
            at = np.arange(len(names)) + (k - 1.5) * 0.19
            text = f"{text} (n = {n[label, 'step']:,} steps, {n[label, 'result']:,} results)"
            ax.errorbar(x["value"], at, xerr=errors(x), fmt=marker, color=colour, ms=4, elinewidth=1.3, label=text)
        label_rows(ax, [f"− {MEASURES[name]}" if name in LESS else MEASURES[name] for name in names])
        ax.grid(True, axis="x")
        ax.set_title(title)
        ax.set_xlabel("← wrong ones less familiar    AUROC    more familiar →")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return fig


def summary(measured: Measured, change: pd.DataFrame, table: pd.DataFrame) -> list[str]:
    """What was read, how many steps are wrong by each label, and where they differ."""
    corpus, read = measured.corpus, measured.read
    refused = sum((found.refused for found in read.values()), Counter())
    n_read, n_rows = (sum(f(c) for c in read.values()) for f in (lambda c: len(c.traces), lambda c: c.rows))
    why = "; ".join(f"{reason}: {n}" for reason, n in refused.items())
    steps, results = measured.units["step"], measured.units["result"]
    lines = [
        f"corpus: {corpus['documents']:,} documents, {corpus['tokens']:,} tokens, {corpus['vocabulary']:,} different ones; "
        f"{len(measured.stop)} stop words",
        f"solutions: {n_rows:,} = {n_read:,} read + {refused.total()} refused ({why or 'none'}); counted: {len(steps):,} "
        f"steps, {steps['n_tokens'].sum():,} tokens, {len(results):,} results",
        "wrong − right on one question, with model, frequency and place held fixed [95 % over questions], and AUROC there: "
        "suffix in tokens, ∞-gram probability, PMI with the question in bits",
    ]
    for unit, label, rows in judged(measured.units):
        parts = []
        for name in ("suffix", "probability", "question"):
            keys = {"unit": unit, "label": label, "measure": name}
            given, one = only(change, **keys, fixed=GIVEN), only(table, **keys, pairs=SAME)
            value, low, high, area = (number(x, 2) for x in (*given[["value", "ci_low", "ci_high"]], one["value"]))
            parts.append(f"{name} {value} [{low}, {high}] {area}")
        n = f"{(rows['wrong'] == 1).sum():,} of {len(rows):,}"
        lines.append(f"{unit}s, {LOOKS[label][0]} ({n}): {'; '.join(parts)}")
    return lines


def only(table: pd.DataFrame, **keys: str) -> pd.Series:
    """The one row with these entries."""
    return table[np.logical_and.reduce([table[column] == entry for column, entry in keys.items()])].iloc[0]


def main() -> int:
    """Count, write the tables and the figure, print the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/gsm8k-counts"))
    parser.add_argument("--data", type=Path, default=DATA, help="folder with GSM8K's train file and model solutions")
    parser.add_argument("--limit", type=int, help="only the first questions")
    parser.add_argument("--digits", action="store_true", help="each digit is a token, not each number")
    parser.add_argument("--plain", action="store_true", help="leave out the calculator's annotations")
    parser.add_argument("--quiet", action="store_true")
    given = parser.parse_args()
    try:
        measured = measure(
            given.out, given.data, limit=given.limit, digits=given.digits, plain=given.plain, quiet=given.quiet
        )
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    change, table = differences(measured.units), aurocs(measured.units)
    (given.out / "figures").mkdir(parents=True, exist_ok=True)
    tables = {"means": means(measured.units), "differences": change, "aurocs": table}
    for name, rows in (tables | {f"{unit}s": rows for unit, rows in measured.units.items()}).items():
        rows.to_csv(given.out / f"{name}.csv", index=False)
    (given.out / "stop_words.txt").write_text("\n".join(measured.stop) + "\n", encoding="utf-8")
    draw(table).savefig(given.out / "figures" / "gsm8k_counts.png", dpi=144)
    print("\n".join(summary(measured, change, table)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
