"""A run's directory: manifest, shards, tables, figures.

```
runs/mine/
  run.json            identity (hashes of weights and traces), versions, arguments, seeds, hardware, timings
  shards/STUDY/KEY.jsonl  append-only JSON Lines, one line a finished cell; KEY hashes code, weights, traces, arguments
  tables/*.parquet    what the studies found, written whole
  figures/*.png, *.svg
  report.html
```

1. `Run.open` makes the directory or takes it up again; a directory of another run is refused, never overwritten.
2. A cell's rows are appended as one line and flushed.  A line that a killed process left unfinished is cut off
   when the shard is opened again, so what is there is always whole.
3. Everything else is written to a temporary file and renamed; what a killed process left is swept up when the run is
   opened again.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import pandas as pd

from reasoninterp.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

UNFINISHED = ".unfinished"  # how the name of a file ends that is being written
VERSIONED = ("reasoninterp", "torch", "transformers", "transformer-lens", "peft", "tokenizers", "numpy", "scipy")


class Run:
    """One run's directory. Make it with `Run.open`."""

    def __init__(self, path: Path, manifest: dict[str, Any], lock: IO[str] | None = None) -> None:
        self.path = path
        self.manifest = manifest
        self._lock = lock

    @classmethod
    def open(cls, path: str | Path, identity: Mapping[str, str], arguments: Mapping[str, Any] | None = None) -> Run:
        """Make the directory, or take up the run that stands in it.

        Args:
            path: the directory.
            identity: what makes this run this run (hashes of weights and traces).
            arguments: how it was called; recorded, not compared.

        Raises:
            UserError: the directory holds another run or other files, or another process is writing to it.
        """
        path = Path(path)
        if path.exists() and not path.is_dir():
            raise UserError(f"--out {path}: this is a file; give a directory.")
        _check_own(path, identity)
        try:
            path.mkdir(parents=True, exist_ok=True)
            lock = (path / ".lock").open("w")
        except OSError as error:
            raise UserError(f"--out {path}: cannot write here ({error.strerror}); give another directory.") from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            raise UserError(f"--out {path}: another process is writing to this run; wait for it or stop it.") from None
        try:
            found = _check_own(path, identity)  # again: another process may have made it meanwhile
        except UserError:
            lock.close()
            raise
        for folder in (path, path / "tables", path / "figures"):
            for leftover in folder.glob(f".*{UNFINISHED}"):
                leftover.unlink()
        now = datetime.now(UTC).isoformat(timespec="seconds")
        manifest = found or {"created": now, "timings": {}}
        manifest.update(
            identity=_plain(identity),
            arguments=_plain(arguments or {}),
            updated=now,
            versions=versions(),
            hardware=hardware(),
        )
        run = cls(path, manifest, lock)
        run.write_manifest()
        return run

    @classmethod
    def read(cls, path: str | Path) -> Run:
        """A finished (or unfinished) run, to read its tables; nothing is written."""
        path = Path(path)
        manifest = _read_manifest(path)
        if manifest is None:
            raise UserError(f"{path}: no run here (run.json is missing); give the directory of a run.")
        return cls(path, manifest)

    def close(self) -> None:
        """Let other processes write here."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def write_manifest(self) -> None:
        """Write `run.json` whole."""
        write_whole(self.path / "run.json", lambda f: f.write(json.dumps(self.manifest, indent=2, ensure_ascii=False)))

    def record(self, **entries: Any) -> None:
        """Add entries to `run.json` (dictionaries are merged one level deep)."""
        for key, value in entries.items():
            if isinstance(value, Mapping) and isinstance(self.manifest.get(key), dict):
                self.manifest[key].update(_plain(value))
            else:
                self.manifest[key] = _plain(value)
        self.write_manifest()

    def shard(self, study: str, key: str) -> Shard:
        """The append-only file of a study's finished cells under this key."""
        return Shard(self.path / "shards" / study / f"{key}.jsonl")

    def save_table(self, name: str, frame: pd.DataFrame) -> Path:
        """Write `tables/NAME.parquet`."""
        target = self.path / "tables" / f"{name}.parquet"
        write_whole(target, lambda f: frame.to_parquet(f, index=False), mode="wb")
        return target

    def table(self, name: str) -> pd.DataFrame:
        """Read `tables/NAME.parquet`; a missing one is a `UserError`."""
        target = self.path / "tables" / f"{name}.parquet"
        if not target.exists():
            raise UserError(f"{target}: no such table; run the study that makes it first.")
        return pd.read_parquet(target)

    def has_table(self, name: str) -> bool:
        """Whether `tables/NAME.parquet` is there."""
        return (self.path / "tables" / f"{name}.parquet").exists()

    def drop_table(self, name: str) -> None:
        """Remove `tables/NAME.parquet`, if it is there."""
        (self.path / "tables" / f"{name}.parquet").unlink(missing_ok=True)

    def file_digest(self, *parts: str) -> str | None:
        """Hash of a file of the run; None where there is none."""
        target = self.path.joinpath(*parts)
        return hashlib.sha256(target.read_bytes()).hexdigest() if target.exists() else None

    def table_digest(self, study: str) -> str:
        """Hash of the table of a study's name and of its rows, as they stand; of nothing where there are none."""
        digest = hashlib.sha256()
        for name in (study, f"{study}.rows"):
            target = self.path / "tables" / f"{name}.parquet"
            digest.update(hashlib.sha256(target.read_bytes() if target.exists() else b"").digest())
        return digest.hexdigest()

    def save_figure(self, name: str, figure: Figure) -> list[Path]:
        """Write `figures/NAME.png` (200 dpi) and `figures/NAME.svg`."""
        import matplotlib

        targets = []
        for suffix in ("png", "svg"):
            target = self.path / "figures" / f"{name}.{suffix}"
            # Without its date, and with fixed ids, the same figure is the same file.
            options: dict[str, Any] = {"metadata": {"Date": None}} if suffix == "svg" else {"dpi": 200}
            with matplotlib.rc_context({"svg.hashsalt": "reasoninterp"}):
                write_whole(target, partial(figure.savefig, format=suffix, bbox_inches="tight", **options), mode="wb")
            targets.append(target)
        return targets

    def save_text(self, name: str, text: str) -> Path:
        """Write a text file (the report) whole."""
        target = self.path / name
        write_whole(target, lambda f: f.write(text))
        return target


class Shard:
    """Finished cells of one study, one JSON line each: `{"cell": key, "rows": [...], "seconds": s}`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._cut_unfinished_line()

    def _cut_unfinished_line(self) -> None:
        if not self.path.exists():
            return
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            with self.path.open("r+b") as f:
                f.truncate(len(whole))

    def read(self) -> dict[str, list[dict[str, Any]]]:
        """Rows by cell key."""
        if not self.path.exists():
            return {}
        done: dict[str, list[dict[str, Any]]] = {}
        with self.path.open(encoding="utf-8") as f:
            for number, line in enumerate(f, 1):
                try:
                    entry = json.loads(line)
                    done[entry["cell"]] = entry["rows"]
                except (ValueError, KeyError, TypeError):
                    raise UserError(
                        f"{self.path}, line {number}: not a finished cell; delete the line, and it is measured again."
                    ) from None
        return done

    def append(self, finished: Mapping[str, list[dict[str, Any]]], seconds: float) -> dict[str, list[dict[str, Any]]]:
        """Append a batch of cells; on return they outlive the process.

        Returns:
            The rows as `read` will give them (plain numbers, text and lists), so that a run that measured them and one
            that found them make the same tables.
        """
        lines = [
            json.dumps({"cell": key, "rows": rows, "seconds": round(seconds / len(finished), 4)}, default=_json_value)
            for key, rows in finished.items()
        ]
        with self.path.open("a", encoding="utf-8") as f:
            f.write("\n".join(lines) + "\n")
            f.flush()
            os.fsync(f.fileno())
        return {entry["cell"]: entry["rows"] for entry in map(json.loads, lines)}


def write_whole(target: Path, write: Callable[[Any], object], mode: str = "w") -> None:
    """Write to a temporary file beside the target, then rename: a reader sees the old file or the new one."""
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=UNFINISHED)
    try:
        with os.fdopen(handle, mode, encoding=None if "b" in mode else "utf-8") as f:
            write(f)
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    found = {"python": platform.python_version()}
    for name in VERSIONED:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def hardware() -> dict[str, Any]:
    """Processor, cores, memory and, if torch is loaded and sees one, the accelerator."""
    import psutil

    torch = sys.modules.get("torch")
    gpu = torch.cuda.get_device_name(0) if torch is not None and torch.cuda.is_available() else None
    return {
        "machine": platform.machine(),
        "system": platform.system(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "accelerator": gpu,
    }


def _check_own(path: Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """The manifest of the run that stands in a directory, None if the directory is free; others' are refused."""
    found = _read_manifest(path)
    if found is None:
        # A run that was killed before its first manifest was whole leaves these.
        mine = (".lock", ".run.json.")
        if path.exists() and any(not p.name.startswith(mine) for p in path.iterdir()):
            raise UserError(f"--out {path}: the directory is not empty and is no run; give an empty or a new one.")
        return None
    before, now = found.get("identity"), _plain(identity)
    if not isinstance(before, dict):
        raise UserError(f"--out {path}: its run.json is none of a run of this kit; give another directory.")
    differs = [key for key in {**now, **before} if before.get(key) != now.get(key)]
    if differs:
        raise UserError(
            f"--out {path}: this directory belongs to another run ({', '.join(differs)} "
            f"{'differs' if len(differs) == 1 else 'differ'}); give another directory."
        )
    return found


def _read_manifest(path: Path) -> dict[str, Any] | None:
    target = path / "run.json"
    if not target.exists():
        return None
    try:
        found = json.loads(target.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        message = f"{target}: not valid JSON ({error.msg}, line {error.lineno}); give another directory."
        raise UserError(message) from None
    except UnicodeDecodeError:
        raise UserError(f"{target}: not UTF-8 text; give another directory.") from None
    if not isinstance(found, dict):
        raise UserError(f"{target}: not a JSON object; give another directory.")
    return found


def _json_value(value: Any) -> Any:
    """NumPy and torch scalars and arrays as plain numbers and lists."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"a row holds a {type(value).__name__}, which has no place in a table; give numbers or text.")


def _plain(value: Any) -> Any:
    """What JSON can hold; paths and the like become text."""
    return json.loads(json.dumps(value, default=str))
