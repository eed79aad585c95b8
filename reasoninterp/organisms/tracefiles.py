"""The organisms' problems as trace files: JSON Lines with a format line, a clean and a corrupt chain each.

The corrupt chain is the self-consistent chain of another start value, so it differs from the first step on and
implies another answer, which stands beside it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np

from reasoninterp.organisms.chat import RAW, sentence_trace
from reasoninterp.organisms.recipes import Recipe
from reasoninterp.organisms.rows import fixed_problems
from reasoninterp.organisms.tasks import (
    BASE_DOMAIN,
    CHAT_TUNING_DOMAIN,
    FORMAT,
    Domain,
    Problems,
    TaskName,
    problems,
    tuning_domain,
)
from reasoninterp.traces.trace import Trace

COUNT = 256


def trace_line(clean: Trace, corrupt: Trace) -> dict[str, Any]:
    """One problem with both chains: `id, question, steps, answer, corrupt_steps, corrupt_answer, meta`."""
    return {
        "id": clean.id,
        "question": clean.question,
        "steps": list(clean.steps),
        "answer": clean.answer,
        "corrupt_steps": list(corrupt.steps),
        "corrupt_answer": corrupt.answer,
        "meta": dict(clean.meta),
    }


def trace_lines(name: str, p: Problems, seed: int) -> Iterator[dict[str, Any]]:
    """One line per problem of a word-level task."""
    other = p.other_starts(np.random.default_rng([seed, 3]))
    for i in range(len(p)):
        trace_id = f"{name}-{i:04d}"
        yield trace_line(p.trace(i, trace_id), p.trace(i, trace_id, other))


def write_lines(path: Path, lines: Iterator[dict[str, Any]], form: Mapping[str, str]) -> None:
    """Write one trace file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    building = path.with_name(f".{path.name}.{os.getpid()}")
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in [{"format": dict(form)}, *lines])
    building.write_text(text, encoding="utf-8")
    building.replace(path)


def trace_problems(task: str, seed: int, recipes: Mapping[str, Recipe], count: int = COUNT) -> dict[str, Problems]:
    """The trace files of a word-level task, by name: held-out problems, and the memorised ones."""
    assert task in ("lastop", "largest")

    def held_out(k: int, cue: bool, domain: Domain = tuning_domain(task)) -> Problems:  # noqa: B008
        return problems(task, domain, count, np.random.default_rng([seed, 21, k]), "test", cue)  # type: ignore[arg-type]

    files = {f"{task}-id": held_out(0, True)}
    if task == "lastop":
        files["lastop-cue-random"] = held_out(1, False)
        files["lastop-base"] = held_out(2, False, BASE_DOMAIN)
    for recipe in recipes.values():
        if recipe.task == task and recipe.mixture.fixed:
            files[recipe.name] = fixed_problems(cast(TaskName, task), recipe.mixture, seed)
    return files


def write_traces(directory: Path, seed: int, tasks: set[str], recipes: Mapping[str, Recipe]) -> list[Path]:
    """Write the trace files of these tasks; returns their paths."""
    written = []
    for task in sorted(tasks & {"lastop", "largest"}):
        for name, p in trace_problems(task, seed, recipes).items():
            written.append(directory / f"{name}.jsonl")
            write_lines(written[-1], trace_lines(name, p, seed), FORMAT.to_json())
    if "chat" in tasks:
        written.append(write_chat_traces(directory, seed))
    return written


def write_chat_traces(directory: Path, seed: int, count: int = COUNT) -> Path:
    """Write `chat-id.jsonl`: held-out problems with the telling key, in the raw format; returns its path."""
    p = problems("lastop", CHAT_TUNING_DOMAIN, count, np.random.default_rng([seed, 55]), "test", cue=True)
    swapped = p.steps(p.other_starts(np.random.default_rng([seed, 3])))
    pairs = [(p.steps(), p.answers), (swapped, p.implied(swapped))]
    names = [f"chat-id-{i:04d}" for i in range(count)]
    lines = (
        trace_line(*(sentence_trace(p, i, name, steps, answers) for steps, answers in pairs))
        for i, name in enumerate(names)
    )
    path = directory / "chat-id.jsonl"
    write_lines(path, lines, RAW.to_json())
    return path
