"""The experiments of four papers on merging, each as a command on models and data that anyone can fetch.

GM: Daheim et al. 2024, *Model merging by uncertainty-based gradient matching*.
RM: Jin et al. 2023, *Dataless knowledge fusion by merging weights of language models*.
QD: *Model merging by quality and diversity*, a determinantal point process over members.
MaTS: Tam et al. 2024, *Merging by matching models in task parameter subspaces*.
"""
