"""Tam et al. 2024: merging by matching models in task parameter subspaces."""
