"""Counts on real text: familiarity by hand and against the judge, labels of steps, contrasts with planted truth, the script."""

from __future__ import annotations

import json
import subprocess
import sys
from fractions import Fraction
from math import log2
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from reasoninterp.errors import UserError
from reasoninterp.memorization.corpus.build import build_index
from reasoninterp.memorization.corpus.embedded import EmbeddedIndex
from reasoninterp.memorization.counts import CountBook
from reasoninterp.memorization.familiarity import NEVER_TOGETHER, NO_CONTEXT, UNSEEN, Local, Reader, associations
from reasoninterp.memorization.settings import Settings
from reasoninterp.traces.trace import Span, Trace
from tests.corpus_conformance import BruteForce

EXPERIMENTS = Path(__file__).resolve().parents[1] / "experiments"
SHARED = EXPERIMENTS.parents[1] / "shared" / "data" / "gsm8k"
WORDS = ["the", "cat", "sat", "on", "mat", "dog", "ran", "far", "bird"]
SENTENCES = ("the cat sat on the mat", "the cat ran far", "the dog sat on the cat", "dog ran")


@pytest.fixture(autouse=True)
def _beside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXPERIMENTS))


def _ids(text: str) -> list[int]:
    return [WORDS.index(word) for word in text.split()]


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> EmbeddedIndex:
    out = tmp_path_factory.mktemp("corpus") / "index"
    return build_index([_ids(s) for s in SENTENCES], out, vocab_size=len(WORDS), tokenizer="words")


# ---------------------------------------------------------------------------------------------------------- familiarity


def test_local_by_hand(index: EmbeddedIndex) -> None:
    """`the cat sat far`: of 18 tokens 5 are `the`; after it cat 3, dog 1, mat 1; after `the cat` ran 1, sat 1."""
    the, cat, sat, far = Reader(index).local(_ids("the cat sat far"))
    assert the == Local(0, 5, 5 / 18, 0, 5 / 18, True)
    assert cat == Local(1, 3, 3 / 5, 0, 3 / 5, True)
    assert sat == Local(
        2, 1, 1 / 2, 0, 1 / 2, True
    )  # the second `the cat` that something follows, followed by ran: a tie
    # After `the cat sat` and after `cat sat` there is only `on`; `far` follows no end but the empty one.  Its count is 1
    # of 18; more frequent are the 5, cat 3, dog 2, sat 2, on 2 and ran 2.
    assert far == Local(0, 1, 1 / 18, 6, 0.0, False)


def test_a_share_after_the_selected_suffix_and_the_infinity_gram_differ(index: EmbeddedIndex) -> None:
    """After `dog`: sat 1, ran 1.  After `the dog`: only sat, so `ran` is cut back to `dog`, where its share is a half."""
    ran = Reader(index).local(_ids("the dog ran"))[2]
    assert ran == Local(1, 1, 1 / 2, 0, 0.0, False)


def test_words_that_are_not_in_the_corpus_and_what_stands_behind_them(index: EmbeddedIndex) -> None:
    cat, bird, sat = Reader(index).local(_ids("cat bird sat"))
    assert cat.length == 0
    assert bird == Local(None, 0, None, None, 0.0, False, UNSEEN)
    assert sat == Local(0, 2, 2 / 18, 2, 2 / 18, False)  # nothing is known of what follows a bird: its share of all


def test_a_context_that_only_ends_documents_is_shortened(index: EmbeddedIndex) -> None:
    """`on the mat` ends a document; nothing follows it, nor `mat`, so v is empty."""
    the = Reader(index).local(_ids("on the mat the"))[3]
    assert (the.probability, the.expected, the.length) == (5 / 18, True, 0)


def test_local_agrees_with_the_judge() -> None:
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 4, size=n).tolist() for n in (30, 1, 17, 9)]
    judge = BruteForce(documents, 5)
    seen = 0
    for _ in range(20):
        row = rng.choice([0, 1, 2, 3, 4], size=9, p=[0.3, 0.3, 0.2, 0.15, 0.05]).tolist()
        for t, found in enumerate(Reader(judge).local(row)):
            match = judge.longest_suffix(row[:t], last=row[t])
            if not match.count.value:
                assert found.reason == UNSEEN and row[t] == 4
                continue
            after = judge.next_token_counts(row[t - match.length : t])
            v = next(k for k in range(t + 1) if judge.next_token_counts(row[k:t]).counts)
            after_v = judge.next_token_counts(row[v:t])
            n = after_v.counts.get(row[t], 0)
            assert (found.length, found.count) == (match.length, match.count.value)
            assert found.share == found.count / after.total.value
            assert found.rank == sum(other > found.count for other in after.counts.values())
            assert (found.probability, found.expected) == (n / after_v.total.value, n == max(after_v.counts.values()))
            seen += match.length > 1
    assert seen > 30


def test_association_by_hand(index: EmbeddedIndex) -> None:
    """Documents: cat in 1, 2, 3; sat in 1, 3; mat in 1; ran in 2, 4; far in 2; dog in 3, 4; D = 4."""
    book = CountBook(index)
    sat, far, dog, bird = _ids("sat far dog bird")
    asked = [sat, far, far, dog, bird, sat, far]
    sets = [_ids("cat mat"), _ids("cat cat mat"), _ids("dog"), _ids("dog ran far"), _ids("cat"), [sat], [bird]]
    found = associations(book, asked, sets, 4)
    # sat with cat 2 and mat 1, by chance 3 * 2 / 4 + 1 * 2 / 4 = 2
    assert found[0].bits == pytest.approx(log2(3 / 2)) and found[0].n == 2
    # far with cat 1 and mat 0, by chance 3 / 4 + 1 / 4 = 1: never meeting mat takes back what cat gives
    assert found[1].bits == pytest.approx(0.0) and found[1].n == 2
    assert (found[2].bits, found[2].reason) == (None, NEVER_TOGETHER)
    # dog with ran 1 (document 4) and far 0, itself left out; by chance 2 * 2 / 4 + 1 * 2 / 4 = 1.5
    assert found[3].bits == pytest.approx(log2(1 / 1.5)) and found[3].n == 2
    assert [(one.bits, one.reason) for one in found[4:]] == [(None, UNSEEN), (None, NO_CONTEXT), (None, NO_CONTEXT)]


def test_what_association_refuses(index: EmbeddedIndex) -> None:
    with pytest.raises(UserError, match="counts pairs"):
        associations(CountBook(index, Settings(unit="pairs")), [0], [[1]], 4)
    with pytest.raises(UserError, match="2 sets for 1 tokens"):
        associations(CountBook(index), [0], [[1], [2]], 4)
    with pytest.raises(UserError):
        associations(CountBook(index), [0], [[len(WORDS)]], 4)
    with pytest.raises(UserError):
        Reader(index).local([len(WORDS)])


# ------------------------------------------------------------------------------------------------------ text and labels


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("Janet’s $1,000.00", "janet ' s $ 1000"),
        ("<<.5*20.0=10.000>>10.", "<< 0.5 * 20 = 10 >> 10 ."),
        ("2.50 + 3.105", "2.5 + 3.105"),
        ("0.30000000000000004\n#### 3", "0.3 \n #### 3"),
        ("10,20 5.05 105", "10 , 20 5.05 105"),
    ],
)
def test_numbers_are_tokens_by_value(text: str, want: str) -> None:
    from gsm8k_steps import word_tokenizer

    tokenizer = word_tokenizer([text])
    assert tokenizer.tokenize(text) == want.split(" ")
    assert word_tokenizer(["a"]).tokenize("a 7") == ["a", "[UNK]"]


def test_digits_and_an_empty_text() -> None:
    from gsm8k_steps import word_tokenizer

    assert word_tokenizer(["1,024 cats"], digits=True).tokenize("1,024 cats") == ["1", "0", "2", "4", "cats"]
    with pytest.raises(UserError, match="no word"):
        word_tokenizer([" "])


@pytest.mark.parametrize(
    ("step", "wrong"),
    [
        ("so 48/2 = <<48/2=24>>24", [False]),
        ("10 * (2/3) = <<10*(2/3)=8>>8", [True]),
        ("7/3 = <<7/3=2.33>>2.33", [False]),
        ("50 - 49.4 = <<50-49.4=0.6000000000000014>>0.6", [False]),  # the calculator's floating point
        ("15+10 = $<<15+10=25.1>>25.1", [True]),  # within a hundredth, and wrong all the same
        ("<<x+56=86>>86 and <<1+1=2>>2", [None, False]),
        ("no calculation, 1 + 1 = 3", []),
    ],
)
def test_arithmetic_of_a_step(step: str, wrong: list[bool | None]) -> None:
    from gsm8k_steps import calculations

    text, found = calculations(step)
    assert text == step and [one.wrong for one in found] == wrong


def test_where_a_result_stands() -> None:
    from gsm8k_steps import calculations

    step = "a <<1+2=3>>3, b <<2+2=4>>5 and <<3+4=7>>7"
    text, found = calculations(step)
    assert [text[slice(*one.result)] for one in found] == ["3", "4", "7"]
    text, found = calculations(step, plain=True)
    assert text == "a 3, b 5 and 7"
    assert [one.result for one in found] == [Span(2, 3), None, Span(13, 14)]


def test_labels_by_value() -> None:
    """The truth is 13, 26 (and 3 from its text); the solution goes off in its second step."""
    from gsm8k_steps import calculations, off_labels, together, true_values, value_labels

    truth = Trace("q", "?", ("16 - 3 = <<16-3=13>>13", "so <<13*2=26>>26"), "26")
    true = true_values(truth)
    assert {Fraction(13), Fraction(26), Fraction(3)} <= true
    steps = ["<<16-3=13>>13", "hm", "<<13*5=65>>65 and <<13+13=26>>26", "<<65-52=13>>13", "<<65+5=70>>70"]
    found = [calculations(step)[1] for step in steps]
    wrong = value_labels(found, true, False)
    assert wrong == [[False], [], [True, None], [None], [None]]
    assert [together(one) for one in wrong] == [False, None, True, None, None]
    # In a right solution what is off is another way, and right; the control picks it.
    assert value_labels(found, true, True) == [[False], [], [False, False], [False], [False]]
    assert off_labels(found, true) == [[False], [], [True, False], [False], [True]]


# --------------------------------------------------------------------------------------------------------------- tables


def _rows(seed: int, effect: float, n: int = 150) -> pd.DataFrame:
    """Questions of four models with steps; `suffix` = difficulty + model + frequency + effect · wrong + noise.

    Wrong steps stand on difficult questions, are of one model and of rare words more often.
    """
    rng = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    for q in range(n):
        difficulty = rng.normal()
        for m, model in enumerate("abcd"):
            for place in range(3):
                frequency = rng.normal()
                wrong = float(rng.random() < 1 / (1 + np.exp(-(difficulty + m - 1.5 - frequency))))
                y = -2 * difficulty - m + frequency + effect * wrong + rng.normal()
                rows.append({"question_id": q, "model": model, "place": place, "wrong": wrong, "suffix": y})
                rows[-1] |= {"frequency": frequency, "n_tokens": int(rng.integers(5, 20))}
    return pd.DataFrame(rows)


def test_a_planted_difference_is_found_under_confounders() -> None:
    from gsm8k_tables import GIVEN, PLAIN, SAME, contrast

    rows = _rows(0, effect=-0.5)
    given, parts = contrast(rows, "suffix", GIVEN)
    assert given.ci_low < -0.5 < given.ci_high and given.ci_high < 0 and given.n == len(parts) > 100
    assert contrast(rows, "suffix", SAME)[0].value < given.ci_low  # frequency is confounded with it
    assert contrast(rows, "suffix", PLAIN)[0].value < contrast(rows, "suffix", SAME)[0].ci_low  # and difficulty


def test_a_plain_contrast_is_the_difference_of_means() -> None:
    from gsm8k_tables import PLAIN, SAME, contrast

    rows = _rows(1, effect=0.3, n=20)
    means = rows.groupby("wrong")["suffix"].mean()
    found, parts = contrast(rows, "suffix", PLAIN)
    assert found.value == pytest.approx(means[1.0] - means[0.0]) and len(parts) == 20
    right = rows[rows["wrong"] == 0]
    none, nothing = contrast(right, "suffix", SAME)
    assert none.n == 0 and np.isnan(none.value) and not len(nothing)
    assert contrast(rows.assign(suffix=1.0), "suffix", SAME)[0].n == 0  # a constant is no difference of 0


def test_intervals_hold_where_there_is_nothing_to_find() -> None:
    from gsm8k_tables import GIVEN, contrast

    outside = 0
    for seed in range(40):
        found, _ = contrast(_rows(seed, effect=0.0, n=60), "suffix", GIVEN)
        outside += not found.ci_low <= 0 <= found.ci_high
    assert outside <= 6  # P(more than 6 of 40 at 5 %) is .003


def test_auroc_by_hand_and_by_chance() -> None:
    from gsm8k_tables import auroc, auroc_within

    x, wrong = np.array([3.0, 1.0, 2.0, 2.0, 9.0, 8.0]), np.array([True, False, True, False, False, False])
    cluster = np.array(["a", "a", "b", "b", "a", "c"])
    # 3 beats 1 and 2 of 1, 2, 9, 8; 2 beats 1 and ties 2: (2 + 1.5) / 8.
    assert auroc(x, wrong, cluster).value == pytest.approx(3.5 / 8)
    # In a 3 beats 1 and not 9; in b a tie; c compares nothing.
    within = auroc_within(x, wrong, cluster)
    assert within.value == pytest.approx(1.5 / 3) and within.n == 2
    assert np.isnan(auroc(x, np.zeros(6, dtype=bool), cluster).value)
    assert auroc_within(x, np.zeros(6, dtype=bool), cluster).n == 0


def test_the_interval_of_an_auroc_knows_of_clusters() -> None:
    """Every row twice in its cluster: the same value, and the same interval, as if there were one of each."""
    from gsm8k_tables import auroc

    rng = np.random.default_rng(0)
    wrong = rng.random(200) < 0.4
    x, names = rng.normal(size=200) + 0.5 * wrong, np.arange(200)
    once = auroc(x, wrong, names)
    twice = auroc(*(np.repeat(part, 2) for part in (x, wrong, names)))
    assert once.value > 0.55 and twice[:3] == pytest.approx(once[:3])
    assert auroc(np.repeat(x, 2), np.repeat(wrong, 2), np.arange(400)).ci_low > twice.ci_low


# --------------------------------------------------------------------------------------------------------------- script


def _made(folder: Path) -> Path:
    """A GSM8K of 12 made training documents and 6 test questions; each second solution is wrong, one has no answer."""
    folder.mkdir()
    train = [
        {
            "question": f"Tom had {k} red apples and got {j} more in the shop.  How many apples has he?",
            "answer": f"He has {k}+{j}=<<{k}+{j}={k + j}>>{k + j} apples.\n#### {k + j}",
        }
        for k in (2, 3, 5, 8)
        for j in (4, 6, 9)
    ]
    rows = []
    for q in range(6):
        a, b = q + 2, 2 * q + 3
        row: dict[str, Any] = {"question": f"Ann had {a} apples and bought {b} more in the shop.  How many has she?"}
        row["ground_truth"] = f"She has {a}+{b}=<<{a}+{b}={a + b}>>{a + b} apples.\nA: {a + b}"
        for m, model in enumerate(("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")):
            correct = (q + m) % 2 == 0
            said = a + b if correct else a * b + 50
            sign = "+" if correct or q % 3 else "*"  # wrong in the plan, or in the arithmetic
            step = f"First, she had {a} apples.\nNow she has {a}{sign}{b}=<<{a}{sign}{b}={said}>>{said} apples."
            end = "" if (q, m) == (5, 3) else f"\nA: {said}"
            row[model] = {"solution": step + end, "is_correct": correct}
        rows.append(row)
    for name, some in (("train.jsonl", train), ("example_model_solutions.jsonl", rows)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in some), encoding="utf-8")
    return folder


def _run(*options: str) -> subprocess.CompletedProcess[str]:
    call = [sys.executable, str(EXPERIMENTS / "gsm8k_counts.py"), "--quiet", *options]
    return subprocess.run(call, capture_output=True, text=True, check=False)


def test_the_script_on_made_data(tmp_path: Path) -> None:
    data, out = _made(tmp_path / "data"), tmp_path / "out"
    done = _run("--data", str(data), "--out", str(out))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) <= 12 and "24 = 23 read + 1 refused (no answer line: 1)" in done.stdout
    steps, results = pd.read_csv(out / "steps.csv"), pd.read_csv(out / "results.csv")
    assert len(steps) == 46 and len(results) == 23 and (out / "figures" / "gsm8k_counts.png").stat().st_size > 10_000
    assert set(steps["solution"].dropna()) == {0, 1} and steps["value"].sum() == 12
    right = results[results["solution"] == 0]
    assert (right["value"] == 0).all() and (right["arithmetic"] == 0).all() and right["suffix"].notna().any()
    # A wrong result is 50 too large: in the made corpus there is none above 17.
    wrong = results[results["solution"] == 1]
    assert (wrong["unseen"] == 1).all() and wrong["suffix"].isna().all() and (right["unseen"] < 1).any()
    means, change = pd.read_csv(out / "means.csv"), pd.read_csv(out / "differences.csv")
    one = means[(means["unit"] == "result") & (means["label"] == "solution") & (means["measure"] == "unseen")]
    assert one[(one["model"] == "all models") & (one["wrong"] == 1)]["value"].item() == 1
    assert {"value", "ci_low", "ci_high", "n", "p", "p_corrected"} <= set(change.columns)
    table = pd.read_csv(out / "aurocs.csv")
    keys = (table["unit"] == "result") & (table["label"] == "solution") & (table["measure"] == "probability")
    assert table[keys & (table["pairs"] == "all") & (table["model"] == "all models")]["value"].item() < 0.5


def test_words_and_rows_by_hand(tmp_path: Path) -> None:
    """The stop words, and one result's numbers: `=` is always followed by the sum that the corpus shows, if it has it."""
    from gsm8k_counts import measure

    found = measure(tmp_path / "out", _made(tmp_path / "data"), limit=1)
    assert "apples" in found.stop and "ann" not in found.stop and found.corpus["documents"] == 12
    results = found.units["result"]
    assert len(results) == 4 and set(results["question_id"]) == {"example_model_solutions-0"}
    # Question 0 is 2 + 3: `+3=<<` is nowhere, nor is `+3=5`, so w is `=`; of 12 sums in annotations and 12 before them
    # none is 5, but 5 is a number of the corpus: its w is empty, and its share is that of all tokens.
    right = results[results["solution"] == 0].iloc[0]
    assert right["suffix"] == 0 and right["share"] == pytest.approx(2 ** right["frequency"])


@pytest.mark.parametrize("options", [(), ("--plain",), ("--digits",)])
def test_variants_count_other_tokens(tmp_path: Path, options: tuple[str, ...]) -> None:
    from gsm8k_counts import measure

    data, out = _made(tmp_path / "data"), tmp_path / "out"
    found = measure(out, data, limit=2, plain="--plain" in options, digits="--digits" in options)
    per_step = found.units["step"]["n_tokens"].max()
    assert per_step == {(): 17, ("--plain",): 10, ("--digits",): 19}[options]
    again = measure(out, data, limit=2, plain="--plain" in options, digits="--digits" in options)
    assert len(list(out.glob("index-*"))) == 1
    pd.testing.assert_frame_equal(found.units["result"], again.units["result"])


def test_what_the_script_refuses(tmp_path: Path) -> None:
    from gsm8k_counts import measure

    gone = _run("--data", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out"))
    assert gone.returncode == 2 and gone.stdout == "" and len(gone.stderr.strip().splitlines()) == 1
    assert "nowhere" in gone.stderr and not (tmp_path / "out").exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"example_model_solutions\.jsonl"):
        measure(tmp_path / "out", tmp_path / "empty")
    with pytest.raises(UserError, match="--limit 0"):
        measure(tmp_path / "out", _made(tmp_path / "data"), limit=0)


@pytest.mark.skipif(not SHARED.is_dir(), reason="GSM8K is not here")
def test_all_solutions_are_read_or_refused() -> None:
    from gsm8k_counts import MODELS, SOLUTIONS

    from reasoninterp.traces.readers import read_gsm8k

    found = [read_gsm8k(SHARED / SOLUTIONS, model=model) for model in MODELS]
    assert sum(one.rows for one in found) == 5276 == sum(len(one.traces) + one.refused.total() for one in found)
    assert sum(one.refused.total() for one in found) == 11
