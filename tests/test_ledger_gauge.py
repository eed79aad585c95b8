"""Ledgers of a tuned mind in another gauge: entries are those of the same function in the base's gauge."""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from reasoninterp.executors import SerialExecutor
from reasoninterp.models.context import Context
from reasoninterp.models.gauge import random_gauge
from reasoninterp.models.layout import read_layer, shape_of, write_layer
from reasoninterp.models.minds import Minds
from reasoninterp.running import Result, run_study
from reasoninterp.runs import Run
from reasoninterp.severance.gauge import aligned as module
from reasoninterp.severance.gauge.align import Alignment
from reasoninterp.severance.gauge.aligned import aligned
from reasoninterp.severance.ledger.balance import LedgerBalance
from reasoninterp.severance.ledger.pair import Pair
from reasoninterp.severance.ledger.steps import LedgerSteps
from reasoninterp.severance.ledger.straight import LedgerPaths
from reasoninterp.severance.ledger.study import Ledger
from reasoninterp.severance.ledger.tokens import LedgerTokens
from reasoninterp.study import Batch, Row, Study
from tests.test_ledger_studies import askable_items
from tests.tiny import save_lora, save_tiny, save_tuned

Tables = dict[str, pd.DataFrame]
FEW = {"nodes": 2, "max_nodes": 2}


def studies(align: bool = True) -> list[Study]:
    """All studies of ledgers, at the level of circuits where they have one level."""
    return [
        Ledger(**FEW, align=align),
        LedgerBalance(**FEW, level="circuit", align=align),
        LedgerSteps(**FEW, level="circuit", align=align),
        LedgerTokens(traces=1, align=align),
        LedgerPaths(level="head", align=align),
    ]


def moved_pair(folder: Path, family: str) -> None:
    """`base`; `tuned`, whose head 0 writes half of its outputs, with a little drift; and `moved`, the same function.

    No change of basis makes that of it: where values or outputs are the same as before up to a scale, either may bear it.
    """
    from transformers import AutoModelForCausalLM

    base = save_tiny(folder / "base", family, n_layers=1)
    for name in ("tuned", "moved"):
        save_tuned(base, folder / name, scale=1e-4)
    model = AutoModelForCausalLM.from_pretrained(str(folder / "tuned"))
    params = {name: p.detach().clone() for name, p in model.named_parameters()}
    shape = shape_of(params, model.config)
    layer = read_layer(params, shape, 0)
    layer.at["o"][0, :, ::2] = 0.0
    params |= write_layer(layer, params)
    for name, new in (("tuned", params), ("moved", random_gauge(params, model.config, rng=4).params)):
        model.load_state_dict(new, strict=False)
        model.save_pretrained(str(folder / name))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("llama-gqa")
    moved_pair(made, "llama-gqa")
    return made


def opened(folder: Path, tuned: str, run: Path | None = None) -> Context:
    """A fresh context, as another process or a later day has it."""
    minds = Minds.load({"base": str(folder / "base"), "tuned": str(folder / tuned)})
    context = Context(minds, askable_items()[:2], max_new_tokens=8)
    context.run = Run.open(run, {}) if run else None
    return context


def results(context: Context, some: list[Study], executor: object = None) -> list[Result]:
    """The studies in a run, which is closed."""
    assert context.run is not None
    with contextlib.closing(context.run) as run:
        return [run_study(s, context, run, quiet=True, figures=False, executor=executor) for s in some]  # type: ignore[arg-type]


def tables(found: list[Result]) -> Tables:
    return {name: table for one in found for name, table in one.tables.items()}


def entries(found: Tables) -> dict[str, pd.Series]:
    """The entries of every table, each row by its labels."""
    fine = found["ledger"]
    paths = found["ledger_paths"].set_index("unit")
    return {
        "ledger": fine[fine["level"] != "module"].set_index(["level", "unit"])["attribution"],
        "accuracy": found["ledger_balance"].set_index("unit")["accuracy"],
        "steps": found["ledger_steps"].set_index(["step", "unit"])["attribution"],
        "tokens": found["ledger_token_units"].set_index(["trace", "side", "part", "unit"])["attribution"],
        **{path: paths[path] for path in ("straight", "forwards", "backwards")},
    }


@pytest.fixture(scope="module")
def moved(folder: Path) -> list[Result]:
    """All studies of the pair whose tuned mind is in another gauge."""
    return results(opened(folder, "moved", folder / "run-moved"), studies())


def told_apart(truth: dict[str, pd.Series], mine: dict[str, pd.Series], raw: dict[str, pd.Series]) -> None:
    """That entries of the moved mind are the unmoved one's, and without alignment others."""
    for name, expected in truth.items():
        size = expected.abs().max()
        assert size > 0.005, name
        np.testing.assert_allclose(mine[name], expected, atol=0.02 * size, err_msg=name)
        assert (raw[name] - expected).abs().max() > 0.3 * size, name


def test_of_gpt2_too(tmp_path: Path) -> None:
    moved_pair(tmp_path, "gpt2")
    found = []
    for tuned, align in (("tuned", True), ("moved", True), ("moved", False)):
        context = opened(tmp_path, tuned, tmp_path / f"run-{tuned}-{align}")
        table = tables(results(context, [Ledger(**FEW, align=align)]))["ledger"]
        found.append({"ledger": table.set_index(["level", "unit"])["attribution"]})
    told_apart(*found)


def test_a_moved_mind_has_the_ledger_of_the_unmoved_one_and_without_alignment_another(
    folder: Path, moved: list[Result]
) -> None:
    found = {
        "tuned": tables(results(opened(folder, "tuned", folder / "run-tuned"), studies())),
        "moved": tables(moved),
        "raw": tables(results(opened(folder, "moved", folder / "run-raw"), studies(align=False))),
    }
    told_apart(*(entries(found[name]) for name in ("tuned", "moved", "raw")))
    for total in ("ledger_total", "ledger_balance_total", "ledger_steps_total"):
        said = {name: t[total][["convention", "warning"]].agg(list) for name, t in found.items()}
        assert all("were first aligned with those of base" in text for text in said["moved"]["convention"])
        assert all("no change of gauge was found" in text for text in said["tuned"]["convention"])
        assert all("not aligned: entries depend on the gauge" in text for text in said["raw"]["convention"])
        assert all("base and tuned were not aligned" in text for text in said["raw"]["warning"])
        assert not any("gauge" in text for name in ("tuned", "moved") for text in said[name]["warning"])
    for study in ("ledger", "ledger_balance", "ledger_steps", "ledger_tokens", "ledger_paths"):
        about = {name: t[f"{study}_alignment"] for name, t in found.items()}
        assert about["moved"]["distance_after"].iloc[0] < 0.5 * about["moved"]["distance_before"].iloc[0]
        assert "change of basis" in " ".join(about["moved"]["note"])
        assert "as they are" in about["raw"]["note"].iloc[0]
    # Users named the minds; what an alignment made stands in its own table only.
    for result in moved:
        every = {f"{result.study.name}.rows": result.rows, **result.tables}
        for name, table in every.items():
            text = table.select_dtypes(exclude="number").drop(columns="entries", errors="ignore")
            assert name.endswith("_alignment") or not text.isin(["tuned-aligned"]).any(axis=None), name


class Killed(Exception):
    """Stands for the end of a process."""


class Elsewhere:
    """Measures as another process does: batches are pickled, and its context is its own; may be killed."""

    def __init__(self, context: Context, batches: int = 10_000) -> None:
        self.context, self.batches = context, batches

    def run(self, work: Iterable[Batch], study: Study, context: object) -> Iterator[tuple[Batch, list[Row], float]]:
        """Finished batches with their rows and seconds."""
        for batch in list(work):
            if self.batches == 0:
                raise Killed
            self.batches -= 1
            yield from SerialExecutor().run([pickle.loads(pickle.dumps(batch))], study, self.context)


def test_a_killed_run_taken_up_elsewhere_gives_the_same_tables(
    folder: Path, moved: list[Result], tmp_path: Path
) -> None:
    again = results(opened(folder, "moved", folder / "run-moved"), studies())
    assert [(r.measured, r.reused) for r in again] == [(0, r.measured) for r in moved]
    contexts = {name: opened(folder, "moved") for name in ("killed", "elsewhere", "taken up")}

    def at(name: str) -> Context:
        """As in a process that has just begun: nothing is aligned yet."""
        context = contexts[name]
        if "tuned-aligned" in context.minds.derived:
            context.minds.discard("tuned-aligned")
        context.run = None if name == "elsewhere" else Run.open(tmp_path / "run", {})
        context.rows = 1 if name == "killed" else 8
        return context

    for study in studies():
        with pytest.raises(Killed):
            results(at("killed"), [study], Elsewhere(at("elsewhere"), batches=2))
        found = results(at("taken up"), [study], Elsewhere(at("elsewhere")))
        assert found[0].reused == 2 and found[0].measured > 0
        for name, table in tables(found).items():
            pd.testing.assert_frame_equal(table, tables(moved)[name], rtol=1e-4, atol=1e-5)


def test_paths_to_another_mind_than_the_ledgers_are_not_put_beside_it(folder: Path, moved: list[Result]) -> None:
    context = opened(folder, "moved", folder / "run-moved")
    (result,) = results(context, [LedgerPaths(align=False)])
    table, pairs = result.tables["ledger_paths"], result.tables["ledger_paths_agreement"]
    assert table["straight"].isna().all() and table["forwards"].abs().max() > 0.01
    assert pairs["a"].tolist() == ["forwards"]
    assert "ends in tuned-aligned, these paths in tuned" in result.tables["ledger_paths_alignment"]["note"].iloc[-1]
    assert result.study.draw(result.tables) is not None


def test_modules_whose_adapter_was_moved_have_no_entry(tmp_path: Path) -> None:
    """An adapter may be a change of gauge of one circuit beside what it tunes; the tuned module's entry stays."""
    from safetensors.torch import load_file, save_file

    base = save_tiny(tmp_path / "base", "llama", n_layers=2)
    save_lora(base, tmp_path / "plain", targets=["q_proj"], rank=32)
    save_lora(base, tmp_path / "moved", targets=["q_proj", "v_proj", "o_proj"], rank=32)
    weights = Minds.load({"base": base}).weights("base")
    basis = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))[0]
    turn = torch.block_diag(basis, *[torch.eye(8)] * 3)  # orthogonal, of head 0
    tuned = load_file(tmp_path / "plain" / "adapter_model.safetensors")
    lora = load_file(tmp_path / "moved" / "adapter_model.safetensors")
    lora = {k: tuned.get(k, v if "lora_A" in k else 0 * v) for k, v in lora.items()}
    for role in ("v", "o"):
        w = weights[f"model.layers.0.self_attn.{role}_proj.weight"]
        stem = f"base_model.model.model.layers.0.self_attn.{role}_proj.lora_"
        lora[f"{stem}A.weight"] = ((turn @ w if role == "v" else w @ turn.T) - w) / 2  # alpha is twice the rank
        lora[f"{stem}B.weight"] = torch.eye(32)
    save_file(lora, tmp_path / "moved" / "adapter_model.safetensors", metadata={"format": "pt"})
    found = {}
    for name in ("plain", "moved"):
        context = opened(tmp_path, name, tmp_path / f"run-{name}")
        found[name] = tables(results(context, [Ledger(**FEW)]))
    rows = {n: t["ledger"][t["ledger"]["level"] == "module"].set_index("unit") for n, t in found.items()}
    withheld = {"model.layers.0.self_attn.v_proj", "model.layers.0.self_attn.o_proj"}
    columns = ["attribution", "ci_low", "ci_high", "weight_change"]
    kept = [unit for unit in rows["plain"].index if unit not in withheld]
    np.testing.assert_allclose(rows["moved"].loc[kept, columns], rows["plain"].loc[kept, columns], atol=1e-3)
    assert rows["plain"]["attribution"].abs().max() > 0.05 and rows["plain"][columns].notna().all(axis=None)
    assert set(rows["moved"].index[rows["moved"][columns].isna().all(axis=1)]) == withheld
    warning = found["moved"]["ledger_total"]["warning"].iloc[0]
    assert "2 modules have no entry of level module" in warning
    assert "module" not in found["plain"]["ledger_total"]["warning"].iloc[0]
    blocks = found["moved"]["ledger"].query("level == 'block'")["attribution"]
    assert blocks.notna().all() and blocks.sum() == pytest.approx(found["moved"]["ledger_total"]["total"].iloc[0])


def test_why_minds_are_not_aligned_is_warned_of_by_hand() -> None:
    def pair(mind: str, *notes: str) -> Pair:
        return Pair("base", "tuned", Alignment(mind, (), 1.0, 1.0, notes), ())

    half = pair("tuned", "Not aligned: in bfloat16 a change of basis would be rounded.")
    assert "not aligned" in half.convention and "(in bfloat16 a change of basis would be rounded)" in half.warnings[0]
    assert pair("tuned", "No change of gauge explains what tuning changed; nothing was aligned.").warnings == []
    assert pair("tuned-aligned", "L0.G0.OV: a change of basis explained 99% of its weight change.").warnings == []


def test_an_alignment_outlives_the_refusal_of_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = Context(Minds.load({"base": save_tiny(tmp_path / "base", "gpt2", n_layers=1)}), askable_items()[:1])
    minds, asked = context.minds, []
    for to in ("a", "b"):
        minds.derive(to, "base", {})

    def refused_for_b(_minds: Minds, _from: str, to: str) -> Alignment:
        asked.append(to)
        minds.derive(f"{to}-aligned", to, {})  # fails where the name is taken
        if to == "b":
            minds.discard("b-aligned")
        return Alignment(to if to == "b" else f"{to}-aligned", (), 1.0, 1.0, ())

    monkeypatch.setattr(module, "align_gauges", refused_for_b)
    assert [aligned(context, "base", to).mind for to in ("a", "b", "a", "b")] == ["a-aligned", "b", "a-aligned", "b"]
    assert asked == ["a", "b"]
