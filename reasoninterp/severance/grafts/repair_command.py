"""`reasoninterp repair`: find or take Units, give them back, say what comes of it, and save the repaired mind.

1. The output directory is made first: one that cannot be had is told before anything is searched or measured.
2. The tuned mind is aligned with the base's gauge (`severance.gauge.aligned`) and repaired there
   (`severance.grafts.repair`).
3. What returns is said of E and of the follow rate between the two answers, since a repair is searched by E alone and a
   path is back only where both are; beside it the whole model at this alpha, and random sets of as many Units and of as
   large a weight change.
4. Reliance and accuracy are measured in the base, the tuned and the repaired mind, on the given traces alone.

Lines are given as soon as they are known, so that none is lost where a later step fails.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from reasoninterp.errors import UserError
from reasoninterp.models.context import Context, ContextSpec
from reasoninterp.models.minds import Handle, mind
from reasoninterp.models.saving import check_free, save_mind
from reasoninterp.models.units import LEVELS, Unit, unit_named, units
from reasoninterp.severance.effects import is_safe
from reasoninterp.severance.gauge.align import Alignment
from reasoninterp.severance.gauge.aligned import aligned
from reasoninterp.severance.grafts.controls import share_over_draws
from reasoninterp.severance.grafts.moves import Read, Reader, unit_norms
from reasoninterp.severance.grafts.repair import (
    ENOUGH,
    MEASURES,
    SERIES,
    SET,
    Candidate,
    candidates,
    estimate_of,
    repaired,
    scores,
    smallest_restoring,
    units_of,
)
from reasoninterp.stats import CONFIDENCE, N_RESAMPLES, Estimate, derive_seed, paired

DRAWS = 3
MOST_NOTES = 3
RETURNED = {"effect": "E", "follow": "the follow rate between the two answers"}


class _Pair(NamedTuple):
    """The two minds by name, and the alignment of the second with the first."""

    base: str
    tuned: str
    alignment: Alignment


def repair_command(
    spec: ContextSpec,
    names: Sequence[str],
    alpha: float,
    out: str | Path,
    *,
    level: str = "block",
    align: bool = True,
    from_mind: str = "base",
    to_mind: str = "tuned",
) -> Iterator[str]:
    """Repair, measure and save.

    Args:
        spec: minds and traces.
        names: of Units of any level; none: the smallest restoring set of `level` is searched.
        alpha: share of tuning's change that is kept on them.
        out: a directory that is not there yet, or is empty.
        level: where the smallest set is searched, and from which random Units are drawn.
        align: bring the tuned mind into the base's gauge first; what is saved is function-equal elsewhere.
        from_mind: the mind with the path.
        to_mind: the mind that is repaired.

    Yields:
        Lines to print: what was given back, what returns, what the minds then do, where the repaired one lies.

    Raises:
        UserError: a directory that cannot be had, minds of the same weights, no such Unit, or no set to be found.
    """
    with _reserved(out):
        context = spec.load()
        units_of(context, level)  # an unknown level is told whether or not Units are named
        chosen = [unit_named(context.minds.body, name) for name in dict.fromkeys(names)]
        pair = _Pair(from_mind, to_mind, aligned(context, from_mind, to_mind, align=align))
        if not any(True for _ in context.minds.delta(from_mind, to_mind)):
            raise UserError(f"{to_mind}: it has the weights of {from_mind}, so there is nothing to repair.")
        yield from _notes(pair)
        if not chosen:
            found = smallest_restoring(context, level, from_mind=from_mind, to_mind=to_mind, align=align)
            chosen = units_of(context, level, found.units)[1]
        handle = repaired(chosen, alpha, from_mind=from_mind, to_mind=pair.alignment.mind)
        yield (
            f"{', '.join(u.name for u in chosen)}: {from_mind} weights given back, {100 * alpha:.0f} % of tuning's change "
            "kept there.  Intervals are 95 % over traces."
        )
        yield from _returned(context, pair, chosen, alpha, level)
        yield from _measured(context, pair, handle)
        yield "Read on these traces alone: `reasoninterp run repair --others` reads others, beside controls at each alpha."
        save_mind(context.minds, handle, out, like=to_mind)
    yield f"Saved as {out}, an ordinary Hugging Face directory."


@contextlib.contextmanager
def _reserved(out: str | Path) -> Iterator[None]:
    """Make the directory, and see that one can be written beside it; what was made is taken away where all fails."""
    path = check_free(out)
    made = [p for p in (path, *path.parents) if not p.exists()]
    try:
        try:
            path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent):  # where `save_mind` writes before it renames
                pass
        except OSError as error:
            raise UserError(f"--out {path}: cannot write here ({error.strerror}); give another directory.") from None
        yield
    except BaseException:
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def _notes(pair: _Pair) -> Iterator[str]:
    """What the alignment did; of many notes the first few and the last, which has the distance."""
    notes = list(pair.alignment.notes)
    if len(notes) > MOST_NOTES + 1:
        notes = [*notes[:MOST_NOTES], f"({len(notes) - MOST_NOTES - 1} more notes of this kind)", notes[-1]]
    yield from (f"Gauge of {pair.tuned}: {note}" for note in notes)


# ------------------------------------------------------------------------------------------------------ what it returns


def _returned(context: Context, pair: _Pair, chosen: Sequence[Unit], alpha: float, level: str) -> Iterator[str]:
    """Shares of the loss of E and of the follow rate that the repair and its controls return."""
    contrasts = [i.contrast for i in context.items if i.contrast is not None]
    if not contrasts:
        yield "No contrast can be made from these traces, so what returns of E is not known."
        return
    read = Reader(context, contrasts)
    base, tuned = read(mind(pair.base)), read(mind(pair.tuned))
    if tuned.effect.mean() >= base.effect.mean():
        yield (
            f"Warning: E of {pair.tuned} ({tuned.effect.mean():.2f} nats) is not below that of {pair.base} "
            f"({base.effect.mean():.2f}), n = {len(contrasts)}: no reliance was lost that could return."
        )
        return
    safe = {of: is_safe(getattr(base, of), getattr(tuned, of), seed=context.seed) for of in RETURNED}
    for of in (of for of in RETURNED if not safe[of]):
        yield f"The loss of {RETURNED[of]} is not safely away from zero (n = {len(contrasts)}): no share of it is given."
    repairs = _candidates(context, pair, chosen, alpha, level)
    reads = {series: [read(c.handle) for c in repairs if c.series == series] for series in SERIES}
    for series, found in reads.items():
        if not found:
            continue
        shares = {of: _share(found, base, tuned, of, context.seed) for of in RETURNED if safe[of]}
        name = "Returned" if series == SET else f"  {series}"
        several = f" ({len(found)} sets)" if series.startswith("random") else ""
        said = ", ".join(f"{_percent(s)} of {RETURNED[of]}" for of, s in shares.items())
        short = [RETURNED[of] for of, s in shares.items() if s.value < ENOUGH]
        less = f"; less than {100 * ENOUGH:.0f} % of {' and of '.join(short)}" if series == SET and short else ""
        if said:
            yield f"{name}{several}: {said} (n = {len(contrasts)}){less}."


def _share(found: Sequence[Read], base: Read, tuned: Read, of: str, seed: int) -> Estimate:
    """Share of a loss that minds return, meaned over them; of the follow rate with draws of Jeffreys' posterior."""
    values, lost = [getattr(r, of) for r in found], getattr(base, of) - getattr(tuned, of)
    gained = np.stack([v - getattr(tuned, of) for v in values])
    if of == "effect":
        return share_over_draws(gained, lost, seed=seed)
    # The bootstrap of a rate at 0 or 1 is a point.
    rng = np.random.default_rng(derive_seed(seed, "repair", "follow"))
    start, stop, *now = (
        rng.beta(v.sum() + 0.5, len(v) - v.sum() + 0.5, size=N_RESAMPLES) for v in (tuned.follow, base.follow, *values)
    )
    value = float(gained.mean() / lost.mean())
    low, high = np.quantile(
        (np.mean(now, axis=0) - start) / (stop - start), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]
    )
    return Estimate(value, float(min(low, value)), float(max(high, value)), len(lost), "jeffreys")


def _candidates(context: Context, pair: _Pair, chosen: Sequence[Unit], alpha: float, level: str) -> list[Candidate]:
    """The repair and its controls; only the repair itself where the Units are of no one level, or nothing is moved."""
    names, onto = {u.name for u in chosen}, pair.alignment.mind
    of_level = (units(context.minds.body, one) for one in dict.fromkeys((level, *LEVELS)))  # type: ignore[arg-type]
    every = next((e for e in of_level if names <= {u.name for u in e}), None)
    norms, _ = unit_norms(context, chosen, pair.base, onto)
    if every is None or alpha == 1 or not any(norms.values()):
        handle = repaired(chosen, alpha, from_mind=pair.base, to_mind=onto)
        return [Candidate(SET, 0, alpha, tuple(u.name for u in chosen), float("nan"), handle)]
    return candidates(context, chosen, every, (pair.base, pair.tuned), onto=onto, alphas=[alpha], draws=DRAWS)


def _measured(context: Context, pair: _Pair, handle: Handle) -> Iterator[str]:
    """Every measure in the three minds, each with its n, and what the repair changed."""
    found = {}
    for label, one in ((pair.base, mind(pair.base)), (pair.tuned, mind(pair.tuned)), ("repaired", handle)):
        with context.open(one):
            found[label] = pd.DataFrame(list(scores(context, context.items)))
    for measure in MEASURES:
        n = int(found["repaired"][measure].notna().sum())
        if not n:
            yield f"{measure}: no trace has what it is read from"
            continue
        each = ", ".join(f"{label} {_text(estimate_of(t[measure], context.seed))}" for label, t in found.items())
        change = paired(found["repaired"][measure], found[pair.tuned][measure], seed=context.seed)
        yield f"{measure}: {each}; repaired - {pair.tuned} {_text(change)}; n = {n}"


def _text(e: Estimate) -> str:
    return f"{e.value:.2f} [{e.ci_low:.2f}, {e.ci_high:.2f}]"


def _percent(e: Estimate) -> str:
    return f"{100 * e.value:.0f} % [{100 * e.ci_low:.0f}, {100 * e.ci_high:.0f}]"
