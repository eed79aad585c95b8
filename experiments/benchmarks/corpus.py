"""The embedded corpus index beside the infini-gram package: seconds to build, memory, queries a second, and errors.

    python experiments/benchmarks/corpus.py [--quick] [--largest 60] [--seed 0] [--out FIGURE.png]

1. Made texts of 1, 5, 20 and 60 million tokens, and GSM8K's train file where it is there (`corpus_text.py`).  Each is
   measured in a process of its own.
2. *Build*: wall seconds, and the largest resident memory above what the process had before (for infini-gram: of its
   processes together).  Ours uses one core; infini-gram as many as there are, but no more than one for each 200 kB of
   text, below which it makes wrong indexes.
3. *Queries*, the same for both, each engine's best of three rounds by turns.  Sequences of 1, 3 and 5 tokens, three of
   four from the text, in the others the last token is another one; 20 continuations of 3 tokens (infini-gram: the faster
   of 20 counts and its distribution of the next token); the longest suffix of 32 tokens; co-occurrence as STIM asks, five
   words with twenty alternatives each, `anchors` within 1000 tokens (infini-gram: the faster of its own limit of 50,000
   occurrences and STIM's 500,000).  *Kept*: our index keeps the places of words, as it does by itself; *cold*: it keeps
   none.  infini-gram reads ahead nothing, which is best for local files.
4. *Errors*: a sample of our answers of every kind against a judge that looks at every place of the text; `mismatches`
   must be 0.  infini-gram's counts against ours, and its co-occurrences (STIM's limit) against the judge.

The ratios are queries a second, ours over infini-gram's, the smallest over the sizes (`count_ratio`: and over 1, 3, 5
tokens).  Without infini-gram its side is null.  With `--out` the figure (`corpus_figure.py`).  The last line printed is
one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
import psutil
from corpus_figure import draw
from corpus_infini import Infini, installed
from corpus_text import COUNTS, Corpus, Ids, Judge, Queries, gsm8k, made_text

from reasoninterp.memorization.corpus.build import build_index
from reasoninterp.memorization.corpus.embedded import EmbeddedIndex

MILLIONS = (1, 5, 20, 60)
WINDOW = 1000  # STIM's
ROUNDS = 3
GSM8K = Path(__file__).resolve().parents[3] / "shared" / "data" / "gsm8k"


@contextmanager
def peak_of(resident: Callable[[], int]) -> Iterator[list[int]]:
    """The largest of a number of bytes inside the block, looked at every few milliseconds."""
    found, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            found[0] = max(found[0], resident())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()


def own_bytes() -> int:
    """Resident memory of this process."""
    return int(psutil.Process().memory_info().rss)


def children_bytes() -> int:
    """Resident memory of the processes that this one started, and of theirs."""
    total = 0
    for child in psutil.Process().children(recursive=True):
        try:
            total += child.memory_info().rss
        except psutil.Error:  # it ended meanwhile
            continue
    return total


def timed(asks: dict[str, Callable[[], list[Any]]]) -> tuple[dict[str, float], dict[str, list[Any]]]:
    """Answers a second of each way to ask, the best of several rounds in which they take turns; and what each says."""
    seconds: dict[str, float] = {}
    answers: dict[str, list[Any]] = {}
    for _ in range(ROUNDS):
        for name, ask in asks.items():
            began = time.perf_counter()
            answers[name] = ask()
            took = time.perf_counter() - began
            seconds[name] = min(took, seconds.get(name, took))
    return {name: len(answers[name]) / s for name, s in seconds.items()}, answers


def ask_ours(index: EmbeddedIndex, folder: Path, queries: Queries) -> dict[str, Callable[[], list[Any]]]:
    """The tasks, asked of our index."""

    def together(keep_bytes: int, unit: Any, window: int | None) -> list[int]:
        opened = EmbeddedIndex(folder, keep_bytes=keep_bytes)
        found = [opened.cooccurrence(a, b, window=window, unit=unit).value for a, b in queries.pairs]
        opened.close()
        return found

    def counting(ngrams: Sequence[Ids]) -> Callable[[], list[Any]]:
        return lambda: [index.count(ngram).value for ngram in ngrams]

    return {
        **{name: counting(ngrams) for name, ngrams in queries.counts.items()},
        "continuations": lambda: [
            [c.value for c in index.continuation_counts(*both)]
            for both in zip(queries.contexts, queries.candidates, strict=True)
        ],
        "suffix": lambda: [index.longest_suffix(context).length for context in queries.long],
        "together, kept": lambda: together(2**27, "anchors", WINDOW),
        "together, cold": lambda: together(0, "anchors", WINDOW),
        "documents, kept": lambda: together(2**27, "documents", None),
    }


def judge(corpus: Corpus, index: EmbeddedIndex, queries: Queries, n: int) -> tuple[int, int]:
    """(mismatches, answers looked at) of our index against the judge."""
    judge = Judge(corpus)
    found: list[Any] = []
    true: list[Any] = []
    for ngrams in queries.counts.values():
        found += [index.count(ngram).value for ngram in ngrams[:n]]
        true += [judge.count(ngram) for ngram in ngrams[:n]]
    for context, candidates in list(zip(queries.contexts, queries.candidates, strict=True))[: n // 4]:
        found += [c.value for c in index.continuation_counts(context, candidates)]
        true += [judge.count([*context, candidate]) for candidate in candidates]
        found.append(index.next_token_counts(context).counts)
        true.append(judge.next_tokens(context))
    for context in queries.long[: n // 4]:
        match = index.longest_suffix(context)
        found.append((match.length, match.count.value))
        true.append(judge.longest_suffix(context))
    ways: list[tuple[Any, int | None]] = [("documents", None)]
    ways += [(unit, window) for unit in ("pairs", "anchors") for window in (10, WINDOW, None)]
    for a, b in queries.pairs[:: max(1, len(queries.pairs) // n)]:
        for unit, window in ways:
            found.append(index.cooccurrence(a, b, window=window, unit=unit).value)
            true.append(judge.together(a, b, window, unit))
    return sum(f != t for f, t in zip(found, true, strict=True)), len(true)


def errors_of(theirs: list[int], corpus: Corpus, pairs: list[tuple[Ids, Ids]], n: int) -> dict[str, float]:
    """How infini-gram's co-occurrences compare with the judge's, over pairs that do occur together."""
    judge, ratios = Judge(corpus), []
    step = max(1, len(pairs) // n)
    for (a, b), value in zip(pairs[::step], theirs[::step], strict=True):
        if true := judge.together(a, b, WINDOW, "anchors"):
            ratios.append(value / true)
    found = np.array(ratios)
    return {
        "n": len(found),
        "wrong": float((found != 1).mean()),
        "median_ratio": float(np.median(found)),
        "smallest_ratio": float(found.min()),
        "none_found": float((found == 0).mean()),
    }


def measure(size: str, seed: int, quick: bool) -> dict[str, Any]:
    """One size: both engines built and asked."""
    corpus = gsm8k(GSM8K) if size == "gsm8k" else made_text(int(size), seed)
    small = len(corpus.tokens) <= 5_000_000
    # At the large sizes a co-occurrence takes infini-gram some tenths of a second, and the judge a second.
    queries = Queries(corpus, 1000 if quick else 2000, (2 if quick else 4) if small else 1, seed + 1)
    n_judged = 100 if small else 20
    with tempfile.TemporaryDirectory(prefix="corpus-") as made:
        folder = Path(made)
        before = own_bytes()
        with peak_of(own_bytes) as peak:
            began = time.perf_counter()
            index = build_index(
                corpus.documents(), folder / "ours", vocab_size=corpus.vocab_size, tokenizer="words", seed=seed
            )
            built = time.perf_counter() - began
        began = time.perf_counter()
        index.verify()
        verified = time.perf_counter() - began
        row: dict[str, Any] = {
            "name": corpus.name,
            "n_tokens": len(corpus.tokens),
            "n_docs": corpus.n_docs,
            "build_seconds": built,
            "peak_bytes": peak[0] - before,
            "index_bytes": sum(p.stat().st_size for p in (folder / "ours").iterdir()),
            "verify_seconds": verified,
            "infini": None,
        }
        asks = ask_ours(index, folder / "ours", queries)
        infini = None
        if installed():
            with peak_of(children_bytes) as peak:
                began = time.perf_counter()
                infini = Infini.build(corpus, folder / "infini")
                theirs = {"build_seconds": time.perf_counter() - began, "peak_bytes": peak[0]}
            asks |= {f"infini {name}": ask for name, ask in infini.asks(queries, WINDOW).items()}
        row["per_second"], answers = timed(asks)
        row["mismatches"], row["n_judged"] = judge(corpus, index, queries, n_judged)
        if infini is not None:
            pairs = [(answers[name], answers[f"infini {name}"]) for name in COUNTS]
            theirs |= {
                "wrong_counts": sum(a != b for ours, other in pairs for a, b in zip(ours, other, strict=True)),
                "together": errors_of(answers["infini together, STIM"], corpus, queries.pairs, n_judged),
            }
            row["infini"] = theirs
        index.close()
    return row


def ratio(row: dict[str, Any], ours: str, theirs: Sequence[str]) -> float | None:
    """Answers a second, ours over the faster of infini-gram's."""
    found = row["per_second"]
    return None if row["infini"] is None else found[ours] / max(found[f"infini {name}"] for name in theirs)


TOGETHER = ("together, own limit", "together, STIM")
COMPARED = {
    **{name: (name,) for name in COUNTS},
    "continuations": ("continuations, counts", "continuations, next"),
    "suffix": ("suffix",),
    "together, kept": TOGETHER,
    "together, cold": TOGETHER,
}


def table(row: dict[str, Any]) -> list[str]:
    """One size as lines."""
    other = row["infini"]
    lines = [
        f"{row['name']}: {row['n_tokens']:,} tokens, {row['n_docs']:,} documents; built in {row['build_seconds']:.1f} s with "
        f"{row['peak_bytes'] / 2**20:,.0f} MiB, {row['index_bytes'] / 2**20:,.0f} MiB on disk, verified in "
        f"{row['verify_seconds']:.1f} s; {row['mismatches']} of {row['n_judged']} answers wrong"
    ]
    if other:
        e = other["together"]
        lines.append(
            f"  infini-gram: built in {other['build_seconds']:.1f} s with {other['peak_bytes'] / 2**20:,.0f} MiB; "
            f"{other['wrong_counts']} counts wrong; co-occurrences: {e['wrong']:.0%} of {e['n']} wrong, median "
            f"{e['median_ratio']:.2f} and least {e['smallest_ratio']:.2f} of the truth"
        )
    lines.append(f"  {'answers a second':<20}{'ours':>12}{'infini-gram':>14}{'ratio':>9}")
    for name, theirs in COMPARED.items():
        found = ratio(row, name, theirs)
        rest = f"{row['per_second'][name] / found:>14,.0f}{found:>9.1f}" if found is not None else ""
        lines.append(f"  {name:<20}{row['per_second'][name]:>12,.0f}{rest}")
    return [*lines, f"  {'documents, kept':<20}{row['per_second']['documents, kept']:>12,.0f}"]


def in_own_process(size: str, options: argparse.Namespace) -> dict[str, Any]:
    """Measure a size in a process of its own, whose memory is its own."""
    call = [sys.executable, __file__, "--one", size, "--seed", str(options.seed), *["--quick"] * options.quick]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"size {size}: {done.stderr.strip().splitlines()[-1:]}")
    row: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return row


def main() -> int:
    """Measure, print, and end with one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a million tokens and GSM8K, under a minute")
    parser.add_argument("--largest", type=int, default=MILLIONS[-1], help="in millions of tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="the figure to write")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one is not None:
        print(json.dumps(measure(options.one, options.seed, options.quick)))
        return 0
    sizes = [str(m * 1_000_000) for m in MILLIONS if m <= (1 if options.quick else options.largest)]
    rows = []
    for size in [*sizes, *["gsm8k"] * (GSM8K / "train.jsonl").is_file()]:
        rows.append(in_own_process(size, options))
        print("\n".join(table(rows[-1])), flush=True)

    def by_size(get: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
        return {row["name"].replace("made, ", ""): get(row) for row in rows}

    def least(name: str) -> float | None:
        found = [r for row in rows if (r := ratio(row, name, COMPARED[name])) is not None]
        return round(min(found), 2) if found else None

    counts = [r for name in COUNTS if (r := least(name)) is not None]
    result = {
        "mismatches": sum(row["mismatches"] for row in rows),
        "n_judged": sum(row["n_judged"] for row in rows),
        "count_ratio": min(counts, default=None),
        "cooccurrence_ratio": least("together, kept"),
        "cooccurrence_ratio_cold": least("together, cold"),
        "build_seconds": by_size(lambda row: round(row["build_seconds"], 2)),
        "peak_bytes": by_size(lambda row: row["peak_bytes"]),
        "index_bytes": by_size(lambda row: row["index_bytes"]),
        "per_second": by_size(lambda row: {k: round(v) for k, v in row["per_second"].items()}),
        "infini": by_size(lambda row: row["infini"]),
        "window": WINDOW,
        "n": len(rows),
        "seed": options.seed,
        "unit": "wall seconds, answers a second (best of three rounds), resident bytes above those before",
    }
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        draw(result).savefig(options.out, dpi=144)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
