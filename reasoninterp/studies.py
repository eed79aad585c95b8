"""The studies that come with the kit, by name, and how to find a user's own."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from reasoninterp.errors import UserError
from reasoninterp.study import REGISTRY, Study, studies_in

# Where each study lives; imported on first use, so that listing commands stays fast.
HOMES = {
    "samples": "reasoninterp.faithfulness.samples",
    "cross": "reasoninterp.faithfulness.samples",
    "regenerated": "reasoninterp.faithfulness.samples",
    "readings": "reasoninterp.faithfulness.readings",
    "behaviour": "reasoninterp.faithfulness.behaviour",
    "effect": "reasoninterp.faithfulness.effect",
    "sweep": "reasoninterp.patching.study",
    "residual": "reasoninterp.patching.residual",
    "heads": "reasoninterp.patching.heads",
    "attribution": "reasoninterp.patching.attribution_map",
    "knockout": "reasoninterp.patching.readers",
    "step-matrix": "reasoninterp.patching.step_matrix",
    "routes": "reasoninterp.patching.routes",
    "attention-map": "reasoninterp.attention.study",
    "who-reads": "reasoninterp.patching.who_reads",
    "receiver-heads": "reasoninterp.attention.receiver_study",
    "ledger": "reasoninterp.severance.ledger.study",
    "ledger-balance": "reasoninterp.severance.ledger.balance",
    "ledger-steps": "reasoninterp.severance.ledger.steps",
    "ledger-paths": "reasoninterp.severance.ledger.straight",
    "ledger-tokens": "reasoninterp.severance.ledger.tokens",
    "grafts": "reasoninterp.severance.grafts.study",
    "graft-sets": "reasoninterp.severance.grafts.study",
    "smallest-sets": "reasoninterp.severance.grafts.smallest_study",
    "cross-patch": "reasoninterp.severance.grafts.crossing",
    "repair": "reasoninterp.severance.grafts.repair_study",
    "memorization": "reasoninterp.memorization.study",
}


def study_named(which: str) -> type[Study]:
    """A study by its name, or by the path of a Python file that holds one (`FILE.py` or `FILE.py:name`).

    Raises:
        UserError: no such study or file, or a file with several studies and no name.
    """
    path, _, wanted = which.partition(".py:")
    if which.endswith(".py") or wanted:
        file = Path(path + ".py") if wanted else Path(which)
        if not file.is_file():
            raise UserError(f"{file}: no such file; give the path of a Python file that defines a Study.")
        found = {cls.name: cls for cls in studies_in(file)}
        for name in found:
            if name in HOMES and Path(import_module(HOMES[name]).__file__ or "").resolve() != file.resolve():
                raise UserError(f"{file}: a study named {name!r} comes with the kit; give yours another name.")
        if wanted:
            if wanted not in found:
                raise UserError(f"{file}: no study named {wanted!r}; it has {', '.join(found) or 'none'}.")
            return found[wanted]
        if len(found) != 1:
            raise UserError(
                f"{file}: it holds {len(found)} studies ({', '.join(found) or 'none'}); name one as {file}:NAME."
            )
        return next(iter(found.values()))
    if which in HOMES:
        import_module(HOMES[which])
    if which not in REGISTRY:
        raise UserError(f"{which}: no such study; there are {', '.join(HOMES)}, or give the path of a Python file.")
    return REGISTRY[which]


def built_in() -> dict[str, str]:
    """The studies that come with the kit with their one line each."""
    return {name: study_named(name).describe() for name in HOMES}
