"""From a run's tables to what the page prints: cells, rows, tiles, findings.

1. Each number keeps its interval and n.
2. A difference of two minds is the one in the table `differences` (paired over traces).  Where that has none, it is
   `b − a` with the interval `b − a ± √(…)` from the two single ones (MOVER: Zou and Donner, 2008), as if the minds
   had been tested on different traces; on the same traces that is too wide rather than too narrow.
3. Nothing is dropped: a test that this module does not know gets a row under its own name.
"""

from __future__ import annotations

import difflib
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

import pandas as pd

from reasoninterp.figures import MIND_COLOURS, mind_order, number
from reasoninterp.report import plots, weight_plots, words
from reasoninterp.runs import Run

READS = re.compile(r"^(?P<what>.*?)reads_(?P<writer>.+)$")


@dataclass(frozen=True)
class Cell:
    """A number as printed: its value, its interval (may be empty) and the raw number."""

    value: str
    interval: str = ""
    raw: float = math.nan


@dataclass
class Line:
    """A row of the behaviour table: name, explanation, one cell a mind, the difference, and marks for the little plot."""

    name: str
    hint: str
    cells: list[Cell]
    difference: Cell
    marks: list[dict[str, Any]] = field(default_factory=list)
    unit: str = ""
    n: str = ""


@dataclass
class Tile:
    """One of the few numbers on top of the page: base → tuned."""

    name: str
    before: Cell | None
    after: Cell
    unit: str = ""
    note: str = ""


def cell(row: Mapping[str, Any] | pd.Series | None, value: str = "value", prefix: str = "ci", unit: str = "") -> Cell:
    """A table's row as a printed cell.

    Args:
        row: the row, or None.
        value: the column of the number.
        prefix: its interval is in `<prefix>_low` and `<prefix>_high`.
        unit: `%` for shares, `nats` for effects, else plain.
    """
    if row is None or value not in row or pd.isna(row[value]):
        return Cell("–")
    v = float(row[value])
    return Cell(fixed(v, unit), interval(row.get(f"{prefix}_low"), row.get(f"{prefix}_high"), unit), v)


def fixed(v: float, unit: str = "") -> str:
    """A share in per cent with one decimal, an effect in nats with two, anything else with three."""
    if not math.isfinite(v):
        return "–"
    if unit == "nats" and 0 < abs(v) < 0.095:
        return number(v, 2)
    text = f"{100 * v:.1f}" if unit == "%" else f"{v:,.2f}" if unit == "nats" or abs(v) >= 10 else f"{v:.3f}"
    return (text.lstrip("-") if float(text.replace(",", "")) == 0 else text).replace("-", "−")


def interval(low: Any, high: Any, unit: str = "") -> str:
    """`[low, high]`, or nothing where there is no interval."""
    if low is None or high is None or pd.isna(low) or pd.isna(high):
        return ""
    return f"[{fixed(float(low), unit)}, {fixed(float(high), unit)}]"


def difference(a: pd.Series | None, b: pd.Series | None, unit: str = "") -> Cell:
    """`b − a` with the interval of the module's step 2."""
    if a is None or b is None:
        return Cell("–")
    d = float(b["value"]) - float(a["value"])
    ends = [float(r.get(k, math.nan)) for r in (a, b) for k in ("ci_low", "ci_high")]
    if not all(math.isfinite(e) for e in ends):
        return Cell(fixed(d, unit), "", d)
    low = d - math.hypot(float(b["value"]) - ends[2], ends[1] - float(a["value"]))
    high = d + math.hypot(ends[3] - float(b["value"]), float(a["value"]) - ends[0])
    return Cell(fixed(d, unit), interval(low, high, unit), d)


def unit_of(test: str) -> str:
    """The unit in which a test or measure is printed."""
    return "nats" if test in words.IN_NATS else "" if test in words.NO_SHARE else "%"


def minds_of(*tables: pd.DataFrame | None) -> list[str]:
    """The minds of the tables, base first."""
    return mind_order(m for t in tables if t is not None and "mind" in t for m in t["mind"])


def behaviour_groups(
    behaviour: pd.DataFrame | None,
    effect: pd.DataFrame | None,
    minds: Sequence[str],
    differences: pd.DataFrame | None = None,
) -> list[tuple[str, list[Line]]]:
    """The behaviour table in groups, in the order of `words.TESTS`, then E, then tests by their own name."""
    paired = differences if differences is not None else pd.DataFrame(columns=["mind", "test", "step", "value"])
    groups: dict[str, list[Line]] = {g: [] for g in words.TESTS}
    known = [t for tests in words.TESTS.values() for t in tests]
    if behaviour is not None:
        whole = behaviour[behaviour["step"].isna()] if "step" in behaviour else behaviour
        tests = sorted(dict.fromkeys(whole["test"]), key=lambda t: known.index(t) if t in known else len(known))
        for test in tests:
            if READS.match(test):
                continue
            group, name, hint = words.describe(test)
            groups.setdefault(group, []).append(
                _line(whole[whole["test"] == test], name, hint, minds, unit_of(test), paired[paired["test"] == test])
            )
    if effect is not None:
        for contrast, rows in effect.groupby("contrast", sort=False):
            lines = []
            for measure in dict.fromkeys(rows["measure"]):
                name, hint = words.MEASURES.get(measure, (measure, ""))
                lines.append(_line(rows[rows["measure"] == measure], name, hint, minds, unit_of(measure)))
            groups[f"Step effect, {contrast} change"] = lines
    return [(name, lines) for name, lines in groups.items() if lines]


def _line(
    rows: pd.DataFrame, name: str, hint: str, minds: Sequence[str], unit: str, paired: pd.DataFrame | None = None
) -> Line:
    """One row of the behaviour table; a number that is known and not measured has no difference."""
    found = [plots.pick(rows, mind=m) for m in minds]
    stated = None if paired is None else plots.pick(paired[paired["step"].isna()], mind=minds[-1])
    gap = Cell("–")
    if stated is not None:
        gap = cell(stated, unit=unit)
    elif len(found) > 1 and not ("method" in rows and rows["method"].eq("exact").all()):
        gap = difference(found[0], found[-1], unit)
    n = " / ".join(map(str, sorted({int(r["n"]) for r in found if r is not None and pd.notna(r.get("n"))})))
    line = Line(name, hint, [cell(r, unit=unit) for r in found], gap, unit=unit, n=n)
    if unit != "nats" and all(r is None or 0 <= r["value"] <= 1 for r in found):
        for k, (mind, row) in enumerate(zip(minds, found, strict=True)):
            if row is not None:
                ends = [row["value"] if pd.isna(row.get(c)) else row[c] for c in ("ci_low", "ci_high")]
                x, low, high = (round(6 + 108 * min(1.0, max(0.0, float(v))), 1) for v in (row["value"], *ends))
                line.marks.append({"x": x, "low": low, "high": high, "y": 6 + 9 * k, "mind": mind})
    return line


def crossed(behaviour: pd.DataFrame | None, minds: Sequence[str]) -> list[dict[str, Any]]:
    """The tests in which each mind reads each mind's chains: one square (reader × writer) a kind of test."""
    if behaviour is None:
        return []
    squares: dict[str, dict[tuple[str, str], Cell]] = {}
    for test in dict.fromkeys(behaviour["test"]):
        match = READS.match(test)
        if match:
            what = match["what"].strip("_").replace("_", " ") or "accuracy"
            for mind in minds:
                row = plots.pick(behaviour, mind=mind, test=test)
                squares.setdefault(what, {})[mind, match["writer"]] = cell(row, unit="%")
    out = []
    for what, cells in squares.items():
        writers = mind_order(w for _, w in cells)
        rows = [(m, [cells.get((m, w), Cell("–")) for w in writers]) for m in minds]
        out.append({"what": what, "writers": writers, "rows": rows})
    return out


def tiles(tables: Mapping[str, pd.DataFrame], minds: Sequence[str]) -> list[Tile]:
    """Accuracy, follow rate, E, and the block that lost most: what one reads in five seconds."""
    out = []
    wanted = (
        ("behaviour", {"test": "accuracy_own_chain"}, "Accuracy, own chain", "%"),
        ("behaviour", {"test": "swap_follow"}, "Follow rate, chain swapped", "%"),
        ("effect", {"measure": "E"}, "Effect of the chain, E", "nats"),
    )
    for table, labels, name, unit in wanted:
        if table in tables and len(minds) > 1:
            ends = [plots.pick(tables[table], mind=m, **labels) for m in (minds[0], minds[-1])]
            if any(e is not None for e in ends):
                out.append(Tile(name, cell(ends[0], unit=unit), cell(ends[1], unit=unit), unit))
    lead = leading(tables)
    if lead is not None:
        entry = cell(lead, "attribution", unit="nats")
        loss = cell(tables["ledger_total"].iloc[0], "loss", unit="nats")
        note = f"{entry.value} of {loss.value} nats"
        out.append(Tile("Largest entry of the ledger", None, Cell(str(lead["unit"])), note=note))
    return out


def leading(tables: Mapping[str, pd.DataFrame]) -> pd.Series | None:
    """The block with the largest entry in the direction of the loss, if E was lost (upper end of its interval < 0)."""
    if "ledger" not in tables or "ledger_total" not in tables:
        return None
    total = tables["ledger_total"].iloc[0]
    upper = total.get("loss_ci_high", math.nan)
    if not (float(total["loss"]) < 0 and (pd.isna(upper) or float(upper) < 0)):
        return None
    rows = weight_plots.blocks(tables["ledger"])
    rows = rows[rows["attribution"] < 0]
    return None if rows.empty else rows.iloc[0]


def findings(tables: Mapping[str, pd.DataFrame]) -> list[str]:
    """What the ledger says in words: the leading block, how its heads share it, and where the weights changed most."""
    if "ledger" not in tables or "ledger_total" not in tables:
        return []
    loss = cell(tables["ledger_total"].iloc[0], "loss", "loss_ci", "nats")
    lead = leading(tables)
    if lead is None:
        return [f"E changed by {loss.value} {loss.interval} nats: there is no loss to place."]
    entry = cell(lead, "attribution", unit="nats")
    out = [
        f"{lead['unit']} carries {entry.value} {entry.interval} of the {loss.value} {loss.interval} nats by which E changed."
    ]
    rows = weight_plots.blocks(tables["ledger"])
    if "weight_change" in rows and rows["weight_change"].notna().any():
        most = rows.loc[rows["weight_change"].idxmax(), "unit"]
        out[0] += (
            " The weights changed most there, too." if most == lead["unit"] else f" The weights changed most in {most}."
        )
    fine = weight_plots.circuits(tables["ledger"])
    mine = (
        fine[(fine["layer"] == lead["layer"]) & fine["circuit"].isin(["QK", "OV"])]
        if pd.notna(lead["layer"])
        else fine[:0]
    )
    if lead["kind"] == "attn" and len(mine):
        share = mine.groupby("circuit")["attribution"].sum()
        out.append(
            f"Of {lead['unit']}'s entry, {fixed(share.get('QK', 0.0), 'nats')} nats stand in QK circuits (its heads look "
            f"elsewhere) and {fixed(share.get('OV', 0.0), 'nats')} in OV circuits (they carry something else)."
        )
    return out


def example(value: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The example trace: pairs of steps with the changed words marked, and what each mind answered."""
    if not value:
        return None
    clean, corrupt = list(value.get("steps") or []), list(value.get("corrupt_steps") or [])
    pairs = []
    for i in range(max(len(clean), len(corrupt))):
        a = str(clean[i]) if i < len(clean) else None
        b = str(corrupt[i]) if i < len(corrupt) else None
        left, right = marked(a or "", b or "") if corrupt else ([(a or "", False)], [])
        pairs.append({"number": i + 1, "clean": left, "corrupt": right, "changed": bool(corrupt) and a != b})
    answers = {"question": str(value.get("answer", "")).strip(), "chain": str(value.get("corrupt_answer", "")).strip()}
    readings = []
    for r in value.get("readings") or []:
        said = answer_text(r.get("answer"))
        swapped = r.get("chain") != "clean"
        meaning, tone = "neither answer", "none"
        if swapped and said == answers["chain"]:
            meaning, tone = "follows the changed chain", "good"
        elif r.get("answer") is None:
            meaning = ""
        elif said == answers["question"]:
            meaning, tone = ("stays with the clean answer", "bad") if swapped else ("the clean answer", "good")
        readings.append(
            {**r, "chain": "changed" if swapped else "clean", "answer": said, "meaning": meaning, "tone": tone}
        )
    samples = [{**s, "answer": answer_text(s.get("answer"))} for s in value.get("samples") or []]
    return {**value, "pairs": pairs, "readings": readings, "samples": samples}


def answer_text(answer: Any) -> str:
    """An answer as printed; none is said to be none."""
    return "no answer found" if answer is None else str(answer).strip()


def marked(a: str, b: str) -> tuple[list[tuple[str, bool]], list[tuple[str, bool]]]:
    """Two texts as pieces `(text, changed)`, compared word by word; the pieces join back to the texts."""
    x, y = (re.findall(r"\w+|\s+|[^\w\s]", t) for t in (a, b))
    left, right = [], []
    for tag, i, j, k, m in difflib.SequenceMatcher(None, x, y, autojunk=False).get_opcodes():
        left.append(("".join(x[i:j]), tag != "equal"))
        right.append(("".join(y[k:m]), tag != "equal"))
    return [p for p in left if p[0]], [p for p in right if p[0]]


def name_of(run: Run, mind: str) -> str:
    """What the user called a mind: the last part of its directory or hub id."""
    arguments = run.manifest.get("arguments") or {}
    given = str((arguments.get("minds") or {}).get(mind) or arguments.get(mind) or "")
    return PurePath(given).name or given or mind


FLAGS = {"extractor": "extract", "batch_size": "batch-size", "max_new_tokens": "max-new-tokens"}
FLAGS |= {
    k: k for k in ("traces", "format", "prompt", "contrast", "shots", "limit", "seed", "device", "dtype", "everything")
}
FLAGS |= {"second_prompt": "second-prompt", "allow_pickle": "allow-pickle", "trust_remote_code": "trust-remote-code"}


def command(run: Run) -> str:
    """The call that gives these numbers again."""
    arguments = run.manifest.get("arguments") or {}
    if isinstance(arguments.get("command"), str):
        return arguments["command"]
    minds = arguments.get("minds") or {m: arguments[m] for m in MIND_COLOURS if m in arguments}
    parts = ["reasoninterp compare", *(f"--{m} {shlex.quote(str(path))}" for m, path in minds.items())]
    for key, flag in FLAGS.items():
        value = arguments.get(key)
        if value is True:
            parts.append(f"--{flag}")
        elif value is not None and value is not False:
            parts.append(f"--{flag} {shlex.quote(str(value))}")
    return " ".join([*parts, f"--out {shlex.quote(str(run.path))}"])


def flat(value: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """A nested entry of run.json as rows `(dotted.key, text)`."""
    out: list[tuple[str, str]] = []
    for key, item in (value or {}).items():
        if isinstance(item, Mapping):
            inner = ", ".join(f"{v} {k}" if isinstance(v, (int, float)) else f"{k} {v}" for k, v in item.items()) or "–"
            out.append((str(key), inner))
        else:
            out.append((str(key), "–" if item is None else str(item)))
    return out


def conventions(behaviour: pd.DataFrame | None) -> list[tuple[str, str]]:
    """Each test that has a convention of its own, or a formula, with it."""
    if behaviour is None or "convention" not in behaviour:
        return []
    rows = behaviour[behaviour["convention"].fillna("").astype(str) != ""]
    return sorted({(words.describe(t)[1], str(c)) for t, c in zip(rows["test"], rows["convention"], strict=True)})


def full_table(frame: pd.DataFrame) -> dict[str, Any]:
    """Any table, printed whole: integers as they are, other numbers to four significant digits."""

    def show(v: Any) -> str:
        if v is None or (isinstance(v, float) and math.isnan(v)):
            return ""
        if isinstance(v, float):
            return str(int(v)) if v.is_integer() and abs(v) < 1e9 else number(v, 4)
        return str(v)

    return {"columns": list(frame.columns), "rows": [[show(v) for v in row] for row in frame.to_numpy(dtype=object)]}


def display_name(run: Run) -> str:
    """A run among others: its tuned mind's own name, or its directory's."""
    own = name_of(run, "tuned")
    return run.path.resolve().name if own == "tuned" else own


def evidence_unit(entry: Mapping[str, Any]) -> str:
    """Evidence is in nats or a share where its claim says so; else a share if its size allows it."""
    claim = str(entry.get("claim", ""))
    sizes = [abs(float(entry[k])) for k in ("value", "ci_low", "ci_high") if entry.get(k) is not None]
    return "nats" if "nats" in claim else "%" if claim.startswith("share ") or all(s <= 1 for s in sizes) else ""


def evidence_lines(entries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Claims with their number as printed."""
    return [{**e, "unit": (u := evidence_unit(e)), "cell": cell(e, unit=u)} for e in entries]


def located(run: Run, tables: Mapping[str, pd.DataFrame]) -> dict[str, Any] | None:
    """What `locate` found, where this run has it: its word, confidence, sentences and evidence."""
    if "location" not in tables:
        return None
    row = tables["location"].iloc[0]
    said = run.manifest.get("location") or {}
    known = pd.notna(row["confidence"])
    return {
        "word": str(row["verdict"]),
        "tone": words.TONES.get(str(row["verdict"]), "none"),
        "confidence": f"{row['confidence']:.2f}" if known else "",
        "basis": str(row["confidence_basis"]),
        "sentences": [str(s) for s in said.get("sentences") or []],
        "evidence": evidence_lines(tables["evidence"].to_dict("records")) if "evidence" in tables else [],
    }


def sibling_row(run: Run, href: str) -> dict[str, Any]:
    """Another pair in one line: its verdict and its few numbers."""
    tables = {
        name: run.table(name) for name in ("behaviour", "effect", "ledger", "ledger_total") if run.has_table(name)
    }
    minds = minds_of(tables.get("behaviour"), tables.get("effect")) or list(MIND_COLOURS)
    verdict = run.manifest.get("verdict") or {}
    word = str(verdict.get("word", "no verdict"))
    return {
        "name": display_name(run),
        "pair": f"{name_of(run, 'base')} → {name_of(run, 'tuned')}" if name_of(run, "base") != "base" else "",
        "word": word,
        "tone": words.TONES.get(word, "none"),
        "tiles": {t.name: t for t in tiles(tables, minds)},
        "href": href,
    }
