"""Models without weights, and what their parameters are called in a checkpoint."""
