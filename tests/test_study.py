"""How a study is run: what a cell's rows may depend on, what is measured again, and what a kill costs (nothing).

Contexts are fakes that count what is asked of them, so no network is needed.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pytest

from reasoninterp import keys as keys_module
from reasoninterp import study as study_module
from reasoninterp.errors import UserError
from reasoninterp.executors import ProcessExecutor, SerialExecutor, is_out_of_memory
from reasoninterp.keys import shard_key
from reasoninterp.running import Result, run_study
from reasoninterp.runs import Run
from reasoninterp.study import REGISTRY, Batch, Cell, Row, Study, load_module, studies_in

ROOT = Path(__file__).resolve().parents[1]


class FakeContext:
    """Minds × traces; keeps a log of what the runner and the studies did."""

    def __init__(self, n: int = 7, *, minds: Sequence[str] = ("base", "tuned"), seed: int = 0, size: int = 3) -> None:
        self.n, self.minds, self.seed, self.size = n, minds, seed, size
        self.weights = "w0"
        self.memory: int | None = None  # cells of a batch beyond which memory runs out
        self.error: Callable[[], BaseException] = MemoryError
        self.inside: list[Any] = []
        self.opened: list[Any] = []
        self.closed: list[Any] = []
        self.batches: list[list[str]] = []
        self.shrunk = 0
        self.run: Run | None = None

    def cells(self) -> Iterator[Cell]:
        for mind in self.minds:
            for i in range(self.n):
                yield Cell(key=f"{mind}/{i}", group=mind, labels={"mind": mind, "trace": f"t{i}"}, item=i)

    @contextmanager
    def open(self, group: Any) -> Iterator[None]:
        self.opened.append(group)
        self.inside.append(group)
        try:
            yield
        finally:
            self.inside.pop()
            self.closed.append(group)

    def identity(self) -> dict[str, Any]:
        return {"weights": self.weights}

    def batch_size(self, study: Study) -> int:
        return self.size

    def shrink(self) -> None:
        self.shrunk += 1

    def table(self, name: str) -> pd.DataFrame:
        assert self.run is not None
        return self.run.table(name)

    def note(self, batch: Batch) -> None:
        """What every fake study does first."""
        assert all(cell.group == batch.group for cell in batch)
        assert self.inside == ([] if batch.group == "" else [batch.group])
        self.batches.append([cell.key for cell in batch])
        if self.memory is not None and len(batch) > self.memory:
            raise self.error()

    @property
    def measured(self) -> list[str]:
        return [key for keys in self.batches for key in keys]


class Draws(Study):
    """Each cell's own random numbers; two rows a cell."""

    scale: float = 1.0

    def measure(self, context: Any, batch: Batch) -> Iterable[Row]:
        context.note(batch)
        for cell in reversed(batch):  # rows may come in any order
            rng = np.random.default_rng(cell.seed)
            for k in range(2):
                yield cell.row(k=k, value=self.scale * rng.normal(), size=np.float32(cell.item + 0.1))

    def summarise(self, rows: pd.DataFrame, context: Any) -> pd.DataFrame:
        return rows.groupby("mind", sort=False)["value"].mean().reset_index()


class Halving(Study):
    """Finds a threshold by bisection, one evaluation after the other."""

    top: int = 1000

    def search(self, context: Any, evaluate: Callable[..., list[list[Row]]]) -> None:
        low, high = 0, self.top
        while high - low > 1:
            middle = (low + high) // 2
            cells = [Cell(key=f"{m}/{middle}", group=m, labels={"mind": m}, item=middle) for m in context.minds]
            above = [rows[0]["above"] for rows in evaluate(*cells)]
            low, high = (low, middle) if all(above) else (middle, high)

    def measure(self, context: Any, batch: Batch) -> Iterable[Row]:
        context.note(batch)
        return [cell.row(at=cell.item, above=bool(cell.item > 617), noise=cell.seed) for cell in batch]

    def summarise(self, rows: pd.DataFrame, context: Any) -> pd.DataFrame:
        return rows.assign(at=rows["at"].where(rows["above"])).groupby("mind", sort=False)["at"].min().reset_index()


class Nested:
    class Inner(Draws):
        """A study that is not at the top of its file."""


def recipe() -> FakeContext:
    """A worker's own context."""
    return FakeContext()


@contextmanager
def opened(path: Path) -> Iterator[Run]:
    run = Run.open(path, {"weights": "w0"})
    try:
        yield run
    finally:
        run.close()


def go(path: Path, study: Study, context: FakeContext, **options: Any) -> Result:
    with opened(path) as run:
        context.run = run
        return run_study(study, context, run, quiet=True, **options)


def same(a: Result, b: Result) -> None:
    """Equal rows and tables, to the bit and the dtype."""
    assert len(a.rows) > 0
    pd.testing.assert_frame_equal(a.rows, b.rows, check_exact=True)
    assert list(a.tables) == list(b.tables)
    for name in a.tables:
        pd.testing.assert_frame_equal(a.tables[name], b.tables[name], check_exact=True)


def files(path: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in (path / "tables").iterdir()}


# ---------------------------------------------------------------------------------------------- rows and their order


def test_rows_come_in_the_order_of_cells_with_their_labels(tmp_path: Path) -> None:
    result = go(tmp_path, Draws(), FakeContext(3))
    assert list(result.rows["mind"]) == ["base"] * 6 + ["tuned"] * 6
    assert list(result.rows["trace"]) == ["t0", "t0", "t1", "t1", "t2", "t2"] * 2
    assert list(result.rows["k"]) == [0, 1] * 6
    assert list(result.rows.columns) == ["mind", "trace", "k", "value", "size"]
    assert (result.measured, result.reused) == (6, 0)
    assert result.rows["value"].nunique() == 12


class Backwards:
    """Measures the last batch first."""

    def run(self, work: Iterable[Batch], study: Study, context: Any) -> Iterator[tuple[Batch, list[Row], float]]:
        return SerialExecutor().run(reversed(list(work)), study, context)


@pytest.mark.parametrize("size", [0, 1, 2, 5, 100])
def test_nothing_depends_on_the_batch_size_or_the_order(tmp_path: Path, size: int) -> None:
    plain = go(tmp_path / "a", Draws(), FakeContext(size=3))
    context = FakeContext(size=size)
    same(go(tmp_path / "b", Draws(), context, executor=Backwards()), plain)
    assert context.batches[0][0].startswith("tuned")
    assert max(map(len, context.batches)) == min(max(1, size), 7)
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_cells_in_any_order_measure_the_same(tmp_path: Path) -> None:
    class Mixed(Draws):
        name = "draws"

        def cells(self, context: Any) -> Iterable[Cell]:
            return sorted(context.cells(), key=lambda c: hash((c.item * 7919) % 13))

    plain, mixed = go(tmp_path / "a", Draws(), FakeContext()), go(tmp_path / "b", Mixed(), FakeContext())
    assert list(mixed.rows["trace"]) != list(plain.rows["trace"])
    by = ["mind", "trace", "k"]
    left, right = (r.rows.sort_values(by, ignore_index=True) for r in (plain, mixed))
    pd.testing.assert_frame_equal(left, right, check_exact=True)


def test_the_seed_makes_the_table_and_so_does_the_studys_name(tmp_path: Path) -> None:
    class DrawsAgain(Draws):
        """The same under another name."""

    first = go(tmp_path / "a", Draws(), FakeContext(seed=1))
    same(first, go(tmp_path / "b", Draws(), FakeContext(seed=1)))
    for other in (
        go(tmp_path / "c", Draws(), FakeContext(seed=2)),
        go(tmp_path / "d", DrawsAgain(), FakeContext(seed=1)),
    ):
        assert not (other.rows["value"] == first.rows["value"]).any()


def test_other_processes_give_the_same_table(tmp_path: Path) -> None:
    serial = go(tmp_path / "a", Draws(scale=3.0), FakeContext())
    context = FakeContext(size=2)
    parallel = go(tmp_path / "b", Draws(scale=3.0), context, executor=ProcessExecutor(2, recipe))
    same(serial, parallel)
    assert context.batches == []  # nothing was measured here
    assert (parallel.measured, parallel.reused) == (14, 0)
    again = go(tmp_path / "b", Draws(scale=3.0), context, executor=ProcessExecutor(2, recipe))
    assert (again.measured, again.reused) == (0, 14)


def test_other_processes_run_nested_studies_and_searches(tmp_path: Path) -> None:
    nested = go(tmp_path / "a", Nested.Inner(), FakeContext(2), executor=ProcessExecutor(1, recipe))
    assert len(nested.rows) == 8
    here, there = FakeContext(), FakeContext()
    found = go(tmp_path / "b", Halving(top=3), there, executor=ProcessExecutor(1, recipe))
    assert list(found.rows["at"]) == [1, 1, 2, 2]
    assert there.batches == []
    same(found, go(tmp_path / "c", Halving(top=3), here))
    assert len(here.batches) == 4


def test_a_study_that_other_processes_cannot_import_is_refused(tmp_path: Path) -> None:
    class Local(Draws):
        """Defined in a function."""

    with pytest.raises(UserError, match="at the top of a file"):
        go(tmp_path, Local(), FakeContext(), executor=ProcessExecutor(1, recipe))


# ---------------------------------------------------------------------------------------------- killed and resumed

USER_FILE = '''
"""A user's file."""

import os
import sys

import numpy as np

from reasoninterp.study import Cell, Study


class Coins(Study):
    """Throws coins."""

    sides: int = 2

    def measure(self, context, batch):
        if os.environ.get("STOP_AT") in [cell.key for cell in batch]:
            print("ready", flush=True)
            sys.stdin.read()
        context.note(batch)
        for cell in batch:
            rng = np.random.default_rng(cell.seed)
            yield cell.row(side=rng.integers(self.sides), weight=np.float32(rng.normal()))


class Climb(Coins):
    """Climbs one step at a time."""

    def search(self, context, evaluate):
        height = 0.0
        for i in range(9):
            ((row,),) = evaluate(Cell(key=f"{i}/{height!r}", group="base", item=i))
            height += row["weight"]


def main(path):
    from tests.test_study import FakeContext, go
    from pathlib import Path
    return go(Path(path), globals()[os.environ["STUDY"]](), FakeContext(9, size=2))


if __name__ == "__main__":
    from reasoninterp.study import load_module
    load_module(__file__).main(sys.argv[1])
'''


def start_and_kill(file: Path, out: Path, study: str, stop_at: str) -> None:
    """Run a study in another process and kill it in the middle of a batch."""
    environment = {**os.environ, "STUDY": study, "STOP_AT": stop_at, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, str(file), str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL


@pytest.fixture
def user_file(tmp_path: Path) -> Path:
    file = tmp_path / "coins.py"
    file.write_text(USER_FILE)
    return file


def test_a_killed_and_resumed_run_equals_an_unbroken_one(tmp_path: Path, user_file: Path) -> None:
    coins = load_module(user_file).Coins
    start_and_kill(user_file, tmp_path / "killed", "Coins", stop_at="tuned/5")
    assert not (tmp_path / "killed" / "tables").exists()  # nothing unfinished looks finished
    (shard,) = (tmp_path / "killed" / "shards" / "coins").iterdir()
    with shard.open("a") as f:
        f.write('{"cell": "tuned/4", "rows": [{"mind": "tuned", "tra')  # and torn in the middle of a write, besides

    context = FakeContext(9, size=4)
    resumed = go(tmp_path / "killed", coins(), context)
    # Nine cells of base and the first four of tuned were whole.
    assert context.measured == [f"tuned/{i}" for i in range(4, 9)]
    assert (resumed.measured, resumed.reused) == (5, 13)
    assert context.opened == ["tuned"]

    unbroken = go(tmp_path / "unbroken", coins(), FakeContext(9, size=2))
    same(resumed, unbroken)
    assert files(tmp_path / "killed") == files(tmp_path / "unbroken")
    same(go(tmp_path / "killed", coins(), FakeContext(9)), unbroken)


def test_a_killed_search_evaluates_only_the_rest(tmp_path: Path, user_file: Path) -> None:
    climb = load_module(user_file).Climb
    unbroken = go(tmp_path / "unbroken", climb(), FakeContext())
    keys = [json.loads(line)["cell"] for line in next((tmp_path / "unbroken/shards/climb").iterdir()).open()]
    assert len(keys) == 9
    start_and_kill(user_file, tmp_path / "killed", "Climb", stop_at=keys[6])
    context = FakeContext()
    resumed = go(tmp_path / "killed", climb(), context)
    assert context.measured == keys[6:]
    assert (resumed.measured, resumed.reused) == (3, 6)
    same(resumed, unbroken)


def test_every_cell_that_was_finished_before_an_error_is_kept(tmp_path: Path) -> None:
    class Stopped(Draws):
        def measure(self, context: Any, batch: Batch) -> Iterable[Row]:
            if len(context.batches) == context.n:
                raise KeyboardInterrupt
            return super().measure(context, batch)

    first, rest = FakeContext(5, size=1), FakeContext(5, size=2)
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "broken", Stopped(), first)
    assert first.inside == []  # the mind was taken out
    resumed = go(tmp_path / "broken", Stopped(), rest)
    assert rest.measured == [f"tuned/{i}" for i in range(5)]
    unbroken = FakeContext(5, size=100)
    same(resumed, go(tmp_path / "unbroken", Stopped(), unbroken))


# ---------------------------------------------------------------------------------------------- what is a shard's key


def shards(path: Path, name: str) -> int:
    return len(list((path / "shards" / name).iterdir()))


def test_a_change_of_what_the_numbers_depend_on_takes_no_old_rows(tmp_path: Path) -> None:
    def measured(scale: float = 1.0, seed: int = 0, weights: str = "w0") -> int:
        context = FakeContext(2, seed=seed)
        context.weights = weights
        return go(tmp_path, Draws(scale=scale), context).measured

    assert [measured(), measured()] == [4, 0]
    assert [measured(scale=2.0), measured(seed=1), measured(weights="w1")] == [4, 4, 4]  # the identity has no seed here
    assert [measured(scale=2.0), measured(seed=1), measured(weights="w1"), measured()] == [0, 0, 0, 0]
    assert shards(tmp_path, "draws") == 4


def _variant(folder: Path, title: str, factor: int, version: str) -> type[Study]:
    """A study in a file of its own, whose code changes with the title and the factor."""
    file = folder / f"{title}{factor}{version}.py"
    file.write_text(f'''
from matplotlib.figure import Figure
from reasoninterp.study import Study

class Drawn(Study):
    version = "{version}"

    def measure(self, context, batch):
        context.note(batch)
        return [cell.row(value={factor} * cell.item) for cell in batch]

    def draw(self, summary):
        figure = Figure()
        figure.suptitle("{title}")
        return figure
''')
    (cls,) = studies_in(file)
    return cls


def test_a_change_of_draw_measures_nothing_again_if_there_is_a_version(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert go(out, _variant(tmp_path, "one", 2, "1")(), FakeContext()).measured == 14
    first = (out / "figures" / "drawn.svg").read_bytes()
    assert go(out, _variant(tmp_path, "two", 2, "1")(), FakeContext()).measured == 0
    assert (out / "figures" / "drawn.svg").read_bytes() != first
    assert (out / "figures" / "drawn.png").exists()
    changed = go(out, _variant(tmp_path, "two", 3, "2")(), FakeContext())
    assert changed.measured == 14
    assert changed.rows["value"].sum() == 2 * 3 * 21


def test_a_change_of_the_code_measures_again_if_there_is_none(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert go(out, _variant(tmp_path, "one", 2, "")(), FakeContext()).measured == 14
    changed = go(out, _variant(tmp_path, "one", 3, "")(), FakeContext())
    assert (changed.measured, changed.rows["value"].sum()) == (14, 2 * 3 * 21)


def test_the_code_of_a_study_that_is_extended_counts(tmp_path: Path) -> None:
    base = tmp_path / "ground.py"
    base.write_text("from reasoninterp.study import Study\nclass Ground(Study):\n    '''a'''\n")
    ground = load_module(base).Ground
    top = type("Top", (ground,), {"__module__": __name__})
    before = keys_module.code_hash(top)
    base.write_text(base.read_text().replace("'''a'''", "'''b'''"))
    assert keys_module.code_hash(top) != before
    assert keys_module.code_hash(top, "1") == keys_module.code_hash(Draws, "1") != before


def _key(**parameters: Any) -> str:
    class Any_(Study):
        version = "1"
        what: Any = None

    return shard_key(Any_(**parameters), FakeContext())


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (1, 2),
        (1, 1.5),
        ("1", 1),
        (None, "None"),
        ([1, 2], [2, 1]),
        ({"a", "b"}, {"a", "c"}),
        (np.arange(5000), np.where(np.arange(5000) == 2500, -1, np.arange(5000))),  # print alike
        (Path("a"), Path("b")),
        (Cell("a", item=1), Cell("a", item=2)),
    ],
)
def test_different_parameters_have_different_keys(a: Any, b: Any) -> None:
    assert _key(what=a) == _key(what=a)
    assert _key(what=a) != _key(what=b)


def test_a_key_is_the_same_in_every_process(tmp_path: Path) -> None:
    code = "from tests.test_study import _key; print(_key(what={'a', 'b', 'c', 'd', frozenset('xyz')}))"
    keys = set()
    for salt in "12":  # of Python's hash(), on which the order of a set depends
        environment = {**os.environ, "PYTHONHASHSEED": salt}
        out = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, env=environment
        )
        keys.add(out.stdout)
    assert len(keys) == 1


def test_a_parameter_that_no_other_process_could_recognise_is_refused() -> None:
    with pytest.raises(TypeError, match="different in every process"):
        _key(what=object())


def test_a_study_in_no_file_wants_a_version(tmp_path: Path) -> None:
    scope: dict[str, Any] = {"__name__": "a_notebook"}
    body = "    def measure(self, context, batch):\n        return [cell.row(x=cell.item) for cell in batch]\n"
    exec("from reasoninterp.study import Study\nclass AtAPrompt(Study):\n" + body, scope)
    with pytest.raises(UserError, match="set `version"):
        go(tmp_path, scope["AtAPrompt"](), FakeContext())
    exec("class AtAPrompt(Study):\n    version = '1'\n" + body, scope)
    assert go(tmp_path, scope["AtAPrompt"](), FakeContext()).measured == 14


# ---------------------------------------------------------------------------------------------- memory


def linux_cpu() -> BaseException:
    return RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
        "allocate 4000000000000000 bytes. Error code 12 (Cannot allocate memory)"
    )


class OutOfMemoryError(RuntimeError):
    """Called as torch calls its own."""


OUT_OF_MEMORY: list[Callable[[], BaseException]] = [
    MemoryError,
    OutOfMemoryError,
    linux_cpu,
    lambda: RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    lambda: RuntimeError("MPS backend out of memory (MPS allocated: 9.00 GB)"),
    lambda: RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_out_of_memory_halves_the_batch_and_gives_the_same_rows(
    tmp_path: Path, error: Callable[[], BaseException]
) -> None:
    context = FakeContext(9, size=8)
    context.memory, context.error = 3, error
    result = go(tmp_path / "tight", Draws(), context)
    sizes = [len(keys) for keys in context.batches]
    # 8 and 4 are too many; 2 will do, for the other mind as well.
    assert sizes == [8, 4, 2, 2, 2, 2, 1, 2, 2, 2, 2, 1]
    assert context.shrunk == 2
    assert context.opened == context.closed == ["base", "tuned"]
    same(result, go(tmp_path / "ample", Draws(), FakeContext(9, size=8)))


def test_a_search_backs_off_as_well(tmp_path: Path) -> None:
    context = FakeContext(minds=("base",), size=8)
    context.memory = 1

    class Grid(Halving):
        def search(self, context: Any, evaluate: Callable[..., list[list[Row]]]) -> None:
            assert [rows[0]["at"] for rows in evaluate(*map(self.cell, range(6)))] == list(range(6))

        def cell(self, i: int) -> Cell:
            return Cell(key=str(i), labels={"mind": "-"}, item=i)

    assert go(tmp_path, Grid(), context).measured == 6
    assert context.shrunk == 2  # 6 → 3 → 1


def test_a_single_cell_for_which_memory_runs_out_is_an_error(tmp_path: Path) -> None:
    context = FakeContext(size=4)
    context.memory, context.error = 0, linux_cpu
    with pytest.raises(RuntimeError, match="allocate memory"):
        go(tmp_path, Draws(), context)
    assert [len(keys) for keys in context.batches] == [4, 2, 1]
    assert context.inside == []


@pytest.mark.parametrize("error", [ValueError("out of memory"), RuntimeError("shape mismatch")])
def test_other_errors_are_not_taken_for_it(tmp_path: Path, error: Exception) -> None:
    assert not is_out_of_memory(error)
    context = FakeContext(size=4)
    context.memory, context.error = 0, lambda: error
    with pytest.raises(type(error), match=str(error)):
        go(tmp_path, Draws(), context)
    assert (len(context.batches), context.shrunk) == (1, 0)


# ---------------------------------------------------------------------------------------------- groups and cells

GROUPS: list[Any] = ["base", ("blend", 0.25), frozenset({"L0", "L1"}), 0, ("graft", ("L0",)), Path("x")]


def test_a_group_may_be_anything_and_is_entered_once(tmp_path: Path) -> None:
    class Grouped(Draws):
        def cells(self, context: Any) -> Iterable[Cell]:
            for i in range(5):  # the groups take turns
                for k, group in enumerate(GROUPS):
                    yield Cell(key=f"{k}/{i}", group=group, labels={"mind": str(k)}, item=i)

    context = FakeContext(size=2)
    result = go(tmp_path, Grouped(), context)
    assert context.opened == context.closed == GROUPS
    assert len(context.batches) == 3 * len(GROUPS)  # 2 + 2 + 1 cells each; `note` checks that none is mixed
    assert Counter(context.measured) == Counter(f"{k}/{i}" for k in range(6) for i in range(5))
    assert list(result.rows["mind"])[:12] == ["0", "0", "1", "1", "2", "2", "3", "3", "4", "4", "5", "5"]


def test_cells_without_a_group_open_nothing(tmp_path: Path) -> None:
    class Free(Draws):
        def cells(self, context: Any) -> Iterable[Cell]:
            return [Cell(key=str(i), item=i, labels={"mind": "-"}) for i in range(4)]

    context = FakeContext()
    assert go(tmp_path, Free(), context).measured == 4
    assert context.opened == []


def test_a_batch_says_what_its_cells_share() -> None:
    batch = Batch([Cell("a", group="base", item=1), Cell("b", group="base", item=2)])
    assert (batch.group, batch.mind, batch.items, len(batch)) == ("base", "base", [1, 2], 2)
    assert Cell("a", labels={"mind": "base"}).row(x=1) == {"_cell": "a", "mind": "base", "x": 1}


@pytest.mark.parametrize("rows", [[{"x": 1}], [{"_cell": "tuned/0", "x": 1}]])
def test_a_row_of_no_cell_of_the_batch_is_refused(tmp_path: Path, rows: list[Row]) -> None:
    class Stray(Study):
        def measure(self, context: Any, batch: Batch) -> Iterable[Row]:
            return rows

    with pytest.raises(ValueError, match=r"not made with cell\.row"):
        go(tmp_path, Stray(), FakeContext())


def test_two_cells_of_one_key_are_refused_before_anything_is_measured(tmp_path: Path) -> None:
    class Twice(Draws):
        def cells(self, context: Any) -> Iterable[Cell]:
            return [*context.cells(), Cell(key="tuned/3")]

    context = FakeContext()
    with pytest.raises(ValueError, match="share the key 'tuned/3'"):
        go(tmp_path, Twice(), context)
    assert context.batches == []


def test_a_cell_may_give_no_rows_and_is_not_asked_again(tmp_path: Path) -> None:
    class Odd(Draws):
        def measure(self, context: Any, batch: Batch) -> Iterable[Row]:
            return [row for row in super().measure(context, batch) if row["size"] > 3]

    first = go(tmp_path, Odd(), FakeContext())
    assert set(first.rows["trace"]) == {"t3", "t4", "t5", "t6"}
    assert go(tmp_path, Odd(), FakeContext()).measured == 0


def test_rows_that_are_no_more_leave_no_old_table(tmp_path: Path) -> None:
    class Fewer(Study):
        keep: bool = True

        def measure(self, context: Any, batch: Batch) -> Iterable[Row]:
            return [cell.row(x=1) for cell in batch if self.keep]

        def summarise(self, rows: pd.DataFrame, context: Any) -> pd.DataFrame:
            return pd.DataFrame({"n": [len(rows)]})

    go(tmp_path, Fewer(), FakeContext())
    assert set(files(tmp_path)) == {"fewer.parquet", "fewer.rows.parquet"}
    result = go(tmp_path, Fewer(keep=False), FakeContext())
    assert set(files(tmp_path)) == {"fewer.parquet"}
    assert result.tables["fewer"]["n"].item() == 0


# ---------------------------------------------------------------------------------------------- searching


def test_a_search_finds_what_it_looks_for_and_remembers(tmp_path: Path) -> None:
    context = FakeContext()
    result = go(tmp_path, Halving(), context)
    assert list(result.tables["halving"]["at"]) == [618, 618]
    assert 0 < len(context.measured) == result.measured == 2 * len(set(result.rows["at"]))
    assert list(result.rows["at"])[:6] == [500, 500, 750, 750, 625, 625]  # in the order in which it asked
    again = FakeContext()
    same(result, go(tmp_path, Halving(), again))
    assert again.batches == again.opened == []


def test_an_interrupted_search_evaluates_only_the_rest(tmp_path: Path) -> None:
    class Cut(Halving):
        name = "halving"

        def measure(self, context: Any, batch: Batch) -> Iterable[Row]:
            if len(context.batches) == context.size:
                raise KeyboardInterrupt
            return super().measure(context, batch)

    whole = FakeContext(size=999)
    unbroken = go(tmp_path / "a", Cut(), whole)
    first, rest = FakeContext(size=7), FakeContext(size=999)
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "b", Cut(), first)
    resumed = go(tmp_path / "b", Cut(), rest)
    assert len(first.batches) == 7
    assert first.measured + rest.measured == whole.measured
    assert (resumed.measured, resumed.reused) == (len(rest.measured), 7)
    same(resumed, unbroken)


def test_asking_again_within_a_search_measures_nothing(tmp_path: Path) -> None:
    class Again(Halving):
        def search(self, context: Any, evaluate: Callable[..., list[list[Row]]]) -> None:
            (first,) = evaluate(Cell(key="x", item=1))
            first[0]["at"] = "scribbled over"
            second, other = evaluate(Cell(key="x", item=1), Cell(key="y", item=2))
            assert (second[0]["at"], other[0]["at"]) == (1, 2)

        def summarise(self, rows: pd.DataFrame, context: Any) -> pd.DataFrame:
            return rows

    context = FakeContext()
    assert list(go(tmp_path, Again(), context).rows["at"]) == [1, 2]
    assert context.measured == ["x", "y"]


def test_a_parameter_called_search_makes_no_search(tmp_path: Path) -> None:
    class Greedy(Draws):
        search: str = "greedy"

    assert go(tmp_path, Greedy(), FakeContext()).measured == 14


# ---------------------------------------------------------------------------------------------- needs


class Doubled(Study):
    """Reads another study's table."""

    needs: ClassVar[tuple[str, ...]] = ("draws",)

    def measure(self, context: Any, batch: Batch) -> Iterable[Row]:
        context.note(batch)
        means = context.table("draws").set_index("mind")["value"]
        return [cell.row(value=2 * means[batch.mind]) for cell in batch]


def test_rows_made_from_another_studys_table_follow_it(tmp_path: Path) -> None:
    def both(scale: float) -> tuple[Result, Result]:
        return go(tmp_path, Draws(scale=scale), FakeContext()), go(tmp_path, Doubled(), FakeContext())

    draws, first = both(1.0)
    assert first.rows["value"].iloc[0] == 2 * draws.tables["draws"]["value"].iloc[0] != 0
    assert both(1.0)[1].measured == 0
    second = both(10.0)[1]
    assert second.measured == 14
    assert second.rows["value"].to_numpy() == pytest.approx(10 * first.rows["value"].to_numpy())
    assert both(1.0)[1].measured == 0  # the first rows are still there
    (tmp_path / "tables" / "draws.parquet").unlink()
    with pytest.raises(UserError, match="run the study that makes it first"):
        go(tmp_path, Doubled(), FakeContext())


def test_what_a_study_needs_is_run_first_and_once(tmp_path: Path) -> None:
    from reasoninterp.compare import run_with_needs
    from reasoninterp.models.context import Context

    class Fake(FakeContext, Context):  # type: ignore[misc]
        """A fake that passes for a context."""

    class NeedsBoth(Doubled):
        needs: ClassVar[tuple[str, ...]] = ("doubled", "draws")

    context = Fake()
    with opened(tmp_path) as run:
        context.run = run
        result = run_with_needs(NeedsBoth(), context, run, quiet=True)
        assert result.measured == 14
        assert all(run.has_table(name) for name in ("draws", "doubled", "needs-both"))
    assert len(context.measured) == 3 * 14


# ---------------------------------------------------------------------------------------------- tables and figures


def test_several_tables_and_figures_are_written_under_their_names(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    class Several(Draws):
        def summarise(self, rows: pd.DataFrame, context: Any) -> Mapping[str, pd.DataFrame]:
            return {"first": rows[["mind", "value"]], "second": rows[["trace"]]}

        def draw(self, summary: Any) -> Mapping[str, Figure]:
            assert list(summary) == ["first", "second"]
            return {"map": Figure(), "curve": Figure()}

    result = go(tmp_path, Several(), FakeContext())
    assert list(result.tables) == ["first", "second"]
    assert set(files(tmp_path)) == {"first.parquet", "second.parquet", "several.rows.parquet"}
    assert {p.name for p in (tmp_path / "figures").iterdir()} == {"map.png", "map.svg", "curve.png", "curve.svg"}
    with opened(tmp_path) as run:
        pd.testing.assert_frame_equal(run.table("several.rows"), result.rows, check_dtype=False)
        assert run.manifest["timings"]["several"]["cells"] == 14


def test_no_figures_where_none_are_wanted_and_pyplots_are_closed(tmp_path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    class Plotted(Draws):
        def draw(self, summary: Any) -> Any:
            figure, axes = pyplot.subplots()
            axes.plot(summary["value"])
            return figure

    go(tmp_path, Plotted(), FakeContext(), figures=False)
    assert not (tmp_path / "figures").exists()
    before = pyplot.get_fignums()
    go(tmp_path, Plotted(), FakeContext())
    assert (tmp_path / "figures" / "plotted.svg").stat().st_size > 1000
    assert pyplot.get_fignums() == before


def test_rows_are_kept_where_a_summary_fails(tmp_path: Path) -> None:
    class Faulty(Draws):
        version = "1"
        good: ClassVar[bool] = False

        def summarise(self, rows: pd.DataFrame, context: Any) -> pd.DataFrame:
            if not self.good:
                raise KeyError("column")
            return rows

    with pytest.raises(KeyError):
        go(tmp_path, Faulty(), FakeContext())
    Faulty.good = True
    assert go(tmp_path, Faulty(), FakeContext()).measured == 0


def test_the_default_summary_is_the_rows(tmp_path: Path) -> None:
    class Bare(Study):
        def measure(self, context: Any, batch: Batch) -> Iterable[Row]:
            return [cell.row(x=cell.item) for cell in batch]

    result = go(tmp_path, Bare(), FakeContext())
    assert list(result.tables) == ["bare"]
    pd.testing.assert_frame_equal(result.tables["bare"], result.rows)
    with pytest.raises(TypeError, match="no measure"):
        go(tmp_path, type("Hollow", (Study,), {"__module__": __name__})(), FakeContext())


# ---------------------------------------------------------------------------------------------- classes and files


@pytest.mark.parametrize(
    ("cls", "name"),
    [
        ("InfoGain", "info-gain"),
        ("Margin", "margin"),
        ("KLSweep", "kl-sweep"),
        ("Top2Heads", "top2-heads"),
        ("_Own", "own"),
    ],
)
def test_names_are_in_kebab_case(cls: str, name: str) -> None:
    made: Any = type(cls, (Study,), {"__module__": __name__})
    assert made.name == name
    assert REGISTRY[name] is made


def test_annotated_fields_become_parameters(tmp_path: Path) -> None:
    class Parametrised(Study):
        """Says what it does.

        And more.
        """

        name = "with-parameters"
        needs = ("draws",)
        constant: ClassVar[int] = 3
        level: str = "block"
        top: int = 5
        ratio: float

    class Extended(Parametrised):
        top: int = 7
        extra: tuple[int, ...] = (1, 2)

    study = Parametrised(ratio=0.5, top=6)
    assert study.parameters() == {"level": "block", "top": 6, "ratio": 0.5}
    assert (study.name, study.describe()) == ("with-parameters", "Says what it does.")
    assert Extended(ratio=1.0).parameters() == {"level": "block", "top": 7, "ratio": 1.0, "extra": (1, 2)}
    assert (Extended.name, Extended.needs) == ("extended", ("draws",))
    with pytest.raises(TypeError, match="ratio"):
        Parametrised()  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="tpo"):
        Parametrised(ratio=1.0, tpo=3)  # type: ignore[call-arg]
    assert Study.parameters(Draws()) == {"scale": 1.0}


def test_a_users_file_gives_its_own_studies_in_order(user_file: Path) -> None:
    found = studies_in(user_file)
    assert [cls.name for cls in found] == ["coins", "climb"]
    coins: Any = found[0]
    assert coins(sides=6).parameters() == {"sides": 6}
    assert studies_in(str(user_file))[0] is found[0]  # loaded once
    assert load_module(study_module.__file__) is study_module
    other = user_file.with_name("other.py")
    other.write_text(f"from {found[0].__module__} import Coins\nclass Mine(Coins):\n    sides: int = 3\nAlias = Mine\n")
    assert [cls.name for cls in studies_in(other)] == ["mine"]  # an import is not a definition, nor is an alias


def test_files_of_one_name_are_not_mixed_up(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_text(f"FOLDER = {folder!r}\n")
    assert [load_module(tmp_path / folder / "mine.py").FOLDER for folder in "ab"] == ["a", "b"]


@pytest.mark.parametrize("name", ["notes.txt", "absent.py", "."])
def test_what_is_no_python_file_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "notes.txt").write_text("x = 1")
    with pytest.raises(UserError, match="not a Python file"):
        load_module(tmp_path / name)


def test_a_file_that_failed_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "faulty.py"
    file.write_text("GOOD = 1\nraise RuntimeError('half way')\n")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="half way"):
            load_module(file)
    file.write_text("GOOD = 1\nWHOLE = 1\n")
    os.utime(file, (0, 0))  # else a compiled file of the same second might be taken for it
    assert load_module(file).WHOLE == 1
