"""Keys of finished cells: a hash of everything a study's numbers depend on.

A shard is keyed by the study's code, its parameters, the tables it needs, the seed and the context's identity (weights,
traces, arguments).  Nothing is ever taken from a shard with another key.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
from pathlib import Path
from typing import Any

from reasoninterp.errors import UserError
from reasoninterp.runs import Run
from reasoninterp.study import Study


def shard_key(study: Study, context: Any, run: Run | None = None) -> str:
    """Hash of everything the study's numbers depend on.

    Args:
        study: the study with its parameters set.
        context: what it is measured in.
        run: the run in which the tables stand that the study needs.

    Raises:
        TypeError: a parameter or part of the identity that looks different in every process.
        UserError: the study's code is in no file and it has no `version`.
    """
    value = {
        "study": study.name,
        "code": code_hash(type(study), study.version),
        "parameters": study.parameters(),
        "needs": {name: run.table_digest(name) for name in study.needs} if run else {},
        "seed": context.seed,
        "context": dict(context.identity()),
    }
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=_key_value).encode()).hexdigest()[:16]


def _key_value(value: Any) -> Any:
    """What JSON cannot hold, as something that is the same in every process and differs where the value does."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {type(value).__qualname__: {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}}
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, set | frozenset):
        return sorted(json.dumps(v, sort_keys=True, default=_key_value) for v in value)
    text = repr(value)
    if " at 0x" in text:
        raise TypeError(f"{text}: looks different in every process, so its rows are never found again; give its name.")
    return text


def source_file(cls: type) -> Path | None:
    """The file that defines a class; None for one made at a prompt or in a notebook."""
    try:
        path = Path(inspect.getfile(cls))
    except (TypeError, OSError):
        return None
    return path if path.is_file() else None


def own_source_hash(cls: type) -> str | None:
    """Hash of the source file that defines a study, whatever its `version`; None for one that is in no file."""
    home = source_file(cls)
    return hashlib.sha256(home.read_bytes()).hexdigest() if home else None


def code_hash(cls: type, version: str = "") -> str:
    """Hash of the source file that defines a study (and any study it extends) and of the package's own sources.

    Args:
        cls: the study.
        version: if set, stands for the study's own files.

    Raises:
        UserError: the study is in no file and has no version.
    """
    homes = {source_file(c) for c in cls.__mro__ if issubclass(c, Study) and c is not Study}
    if None in homes and not version:
        name = cls.__name__
        raise UserError(
            f'study {name}: its code is in no file, so changes go unseen; set `version = "1"` in the class.'
        )
    own = sorted(h.resolve() for h in homes if h is not None)
    package = [p for p in sorted(Path(__file__).resolve().parent.rglob("*.py")) if p not in own]
    digest = hashlib.sha256(version.encode())
    for path in [*([] if version else own), *package]:
        if path in own or not (
            path.parent.name in {"report", "organisms", "planted"} or path.name in {"figures.py", "cli.py"}
        ):
            digest.update(path.read_bytes())
    return digest.hexdigest()
