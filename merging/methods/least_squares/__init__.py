"""Linear systems of every layer: RegMean, MaTS, and merges that were computed beforehand."""
