"""Corpus: exact counts of token sequences in a corpus, by one interface with several backends."""
