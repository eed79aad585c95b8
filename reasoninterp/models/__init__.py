"""Minds: loading, checking, prompting, reading and sampling models.

`source` and `load` (one plain model), `minds` (named sets of weights over one hooked body), `weights` (blends and
grafts), `body` and `leaves` (the hooked network), `units` (blocks of weights), `tokens` (do the tokenizers agree on
these traces), `prompt` (raw, few-shot, chat), `read` (answer margins, short greedy answers), `decode` and `sample`
(whole chains), `checks` (what must hold on load), `context` (what a study is measured in).
"""
