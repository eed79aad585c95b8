"""Activation patching between a clean and a corrupt chain: which step, at which layer, the answer depends on.

`metric`    clean and corrupt rows of contrasts as one batch, and their effect
`columns`   a trace's tokens as the columns of a layer × step map
`residual`  the residual stream over layer × step, denoising and noising
`heads`     head outputs (`z`) where the answer is read

Sweeps here are plain: one forward pass over the whole batch per cell of the map.
"""
