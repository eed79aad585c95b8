"""The infini-gram package behind our interface: the conformance suite, files that would end its process, and its faults.

What might crash runs in a process of its own.
"""

from __future__ import annotations

import multiprocessing
import pickle
import random
import shutil
import tempfile
from collections.abc import Callable
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("infini_gram")

from reasoninterp.errors import UserError
from reasoninterp.memorization.corpus import engine
from reasoninterp.memorization.corpus.build import build_index
from reasoninterp.memorization.corpus.engine import InfiniGramIndex, build_infini_gram
from reasoninterp.memorization.corpus.engine_files import MARK, Shards
from reasoninterp.memorization.corpus.interface import Count
from tests.corpus_conformance import MIXED, BruteForce, Conformance, Documents, Make, random_corpus, random_queries
from tests.infini_gram_api import Index

Damage = Callable[[Path], object]


class TestEngine(Conformance):
    """The infini-gram package on this machine."""

    max_vocab = 65_535

    @pytest.fixture(scope="class")
    def make(self, tmp_path_factory: pytest.TempPathFactory) -> Make:
        folder = tmp_path_factory.mktemp("engine")
        built: dict[str, Path] = {}  # most cases are about the same documents, and the indexer takes its time

        def make_or_open(documents: Documents, vocab_size: int) -> InfiniGramIndex:
            key = repr((documents, vocab_size))
            if key in built:
                return InfiniGramIndex(built[key])
            out = folder / str(len(built))
            index = build_infini_gram(documents, out, vocab_size=vocab_size, tokenizer="ids")
            built[key] = out
            return index

        return make_or_open


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of some 3,000 tokens of 40 ids."""
    return build(some_documents(), tmp_path_factory.mktemp("built") / "index")


@pytest.fixture
def copied(built: Path, tmp_path: Path) -> Path:
    """A copy of it to be damaged."""
    return Path(shutil.copytree(built, tmp_path / "copy"))


def some_documents(seed: int = 0, n: int = 60) -> list[list[int]]:
    rng = random.Random(seed)
    return [[min(39, int(rng.expovariate(0.15))) for _ in range(rng.randint(0, 100))] for _ in range(n)]


def build(documents: Documents, out: Path, vocab_size: int = 40, cpus: int = 1) -> Path:
    build_infini_gram(documents, out, vocab_size=vocab_size, tokenizer="ids", cpus=cpus).close()
    return out


def in_child(step: Callable[[], Any]) -> str:
    """What `UserError` says that a step raises, or "" if it raises none; fails where the process does not end well."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)

    def run() -> None:
        try:
            step()
            there.send("")
        except UserError as error:
            there.send(str(error))

    child = context.Process(target=run)
    child.start()
    child.join()
    assert child.exitcode == 0, f"ended with {child.exitcode}"
    return str(here.recv())


def raw_engine(path: Path, end: int) -> Any:
    """The package's own engine on an index of ours."""
    from infini_gram.engine import InfiniGramEngine

    with Shards.open(path).links() as folder:
        return InfiniGramEngine(folder, eos_token_id=end, vocab_size=MARK, token_dtype="u16")


# ---------------------------------------------------------------------------------------------- damage


def cut(name: str, size: int) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / name
        path.write_bytes(path.read_bytes()[:size])

    return damage


def overwrite(name: str, at: int, data: bytes) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / name
        whole = bytearray(path.read_bytes())
        whole[at : at + len(data)] = data
        path.write_bytes(whole)

    return damage


def turned_round(folder: Path) -> None:
    """The table with its last suffix first."""
    np.fromfile(folder / "table.0", "<u2")[::-1].tofile(folder / "table.0")


def retype(dtype: str) -> Damage:
    """Tokens and offsets of another width, as the package writes them for it."""

    def damage(folder: Path) -> None:
        tokens = np.fromfile(folder / "tokenized.0", "<u2")
        wide = tokens.astype(dtype)
        wide[tokens == MARK] = np.iinfo(dtype).max
        wide.tofile(folder / "tokenized.0")
        (np.fromfile(folder / "offset.0", "<u8") // 2 * wide.itemsize).tofile(folder / "offset.0")
        n, width = wide.nbytes // 2, -(-(wide.nbytes - 1).bit_length() // 8)
        np.zeros(n * width, np.uint8).tofile(folder / "table.0")  # of the size that 16-bit ids would have

    return damage


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / "tokenized.0").unlink(), "no infini-gram index"),
        (lambda folder: (folder / "table.0").unlink(), "missing"),
        (lambda folder: (folder / "offset.0").unlink(), "missing"),
        (cut("tokenized.0", 0), "tokenized.0"),
        (cut("tokenized.0", 1001), "tokenized.0"),
        (cut("tokenized.0", 1000), "table.0"),
        (cut("table.0", 0), "table.0"),
        (cut("table.0", 1000), "table.0"),
        (cut("offset.0", 0), "offset.0"),
        (cut("offset.0", 12), "offset.0"),
        (cut("offset.0", 80), "tokenized.0"),
        (overwrite("offset.0", 0, b"\x02"), "offset.0"),
        (overwrite("offset.0", 8, b"\xff" * 8), "offset.0"),
        (overwrite("offset.0", 8, b"\x03"), "one after the other"),
        (overwrite("table.0", 0, b"\xff" * 1000), "does not begin at a token"),
        (overwrite("table.0", 0, b"\x03"), "does not begin at a token"),
        (turned_round, "out of order"),
        (retype("<u4"), "tokenized.0"),
        (retype("u1"), "tokenized.0"),
        (lambda folder: (folder / engine.HEADER).write_text("{"), "damaged"),
        (lambda folder: (folder / engine.HEADER).write_text('{"vocab_size": 9}'), "damaged"),
        (lambda folder: (folder / engine.HEADER).unlink(), "give vocab_size"),
    ],
    ids=range(22),
)
def test_damaged_and_foreign_files_are_refused_before_the_engine_sees_them(
    copied: Path, damage: Damage, said: str
) -> None:
    damage(copied)
    message = in_child(lambda: InfiniGramIndex(copied).count([1]))
    assert said in message
    assert str(copied) in message


@pytest.mark.parametrize(
    "damage",
    [
        overwrite("tokenized.0", 1000, b"\x05\x00"),
        overwrite("tokenized.0", 1000, b"\xff\xff"),
        overwrite("table.0", 3000, b"\x04\x00"),
    ],
    ids=range(3),
)
def test_damage_too_small_to_be_seen_at_once_is_seen_by_verify(built: Path, copied: Path, damage: Damage) -> None:
    assert in_child(lambda: InfiniGramIndex(copied).verify()) == ""
    damage(copied)
    assert "damaged" in in_child(lambda: InfiniGramIndex(copied).verify())


def test_one_corpus_is_not_taken_for_another(built: Path, tmp_path: Path) -> None:
    other = build(some_documents(seed=1), tmp_path / "other")
    shutil.copy(built / engine.HEADER, other / engine.HEADER)
    with pytest.raises(UserError, match="another corpus"):
        InfiniGramIndex(other).verify()


# ---------------------------------------------------------------------------------------------- building


def test_it_has_the_identity_of_an_embedded_index_of_the_corpus(tmp_path: Path) -> None:
    ours = build_index(MIXED, tmp_path / "ours", vocab_size=5, tokenizer="ids")
    theirs = InfiniGramIndex(build(MIXED, tmp_path / "theirs", 5))
    assert theirs.info == ours.info


@pytest.mark.parametrize("name", ["a stable place", "ünïcode", "$(echo no); 'x'", "tokenized.offset"])
def test_names_that_the_package_cannot_take_do(tmp_path: Path, name: str) -> None:
    out = build(MIXED, tmp_path / name / "index with spaces", 5)
    counts = [InfiniGramIndex(out).count([1, 2]) for _ in range(2)]
    assert counts == [Count(5)] * 2


def test_a_directory_for_temporary_files_that_it_cannot_take_is_said(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "stable").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "stable"))
    with pytest.raises(UserError, match="TMPDIR"):
        InfiniGramIndex(built)


def test_parts_are_never_so_small_that_the_indexer_goes_wrong(tmp_path: Path) -> None:
    documents = some_documents(n=600)
    size = 2 * sum(len(document) + 1 for document in documents)
    assert size // 8 < 50_000
    index = InfiniGramIndex(build(documents, tmp_path / "index", cpus=8))
    for token in range(0, 40, 5):
        true = sum(document.count(token) for document in documents)
        assert index.count([token]) == Count(true)
        assert true > 0


def test_a_wrong_index_that_the_indexer_calls_done_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_LEAST_PART", 1)
    documents = [[random.Random(i).randrange(40) for _ in range(1000)] for i in range(10)]
    message = in_child(lambda: build(documents, tmp_path / "index", cpus=2))
    assert "table.0" in message
    assert list(tmp_path.iterdir()) == []


def test_one_wrong_suffix_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sort = engine._sort

    def sort_wrongly(folder: Path, cpus: int) -> None:
        sort(folder, cpus)
        overwrite("table.0", 3000, b"\x04\x00")(folder)

    monkeypatch.setattr(engine, "_sort", sort_wrongly)
    assert "a place of the text is missing" in in_child(lambda: build(some_documents(), tmp_path / "index"))
    assert list(tmp_path.iterdir()) == []


def test_an_indexer_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.sys, "executable", shutil.which("false"))
    with pytest.raises(UserError, match="indexer failed"):
        build(MIXED, tmp_path / "index", 5)
    assert list(tmp_path.iterdir()) == []


def test_a_corpus_without_tokens_is_refused(tmp_path: Path) -> None:
    for documents in ([], [[]], [[], []]):
        with pytest.raises(UserError, match="no token"):
            build(documents, tmp_path / "index", 5)


def test_without_the_package_it_says_how_to_get_it(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(engine.sys.modules, "infini_gram.engine", None)
    with pytest.raises(UserError, match=r"reasoninterp\[infini-gram\]"):
        InfiniGramIndex(built)


# ---------------------------------------------------------------------------------------------- opening


def test_whose_ids_it_holds_must_be_known_and_right(built: Path, copied: Path) -> None:
    assert InfiniGramIndex(built, vocab_size=40, tokenizer="ids").info.tokenizer == "ids"
    with pytest.raises(UserError, match="tokenizer ids, not others"):
        InfiniGramIndex(built, tokenizer="others")
    (copied / engine.HEADER).unlink()
    with pytest.raises(UserError, match="give tokenizer"):
        InfiniGramIndex(copied, vocab_size=40)
    foreign = InfiniGramIndex(copied, vocab_size=40, tokenizer="ids")
    assert (foreign.info.corpus, foreign.count([1])) == ("copy", InfiniGramIndex(built).count([1]))
    with pytest.raises(UserError, match="65535"):
        InfiniGramIndex(copied, vocab_size=65_536, tokenizer="ids")


def test_shards_made_elsewhere_are_one_corpus(tmp_path: Path) -> None:
    parts = {name: some_documents(seed, n=12) for seed, name in enumerate(("0", "2", "10"))}
    whole = tmp_path / "whole"
    whole.mkdir()
    for name, documents in parts.items():
        part = build(documents, tmp_path / name)
        for kind in ("tokenized", "table", "offset"):
            (part / f"{kind}.0").rename(whole / f"{kind}.{name}")
    judge = BruteForce([document for documents in parts.values() for document in documents], 40)
    nonzero = 0
    with closing(InfiniGramIndex(whole, vocab_size=40, tokenizer="ids")) as index:
        index.verify()
        assert (index.info.n_tokens, index.info.n_docs) == (judge.info.n_tokens, 36)
        for query in [[1], [0, 1], [39], [2, 0, 3], []]:
            assert index.count(query) == judge.count(query)
            assert index.next_token_counts(query) == judge.next_token_counts(query)
            nonzero += judge.count(query).value > 0
        for a, b in (([1], [2]), ([1], [0, 1]), ([3], [3]), ([20], [0])):
            for unit, window in (("documents", None), ("pairs", 5), ("anchors", 5), ("anchors", None)):
                true = judge.cooccurrence(a, b, window=window, unit=unit)
                assert index.cooccurrence(a, b, window=window, unit=unit) == true
                nonzero += true.value > 0
    assert nonzero >= 16


def test_it_is_opened_anew_where_it_is_pickled_to(built: Path) -> None:
    with closing(InfiniGramIndex(built)) as index:
        again = pickle.loads(pickle.dumps(index))
        assert again.info == index.info
        assert again.count([1, 2]) == index.count([1, 2])
        assert again.count([1, 2]).value > 0


# ---------------------------------------------------------------------------------------------- its faults


@pytest.mark.parametrize("seed", range(3))
def test_the_stand_in_for_the_web_api_answers_as_the_engine_does(tmp_path: Path, seed: int) -> None:
    """Also where the engine is wrong: the stand-in must have the faults that the web client is there to mark."""
    documents, vocab_size = random_corpus(seed)
    path = build(documents, tmp_path / "index", vocab_size)
    judge, stand_in, real = BruteForce(documents, vocab_size), Index(documents, vocab_size, end=0), raw_engine(path, 0)
    terms = [query for query in random_queries(documents, vocab_size, 40, seed) if query]
    wrong = 0
    for query in [*terms, [], [MARK]]:
        assert stand_in.answer("count", {"query_ids": query})["count"] == real.count(query)["count"]
        asked = stand_in.answer("ntd", {"query_ids": query})
        told = real.ntd(query, max_support=1000)
        assert {int(i): e["cont_cnt"] for i, e in asked["result_by_token_id"].items()} == {
            i: e["cont_cnt"] for i, e in told["result_by_token_id"].items()
        }
    for a, b in pairwise(terms):
        for window in (1, 3, 1000):
            options = {"max_diff_tokens": window, "max_clause_freq": 500_000}
            asked = stand_in.answer("count", {"query_ids": [[a], [b]], **options})["count"]
            assert asked == real.count_cnf([[a], [b]], **options)["count"]
            if a != b:
                wrong += asked != judge.cooccurrence(a, b, window=window, unit="anchors").value
    assert wrong > 0  # the bias is there to be seen


def test_what_its_own_conjunction_misses_is_counted(tmp_path: Path) -> None:
    path = build([[2], [1, 2]], tmp_path / "index", 3)
    assert raw_engine(path, 0).count_cnf([[[1]], [[2]]], max_diff_tokens=1000)["count"] == 0
    assert InfiniGramIndex(path).cooccurrence([1], [2], window=1000, unit="anchors") == Count(1)
