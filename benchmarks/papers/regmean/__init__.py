"""Jin et al. 2023: dataless knowledge fusion by merging weights of language models (RegMean)."""
