"""Does the main job say of every organism what is known of it?

Compares each tuned organism with its base on the traces that show it, and prints, per pair: the verdict, accuracy and
follow rate of both minds, E, the ledger's leading Unit and the residual.  Each pair has a run of its own under `--out`;
the last page written, `report.html` of the first pair, shows the others beside it.

    python experiments/compare_organisms.py --out runs/organism-pairs --seed 0
"""

from __future__ import annotations

import argparse
from pathlib import Path

from reasoninterp.compare import compare, summary
from reasoninterp.demo import pairs_of, spec_for
from reasoninterp.organisms import RECIPES, make
from reasoninterp.runs import Run


def run(
    out: Path, *, seed: int = 0, only: list[str] | None = None, limit: int | None = None, quiet: bool = False
) -> list[Run]:
    """Make the organisms that are asked for and compare each with its base.

    Args:
        out: one directory a pair is made in it, and `organisms` beside them.
        seed: of training, sampling and resampling.
        only: names of tuned organisms; all of them by default.
        limit: read only the first traces.
        quiet: no progress bars.
    """
    pairs = [p for p in pairs_of(RECIPES) if only is None or p.tuned in only]
    make(out / "organisms", seed=seed, only=[p.tuned for p in pairs], progress=not quiet)
    runs: list[Run] = []
    for pair in reversed(pairs):  # the first pair comes last, so that its page can show the others
        spec = spec_for(out / "organisms", pair, seed=seed, limit=limit)
        runs.append(
            compare(spec, out / pair.tuned, quiet=quiet, siblings=list(reversed(runs)) if pair is pairs[0] else ())
        )
    return list(reversed(runs))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/organism-pairs"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", help="names of tuned organisms")
    parser.add_argument("--limit", type=int, help="only the first traces")
    parser.add_argument("--quiet", action="store_true")
    given = parser.parse_args()
    found = run(given.out, seed=given.seed, only=given.only, limit=given.limit, quiet=given.quiet)
    for one in found:
        print("\n".join(summary([one], one.path / "report.html")))
