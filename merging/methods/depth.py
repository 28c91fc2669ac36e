"""How deep in a model a weight lies, by its name."""

import re
from functools import lru_cache
from math import inf

NUMBER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")
EMBEDDING = re.compile(r"embed(?!_out)|(?:^|\.)(?:wte|wpe|shared|emb)(?:\.|$)")
"""Embeddings of any architecture; `embed_out` is GPT-NeoX's output head."""


@lru_cache(maxsize=1 << 16)
def depth(name: str) -> float:
    """A weight's layer: the first number that is a whole component of its name (`encoder.layer.3.output…` is of layer 3).

    Embeddings belong to layer 0; what else has no number comes after all layers and has ∞.
    """
    if number := NUMBER.search(name):
        return int(number[1])
    return 0 if is_embedding(name) else inf


def is_embedding(name: str) -> bool:
    """Whether a weight belongs to a model's embeddings."""
    return EMBEDDING.search(name) is not None
