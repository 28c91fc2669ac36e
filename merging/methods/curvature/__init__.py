"""Merges under diagonal curvature: Fisher averaging and gradient matching."""
