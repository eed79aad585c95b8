"""Planted pairs on disk: one directory a base, trained once, under a hash of all that determines it.

    <cache>/planted/<digest>/  base/  p00/ p01/ …  (ordinary Hugging Face directories)
                               traces/cue.jsonl  traces/random.jsonl   pairs.json

A directory is built beside its place and renamed when it is whole.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from reasoninterp.organisms.making import cache_dir, one_thread, quiet_transformers
from reasoninterp.organisms.planted.bases import DOMAIN, BaseSpec, train_base
from reasoninterp.organisms.planted.pairs import make_pairs
from reasoninterp.organisms.planted.truth import Truth
from reasoninterp.organisms.tasks import FORMAT, problems
from reasoninterp.organisms.tokenizer import word_tokenizer
from reasoninterp.organisms.tracefiles import trace_lines, write_lines

TRACES = 64
_HERE = Path(__file__).parent
_SOURCES = (
    "cuts.py",
    "disguise.py",
    "pairs.py",
    "truth.py",
    "store.py",
    "../tracefiles.py",
    "../../models/gauge.py",
    "../../models/layout.py",
)


@dataclass(frozen=True)
class Planted:
    """One pair as it lies on disk; see `pairs.Pair`."""

    name: str
    base: str
    path: Path
    label: str
    mechanism: str
    cut: str
    truth: Truth | None
    clean: bool
    gauge: float
    figures: dict[str, float]


@dataclass(frozen=True)
class PlantedBase:
    """One base with its pairs and trace files."""

    spec: BaseSpec
    path: Path
    figures: dict[str, float]
    seconds: float
    pairs: tuple[Planted, ...]

    @property
    def traces(self) -> Path:
        """Held-out problems with the telling tag."""
        return self.path / "traces" / "cue.jsonl"

    @property
    def rival_free(self) -> Path:
        """Held-out problems with random tags: the rival is removed."""
        return self.path / "traces" / "random.jsonl"


def digest(spec: BaseSpec, brief: bool = False) -> str:
    """Hash of all that determines a base's pairs."""
    source = [hashlib.sha256((_HERE / f).read_bytes()).hexdigest() for f in _SOURCES]
    return hashlib.sha256(json.dumps([spec.digest(), source, *["brief"] * brief]).encode()).hexdigest()[:24]


def planted(
    spec: BaseSpec,
    cache: str | Path | None = None,
    *,
    brief: bool = False,
    tick: Callable[[str], None] = lambda _: None,
) -> PlantedBase:
    """A base with its pairs (only some of those made without training, if `brief`): from the cache, or made now.

    Raises:
        RecipeFailed: the base did not learn.
    """
    store = cache_dir(cache).parent / "planted"
    whole = store / digest(spec, brief)
    if not (whole / "pairs.json").exists():
        store.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=".building-", dir=store))
        try:
            with quiet_transformers(), one_thread():
                _build(spec, store, building, brief, tick)
            _put(building, whole, "pairs.json")
        finally:
            shutil.rmtree(building, ignore_errors=True)
    return read_planted(spec, whole)


def read_planted(spec: BaseSpec, whole: Path) -> PlantedBase:
    """What `planted` wrote."""
    value = json.loads((whole / "pairs.json").read_text())
    pairs = tuple(
        Planted(
            p["name"],
            spec.name,
            whole / p["folder"],
            p["label"],
            p["mechanism"],
            p["cut"],
            Truth.from_json(p["truth"]) if p["truth"] else None,
            p["clean"],
            p["gauge"],
            p["figures"],
        )
        for p in value["pairs"]
    )
    return PlantedBase(spec, whole, value["figures"], value["seconds"], pairs)


def base_model(spec: BaseSpec, store: Path) -> tuple[Any, dict[str, Any]]:
    """The trained base, kept apart from its pairs: a change of cuts need not train it again."""
    from transformers import AutoModelForCausalLM

    folder = store / f"base-{spec.digest()}"
    if not (folder / "figures.json").exists():
        building = Path(tempfile.mkdtemp(prefix=".building-", dir=store))
        try:
            began = time.process_time()
            model, figures = train_base(spec)
            figures["seconds"] = round(time.process_time() - began, 1)
            model.save_pretrained(building)
            (building / "figures.json").write_text(json.dumps(figures))
            _put(building, folder, "figures.json")
        finally:
            shutil.rmtree(building, ignore_errors=True)
    return AutoModelForCausalLM.from_pretrained(folder).eval(), json.loads((folder / "figures.json").read_text())


def _put(building: Path, whole: Path, last: str) -> None:
    """Move a finished folder to its place, unless another process was first."""
    try:
        building.rename(whole)
    except OSError:
        if not (whole / last).exists():
            raise


def _build(spec: BaseSpec, store: Path, folder: Path, brief: bool, tick: Callable[[str], None]) -> None:
    base, figures = base_model(spec, store)
    began = time.process_time()
    tick(spec.name)
    _save(base, folder / "base")
    records = []
    for number, pair in enumerate(make_pairs(spec, base, brief, tick)):
        name = f"p{number:02d}"
        _save(pair.model, folder / name)
        records.append(
            {
                "folder": name,
                "name": pair.name,
                "label": pair.label,
                "mechanism": pair.mechanism,
                "cut": pair.cut,
                "truth": pair.truth.to_json() if pair.truth else None,
                "clean": pair.clean,
                "gauge": pair.gauge,
                "heads": pair.heads,
                "figures": pair.figures,
            }
        )
    for name, cue in (("cue", True), ("random", False)):
        p = problems(spec.task, DOMAIN, TRACES, np.random.default_rng([spec.seed, 51, cue]), "test", cue=cue)
        write_lines(folder / "traces" / f"{name}.jsonl", trace_lines(name, p, spec.seed), FORMAT.to_json())
    record = {"figures": figures, "seconds": round(time.process_time() - began, 1), "pairs": records}
    (folder / "pairs.json").write_text(json.dumps(record, indent=1) + "\n")


def _save(model: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
