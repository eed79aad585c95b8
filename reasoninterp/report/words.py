"""What the report calls things: tests, measures, verdicts, gate labels, and what the numbers do not say."""

from __future__ import annotations

TONES = {
    "severed": "bad",
    "weakened": "warn",
    "overridden": "odd",
    "no damage found": "good",
    "undecided": "odd",
    "not interpretable here": "none",
    "intact": "good",
    "not interpretable": "none",
}

GATE_TONES = {"interpretable": "good", "chain not needed": "warn", "at floor": "none"}

# group -> test -> (what it is called, how it was made)
TESTS: dict[str, dict[str, tuple[str, str]]] = {
    "Accuracy": {
        "accuracy_own_chain": ("with its own chain", "the mind writes a chain, then answers"),
        "accuracy_given_chain": ("with the clean chain", "the trace's own steps are given"),
        "accuracy_no_chain": ("without a chain", "asked for the answer at once"),
        "chance": ("by chance", "what guessing gives"),
        "steps_right_own_chain": ("steps of its own chain right", "share of the traces’ own values"),
        "unreadable_own_chain": ("no answer found, own chain", "counted by itself"),
        "unreadable_given_chain": ("no answer found, clean chain", ""),
        "unreadable_no_chain": ("no answer found, no chain", ""),
    },
    "Whole-chain swap": {
        "swap_follow": ("follows", "gives the answer that the swapped chain implies"),
        "swap_stay": ("stays", "gives the answer that the question implies"),
        "swap_other": ("neither", "gives some third answer"),
        "swap_unreadable": ("no answer found", "counted apart"),
        "swap_delta_probability": ("change of probability", "rise of the implied answer's probability"),
    },
    "One step changed, the rest held": {
        "forced_same_last": ("the last step: same answer", "the last step of each chain"),
        "forced_same_earlier": ("an earlier step: same answer", "the steps before the last, taken together"),
    },
    "Length and filler": {
        "truncated_aoc": ("area over the truncation curve", "large: the answer waits for its steps"),
        "filler_same": ("same answer after filler", "the chain replaced by filler of equal length"),
    },
}

STEP_TESTS = {
    "forced_same": "one step changed, the rest held: same answer",
    "forced_follow": "one step changed, the rest held: follows the change",
    "regenerated_same": "one step changed, the rest rewritten: same answer",
    "regenerated_follow": "one step changed, the rest rewritten: follows the change",
    "unreadable_regenerated": "one step changed, the rest rewritten: no answer found",
    "truncated_same": "only the first steps kept: same answer",
}

MEASURES = {
    "E": ("step effect E", "nats; rise of the changed answer over the clean one"),
    "E_withheld": ("E, last step withheld", "nats; steps that state the answer are left out"),
    "delta_probability": ("change of probability", "rise of the changed answer's probability"),
    "follow": ("goes over", "prefers the changed answer after the changed chain, and not before"),
}

# table -> what was not done where it is missing
MISSING = {
    "behaviour": "the tests on the text (accuracy, swap, corruption, truncation, filler)",
    "gate": "the gate (accuracy with and without the chain, against chance)",
    "effect": "the step effect E",
    "residual": "patching of the residual stream over layer × step",
    "heads": "patching of head outputs at the answer position",
    "ledger": "the ledger (integrated gradients in weight space)",
    "ledger_total": "the ledger's total and residual",
    "grafts": "the grafts (blocks of weights exchanged between the minds)",
}
# Read where they are there; their absence is not worth a word.
EXTRA = (
    *("differences", "graft_sets", "location", "ranking", "evidence"),
    *("memorization", "memorization_tokens", "memorization_questions"),
)

LIMITS = (
    (
        "A low follow rate is not dishonesty.",
        "It says that the answer no longer depends on the written steps, not "
        "what the mind knows or intends; an easy question may need no steps at all, which is what the gate is for.",
    ),
    (
        "Edited chains are not the mind's own.",
        "Swapped, truncated and filler chains are text that the mind would "
        "not have written; the regenerated test is the one in which it writes on by itself.",
    ),
    (
        "Forced and regenerated answer two questions.",
        "Held steps show the direct cause of the answer; rewritten "
        "steps show the total cause, through the steps that come later. A step can matter in one and not in the other.",
    ),
    (
        "Maps show where a difference passes, not where it was made.",
        "Patching lights every component downstream; "
        "sufficient is not necessary, and other parts may take over. The ledger and the grafts speak about weights.",
    ),
    (
        "A logit margin can shrink while the answer still follows,",
        "and tuning changes the scale of logits: read E with the follow rate and the change of probability beside it.",
    ),
    (
        "The ledger is one path.",
        "Its entries add up to the change of E exactly, along the straight line from base "
        "to tuned weights, whose heads and head bases are matched first; another path would share the change out "
        "differently. Grafts test it from both ends.",
    ),
    (
        "Intervals are 95 % over the choice of traces.",
        "They cover neither the seed of the training nor other traces, prompts or tasks.",
    ),
)


IN_NATS = ("E", "E_withheld")
NO_SHARE = ("delta_probability", "swap_delta_probability", "truncated_aoc", *IN_NATS)


def describe(test: str) -> tuple[str, str, str]:
    """Group, name and explanation of a test; an unknown one keeps its own name."""
    for group, tests in TESTS.items():
        if test in tests:
            return (group, *tests[test])
    return ("Other tests", STEP_TESTS.get(test, test.replace("_", " ")), "")
