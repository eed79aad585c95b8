"""Edge attribution of a batch, per example and for all positions: this kit beside TransformerLens, and beside the model.

    python experiments/benchmarks/edges.py [--quick] [--seed 0] [--json FILE]

1. Random models (the numbers do not matter, the sizes do); the runs of a pair part at a position given as a share of the
   prompt, since tokens before it have no edges.
2. *Memory*, first, in forked processes that have made the model and read one token: growth of the peak resident set
   (`ru_maxrss`) by this kit's edges, scores included, by one forward and backward pass of the model over the same batch
   (gradients of activations only) and, without `--quick`, by TransformerLens' edges of a single example.
3. *Time*: CPU seconds (`process_time`, one thread), the smallest of interleaved rounds.  TransformerLens does one
   example at a time, so it is run on one or two of them and its seconds are per example.  It refuses grouped-query attention
   and, at the largest size, its dictionary of edges would not fit: there only this kit is run, beside the model.
4. *Agreement*: largest absolute difference of any edge's score from TransformerLens', on the examples that it was run
   on, beside the largest score.

`floor_ratio` is this kit's time over what the method cannot do without: two forward passes and one backward pass.
The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor

from reasoninterp.models.body import Body
from reasoninterp.models.read import AnswerPair, plan_margins
from reasoninterp.patching.edge_attribution import edge_attribution
from reasoninterp.patching.edge_graph import EdgeScores
from reasoninterp.patching.metric import ContrastPlan
from reasoninterp.patching.stream import Receiver, Sender

VOCABULARY, STEP = 1024, 16
READERS = {"q_input": "q", "k_input": "k", "v_input": "v", "mlp_in": "mlp", "logits": "logits"}
WRITERS = {"embed": "embed", "attn_head_out": "z", "mlp_out": "mlp_out"}


@dataclass(frozen=True)
class Case:
    """A model, a batch, and the share of the prompt at which the two runs part."""

    family: str
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    n_tokens: int
    batch: int
    part: float
    peer_examples: int  # how many TransformerLens is run on; 0 where it cannot be

    def __str__(self) -> str:
        heads = f"{self.n_heads} heads" + (f" ({self.n_kv_heads} kv)" if self.n_kv_heads != self.n_heads else "")
        size = f"{self.n_layers} layers × {self.d_model}, {heads}, {self.batch} × {self.n_tokens} tokens"
        return f"{self.family} {size}, parting at {self.part:g}"


PEERS = Case("gpt2", 6, 256, 8, 8, 128, 16, 0.25, 1)  # the size at which peers were compared before
QUICK = [
    replace(PEERS, part=0.0, batch=8),
    replace(PEERS, family="llama", n_kv_heads=2, batch=8, peer_examples=0),
]
FULL = [
    Case("gpt2", 4, 128, 4, 4, 64, 16, 0.0, 2),
    Case("llama", 4, 128, 4, 4, 64, 16, 0.0, 2),
    replace(PEERS, peer_examples=2),
    replace(PEERS, part=0.0),
    replace(PEERS, part=0.9),
    replace(PEERS, family="llama", part=0.0),
    replace(PEERS, family="llama", n_kv_heads=2, part=0.0, peer_examples=0),
    Case("llama", 6, 256, 8, 2, 256, 8, 0.0, 0),
    Case("llama", 12, 768, 12, 4, 512, 2, 0.0, 0),
]


def make_body(case: Case, seed: int) -> Body:
    """A random model of the case's size."""
    import transformers as hf
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    torch.manual_seed(seed)
    shared: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "use_cache": False}
    if case.family == "gpt2":
        config: Any = hf.GPT2Config(
            n_embd=case.d_model, n_layer=case.n_layers, n_head=case.n_heads, n_positions=case.n_tokens, **shared
        )
        name: str = "GPT2LMHeadModel"
    else:
        config = hf.LlamaConfig(
            hidden_size=case.d_model, intermediate_size=4 * case.d_model, num_hidden_layers=case.n_layers,
            num_attention_heads=case.n_heads, num_key_value_heads=case.n_kv_heads,
            max_position_embeddings=case.n_tokens, **shared,
        )  # fmt: skip
        name = "LlamaForCausalLM"
    config._attn_implementation = "eager"
    model: Any = getattr(hf, name)(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(3.0)  # so that attention and logits are not flat, and scores not tiny
    params = dict(model.named_parameters())
    return Body(build_bridge_from_module(model, name, hf_config=config), config, params, VOCABULARY)


def make_plan(case: Case, seed: int) -> ContrastPlan:
    """Pairs of random prompts that differ in one step of `STEP` tokens, with random answers of one token."""
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randint(1, VOCABULARY, (case.batch, case.n_tokens), generator=generator)
    corrupt = clean.clone()
    first = min(int(case.part * case.n_tokens), case.n_tokens - 2)
    stop = min(first + STEP, case.n_tokens - 1)
    corrupt[:, first:stop] = clean[:, first:stop] % (VOCABULARY - 1) + 1
    answers = torch.randint(1, VOCABULARY, (case.batch,), generator=generator)
    pairs = [AnswerPair((int(a),), (int(a) % (VOCABULARY - 1) + 1,)) for a in answers]
    prompts = (tuple(map(tuple, clean.tolist())), tuple(map(tuple, corrupt.tolist())))
    both = plan_margins(prompts[0] + prompts[1], pairs + pairs)
    return ContrastPlan(case.batch, (plan_margins(prompts[0], pairs), plan_margins(prompts[1], pairs)), both, prompts)


def ours(body: Body, plan: ContrastPlan) -> EdgeScores:
    """This kit's edges: all positions, every example by itself."""
    return edge_attribution(body, plan, "noising")


def forward(body: Body, plan: ContrastPlan) -> None:
    """One forward pass without graph."""
    plan.margins(body, 1)


def forward_backward(body: Body, plan: ContrastPlan) -> None:
    """One forward and backward pass of the model, with gradients of activations only."""
    plan.margins(body, 0, grad=True).sum().backward()


def theirs(body: Body, plan: ContrastPlan, example: int) -> Any:
    """TransformerLens' edges of one example, with the same direction, metric and sign."""
    from transformer_lens.tools.analysis.attribution_patching import EdgeAttributionConfig, attribution_patch

    side = plan.sides[0]
    read, (to, of) = int(side.positions[example, 0]), side.target[side.item == example].flip(0).tolist()

    def metric(logits: Tensor) -> Tensor:
        return logits[0, read, to] - logits[0, read, of]

    source, into = plan.ids(1)[example : example + 1], plan.ids(0)[example : example + 1]
    config = EdgeAttributionConfig(granularity="edge")
    for p in body._bridge.parameters():  # its graph begins at the weights
        p.requires_grad_(True)
    try:
        return attribution_patch(body._bridge, source, into, metric, config)
    finally:
        for p in body._bridge.parameters():
            p.requires_grad_(False)


class Difference(NamedTuple):
    """Largest difference of an edge's score, largest score, and edges compared."""

    worst: float
    largest: float
    n: int


def difference(scores: EdgeScores, example: int, found: Any) -> Difference:
    """Compare one example's scores, edge by edge."""
    writer = {node: k for k, node in enumerate(scores.writers)}
    reader = {node: k for k, node in enumerate(scores.readers)}
    index, values = [], []
    for (w, r), value in found.edge_scores.items():
        layer = 0 if r.kind == "logits" else r.layer
        at = (writer[Sender(WRITERS[w.kind], w.layer or 0, w.head)], reader[Receiver(READERS[r.kind], layer, r.head)])
        index.append((w.position, *at))
        values.append(value)
    mine = scores.scores[example][tuple(torch.tensor(index).T)]
    return Difference(float((mine - torch.tensor(values)).abs().max()), float(mine.abs().max()), len(values))


def seconds(run: Callable[[], object]) -> float:
    """CPU seconds of one call."""
    began = time.process_time()
    run()
    return time.process_time() - began


def peak_mb(case: Case, seed: int, run: Callable[[Body, ContrastPlan], object]) -> float:
    """Growth of the peak resident set in a forked process, in MB, once it has a model that has read one token."""
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)

    def child() -> None:
        body, plan = make_body(case, seed), make_plan(case, seed)
        body.forward(plan.ids(0)[:1, :1])
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        run(body, plan)
        send.send((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)

    process = context.Process(target=child)
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"the process that measures memory ended with {process.exitcode}")
    return float(receive.recv())


def measure_memory(case: Case, seed: int, with_peer: bool) -> dict[str, float]:
    """Peaks of this kit, of the model's own passes and, where asked, of TransformerLens on one example."""
    found = {"ours": peak_mb(case, seed, ours), "model": peak_mb(case, seed, forward_backward)}
    if with_peer and case.peer_examples:
        found["theirs_one_example"] = peak_mb(case, seed, lambda body, plan: theirs(body, plan, 0))
    row = {f"peak_mb_{k}": round(v, 1) for k, v in found.items()}
    return row | {"memory_ratio": round(found["ours"] / found["model"], 2)}


def measure_time(case: Case, seed: int, rounds: int) -> dict[str, Any]:
    """Seconds and agreement of one case."""
    body, plan = make_body(case, seed), make_plan(case, seed)
    times: dict[str, list[float]] = {"ours": [], "forward": [], "forward_backward": [], "theirs": []}
    forward(body, plan)  # the first pass pays for much that is done once
    worst: list[Difference] = []
    for turn in range(max(rounds, case.peer_examples)):
        times["forward"].append(seconds(lambda: forward(body, plan)))
        times["forward_backward"].append(seconds(lambda: forward_backward(body, plan)))
        kept: list[Any] = []
        times["ours"].append(seconds(partial(_kept, kept, ours, body, plan)))
        if turn < case.peer_examples:
            times["theirs"].append(seconds(partial(_kept, kept, theirs, body, plan, turn)))
            worst.append(difference(kept[0], turn, kept[1]))
    per_example = min(times["ours"]) / case.batch
    floor = min(times["forward"]) + min(times["forward_backward"])
    row = {
        "n_edges_per_position": kept[0].n_edges,
        "ms_per_example": round(1e3 * per_example, 1),
        "floor_ratio": round(min(times["ours"]) / floor, 2),
    }
    if worst:
        row["their_ms_per_example"] = round(1e3 * min(times["theirs"]), 1)
        row["speedup_edges"] = round(min(times["theirs"]) / per_example, 1)
        row["max_abs_diff"] = max(d.worst for d in worst)
        row["largest_score"] = round(max(d.largest for d in worst), 3)
        row["n_edges_compared"] = sum(d.n for d in worst)
    return row


def main() -> int:
    """Run the cases, print each, and end with one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two cases, under a minute")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE", help="also write the object there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cases = QUICK if options.quick else FULL
    # Before anything is timed: what this process has freed would be taken again by a fork unseen.
    memory = [measure_memory(case, options.seed, with_peer=not options.quick) for case in cases]
    rows = []
    for case, peaks in zip(cases, memory, strict=True):
        rows.append({"case": str(case), **peaks, **measure_time(case, options.seed, rounds=2)})
        print(json.dumps(rows[-1], ensure_ascii=False), flush=True)
    compared = [r for r in rows if "speedup_edges" in r]
    # The headline is the least favourable case.
    out = {
        "speedup_edges": min(r["speedup_edges"] for r in compared),
        "memory_ratio": max(r["memory_ratio"] for r in rows),
        "max_abs_diff": max(r["max_abs_diff"] for r in compared),
        "floor_ratio": max(r["floor_ratio"] for r in rows),
        "n": sum(r["n_edges_compared"] for r in compared),
        "sizes": [r["case"] for r in rows],
        "seed": options.seed,
        "unit": "CPU seconds per example, one thread, least of two rounds; peak resident set",
        "versions": {"torch": torch.__version__, "transformer_lens": _version("transformer-lens")},
        "cases": rows,
    }
    line = json.dumps(out, ensure_ascii=False)
    if options.json:
        with open(options.json, "w") as file:
            file.write(line + "\n")
    print(line)
    return 0


def _kept(into: list[Any], run: Callable[..., object], *args: Any) -> None:
    into.append(run(*args))


def _version(name: str) -> str:
    from importlib.metadata import version

    return version(name)


if __name__ == "__main__":
    sys.exit(main())
