"""The files of an infini-gram index, and whether the engine may be let near them.

```
tokenized.S   shard S of the corpus: before each document the mark 65,535, then its ids, little-endian 16-bit integers
offset.S      uint64: the byte at which each document's mark stands
table.S       the suffix array: the byte at which each suffix begins, in as few bytes as the last one needs, in the order of
              the suffixes' *bytes* (so 256 comes before 1)
```

The engine (2.6.0) trusts what it is given.  Cut or foreign files end its process or make every count 0; so does a path in
which it finds one of the words by which it tells files apart ("table" in "stable").  So:

1. `Shards.open` looks at sizes, at every offset, at the marks in the first tokens (which tell 8 and 32-bit ids from ours)
   and at some of the suffixes, and that they are in order.
2. `verify` looks at all of it, by the same two conditions as `verify.py`.
3. `links` and `plain_folder` give the engine and its indexer paths that they can take.

Source: the package's code and documentation (github.com/liujch1998/infini-gram).
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
from jaxtyping import Int32, Int64, UInt8, UInt16, UInt64

from reasoninterp.errors import UserError
from reasoninterp.memorization.corpus.files import CHUNK, canonical, identity_of
from reasoninterp.memorization.corpus.verify import order_fault

MARK = 65_535  # before each document; so ids are below it
_MOST_TOKENS = 2**31 - 1  # with marks; as many as fit signed 32-bit places
_WORDS = ("tokenized", "table", "offset", "metadata", "metaoff", "unigram")
_LOOKED_AT = 256  # suffixes per shard
_DEPTH = 64  # tokens of them


@dataclass(frozen=True)
class Shard:
    """One shard: its files' ending, its tokens with marks, its documents' offsets, its table one row a suffix."""

    name: str
    folder: Path
    tokens: UInt16[np.ndarray, " tokens"]
    offsets: UInt64[np.ndarray, " documents"]
    table: UInt8[np.ndarray, "tokens width"]

    @classmethod
    def open(cls, folder: Path, name: str) -> Shard:
        """Map a shard's files and look at them (step 1 of the module).

        Raises:
            UserError: a file is missing, of a size that does not fit, or holds what cannot be.
        """
        tokens = _mapped(folder / f"tokenized.{name}", "<u2")
        offsets = _mapped(folder / f"offset.{name}", "<u8")
        table = _mapped(folder / f"table.{name}", "u1")
        width = -(-(2 * len(tokens) - 1).bit_length() // 8)  # bytes of the last place
        if len(table) != width * len(tokens):
            raise _damaged(folder, f"table.{name}", f"{len(table)} bytes instead of {width * len(tokens)}")
        shard = cls(name, folder, tokens, offsets, table.reshape(len(tokens), width))
        shard._look()
        return shard

    def places(self, start: int, stop: int) -> Int64[np.ndarray, " suffixes"]:
        """Where suffixes begin, in tokens, for ranks from `start` up to `stop`, in the table's order.

        Raises:
            UserError: one does not begin at a token.
        """
        rows = np.zeros((stop - start, 8), np.uint8)
        rows[:, : self.table.shape[1]] = self.table[start:stop]
        at = rows.view("<u8")[:, 0]
        if len(at) and (at.max() >= 2 * len(self.tokens) or np.any(at % 2)):
            raise self.damaged("table", "a suffix does not begin at a token")
        return (at // 2).astype(np.int64)

    def damaged(self, kind: str, what: str) -> UserError:
        """The error that says that a file is not what it should be."""
        return _damaged(self.folder, f"{kind}.{self.name}", what)

    def _look(self) -> None:
        offsets, n = self.offsets, len(self.tokens)
        if offsets[0] != 0 or np.any(offsets[1:] <= offsets[:-1]) or np.any(offsets % 2) or offsets[-1] >= 2 * n:
            raise self.damaged("offset", "documents do not begin one after the other")
        starts = np.flatnonzero(self.tokens[:CHUNK] == MARK)
        if not np.array_equal(starts, offsets[: np.searchsorted(offsets, 2 * CHUNK)] // 2):
            raise self.damaged("tokenized", "documents do not begin where offset says; are its ids of 16 bits?")
        ranks = np.linspace(0, n - 1, min(_LOOKED_AT, n)).astype(np.int64)
        at = np.concatenate([self.places(rank, rank + 1) for rank in ranks.tolist()]).tolist()
        begin = [self.tokens[place : place + _DEPTH].tobytes() for place in at]
        if any(a > b for a, b in pairwise(begin)):
            raise self.damaged("table", "suffixes are out of order")

    def verify(self) -> None:
        """Look at every token, document and suffix.

        Raises:
            UserError: the first thing that is wrong.
        """
        n = len(self.tokens)
        marks = np.concatenate([at + np.flatnonzero(self.tokens[at : at + CHUNK] == MARK) for at in range(0, n, CHUNK)])
        if not np.array_equal(marks, self.offsets // 2):
            raise self.damaged("tokenized", "documents do not begin where offset says")
        fault = order_fault(n, self.places, lambda place: self.tokens[place].byteswap())
        if fault:
            raise self.damaged("table", fault)


@dataclass(frozen=True)
class Shards:
    """All shards of an index, in the engine's order."""

    folder: Path
    shards: tuple[Shard, ...]

    @classmethod
    def open(cls, folder: Path) -> Shards:
        """Map an index's files and look at them.

        Raises:
            UserError: there is no index, or one that the engine should not be given.
        """
        # The engine's order: names as strings, so shard 10 before shard 2.
        names = sorted(path.name.removeprefix("tokenized.") for path in folder.glob("tokenized.*"))
        if not names:
            raise UserError(f"{folder}: no infini-gram index here (tokenized.0 is missing); build one there first.")
        shards = cls(folder, tuple(Shard.open(folder, name) for name in names))
        if shards.n_tokens + shards.n_docs > _MOST_TOKENS:
            raise UserError(
                f"{folder}: more than {_MOST_TOKENS} tokens; count by the web API or in parts of the corpus."
            )
        return shards

    @property
    def n_docs(self) -> int:
        """Documents."""
        return sum(len(shard.offsets) for shard in self.shards)

    @property
    def n_tokens(self) -> int:
        """Tokens without marks."""
        return sum(len(shard.tokens) for shard in self.shards) - self.n_docs

    @cached_property
    def bases(self) -> list[int]:
        """The place at which each shard begins where all are laid end to end."""
        return np.cumsum([0, *(len(shard.tokens) for shard in self.shards)]).tolist()

    @cached_property
    def ends(self) -> Int32[np.ndarray, " documents"]:
        """The place after the last token of each document, where all shards are laid end to end."""
        begins = [base + shard.offsets // 2 for base, shard in zip(self.bases, self.shards, strict=False)]
        return np.append(np.concatenate(begins)[1:], self.bases[-1]).astype(np.int32)

    def identity(self) -> str:
        """The identity of the corpus, the same as that of an embedded index of it."""
        digest = hashlib.sha256()
        for shard in self.shards:
            # The embedded index has a document's mark after it, as 0, and each id one higher; 65,535 + 1 is 0 in 16 bits.
            for at in range(1, len(shard.tokens), CHUNK):
                digest.update(canonical(shard.tokens[at : at + CHUNK] + np.uint16(1)))
            digest.update(canonical(np.zeros(1, np.uint16)))
        return identity_of(digest.hexdigest())

    def verify(self) -> None:
        """`Shard.verify` of each."""
        for shard in self.shards:
            shard.verify()

    @contextmanager
    def links(self) -> Iterator[str]:
        """A directory for the engine, with nothing in it but its files; what it has opened outlives it."""
        with tempfile.TemporaryDirectory(prefix="corpus-") as folder:
            for shard in self.shards:
                for kind in ("tokenized", "table", "offset"):
                    (Path(folder) / f"{kind}.{shard.name}").symlink_to(self.folder.resolve() / f"{kind}.{shard.name}")
            yield _plain(folder)


@contextmanager
def plain_folder(folder: Path) -> Iterator[str]:
    """Another path to a directory, one that the indexer's shell and its search for words can take."""
    with tempfile.TemporaryDirectory(prefix="corpus-") as temporary:
        link = Path(temporary) / "index"
        link.symlink_to(folder.resolve(), target_is_directory=True)
        yield _plain(str(link))


def _plain(path: str) -> str:
    if not re.fullmatch(r"[\w./-]+", path, re.ASCII) or any(word in path for word in _WORDS):
        raise UserError(
            f"{path}: infini-gram cannot work in a directory for temporary files with such a name "
            f"(spaces, or one of {', '.join(_WORDS)}); set TMPDIR to another one."
        )
    return path


def _mapped(path: Path, dtype: str) -> np.ndarray:
    """A file as a row of numbers, mapped to be read."""
    width = np.dtype(dtype).itemsize
    try:
        size = path.stat().st_size
        if not size or size % width:
            raise _damaged(path.parent, path.name, f"{size} bytes are no row of {8 * width}-bit integers")
        return np.asarray(np.memmap(path, dtype=dtype, mode="r"))
    except FileNotFoundError:
        raise UserError(f"{path}: missing from the index; build the index again.") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check its permissions.") from None


def _damaged(folder: Path, name: str, what: str) -> UserError:
    return UserError(f"{folder / name}: damaged ({what}); build the index again.")
