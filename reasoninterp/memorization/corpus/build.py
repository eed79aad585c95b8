"""Build an embedded index: documents of ids in, a checked directory out, or nothing.

1. The documents are written one after the other as symbols (`files.py`); of the corpus, only a row of ends and a count of
   each id stay in memory.
2. The suffixes of the text's bytes are sorted (`pydivsufsort`), and those are kept that begin where a symbol does: symbols
   have a fixed width and their highest byte first, so the order of the bytes is the order of the symbols.  This is what
   needs memory: 4 bytes for each byte of the text, so 0.8 GB for 100 million tokens of two bytes.
3. Some sequences are counted by the index and by looking at every place of the text.
4. The directory gets its name (`whole.py`).

Sorting: Yuta Mori's libdivsufsort; Fischer and Kurpicz (2017), "Dismantling DivSufSort", describe the algorithm.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path
from typing import IO, Any

import numpy as np

from reasoninterp.errors import UserError
from reasoninterp.memorization.corpus.checks import checked_array, checked_positive
from reasoninterp.memorization.corpus.embedded import EmbeddedIndex
from reasoninterp.memorization.corpus.files import (
    CHUNK,
    MOST_BYTES,
    MOST_IDS,
    Files,
    Header,
    canonical,
    hash_of,
    identity_of,
    symbol_dtype,
)
from reasoninterp.memorization.corpus.verify import drawn_sequences, scan_counts
from reasoninterp.memorization.corpus.whole import appears_whole

_DRAWN = 16  # sequences that are counted directly, and as many that differ in their last token


def build_index(
    documents: Iterable[Any],
    out: str | os.PathLike[str],
    *,
    vocab_size: int,
    tokenizer: str,
    beside: Callable[[Path], object] | None = None,
    seed: int = 0,
) -> EmbeddedIndex:
    """Build an index of documents and open it.

    Args:
        documents: sequences of token ids; empty ones are allowed.  They are read once, one after the other.
        out: the directory to make; it must not exist, or be empty.
        vocab_size: ids are below this, at most 2²⁴.
        tokenizer: identity of the tokenizer that the ids are of.
        beside: writes further files into the directory before it gets its name.
        seed: of the sequences that are counted directly.

    Raises:
        UserError: ids that are none, no token at all, more than fits, a place that cannot be written to or where another
            process is building, or an index that counts wrongly.
    """
    vocab_size = checked_positive(vocab_size, "vocab_size")
    if vocab_size > MOST_IDS:
        raise UserError(f"vocab_size {vocab_size}: an index takes vocabularies of at most {MOST_IDS} ids.")
    if not isinstance(tokenizer, str) or not tokenizer:
        raise UserError("tokenizer: give the identity of the tokenizer that the ids are of, as a string.")
    target = Path(out).absolute()
    with appears_whole(target) as folder:
        header = _write(documents, folder, vocab_size, tokenizer)
        if beside is not None:
            beside(folder)
        header.write(folder)
        with closing(EmbeddedIndex(folder)) as index:
            check_counts(index, seed)
    return EmbeddedIndex(target)


def check_counts(index: EmbeddedIndex, seed: int = 0) -> int:
    """Count some sequences by the index and directly; returns how many.

    Raises:
        UserError: the counts differ.
    """
    files = Files.open(index.path)
    sequences = drawn_sequences(files, _DRAWN, seed)
    for sequence, n in zip(sequences, scan_counts(files.symbols, sequences), strict=True):
        ids = [symbol - 1 for symbol in sequence]
        found = index.count(ids).value
        if found != n:
            raise UserError(
                f"{index.path}: the index counts {ids} {found} times, and it occurs {n} times; build it again."
            )
    return len(sequences)


def _write(documents: Iterable[Any], folder: Path, vocab_size: int, tokenizer: str) -> Header:
    """Write the files of an index, without its header."""
    writer = _Text(folder / "text.bin", vocab_size)
    with closing(writer):
        for number, document in enumerate(documents):
            writer.add(checked_array(document, vocab_size, f"document {number}"))
    n_docs = len(writer.ends)
    n_tokens = writer.n_symbols - n_docs
    if not n_tokens:
        raise UserError(f"documents: there is no token in {n_docs} of them; give at least one.")
    np.frombuffer(writer.ends, dtype="<i4").tofile(folder / "ends.bin")
    np.concatenate([[0], np.cumsum(writer.counts)]).astype("<i4").tofile(folder / "starts.bin")
    _sort(folder / "text.bin", folder / "suffixes.bin", writer.dtype.itemsize)
    names = ("text.bin", "suffixes.bin", "starts.bin", "ends.bin")
    return Header(
        vocab_size=vocab_size,
        n_tokens=n_tokens,
        n_docs=n_docs,
        tokenizer=tokenizer,
        corpus=identity_of(writer.corpus.hexdigest()),
        sha256={name: hash_of(folder / name) for name in names},
    )


class _Text:
    """The text being written, many documents at a time."""

    def __init__(self, path: Path, vocab_size: int) -> None:
        self.dtype = np.dtype(symbol_dtype(vocab_size))
        self.counts = np.zeros(vocab_size + 1, np.int64)
        self.ends = array("i")
        self.n_symbols = 0
        self.corpus = hashlib.sha256()
        self._file: IO[bytes] = path.open("wb")
        self._waiting, self._n_waiting = np.zeros(CHUNK, self.dtype), 0

    def add(self, ids: np.ndarray) -> None:
        """One document."""
        n = len(ids) + 1
        if (self.n_symbols + n) * self.dtype.itemsize > MOST_BYTES:
            raise UserError(
                f"documents: more than {MOST_BYTES // self.dtype.itemsize} tokens and ends of documents, which is what an "
                f"index holds at {self.dtype.itemsize} bytes a token; build several indexes of parts of the corpus."
            )
        self.n_symbols += n
        self.ends.append(self.n_symbols - 1)
        if self._n_waiting + n > len(self._waiting):
            self._write()
        if n > len(self._waiting):
            self._waiting = np.zeros(n, self.dtype)
        symbols = self._waiting[self._n_waiting : self._n_waiting + n]
        symbols[:-1] = ids  # before 1 is added: the ids' own type may be too narrow for it
        symbols[:-1] += 1
        symbols[-1] = 0
        self._n_waiting += n

    def close(self) -> None:
        """Write what is waiting."""
        self._write()
        self._file.close()

    def _write(self) -> None:
        symbols = self._waiting[: self._n_waiting]
        self.counts += np.bincount(symbols, minlength=len(self.counts))
        self.corpus.update(canonical(symbols))
        self._file.write(symbols.tobytes())
        self._n_waiting = 0


def _sort(text: Path, out: Path, width: int) -> None:
    """Sort the suffixes of a text and write where they begin, in symbols."""
    from pydivsufsort import divsufsort

    # A private copy, of which no page is ever written: the library wants memory that it could write to.
    letters = np.memmap(text, np.uint8, mode="c")
    try:
        order = divsufsort(letters)
    except MemoryError:
        need = 4 * len(letters) / 1e9
        raise UserError(f"documents: sorting takes {need:.1f} GB of memory, which is not there; give fewer.") from None
    shift = width.bit_length() - 1
    with out.open("wb") as file:
        for at in range(0, len(order), CHUNK):
            part = order[at : at + CHUNK]
            file.write((part[part & (width - 1) == 0] >> shift).astype("<i4").tobytes())
