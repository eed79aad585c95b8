"""A run's directory: what it refuses, what survives a kill, and that files are whole or not there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from reasoninterp.errors import UserError
from reasoninterp.runs import Run, Shard, write_whole

ROOT = Path(__file__).resolve().parents[1]
IDENTITY = {"weights of base": "b0", "weights of tuned": "t0", "traces": "x"}


def python(code: str, *arguments: object) -> subprocess.Popen[str]:
    """Another process that has said a line: it stands where the test wants it."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        pipe.close()


def leftovers(path: Path) -> list[str]:
    """Every file below that is neither a lock nor a finished file."""
    return [p.name for p in path.rglob(".*") if p.name != ".lock"]


# ---------------------------------------------------------------------------------------------- opening


def test_a_new_directory_says_what_ran_where_and_how(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "run"
    run = Run.open(out, IDENTITY, {"limit": 3, "traces": Path("a.jsonl"), "minds": ("base", "tuned")})
    run.close()
    said = json.loads((out / "run.json").read_text())
    assert said["identity"] == IDENTITY
    assert said["arguments"] == {"limit": 3, "traces": "a.jsonl", "minds": ["base", "tuned"]}
    assert said["versions"]["python"].startswith("3.")
    assert said["versions"]["numpy"] == np.__version__
    assert said["hardware"]["cores"] >= 1
    assert said["hardware"]["memory_gib"] > 0
    assert {"machine", "system", "accelerator"} <= said["hardware"].keys()
    assert said["created"] <= said["updated"]


def test_a_run_is_taken_up_again_with_its_timings(tmp_path: Path) -> None:
    run = Run.open(tmp_path, IDENTITY, {"limit": 3})
    run.record(timings={"effect": {"seconds": 1.5}}, note="a")
    run.record(timings={"ledger": {"seconds": 2.0}}, note="b")
    run.close()
    again = Run.open(tmp_path, IDENTITY, {"limit": 4})
    assert again.manifest["timings"] == {"effect": {"seconds": 1.5}, "ledger": {"seconds": 2.0}}
    assert again.manifest["note"] == "b"
    assert again.manifest["arguments"] == {"limit": 4}
    assert again.manifest["created"] == run.manifest["created"]
    again.close()


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({**IDENTITY, "weights of tuned": "t1"}, r"\(weights of tuned differs\)"),
        ({**IDENTITY, "weights of tuned": "t1", "traces": "y"}, r"\(weights of tuned, traces differ\)"),
        ({**IDENTITY, "weights of third": "c"}, r"\(weights of third differs\)"),
        ({k: v for k, v in IDENTITY.items() if k != "traces"}, r"\(traces differs\)"),
    ],
)
def test_another_run_is_refused_by_what_differs(tmp_path: Path, other: dict[str, str], named: str) -> None:
    Run.open(tmp_path, IDENTITY).close()
    before = (tmp_path / "run.json").read_bytes()
    with pytest.raises(UserError, match=named):
        Run.open(tmp_path, other)
    assert (tmp_path / "run.json").read_bytes() == before
    Run.open(tmp_path, IDENTITY).close()  # the refusal keeps no lock


def test_a_foreign_directory_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="not empty and is no run"):
        Run.open(tmp_path, IDENTITY)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"created": 1', "not valid JSON"),
        (b"[1, 2]", "not a JSON object"),
        (b"\xff\xfe{", "not UTF-8"),
        (b'{"model": "of another kit"}', "none of a run"),
    ],
)
def test_a_foreign_manifest_is_refused_and_left_alone(tmp_path: Path, text: bytes, message: str) -> None:
    (tmp_path / "run.json").write_bytes(text)
    with pytest.raises(UserError, match=message):
        Run.open(tmp_path, {})
    assert (tmp_path / "run.json").read_bytes() == text


def test_a_file_is_refused_also_in_place_of_a_parent(tmp_path: Path) -> None:
    file = tmp_path / "out"
    file.write_text("mine")
    with pytest.raises(UserError, match="this is a file"):
        Run.open(file, IDENTITY)
    with pytest.raises(UserError, match=r"cannot write here \(Not a directory\)"):
        Run.open(file / "run", IDENTITY)
    assert file.read_text() == "mine"


HOLD = """
import sys
from reasoninterp.runs import Run
run = Run.open(sys.argv[1], {"weights of base": "b0", "weights of tuned": "t0", "traces": "x"})
print("ready", flush=True)
sys.stdin.read()
"""


def test_a_second_process_is_refused_until_the_first_has_gone(tmp_path: Path) -> None:
    other = python(HOLD, tmp_path)
    try:
        with pytest.raises(UserError, match="another process is writing"):
            Run.open(tmp_path, IDENTITY)
        assert Run.read(tmp_path).manifest["identity"] == IDENTITY  # reading needs no lock
    finally:
        kill(other)
    Run.open(tmp_path, IDENTITY).close()  # a lock of a killed process holds nobody up


def test_a_run_killed_before_its_first_manifest_is_taken_up(tmp_path: Path) -> None:
    code = """
import json, sys
from reasoninterp import runs
def stuck(*a, **k):
    print("ready", flush=True)
    sys.stdin.read()
real, json.dumps = json.dumps, lambda v, **k: stuck() if k.get("indent") else real(v, **k)
runs.Run.open(sys.argv[1], {})
"""
    kill(python(code, tmp_path))
    assert not (tmp_path / "run.json").exists()
    assert len(leftovers(tmp_path)) == 1  # else this test tests nothing
    Run.open(tmp_path, IDENTITY).close()
    assert leftovers(tmp_path) == []
    assert Run.read(tmp_path).manifest["identity"] == IDENTITY


def test_reading_wants_a_run_and_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"run\.json is missing"):
        Run.read(tmp_path)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------- whole files


def _fail(f: Any) -> None:
    f.write("half of the new")
    f.flush()
    raise RuntimeError("the disk is full")


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "report.html"
    write_whole(target, lambda f: f.write("old"))
    with pytest.raises(RuntimeError, match="disk is full"):
        write_whole(target, _fail)
    assert target.read_text() == "old"
    with pytest.raises(RuntimeError):
        write_whole(tmp_path / "new.html", _fail)
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    assert target.stat().st_mode & 0o777 == 0o644


def test_a_table_or_manifest_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run.open(tmp_path, IDENTITY)
    run.save_table("effect", pd.DataFrame({"value": [1.0]}))
    with pytest.raises(Exception, match="mixed"):
        run.save_table("effect", pd.DataFrame({"mixed": [1, "a", [2]]}))
    assert run.table("effect")["value"].tolist() == [1.0]
    before = (tmp_path / "run.json").read_bytes()
    monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(OSError("gone")))
    with pytest.raises(OSError, match="gone"):
        run.record(note="new")
    assert (tmp_path / "run.json").read_bytes() == before
    assert leftovers(tmp_path) == []
    run.close()


def test_a_process_killed_while_it_writes_leaves_the_old_table(tmp_path: Path) -> None:
    run = Run.open(tmp_path, IDENTITY)
    run.save_table("effect", pd.DataFrame({"value": [1.0, 2.0]}))
    run.close()
    code = """
import sys
from reasoninterp.runs import Run, write_whole
def half(f):
    f.write(b"PAR1 half of a table")
    f.flush()
    print("ready", flush=True)
    sys.stdin.read()
write_whole(Run.read(sys.argv[1]).path / "tables" / "effect.parquet", half, mode="wb")
"""
    kill(python(code, tmp_path))
    assert run.table("effect")["value"].tolist() == [1.0, 2.0]
    assert len(leftovers(tmp_path)) == 1
    Run.open(tmp_path, IDENTITY).close()
    assert leftovers(tmp_path) == []  # swept up by the next run
    assert run.table("effect")["value"].tolist() == [1.0, 2.0]


def test_tables_come_back_as_they_went_in(tmp_path: Path) -> None:
    run = Run.open(tmp_path, IDENTITY)
    frame = pd.DataFrame({"mind": ["base", "tuned"], "value": [0.1 + 0.2, np.nan], "steps": [["a", "b"], []]})
    assert not run.has_table("effect.rows")
    assert run.save_table("effect.rows", frame).name == "effect.rows.parquet"
    assert run.has_table("effect.rows")
    again = run.table("effect.rows")
    pd.testing.assert_frame_equal(again.drop(columns="steps"), frame.drop(columns="steps"), check_dtype=False)
    assert [list(s) for s in again["steps"]] == frame["steps"].tolist()
    with pytest.raises(UserError, match=r"nothing\.parquet: no such table"):
        run.table("nothing")
    run.drop_table("effect.rows")
    run.drop_table("effect.rows")
    assert not run.has_table("effect.rows")
    run.close()


def test_the_digest_of_a_studys_tables_follows_their_content(tmp_path: Path) -> None:
    run = Run.open(tmp_path, IDENTITY)
    none = run.table_digest("effect")
    run.save_table("effect", pd.DataFrame({"v": [1]}))
    one = run.table_digest("effect")
    run.save_table("effect.rows", pd.DataFrame({"v": [1]}))
    two = run.table_digest("effect")
    run.save_table("effect.rows", pd.DataFrame({"v": [2]}))
    three = run.table_digest("effect")
    assert len({none, one, two, three, run.table_digest("other")}) == 4  # `other` has none either
    run.save_table("effect.rows", pd.DataFrame({"v": [1]}))
    assert run.table_digest("effect") == two
    run.close()


def test_figures_are_png_and_svg_and_the_same_figure_is_the_same_file(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    run = Run.open(tmp_path, IDENTITY)

    def files() -> list[bytes]:
        figure = Figure(figsize=(2, 1))
        axes = figure.add_subplot(label="a")
        axes.plot([1, 3, 2])
        axes.fill_between([0, 1, 2], [0, 1, 0])  # clip paths have ids
        return [p.read_bytes() for p in run.save_figure("curve", figure)]

    png, svg = files()
    assert png.startswith(b"\x89PNG")
    assert int.from_bytes(png[16:20], "big") > 300  # 200 dpi
    assert b"<svg" in svg
    assert b"clip-path" in svg
    assert sorted(p.name for p in (tmp_path / "figures").iterdir()) == ["curve.png", "curve.svg"]
    assert files() == [png, svg]
    assert run.save_text("report.html", "é").read_text(encoding="utf-8") == "é"
    run.close()


# ---------------------------------------------------------------------------------------------- shards


def test_a_shard_keeps_rows_exactly(tmp_path: Path) -> None:
    shard = Shard(tmp_path / "s" / "k.jsonl")
    rows: dict[str, list[dict[str, Any]]] = {
        "a": [{"x": 0.1 + 0.2, "text": "é\n\u2028", "n": None}],
        "b": [],
        "c": [{"x": float("inf")}] * 2,
    }
    assert shard.append(rows, 1.0) == rows
    assert Shard(shard.path).read() == rows


def test_what_append_returns_is_what_is_read(tmp_path: Path) -> None:
    shard = Shard(tmp_path / "k.jsonl")
    raw = {"a": [{"f": np.float32(0.1), "t": (1, 2), "b": np.bool_(True), "v": np.arange(3), "n": np.float64("nan")}]}
    plain = shard.append(raw, 1.0)
    read = Shard(shard.path).read()
    assert repr(plain) == repr(read)
    assert plain["a"][0]["t"] == [1, 2]
    assert plain["a"][0]["v"] == [0, 1, 2]
    assert plain["a"][0]["f"] == float(np.float32(0.1)) != 0.1
    assert type(plain["a"][0]["f"]) is float


def test_what_has_no_place_in_a_table_is_refused_before_it_is_written(tmp_path: Path) -> None:
    shard = Shard(tmp_path / "k.jsonl")
    shard.append({"a": [{"x": 1}]}, 1.0)
    with pytest.raises(TypeError, match="holds a set"):
        shard.append({"b": [{"x": 1}], "c": [{"x": {1, 2}}]}, 1.0)
    assert shard.read() == {"a": [{"x": 1}]}


@pytest.mark.parametrize(
    "torn", ['{"cell": "c", "rows": [{"x"', '{"cell": "c", "rows": [], "seconds": 1}', "{", "\x00" * 9]
)
def test_a_line_without_its_end_is_cut_off_and_the_next_one_is_whole(tmp_path: Path, torn: str) -> None:
    shard = Shard(tmp_path / "k.jsonl")
    shard.append({"a": [{"x": 1}], "b": [{"x": 2}]}, 1.0)
    with shard.path.open("a") as f:
        f.write(torn)
    again = Shard(shard.path)
    assert again.read() == {"a": [{"x": 1}], "b": [{"x": 2}]}
    again.append({"c": [{"x": 3}]}, 1.0)
    assert list(Shard(shard.path).read()) == ["a", "b", "c"]


def test_a_shard_of_one_torn_line_is_empty(tmp_path: Path) -> None:
    (tmp_path / "k.jsonl").write_text('{"cell": "a"')
    assert Shard(tmp_path / "k.jsonl").read() == {}
    assert (tmp_path / "k.jsonl").stat().st_size == 0


def test_a_spoilt_line_is_named(tmp_path: Path) -> None:
    shard = Shard(tmp_path / "k.jsonl")
    shard.append({"a": []}, 1.0)
    with shard.path.open("a") as f:
        f.write("not a cell\n")
    with pytest.raises(UserError, match=r"k\.jsonl, line 2"):
        shard.read()


def test_shards_of_different_keys_are_different_files(tmp_path: Path) -> None:
    run = Run.open(tmp_path, IDENTITY)
    run.shard("effect", "k1").append({"a": [{"x": 1}]}, 1.0)
    assert run.shard("effect", "k2").read() == {}
    assert run.shard("other", "k1").read() == {}
    assert run.shard("effect", "k1").read() == {"a": [{"x": 1}]}
    run.close()
