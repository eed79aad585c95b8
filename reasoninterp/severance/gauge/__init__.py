"""Two minds' heads and head bases, matched before they are compared."""
