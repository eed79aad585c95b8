"""The files of an embedded index, and how damaged or foreign ones are told from whole ones.

```
header.json    format, version, sizes, dtypes, identities of tokenizer and corpus, sha256 of the files and of itself
text.bin       the corpus in one row of symbols: token t as t + 1, and 0 after the last token of every document;
               unsigned and big-endian, 1, 2 or 4 bytes wide, so that the order of bytes is the order of ids
suffixes.bin   int32: where each suffix of that row begins, in the order of the suffixes (a suffix array)
starts.bin     int32: for each symbol, how many suffixes begin with a smaller one (one more entry than symbols)
ends.bin       int32: where the 0 of each document stands, in order
tokenizer/     the tokenizer, where the index was built from text
```

1. Everything is mapped into memory and read only, so that several processes share one copy.
2. Opening looks at the header, whose own hash must be right, at the files' sizes, and at some 256 suffixes spread over
   the suffix array: each must lie in the text and begin with the symbol that stands there.  `verify.py` reads everything.
3. Suffixes are counted by signed 32-bit integers and sorted as bytes, so that a text has at most 2³¹ − 1 bytes.

Suffix arrays: Manber and Myers (1993), "Suffix arrays: a new method for on-line string searches".
"""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32, UInt

from reasoninterp.errors import UserError
from reasoninterp.memorization.corpus.interface import CorpusInfo

FORMAT, VERSION = "reasoninterp corpus index", 1
HEADER, TOKENIZER = "header.json", "tokenizer"
MOST_BYTES = 2**31 - 1
MOST_IDS = 2**24  # every vocabulary there is; `starts.bin` grows with it
CHUNK = 2**22  # entries that are looked at together where a whole file is read
_LOOKED_AT = 256

Symbols = UInt[np.ndarray, " symbols"]


@dataclass(frozen=True)
class Header:
    """What stands in `header.json`; `sha256` are the hashes of the files by name."""

    vocab_size: int
    n_tokens: int
    n_docs: int
    tokenizer: str
    corpus: str
    sha256: Mapping[str, str]

    @property
    def n_symbols(self) -> int:
        """Symbols of the text, which is also the number of suffixes."""
        return self.n_tokens + self.n_docs

    @property
    def dtypes(self) -> dict[str, str]:
        """The dtype of each file."""
        return {
            "text.bin": symbol_dtype(self.vocab_size),
            "suffixes.bin": "<i4",
            "starts.bin": "<i4",
            "ends.bin": "<i4",
        }

    @property
    def sizes(self) -> dict[str, int]:
        """The bytes of each file."""
        entries = {"text.bin": self.n_symbols, "suffixes.bin": self.n_symbols}
        entries |= {"starts.bin": self.vocab_size + 2, "ends.bin": self.n_docs}
        return {name: n * np.dtype(self.dtypes[name]).itemsize for name, n in entries.items()}

    @property
    def info(self) -> CorpusInfo:
        """The same for users of the index."""
        return CorpusInfo(self.n_tokens, self.n_docs, self.vocab_size, self.tokenizer, self.corpus)

    @property
    def digest(self) -> str:
        """Hash of everything the header says."""
        return hashlib.sha256(json.dumps(self._content(), sort_keys=True).encode()).hexdigest()

    def write(self, folder: Path) -> None:
        """Write `header.json`."""
        text = json.dumps({**self._content(), "digest": self.digest}, indent=2, ensure_ascii=False)
        (folder / HEADER).write_text(text + "\n", encoding="utf-8")

    def _content(self) -> dict[str, Any]:
        return {"format": FORMAT, "version": VERSION, "dtypes": self.dtypes, "bytes": self.sizes, **asdict(self)}


def symbol_dtype(vocab_size: int) -> str:
    """The dtype of a text: the narrowest that holds every id + 1."""
    return next(dtype for dtype, most in ((">u1", 2**8), (">u2", 2**16), (">u4", 2**32)) if vocab_size < most)


def read_header(folder: Path) -> Header:
    """The header of an index.

    Raises:
        UserError: there is none, it is of another version or damaged, or this machine stores numbers in another order.
    """
    where = folder / HEADER
    try:
        found = json.loads(where.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder}: no corpus index here ({HEADER} is missing); build one there first.") from None
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({error.strerror}); check its permissions.") from None
    except ValueError:
        raise UserError(f"{where}: damaged (no JSON); build the index again.") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise UserError(f"{where}: not the header of a corpus index; give a directory that `corpus build` made.")
    if found.get("version") != VERSION:
        raise UserError(
            f"{where}: written in version {found.get('version')!r} of the format, and this kit reads {VERSION}; "
            "build the index again."
        )
    try:
        header = Header(**{name: found[name] for name in Header.__dataclass_fields__})
        whole = found == {**header._content(), "digest": header.digest}
    except (KeyError, TypeError, ValueError, StopIteration):
        whole = False
    if not whole:
        raise UserError(f"{where}: damaged (its own checksum is wrong); build the index again.")
    if np.dtype("<i4") != np.dtype(np.int32):
        raise UserError(
            f"{folder}: this machine stores numbers big-endian, which the index does not; build it elsewhere."
        )
    return header


@dataclass(frozen=True)
class Files:
    """The files of an index, mapped into memory; `symbols` is `text` as numbers."""

    folder: Path
    header: Header
    text: mmap.mmap
    symbols: Symbols
    suffixes: Int32[np.ndarray, " symbols"]
    starts: Int32[np.ndarray, " vocabulary_and_ends"]
    ends: Int32[np.ndarray, " documents"]

    @classmethod
    def open(cls, folder: Path) -> Files:
        """Map the files of an index.

        Raises:
            UserError: there is none, a file is missing or has the wrong size, or suffixes do not fit the text.
        """
        header = read_header(folder)
        maps = {name: _mapped(folder / name, size) for name, size in header.sizes.items()}
        arrays = {name: np.frombuffer(found, dtype=header.dtypes[name]) for name, found in maps.items()}
        suffixes = arrays["suffixes.bin"]
        files = cls(
            folder, header, maps["text.bin"], arrays["text.bin"], suffixes, arrays["starts.bin"], arrays["ends.bin"]
        )
        at = np.linspace(0, len(suffixes) - 1, min(_LOOKED_AT, len(suffixes))).astype(np.int64)
        looked_at = suffixes[at]
        if looked_at.min() < 0 or looked_at.max() >= len(suffixes):
            raise files.damaged("suffixes.bin", "an entry lies outside of the text")
        first = files.symbols[looked_at].astype(np.int64)
        if first.max() > header.vocab_size or np.any((at < files.starts[first]) | (at >= files.starts[first + 1])):
            raise UserError(f"{folder}: damaged (its files do not fit together); build the index again.")
        return files

    def damaged(self, name: str, what: str) -> UserError:
        """The error that says that a file is not what was built."""
        return UserError(f"{self.folder / name}: damaged ({what}); build the index again.")


def _mapped(path: Path, size: int) -> mmap.mmap:
    """A file, mapped to be read."""
    try:
        with path.open("rb") as file:
            found = file.seek(0, 2)
            if found != size:
                raise UserError(f"{path}: damaged ({found} bytes instead of {size}); build the index again.")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise UserError(f"{path}: missing from the index; build the index again.") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check its permissions.") from None


def hash_of(path: Path) -> str:
    """The sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def canonical(symbols: Symbols) -> bytes:
    """Symbols as bytes that do not depend on how wide they are stored: what a corpus' identity is the hash of."""
    return symbols.astype(">u4").tobytes()


def identity_of(hexdigest: str) -> str:
    """An identity from a sha256: its first 16 digits."""
    return hexdigest[:16]
