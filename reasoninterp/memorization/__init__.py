"""Memorization: where each token of a chain came from; counts of a corpus, salient context, three sources."""
