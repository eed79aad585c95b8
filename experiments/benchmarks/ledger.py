"""What a whole ledger costs, in seconds and in memory, against the size of the model; and what it would cost at 7 B.

    python experiments/benchmarks/ledger.py [--quick] [--nodes 4] [--seed 0] [--out experiments/figures/ledger_cost.png]

1. Random Llamas with grouped-query attention from 0.1 M parameters on, and a tuned one beside each (every weight moved).
   Each size is measured in a process of its own.
2. *Seconds*: CPU seconds of one thread, the least of several rounds.  The whole of `severance.ledger.integrate` (difference,
   blends, forward and backward passes, leaf products) over the number of its nodes, beside one plain forward and
   backward pass of the plain model on the same batch that forms the gradient of every weight.  `ledger_ratio` is the
   former over the latter; `max_ratio` is what is allowed.
3. *Memory*: bytes of the body's weights, of both minds' weights kept beside it, of the difference (as a GPU holds it; the
   CPU forms it leaf by leaf and the process' peak has it not), and of tensors alive
   at once during a node (`patching.counted`), with and without gradient checkpointing; of the latter, what autograd keeps
   for the backward pass (`saved`, unique storages that are no weights).  And the process' own peak, which has Python and
   the libraries in it.
4. *At 7 B*: the extrapolation to one GPU, whose arithmetic is written out in `ledger_large` and printed.

A random network's E is far from linear along the path, so that the nodes used here leave a residual; what is measured is the
cost of a node, whatever their number.

The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))

import pandas as pd
import torch
from fixtures import Size, contrasts, save_model, word_tokenizer
from ledger_large import at_seven_billion
from torch import Tensor

from reasoninterp.figures import MORE_COLOURS, NEUTRAL, figure, housed
from reasoninterp.models.context import Context
from reasoninterp.models.minds import Minds
from reasoninterp.models.read import margins_from_logits
from reasoninterp.patching.counted import Counted
from reasoninterp.patching.metric import ContrastPlan, contrast_plan
from reasoninterp.severance.ledger.integrate import difference_of, integrate, node_entries

MAX_RATIO = 3.0
SIZES = (
    Size(4, 32, 4, 48, 16),
    Size(8, 96, 4, 48, 16),
    Size(10, 288, 6, 64, 8),
    Size(15, 768, 12, 48, 4),
    Size(19, 1536, 16, 32, 2),
)
QUICK = 3  # of the sizes


def cpu_seconds(run: Callable[[], object], rounds: int) -> float:
    """The least CPU seconds of several rounds."""
    found = []
    for _ in range(rounds):
        began = time.process_time()
        run()
        found.append(time.process_time() - began)
    return min(found)


def save_tuned(base: Path, folder: Path, seed: int) -> Path:
    """A copy of a model with every weight moved by a tenth of its size."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(str(base))
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.1 * float(p.std() if p.dim() > 1 else 1.0))
    model.save_pretrained(str(folder))
    word_tokenizer().save_pretrained(str(folder))
    return folder


def plain_pass(model: Any, plan: ContrastPlan) -> None:
    """Forward and backward of the plain model over one batch, with the gradient of every weight.

    It reads the same positions as we do and forms no other logits.
    """
    model.zero_grad(set_to_none=True)
    hidden = model.model(input_ids=plan.both.ids, use_cache=False).last_hidden_state
    at = plan.both.positions % hidden.shape[1]
    logits = model.lm_head(hidden.gather(1, at[..., None].expand(*at.shape, hidden.shape[-1])))
    margin = margins_from_logits(plan.both, logits).margin
    (margin[plan.n :] - margin[: plan.n]).sum().backward()


class _Kept:
    """A tensor that autograd keeps; counted until it lets go."""

    def __init__(self, tensor: Tensor, held: SavedBytes) -> None:
        self.tensor, self.key, self.held = tensor, tensor.untyped_storage().data_ptr(), held
        held.add(self.key, tensor.untyped_storage().nbytes(), 1)

    def __del__(self) -> None:
        self.held.add(self.key, self.tensor.untyped_storage().nbytes(), -1)


class SavedBytes:
    """Bytes of storages that autograd keeps at once for the backward pass, weights left out."""

    def __init__(self, weights: set[int]) -> None:
        self.weights, self.now, self.peak = weights, 0, 0
        self._count: dict[int, int] = {}

    def add(self, key: int, size: int, by: int) -> None:
        """Count a storage once, however often it is kept."""
        if key in self.weights:
            return
        before = self._count.get(key, 0)
        self._count[key] = before + by
        if before == 0 or before + by == 0:
            self.now += by * size
            self.peak = max(self.peak, self.now)

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count what is kept inside."""
        with torch.autograd.graph.saved_tensors_hooks(lambda t: _Kept(t, self), lambda kept: kept.tensor):
            yield


@contextmanager
def resident_peak() -> Iterator[list[int]]:
    """The process' largest resident memory inside the block, in bytes, looked at every few milliseconds."""
    import psutil

    process, found, done = psutil.Process(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            found[0] = max(found[0], process.memory_info().rss)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()
        found[0] = max(found[0], process.memory_info().rss)


def measure(size: Size, nodes: int, rounds: int, seed: int, from_files: bool = False) -> dict[str, Any]:
    """One size: seconds and bytes of the plain pass and of the ledger, with the minds left in their files or kept."""
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        base = save_model(Path(folder) / "base", size, "llama", seed=seed)
        tuned = save_tuned(base, Path(folder) / "tuned", seed)
        minds = Minds.load({"base": str(base), "tuned": str(tuned)}, memory_budget=1 if from_files else None)
        context = Context(minds, contrasts(minds.tokenizer("base"), size, 0.5, seed=seed), rows=size.batch)
        chosen = [i.contrast for i in context.items if i.contrast is not None]
        plan = contrast_plan(context, chosen)
        found: list[Any] = []

        def ledger() -> None:
            context.minds.memo.clear()  # the difference is formed anew: it is part of the cost
            found[:] = [integrate(context, chosen, nodes=nodes, max_nodes=nodes)]

        with resident_peak() as resident:
            seconds = cpu_seconds(ledger, rounds)
        delta = difference_of(context, "base", "tuned")
        bytes_ = {"difference": sum(d.nbytes for d in delta.values()), **counted(context, chosen)}
        weights = minds.plan()
        n_params = minds.n_params
        bytes_ |= {"body": weights.body, "beside": sum(weights.resident.values())}
        del minds, context, delta
        model: Any = AutoModelForCausalLM.from_pretrained(str(base), attn_implementation="eager").eval()
        plain_pass(model, plan)  # the first pass pays for much that is done once
        plain = cpu_seconds(lambda: plain_pass(model, plan), rounds)
    (integral,) = found
    return {
        "label": size.label,
        "n_params": n_params,
        "n_layers": size.n_layers,
        "d_model": size.d_model,
        "n_heads": size.n_heads,
        "rows": int(plan.both.ids.shape[0]),
        "length": int(plan.both.ids.shape[1]),
        "n_contrasts": len(chosen),
        "nodes": integral.n_nodes,
        "seconds": seconds,
        "plain_seconds": plain,
        "ratio": seconds / (integral.n_nodes * plain),
        "residual": integral.residual,
        "resident_bytes": resident[0],
        **{f"{name}_bytes": value for name, value in bytes_.items()},
    }


def counted(context: Context, chosen: list[Any]) -> dict[str, int]:
    """Bytes alive at once and kept by autograd during one node, whole and checkpointed."""
    weights = {p.untyped_storage().data_ptr() for p in context.minds._params.values()}
    out: dict[str, int] = {}
    for name, checkpoint in (("", False), ("checkpointed_", True)):
        with context.open("tuned"), Counted() as alive:
            _node(context, chosen, checkpoint)
        saved = SavedBytes(weights)
        with context.open("tuned"), saved.counting():
            _node(context, chosen, checkpoint)
        out |= {f"{name}alive": alive.peak, f"{name}saved": saved.peak}
    return out


def _node(context: Context, chosen: list[Any], checkpoint: bool) -> None:
    """One node at the tuned end, whose weights are in already: no blend is counted."""
    node_entries(context, chosen, 1.0, from_mind="base", to_mind="tuned", checkpoint=checkpoint)


@housed
def draw(table: pd.DataFrame) -> Any:
    """Seconds a node on the left, bytes on the right, against the number of parameters."""
    fig = figure(9.6, 3.7)
    left, middle, right = fig.subplots(1, 3, sharex=True)
    x = table["n_params"]
    left.plot(x, table["seconds"] / table["nodes"], marker="o", color=MORE_COLOURS[0], label="ledger, a node")
    left.plot(x, table["plain_seconds"], marker="s", color=NEUTRAL, label="plain forward and backward")
    left.set(yscale="log", ylabel="CPU seconds, one thread", title="Seconds")
    left.legend(fontsize=7.5)
    middle.axhline(MAX_RATIO, color=NEUTRAL, lw=1, ls=(0, (3, 2)))
    middle.text(x.min(), MAX_RATIO, "allowed", va="bottom", fontsize=7.5)
    middle.plot(x, table["ratio"], marker="o", color=MORE_COLOURS[0])
    middle.set(ylim=(0, MAX_RATIO * 1.15), ylabel="ledger / (nodes x plain pass)", title="Ratio")
    look = {
        "body": ("body's weights", NEUTRAL, "-"),
        "beside": ("both minds beside it", NEUTRAL, ":"),
        "difference": ("difference", MORE_COLOURS[1], (0, (2, 2))),
        "alive": ("alive in a node", MORE_COLOURS[0], "-"),
        "checkpointed_alive": ("the same, checkpointed", MORE_COLOURS[0], ":"),
        "resident": ("process, peak", MORE_COLOURS[5], "-"),
    }
    for key, (label, colour, dash) in look.items():
        right.plot(x, table[f"{key}_bytes"] / 2**20, marker="o", ms=3, color=colour, ls=dash, lw=1.4, label=label)
    right.set(yscale="log", ylabel="MiB", title="Memory")
    right.legend(fontsize=6.5)
    for ax in (left, middle, right):
        ax.set(xscale="log", xlabel="parameters")
        ax.grid(True, axis="y")
    return fig


def in_own_process(k: int, options: argparse.Namespace) -> dict[str, Any]:
    """Measure a size in a process of its own, whose memory is its own."""
    rounds = 2 if SIZES[k].d_model < 500 and not options.quick else 1
    call = [sys.executable, __file__, "--one", str(k), "--nodes", str(options.nodes), "--seed", str(options.seed)]
    call += ["--from-files"] * options.from_files
    done = subprocess.run([*call, "--rounds", str(rounds)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"size {SIZES[k].label}: {done.stderr.strip().splitlines()[-1:]}")
    row: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return row


def main() -> int:
    """Measure, draw, and end with one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="the smaller sizes, under a minute")
    parser.add_argument("--nodes", type=int, default=4, help="intervals between nodes")
    parser.add_argument("--from-files", action="store_true", help="as where memory is short: no mind is kept in memory")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--largest", type=int, default=len(SIZES), help="how many of the sizes, from the smallest on")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[1] / "figures" / "ledger_cost.png")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=1, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.one is not None:
        print(json.dumps(measure(SIZES[options.one], options.nodes, options.rounds, options.seed, options.from_files)))
        return 0
    rows = []
    for k in range(min(QUICK if options.quick else options.largest, len(SIZES))):
        rows.append(in_own_process(k, options))
        print(json.dumps(rows[-1]), flush=True)
    table = pd.DataFrame(rows)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    draw(table).savefig(options.out, dpi=110)
    lines, large = at_seven_billion(table)
    print("\n".join(lines))
    peak = table[["body_bytes", "beside_bytes", "difference_bytes", "alive_bytes"]].sum(axis=1)
    result = {
        "ledger_ratio": round(float(table["ratio"].max()), 2),
        "max_ratio": MAX_RATIO,
        "ratios": [round(float(v), 2) for v in table["ratio"]],
        "sizes": table["n_params"].tolist(),
        "seconds": [round(float(v), 3) for v in table["seconds"]],
        "peak_bytes": [int(v) for v in peak],
        "resident_bytes": table["resident_bytes"].tolist(),
        "nodes": table["nodes"].tolist(),
        "tokens": (table["rows"] * table["length"]).tolist(),
        "seven_billion": {name: float(f"{value:.3g}") for name, value in large.items()},
        "n": len(table),
        "seed": options.seed,
        "unit": "CPU seconds, one thread, least of the rounds; bytes of weights, difference and tensors alive at once",
        "figure": options.out.name,
    }
    print(json.dumps(result, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
