"""The kits that a sweep is compared with, each on the same weights, prompts and cells: one forward pass per cell.

A kit is made from a `Job`, does once what it needs once in `prepare` (the clean run), and gives in `run` the logit
difference at the last position for every cell and example.  All run without gradients.  Where the kit lets one ask for
it, no key/value cache is kept and logits are computed at the last position only (Hugging Face hooks, nnsight); where
it does not, the kit does as it does (TransformerLens, pyvene).  `pyvene` and `nnsight` are an optional extra.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any, Protocol

import pandas as pd
import torch
from floor import Cell
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Job:
    """What every kit is given: networks of the same weights, both sides' prompts, and the answers' tokens.

    Attributes:
        network: Hugging Face's own model (sdpa attention).
        bridge: TransformerLens's model.
        clean, corrupt: token ids.
        answers: of each example, the clean chain's answer and the corrupt chain's.
    """

    network: Any
    bridge: Any
    clean: Int[Tensor, "example pos"]
    corrupt: Int[Tensor, "example pos"]
    answers: Int[Tensor, "example 2"]

    @property
    def blocks(self) -> Any:
        """The network's blocks."""
        return self.network.transformer.h if hasattr(self.network, "transformer") else self.network.model.layers

    def margin(self, logits: Float[Tensor, "example pos vocab"]) -> Float[Tensor, " example"]:
        """Logit of the corrupt chain's answer less that of the clean chain's, at the last position."""
        both = logits[:, -1].gather(1, self.answers)
        return both[:, 1] - both[:, 0]


class Kit(Protocol):
    """One way to patch."""

    name: str

    def prepare(self) -> None:
        """What is done once for all cells."""

    def run(self, cells: Sequence[Cell]) -> Float[Tensor, "cell example"]:
        """Margins of the corrupt run with each cell patched from the clean run."""


class HuggingFaceHooks:
    """torch's forward hooks on the plain model, with sdpa attention."""

    name = "hf_hooks"

    def __init__(self, job: Job) -> None:
        self.job = job
        self.stored: list[Tensor] = []

    def forward(self, ids: Tensor) -> Tensor:
        """Margins of a forward pass."""
        with torch.no_grad():
            return self.job.margin(self.job.network(ids, use_cache=False, logits_to_keep=1).logits)

    def prepare(self) -> None:
        """Keep the clean run's residual stream before every block."""
        self.stored.clear()
        handles = [b.register_forward_pre_hook(lambda _, args: self.stored.append(args[0])) for b in self.job.blocks]
        self.forward(self.job.clean)
        for handle in handles:
            handle.remove()

    def run(self, cells: Sequence[Cell]) -> Float[Tensor, "cell example"]:
        """One forward pass a cell."""
        out = []
        for layer, (start, stop) in cells:
            given = self.stored[layer][:, start:stop]

            def put(_: Any, args: tuple[Any, ...], given: Tensor = given, at: slice = slice(start, stop)) -> Any:
                new = args[0].clone()
                new[:, at] = given
                return (new, *args[1:])

            handle = self.job.blocks[layer].register_forward_pre_hook(put)
            out.append(self.forward(self.job.corrupt))
            handle.remove()
        return torch.stack(out)


class TransformerLens:
    """`transformer_lens.patching.generic_activation_patch` on the bridge."""

    name = "transformer_lens"

    def __init__(self, job: Job) -> None:
        self.job = job
        self.cache: Any = None

    def prepare(self) -> None:
        """Cache the clean run's residual stream."""
        with torch.no_grad():
            _, self.cache = self.job.bridge.run_with_cache(
                self.job.clean, names_filter=lambda name: name.endswith("hook_resid_pre")
            )

    def run(self, cells: Sequence[Cell]) -> Float[Tensor, "cell example"]:
        """All cells in one call."""
        from transformer_lens import patching

        lens: Any = patching

        def put(act: Tensor, index: Sequence[int], clean: Tensor) -> Tensor:
            act[:, index[1] : index[2]] = clean[:, index[1] : index[2]]
            return act

        table = pd.DataFrame([(c.layer, c.span.start, c.span.stop) for c in cells], columns=["layer", "start", "stop"])
        with torch.no_grad():
            found = lens.generic_activation_patch(
                self.job.bridge, self.job.corrupt, self.cache, self.job.margin, put, "resid_pre",
                index_df=table, reduce="none",
            )  # fmt: skip
        values: Tensor = found.values
        return values


class NNsight:
    """nnsight's documented recipe: one trace a cell, the clean run's activations kept from a first one."""

    name = "nnsight"

    def __init__(self, job: Job) -> None:
        import nnsight

        self.job = job
        self.stored: list[Tensor] = []
        self.model = nnsight.NNsight(job.network)
        inner = self.model.transformer if hasattr(job.network, "transformer") else self.model.model
        self.blocks = inner.h if hasattr(job.network, "transformer") else inner.layers

    def prepare(self) -> None:
        """Save the residual stream of the clean run."""
        blocks = self.blocks
        with torch.no_grad(), self.model.trace(self.job.clean, use_cache=False, logits_to_keep=1):
            kept: Any = list().save()  # type: ignore[attr-defined]  # noqa: C408 (nnsight gives objects this method)
            for block in blocks:
                kept.append(block.input)
        self.stored = kept

    def run(self, cells: Sequence[Cell]) -> Float[Tensor, "cell example"]:
        """One trace a cell."""
        out, model = [], self.model
        for layer, (start, stop) in cells:
            block, given = self.blocks[layer], self.stored[layer][:, start:stop]
            with torch.no_grad(), model.trace(self.job.corrupt, use_cache=False, logits_to_keep=1):
                block.input[:, start:stop] = given
                logits = model.lm_head.output.save()
            out.append(self.job.margin(logits))
        return torch.stack(out)


class Pyvene:
    """pyvene's intervenable model, one for each layer, with the clean run's activations as source representations."""

    name = "pyvene"

    def __init__(self, job: Job) -> None:
        import pyvene

        self.job, self.pyvene = job, pyvene
        self.plain = HuggingFaceHooks(job)
        self.models = [self._model(layer) for layer in range(len(job.blocks))]

    def _model(self, layer: int) -> Any:
        config = self.pyvene.IntervenableConfig(
            [{"layer": layer, "component": "block_input", "intervention_type": self.pyvene.VanillaIntervention}]
        )
        model = self.pyvene.IntervenableModel(config, self.job.network)
        model.disable_model_gradients()
        return model

    def prepare(self) -> None:
        """Keep the clean run's residual stream, by hooks: its own call would run the clean prompt for every cell."""
        self.plain.prepare()

    def run(self, cells: Sequence[Cell]) -> Float[Tensor, "cell example"]:
        """One call a cell."""
        out = []
        for layer, (start, stop) in cells:
            with torch.no_grad():
                _, patched = self.models[layer](
                    base={"input_ids": self.job.corrupt},
                    unit_locations={"base": list(range(start, stop))},
                    source_representations=self.plain.stored[layer][:, start:stop],
                    use_cache=False,
                )
            out.append(self.job.margin(patched.logits))
        return torch.stack(out)


def with_own_network(job: Job) -> Job:
    """The job with a copy of the network that shares its weights, for kits that leave hooks on its modules."""
    shared: dict[int, Any] = {id(p): p for p in (*job.network.parameters(), *job.network.buffers())}
    return replace(job, network=copy.deepcopy(job.network, shared))


def kits_of(job: Job) -> list[Kit]:
    """Every kit that is installed, Hugging Face hooks first."""
    found: list[Kit] = [HuggingFaceHooks(job), TransformerLens(job)]
    found += [kit(with_own_network(job)) for kit in (NNsight, Pyvene) if importlib.util.find_spec(kit.name)]
    return found


def versions() -> dict[str, str]:
    """Of everything that is timed."""
    names = {"torch": "torch", "transformers": "transformers", "transformer-lens": "transformer_lens"}
    names |= {"nnsight": "nnsight", "pyvene": "pyvene"}
    return {name: version(name) for name, module in names.items() if importlib.util.find_spec(module)}
