"""Readouts: what a ledger splits over Units; each a number per contrast in nats, differentiable.

`reliance`   E, how far the corrupt chain moves the answer: `m(corrupt) − m(clean)` (`patching.metric`); default.
`accuracy`   log P of the gold answer after the trace's own chain, summed over the answer's tokens.
`chain`      mean log P of the tokens of the trace's steps given the question and the earlier ones (nats per token).
`text`       mean log P of the steps' and the answer's tokens together: minus it is the cross-entropy, whose bulge
             along the straight path between two minds is the loss barrier.

`after_chains` makes `accuracy` after other chains than the trace's own (those that the base wrote).

A readout is a function `(context, contrasts) -> Plan`; a `Plan` knows its rows and reads them in one forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reasoninterp.errors import UserError
from reasoninterp.models.body import Body
from reasoninterp.models.context import Context, gold
from reasoninterp.patching.metric import ContrastPlan, contrast_plan
from reasoninterp.traces.contrast import Contrast
from reasoninterp.traces.trace import Trace


@runtime_checkable
class Plan(Protocol):
    """Rows of some contrasts, and the number that is read from them."""

    @property
    def owner(self) -> list[int]:
        """The contrast that each row belongs to."""

    @property
    def positions(self) -> Tensor:
        """[row, read]: where the unembedding reads."""

    @property
    def ids(self) -> Tensor:
        """[row, pos]: token ids."""

    def values(self, body: Body, grad: bool = False) -> Float[Tensor, " contrast"]:
        """The readout of every contrast, from one forward pass."""


Readout: TypeAlias = Callable[[Context, Sequence[Contrast]], Plan]


@dataclass(frozen=True)
class ReliancePlan:
    """E of each contrast."""

    plan: ContrastPlan

    @property
    def owner(self) -> list[int]:
        """The contrast that each row belongs to."""
        return self.plan.owner

    @property
    def positions(self) -> Int[Tensor, "row read"]:
        """Where the unembedding reads."""
        return self.plan.both.positions

    @property
    def ids(self) -> Int[Tensor, "row pos"]:
        """Token ids."""
        return self.plan.both.ids

    def values(self, body: Body, grad: bool = False) -> Float[Tensor, " contrast"]:
        """`m(corrupt chain) − m(clean chain)`, nats."""
        return self.plan.effects(body, grad=grad)


@dataclass(frozen=True)
class LogProbPlan:
    """Weighted sums of log-probabilities of given tokens, one row a contrast.

    `targets[row, read]` are the tokens that follow the positions read, `weights` what each counts (0 for padding).
    """

    ids: Int[Tensor, "row pos"]
    positions: Int[Tensor, "row read"]
    targets: Int[Tensor, "row read"]
    weights: Float[Tensor, "row read"]

    @property
    def owner(self) -> list[int]:
        """The contrast that each row belongs to."""
        return list(range(len(self.ids)))

    def values(self, body: Body, grad: bool = False) -> Float[Tensor, " contrast"]:
        """The weighted sums, nats."""
        logits = body.forward(self.ids, positions=self.positions, grad=grad).float()
        targets, weights = self.targets.to(logits.device), self.weights.to(logits.device)
        logp = logits.gather(-1, targets[..., None]).squeeze(-1) - logits.logsumexp(-1)
        return (logp * weights).sum(1)


def reliance(context: Context, contrasts: Sequence[Contrast]) -> Plan:
    """E of each contrast."""
    return ReliancePlan(contrast_plan(context, contrasts))


def accuracy(context: Context, contrasts: Sequence[Contrast]) -> Plan:
    """log P of the gold answer after the clean chain, summed over its tokens."""
    return _plan(context, [c.clean for c in contrasts], ("answer",), mean=False)


def chain(context: Context, contrasts: Sequence[Contrast]) -> Plan:
    """Mean log P of the tokens of the clean chain's steps, each given all before it."""
    return _plan(context, [c.clean for c in contrasts], ("step",), mean=True)


def text(context: Context, contrasts: Sequence[Contrast]) -> Plan:
    """Mean log P of the tokens of the clean chain's steps and of the gold answer."""
    return _plan(context, [c.clean for c in contrasts], ("step", "answer"), mean=True)


READOUTS: Mapping[str, Readout] = {"reliance": reliance, "accuracy": accuracy, "chain": chain, "text": text}


def readout_named(name: str) -> Readout:
    """A readout by its name.

    Raises:
        UserError: no such readout.
    """
    if name not in READOUTS:
        raise UserError(f"readout: {name!r} is not one of {', '.join(READOUTS)}.")
    return READOUTS[name]


def after_chains(chains: Mapping[str, Sequence[str]]) -> Readout:
    """`accuracy` after other chains, by the id of the trace; a contrast whose trace has none is an error."""

    def plan(context: Context, contrasts: Sequence[Contrast]) -> Plan:
        return _plan(context, [c.clean.with_steps(chains[c.clean.id]) for c in contrasts], ("answer",), mean=False)

    return plan


def _plan(context: Context, traces: Sequence[Trace], kinds: Sequence[str], *, mean: bool) -> LogProbPlan:
    """Rows that read the log-probabilities of every token of some kinds of parts, with the gold answer in place."""
    rows, reads = [], []
    for trace in traces:
        tokens = context.encode(replace(trace, answer=gold(trace)))
        at = [k for (kind, _), span in tokens.spans.items() if kind in kinds for k in range(span.start, span.stop)]
        at = sorted(k for k in at if k > 0)
        if not at:
            raise UserError(f"trace {trace.id!r}: no token of its {' or '.join(kinds)} can be read; check its format.")
        rows.append(tokens.ids[: at[-1]])  # the last target is not an input
        reads.append([(k - 1, tokens.ids[k]) for k in at])
    longest, widest = max(len(r) for r in rows), max(len(r) for r in reads)
    ids = torch.tensor([[*r, *[0] * (longest - len(r))] for r in rows])
    padded = [[*r, *[r[-1]] * (widest - len(r))] for r in reads]
    weights = torch.tensor([[1.0 / (len(r) if mean else 1)] * len(r) + [0.0] * (widest - len(r)) for r in reads])
    pairs = torch.tensor(padded)
    return LogProbPlan(ids, pairs[..., 0], pairs[..., 1], weights)
