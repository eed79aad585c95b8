"""The command line: bad input in one sentence with status 2, plans, resuming, a whole comparison at floor."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from reasoninterp.cli import Memory, main
from tests.tiny import save_lora, save_tiny, save_tuned, tiny_tokenizer

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pair and a file of traces in GSM8K's style."""
    folder = tmp_path_factory.mktemp("cli")
    save_tiny(folder / "base", "llama-gqa", n_layers=2)
    save_tuned(folder / "base", folder / "tuned", scale=0.05)
    write_traces(folder / "traces.jsonl")
    return folder


def write_traces(path: Path, n: int = 6) -> None:
    lines = []
    for k in range(n):
        a, b = k + 2, k + 13
        steps = [f"{a}+{b}=<<{a}+{b}={a + b}>>{a + b}", f"{a + b}*2=<<{a + b}*2={2 * (a + b)}>>{2 * (a + b)}"]
        lines.append(
            json.dumps({"id": f"t{k}", "question": f"{a} and {b}, twice?", "steps": steps, "answer": str(2 * (a + b))})
        )
    path.write_text("\n".join(lines) + "\n")


def compare(home: Path, out: Path, *more: str, **changes: str) -> list[str]:
    options = {
        "base": str(home / "base"),
        "tuned": str(home / "tuned"),
        "traces": str(home / "traces.jsonl"),
        "out": str(out),
    }
    options |= changes
    given = [part for key, value in options.items() for part in (f"--{key}", value)]
    return ["compare", *given, "--quiet", "--max-new-tokens", "8", *more]


def fails(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence of a command that fails with status 2."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()
    sentence = [line for line in said if line.startswith(("error:", "Error:"))]
    assert len(sentence) == 1, said
    assert "Traceback" not in "\n".join(said)
    return sentence[0]


def test_a_comparison_runs_to_a_report_that_says_at_floor(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    main(compare(home, out, "--second-prompt", "fewshot", "--everything"))
    said = capsys.readouterr().out
    assert "not interpretable here" in said
    manifest = json.loads((out / "run.json").read_text())
    assert manifest["verdict"]["word"] == "not interpretable here"
    assert {"identity", "versions", "hardware", "timings", "arguments"} <= set(manifest)
    html = (out / "report.html").read_text()
    assert "at floor" in html
    expected = {
        "ledger": {"unit", "layer", "kind", "head", "circuit", "attribution", "ci_low", "ci_high"},
        "grafts": {"unit", "restore", "cut", "e_restored", "e_cut", "e_base", "e_tuned"},
        "behaviour": {"mind", "test", "step", "value", "ci_low", "ci_high", "n"},
    }
    for name, columns in expected.items():
        assert columns <= set(pd.read_parquet(out / "tables" / f"{name}.parquet").columns), name
    assert pd.read_parquet(out / "tables" / "ledger_total.parquet")["residual_relative"].iloc[0] < 0.01
    assert (out / "figures").is_dir()
    assert list((out / "figures").glob("*.png"))
    assert list((out / "figures").glob("*.svg"))

    # The same command again takes every cell from the run and gives the same tables.
    before = {p.name: pd.read_parquet(p) for p in (out / "tables").glob("*.parquet")}
    main(compare(home, out, "--second-prompt", "fewshot", "--everything"))
    again = json.loads((out / "run.json").read_text())
    assert all(t["reused"] == t["cells"] for name, t in again["timings"].items() if name != "compare")
    for name, table in before.items():
        pd.testing.assert_frame_equal(pd.read_parquet(out / "tables" / name), table)

    # Another pair of models does not fit into this directory.
    sentence = fails(compare(home, out, tuned=str(home / "base")), capsys)
    assert "belongs to another run" in sentence
    assert str(out) in sentence


def test_internals_are_left_out_where_nothing_could_be_read_in_them(home: Path, tmp_path: Path) -> None:
    main(compare(home, tmp_path / "run"))
    made = {p.stem for p in (tmp_path / "run" / "tables").glob("*.parquet")}
    assert {"behaviour", "gate", "effect"} <= made
    assert not {"ledger", "grafts", "residual"} & made
    verdict = json.loads((tmp_path / "run" / "run.json").read_text())["verdict"]
    assert any("--everything" in caveat for caveat in verdict["caveats"])
    assert "at floor" in (tmp_path / "run" / "report.html").read_text()


def test_chains_without_calculations_are_compared_by_swapping_them(home: Path, tmp_path: Path) -> None:
    """Proofs and options have nothing to recompute; chains of other lengths cannot be aligned, and the page says so."""
    lines = []
    for k in range(6):
        steps = [f"{'abcdef'[k]} is a thing", "things are red"][: 1 + k % 2]
        lines.append(
            json.dumps({"id": f"t{k}", "question": "red?", "steps": steps, "answer": "yes" if k % 3 else "no"})
        )
    (tmp_path / "traces.jsonl").write_text("\n".join(lines) + "\n")
    main(compare(home, tmp_path / "run", "--everything", traces=str(tmp_path / "traces.jsonl")))
    manifest = json.loads((tmp_path / "run" / "run.json").read_text())
    assert sum(manifest["traces"]["refused"].values()) == 6  # each with its reason, though a swap stands in
    effect = pd.read_parquet(tmp_path / "run" / "tables" / "effect.parquet")
    assert set(effect["contrast"]) == {"swap"}
    assert (effect["n"] > 0).all()
    assert (tmp_path / "run" / "report.html").exists()


def test_plan_says_what_is_to_come_and_leaves_nothing(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(compare(home, tmp_path / "run", "--plan"))
    said = capsys.readouterr().out
    for word in ("traces", "memory", "time", "contrasts", "sweep        residual", "sweep        heads", "GFLOP"):
        assert word in said
    assert not (tmp_path / "run").exists()


BAD_TRACES = {
    "missing": (None, "no such file"),
    "empty": ("", "empty"),
    "malformed": ('{"id": "a", "question": "q", "steps": ["s"], "answer": "1"}\n{"id": ', "line 2"),
    "no steps": ('{"id": "a", "question": "q", "steps": [], "answer": "1"}\n', "line 1"),
    "no answer": ('{"id": "a", "question": "q", "steps": ["s"]}\n', "answer"),
}


@pytest.mark.parametrize("case", BAD_TRACES)
def test_bad_traces(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    text, expected = BAD_TRACES[case]
    path = tmp_path / "bad.jsonl"
    if text is not None:
        path.write_text(text)
    sentence = fails(compare(home, tmp_path / "run", traces=str(path)), capsys)
    assert expected in sentence
    assert path.name in sentence
    assert not (tmp_path / "run").exists()


def test_bad_models(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny(tmp_path / "other", "qwen2", n_layers=2)
    assert "architecture" in fails(compare(home, tmp_path / "run", tuned=str(tmp_path / "other")), capsys).lower()

    save_tiny(
        tmp_path / "words",
        "llama-gqa",
        n_layers=2,
        tokenizer=tiny_tokenizer(extra="and twice and twice 15 17 19 " * 50),
    )
    sentence = fails(compare(home, tmp_path / "run", tuned=str(tmp_path / "words")), capsys)
    assert "t0" in sentence
    assert "token" in sentence

    save_tuned(home / "base", tmp_path / "nan", scale=float("nan"))
    assert "finite" in fails(compare(home, tmp_path / "run", tuned=str(tmp_path / "nan")), capsys)

    assert "nowhere" in fails(compare(home, tmp_path / "run", base=str(tmp_path / "nowhere")), capsys)

    save_tiny(tmp_path / "wide", "llama-mha", n_layers=3)
    save_lora(tmp_path / "wide", tmp_path / "adapter", targets=["q_proj", "v_proj"])
    assert "adapter" in fails(compare(home, tmp_path / "run", tuned=str(tmp_path / "adapter")), capsys)
    assert not (tmp_path / "run").exists()


def test_an_adapter_is_compared_with_its_base(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_lora(home / "base", tmp_path / "adapter", targets=["q_proj", "v_proj"])
    main(["run", "effect", *compare(home, tmp_path / "run", tuned=str(tmp_path / "adapter"))[1:]])
    table = pd.read_parquet(tmp_path / "run" / "tables" / "effect.parquet").set_index(["mind", "measure"])["value"]
    assert table["base", "E"] != table["tuned", "E"]


@pytest.mark.parametrize("size", ["8 gallons", "-1GiB", "0", "GiB", "nan", "1e3MB", "0.0001KB", ""])
@pytest.mark.parametrize("command", [["compare"], ["run", "residual"]])
def test_a_wrong_size_of_memory(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str], size: str
) -> None:
    sentence = fails([*command, *compare(home, tmp_path / "run", "--memory", size)[1:]], capsys)
    assert "--memory" in sentence and "8GiB" in sentence and repr(size) in sentence
    assert not (tmp_path / "run").exists()


def test_sizes_of_memory() -> None:
    read = [Memory().convert(text, None, None) for text in ("8GiB", "1.5 gib", "500MB", "2kib", "7", "1 TB")]
    assert read == [8 << 30, 3 << 29, 500_000_000, 2048, 7, 10**12]


def test_a_sweep_that_does_not_fit_says_how_much_it_needs(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in (
        compare(home, tmp_path / "run", "--plan"),
        ["run", "residual", *compare(home, tmp_path / "run")[1:]],
    ):
        sentence = fails([*arguments, "--memory", "20kB"], capsys)
        assert "--memory 19.5 KiB" in sentence and "needs" in sentence and "give that much" in sentence
    main(["run", "residual", *compare(home, tmp_path / "whole", "--memory", "1GiB")[1:]])
    main(["run", "residual", *compare(home, tmp_path / "tight", "--memory", "500kB")[1:]])
    tables = [pd.read_parquet(tmp_path / name / "tables" / "residual.parquet") for name in ("whole", "tight")]
    assert tables[0]["value"].abs().max() > 1e-3
    np.testing.assert_allclose(tables[0]["value"], tables[1]["value"], atol=1e-5)


def test_other_wrong_input(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    assert "not empty" in fails(compare(home, tmp_path / "full"), capsys)
    assert "no such study" in fails(["run", "nonsense"], capsys)
    assert "--batch-size" in fails(compare(home, tmp_path / "run", "--batch-size", "zero"), capsys)
    assert "format" in fails(compare(home, tmp_path / "run", "--format", "nonsense"), capsys)
    assert "no such organism" in fails(["organisms", "make", "--out", str(tmp_path), "--only", "unicorn"], capsys)
    assert "nowhere" in fails(["traces", "convert", "--from", "gsm8k", str(tmp_path / "nowhere"), "--out", "x"], capsys)


def test_converting_multiple_choice_shuffles_its_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {
        "question": "2+2?",
        "options": ["A)3", "B)4", "C)5"],
        "rationale": "2+2 = 4\nThe answer is B.",
        "correct": "B",
    }
    (tmp_path / "aqua.json").write_text("\n".join(json.dumps(row) for _ in range(8)) + "\n")
    arguments = ["traces", "convert", "--from", "aqua", str(tmp_path / "aqua.json"), "--out"]
    main([*arguments, str(tmp_path / "plain.jsonl")])
    main([*arguments, str(tmp_path / "shuffled.jsonl"), "--shuffle-options"])
    plain, shuffled = (
        [json.loads(line) for line in (tmp_path / f"{n}.jsonl").read_text().splitlines()[1:]]
        for n in ("plain", "shuffled")
    )
    assert [t["answer"] for t in plain] == ["B"] * 8
    assert {t["answer"] for t in shuffled} == {"A", "B", "C"}
    for trace in shuffled:
        assert trace["meta"]["options"][ord(trace["answer"]) - 65].endswith("4")
    assert "takes no option 'mind'" in fails([*arguments, "x", "--mind", "me"], capsys)


def test_help_is_fast_because_it_imports_no_torch() -> None:
    code = (
        "import sys; import reasoninterp, reasoninterp.cli as c\n"
        "try: c.main(['--help'])\nexcept SystemExit: pass\n"
        "print([m for m in ('torch', 'transformers', 'transformer_lens', 'pandas', 'matplotlib') if m in sys.modules])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.strip().endswith("[]"), said


def test_studies_are_listed_and_their_parameters_are_flags(capsys: pytest.CaptureFixture[str]) -> None:
    main(["studies"])
    said = capsys.readouterr().out
    for name in ("readings", "ledger", "grafts", "residual"):
        assert name in said
    main(["run", "ledger", "--help"])
    assert "--max-nodes" in capsys.readouterr().out


def test_a_flag_says_what_the_study_says_of_its_parameter(capsys: pytest.CaptureFixture[str]) -> None:
    main(["run", "memorization", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "--k INTEGER Alternatives of each token, itself besides. [default: 20]" in said
    assert "in which padding stands for an absent token." in said and "Parameters:" not in said  # a second line
    assert said.count("Alternatives of each token") == 1


def test_sampled_chains_can_be_compared(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A random model rarely writes an answer; either chains come out and can be read back, or it says so."""
    arguments = [
        "traces",
        "sample",
        "--model",
        str(home / "base"),
        "--questions",
        str(home / "traces.jsonl"),
        "--n",
        "2",
    ]
    arguments += ["--temperature", "1", "--max-new-tokens", "48", "--out", str(tmp_path / "own.jsonl"), "--quiet"]
    status = 0
    try:
        main(arguments)
    except SystemExit as stop:
        status = int(stop.code or 0)
    said = capsys.readouterr()
    written = (tmp_path / "own.jsonl").exists()
    assert (status, written) in ((0, True), (2, False))
    assert "chains with an answer" in said.out if written else "max-new-tokens" in said.err


@pytest.mark.skipif(not SHARED.exists(), reason="the data sets are not here")
@pytest.mark.parametrize("family", ["llama-mha", "qwen2", "qwen3", "gpt2"])
def test_real_text_on_random_models_is_at_floor(
    tmp_path: Path, family: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main(
        [
            "traces",
            "convert",
            "--from",
            "gsm8k",
            str(SHARED / "gsm8k" / "test.jsonl"),
            "--out",
            str(tmp_path / "gsm.jsonl"),
        ]
    )
    assert "1319 traces with 4819 steps" in capsys.readouterr().out
    texts = [json.loads(line)["question"] for line in (SHARED / "gsm8k" / "test.jsonl").read_text().splitlines()[:200]]
    tokenizer = tiny_tokenizer(extra=" ".join(texts), vocab_size=1000)
    save_tiny(tmp_path / "base", family, n_layers=1, tokenizer=tokenizer)
    save_tuned(tmp_path / "base", tmp_path / "tuned", scale=0.05)
    shutil.copy(tmp_path / "gsm.jsonl", tmp_path / "traces.jsonl")
    main(compare(tmp_path, tmp_path / "run", "--limit", "8"))
    assert "at floor" in (tmp_path / "run" / "report.html").read_text()


def test_a_killed_comparison_is_resumed_and_gives_the_same_tables(home: Path, tmp_path: Path) -> None:
    write_traces(tmp_path / "traces.jsonl", n=10)
    command = [
        sys.executable,
        "-m",
        "reasoninterp",
        *compare(home, tmp_path / "killed", "--everything", traces=str(tmp_path / "traces.jsonl")),
    ]
    shards = tmp_path / "killed" / "shards" / "ledger"
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None and not any(p.stat().st_size for p in shards.glob("*.jsonl")):
            time.sleep(0.02)
        process.kill()
    assert not (tmp_path / "killed" / "report.html").exists()
    main(compare(home, tmp_path / "killed", "--everything", traces=str(tmp_path / "traces.jsonl")))
    main(compare(home, tmp_path / "whole", "--everything", traces=str(tmp_path / "traces.jsonl")))
    timings = json.loads((tmp_path / "killed" / "run.json").read_text())["timings"]
    assert timings["residual"]["reused"] == timings["residual"]["cells"] > 0
    tables = sorted(p.name for p in (tmp_path / "whole" / "tables").glob("*.parquet"))
    assert len(tables) > 10
    for name in tables:
        whole, resumed = (pd.read_parquet(tmp_path / r / "tables" / name) for r in ("whole", "killed"))
        pd.testing.assert_frame_equal(resumed, whole, rtol=1e-5, atol=1e-6)
