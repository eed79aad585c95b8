"""A chain of thought as data: traces, how they are read, cut, edited and contrasted, and how answers are found in text.

`trace`        `Trace`, `Step`, `Span`, `Format`; `encode` gives the same as token ids with the span of every part
`io`           trace files (JSON Lines): `read_traces`, `write_traces`, `TraceFile`
`formats`      presets, a tokenizer's chat template, few-shot prompts
`segment`      lossless cutting of a text into steps
`answers`      extractors, and when two answers are the same
`readers`      GSM8K, AQuA, SVAMP, PrOntoQA as traces; `samples`: what a sampler wrote
`calculator`   GSM8K's `<<a=b>>`: found, evaluated, checked; `quantities`: numbers in prose
`propagate`    one result corrupted and carried through to the answer
`contrast`     clean and corrupt traces: `make_contrasts`, `withheld`
`edits`        truncate, filler, drop, shuffle, replace, swap

Nothing here needs torch.
"""

from reasoninterp.traces.answers import Extracted, extract, normalise, same_answer
from reasoninterp.traces.contrast import Contrast, ContrastSet, Refusal, alignment, make_contrasts, withheld
from reasoninterp.traces.edits import EditedTrace
from reasoninterp.traces.formats import chat_format, fewshot, resolve_format
from reasoninterp.traces.io import TraceFile, read_traces, write_traces
from reasoninterp.traces.readers import Conversion, convert, shuffle_options
from reasoninterp.traces.segment import segment, split_chain
from reasoninterp.traces.trace import Format, Span, Step, TokenTrace, Trace, encode

__all__ = [
    "Contrast",
    "ContrastSet",
    "Conversion",
    "EditedTrace",
    "Extracted",
    "Format",
    "Refusal",
    "Span",
    "Step",
    "TokenTrace",
    "Trace",
    "TraceFile",
    "alignment",
    "chat_format",
    "convert",
    "encode",
    "extract",
    "fewshot",
    "make_contrasts",
    "normalise",
    "read_traces",
    "resolve_format",
    "same_answer",
    "segment",
    "shuffle_options",
    "split_chain",
    "withheld",
    "write_traces",
]
