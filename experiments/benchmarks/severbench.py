"""SeverBench: how often is the place where fine-tuning cut the path named rightly, on pairs whose truth is known?

1. *Pairs* (`reasoninterp.organisms.planted`): bases whose steps reach the answer by named heads and no other way; a
   benign drift of all weights; a cut at a known Unit or set by surgery, masked tuning or interchange training; decoys
   with a larger weight change; a random gauge change.  Controls: intact, benign, equal-norm, unrelated path cut, one
   of two redundant places cut, overridden, damaged.
2. *Methods*, at each pair's grain (the finest level at which its truth is known): the whole of `locate`; its ledger
   alone; single grafts alone; nine competitors.  A method that only ranks is told the size of the true set for its
   overlap; `locate` is not.
3. *Scores*: top-1, recall at |S|, Jaccard (restoring and cutting sets, each against the nearest of its family), AUROC
   and average precision over Units, layer error, AUROC of severed against controls, calibration of the confidence,
   passes and seconds.  Intervals are clustered by base model.
4. *Split*: a third of the bases, by a hash of their seeds, is held out.  Nothing is tuned on it: the confidence is
   fitted on the rest (`--development --calibrate`), and every evaluation of the held-out third is written to a log.

    python experiments/benchmarks/severbench.py --out runs/severbench

Clean pairs (see `planted.pairs`) are the headline; unclean ones stand beside them.  The last line is JSON: `top1`,
`jaccard`, `auroc` on the held-out clean pairs, `pairs`, and `baselines` with the same three for each competitor.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from reasoninterp.keys import code_hash
from reasoninterp.models.context import Context, ContextSpec
from reasoninterp.organisms.planted.bases import BaseSpec
from reasoninterp.organisms.planted.lineup import BASES, split_of
from reasoninterp.organisms.planted.store import Planted, PlantedBase, planted
from reasoninterp.organisms.planted.truth import Truth
from reasoninterp.severance.ledger.study import Ledger
from reasoninterp.severance.location.confidence import CALIBRATION, FEATURES, confidence, fit
from reasoninterp.severance.location.locate import locate
from reasoninterp.severance.location.location import Location
from reasoninterp.severance.scoring import scores
from reasoninterp.severance.scoring.competitors import COMPETITORS, rank_levels
from reasoninterp.severance.scoring.intervals import clustered, clustered_share, intraclass

OURS = ("locate", "ledger alone", "grafts alone")
SHOWN = ("top1", "recall", "jaccard", "unit_auroc", "average_precision", "layer_error")
KIT = code_hash(Ledger)[:12]  # what was evaluated: all of the kit's sources but its reports and organisms
LOG = Path(__file__).with_name("severbench_held_out.jsonl")


# ------------------------------------------------------------------ one base


def evaluate_base(spec: BaseSpec, quick: bool = False) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Rows `pair × method` and the features of each location, for one base.

    Args:
        spec: the base.
        quick: make and evaluate only a few of its pairs.
    """
    import torch

    torch.set_num_threads(1)
    found = planted(spec, brief=quick)
    pairs = found.pairs
    context, rival_free = _contexts(found, pairs)
    rows, features = [], []
    for number, pair in enumerate(pairs):
        about = {
            "base": pair.base,
            "split": split_of(spec),
            "pair": pair.name,
            "label": pair.label,
            "mechanism": pair.mechanism,
            "cut": pair.cut,
            "clean": pair.clean,
            "gauge": pair.gauge,
            "grain": pair.truth.grain if pair.truth else "block",
            "n_layers": spec.layers,
        }
        for row, extra in _methods(context, rival_free, pair, spec, number):
            rows.append(about | row)
            if extra is not None:
                features.append(about | extra)
    return pd.DataFrame(rows), pd.DataFrame(features)


def _contexts(found: PlantedBase, pairs: Sequence[Planted]) -> tuple[Context, Context]:
    """One body for the base and all its tuned minds, with the traces with and without the rival."""
    minds = {"base": str(found.path / "base")} | {p.name: str(p.path) for p in pairs}
    spec = ContextSpec(minds=minds, traces=str(found.traces), max_new_tokens=16)
    context = spec.load()
    other = ContextSpec(minds=minds, traces=str(found.rival_free), max_new_tokens=16)
    return context, other.load(minds=context.minds)


def _methods(
    context: Context, rival_free: Context, pair: Planted, spec: BaseSpec, number: int
) -> Iterator[tuple[dict[str, Any], dict[str, Any] | None]]:
    """One row a method."""
    level: Any = pair.truth.grain if pair.truth else "block"
    began = time.process_time()
    found = locate(context, to_mind=pair.name, rival_free=rival_free.items, level=level, tolerance=0.02)
    seconds = time.process_time() - began
    row = _score_location(found, pair, spec)
    costs = {"forward": found.costs.forward_passes, "backward": found.costs.backward_passes, "seconds": seconds}
    right = row.get("jaccard", np.nan) == 1.0
    yield (
        {"method": "locate", "severity": np.nan_to_num(found.severance_score), "word": found.verdict, **row, **costs},
        {"right": float(right), **found.confidence.features} if found.located else None,
    )
    for name, array in (("ledger alone", "rank_ledger"), ("grafts alone", "rank_grafts")):
        ranking = {} if not len(found.ranking) else dict(zip(found.units, getattr(found, array).tolist(), strict=True))
        yield {"method": name, "severity": np.nan, **_score_ranking(ranking, pair.truth, spec)}, None
    if found.aligned and found.aligned != pair.name:
        context.memo.pop(("alignment", "base", pair.name), None)
        context.minds.discard(found.aligned)
    contrasts = [i.contrast for i in context.items if i.contrast is not None]
    for name in COMPETITORS:
        began = time.process_time()
        seen = rank_levels(name, context, contrasts, [level], to_mind=pair.name, seed=number)[level]
        spent = time.process_time() - began
        costs = {"forward": seen.forward_passes, "backward": seen.backward_passes, "seconds": spent}
        scored = _score_ranking(seen.scores, pair.truth, spec)
        yield {"method": name, "severity": seen.severity, **scored, **costs}, None


def _score_location(found: Location, pair: Planted, spec: BaseSpec) -> dict[str, Any]:
    """Scores of a whole location: its ranking, and its own sets against the families."""
    if pair.truth is None:
        return {}
    ranking = dict(zip(found.units, found.rank_both.tolist(), strict=True))
    row = _score_ranking(ranking, pair.truth, spec)
    overlaps = [
        scores.jaccard(located.units, family) if located is not None and located.reached else 0.0
        for located, family in ((found.restoring, pair.truth.restoring), (found.cutting, pair.truth.cutting))
    ]
    return row | {"jaccard": float(np.mean(overlaps)), "jaccard_restoring": overlaps[0], "jaccard_cutting": overlaps[1]}


def _score_ranking(ranking: dict[str, float], truth: Truth | None, spec: BaseSpec) -> dict[str, Any]:
    """Scores of a ranking; one that named nothing is wrong, not missing."""
    if truth is None:
        return {}
    if not ranking:
        worst = {"top1": 0.0, "recall": 0.0, "jaccard": 0.0, "unit_auroc": 0.5, "average_precision": 0.0}
        return worst | {"layer_error": float(spec.layers)}
    families = (truth.restoring, truth.cutting)
    lead = scores.leaders(ranking)
    told = [_overlap(ranking, family) for family in families]
    return {
        "top1": scores.top1(ranking, truth.restoring + truth.cutting),
        "recall": float(np.mean([scores.recall_at(ranking, family) for family in families])),
        "jaccard": float(np.mean(told)),
        "unit_auroc": scores.nearest(scores.auroc, ranking, truth.restoring),
        "average_precision": scores.nearest(scores.average_precision, ranking, truth.restoring),
        "layer_error": scores.layer_error(lead, truth.restoring, spec.layers) if lead else float(spec.layers),
    }


def _overlap(ranking: dict[str, float], family: Any) -> float:
    """Best Jaccard of the first |S| Units, for a method that is told |S|."""
    order = sorted(ranking, key=lambda n: -np.nan_to_num(ranking[n], nan=-np.inf))
    return max(scores.jaccard(order[: len(s)], [s]) for s in family)


# ------------------------------------------------------------------ the table


def table(rows: pd.DataFrame, *, seed: int = 0, icc: float = 0.0) -> pd.DataFrame:
    """One row a method: scores over severed pairs and the AUROC of severed against controls, clustered by base."""
    out = []
    for method in (*OURS, *COMPETITORS):
        part = rows[rows["method"] == method]
        cut = part[part["label"] == "severed"]
        row: dict[str, Any] = {"method": method, "pairs": len(cut), "controls": len(part) - len(cut)}
        for name in SHOWN:
            if name == "top1":
                e = clustered_share(cut[name], list(cut["base"]), icc_floor=icc, seed=seed).estimate
            else:
                e = clustered(cut[name].to_numpy(float), list(cut["base"]), seed=seed)
            row |= {name: e.value, f"{name}_ci_low": e.ci_low, f"{name}_ci_high": e.ci_high}
        if part["severity"].notna().any():
            both = np.column_stack([part["severity"].fillna(0.0), part["label"] == "severed"]).astype(float)
            a = clustered(both, list(part["base"]), _auroc, seed=seed)
            row |= {"auroc": a.value, "auroc_ci_low": a.ci_low, "auroc_ci_high": a.ci_high}
        for name in ("forward", "backward", "seconds"):
            row[name] = part[name].mean() if name in part else np.nan
        out.append(row)
    return pd.DataFrame(out)


def _auroc(both: Any) -> float:
    return scores.severed_auroc(both[:, 0], both[:, 1])


def describe(found: pd.DataFrame, title: str) -> str:
    """The table as text."""
    lines = [
        title,
        f"{'method':<24}{'top-1':>22}{'Jaccard':>20}{'Unit AUROC':>11}{'AP':>6}{'severed AUROC':>22}{'s':>7}",
    ]
    for r in found.to_dict("records"):
        top1, jaccard, auroc = (_interval(r, name) for name in ("top1", "jaccard", "auroc"))
        lines.append(
            f"{r['method']:<24}{top1:>22}{jaccard:>20}{r['unit_auroc']:>11.2f}{r['average_precision']:>6.2f}"
            f"{auroc:>22}{r['seconds']:>7.2f}"
        )
    return "\n".join(lines)


def _interval(row: dict[str, Any], name: str) -> str:
    value = row.get(name, np.nan)
    return "—" if pd.isna(value) else f"{value:.2f} [{row[f'{name}_ci_low']:.2f}, {row[f'{name}_ci_high']:.2f}]"


def failures(rows: pd.DataFrame) -> str:
    """Severed pairs in which `locate` is not wholly right, and controls that it calls severed, by what they are."""
    ours = rows[rows["method"] == "locate"]
    missed = ours[(ours["label"] == "severed") & ((ours["top1"] < 1) | (ours["jaccard"] < 1))]
    alarms = ours[(ours["label"] != "severed") & ours["word"].isin(["severed"])]
    lines = [f"{len(missed)} severed pairs are not located exactly; {len(alarms)} controls are called severed."]
    for r in pd.concat([missed, alarms]).to_dict("records"):
        lines.append(
            f"  {r['pair']:<52} gauge {r['gauge']:.1f} clean {r['clean']!s:<5} {r['word']:<12} "
            f"top-1 {r['top1']:.2f} Jaccard {r['jaccard']:.2f}"
        )
    return "\n".join(lines)


# ------------------------------------------------------------------ the whole


def run(out: Path, bases: Sequence[BaseSpec], *, workers: int = 2, quick: bool = False) -> tuple[Any, Any]:
    """Evaluate bases, each kept under `out` when it is done; returns all rows and all features."""
    out.mkdir(parents=True, exist_ok=True)
    todo = [b for b in bases if not (out / f"{b.name}-{KIT}.features.parquet").exists()]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        jobs = {b: pool.submit(evaluate_base, b, quick) for b in sorted(todo, key=lambda b: -b.layers)}
        for b, job in jobs.items():
            rows, features = job.result()
            rows.to_parquet(out / f"{b.name}-{KIT}.parquet")
            features.to_parquet(out / f"{b.name}-{KIT}.features.parquet")
            print(f"{b.name}: {rows['pair'].nunique()} pairs", flush=True)
    read = [(out / f"{b.name}-{KIT}.parquet", out / f"{b.name}-{KIT}.features.parquet") for b in bases]
    return pd.concat([pd.read_parquet(a) for a, _ in read]), pd.concat([pd.read_parquet(b) for _, b in read])


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
        bases = [b for b in bases if b.layers == 2][:2]
    rows, features = run(args.out / ("quick" if args.quick else "full"), bases, workers=args.workers, quick=args.quick)
    known = features[(features["split"] == "development") & (features["label"] == "severed")]
    if args.calibrate and not args.quick:
        basis = f"SeverBench, {len(known)} development pairs of {known['base'].nunique()} bases"
        CALIBRATION.write_text(json.dumps(fit(known[list(FEATURES)], known["right"], basis=basis), indent=1) + "\n")
    result = tell(rows, features, args.out)
    if (rows["split"] == "held-out").any():
        with LOG.open("a") as log:
            log.write(json.dumps({"date": datetime.now(UTC).strftime("%Y-%m-%d"), "kit": KIT, **result}) + "\n")
    print(json.dumps(result))


def tell(rows: pd.DataFrame, features: pd.DataFrame, out: Path) -> dict[str, Any]:
    """Print and write the tables; gives the figures of the held-out clean pairs (development ones, without those)."""
    development = rows[rows["split"] == "development"]
    ours = development[(development["method"] == "locate") & (development["label"] == "severed")]
    icc = float(np.nan_to_num(intraclass(ours["top1"], list(ours["base"])))) if ours["base"].nunique() > 1 else 0.0
    tables: dict[str, pd.DataFrame] = {}
    for split in ("held-out", "development"):
        for name, part in (("clean", rows[rows["clean"]]), ("all", rows)):
            chosen = part[part["split"] == split]
            if not (chosen["label"] == "severed").any():
                continue
            title = f"{split}, {name}"
            tables[title] = table(chosen, icc=icc)
            about = f"\n{title}: {chosen['pair'].nunique()} pairs, {chosen['base'].nunique()} bases"
            print(describe(tables[title], about))
            tables[title].to_csv(out / f"{split}-{name}.csv", index=False)
    print(failures(rows))
    title, found = next(iter(tables.items()))
    head = found.set_index("method")
    result = {"of": title}
    result |= {name: round(float(head.loc["locate", name]), 4) for name in ("top1", "top1_ci_low", "jaccard", "auroc")}
    result |= {"pairs": int(rows["pair"].nunique()), "icc": round(icc, 3)}
    result |= stated(features[features["split"] == title.split(",")[0]])
    result["baselines"] = {
        m: {name: round(float(head.loc[m, name]), 4) for name in ("top1", "jaccard", "auroc")} for m in COMPETITORS
    }
    return result


def stated(features: pd.DataFrame) -> dict[str, Any]:
    """How far the confidences can be taken at their word, over located sets of severed pairs."""
    cut = features[features["label"] == "severed"]
    if not CALIBRATION.exists() or not len(cut):
        return {}
    said = [confidence(row[list(FEATURES)].to_dict()).value for _, row in cut.iterrows()]
    found = scores.calibration(said, cut["right"])
    return {"confidence": round(float(np.mean(said)), 4), "right": round(float(cut["right"].mean()), 4)} | {
        name: round(float(getattr(found, name)), 4) for name in ("ece", "brier")
    }


if __name__ == "__main__":
    main()
