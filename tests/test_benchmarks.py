"""The benchmark's count of operations: against torch's own counter, and by hand."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from reasoninterp.traces.trace import Span

FOLDER = Path(__file__).parents[1] / "experiments" / "benchmarks"


@pytest.fixture
def benchmark_modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, Any]]:
    """(fixtures, floor), imported as the scripts do."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(FOLDER))
    import fixtures
    import floor

    yield fixtures, floor
    for name in {"fixtures", "floor"} - before:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_flops_of_a_plain_forward_equal_torchs_counter(
    tmp_path: Path, benchmark_modules: tuple[Any, Any], family: str
) -> None:
    import transformers
    from torch.utils.flop_counter import FlopCounterMode

    fixtures, floor = benchmark_modules
    size = fixtures.Size(n_layers=3, d_model=48, n_heads=4, length=21, batch=2)
    folder = fixtures.save_model(tmp_path, size, family)
    network = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(torch.arange(42).view(2, 21), use_cache=False, logits_to_keep=1)
    counts = counter.get_flop_counts()["Global"]
    counted = sum(n for op, n in counts.items() if n)
    # Eager attention multiplies all pairs, also those that the causal mask hides.  Rotary angles are a product as well.
    rotary = 0 if family == "gpt2" else 2 * size.d_model // size.n_heads // 2 * size.length
    want = size.batch * floor.forward_flops(floor.costs(size, family), 3, 21, n_pairs=21 * 21)
    assert counted - want in (0, rotary)
    assert floor.pairs(0, 21) == 21 * 22 // 2


def test_floor_of_each_cell_by_hand(benchmark_modules: tuple[Any, Any]) -> None:
    fixtures, floor = benchmark_modules
    size = fixtures.Size(n_layers=2, d_model=4, n_heads=1, length=5, batch=1)
    c = floor.Costs(keys_values=100, query=10, other=1000, pair=1, unembedding=7)
    run = 2 * (5 * 1110 + 15) + 7  # pairs: 1 + 2 + 3 + 4 + 5
    corrupt = 2 * (3 * 1110 + 12) + 7  # from token 2 on, with 3 + 4 + 5 pairs
    cells = {
        floor.Cell(0, Span(2, 3)): (3 * 1110 + 12) + (3 * 100 + 1010 + 5 + 7),
        floor.Cell(1, Span(2, 3)): 3 * 100 + 1010 + 5 + 7,
        floor.Cell(1, Span(4, 5)): 100 + 1010 + 5 + 7,
        floor.Cell(1, Span(0, 5)): 3 * 100 + 1010 + 5 + 7,  # tokens before the parting are the same: it starts at 2
        floor.Cell(0, Span(3, 4)): 0,  # the embeddings differ at token 2 only
        floor.Cell(1, Span(0, 2)): 0,
    }
    for cell, want in cells.items():
        assert floor.sweep_flops(c, size, [cell], parts=2) == run + corrupt + want, cell
    assert floor.sweep_flops(c, size, cells, parts=2) == run + corrupt + sum(cells.values())


def test_tight_floor_by_hand(benchmark_modules: tuple[Any, Any]) -> None:
    fixtures, floor = benchmark_modules
    size = fixtures.Size(n_layers=2, d_model=4, n_heads=1, length=5, batch=1)
    c = floor.Costs(keys_values=100, query=10, other=1000, pair=1, unembedding=7)
    read = 1010 + 5 + 7
    runs = (5 * 1110 + 15) + (5 * 100 + read) + (3 * 1110 + 12) + (3 * 100 + read)
    cells = {
        floor.Cell(0, Span(0, 5)): 0,  # the clean run itself
        # The clean run up to token 3; behind it the patched layer's queries, keys and values are the corrupt run's.
        floor.Cell(0, Span(0, 4)): (1 * 1000 + 5) + (100 + read),
        floor.Cell(1, Span(3, 4)): 100 + read - 10,
        floor.Cell(1, Span(3, 5)): 200 + read,
    }
    for cell, want in cells.items():
        assert floor.sweep_flops(c, size, [cell], parts=2, tight=True) == runs + want, cell
        assert floor.sweep_flops(c, size, [cell], parts=2) > runs + want
