"""Measuring a candidate: live models on merged weights, step by step over the examples."""
