"""The plan of a sweep: its bytes against counted allocations, its lanes against the sweep's own, budgets, back-off."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from reasoninterp.compare import sweep_lines
from reasoninterp.errors import UserError
from reasoninterp.models.context import LEAST_SWEEP_TOKENS, SWEEP_TOKENS_ON_CPU, Context, Item
from reasoninterp.models.minds import Minds
from reasoninterp.patching import sweep as sweeping
from reasoninterp.patching.budget import Sweeping, SweepPlan, human, plan_study, plan_sweep
from reasoninterp.patching.cells import Sites
from reasoninterp.patching.counted import Counted
from reasoninterp.patching.footprint import Widths
from reasoninterp.patching.heads import Heads
from reasoninterp.patching.residual import Residual
from reasoninterp.patching.staircase import climb
from reasoninterp.patching.study import SweepStudy
from reasoninterp.patching.sweep import sweep, sweep_cells
from reasoninterp.running import run_study
from reasoninterp.runs import Run
from reasoninterp.study import Batch, Cell, Row, Study
from reasoninterp.traces.contrast import contrast
from reasoninterp.traces.trace import encode
from tests.test_patching import items
from tests.tiny import save_tiny, save_tuned

FAMILIES = ("llama-gqa", "qwen3", "gpt2")
AMPLE = 1 << 40


def test_the_counter_counts_what_is_alive_together() -> None:
    with Counted() as counted:
        a = torch.zeros(100)
        b = a.view(10, 10) + 1  # the view is no allocation
        del a
        c = torch.zeros(50)
        del b, c
    assert (counted.peak, counted.now) == (4 * 200, 0)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("budget")
    for family in FAMILIES:
        save_tiny(folder / family, family)
        save_tuned(folder / family, folder / f"{family}-tuned", scale=0.05)
    return folder


def context_of(home: Path, family: str, n: int = 4, *, long_answers: bool = False, **options: Any) -> Context:
    dtype = options.pop("dtype", "float32")
    minds = Minds.load({"base": str(home / family), "tuned": str(home / f"{family}-tuned")}, dtype=dtype)
    made = items(minds.tokenizer("base"), n)
    return Context(minds, [longer(i, minds.tokenizer("base")) for i in made] if long_answers else made, **options)


def longer(item: Item, tokenizer: Any) -> Item:
    """The same contrast with answers of several tokens: two rows a side."""
    assert item.contrast is not None
    clean = dataclasses.replace(item.contrast.clean, answer="34 12")
    corrupt = dataclasses.replace(item.contrast.corrupt, answer="345")
    both = (encode(clean, tokenizer), encode(corrupt, tokenizer))
    return Item(clean, contrast("propagated", clean, corrupt, tokens=both))


def both(context: Context, sites: Sites, **options: Any) -> tuple[SweepPlan, int, pd.DataFrame]:
    """The plan, the bytes counted, and the table."""
    contrasts = [i.contrast for i in context.items]
    with context.open("base"):
        plan = plan_sweep(context, contrasts, sites, budget=AMPLE, per_batch=len(contrasts), **options)
        with Counted() as counted:
            table = sweep(context, contrasts, sites, **options)
    return plan, counted.peak, table


CASES: list[tuple[Sites, dict[str, Any]]] = [
    (Sites(), {}),
    (Sites(), {"max_tokens": 64}),
    (Sites(spans="tokens"), {"metrics": ("kl", "logp", "rank")}),
    (Sites(("z",)), {}),
    (Sites(("z",), spans="answer"), {"source": "tuned"}),
    (Sites(("attn_out", "mlp_out", "resid_mid", "resid_post")), {}),
    (Sites(("q", "k", "v")), {}),
    (Sites(window=2), {"source": "zero"}),
    (Sites(("pattern",)), {}),
]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_peak_that_is_foreseen_is_not_exceeded_and_at_most_twice_what_is_counted(home: Path, family: str) -> None:
    context, several = context_of(home, family), context_of(home, family, 3, long_answers=True)
    for k, (sites, options) in enumerate(CASES):
        plan, counted, table = both(several if k % 3 == 2 else context, sites, **options)
        assert counted <= plan.peak_bytes <= 2 * counted, (sites, options, plan.taken, counted)
        assert table["value"].abs().max() > 1e-3


def test_bfloat16_keeps_within_what_is_foreseen(home: Path) -> None:
    context = context_of(home, "llama-gqa", dtype="bfloat16")
    for sites in (Sites(), Sites(("z",)), Sites(("q", "k", "v"))):
        plan, counted, _ = both(context, sites)
        assert counted <= plan.peak_bytes <= 2 * counted


@pytest.mark.parametrize(
    "sites",
    [
        Sites(),
        Sites(("resid_post", "k")),
        Sites(spans="tokens"),
        Sites(("z",)),
        Sites(("q",), spans="tokens"),
        Sites(window=2),
    ],
)
def test_lanes_and_cells_are_those_that_are_run(home: Path, sites: Sites, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []

    def spied(body: Any, store: Any, lanes: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append((len(lanes), int((lanes.length * (body.n_layers - lanes.join)).sum())))
        return climb(body, store, lanes, *args, **kwargs)

    monkeypatch.setattr(sweeping, "climb", spied)
    plan, _, table = both(context_of(home, "qwen3"), sites)
    assert (plan.work.n_lanes, plan.work.block_tokens) == tuple(np.sum(seen, axis=0))
    assert plan.work.n_cells == len(table)
    assert 0 < (table["value"] != 0).sum() <= plan.work.n_run < len(table)


def test_work_by_hand(home: Path) -> None:
    """Every token of one row, at the first layer of three, no narrower than the chain: one whole run a cell."""
    context = context_of(home, "gpt2", 1)
    contrasts = [context.items[0].contrast]
    body = context.minds.body
    w = Widths.of(body)
    d, m, v = 32, 128, body.config.vocab_size
    assert (w.q, w.kv, w.d_mlp, w.gated, w.n_vocab, w.itemsize) == (d, d, m, False, v, 4)
    assert w.token_flops() == 2 * (4 * d * d + 2 * d * m)
    assert Widths.of(context_of(home, "qwen3", 1).minds.body).kv == 2 * 16
    n = len(context.encode(context.items[0].trace).prompt_ids)
    plan = plan_sweep(context, contrasts, Sites(layers=(2,), spans="answer"), source="zero", budget=AMPLE)
    attention = 4 * d * n * (n + 1) / 2
    whole = 3 * (n * w.token_flops() + attention) + 2 * d * v
    assert plan.work.plain_flops == 2 * whole  # two directions, one cell each
    first = plan_sweep(context, contrasts, Sites(layers=(2,), spans="question"), source="zero", budget=AMPLE)
    # one more whole row of keys and values at the last layer, of a lane that begins at 0 instead of at the last token
    assert first.work.flops - plan.work.flops == 2 * (n - 1) * 4 * d * d
    assert (first.work.n_lanes, first.work.block_tokens) == (2, 2 * n)


def test_a_budget_lowers_the_batch_and_the_tokens_until_it_holds(home: Path) -> None:
    context = context_of(home, "llama-gqa", 8)
    sites = Sites(("z", "v"))
    contrasts = [i.contrast for i in context.items]
    ample = plan_sweep(context, contrasts, sites, budget=AMPLE)
    assert (ample.per_batch, ample.max_tokens) == (8, SWEEP_TOKENS_ON_CPU)
    least = plan_sweep(context, contrasts, sites, budget=AMPLE, per_batch=1, max_tokens=LEAST_SWEEP_TOKENS)
    sizes = []
    for budget in np.geomspace(ample.total_bytes, least.total_bytes, 6):
        plan = plan_sweep(context, contrasts, sites, budget=int(np.ceil(budget)))
        assert plan.total_bytes <= np.ceil(budget)
        assert plan.work == ample.work
        sizes.append((plan.per_batch, plan.max_tokens))
    assert sizes[0] == (8, SWEEP_TOKENS_ON_CPU)
    assert sizes[-1][0] == 1 and sizes[-1][1] < SWEEP_TOKENS_ON_CPU
    assert sizes == sorted(sizes, reverse=True)
    with pytest.raises(UserError, match=r"--memory .* the sweep needs .* largest contrast \(\d+ tokens\)"):
        plan_sweep(context, contrasts, sites, budget=least.total_bytes - 1)


def test_the_counted_peak_of_a_study_keeps_within_its_budget(home: Path, tmp_path: Path) -> None:
    ample = context_of(home, "llama-gqa", 5)
    whole = plan_study(ample, Residual())
    assert whole is not None
    tight = context_of(home, "llama-gqa", 5, memory_budget=whole.total_bytes // 3)
    assert tight.memory() == whole.total_bytes // 3
    plain = go(tmp_path / "ample", Residual(), ample)
    with Counted() as counted:
        close = go(tmp_path / "tight", Residual(), tight)
    assert counted.peak <= tight.memory()
    assert tight.batch_size(Residual()) < 5
    same(plain, close)


def test_plan_lines_say_what_a_study_that_sweeps_takes(home: Path) -> None:
    context = context_of(home, "gpt2")
    text = "\n".join(sweep_lines(context, Heads()))
    plan = plan_study(context, Heads())
    assert plan is not None
    for part in (
        f"{plan.work.n_cells} cells",
        "GFLOP",
        "each of 2 minds",
        human(plan.total_bytes),
        "contrasts at once",
    ):
        assert part in text

    class Own(Sweeping, Study):
        sites = Sites(("mlp_out",))

    class Other(Study):
        """Sweeps nothing."""

    assert sweep_lines(context, Own())
    assert sweep_lines(context, Other()) == []
    assert context.batch_size(Other()) == context.rows
    chosen = SweepStudy(components=("mlp_out",), directions="noising", source="base", metrics=("kl",))
    cross = plan_study(context, chosen)
    assert cross is not None
    assert cross.n_minds == 1
    own = plan_study(context, Own())
    assert own is not None
    assert cross.work.n_cells == own.work.n_cells // 2  # both chains are patched, and make one table
    assert cross.taken.stored == 2 * own.taken.stored
    assert [human(n) for n in (512, 1536, 3 << 20, 8 << 30)] == ["512 B", "1.5 KiB", "3 MiB", "8 GiB"]


# ---------------------------------------------------------------------------------------------- out of memory


@contextmanager
def memory_for(tokens: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """A sweep's blocks run out of memory above so many packed tokens; yields the tokens of every block tried."""
    from reasoninterp.models.packed import Packed

    tried: list[int] = []
    block = Packed.block

    def small(self: Packed, layer: int, h: torch.Tensor) -> torch.Tensor:
        tried.append(h.shape[1])
        if h.shape[1] > tokens:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return block(self, layer, h)

    with monkeypatch.context() as patch:
        patch.setattr(Packed, "block", small)
        yield tried


def go(out: Path, study: Study, context: Context) -> pd.DataFrame:
    context.run = Run.open(out, {})
    return run_study(study, context, context.run, quiet=True, figures=False).tables[study.name]


def same(a: pd.DataFrame, b: pd.DataFrame) -> None:
    assert a["value"].abs().max() > 0.01
    rest = [c for c in a.columns if c != "d"]  # an effect size of three almost equal values
    pd.testing.assert_frame_equal(a[rest], b[rest], atol=1e-5, rtol=1e-5)


class Every(Study):
    """Every component's site of a column, enough lanes in one contrast to run out of memory with."""

    sites = Sites(("z", "v"))

    def cells(self, context: Context) -> Iterable[Cell]:
        return context.contrast_cells(aligned=True)

    def measure(self, context: Context, batch: Batch) -> Iterable[Row]:
        return sweep_cells(context, batch, self.sites)


@pytest.mark.parametrize("rows", [4, 1])
def test_out_of_memory_halves_what_a_sweep_runs_at_once_and_gives_the_same_table(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    plain = go(tmp_path / "ample", Every(), context_of(home, "llama-gqa", 4))
    context = context_of(home, "llama-gqa", 4, rows=rows)
    with memory_for(100, monkeypatch) as tried:
        tight = go(tmp_path / "tight", Every(), context)
    assert max(tried) > 100
    assert context.sweep_tokens() < 4096
    # Once it is found what fits, nothing larger is tried, by the second mind neither.
    last_failure = max(k for k, n in enumerate(tried) if n > 100)
    assert last_failure < len(tried) // 2
    same(plain, tight)


def test_shrinking_ends(home: Path) -> None:
    context = context_of(home, "gpt2", 2)
    tokens, n = context.sweep_tokens(), 0
    while context.shrink():
        n += 1
        assert context.sweep_tokens() == max(LEAST_SWEEP_TOKENS, tokens // 2)
        tokens = context.sweep_tokens()
    assert (context.rows, tokens) == (1, LEAST_SWEEP_TOKENS)
    assert n < 20
    context.batch_size(Residual())  # what was found too much is not planned again
    assert context.sweep_tokens() == LEAST_SWEEP_TOKENS
