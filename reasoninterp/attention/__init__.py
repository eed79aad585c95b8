"""Who reads which step, as attention says it: an instrument beside the causal ones, never instead of them.

`grid` (spans of rows) → `maps` (plain and value-weighted span-to-span attention), `gradient` (gradient × attention),
`rollout`, `sinks` (tokens that receive attention whatever they say) → the study `attention-map` (`study`);
`receivers` (vertical scores, kurtosis, split-half reliability) → the study `receiver-heads` (`receiver_study`).

Attention is not evidence of use: a model whose answer no longer depends on its steps can keep nearly all attention
on them.  Read these maps beside knockout and patching.
"""
