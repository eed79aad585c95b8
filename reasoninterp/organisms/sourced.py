"""Organisms whose words have planted sources: a model trained on documents of a `sourced_world`, with what it takes to test.

    <cache>/sourced/<digest>/  model/  (an ordinary Hugging Face directory)   documents.npy  (training, one row of ids each)
                               traces/written.jsonl  traces/drawn.jsonl       sourced.json

1. A small model is trained on every document once, or `passes` times; what is saved is measured on held-out documents and
   refused where it has not learned what is planted.
2. *Held-out documents*: in `drawn` the words are the recipe's; in `written` they are the model's own, written greedily one
   after the other into the same documents, as reasoning models are read.  Each trace says what is planted
   (`World.trace`).
3. The directory is built beside its place and renamed when it is whole; its name is a hash of all that determines it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64, Integer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from reasoninterp.errors import UserError
from reasoninterp.organisms.making import cache_dir, one_thread, quiet_transformers
from reasoninterp.organisms.recipes import RecipeFailed, Target
from reasoninterp.organisms.rows import Rows
from reasoninterp.organisms.sourced_world import (
    EOS,
    KINDS,
    LENGTH,
    N_WORDS,
    PAD,
    UNK,
    WORDS_AT,
    Documents,
    Kind,
    Lexicon,
    World,
)
from reasoninterp.organisms.training import THETA, fit
from reasoninterp.traces.io import write_traces

RECORD = "sourced.json"
OTHER_WEIGHT = 0.02  # of tokens that are no words, most of which nothing predicts
_HERE = Path(__file__).parent
_SOURCES = ("sourced.py", "sourced_world.py", "training.py")


@dataclass(frozen=True)
class Size:
    """How one organism is made.

    Attributes:
        lexicon: of its language.
        documents: training documents.
        passes: how often each is seen; a second pass learns single documents by heart.
        batch, lr: of the training.
        width, hidden: of the residual stream and of the MLPs; there are two layers with two heads each.
        held_out: documents in each trace file.
        most_left: the largest share of what there is to learn of a kind of word that may be left unlearned: divergence of
            the model from the planted distribution, over that of the words' frequencies from it.

    Raises:
        UserError: fewer documents than a batch, a number below 1, or a width that is no multiple of 4.
    """

    lexicon: Lexicon = field(default_factory=Lexicon)
    documents: int = 100_000
    passes: int = 1
    batch: int = 32
    lr: float = 5e-3
    width: int = 64
    hidden: int = 32
    held_out: int = 400
    most_left: float = 0.5

    def __post_init__(self) -> None:
        for name in ("passes", "batch", "width", "hidden", "held_out"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: {getattr(self, name)}; give at least 1.")
        if self.documents < self.batch:
            raise UserError(f"documents: {self.documents} are less than a batch of {self.batch}; give more.")
        if self.width % 4:
            raise UserError(f"width: {self.width}; give a multiple of 4, half of which each of two heads gets.")

    @property
    def steps(self) -> int:
        """Optimiser steps."""
        return self.passes * (self.documents // self.batch)

    @property
    def targets(self) -> tuple[Target, ...]:
        """What the model must have learned."""
        shares = [Target(f"{kind}.left", high=self.most_left) for kind in KINDS if kind != "copy"]
        return (*shares, Target("copy.divergence", high=0.1))


@dataclass(frozen=True)
class Sourced:
    """One organism as it lies on disk.

    Attributes:
        seed, size: how it was made.
        path: its directory.
        steps, cpu_seconds: of its training.
        figures: by kind of word, on held-out documents: `divergence` in nats from the planted distribution, and `left`,
            the same over what the words' frequencies leave.
    """

    seed: int
    size: Size
    path: Path
    steps: int
    cpu_seconds: float
    figures: dict[str, float]

    @property
    def model(self) -> Path:
        """The Hugging Face directory."""
        return self.path / "model"

    @property
    def written(self) -> Path:
        """Held-out traces with the model's own words."""
        return self.path / "traces" / "written.jsonl"

    @property
    def drawn(self) -> Path:
        """The same traces with the recipe's words."""
        return self.path / "traces" / "drawn.jsonl"

    def documents(self) -> Integer[np.ndarray, "document pos"]:
        """The training corpus, one document of ids a row; not read into memory."""
        rows: Integer[np.ndarray, "document pos"] = np.load(self.path / "documents.npy", mmap_mode="r")
        return rows


def make_sourced(
    seed: int = 0,
    size: Size | None = None,
    cache: str | Path | None = None,
    *,
    tick: Callable[[int], None] | None = None,
) -> Sourced:
    """An organism with planted sources: from the cache, or made now.

    Args:
        seed: of the language, the documents and the weights.
        size: how large; the default if None.
        cache: see `making.cache_dir`.
        tick: called after every optimiser step.

    Raises:
        RecipeFailed: it did not learn what is planted; nothing is left behind.
    """
    size = size or Size()
    store = cache_dir(cache).parent / "sourced"
    whole = store / digest(seed, size)
    if not (whole / RECORD).exists():
        store.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=".building-", dir=store))
        try:
            with quiet_transformers(), one_thread():
                _build(seed, size, building, tick)
            try:
                building.rename(whole)
            except OSError:
                if not (whole / RECORD).exists():
                    raise  # otherwise another process finished the same organism first
        finally:
            shutil.rmtree(building, ignore_errors=True)
    record = json.loads((whole / RECORD).read_text())
    return Sourced(seed, size, whole, record["steps"], record["cpu_seconds"], record["figures"])


def digest(seed: int, size: Size) -> str:
    """Hash of all that determines an organism."""
    value = {
        "seed": seed,
        "size": asdict(size),
        "versions": {name: version(name) for name in ("torch", "transformers", "numpy")},
        "source": [hashlib.sha256((_HERE / f).read_bytes()).hexdigest() for f in _SOURCES],
    }
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:24]


def tokenizer_of(world: World) -> PreTrainedTokenizerFast:
    """The word-level tokenizer of a language; ids are places in its vocabulary."""
    raw = Tokenizer(WordLevel(dict(world.id), unk_token=UNK))
    raw.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNK,
        clean_up_tokenization_spaces=False,
        model_max_length=64,
        padding_side="left",
    )


def _build(seed: int, size: Size, folder: Path, tick: Callable[[int], None] | None) -> None:
    began = time.process_time()
    world = World(size.lexicon, seed)
    documents = world.draw(np.random.default_rng([seed, 63]), size.documents).ids
    model = _new_model(world, size, seed)
    data = _batches(documents, size.batch, seed)
    steps = fit(model, data, lr=size.lr, steps=size.steps, decay=True, tick=tick)
    model.save_pretrained(folder / "model")
    tokenizer_of(world).save_pretrained(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()  # what is measured is what was saved
    held_out = world.draw(np.random.default_rng([seed, 64]), size.held_out)
    figures = divergences(model, world, held_out)
    missed = [f"{t}, but it is {figures[t.figure]:.3f}" for t in size.targets if not t.holds(figures[t.figure])]
    if missed:
        raise RecipeFailed("sourced", seed, missed, steps, figures)
    np.save(folder / "documents.npy", documents.astype(np.uint16))
    for name, ids in (("drawn", held_out.ids), ("written", write_words(model, held_out.ids))):
        rows = zip(ids, held_out.kinds, strict=True)
        traces = [world.trace(row, kinds, f"sourced-{i:04d}") for i, (row, kinds) in enumerate(rows)]
        write_traces(folder / "traces" / f"{name}.jsonl", traces)
    record = {"seed": seed, "size": asdict(size), "steps": steps, "figures": figures}
    record["cpu_seconds"] = round(time.process_time() - began, 2)
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n")


def _new_model(world: World, size: Size, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(world.vocabulary),
        hidden_size=size.width,
        intermediate_size=size.hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.1,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=world.id[EOS],
        pad_token_id=world.id[PAD],
    )
    return LlamaForCausalLM(config)


def _batches(documents: Int64[np.ndarray, "document pos"], size: int, seed: int) -> Iterator[Rows]:
    """The documents in a new order in every pass."""
    weights = np.full((size, LENGTH), OTHER_WEIGHT, np.float32)
    weights[:, WORDS_AT] = 1
    rng = np.random.default_rng([seed, 65])
    while True:
        order = rng.permutation(len(documents))
        for at in range(0, len(order) - size + 1, size):
            yield Rows(documents[order[at : at + size]], weights)


@torch.no_grad()
def divergences(model: Any, world: World, documents: Documents) -> dict[str, float]:
    """By kind of word, `divergence` of a model from what is planted, and `left` of what there is to learn.

    Divergence is Kullback and Leibler's, of the model from the planted distribution, in nats, over the whole vocabulary.
    """
    logits = model(input_ids=torch.from_numpy(documents.ids), use_cache=False).logits
    found = logits[:, WORDS_AT - 1].double().log_softmax(-1).numpy()
    planted = np.exp(documents.log_probs)
    steps = (planted * (documents.log_probs - found[:, :-1, :N_WORDS])).sum(-1)
    to_learn = (planted * (documents.log_probs + np.log(N_WORDS))).sum(-1)
    figures: dict[str, float] = {}
    for code, kind in enumerate(KINDS):
        at = documents.kinds[:, :-1] == code
        if at.any():
            figures[f"{kind}.divergence"] = float(steps[at].mean())
            figures[f"{kind}.left"] = float(steps[at].mean() / to_learn[at].mean())
    copied = documents.ids[:, WORDS_AT[-1]]
    copy: Kind = "copy"
    figures[f"{copy}.divergence"] = float(-found[np.arange(len(copied)), -1, copied].mean())
    return figures


@torch.no_grad()
def write_words(model: Any, ids: Int64[np.ndarray, "document pos"]) -> Int64[np.ndarray, "document pos"]:
    """The documents with the model's own words, each the most probable one after all before it."""
    out = ids.copy()
    for at in WORDS_AT:
        logits = model(input_ids=torch.from_numpy(out[:, :at]), use_cache=False, logits_to_keep=1).logits
        out[:, at] = logits[:, -1, :N_WORDS].argmax(-1).numpy()
    return out
