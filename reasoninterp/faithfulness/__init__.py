"""What the answer does when the text of the chain changes.

`samples`      a chain and an answer of each mind's own
`readings`     the answer after the whole chain, a part of it, filler, one wrong step, another problem's chain
`regenerated`  one wrong step, the rest written on by the mind
`cross`        each mind reads its own and the other's chain
`effect`       E, the effect of a changed chain on the answer, as logit difference and as probability
`behaviour`    all of it as one table with intervals, and the gate that says which numbers mean something

After Lanham et al. 2023 (arXiv:2307.13702): early answering, filler, mistakes; whole-chain swap and the 2×2 are ours.
"""
