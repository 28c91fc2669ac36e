"""Gradients of merged weights and of scaling factors, and what statistics predict of a merge."""
