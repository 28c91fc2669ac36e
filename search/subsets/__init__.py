"""Which members to merge: determinantal point processes, greedy selection, portfolios."""
