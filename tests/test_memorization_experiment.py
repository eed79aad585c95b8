"""The experiment on organisms and its notebook: what was memorised shows as a local source, and only there."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from reasoninterp.study import load_module
from reasoninterp.traces.io import read_traces

ROOT = Path(__file__).resolve().parents[1]


def test_the_experiment_and_its_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = load_module(ROOT / "experiments" / "memorization.py")
    one, own = script.run(tmp_path, only=("memorised",), limit=16, n_null=19, quiet=True)
    tokens = one.table("memorization_tokens")
    assert set(tokens["shift"]) == {script.IN, *script.OTHERS.values()} and set(tokens["mind"]) == {"base", "tuned"}
    # The index holds the memorised rows whole, as often as training saw them.
    length = tokens[tokens["part"] == "answer"].groupby("shift")["local_n_tokens"].mean()
    assert length[script.IN] > 10 > length[script.OTHERS["lastop-base"]]
    excess = one.table("memorization").query("measure == 'excess' and source == 'local' and part == 'answer'")
    excess = excess[excess["wrong"] == "all"].set_index(["mind", "shift"])["value"]
    assert excess["tuned", script.IN] > excess["base", script.IN] + 0.05
    written = own.table("memorization_tokens")
    assert (written["writer"] == written["mind"]).all() and set(written["wrong"].dropna()) == {True, False}
    # Written anew by its operations, a base's chain that is judged right is the file's.
    traces = {t.id: t for t in read_traces(tmp_path / "organisms" / "traces" / "mixed" / "memorised.jsonl").traces}
    steps = written[(written["mind"] == "base") & (written["part"] == "step")]
    compared = 0
    for name, some in steps.groupby("trace"):
        if not some["wrong"].any():
            assert tuple(some["text"].str.strip()) == traces[name].steps
            compared += 1
    assert compared > 20
    assert (one.path / "report.html").exists() and len(script.summary([one, own])) >= 3

    monkeypatch.setenv("REASONINTERP_MEMORIZATION", str(tmp_path))
    path = ROOT / "notebooks" / "memorization.ipynb"
    notebook = nbformat.read(path, as_version=4)
    metadata = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=120, kernel_name="python3", resources=metadata).execute()
    drawn = [o for cell in notebook.cells for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]
    assert len(drawn) == 2
