"""The embedded corpus index: the conformance suite, its files and what damages them, building, and the command line."""

from __future__ import annotations

import json
import pickle
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reasoninterp.cli import main
from reasoninterp.errors import UserError
from reasoninterp.memorization.corpus import build, embedded, verify, whole
from reasoninterp.memorization.corpus.build import build_index
from reasoninterp.memorization.corpus.documents import build_from_texts, encode_texts, read_documents
from reasoninterp.memorization.corpus.embedded import EmbeddedIndex
from reasoninterp.memorization.corpus.files import HEADER, Files, Header, hash_of, read_header
from reasoninterp.memorization.corpus.interface import Count
from reasoninterp.memorization.corpus.tokenizer import check_tokenizer, load_tokenizer, tokenizer_identity
from tests.corpus_conformance import MIXED, BruteForce, Conformance, Make, random_corpus
from tests.tiny import tiny_tokenizer

ROOT = Path(__file__).resolve().parents[1]
FILES = ("text.bin", "suffixes.bin", "starts.bin", "ends.bin")


class TestEmbedded(Conformance):
    """Every case of the suite, exactly."""

    @pytest.fixture
    def make(self, tmp_path: Path) -> Make:
        return lambda documents, vocab_size: made(tmp_path / "index", documents, vocab_size)


def made(out: Path, documents: Any = MIXED, vocab_size: int = 5) -> EmbeddedIndex:
    return build_index(documents, out, vocab_size=vocab_size, tokenizer="ids")


def skewed(n_docs: int = 60, vocab_size: int = 300, seed: int = 0) -> list[list[int]]:
    """Documents in which id 7 is very frequent and most ids are rare."""
    rng = np.random.default_rng(seed)
    ids = np.where(rng.random((n_docs, 200)) < 0.4, 7, (vocab_size * rng.random((n_docs, 200)) ** 3).astype(int))
    return [row[:n].tolist() for row, n in zip(ids, rng.integers(1, 201, n_docs), strict=True)]


# ---------------------------------------------------------------------------------------------- counts


@pytest.mark.parametrize("few", [0, 2048], ids=["by halving", "by reading"])
def test_every_sequence_of_a_larger_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, few: int) -> None:
    monkeypatch.setattr(embedded, "_FEW", few)
    documents = skewed()
    true = Counter(tuple(d[i : i + n]) for d in documents for n in (1, 2, 3) for i in range(len(d) - n + 1))
    with closing(made(tmp_path / "index", documents, 300)) as index:
        assert index.info.n_tokens == sum(map(len, documents))
        frequent = [ngram for ngram, n in true.items() if n > 5 or len(ngram) == 1]
        assert len(frequent) > 200
        assert max(true[ngram] for ngram in frequent if len(ngram) == 2) > embedded._NEAR
        assert index.count_many(frequent) == [Count(true[ngram]) for ngram in frequent]
        for context in ([7], [7, 7], [7, 0], [299], [7, 7, 7]):
            following = {one: true[(*context, one)] for one in range(300) if len(context) < 3}
            if following:
                assert [c.value for c in index.continuation_counts(context, list(following))] == list(
                    following.values()
                )
                assert index.next_token_counts(context).counts == {k: v for k, v in following.items() if v}


def test_the_seams_between_parts_of_large_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents, vocab_size = random_corpus(3)
    with closing(made(tmp_path / "whole", documents, vocab_size)) as index:
        whole = {name: (index.path / name).read_bytes() for name in (*FILES, HEADER)}
        following = index.next_token_counts([0])
    for module in (build, embedded, verify):
        monkeypatch.setattr(module, "CHUNK", 3)  # shorter than most documents
    with closing(made(tmp_path / "parts", documents, vocab_size)) as index:
        assert {name: (index.path / name).read_bytes() for name in whole} == whole
        assert index.next_token_counts([0]) == following
        assert following.total.value > 3
        assert len(index.verify()) == 3
        judge = BruteForce(documents, vocab_size)
        sequences = verify.drawn_sequences(Files.open(index.path), 40, seed=1)
        counts = verify.scan_counts(Files.open(index.path).symbols, sequences)
        assert counts == [judge.count([s - 1 for s in sequence]).value for sequence in sequences]
        assert sum(n > 1 for n in counts) > 10


def test_ids_of_a_narrow_type_are_not_cut_off(tmp_path: Path) -> None:
    """255 + 1 in eight bits is 0, which ends documents."""
    with closing(
        made(tmp_path / "index", [np.array([255, 1, 255], np.uint8), np.array([255], np.int64)], 256)
    ) as index:
        assert (index.count([255]), index.info.n_docs, index.info.n_tokens) == (Count(3), 2, 4)


def test_a_window_of_any_size_is_the_document(tmp_path: Path) -> None:
    with closing(made(tmp_path / "index")) as index:
        for unit in ("pairs", "anchors"):
            for a, b in (([1], [2]), ([1], [1])):
                whole = index.cooccurrence(a, b, unit=unit)
                assert whole.value > 0
                assert index.cooccurrence(a, b, unit=unit, window=2**70) == whole


def test_places_are_kept_up_to_a_number_of_bytes(tmp_path: Path) -> None:
    documents = skewed(30)
    judge = BruteForce(documents, 300)
    pairs = [([a], [b]) for a in (7, 0, 1, 2) for b in (7, 3, 0, 9)]
    asked: list[dict[str, Any]] = [
        {"unit": "documents"},
        {"unit": "pairs", "window": 4},
        {"unit": "anchors", "window": 4},
    ]
    true = [judge.cooccurrence(a, b, **how) for a, b in pairs for how in asked]
    assert sum(c.value > 0 for c in true) > 30
    made(tmp_path / "index", documents, 300).close()
    for keep_bytes in (0, 3000, 2**27):
        with closing(EmbeddedIndex(tmp_path / "index", keep_bytes=keep_bytes)) as index:
            for _ in range(2):
                assert [index.cooccurrence(a, b, **how) for a, b in pairs for how in asked] == true
            assert index._places.nbytes <= keep_bytes
            assert (index._places.nbytes > 0) == (keep_bytes > 0)


# ---------------------------------------------------------------------------------------------- processes


def test_another_process_opens_a_pickled_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    index = made(Path("an index"))  # a relative path, and the other process stands elsewhere
    (tmp_path / "pickled").write_bytes(pickle.dumps(index))
    code = "import pickle, sys; print(pickle.load(open(sys.argv[1], 'rb')).count([1, 2]).value)"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "pickled")], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.split() == ["5"]
    assert index.count([1, 2]) == Count(5)
    index.close()
    with pytest.raises(UserError, match="closed"):
        pickle.dumps(index)
    shutil.rmtree(index.path)
    made(index.path, [[1, 2]]).close()
    with pytest.raises(UserError, match="another index"):
        pickle.loads((tmp_path / "pickled").read_bytes())


def test_threads_share_an_index(tmp_path: Path) -> None:
    with closing(EmbeddedIndex(made(tmp_path / "index", skewed(), 300).path, keep_bytes=20_000)) as index:

        def ask(k: int) -> int:
            return index.cooccurrence([k % 20], [7], window=3, unit="pairs").value

        true = [ask(k) for k in range(60)]
        assert min(true[:8]) > 0
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(ask, range(60))) == true


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the system does not tell what is mapped")
def test_a_closed_index_lets_go_of_its_files(tmp_path: Path) -> None:
    index = made(tmp_path / "index")
    index.cooccurrence([1], [2])
    assert str(index.path / "text.bin") in Path("/proc/self/maps").read_text()
    index.close()
    assert str(index.path) not in Path("/proc/self/maps").read_text()


def test_importing_an_index_imports_no_torch() -> None:
    code = "import sys, reasoninterp.memorization.corpus.build; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


# ---------------------------------------------------------------------------------------------- building


def test_the_files_by_hand(tmp_path: Path) -> None:
    index = made(tmp_path / "index", [[1, 0], [], [1]], 2)
    assert (index.path / "text.bin").read_bytes() == bytes([2, 1, 0, 0, 2, 0])
    # Suffixes in order: 0; 0 0 2 0; 0 2 0; 1 0 …; 2 0; 2 1 …
    assert np.fromfile(index.path / "suffixes.bin", "<i4").tolist() == [5, 2, 3, 1, 4, 0]
    assert np.fromfile(index.path / "starts.bin", "<i4").tolist() == [0, 3, 4, 6]
    assert np.fromfile(index.path / "ends.bin", "<i4").tolist() == [2, 3, 5]
    assert sorted(p.name for p in index.path.iterdir()) == sorted([*FILES, HEADER])


def test_identity_of_a_corpus_is_that_of_its_documents(tmp_path: Path) -> None:
    """Not of how they came, nor of how wide ids are stored; but of where documents end."""
    documents = {
        "same": [[1, 2], [3]],
        "arrays": [np.array([1, 2]), (3,)],
        "cut": [[1], [2, 3]],
        "empty": [[1, 2], [3], []],
    }
    made_of = {name: made(tmp_path / name, given, 5).info.corpus for name, given in documents.items()}
    made_of["wide"] = made(tmp_path / "wide", documents["same"], 70_000).info.corpus
    assert made_of["same"] == made_of["arrays"] == made_of["wide"]
    assert len({made_of["same"], made_of["cut"], made_of["empty"]}) == 3


@pytest.mark.parametrize("name", ["with blanks in it", "Füße ☃", "stable", "a%sb"])
def test_any_path_will_do(tmp_path: Path, name: str) -> None:
    with closing(made(tmp_path / name / "index")) as index:
        assert index.count([1]) == Count(8)


def test_documents_are_read_one_after_the_other(tmp_path: Path) -> None:
    given = []

    def documents() -> Iterator[list[int]]:
        for k in range(50):
            given.append(k)
            yield [k % 5] * (k % 3)

    with closing(made(tmp_path / "index", documents())) as index:
        assert index.info.n_docs == 50
        assert index.count([0]) == Count(sum(k % 3 for k in range(0, 50, 5)))
    assert given == list(range(50))


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def broken() -> Iterator[list[int]]:
        yield [1, 2]
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        made(tmp_path / "index", broken())
    with pytest.raises(UserError, match="document 1: 5 is not below"):
        made(tmp_path / "index", [[1], [5]])
    assert list(tmp_path.iterdir()) == []


def test_a_killed_build_is_never_opened_and_the_next_one_sweeps_it_up(tmp_path: Path) -> None:
    code = f"""
import os, signal
from reasoninterp.memorization.corpus.build import build_index
def documents():
    yield [1, 2]
    os.kill(os.getpid(), signal.SIGKILL)
build_index(documents(), {str(tmp_path / "index")!r}, vocab_size=5, tokenizer="ids")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    assert [p.name for p in tmp_path.iterdir()] == [".index.unfinished"]
    for folder in (tmp_path / "index", tmp_path / ".index.unfinished"):
        with pytest.raises(UserError, match="no corpus index here"):
            EmbeddedIndex(folder)
    (tmp_path / ".index.unfinished" / "rubbish").write_text("left behind")
    with closing(made(tmp_path / "index")) as index:
        assert sorted(p.name for p in index.path.iterdir()) == sorted([*FILES, HEADER])
    assert [p.name for p in tmp_path.iterdir()] == ["index"]


def test_two_builders_of_one_place(tmp_path: Path) -> None:
    def documents() -> Iterator[list[int]]:
        yield [1]
        with pytest.raises(UserError, match="another process"):
            made(tmp_path / "index", [[2]])
        yield [1]

    with closing(made(tmp_path / "index", documents())) as index:
        assert (index.count([1]), index.count([2])) == (Count(2), Count(0))
    with pytest.raises(UserError, match="something here already"):
        made(tmp_path / "index", [[2]])


def test_a_directory_that_goes_away_while_it_is_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its owner finishes just then: the lock is on what is now called otherwise."""
    lock, gone = whole.fcntl.flock, []

    def slow(handle: int, how: int) -> None:
        if not gone:
            gone.append(shutil.rmtree(tmp_path / ".index.unfinished"))
        lock(handle, how)

    monkeypatch.setattr(whole.fcntl, "flock", slow)
    with closing(made(tmp_path / "index")) as index:
        assert index.count([1]) == Count(8)
    assert gone


def test_places_that_cannot_be_had(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    (tmp_path / "empty").mkdir()
    for taken in ("file", "full"):
        with pytest.raises(UserError, match="something here already"):
            made(tmp_path / taken)
    with pytest.raises(UserError, match="cannot write here"):
        made(tmp_path / "file" / "index")
    with closing(made(tmp_path / "empty")) as index:
        assert index.count([1]) == Count(8)
    assert (tmp_path / "full" / "mine").read_text() == "mine"


def test_a_full_disk_is_said_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(whole, "_flush", full)
    with pytest.raises(UserError, match="No space left"):
        made(tmp_path / "index")
    assert list(tmp_path.iterdir()) == []


def test_more_than_an_index_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "MOST_BYTES", 24)  # `MIXED` has 17 tokens and 7 ends
    made(tmp_path / "fits").close()
    with pytest.raises(UserError, match="more than 24 tokens"):
        made(tmp_path / "one", [*MIXED, []])
    with pytest.raises(UserError, match=r"more than 12 tokens .* 2 bytes"):
        made(tmp_path / "wide", vocab_size=300)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"vocab_size": 0}, "vocab_size"),
        ({"vocab_size": True}, "vocab_size"),
        ({"vocab_size": 2**24 + 1}, "at most"),
        ({"tokenizer": ""}, "tokenizer"),
        ({"documents": [[], []]}, "no token in 2"),
    ],
)
def test_bad_arguments(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    given = {"documents": MIXED, "out": tmp_path / "index", "vocab_size": 5, "tokenizer": "ids", **changes}
    with pytest.raises(UserError, match=said):
        build_index(**given)
    assert list(tmp_path.iterdir()) == []


def test_an_index_that_counts_wrongly_is_not_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Suffixes that begin with the same symbol are in the wrong order, which only counting shows."""
    import pydivsufsort

    def backwards(text: np.ndarray) -> np.ndarray:
        return np.array(sorted(range(len(text)), key=lambda i: (text[i], -i)), dtype=np.int32)

    monkeypatch.setattr(pydivsufsort, "divsufsort", backwards)
    rng = np.random.default_rng(0)
    with pytest.raises(UserError, match=r"the index counts .* times, and it occurs"):
        made(tmp_path / "index", [rng.integers(0, 5, 40).tolist() for _ in range(20)])
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------- damage


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An index of some thousand tokens, closed."""
    made(tmp_path / "index", skewed(20), 300).close()
    return tmp_path / "index"


def refused(folder: Path) -> str:
    """What opening an index complains of."""
    with pytest.raises(UserError) as error:
        EmbeddedIndex(folder)
    return str(error.value)


def found_damaged(folder: Path) -> str:
    """What opening an index, or then verifying it, complains of."""
    with pytest.raises(UserError) as error, closing(EmbeddedIndex(folder)) as index:
        index.verify()
    return str(error.value)


def change(path: Path, at: int, value: int, dtype: str) -> None:
    array = np.fromfile(path, dtype)
    assert array[at] != value
    array[at] = value
    array.tofile(path)


def reseal(folder: Path) -> None:
    """Make the header's checksums those of the files, so that only the contents can tell."""
    header = read_header(folder)
    sha256 = {name: hash_of(folder / name) for name in header.sha256}
    Header(**{**{k: getattr(header, k) for k in Header.__dataclass_fields__}, "sha256": sha256}).write(folder)


def test_a_whole_index_is_in_order(folder: Path) -> None:
    with closing(EmbeddedIndex(folder)) as index:
        assert len(index.verify()) == 3


@pytest.mark.parametrize("name", FILES)
def test_files_of_a_wrong_size_are_not_opened(folder: Path, name: str) -> None:
    whole = (folder / name).read_bytes()
    for content in (whole[:-1], whole + b"\0", b""):
        (folder / name).write_bytes(content)
        assert f"{name}: damaged ({len(content)} bytes instead of {len(whole)})" in refused(folder)
    (folder / name).unlink()
    assert f"{name}: missing" in refused(folder)


@pytest.mark.parametrize("name", FILES)
def test_a_changed_byte_is_found(folder: Path, name: str) -> None:
    content = bytearray((folder / name).read_bytes())
    content[4 * (len(content) // 7)] ^= 1  # of no symbol that opening looks at
    (folder / name).write_bytes(content)
    assert f"{name}: damaged (its checksum is wrong)" in found_damaged(folder)


def test_suffixes_that_lie_outside_or_do_not_fit_are_not_opened(folder: Path) -> None:
    whole = (folder / "suffixes.bin").read_bytes()
    n = len(whole) // 4
    for at, value in ((0, n), (n - 1, -1), (0, 2**31 - 1)):
        change(folder / "suffixes.bin", at, value, "<i4")
        assert "outside of the text" in refused(folder)
        (folder / "suffixes.bin").write_bytes(whole)
    np.zeros(n, "<i4").tofile(folder / "suffixes.bin")
    assert "do not fit together" in refused(folder)


def swap_suffixes(folder: Path) -> None:
    """Two neighbours that begin with the same symbol, and that opening does not look at."""
    suffixes = np.fromfile(folder / "suffixes.bin", "<i4")
    looked_at = set(np.linspace(0, len(suffixes) - 1, 256).astype(int).tolist())
    start = int(np.fromfile(folder / "starts.bin", "<i4")[8])  # of id 7, the frequent one
    k = next(k for k in range(start, len(suffixes)) if not {k, k + 1} & looked_at)
    suffixes[[k, k + 1]] = suffixes[[k + 1, k]]
    suffixes.tofile(folder / "suffixes.bin")


def unseen_tokens(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """The text, and where opening does not look at two different neighbouring tokens of a document."""
    text, suffixes = np.fromfile(folder / "text.bin", ">u2"), np.fromfile(folder / "suffixes.bin", "<i4")
    seen = np.zeros(len(text), bool)
    seen[suffixes[np.linspace(0, len(suffixes) - 1, 256).astype(int)]] = True
    apart = (text[:-1] != text[1:]) & (text[:-1] > 0) & (text[1:] > 0)
    return text, np.flatnonzero(apart & ~seen[:-1] & ~seen[1:])


def swap_tokens(folder: Path) -> None:
    text, (k, *_) = unseen_tokens(folder)
    text[[k, k + 1]] = text[[k + 1, k]]
    text.tofile(folder / "text.bin")


def foreign_token(folder: Path) -> None:
    text, (k, *_) = unseen_tokens(folder)
    text[k] = 302
    text.tofile(folder / "text.bin")


def repeat_suffix(folder: Path) -> None:
    suffixes = np.fromfile(folder / "suffixes.bin", "<i4")
    start = int(np.fromfile(folder / "starts.bin", "<i4")[8])
    suffixes[start + 1] = suffixes[start]
    suffixes.tofile(folder / "suffixes.bin")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (swap_suffixes, "suffixes.bin: damaged (suffixes are out of order)"),
        (repeat_suffix, "suffixes.bin: damaged (a place of the text is missing)"),
        (lambda f: change(f / "starts.bin", 299, 0, "<i4"), "starts.bin: damaged (it does not fit the text)"),
        (lambda f: change(f / "ends.bin", 3, 5, "<i4"), "ends.bin: damaged (documents end elsewhere)"),
        (swap_tokens, "text.bin: damaged (its ids are not those that the header names)"),
        (foreign_token, "text.bin: damaged (an id lies beyond the vocabulary)"),
    ],
    ids=["order", "twice", "starts", "ends", "text", "vocabulary"],
)
def test_contents_are_verified_and_not_only_checksums(folder: Path, damage: Callable[[Path], None], said: str) -> None:
    damage(folder)
    reseal(folder)
    assert said in found_damaged(folder)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"version": 2}, "version 2"),
        ({"format": "another"}, "not the header"),
        ({"tokenizer": "another"}, "its own checksum"),
        ({"n_tokens": "many"}, "its own checksum"),
        ({"vocab_size": 2**40}, "its own checksum"),
        ({"dtypes": {}}, "its own checksum"),
        ({"digest": None}, "its own checksum"),
    ],
)
def test_foreign_and_changed_headers(folder: Path, changes: dict[str, Any], said: str) -> None:
    header = json.loads((folder / HEADER).read_text())
    (folder / HEADER).write_text(json.dumps(header | changes))
    assert said in refused(folder)


def test_what_is_no_index_is_not_opened(folder: Path, tmp_path: Path) -> None:
    for content, said in (
        (b"", "no JSON"),
        (b"\xff\xfe", "no JSON"),
        (b"[]", "not the header"),
        (b"{}", "not the header"),
    ):
        (folder / HEADER).write_bytes(content)
        assert said in refused(folder)
    (folder / HEADER).unlink()
    for where in (folder, tmp_path / "nowhere", folder / "text.bin"):
        assert "no corpus index here" in refused(where)


def test_damage_met_while_counting_is_an_error(folder: Path) -> None:
    starts = np.fromfile(folder / "starts.bin", "<i4")
    with (folder / "suffixes.bin").open("r+b") as file:  # in the middle of the frequent id's, while nobody looks
        file.seek(4 * (int(starts[8]) + 2))
        file.write(np.int32(2**30).tobytes())
    with closing(EmbeddedIndex(folder)) as index, pytest.raises(UserError, match="outside of the text"):
        index.cooccurrence([7], [0], unit="pairs")


# ---------------------------------------------------------------------------------------------- text and tokenizers


TEXTS = ["Tom has 3 apples and 4 apples.", "", "She has 12 apples.\nTom has 3.", "ünïcödé ☃"]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer().save_pretrained(str(out))
    return out


def test_texts_are_counted_as_their_ids(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    judge = BruteForce([tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS], len(tokenizer))
    with closing(build_from_texts(iter(TEXTS), tmp_path / "index", tokenizer)) as index:
        assert (index.info.n_docs, index.info.n_tokens) == (4, judge.info.n_tokens)
        for text in (" apples", "Tom has", " has 3", "☃", "Tom", ".\nTom"):
            (ids,) = encode_texts([text], tokenizer)
            assert index.count(ids) == judge.count(ids)
            assert index.count(ids).value > 0
        saved = load_tokenizer(index.path / "tokenizer")
        check_tokenizer(index.info, saved)
        assert encode_texts(TEXTS, saved) == encode_texts(TEXTS, tokenizer)


def test_many_texts_are_encoded_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from reasoninterp.memorization.corpus import documents

    tokenizer = tiny_tokenizer()
    texts = [f"Tom has {k} apples." for k in range(23)]
    true = encode_texts(texts, tokenizer)
    for most_texts, most_characters in ((5, 10**6), (10**6, 50), (1, 1), (10**6, 10**6)):
        monkeypatch.setattr(documents, "_MOST_TEXTS", most_texts)
        monkeypatch.setattr(documents, "_MOST_CHARACTERS", most_characters)
        assert list(documents.encode_documents(texts, tokenizer)) == true


def test_identity_of_a_tokenizer_is_how_it_encodes(tokenizer_folder: Path) -> None:
    identity = tokenizer_identity(tiny_tokenizer())
    assert identity == tokenizer_identity(load_tokenizer(tokenizer_folder))
    # A tuned model's chat template and added tokens change no text that does without them.
    assert identity == tokenizer_identity(tiny_tokenizer(chat=True, added=("<mine>",)))
    padding = tiny_tokenizer()
    padding(["a", "long text"], padding=True, truncation=True, max_length=2)
    assert identity == tokenizer_identity(padding)
    other = tiny_tokenizer(extra="apples apples apples bananas")
    assert encode_texts(["apples"], other) != encode_texts(["apples"], tiny_tokenizer())
    assert identity != tokenizer_identity(other)
    with pytest.raises(UserError, match="not a fast one"):
        tokenizer_identity(object())


def test_another_tokenizers_ids_are_not_counted(tmp_path: Path) -> None:
    other = tiny_tokenizer(extra="apples apples apples bananas")
    index = build_from_texts(TEXTS, tmp_path / "index", tiny_tokenizer())
    with pytest.raises(UserError, match="the tokenizer of tuned"):
        check_tokenizer(index.info, other, "tuned")
    with pytest.raises(UserError, match="built with the tokenizer"):
        EmbeddedIndex(index.path, tokenizer=tokenizer_identity(other))
    EmbeddedIndex(index.path, tokenizer=tokenizer_identity(tiny_tokenizer())).close()


def test_documents_of_files(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes("\ufeffone\r\n\r\ntwo ☃\n \nthree".encode())
    assert list(read_documents(text, by_line=True)) == ["one", "two ☃", "three"]
    assert list(read_documents(text)) == ["one\r\n\r\ntwo ☃\n \nthree"]
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "Q?", "answer": "A\\u2028B", "n": 1}\n\n{"answer": "", "question": "R?"}\n')
    assert list(read_documents(rows, fields=("question", "answer"))) == ["Q?\nA\u2028B", "R?\n"]
    assert list(read_documents(rows, fields=("answer",))) == ["A\u2028B", ""]
    assert list(read_documents(rows, fields=("answer", "question"), join=" | ")) == ["A\u2028B | Q?", " | R?"]
    traces = tmp_path / "traces.jsonl"
    traces.write_text(
        '{"format": {"before_question": "Q: ", "after_question": "\\n", "between_steps": " ", "before_answer": " = "}}\n'
        '{"id": "1", "question": "1+1", "steps": ["so", "then"], "answer": "2"}\n'
    )
    (found,) = read_documents(traces)
    assert found.startswith("Q: 1+1\nso then = 2")


@pytest.mark.parametrize(
    ("content", "how", "said"),
    [
        (b'{"a": "x"}\n{"b": "x"}\n', {"fields": ("a",)}, "line 2: there is no string in the field 'a'"),
        (b'{"a": 1}\n', {"fields": ("a",)}, "line 1: there is no string"),
        (b"[1]\n", {"fields": ("a",)}, "line 1: no JSON object"),
        (b"{\n", {"fields": ("a",)}, "line 1: malformed JSON"),
        (b"\xff\n", {"fields": ("a",)}, "not UTF-8"),
        (b"\xff\n", {"by_line": True}, "not UTF-8"),
        (b"\xff\n", {}, "not UTF-8"),
        (b"", {}, "empty"),
        (None, {}, "no such file"),
        (None, {"by_line": True}, "no such file"),
    ],
)
def test_files_that_are_no_documents(tmp_path: Path, content: bytes | None, how: dict[str, Any], said: str) -> None:
    path = tmp_path / "file.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=said) as error:
        list(read_documents(path, **how))
    assert str(path) in str(error.value)


# ---------------------------------------------------------------------------------------------- the command line


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    main(["corpus", *map(str, arguments)])
    return capsys.readouterr().out


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    with pytest.raises(SystemExit) as stop:
        main(["corpus", *map(str, arguments)])
    assert stop.value.code == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: ")
    assert len(said.splitlines()) == 1
    return said


@pytest.fixture
def built(tmp_path: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text, "id": 1}) + "\n" for text in TEXTS))
    out = tmp_path / "index"
    said = run(
        capsys, "build", "--tokenizer", tokenizer_folder, "--out", out, "--field", "text", "--quiet",
        tmp_path / "rows.jsonl", tmp_path / "rows.jsonl",
    )  # fmt: skip
    assert "documents   8\n" in said
    return out


def test_commands_build_count_and_verify(
    built: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = encode_texts([" apples"], tiny_tokenizer())[0]
    found = json.loads(run(capsys, "count", "--index", built, "--text", " apples", "--next", 3, "--json"))
    assert (found["ids"], found["count"], "".join(found["tokens"])) == (ids, 6, " apples")
    assert found["followed"] == 6
    assert found["next"][0] == {"id": encode_texts(["."], tiny_tokenizer())[0][0], "count": 4, "token": "."}
    said = run(capsys, "count", "--index", built, "--ids", ",".join(map(str, ids)), "--next", 1)
    assert said.split("\n")[1].split()[: 1 + len(ids)] == ["6", *map(str, ids)]
    assert "followed by a token 6 times" in said
    asked = ("--ids", ids[0], "--tokenizer", tokenizer_folder, "--next", 1)
    assert "'les'" in run(capsys, "count", "--index", built, *asked)
    assert json.loads(run(capsys, "count", "--index", built, "--text", "bananas", "--json"))["count"] == 0
    verified = json.loads(run(capsys, "verify", built, "--json"))
    assert len(verified["in order"]) == 3
    assert verified["documents"] == 8
    assert "order of" in run(capsys, "verify", built)


def test_words_that_the_tokenizer_does_not_know_are_said_to_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from reasoninterp.organisms import word_tokenizer

    word_tokenizer().save_pretrained(tmp_path / "words")
    (tmp_path / "text.txt").write_text("3 +4 apples = 7")
    run(capsys, "build", "--tokenizer", tmp_path / "words", "--out", tmp_path / "i", "--quiet", tmp_path / "text.txt")
    said = run(capsys, "count", "--index", tmp_path / "i", "--text", "+4 pears")
    assert "1 of 2 tokens are <unk>" in said and said.splitlines()[1].split()[0] == "1"
    assert "<unk>" not in run(capsys, "count", "--index", tmp_path / "i", "--text", "3 +4")


def test_commands_say_in_one_sentence_what_is_wrong(
    built: Path, tmp_path: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = ("build", "--tokenizer", tokenizer_folder, "--quiet", "--out")
    assert "no such file" in fails(capsys, *new, tmp_path / "new", tmp_path / "rows.jsonl", tmp_path / "none.txt")
    assert "something here already" in fails(capsys, *new, built, "--field", "text", tmp_path / "rows.jsonl")
    assert "field 'other'" in fails(capsys, *new, tmp_path / "new", "--field", "other", tmp_path / "rows.jsonl")
    assert "name the fields" in fails(capsys, *new, tmp_path / "new", tmp_path / "rows.jsonl")
    assert "none can be read" in fails(
        capsys, "build", "--tokenizer", tmp_path, "--out", tmp_path / "new", tmp_path / "rows.jsonl"
    )
    assert not (tmp_path / "new").exists()
    assert "either --text or --ids" in fails(capsys, "count", "--index", built)
    assert "either --text or --ids" in fails(capsys, "count", "--index", built, "--text", "a", "--ids", "1")
    assert "whole numbers" in fails(capsys, "count", "--index", built, "--ids", "1,x")
    assert "not below" in fails(capsys, "count", "--index", built, "--ids", "300")
    assert "no corpus index" in fails(capsys, "count", "--index", tmp_path, "--ids", "1")
    other = tmp_path / "other"
    tiny_tokenizer(extra="apples apples apples bananas").save_pretrained(str(other))
    assert "built with the tokenizer" in fails(capsys, "count", "--index", built, "--tokenizer", other, "--text", "a")
    with closing(made(tmp_path / "ids")):
        assert "give --tokenizer or --ids" in fails(capsys, "count", "--index", tmp_path / "ids", "--text", "a")
    content = bytearray((built / "text.bin").read_bytes())
    content[-3] ^= 1
    (built / "text.bin").write_bytes(content)
    assert "damaged" in fails(capsys, "verify", built)


# ---------------------------------------------------------------------------------------------- the benchmark's judge


def test_the_benchmarks_judge_agrees_with_the_suites(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "experiments" / "benchmarks"))
    import corpus_text

    text = corpus_text.made_text(3000, seed=1)
    assert (len(text.tokens), text.starts[0], text.starts[-1]) == (3000, 0, 3000)
    assert (np.diff(text.starts) > 0).all()
    documents = [document.tolist() for document in text.documents()]
    assert sum(map(len, documents)) == 3000
    common = [int(one) for one in np.bincount(text.tokens).argsort()[::-1][:4]]
    for corpus in (text, corpus_text.Corpus(text.tokens[:200], np.array([0, 1, 60, 61, 200]), text.vocab_size, "cut")):
        judge = corpus_text.Judge(corpus)
        true = BruteForce([document.tolist() for document in corpus.documents()], corpus.vocab_size)
        a, b = [common[0]], [common[1]]
        assert judge.count(a) == true.count(a).value > 0
        piece = corpus.tokens[58:63].tolist()
        assert judge.count(piece) == true.count(piece).value
        assert judge.next_tokens(a) == true.next_token_counts(a).counts
        match = true.longest_suffix(piece)
        assert judge.longest_suffix(piece) == (match.length, match.count.value)
        for unit, window in (("documents", None), ("pairs", 5), ("anchors", 5), ("pairs", None), ("anchors", None)):
            for x, y in ((a, b), (b, a), (a, [common[3]])):
                asked: dict[str, Any] = {"window": window, "unit": unit}
                assert judge.together(x, y, window, unit) == true.cooccurrence(x, y, **asked).value
