"""Which activations at which step the answer depends on: exact sweeps, gradients, knockout, paths.

Interventions on the activations of clean and corrupt chains, read as the answer's margin (`metric`):

`sweep`        contrasts × sites × spans × metrics → tidy rows, exactly, each run restarted where its patch begins.
               Below it: `cells` (what is patched), `sources` and `partners` (what is put in), `store` (runs kept),
               `lanes` and `staircase` (the way up), `readings` (metrics), `plain` (one forward a cell, the check)
`residual`     study: the residual stream over layer × step, denoising and noising
`heads`        study: head outputs (`z`) where the answer is read
`attribution`  gradients instead of runs, for every site at once; `agreement` with exact patching; `attribution_map` the
               study; `edge_attribution` and `edge_graph` for edges between components
`attention_edges`, `knockout`  attention edges cut; `readers` the study of who reads a step for the answer;
               `step_matrix` the step × step causal matrix
`stream`, `paths`  path patching from senders to receivers; `hops`, `routes` the way from step to step to answer
`columns`      a trace's tokens as the columns of a layer × step map
"""
