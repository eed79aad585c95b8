"""What the smaller verbs of the command line do: convert a file to traces, sample chains from a mind."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from reasoninterp.errors import UserError
from reasoninterp.traces.contrast import make_contrasts
from reasoninterp.traces.io import TraceFile, iter_json_lines, read_traces, write_traces
from reasoninterp.traces.readers import convert, shuffle_options
from reasoninterp.traces.trace import Format, Trace

OPTIONS = {
    "gsm8k": {"segmenter", "model"},
    "aqua": {"segmenter"},
    "svamp": set(),
    "prontoqa": set(),
    "vllm": {"segmenter", "extractor", "mind"},
}


def convert_file(
    kind: str, path: Path, out: Path, *, shuffle: bool = False, seed: int = 0, **options: str
) -> list[str]:
    """Convert a file to traces; returns what was made and what was refused, contrasts counted too, line by line.

    Args:
        kind: what the file is.
        path: the file.
        out: the trace file to write.
        shuffle: put the options of multiple choice into another order, the answer's letter with them.
        seed: of the order and of the contrasts that are counted.
        options: those of the reader (`segmenter`, `extractor`, `mind`, `model`).

    Raises:
        UserError: the file is missing, empty or of another kind, holds no trace, or an option is none of its reader's.
    """
    for name in sorted(set(options) - OPTIONS[kind]):
        known = ", ".join(sorted(OPTIONS[kind])) or "none"
        raise UserError(f"--from {kind}: it takes no option {name!r} (it takes: {known}).")
    found = convert(kind, path, **options)
    if shuffle:
        found.traces = [shuffle_options(trace, seed) for trace in found.traces]
    if not found.traces:
        raise UserError(f"{path}: no row of it became a trace; nothing was written.")
    file = TraceFile.of(found.traces)
    # The contrasts are made again when models read the traces: only then is it known which ones align in tokens.
    contrasts = make_contrasts(file, seed=seed)
    write_traces(out, found.traces)
    return [
        *found.summary().splitlines(),
        f"contrasts made without a tokenizer: {len(contrasts)}, refused {len(contrasts.refused)}",
        *(f"  refused, {reason}: {count}" for reason, count in contrasts.reasons().items()),
        f"written to {out}",
    ]


def read_questions(path: str, format: Format | None) -> list[Trace]:
    """Questions from a trace file, or from objects with `id` and `question` (and, if known, `answer`).

    Raises:
        UserError: names the file and line of what is neither.
    """
    rows = list(iter_json_lines(path))
    objects = [(n, row) for n, row in rows if not (isinstance(row, dict) and set(row) == {"format"})]
    if objects and all(isinstance(row, dict) and "steps" in row for _, row in objects):
        return [
            replace(t.with_steps(()), meta={**t.meta, "gold": t.meta.get("gold", t.answer)})
            for t in read_traces(path, format=format).traces
        ]
    out = []
    for number, row in objects:
        if not isinstance(row, dict) or not isinstance(row.get("question"), str) or "id" not in row:
            raise UserError(f"{path}, line {number}: expected an object with id and question.")
        meta = {"gold": str(row["answer"])} if "answer" in row else {}
        out.append(Trace(str(row["id"]), row["question"], (), "", format or Format(), meta))
    if not out:
        raise UserError(f"{path}: no question in it.")
    return out


def sample_file(options: dict[str, Any]) -> list[str]:
    """Let a model write chains for the questions of a file; returns what was written, line by line.

    Args:
        options: those of `reasoninterp traces sample`.

    Raises:
        UserError: anything wrong with the files or the model, or no chain with an answer.
    """
    from reasoninterp.models.minds import Minds
    from reasoninterp.models.prompt import with_prompt
    from reasoninterp.models.sample import sample_chains
    from reasoninterp.traces.formats import resolve_format

    minds = Minds.load(
        {"model": options["model"]},
        device=options["device"],
        dtype=options["dtype"],
        allow_pickle=options["allow_pickle"],
        trust_remote_code=options["trust_remote_code"],
    )
    tokenizer = minds.tokenizer("model")
    format = resolve_format(options["format_"], tokenizer) if options["format_"] else None
    questions = read_questions(options["questions"], format)[: options["limit"]]
    questions = list(with_prompt(questions, options["prompt"], tokenizer, shots=options["shots"]))
    with minds.at("model") as body:
        samples = sample_chains(
            body,
            tokenizer,
            questions,
            n=options["n"],
            temperature=options["temperature"],
            max_new_tokens=options["max_new_tokens"],
            seed=options["seed"],
            batch_size=options["batch_size"] or 32,
        )
    kept = [s.trace for s in samples if s.status == "ok" and s.steps]
    statuses = Counter(s.status if s.steps or s.status != "ok" else "no steps" for s in samples)
    counts = [f"{status}: {count} of {len(samples)}" for status, count in statuses.most_common()]
    if not kept:
        raise UserError(
            f"--model {options['model']}: no chain with an answer came of {len(samples)} samples ({', '.join(counts)}); "
            "raise --max-new-tokens or give the --format the model writes."
        )
    write_traces(options["out"], kept)
    return [*counts, f"{len(kept)} chains with an answer written to {options['out']}"]
