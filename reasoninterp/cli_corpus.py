"""The commands `corpus build|count|verify`: an index of a corpus, what stands in it, and whether it is whole."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from reasoninterp.errors import UserError

if TYPE_CHECKING:
    from reasoninterp.memorization.corpus.embedded import EmbeddedIndex


_PARALLEL = "TOKENIZERS_PARALLELISM"


def add_to(group: click.Group) -> None:
    """Add the commands to a group."""

    @group.group()
    def corpus() -> None:
        """Exact counts of token sequences in a corpus."""

    @corpus.command("build")
    @click.argument("files", nargs=-1, required=True)
    @click.option("--tokenizer", required=True, help="Directory or hub id of the tokenizer; it is saved in the index.")
    @click.option("--out", required=True, help="Directory to make.")
    @click.option(
        "--field",
        "fields",
        multiple=True,
        help="FILES are JSON Lines: a document is this field (repeat to join several).",
    )
    @click.option("--join", default="\n", help="What stands between the fields; default: a line's end.")
    @click.option("--by-line", is_flag=True, help="Each line of a text is a document, rather than each file.")
    @click.option("--json", "as_json", is_flag=True, help="One line of JSON.")
    @click.option("--quiet", is_flag=True, help="No progress bar.")
    def build(files: tuple[str, ...], tokenizer: str, out: str, as_json: bool, quiet: bool, **how: Any) -> None:
        """Build an index of FILES: texts, JSON Lines of which --field names what is read, or traces (.jsonl)."""
        for file in files:  # before the first one is read: a long build should not end at the last one's name
            if not Path(file).is_file():
                raise UserError(f"{file}: there is no such file; check the path.")
        say(build_lines(files, tokenizer, out, quiet, **how), as_json)

    @corpus.command("count")
    @click.option("--index", required=True, help="Directory of the index.")
    @click.option("--text", help="Text to count, encoded as the corpus was: a blank before a word matters.")
    @click.option("--ids", help="Token ids to count, as 1,2,3.")
    @click.option("--next", "n_next", type=click.IntRange(1), help="Also the N most frequent tokens that follow.")
    @click.option("--tokenizer", help="Directory of the tokenizer; default: the one saved in the index.")
    @click.option("--json", "as_json", is_flag=True, help="One line of JSON.")
    def count(
        index: str, text: str | None, ids: str | None, n_next: int | None, tokenizer: str | None, as_json: bool
    ) -> None:
        """How often a sequence of tokens occurs, and what follows it."""
        if (text is None) == (ids is None):
            raise UserError("corpus count: give either --text or --ids.")
        found = count_found(index, text, ids, n_next, tokenizer)
        if as_json:
            click.echo(json.dumps(found, ensure_ascii=False))
        else:
            for line in count_lines(found):
                click.echo(line)

    @corpus.command("verify")
    @click.argument("index")
    @click.option("--json", "as_json", is_flag=True, help="One line of JSON.")
    def verify(index: str, as_json: bool) -> None:
        """Read an index whole: checksums, documents, and the order of all suffixes."""
        from reasoninterp.memorization.corpus.embedded import EmbeddedIndex

        with contextlib.closing(EmbeddedIndex(index)) as opened:
            checked = opened.verify()
            found = summary(opened) | {"in order": checked if as_json else "; ".join(checked)}
        say(found, as_json)


def say(found: dict[str, Any], as_json: bool) -> None:
    """A line a fact, or all in one line of JSON."""
    if as_json:
        click.echo(json.dumps(found, ensure_ascii=False))
        return
    for name, value in found.items():
        click.echo(f"{name:<12}{value:,}" if isinstance(value, int) else f"{name:<12}{value}")


def summary(index: EmbeddedIndex) -> dict[str, Any]:
    """What an index was made from."""
    info = index.info
    facts: dict[str, Any] = {"index": str(index.path), "documents": info.n_docs, "tokens": info.n_tokens}
    return facts | {"vocabulary": info.vocab_size, "tokenizer": info.tokenizer, "corpus": info.corpus}


def build_lines(
    files: tuple[str, ...], tokenizer: str, out: str, quiet: bool, fields: tuple[str, ...], join: str, by_line: bool
) -> dict[str, Any]:
    """Build an index and say what was made."""
    from tqdm import tqdm

    from reasoninterp.memorization.corpus.documents import build_from_texts, read_documents
    from reasoninterp.memorization.corpus.tokenizer import load_tokenizer

    def texts() -> Iterator[str]:
        with tqdm(desc="documents", unit="", disable=quiet or None) as bar:
            for file in files:
                for text in read_documents(file, fields=fields, join=join, by_line=by_line):
                    bar.update()
                    yield text

    loaded, began = load_tokenizer(tokenizer), time.perf_counter()
    with _threads(), contextlib.closing(build_from_texts(texts(), out, loaded)) as index:
        size = sum(path.stat().st_size for path in index.path.rglob("*") if path.is_file())
        return summary(index) | {"bytes": size, "seconds": round(time.perf_counter() - began, 1)}


@contextlib.contextmanager
def _threads() -> Iterator[None]:
    """The tokenizer may use its threads inside: no process is forked there."""
    before = os.environ.get(_PARALLEL, "false")
    os.environ[_PARALLEL] = "true"
    try:
        yield
    finally:
        os.environ[_PARALLEL] = before


def count_found(
    path: str, text: str | None, ids: str | None, n_next: int | None, tokenizer: str | None
) -> dict[str, Any]:
    """The counts that were asked for.

    Args:
        path: the index's directory.
        text: what is counted, or None.
        ids: what is counted, as 1,2,3, or None.
        n_next: how many of the tokens that follow, or None.
        tokenizer: its directory; None for the one in the index.
    """
    from reasoninterp.memorization.corpus.embedded import EmbeddedIndex

    with contextlib.closing(EmbeddedIndex(path)) as index:
        loaded = None
        if text is not None or tokenizer is not None:
            loaded = _tokenizer(index, tokenizer)
        if text is not None:
            from reasoninterp.memorization.corpus.documents import encode_texts

            (wanted,) = encode_texts([text], loaded)
        else:
            wanted = _parsed(ids or "")
        found: dict[str, Any] = {"ids": wanted, "count": index.count(wanted).value}
        if text is not None and loaded is not None and loaded.unk_token_id in wanted:
            words = f"{wanted.count(loaded.unk_token_id)} of {len(wanted)} tokens"
            found["note"] = (
                f"{words} are {loaded.unk_token}: the tokenizer does not know the words, and counts any such."
            )
        if loaded is not None:
            found["tokens"] = [loaded.decode([one]) for one in wanted]
        if n_next is not None:
            following = index.next_token_counts(wanted, n_next)
            rows = [{"id": one, "count": n} for one, n in following.counts.items()]
            if loaded is not None:
                rows = [row | {"token": loaded.decode([row["id"]])} for row in rows]
            found |= {"followed": following.total.value, "next": rows}
    return found


def count_lines(found: dict[str, Any]) -> list[str]:
    """The counts as a table."""
    said = " ".join(map(repr, found.get("tokens", []))) or "-"
    lines = [
        f"{'count':>12}  {'ids':<24}  tokens",
        f"{found['count']:>12,}  {' '.join(map(str, found['ids'])):<24}  {said}",
    ]
    if "note" in found:
        lines.append(found["note"])
    if "next" in found:
        lines.append(f"followed by a token {found['followed']:,} times:")
        for row in found["next"]:
            token = repr(row["token"]) if "token" in row else "-"
            lines.append(f"{row['count']:>12,}  {row['id']:<24}  {token}")
    return lines


def _tokenizer(index: EmbeddedIndex, path: str | None) -> Any:
    """The index's tokenizer."""
    from reasoninterp.memorization.corpus.files import TOKENIZER
    from reasoninterp.memorization.corpus.tokenizer import check_tokenizer, load_tokenizer

    saved = index.path / TOKENIZER
    if path is None and not saved.is_dir():
        raise UserError(f"{index.path}: the index was built from ids and has no tokenizer; give --tokenizer or --ids.")
    loaded = load_tokenizer(path or saved)
    check_tokenizer(index.info, loaded, str(path or saved))
    return loaded


def _parsed(ids: str) -> list[int]:
    try:
        return [int(part) for part in ids.replace(",", " ").split()]
    except ValueError:
        raise UserError(f"--ids {ids!r}: give whole numbers with commas between, as 1,2,3.") from None
