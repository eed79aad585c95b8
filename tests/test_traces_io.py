"""Trace files: what is written is read back, and what is wrong gets one sentence that names file and line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from reasoninterp.errors import UserError
from reasoninterp.traces.io import TraceFile, read_traces, write_traces
from reasoninterp.traces.trace import Format, Trace

FIXTURES = Path(__file__).parent / "fixtures"
GOOD = {"id": "a", "question": "q", "steps": ["s"], "answer": "1"}


def write(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows) + "\n", encoding="utf-8")
    return path


def test_the_fixture_as_read_by_hand() -> None:
    found = read_traces(FIXTURES / "traces_small.jsonl")
    assert [t.id for t in found] == ["t1", "t2"]
    assert found.traces[0].text == "2 + 3, then times 4?\n\n2 + 3 = 5\n5 * 4 = 20\nA: 20\n"
    assert found.traces[1].text == "Ist 7 ungerade? ü☃\n\n7 ist ungerade 🙂 => ja\n"
    assert found.pairs == {"t1": (("2 + 3 = 6", "6 * 4 = 24"), "24")}
    assert found.traces[1].meta == {"mind": "hand"}
    assert len(found.digest) == 64


def test_written_and_read_again_is_the_same(tmp_path: Path) -> None:
    first = read_traces(FIXTURES / "traces_small.jsonl")
    out = tmp_path / "new" / "out.jsonl"
    write_traces(out, first.traces, first.pairs, first.format)
    second = read_traces(out)
    assert second.traces == first.traces and second.pairs == first.pairs and second.format == first.format
    assert [p.name for p in out.parent.iterdir()] == ["out.jsonl"], "no temporary file is left"


def test_the_callers_format_wins_over_the_files() -> None:
    found = read_traces(FIXTURES / "traces_small.jsonl", format=Format("<", "|", "&", ">", ""))
    assert found.traces[1].text == "<Ist 7 ungerade? ü☃|7 ist ungerade 🙂>ja"


def test_head_keeps_the_pairs_of_what_it_keeps() -> None:
    found = read_traces(FIXTURES / "traces_small.jsonl")
    assert len(found.head(1)) == 1 and set(found.head(1).pairs) == {"t1"}
    assert len(found.head(None)) == 2 and TraceFile.of(found.traces).traces == found.traces


def test_windows_line_ends_a_byte_order_mark_and_blank_lines_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "w.jsonl"
    path.write_bytes(
        b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n\r\n" + json.dumps({**GOOD, "id": "b"}).encode()
    )
    assert [t.id for t in read_traces(path)] == ["a", "b"]


WRONG = {
    "malformed": ([GOOD, '{"id": "b",'], r"line 2: malformed JSON"),
    "no steps": ([{**GOOD, "steps": []}], r"line 1: 'steps' is empty"),
    "blank step": ([{**GOOD, "steps": ["a", " "]}], r"line 1: steps\[1\] is blank"),
    "step type": ([{**GOOD, "steps": ["a", 2]}], r"steps\[1\] must be a string, not a number"),
    "steps type": ([{**GOOD, "steps": "a"}], r"'steps' must be a list"),
    "missing key": ([{k: v for k, v in GOOD.items() if k != "answer"}], r"line 1: the key 'answer' is missing"),
    "answer type": ([{**GOOD, "answer": 18}], r"'answer' must be a string, not a number"),
    "empty answer": ([{**GOOD, "answer": " "}], r"the answer is empty"),
    "id type": ([{**GOOD, "id": None}], r"'id' must be a string, not null"),
    "twice": ([GOOD, GOOD], r"line 2: the id 'a' was used on line 1"),
    "unknown key": ([{**GOOD, "corupt_steps": ["x"]}], r"unknown key 'corupt_steps'"),
    "half a pair": ([{**GOOD, "corrupt_steps": ["x"]}], r"'corrupt_steps' without 'corrupt_answer'"),
    "other half": ([{**GOOD, "corrupt_answer": "x"}], r"'corrupt_answer' without 'corrupt_steps'"),
    "format key": ([{"format": {"sep": "x"}}, GOOD], r"line 1: unknown format key 'sep'"),
    "format type": ([{"format": {"before_answer": 1}}, GOOD], r"line 1: format key 'before_answer' must be a string"),
    "format list": ([{"format": []}, GOOD], r"line 1: 'format' must be an object"),
    "late format": ([GOOD, {"format": {}}], r"line 2: the format line must be the first"),
    "only format": ([{"format": {}}], r"no trace"),
    "no object": (["[1]"], r"line 1: expected a JSON object, found a list"),
    "meta": ([{**GOOD, "meta": 3}], r"'meta' must be an object"),
    "deep": (["[" * 100000], r"line 1: "),
    "huge number": (['{"id": ' + "9" * 5000 + "}"], r"line 1: "),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_line_is_named(name: str, tmp_path: Path) -> None:
    rows, message = WRONG[name]
    path = write(tmp_path / "bad.jsonl", *rows)
    with pytest.raises(UserError, match=message) as caught:
        read_traces(path)
    assert "bad.jsonl" in str(caught.value) and "\n" not in str(caught.value)


def test_a_wrong_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text(" \n")
    (tmp_path / "latin").write_bytes(b'{"id": 1}\n{"id": "\xe9"}')
    for name, message in {
        "absent": "no such file",
        "empty": "is empty",
        ".": "is a directory",
        "latin": "line 2: not UTF-8",
    }.items():
        with pytest.raises(UserError, match=message):
            read_traces(tmp_path / name)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", GOOD)
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"'b'.*cannot be written as JSON"):
        write_traces(path, [Trace("b", "q", ("s",), "1", meta={"x": {1, 2}})])
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(UserError, match="cannot be written"):
        write_traces(path / "below", [Trace("b", "q", ("s",), "1")])
    with pytest.raises(UserError, match="directory"):
        write_traces(tmp_path, [Trace("b", "q", ("s",), "1")])
