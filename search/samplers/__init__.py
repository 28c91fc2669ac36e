"""What to try next: Optuna's samplers, and one that draws subsets of members by quality and diversity."""
