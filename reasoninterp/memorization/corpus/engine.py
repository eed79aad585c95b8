"""Counts by the infini-gram package on this machine: an optional second opinion, and a reader of indexes made elsewhere.

The package (Linux on x86_64 and macOS, ids below 65,535) finds sequences; everything else is done here, since only that
part of it is exact and safe:

1. `count` is the engine's.  Its own replies are errors as values; they are raised.
2. What follows a context is read where the engine finds it.  Its own `ntd` takes a document's end for a token, at which
   it can lose all others, and starts a thread for nearly every one (17,832 at once for a context with 55,760 followers).
3. Co-occurrence is counted from the places of both sequences (`together.py`).  Its own conjunctions miss occurrences near
   the ends of documents.
4. An index is opened after a look at its files (`engine_files.py`), with which it would otherwise crash or count nothing.
5. It is built in parts of at least 100,000 bytes: with smaller ones, which is its default on a small corpus, the indexer
   reports success and writes a wrong table.  Whatever it writes is verified.

Source: Liu et al. (2024), "Infini-gram", arXiv:2401.17377; the package at version 2.6.0 (github.com/liujch1998/infini-gram).
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from reasoninterp.errors import UserError
from reasoninterp.memorization.corpus.base import CheckedIndex, most_frequent
from reasoninterp.memorization.corpus.checks import checked_array, checked_positive
from reasoninterp.memorization.corpus.engine_files import MARK, Shard, Shards, plain_folder
from reasoninterp.memorization.corpus.files import CHUNK
from reasoninterp.memorization.corpus.interface import CorpusInfo, Count, NextTokens
from reasoninterp.memorization.corpus.together import Kept, Places, together
from reasoninterp.memorization.corpus.whole import appears_whole

HEADER = "reasoninterp.json"  # beside the package's own files: what they do not say
_LEAST_PART = 200_000  # bytes; below 100,000 the indexer goes wrong
_COMPARED = 100  # ids whose counts are compared after building


class InfiniGramIndex(CheckedIndex):
    """An index of the infini-gram package in a directory; methods as `interface.CorpusIndex` says, all counts exact.

    Args:
        path: its directory.
        vocab_size, tokenizer: whose ids it holds; None where `build_infini_gram` made it and they stand beside it.
        keep_bytes: how much memory the places of sequences may take that were asked for in co-occurrences.

    Raises:
        UserError: the package is not installed; there is no index, or one that it cannot be trusted with; or whose ids it
            holds is not known, or other than given.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        vocab_size: int | None = None,
        tokenizer: str | None = None,
        keep_bytes: int = 2**27,
    ) -> None:
        engine = _package()
        self.path = Path(path).absolute()
        beside = _beside(self.path)
        given = {"vocab_size": vocab_size, "tokenizer": tokenizer}
        for name, value in given.items():
            if value is None and name not in beside:
                raise UserError(f"{path}: the index does not say whose ids it holds; give {name}.")
            if value is not None and beside.get(name, value) != value:
                raise UserError(f"{path}: the index was built with {name} {beside[name]}, not {value}.")
        said = {"corpus": self.path.name, **{name: v for name, v in given.items() if v is not None}, **beside}
        self._shards: Shards | None = Shards.open(self.path)
        super().__init__(
            CorpusInfo(
                self._shards.n_tokens,
                self._shards.n_docs,
                _vocabulary(said["vocab_size"]),
                str(said["tokenizer"]),
                str(said["corpus"]),
            )
        )
        self._keep_bytes = keep_bytes
        self._places = Kept(keep_bytes)
        with self._shards.links() as folder:
            # The prefetching is for remote disks; the end-of-text id is used by calls only that are not made here.
            self._engine = engine(
                folder,
                eos_token_id=0,
                vocab_size=MARK,
                token_dtype="u16",
                ds_prefetch_depth=0,
                sa_prefetch_depth=0,
                od_prefetch_depth=0,
            )

    def __reduce__(self) -> tuple[Callable[..., InfiniGramIndex], tuple[str]]:
        again = partial(
            InfiniGramIndex,
            vocab_size=self.info.vocab_size,
            tokenizer=self.info.tokenizer,
            keep_bytes=self._keep_bytes,
        )
        return again, (str(self.path),)

    def close(self) -> None:
        """Let go of the engine and the files; what is asked afterwards raises."""
        super().close()
        self._engine = self._shards = self._places = None  # type: ignore[assignment]

    def verify(self) -> None:
        """Look at every token and suffix, and compare the engine's counts of some ids with the corpus.

        Raises:
            UserError: the first thing that is wrong.
        """
        shards = self._opened()
        shards.verify()
        if (self.path / HEADER).exists() and shards.identity() != self.info.corpus:
            raise UserError(f"{self.path}: damaged (it holds another corpus than {HEADER} names); build it again.")
        counts = np.zeros(MARK + 1, np.int64)
        for shard in shards.shards:
            for part in _parts(shard.tokens):
                counts += np.bincount(part, minlength=MARK + 1)
        occurring = np.flatnonzero(counts[:MARK])
        for token in occurring[:: max(1, len(occurring) // _COMPARED)].tolist():
            if self._count([token]).value != counts[token]:
                raise UserError(f"{self.path}: the engine counts the id {token} wrongly; build the index again.")

    def _opened(self) -> Shards:
        self._open()
        assert self._shards is not None
        return self._shards

    def _count(self, ngram: list[int]) -> Count:
        if not ngram:
            return Count(self._opened().n_tokens)  # the engine counts marks too
        return Count(int(self._asked(self._engine.count, ngram)["count"]))

    def _asked(self, method: Callable[[list[int]], dict[str, Any]], ids: list[int]) -> dict[str, Any]:
        reply = method(ids)
        if "error" in reply:
            raise UserError(f"{self.path}: infini-gram refuses {ids!s:.60} ({reply['error']}).")
        return reply

    def _found(self, ids: list[int]) -> list[tuple[Shard, range]]:
        """The suffixes of each shard that begin with a sequence."""
        segments = self._asked(self._engine.find, ids)["segment_by_shard"]
        return [(shard, range(*segment)) for shard, segment in zip(self._opened().shards, segments, strict=True)]

    def _next(self, context: list[int], limit: int | None) -> NextTokens:
        counts = np.zeros(MARK + 1, np.int64)
        for shard, ranks in self._found(context):
            for part in _parts(ranks):
                at = shard.places(part.start, part.stop) + len(context)
                counts += np.bincount(shard.tokens[at[at < len(shard.tokens)]], minlength=MARK + 1)
        found = {token: int(counts[token]) for token in np.flatnonzero(counts[:MARK]).tolist()}
        return most_frequent(found, limit, Count(sum(found.values())))

    def _together(self, a: list[int], b: list[int], window: int | None, unit: str) -> Count:
        places = [self._places.get(str(ids).encode(), partial(self._find, ids)) for ids in (a, b)]
        return Count(together(*places, same=a == b, window=window, unit=unit))

    def _find(self, ids: list[int]) -> Places:
        """Where a sequence occurs, all shards laid end to end."""
        shards = self._opened()
        found = zip(shards.bases, self._found(ids), strict=False)
        at = np.concatenate([base + shard.places(ranks.start, ranks.stop) for base, (shard, ranks) in found])
        return Places(np.sort(at).astype(np.int32), shards.ends)


def build_infini_gram(
    documents: Iterable[Any], out: str | os.PathLike[str], *, vocab_size: int, tokenizer: str, cpus: int = 1
) -> InfiniGramIndex:
    """Build an index of documents by the package's indexer, verify it, and open it.

    Args:
        documents: sequences of token ids; empty ones are allowed.  They are read once, one after the other.
        out: the directory to make; it must not exist, or be empty.
        vocab_size: ids are below this, at most 65,535.
        tokenizer: identity of the tokenizer that the ids are of.
        cpus: how many parts may be sorted at once; fewer are where they would be too small.

    Raises:
        UserError: the package is not installed; ids that are none, no token at all, a place that cannot be written to; or
            the indexer fails, or writes what is wrong.
    """
    _package()
    vocab_size, cpus = _vocabulary(vocab_size), checked_positive(cpus, "cpus")
    target = Path(out).absolute()
    with appears_whole(target) as folder:
        _write(documents, folder, vocab_size)
        _sort(folder, cpus)
        said = {"vocab_size": vocab_size, "tokenizer": tokenizer, "corpus": Shards.open(folder).identity()}
        (folder / HEADER).write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
        with closing(InfiniGramIndex(folder)) as index:
            index.verify()
    return InfiniGramIndex(target)


def _write(documents: Iterable[Any], folder: Path, vocab_size: int) -> None:
    """Write the tokens and the offsets, so that the indexer has only to sort."""
    offsets, at = [], 0
    with (folder / "tokenized.0").open("wb") as file:
        for number, document in enumerate(documents):
            ids = checked_array(document, vocab_size, f"document {number}")
            offsets.append(at)
            at += file.write(np.concatenate([[MARK], ids]).astype("<u2").tobytes())
    if at == 2 * len(offsets):
        raise UserError(f"documents: there is no token in {len(offsets)} of them; give at least one.")
    np.array(offsets, "<u8").tofile(folder / "offset.0")


def _sort(folder: Path, cpus: int) -> None:
    """Have the indexer write the table."""
    size = (folder / "tokenized.0").stat().st_size
    most_files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    options = {
        "token_dtype": "u16",
        "cpus": max(1, min(cpus, size // _LEAST_PART)),
        "mem": 4,
        "ulimit": 1024 if most_files == resource.RLIM_INFINITY else min(1024, most_files),
    }
    with plain_folder(folder) as plain, tempfile.TemporaryDirectory() as nothing:
        given = {"data_dir": nothing, "save_dir": plain, "temp_dir": plain, **options}
        command = [sys.executable, "-m", "infini_gram.indexing"]
        command += [part for name, value in given.items() for part in (f"--{name}", str(value))]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode or not (folder / "table.0").exists():
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        raise UserError(f"{folder}: infini-gram's indexer failed ({' '.join(last):.200}); is there room and memory?")


def _beside(folder: Path) -> dict[str, Any]:
    """What `build_infini_gram` wrote beside the package's files; empty where there is nothing."""
    try:
        found = json.loads((folder / HEADER).read_bytes())
        return {"vocab_size": int(found["vocab_size"]), "tokenizer": found["tokenizer"], "corpus": found["corpus"]}
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{folder / HEADER}: damaged; build the index again.") from None


def _vocabulary(vocab_size: Any) -> int:
    size = checked_positive(vocab_size, "vocab_size")
    if size > MARK:
        raise UserError(f"vocab_size {size}: infini-gram takes at most {MARK} ids; build an embedded index.")
    return size


def _parts(row: Any) -> Iterator[Any]:
    return (row[at : at + CHUNK] for at in range(0, len(row), CHUNK))


def _package() -> Any:
    try:
        from infini_gram.engine import InfiniGramEngine
    except ImportError:
        raise UserError(
            "infini-gram is not installed; pip install 'reasoninterp[infini-gram]' "
            "(Linux on x86_64 or macOS), or build an embedded index."
        ) from None
    return InfiniGramEngine
