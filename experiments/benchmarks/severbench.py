"""SeverBench: how often is the place where fine-tuning cut the path named rightly, on pairs whose truth is known?

1. *Pairs* (`reasoninterp.organisms.planted`): bases whose steps reach the answer by named heads and no other way; a
   benign drift of all weights; a cut at a known Unit or set by surgery, masked tuning or interchange training; decoys
   with a larger weight change; a random gauge change.  Controls: intact, benign, equal-norm, unrelated path cut, one
   of two redundant places cut, overridden, damaged.
2. *Methods*, at the pair's grain (the finest level at which its truth is known) and at every coarser level: the whole of
   `locate`; its ledger alone, with and without aligned gauges; its graft search alone; nine competitors, on the tuned
   weights as they are and, a gift, on those aligned by us.
3. *Scores* (`severbench_scores`): top-1, recall at |S|, Jaccard (restoring and cutting sets, each against the nearest of
   its family), AUROC and average precision over Units, layer error, AUROC of severed against controls, the verdict's
   word, calibration of the confidence, passes and seconds.  Intervals are clustered by base model; the correlation
   within a base is at least that of our methods' hits on the development bases.
4. *Split*: a third of the bases, by a hash of their seeds, is held out.  Nothing is tuned on it: the confidence is
   fitted on the rest (`--development --calibrate`), and every evaluation of the held-out third is written to a log.

    python experiments/benchmarks/severbench.py --out runs/severbench

Clean pairs (see `planted.pairs`) are the headline; unclean ones stand beside them.  The last line is JSON: `top1`,
`jaccard`, `auroc` on the held-out clean pairs at their grain, `pairs` how many those are (`pairs_all`: both splits,
unclean ones too), and `baselines` with the same three for each competitor.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from severbench_scores import by_level, describe, draw, failures, icc_floor, score_ranking, score_sets, table, words

from reasoninterp.keys import code_hash
from reasoninterp.models.context import Context, ContextSpec
from reasoninterp.models.units import Level, units
from reasoninterp.organisms.planted.bases import BaseSpec
from reasoninterp.organisms.planted.lineup import BASES, split_of
from reasoninterp.organisms.planted.store import Planted, PlantedBase, digest, planted
from reasoninterp.organisms.planted.truth import GRAINS
from reasoninterp.severance.gauge.aligned import aligned
from reasoninterp.severance.ledger.integrate import Integral, integrate
from reasoninterp.severance.ledger.study import Ledger
from reasoninterp.severance.location.confidence import CALIBRATION, FEATURES, confidence, fit
from reasoninterp.severance.location.ledger_entries import ledger_of
from reasoninterp.severance.location.locate import locate
from reasoninterp.severance.location.location import Location
from reasoninterp.severance.location.search import search_alone
from reasoninterp.severance.scoring import scores
from reasoninterp.severance.scoring.competitors import COMPETITORS, rank_levels

OURS = ("locate", "ledger alone", "ledger alone, not aligned", "graft search alone")
ALIGNED = " (aligned)"
QUICK_BASES, QUICK_CUTS = (202, 225), ("ov", "qk", "nothing")
TOLERANCE = 0.02
HERE = Path(__file__)
LOG = HERE.with_name("severbench_held_out.jsonl")
KIT = hashlib.sha256(  # what was evaluated: the kit's sources but its reports and organisms, and how it is scored
    b"".join([code_hash(Ledger).encode(), HERE.read_bytes(), HERE.with_name("severbench_scores.py").read_bytes()])
).hexdigest()[:12]


# ------------------------------------------------------------------ one base


class Evaluated(NamedTuple):
    """One pair while it is evaluated."""

    pair: Planted
    spec: BaseSpec
    context: Context
    rival_free: Context
    levels: tuple[Level, ...]
    number: int

    @property
    def contrasts(self) -> list[Any]:
        """The traces' contrasts."""
        return [i.contrast for i in self.context.items if i.contrast is not None]


def evaluate_base(spec: BaseSpec, quick: bool = False) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Rows `pair × level × method` and the features of each location, for one base.

    Args:
        spec: the base.
        quick: make and evaluate only a few of its pairs.
    """
    import torch

    torch.set_num_threads(1)
    found = planted(spec, brief=quick)
    context, rival_free = _contexts(found)
    rows, features = [], []
    for number, pair in enumerate(p for p in found.pairs if not quick or p.cut in QUICK_CUTS):
        grain: Level = pair.truth.grain if pair.truth else "block"
        about = {
            "base": pair.base,
            "split": split_of(spec),
            "pair": pair.name,
            "label": pair.label,
            "mechanism": pair.mechanism,
            "cut": pair.cut,
            "clean": pair.clean,
            "gauge": pair.gauge,
            "grain": grain,
            "n_layers": spec.layers,
        }
        levels = GRAINS[GRAINS.index(grain) :] if pair.truth and not quick else (grain,)
        one = Evaluated(pair, spec, context, rival_free, levels, number)
        for row, extra in _methods(one):
            row["at_grain"] = row["level"] == grain
            rows.append(about | row)
            if extra is not None:
                features.append(about | {"level": row["level"], "word": row["word"]} | extra)
    return pd.DataFrame(rows), pd.DataFrame(features)


def _contexts(found: PlantedBase) -> tuple[Context, Context]:
    """One body for the base and all its tuned minds, with the traces with and without the rival."""
    minds = {"base": str(found.path / "base")} | {p.name: str(p.path) for p in found.pairs}
    spec = ContextSpec(minds=minds, traces=str(found.traces), max_new_tokens=16)
    context = spec.load()
    other = ContextSpec(minds=minds, traces=str(found.rival_free), max_new_tokens=16)
    return context, other.load(minds=context.minds)


def _methods(one: Evaluated) -> Iterator[tuple[dict[str, Any], dict[str, Any] | None]]:
    """One row a method and level."""
    pair, context = one.pair, one.context
    for level in one.levels:
        began = time.process_time()
        found = locate(context, to_mind=pair.name, rival_free=one.rival_free.items, level=level, tolerance=TOLERANCE)
        seconds = time.process_time() - began
        yield from _ours(one, found, level, seconds)
    ours = aligned(context, "base", pair.name).mind
    if pair.truth is not None:
        raw = integrate(context, one.contrasts, from_mind="base", to_mind=pair.name, tolerance=TOLERANCE)
        for level in one.levels:
            cost = {"forward": raw.passes, "backward": raw.passes}
            yield _row(one, "ledger alone, not aligned", level, _ledger(one, raw, level), **cost), None
            began = time.process_time()
            alone = search_alone(context, one.contrasts, from_mind="base", to_mind=ours, level=level)
            ranking = dict(zip(alone.ranking["unit"], alone.ranking["rank"], strict=True))
            cost = {"forward": alone.evaluations, "backward": 0, "seconds": time.process_time() - began}
            row = _row(one, "graft search alone", level, ranking, **cost)
            yield row | score_sets(alone.sets.get("restore"), alone.sets.get("cut"), one.pair.truth.at(level)), None
    for mind, tail in ((pair.name, ""), (ours, ALIGNED)):
        for name in COMPETITORS:
            began = time.process_time()
            seen = rank_levels(name, context, one.contrasts, one.levels, to_mind=mind, seed=one.number)
            spent = time.process_time() - began
            for level, ranked in seen.items():
                cost = {"forward": ranked.forward_passes, "backward": ranked.backward_passes, "seconds": spent}
                yield _row(one, name + tail, level, ranked.scores, severity=ranked.severity, **cost), None
    if ours != pair.name:
        context.minds.discard(ours)


def _ours(
    one: Evaluated, found: Location, level: Level, seconds: float
) -> Iterator[tuple[dict[str, Any], dict[str, Any] | None]]:
    """The rows of `locate` and of its ledger; what its confidence rests on, where it located something."""
    ranking, ledger = (
        ({}, {})
        if not len(found.ranking)
        else (dict(zip(found.units, scored.tolist(), strict=True)) for scored in (found.rank_both, found.rank_ledger))
    )
    costs = {"forward": found.costs.forward_passes, "backward": found.costs.backward_passes, "seconds": seconds}
    row = _row(one, "locate", level, ranking, severity=found.severance_score, **costs) | {"word": found.verdict}
    if one.pair.truth is not None:
        row |= score_sets(found.restoring, found.cutting, one.pair.truth.at(level))
    said = found.located and found.verdict != "overridden"  # a set that is said to be where the path was cut
    right = float(row.get("jaccard", 0.0) == 1.0)
    yield row, {"right": right, **found.confidence.features} if said else None
    passes = found.costs.backward_passes
    yield _row(one, "ledger alone", level, ledger, forward=passes, backward=passes), None


def _ledger(one: Evaluated, integral: Integral, level: Level) -> dict[str, float]:
    with one.context.open("base") as body:
        found = units(body, level)
    return (-ledger_of(integral, found, level)["value"]).to_dict()


def _row(
    one: Evaluated, method: str, level: Level, ranking: Mapping[str, float], *, severity: float = np.nan, **costs: float
) -> dict[str, Any]:
    row = {"method": method, "level": level, "severity": severity, **costs}
    truth = one.pair.truth.at(level) if one.pair.truth else None
    return row | (score_ranking(ranking, truth, one.spec.layers) if truth else {})


# ------------------------------------------------------------------ the whole


def run(out: Path, bases: Sequence[BaseSpec], *, workers: int = 2, quick: bool = False) -> tuple[Any, Any]:
    """Evaluate bases, each kept under `out` when it is done; returns all rows and all features."""
    out.mkdir(parents=True, exist_ok=True)
    kept = {b: out / f"{b.name}-{digest(b, quick)[:8]}-{KIT}" for b in bases}
    todo = [b for b, path in kept.items() if not path.with_suffix(".features.parquet").exists()]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        jobs = {b: pool.submit(evaluate_base, b, quick) for b in sorted(todo, key=lambda b: -b.layers)}
        for b, job in jobs.items():
            rows, features = job.result()
            rows.to_parquet(kept[b].with_suffix(".parquet"))
            features.to_parquet(kept[b].with_suffix(".features.parquet"))
            print(f"{b.name}: {rows['pair'].nunique()} pairs", flush=True)
    read = [[pd.read_parquet(p.with_suffix(end)) for p in kept.values()] for end in (".parquet", ".features.parquet")]
    return pd.concat(read[0]), pd.concat(read[1])


def main() -> None:
    """Make the pairs, evaluate, print the tables, and write a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/severbench"))
    parser.add_argument("--quick", action="store_true", help="two small development bases, few of their pairs")
    parser.add_argument("--development", action="store_true", help="leave the held-out bases unseen")
    parser.add_argument("--calibrate", action="store_true", help="fit the confidence on the development bases")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    bases = [b for b in BASES if split_of(b) == "development"] if args.development or args.quick else list(BASES)
    if args.quick:
        bases = [b for b in bases if b.seed in QUICK_BASES]
    out = args.out / ("quick" if args.quick else "development" if args.development else "full")
    rows, features = run(args.out / "pairs", bases, workers=args.workers, quick=args.quick)
    if args.calibrate and not args.quick:
        known = features[features["split"] == "development"]
        basis = (
            f"SeverBench: {len(known)} locations ({int(known['right'].sum())} right) of {known['pair'].nunique()} "
            f"development pairs of {known['base'].nunique()} bases"
        )
        CALIBRATION.write_text(json.dumps(fit(known[list(FEATURES)], known["right"], basis=basis), indent=1) + "\n")
    out.mkdir(parents=True, exist_ok=True)
    result = tell(rows, features, out)
    if (rows["split"] == "held-out").any():
        with LOG.open("a") as log:
            log.write(json.dumps({"date": datetime.now(UTC).strftime("%Y-%m-%d"), "kit": KIT, **result}) + "\n")
    print(json.dumps(result))


def tell(rows: pd.DataFrame, features: pd.DataFrame, out: Path, *, seed: int = 0) -> dict[str, Any]:
    """Print and write the tables; gives the figures of the held-out clean pairs (development ones, without those)."""
    icc = icc_floor(rows[(rows["split"] == "development") & rows["at_grain"]], OURS)
    tables: dict[str, pd.DataFrame] = {}
    for split in ("held-out", "development"):
        for name, part in (("clean", rows[rows["clean"]]), ("all", rows)):
            chosen = part[part["split"] == split]
            if not (chosen["label"] == "severed").any():
                continue
            title = f"{split}, {name}"
            tables[title] = table(chosen[chosen["at_grain"]], icc=icc, seed=seed)
            about = f"\n{title}: {chosen['pair'].nunique()} pairs, {chosen['base'].nunique()} bases, at their grain"
            print(describe(tables[title], about))
            levels, said = by_level(chosen), words(chosen)
            print(levels[levels["method"] == "locate"].round(3).to_string(index=False))
            print(said.to_string(index=False))
            for what, made in (("", tables[title]), ("-by-level", levels), ("-words", said)):
                made.to_csv(out / f"{split}-{name}{what}.csv", index=False)
    print(failures(rows))
    title, found = next(iter(tables.items()))
    draw(found, f"SeverBench, {title}", OURS).savefig(out / "severbench.png", dpi=144, bbox_inches="tight")
    split = title.split(",")[0]
    clean = rows[(rows["split"] == split) & rows["clean"]]
    return _summary(found, title, icc) | {
        "pairs": int(clean["pair"].nunique()),
        "severed": int(clean.loc[clean["label"] == "severed", "pair"].nunique()),
        "bases": int(clean["base"].nunique()),
        "pairs_all": int(rows["pair"].nunique()),
        "words_right": _share_right(words(clean)),
        "seed": seed,
        **stated(features[(features["split"] == split) & features["clean"]]),
        "by_level": _levels(by_level(clean)),
        "baselines": _baselines(found),
    }


def _summary(found: pd.DataFrame, title: str, icc: float) -> dict[str, Any]:
    ours = found.set_index("method").loc["locate"]
    names = ("top1", "top1_ci_low", "top1_worst", "jaccard", "jaccard_ci_low", "auroc", "auroc_ci_low")
    return {"of": title, **{name: round(float(ours[name]), 4) for name in names}, "icc": round(icc, 3)}


def _share_right(said: pd.DataFrame) -> float:
    return round(float((said["pairs"] * said["right"]).sum() / said["pairs"].sum()), 4)


def _levels(found: pd.DataFrame) -> dict[str, dict[str, float]]:
    ours = found[found["method"] == "locate"].set_index("level")
    return {level: {n: round(float(row[n]), 4) for n in ("top1", "jaccard", "pairs")} for level, row in ours.iterrows()}


def _baselines(found: pd.DataFrame) -> dict[str, dict[str, float]]:
    by_name = found.set_index("method")
    return {
        m: {name: round(float(by_name.loc[m, name]), 4) for name in ("top1", "jaccard", "auroc")}
        for m in found["method"]
        if m not in OURS
    }


def stated(features: pd.DataFrame) -> dict[str, Any]:
    """How far the confidences can be taken at their word, over every location that says where a path was cut."""
    if not CALIBRATION.exists() or not len(features):
        return {}
    said = [confidence(row[list(FEATURES)].to_dict()).value for _, row in features.iterrows()]
    found = scores.calibration(said, features["right"])
    return {
        "locations": len(features),
        "confidence": round(float(np.mean(said)), 4),
        "right": round(float(features["right"].mean()), 4),
        "ece": round(found.ece, 4),
        "brier": round(found.brier, 4),
        "brier_base_rate": round(found.brier_base_rate, 4),
    }


if __name__ == "__main__":
    main()
