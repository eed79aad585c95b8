"""Do the minds' tokenizers agree on these traces?

A tuned model often brings another chat template, added tokens and padded vocabulary rows; none of that matters as long
as the traces that are read get the same ids, inside the vocabulary that all minds share.  Where they do not, a
comparison would patch one word's activation into another's place, so it is refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import zip_longest

from reasoninterp.errors import UserError
from reasoninterp.models.minds import Minds
from reasoninterp.traces.trace import Trace, encode


def check_ids(minds: Minds, traces: Iterable[Trace]) -> int:
    """Check that every mind's tokenizer gives each trace the same ids; returns the number of traces checked.

    Raises:
        UserError: names the first trace and the first token that differ, or an id beyond the shared vocabulary.
    """
    home, *others = minds.names
    tokenizer = minds.tokenizer(home)
    n = 0
    for trace in traces:
        n += 1
        ids = encode(trace, tokenizer).ids
        for at, one in enumerate(ids):
            if one >= minds.body.n_vocab_shared:
                raise UserError(
                    f"trace {trace.id!r}: token {at} is {tokenizer.decode([one])!r} (id {one}), which not all minds "
                    f"have (they share {minds.body.n_vocab_shared} ids); use a format without added tokens."
                )
        for name in others:
            theirs = encode(trace, minds.tokenizer(name)).ids
            if theirs == ids:
                continue
            for at, (a, b) in enumerate(zip_longest(ids, theirs)):
                if a != b:
                    mine = "no token" if a is None else f"{tokenizer.decode([a])!r} (id {a})"
                    other = "no token" if b is None else f"{minds.tokenizer(name).decode([b])!r} (id {b})"
                    raise UserError(
                        f"trace {trace.id!r}: token {at} is {mine} for {home} and {other} for {name}; "
                        "compare models whose tokenizers agree on the traces."
                    )
    return n
