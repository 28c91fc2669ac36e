"""Daheim et al. 2024: model merging by uncertainty-based gradient matching."""
