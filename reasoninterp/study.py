"""What a study is; knows no room. How one is run: `running`; where: `executors`.

A study is a class with a name, parameters (its annotated fields, which become flags of the command line) and

* `measure(context, batch)`: rows for a batch of cells, each made with `cell.row(...)`;
* `summarise(rows, context)`: from all rows to a table with intervals (or several, by name);
* `draw(summary)`: a figure (or several, by name).

By default a cell is a trace × mind; a study that is not per trace says its own in `cells(context)`.  A study that
searches defines `search(context, evaluate)` instead and asks for cells one by one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Hashable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeAlias, dataclass_transform

import pandas as pd

from reasoninterp.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = dict[str, Any]
Tables: TypeAlias = pd.DataFrame | Mapping[str, pd.DataFrame]
PARAMETER_INDENT = 4  # of `name: text` in a docstring's `Parameters:`
REGISTRY: dict[str, type[Study]] = {}


@dataclass(frozen=True)
class Cell:
    """The unit of work, of resuming and of seeding.

    Attributes:
        key: unique within the study.
        group: cells of one group may share a batch; the context is opened for the group (by default, a mind's name;
            a blend or a graft of minds for studies in weight space; "" for none).
        labels: columns that every row of this cell carries (by default `mind` and `trace`).
        item: what `measure` needs (by default the trace with its contrast); picklable.
        seed: set by the runner.
    """

    key: str
    group: Hashable = ""
    labels: Mapping[str, Any] = field(default_factory=dict)
    item: Any = None
    seed: int = 0

    def row(self, **values: Any) -> Row:
        """A row of this cell: its labels and these values."""
        return {"_cell": self.key, **self.labels, **values}


class Batch(tuple[Cell, ...]):
    """Cells of one group, measured together."""

    @property
    def group(self) -> Hashable:
        """The group the cells share."""
        return self[0].group

    @property
    def mind(self) -> str:
        """The mind the cells share (the default cells' group)."""
        return str(self[0].group)

    @property
    def items(self) -> list[Any]:
        """The cells' items, in order."""
        return [cell.item for cell in self]


class Context(Protocol):
    """What a study is measured in: minds and traces for most, anything with these members for the runner."""

    seed: int

    def cells(self) -> Iterable[Cell]:
        """The default cells."""

    def open(self, group: Any) -> AbstractContextManager[Any]:
        """Make the group's mind the one that is read."""

    def identity(self) -> Mapping[str, Any]:
        """What the numbers depend on besides the study: hashes of weights and traces, dtype, prompt, seed."""

    def batch_size(self, study: Study) -> int:
        """How many cells to measure at once, to begin with."""

    def shrink(self) -> None:
        """Use less memory from now on (called when memory ran out, beside halving the batch)."""


@dataclass_transform(kw_only_default=True)
class Study:
    """A study: subclass it, name it, annotate its parameters, write `measure` and `summarise`, and it runs.

    Class attributes:
        name: what `reasoninterp run NAME` calls it; by default the class's name in kebab case.
        needs: names of studies whose tables this one reads with `context.table(name)`; they are run first.
        version: if set, replaces the hash of the study's source file in the shard's key, so that a change of
            `draw` alone does not measure everything again; the kit's own sources stay in the key.
    """

    name: ClassVar[str] = ""
    needs: ClassVar[tuple[str, ...]] = ()
    version: ClassVar[str] = ""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        dataclasses.dataclass(kw_only=True)(cls)
        if "name" not in cls.__dict__:
            words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", cls.__name__.strip("_"))
            cls.name = words.replace("_", "-").lower()
        REGISTRY[cls.name] = cls

    def cells(self, context: Any) -> Iterable[Cell]:
        """The cells to measure; by default every trace × mind."""
        return context.cells()

    def measure(self, context: Any, batch: Batch) -> Iterable[Row]:
        """Rows for the cells of a batch, each made with `cell.row(...)`."""
        raise TypeError(f"study {self.name!r} has no measure(context, batch)")

    def summarise(self, rows: pd.DataFrame, context: Any) -> Tables:
        """A table with intervals, or several by name; by default the rows themselves."""
        return rows

    def draw(self, summary: Any) -> Figure | Mapping[str, Figure] | None:
        """A figure, or several by name; by default none."""
        return None

    def batch_size(self, context: Any) -> int | None:
        """How many cells to measure at once, to begin with; by default (None) as many as the context finds right."""
        return None

    def parameters(self) -> dict[str, Any]:
        """The parameters' values by name."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # type: ignore[arg-type]

    @classmethod
    def describe(cls) -> str:
        """The first line of the docstring."""
        return (inspect.getdoc(cls) or "").split("\n")[0]

    @classmethod
    def explain(cls) -> tuple[str, dict[str, str]]:
        """The docstring without its part `Parameters:`, and what that says of each parameter (`name: text`, indented)."""
        about, _, listed = (inspect.getdoc(cls) or "").partition("\nParameters:\n")
        known = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        said: dict[str, str] = {}
        for line in listed.split("\n"):
            name, found, text = line.strip().partition(":")
            if found and name in known and len(line) - len(line.lstrip()) == PARAMETER_INDENT:
                said[name] = text.strip()
            elif said and line.strip():
                said[list(said)[-1]] += f" {line.strip()}"
        return about.strip(), said


def load_module(path: str | Path) -> Any:
    """Import a Python file by its path, under a name made from it, so that its classes can be found again.

    Raises:
        UserError: no such file, or it does not end in `.py`.
    """
    path = Path(path).resolve()
    for module in list(sys.modules.values()):
        found = getattr(module, "__file__", None)
        if found and Path(found).resolve() == path and getattr(module, "__name__", "") != "__main__":
            return module
    name = f"reasoninterp_user_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise UserError(f"{path}: not a Python file; give the path of a study, ending in .py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]  # else half a module would be found the next time
        raise
    return module


def studies_in(path: str | Path) -> list[type[Study]]:
    """The studies that a Python file defines, in order."""
    module = load_module(path)
    found = [v for v in vars(module).values() if isinstance(v, type) and issubclass(v, Study) and v is not Study]
    return list(dict.fromkeys(cls for cls in found if cls.__module__ == module.__name__))
