"""The two studies in `experiments/studies`, run through the command line, killed in the middle and taken up again.

Three processes do it all, because each spends seconds on imports: the first makes the unbroken run of both studies and
is killed within the broken run of the first; the second resumes that and is killed within the second study; the third
resumes that one.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch

from .tiny import save_tiny

ROOT = Path(__file__).parents[1]
STUDIES = {"shuffled-steps": "shuffled_steps.py", "blend-threshold": "blend_threshold.py"}
CELLS = {"shuffled-steps": 2 * 24, "blend-threshold": (2 + 4) * 24}  # minds x traces; (ends + halvings) x traces
MAIN = "import json, sys; from reasoninterp.cli import main; [main(a) for a in json.loads(sys.argv[1])]"


def write_minds(directory: Path) -> dict[str, str]:
    """Two random models, of which one leans to the answer 12 and the other to 2: the blend crosses somewhere."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = {}
    for mind, word in {"base": " 12", "tuned": " 2"}.items():
        out[mind] = save_tiny(directory / mind, "gpt2")
        model = AutoModelForCausalLM.from_pretrained(out[mind])
        (token,) = AutoTokenizer.from_pretrained(out[mind]).encode(word)
        with torch.no_grad():
            model.transformer.ln_f.bias.copy_(0.8 * model.transformer.wte.weight[token])
        model.save_pretrained(out[mind])
    return out


def write_traces(path: Path, n: int = 24) -> str:
    """Sums of three numbers; every corrupt chain implies 12."""
    parts = {"before_question": "Q: ", "after_question": "\n", "between_steps": "\n"}
    lines: list[dict] = [{"format": {**parts, "before_answer": "\n####", "after_answer": "\n"}}]
    for k in range(n):
        a, b, c = k + 2, k % 5 + 3, k % 7 + 5
        right = {"steps": [f"{a} + {b} = {a + b}.", f"{a + b} + {c} = {a + b + c}.", f"So {a + b + c}."]}
        wrong = {"corrupt_steps": [f"{a} + {b} = 5.", "5 + 7 = 12.", "So 12."], "corrupt_answer": "12"}
        lines.append({"id": f"t{k}", "question": f"{a} and {b} and {c}?", "answer": str(a + b + c), **right, **wrong})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


class Process:
    """One Python process that runs the command line with each list of arguments in turn."""

    def __init__(self, log: Path, *commands: list[str]) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        self.log = log
        with log.open("w") as out:
            self.popen = subprocess.Popen(
                [sys.executable, "-c", MAIN, json.dumps(commands)],
                cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def kill_when(self, shards: Path, lines: int) -> None:
        """SIGKILL as soon as the shards hold so many lines."""
        while sum(f.read_bytes().count(b"\n") for f in shards.glob("*.jsonl")) < lines:
            assert self.popen.poll() is None, f"ended before it could be killed:\n{self.log.read_text()}"
            time.sleep(0.002)
        self.popen.send_signal(signal.SIGKILL)
        assert self.popen.wait() == -signal.SIGKILL

    def counts(self) -> list[tuple[int, int]]:
        """For every study that ended: cells measured, cells taken from the run."""
        found = re.findall(r"^(\d+) cells measured, (\d+) taken from the run", self.log.read_text(), re.MULTILINE)
        return [(int(measured), int(taken)) for measured, taken in found]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[tuple[int, int]]]]:
    """The directory with the runs `whole` and `broken`, and, per study, the counts of both."""
    at = tmp_path_factory.mktemp("studies")
    minds, traces = write_minds(at), write_traces(at / "traces.jsonl")

    def command(study: str, out: str) -> list[str]:
        file = str(ROOT / "experiments" / "studies" / STUDIES[study])
        inputs = ["--base", minds["base"], "--tuned", minds["tuned"], "--traces", traces, "--out", str(at / out)]
        more = ["--halvings", "4"] if study == "blend-threshold" else []
        return ["run", file, *inputs, "--batch-size", "2", "--quiet", *more]

    one, two = STUDIES
    shards = at / "broken" / "shards"
    first = Process(at / "first.log", command(one, "whole"), command(two, "whole"), command(one, "broken"))
    first.kill_when(shards / one, 4)
    second = Process(at / "second.log", command(one, "broken"), command(two, "broken"))
    second.kill_when(shards / two, 60)
    third = Process(at / "third.log", command(two, "broken"))
    assert third.popen.wait(timeout=120) == 0, third.log.read_text()
    whole, resumed = first.counts(), [*second.counts(), *third.counts()]
    return at, {study: [whole[i], resumed[i]] for i, study in enumerate(STUDIES)}


@pytest.mark.parametrize("study", STUDIES)
def test_killed_study_measures_only_what_is_missing(runs, study):
    _, counts = runs
    (measured, taken), (measured_again, taken_again) = counts[study]
    assert (measured, taken) == (CELLS[study], 0)
    assert 0 < measured_again < measured
    assert taken_again > 0
    assert measured_again + taken_again == measured


@pytest.mark.parametrize(
    "table",
    ["shuffled", "shuffled_last", "shuffled-steps.rows", "blend_path", "crossing", "blend-threshold.rows"],
)
def test_resumed_tables_equal_those_of_an_unbroken_run(runs, table):
    at, _ = runs
    whole, broken = (pd.read_parquet(at / run / "tables" / f"{table}.parquet") for run in ("whole", "broken"))
    assert len(whole)
    pd.testing.assert_frame_equal(broken, whole, check_exact=False, rtol=0, atol=1e-6)


@pytest.mark.parametrize("study", STUDIES)
def test_resumed_study_draws_its_figure(runs, study):
    at, _ = runs
    assert (at / "broken" / "figures" / f"{study}.png").stat().st_size > 1000


def test_shuffled_edits_are_the_same_for_both_minds(runs):
    at, _ = runs
    rows = pd.read_parquet(at / "whole" / "tables" / "shuffled-steps.rows.parquet")
    assert rows["same"].nunique() == 2, "the random models should keep some answers and change others"
    edits = rows.groupby(["trace", "mind"])["last_kept"].agg(tuple).unstack("mind").dropna()
    assert len(edits) > 3
    assert (edits["base"] == edits["tuned"]).all()


def test_bisection_brackets_the_crossing(runs):
    at, _ = runs
    path = pd.read_parquet(at / "whole" / "tables" / "blend_path.parquet")
    (crossing,) = pd.read_parquet(at / "whole" / "tables" / "crossing.parquet").to_dict("records")
    assert crossing["crossing"] == "found"
    assert crossing["below_at"] - crossing["above_at"] == 2**-4
    rate = path.set_index("alpha")["value"]
    assert rate[crossing["above_at"]] >= 0.5 > rate[crossing["below_at"]]
    assert list(path["alpha"][:3]) == [0.0, 1.0, 0.5]
    assert path["alpha"][3] == (0.25 if rate[0.5] < 0.5 else 0.75)


@pytest.mark.parametrize("name", ["shuffled_steps.py", "blend_threshold.py"])
def test_the_readme_shows_the_studies_as_they_are(name: str) -> None:
    root = Path(__file__).resolve().parents[1]
    code = (root / "experiments" / "studies" / name).read_text().rstrip()
    assert f"```python\n{code}\n```" in (root / "README.md").read_text()
