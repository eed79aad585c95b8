"""Trace files: JSON Lines in, JSON Lines out, and one clear sentence for every way in which a file can be wrong.

One line a trace: `{"id", "question", "steps": [...], "answer"}`, optionally `"corrupt_steps"` with
`"corrupt_answer"` (a pair for patching), `"meta"` (an object) and `"format"` (strings that replace the file's format
for this trace alone).  The first line may be `{"format": {...}}`.  How the format of a trace is found, strongest first:

1. the format that the caller gives (`--format`),
2. the trace's own `"format"`, which need not name all five strings,
3. the file's first line,
4. the `gsm8k` preset, which is also the default of `Format`.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reasoninterp.errors import UserError
from reasoninterp.traces.trace import Format, Trace

_REQUIRED = ("id", "question", "steps", "answer")
_OPTIONAL = ("corrupt_steps", "corrupt_answer", "meta", "format")

Pair = tuple[tuple[str, ...], str]
"""The corrupt steps and the corrupt answer of a trace."""


@dataclass(frozen=True)
class TraceFile:
    """Traces of one source, with the corrupt chains that came along.

    Attributes:
        traces: in file order; ids are unique.
        pairs: trace id → (corrupt steps, corrupt answer), for the traces that have one.
        format: the format of the file (a single trace may have its own, in `trace.format`).
        path: where it was read, or "<memory>".
        digest: sha256 of the file's bytes (in memory: of the traces), for a run's manifest.
    """

    traces: tuple[Trace, ...]
    pairs: Mapping[str, Pair] = field(default_factory=dict)
    format: Format = field(default_factory=Format)
    path: str = "<memory>"
    digest: str = ""

    @classmethod
    def of(cls, traces: Sequence[Trace], pairs: Mapping[str, Pair] | None = None) -> TraceFile:
        """Traces that are already in memory; the format is the first trace's."""
        found = hashlib.sha256("".join(t.digest() for t in traces).encode())
        fmt = traces[0].format if traces else Format()
        return cls(tuple(traces), dict(pairs or {}), fmt, digest=found.hexdigest())

    def __len__(self) -> int:
        return len(self.traces)

    def __iter__(self) -> Iterator[Trace]:
        return iter(self.traces)

    def head(self, n: int | None) -> TraceFile:
        """The first `n` traces (all of them for None); digest and path stay the file's."""
        if n is None or n >= len(self.traces):
            return self
        kept = self.traces[:n]
        ids = {t.id for t in kept}
        return TraceFile(kept, {k: v for k, v in self.pairs.items() if k in ids}, self.format, self.path, self.digest)


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a UTF-8 file.

    Raises:
        UserError: it is missing, a directory, unreadable, not UTF-8, or empty.
    """
    where = Path(path)
    if where.is_dir():
        raise UserError(f"{where}: this is a directory; give the file itself.")
    try:
        raw = where.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{where}: there is no such file; check the path.") from None
    except OSError as problem:
        raise UserError(f"{where}: cannot be read ({problem.strerror}); check its permissions.") from None
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        line = raw[: problem.start].count(b"\n") + 1
        raise UserError(f"{where}, line {line}: not UTF-8 text; save the file as UTF-8.") from None
    if not text.strip():
        raise UserError(f"{where}: the file is empty; write at least one line into it.")
    return text


def iter_json_lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, Any]]:
    """(line number from 1, value) of every line that is not blank.

    Raises:
        UserError: as `read_text`, or malformed JSON, with the line's number.
    """
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except json.JSONDecodeError as problem:
            raise UserError(
                f"{path}, line {number}: malformed JSON ({problem.msg} at column {problem.colno}); "
                "write one JSON object a line."
            ) from None
        except (RecursionError, ValueError) as problem:
            raise UserError(f"{path}, line {number}: JSON that cannot be read ({problem}); shorten it.") from None


def read_traces(path: str | os.PathLike[str], *, format: Format | None = None) -> TraceFile:
    """Read a trace file.

    Args:
        path: a JSON Lines file.
        format: replaces every format that the file states.

    Raises:
        UserError: anything wrong with the file, with its line.
    """
    traces: list[Trace] = []
    pairs: dict[str, Pair] = {}
    lines: dict[str, int] = {}
    file_format = Format()
    seen_any = False
    for number, value in iter_json_lines(path):
        where = f"{path}, line {number}"
        if not isinstance(value, dict):
            raise UserError(f"{where}: expected a JSON object, found {_kind(value)}.")
        if set(value) == {"format"}:
            if seen_any:
                raise UserError(f"{where}: the format line must be the first line of the file.")
            file_format = _format(value["format"], where, Format())
            seen_any = True
            continue
        seen_any = True
        trace, pair = _trace(value, where, file_format, format)
        if trace.id in lines:
            raise UserError(f"{where}: the id {trace.id!r} was used on line {lines[trace.id]}; ids must be unique.")
        lines[trace.id] = number
        traces.append(trace)
        if pair is not None:
            pairs[trace.id] = pair
    if not traces:
        raise UserError(f"{path}: there is a format line but no trace; add at least one.")
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    return TraceFile(tuple(traces), pairs, format or file_format, str(path), digest)


def _trace(value: dict[str, Any], where: str, default: Format, forced: Format | None) -> tuple[Trace, Pair | None]:
    """One line as a trace and its pair."""
    for key in _REQUIRED:
        if key not in value:
            raise UserError(f"{where}: the key {key!r} is missing; a trace has {', '.join(_REQUIRED)}.")
    unknown = sorted(set(value) - {*_REQUIRED, *_OPTIONAL})
    if unknown:
        raise UserError(f"{where}: unknown key {unknown[0]!r}; put what is not part of a trace into 'meta'.")
    for key in ("id", "question", "answer"):
        _string(value, key, where)
    if not value["id"]:
        raise UserError(f"{where}: the id is empty; give every trace an id of its own.")
    steps = _steps(value, "steps", where)
    meta = value.get("meta", {})
    if not isinstance(meta, dict):
        raise UserError(f"{where}: 'meta' must be an object, not {_kind(meta)}.")
    if not value["answer"].strip() and meta.get("answer_status") not in ("missing", "unclosed"):
        raise UserError(f"{where}: the answer is empty; write the answer that the steps lead to.")
    pair: Pair | None = None
    if "corrupt_steps" in value or "corrupt_answer" in value:
        for have, lack in (("corrupt_steps", "corrupt_answer"), ("corrupt_answer", "corrupt_steps")):
            if lack not in value:
                raise UserError(f"{where}: {have!r} without {lack!r}; give both or neither.")
        _string(value, "corrupt_answer", where)
        if not value["corrupt_answer"].strip():
            raise UserError(f"{where}: 'corrupt_answer' is empty; write the answer that the corrupt steps lead to.")
        pair = (_steps(value, "corrupt_steps", where), value["corrupt_answer"])
    fmt = forced or (_format(value["format"], where, default) if "format" in value else default)
    return Trace(value["id"], value["question"], steps, value["answer"], fmt, meta), pair


def _string(value: Mapping[str, Any], key: str, where: str) -> None:
    if not isinstance(value[key], str):
        raise UserError(f"{where}: {key!r} must be a string, not {_kind(value[key])}; put it in quotes.")


def _steps(value: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
    steps = value[key]
    if not isinstance(steps, list):
        raise UserError(f"{where}: {key!r} must be a list of strings, not {_kind(steps)}.")
    if not steps:
        raise UserError(f"{where}: {key!r} is empty; a trace needs at least one step.")
    for i, step in enumerate(steps):
        if not isinstance(step, str):
            raise UserError(f"{where}: {key}[{i}] must be a string, not {_kind(step)}.")
        if not step.strip():
            raise UserError(f"{where}: {key}[{i}] is blank; leave it out or write the step.")
    return tuple(steps)


def _format(value: Any, where: str, base: Format) -> Format:
    if not isinstance(value, dict):
        raise UserError(f"{where}: 'format' must be an object of strings, not {_kind(value)}.")
    Format.from_json(value, where)
    return Format(**{**base.to_json(), **value})


def _kind(value: Any) -> str:
    """What JSON calls this value."""
    names = {bool: "true or false", int: "a number", float: "a number", str: "a string", list: "a list"}
    return "null" if value is None else names.get(type(value), "an object")


def write_traces(
    path: str | os.PathLike[str],
    traces: Sequence[Trace],
    pairs: Mapping[str, Pair] | None = None,
    format: Format | None = None,
) -> None:
    """Write a trace file whole or not at all (a temporary file beside it, then a rename).

    The first line states the format (default: the first trace's); a trace whose format differs states its own.

    Raises:
        UserError: the place cannot be written, or a trace's meta is not JSON.
    """
    fmt = format or (traces[0].format if traces else Format())
    lines = [json.dumps({"format": fmt.to_json()}, ensure_ascii=False)]
    for trace in traces:
        row: dict[str, Any] = {
            "id": trace.id,
            "question": trace.question,
            "steps": list(trace.steps),
            "answer": trace.answer,
        }
        if pairs and trace.id in pairs:
            row["corrupt_steps"], row["corrupt_answer"] = list(pairs[trace.id][0]), pairs[trace.id][1]
        if trace.format != fmt:
            own, shared = trace.format.to_json(), fmt.to_json()
            row["format"] = {k: v for k, v in own.items() if v != shared[k]}
        if trace.meta:
            row["meta"] = dict(trace.meta)
        try:
            lines.append(json.dumps(row, ensure_ascii=False, allow_nan=False))
        except (TypeError, ValueError) as problem:
            raise UserError(f"trace {trace.id!r}: its meta cannot be written as JSON ({problem}).") from None
    write_whole(path, "\n".join(lines) + "\n")


def write_whole(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` so that a reader sees the old file or the new one, never half of it.

    Raises:
        UserError: the directory cannot be made or written, or `path` is a directory.
    """
    where = Path(path)
    if where.is_dir():
        raise UserError(f"{where}: this is a directory; give a file name to write.")
    temporary = None
    try:
        where.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{where.name}.", dir=where.parent)
        with os.fdopen(handle, "w", encoding="utf-8", errors="surrogatepass", newline="\n") as out:
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, where)
    except OSError as problem:
        raise UserError(f"{where}: cannot be written ({problem.strerror}); choose another place.") from None
    finally:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)


def _umask() -> int:
    """The process's file mode mask; `mkstemp` ignores it, a user expects it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
