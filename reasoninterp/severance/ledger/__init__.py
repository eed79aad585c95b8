"""The ledger: E(tuned) − E(base) split over Units, steps and tokens along a path between the two minds."""
