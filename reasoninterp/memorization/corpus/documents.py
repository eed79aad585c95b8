"""Documents of a corpus from files: texts, fields of JSON Lines, or the kit's traces; read and encoded as they come.

1. A file of JSON Lines of which fields are named: each line is a document, its fields joined.
2. Another `.jsonl` file: the kit's traces, each a document, its text as its format joins it.
3. Any other file: UTF-8 text, one document as a whole, or each line that is not blank.

Texts are encoded some thousand at a time, without the marks that a tokenizer puts around a text.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from reasoninterp.errors import UserError
from reasoninterp.memorization.corpus.build import build_index
from reasoninterp.memorization.corpus.embedded import EmbeddedIndex
from reasoninterp.memorization.corpus.files import TOKENIZER
from reasoninterp.memorization.corpus.tokenizer import tokenizer_identity
from reasoninterp.traces.io import read_text, read_traces

_MOST_TEXTS, _MOST_CHARACTERS = 4096, 2**21


def read_documents(
    path: str | os.PathLike[str], *, fields: Sequence[str] = (), join: str = "\n", by_line: bool = False
) -> Iterator[str]:
    """The documents of a file, one after the other.

    Args:
        path: a file of JSON Lines, of traces, or of text.
        fields: fields of each line of JSON whose strings make up a document.
        join: what stands between them.
        by_line: whether each line of a text is a document, rather than the whole of it.

    Raises:
        UserError: anything wrong with the file, with its line.
    """
    if fields:
        for number, line in _lines(path):
            yield join.join(_fields(line, fields, f"{path}, line {number}"))
    elif Path(path).suffix == ".jsonl":
        try:
            traces = read_traces(path)
        except UserError as error:
            said = str(error).rstrip(".")
            raise UserError(f"{said}; of JSON Lines that are no traces, name the fields to read (--field).") from None
        for trace in traces:
            yield trace.text
    elif by_line:
        for _, line in _lines(path):
            yield line
    else:
        yield read_text(path)


def encode_documents(texts: Iterable[str], tokenizer: Any) -> Iterator[list[int]]:
    """Token ids of each of many texts, some thousand at a time."""
    batch: list[str] = []
    n_characters = 0
    for text in texts:
        batch.append(text)
        n_characters += len(text)
        if len(batch) >= _MOST_TEXTS or n_characters >= _MOST_CHARACTERS:
            yield from encode_texts(batch, tokenizer)
            batch, n_characters = [], 0
    if batch:
        yield from encode_texts(batch, tokenizer)


def encode_texts(texts: list[str], tokenizer: Any) -> list[list[int]]:
    """Token ids of each text, without special tokens around it."""
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    ids: list[list[int]] = encoded["input_ids"]
    return ids


def build_from_texts(texts: Iterable[str], out: str | os.PathLike[str], tokenizer: Any) -> EmbeddedIndex:
    """Build an index of texts; the tokenizer is saved in it.

    Args:
        texts: the documents.
        out: the directory to make.
        tokenizer: a fast Hugging Face tokenizer.

    Raises:
        UserError: as `build.build_index`, or the tokenizer is not a fast one.
    """
    return build_index(
        encode_documents(texts, tokenizer),
        out,
        vocab_size=len(tokenizer),
        tokenizer=tokenizer_identity(tokenizer),
        beside=lambda folder: tokenizer.save_pretrained(str(folder / TOKENIZER)),
    )


def _lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, str]]:
    """(line number from 1, line without its end) of every line of a UTF-8 file that is not blank."""
    try:
        with Path(path).open(encoding="utf-8-sig", newline="\n") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line.rstrip("\r\n")
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file; check the path.") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text; save the file as UTF-8.") from None
    except OSError as problem:
        raise UserError(f"{path}: cannot be read ({problem.strerror}); give a file that can be.") from None


def _fields(line: str, fields: Sequence[str], where: str) -> list[str]:
    """The strings of a line's fields."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as problem:
        raise UserError(f"{where}: malformed JSON ({problem}); write one JSON object a line.") from None
    if not isinstance(value, dict):
        raise UserError(f"{where}: no JSON object; write one a line.")
    for name in fields:
        if not isinstance(value.get(name), str):
            raise UserError(f"{where}: there is no string in the field {name!r}; name fields that every line has.")
    return [value[name] for name in fields]
