"""Make organisms: train what is missing, parents first, and save each as an ordinary Hugging Face directory.

1. An organism is built in a temporary directory of the cache and renamed to `<cache>/<digest>` when it is whole and
   has met its targets; a killed training leaves nothing that could be taken for an organism.
2. Members that do not depend on each other are trained two at a time, one thread each: this process takes one share
   and a worker process the other.
3. Each organism is copied to `out/<name>/` (hard links where the file system allows), again by a rename, and the
   traces it is measured on are written to `out/traces/`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers.utils import logging as transformers_logging

from reasoninterp.errors import UserError
from reasoninterp.organisms.chat import train_chat
from reasoninterp.organisms.recipes import RECIPES, Recipe, RecipeFailed, lineage
from reasoninterp.organisms.tracefiles import write_traces
from reasoninterp.organisms.words import train_words

RECORD = "organism.json"
_FAILED = 3  # exit status of a worker whose recipe failed
_STALE = 86400.0  # seconds


@dataclass(frozen=True)
class OrganismReport:
    """What was made.

    Attributes:
        name, task, parent, seed, digest: which organism.
        steps: optimiser steps taken.
        cpu_seconds: of the training process, sampling and measuring included.
        figures: `set.figure` -> value on test problems.
        cached: it was not trained in this call.
        path: its directory.
    """

    name: str
    task: str
    parent: str | None
    seed: int
    digest: str
    steps: int
    cpu_seconds: float
    figures: Mapping[str, float]
    cached: bool = False
    path: str = ""

    def __str__(self) -> str:
        """One line for a terminal."""
        made = "from the cache" if self.cached else f"{self.steps} steps, {self.cpu_seconds:.0f} CPU seconds"
        shown = "fixed" if "fixed.accuracy" in self.figures else "id"
        rates = ", ".join(f"{name} {self.figures[f'{shown}.{name}']:.3f}" for name in ("accuracy", "follow"))
        return f"{self.name} (seed {self.seed}): {rates}; {made}; {self.path}"


def cache_dir(cache: str | Path | None = None) -> Path:
    """Where trained organisms are kept: the argument, `$REASONINTERP_CACHE`, or `~/.cache/reasoninterp/organisms`."""
    if cache is not None:
        return Path(cache)
    named = os.environ.get("REASONINTERP_CACHE")
    return Path(named) / "organisms" if named else Path.home() / ".cache" / "reasoninterp" / "organisms"


def make(
    out_dir: str | Path,
    *,
    seed: int = 0,
    only: Sequence[str] | None = None,
    cache: str | Path | None = None,
    progress: bool = True,
    workers: int = 2,
    recipes: Mapping[str, Recipe] | None = None,
) -> list[OrganismReport]:
    """Make organisms and the traces they are measured on.

    Args:
        out_dir: gets one Hugging Face directory per organism, and `traces/`.
        seed: of weights and data.
        only: names of organisms (their parents are trained too, and copied); default all.
        cache: see `cache_dir`.
        progress: show progress bars.
        workers: processes that train at a time, 1 or 2, one thread each.
        recipes: other recipes than `RECIPES` (these are trained in this process).

    Returns:
        One report per organism, parents first.

    Raises:
        RecipeFailed: a target was missed; nothing of that organism is left behind.
        UserError: an unknown name, or a directory in the way that is no organism.
    """
    book = RECIPES if recipes is None else recipes
    names = lineage(list(book) if only is None else list(only), book)
    out, store = Path(out_dir), cache_dir(cache)
    for name in names:
        _check_free(out / name)
    store.mkdir(parents=True, exist_ok=True)
    _clear_stale(store)
    trained: set[str] = set()
    for wave in _waves(names, book):
        missing = [name for name in wave if not (store / book[name].digest(seed, book) / RECORD).exists()]
        trained |= set(missing)
        _train_wave(missing, seed, store, progress, workers if recipes is None else 1, book)
    reports = []
    for name in names:
        whole = store / book[name].digest(seed, book)
        _place(whole, out / name)
        reports.append(replace(read_record(out / name), cached=name not in trained, path=str(out / name)))
    write_traces(out / "traces", seed, {book[name].task for name in names}, book)
    return reports


def read_record(directory: str | Path) -> OrganismReport:
    """The report saved with an organism."""
    value = json.loads((Path(directory) / RECORD).read_text())
    value.pop("recipe")
    return OrganismReport(**value)


def _waves(names: Sequence[str], book: Mapping[str, Recipe]) -> list[list[str]]:
    """Organisms by the number of their ancestors: a wave needs only the waves before it."""

    def depth(name: str) -> int:
        parent = book[name].parent
        return 0 if parent is None else 1 + depth(parent)

    deepest = max((depth(name) for name in names), default=-1)
    return [[name for name in names if depth(name) == d] for d in range(deepest + 1)]


def _train_wave(
    names: Sequence[str], seed: int, store: Path, progress: bool, workers: int, book: Mapping[str, Recipe]
) -> None:
    """Train independent organisms: a share here, and a share in a worker process."""
    mine: list[str] = list(names)
    theirs: list[str] = []
    if workers > 1 and len(names) > 1:
        mine, theirs = _shares(names, book)
    worker = _start_worker(theirs, seed, store) if theirs else None
    try:
        for name in mine:
            train(book[name], seed, store, progress, book)
        if worker:
            with tqdm(total=len(theirs), desc="worker: " + ", ".join(theirs), disable=not progress, leave=False) as bar:
                while worker.poll() is None:
                    time.sleep(0.2)
                    done = sum((store / book[n].digest(seed, book) / RECORD).exists() for n in theirs)
                    bar.update(done - bar.n)
            _finish_worker(worker)
    finally:
        if worker and worker.poll() is None:
            worker.kill()
            worker.wait()


def _shares(names: Sequence[str], book: Mapping[str, Recipe]) -> tuple[list[str], list[str]]:
    """Two lists with about the same number of steps each, longest first."""
    shares: tuple[list[str], list[str]] = ([], [])
    load = [0.0, 0.0]
    for name in sorted(names, key=lambda n: -book[n].steps):
        k = int(load[1] < load[0])
        shares[k].append(name)
        load[k] += book[name].steps * (3 if book[name].task == "chat" else 1)
    return shares


def _start_worker(names: Sequence[str], seed: int, store: Path) -> subprocess.Popen[str]:
    """A process that trains these organisms into the cache (a fresh interpreter: callers need no main guard)."""
    code = "import sys; from reasoninterp.organisms.making import work; sys.exit(work(sys.argv[1:]))"
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.Popen(
        [sys.executable, "-c", code, str(store), str(seed), *names],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _finish_worker(worker: subprocess.Popen[str]) -> None:
    """Raise what a worker raised."""
    said = worker.communicate()[0]
    if worker.returncode == _FAILED:
        value = json.loads(said.strip().splitlines()[-1])
        raise RecipeFailed(**value)
    if worker.returncode:
        raise RuntimeError(f"A training process ended with status {worker.returncode}: {said[-2000:]}")


def work(arguments: Sequence[str]) -> int:
    """A worker process: `cache seed name…`; a failed recipe is reported as a line of JSON."""
    store, seed, *names = arguments
    for name in names:
        try:
            train(RECIPES[name], int(seed), Path(store), False, RECIPES)
        except RecipeFailed as failed:
            print(json.dumps(vars(failed)))
            return _FAILED
    return 0


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch on one thread inside, as before outside: spinning threads are several times slower on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars for loading and saving files of a few hundred kilobytes."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def train(recipe: Recipe, seed: int, store: Path, progress: bool, book: Mapping[str, Recipe]) -> Path:
    """Train one organism (its parent is in the cache) and put it into the cache.

    Raises:
        RecipeFailed: a target was missed; nothing is left behind.
    """
    whole = store / recipe.digest(seed, book)
    building = Path(tempfile.mkdtemp(prefix=".building-", dir=store))
    parent = store / book[recipe.parent].digest(seed, book) if recipe.parent else None
    try:
        with (
            quiet_transformers(),
            one_thread(),
            tqdm(total=recipe.steps, desc=recipe.name, disable=not progress, leave=False) as bar,
        ):
            began = time.process_time()
            trainer = train_chat if recipe.task == "chat" else train_words
            steps, figures = trainer(recipe, seed, parent, building, bar)
            spent = time.process_time() - began
        if parent:
            before = read_record(parent).figures
            gains = {k: v - before[k] for k, v in figures.items() if k.endswith(".accuracy") and k in before}
            figures |= {k.replace(".accuracy", ".gain"): v for k, v in gains.items()}
        missed = [f"{t}, but it is {figures[t.figure]:.3f}" for t in recipe.targets if not t.holds(figures[t.figure])]
        if missed:
            raise RecipeFailed(recipe.name, seed, missed, steps, figures)
        report = OrganismReport(
            recipe.name, recipe.task, recipe.parent, seed, whole.name, steps, round(spent, 2), figures
        )
        record = {k: v for k, v in asdict(report).items() if k not in ("cached", "path")} | {"recipe": asdict(recipe)}
        (building / RECORD).write_text(json.dumps(_plain(record), indent=1) + "\n")
        try:
            building.rename(whole)
        except OSError:
            if not (whole / RECORD).exists():
                raise  # otherwise another process finished the same organism first
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return whole


def _plain(value: Any) -> Any:
    """JSON has no infinities: open bounds become null."""
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _clear_stale(store: Path) -> None:
    """Remove what trainings killed more than a day ago left behind."""
    for left in store.glob(".building-*"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > _STALE:
                shutil.rmtree(left)


def _check_free(directory: Path) -> None:
    """Refuse to replace a directory that is no organism."""
    if directory.exists() and not (directory / RECORD).exists():
        raise UserError(f"{directory} exists and is no organism; choose another output directory.")


def _place(whole: Path, directory: Path) -> None:
    """Put an organism of the cache at `directory`, replacing an older organism, by a rename."""
    if (directory / RECORD).exists() and read_record(directory).digest == whole.name:
        return
    directory.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=".placing-", dir=directory.parent))
    try:
        for file in whole.iterdir():
            shutil.copy2(file, fresh / file.name)
        if directory.exists():
            shutil.rmtree(directory)
        fresh.chmod(0o755)
        fresh.rename(directory)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
