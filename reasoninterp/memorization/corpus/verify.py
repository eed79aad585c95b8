"""Is an index what its corpus makes of it?  Some sequences counted directly, or every entry of every file.

The suffix array is right exactly if

1. it holds every place of the text once, and
2. for each two neighbours a, b in it: the symbol at a is smaller than that at b, or they are equal and the suffix that
   begins one symbol after a stands before that after b (the one beyond the end of the text stands before all),

which takes one pass and 4 bytes of memory a symbol.

Source of 2: Burkhardt and Kärkkäinen (2003), "Fast lightweight suffix array construction and checking".
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from reasoninterp.memorization.corpus.files import CHUNK, Files, Symbols, canonical, hash_of, identity_of

_LONGEST = 6  # tokens of a sequence that is counted directly


def verify_files(files: Files) -> list[str]:
    """Read every file of an index whole; returns what was found in order, a line each.

    Raises:
        UserError: names the first file that is not what was built, and what is wrong with it.
    """
    header = files.header
    for name, digest in header.sha256.items():
        if hash_of(files.folder / name) != digest:
            raise files.damaged(name, "its checksum is wrong")
    lines = [f"the checksums of {len(header.sha256)} files"]
    _check_tables(files)
    lines.append(f"{header.n_tokens} tokens in {header.n_docs} documents, and their hash")
    _check_order(files)
    return [*lines, f"the order of {header.n_symbols} suffixes"]


def _check_tables(files: Files) -> None:
    """The text, the places of its documents' ends, and how many suffixes begin with each symbol."""
    header = files.header
    counts = np.zeros(header.vocab_size + 1, np.int64)
    corpus, n_ends = hashlib.sha256(), 0
    for at, part in _parts(files.symbols):
        if int(part.max()) > header.vocab_size:
            raise files.damaged("text.bin", "an id lies beyond the vocabulary")
        counts += np.bincount(part.astype(np.int64), minlength=len(counts))
        corpus.update(canonical(part))
        ends = at + np.flatnonzero(part == 0)
        if not np.array_equal(files.ends[n_ends : n_ends + len(ends)], ends):
            raise files.damaged("ends.bin", "documents end elsewhere")
        n_ends += len(ends)
    if n_ends != header.n_docs or files.symbols[-1] != 0:
        raise files.damaged("text.bin", "it does not hold the documents that the header tells of")
    if not np.array_equal(files.starts, np.concatenate([[0], np.cumsum(counts)])):
        raise files.damaged("starts.bin", "it does not fit the text")
    if identity_of(corpus.hexdigest()) != header.corpus:
        raise files.damaged("text.bin", "its ids are not those that the header names")


def _check_order(files: Files) -> None:
    suffixes, symbols = files.suffixes, files.symbols
    fault = order_fault(len(suffixes), lambda at, end: suffixes[at:end], lambda place: symbols[place].astype(np.int64))
    if fault:
        raise files.damaged("suffixes.bin", fault)


def order_fault(n: int, places: Callable[[int, int], np.ndarray], symbols: Callable[[np.ndarray], np.ndarray]) -> str:
    """What is wrong with a suffix array, by steps 1 and 2 of the module; "" if nothing is.

    Args:
        n: suffixes.
        places: where those begin that stand from one rank up to another.
        symbols: of the text at places, as numbers in their order.
    """
    rank = np.full(n + 1, -1, np.int32)  # of the suffix that begins at each place
    for at in range(0, n, CHUNK):
        part = places(at, min(at + CHUNK, n))
        if part.min() < 0 or part.max() >= n:
            return "an entry lies outside of the text"
        rank[part] = np.arange(at, at + len(part), dtype=np.int32)
    if rank[:-1].min() < 0:
        return "a place of the text is missing"
    for at in range(0, n, CHUNK):
        part = places(at, min(at + CHUNK + 1, n))
        first, after = symbols(part), rank[part + 1]
        if np.any((first[:-1] > first[1:]) | ((first[:-1] == first[1:]) & (after[:-1] >= after[1:]))):
            return "suffixes are out of order"
    return ""


def drawn_sequences(files: Files, n: int, seed: int) -> list[list[int]]:
    """Symbols of `n` sequences of up to six tokens from the text, and as many in which the last token is another one."""
    rng = np.random.default_rng(seed)
    out = []
    for place in rng.integers(0, files.header.n_symbols, size=n).tolist():
        end = int(files.ends[np.searchsorted(files.ends, place)])
        length = min(int(rng.integers(1, _LONGEST + 1)), end - place)
        if length:
            taken = files.symbols[place : place + length].tolist()
            out += [taken, [*taken[:-1], int(rng.integers(1, files.header.vocab_size + 1))]]
    return out


def scan_counts(symbols: Symbols, sequences: Sequence[Sequence[int]]) -> list[int]:
    """Occurrences of sequences of symbols in a text, by looking at every place of it."""
    longest = max(map(len, sequences), default=0)
    # Only equality is asked for, so the bytes need not be turned round: the sequences' are instead.
    native = symbols.dtype.newbyteorder("=")
    wanted = [np.asarray(s, dtype=symbols.dtype).view(native) for s in sequences]
    counts = [0] * len(wanted)
    for at, part in _parts(symbols.view(native), overlap=longest - 1):
        n_here = min(CHUNK, len(symbols) - at)
        for k, sequence in enumerate(wanted):
            places = np.flatnonzero(part[: min(n_here, len(part) - len(sequence) + 1)] == sequence[0])
            for offset, symbol in enumerate(sequence[1:], start=1):
                places = places[part[places + offset] == symbol]
            counts[k] += len(places)
    return counts


def _parts(array: np.ndarray, overlap: int = 0) -> Iterator[tuple[int, np.ndarray]]:
    """(where it begins, part) of an array; parts share `overlap` entries with the next one."""
    for at in range(0, len(array), CHUNK):
        yield at, array[at : at + CHUNK + overlap]
