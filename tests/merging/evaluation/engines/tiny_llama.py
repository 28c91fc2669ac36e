"""A pool of tiny Llamas with a tokenizer, and tasks of every kind that an engine answers."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = 97
SPECIAL = ("<pad>", "<s>", "</s>")
CONFIG = {
    "vocab_size": WORDS + len(SPECIAL),
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def write_pool(root: Path, *, tied: bool = False, dtype: torch.dtype = torch.float32) -> dict[str, str]:
    """Name → directory of `base`, `one` and `two`."""
    words = [*SPECIAL, *(f"w{number}" for number in range(WORDS))]
    splitter = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="w0"))
    splitter.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=splitter, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=64
    )
    for seed, name in enumerate(("base", "one", "two")):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**CONFIG, tie_word_embeddings=tied))
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter) if seed else 0.0)
        model.to(dtype).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return {name: str(root / name) for name in ("base", "one", "two")}


def write_examples(path: Path, count: int = 16, seed: int = 0) -> str:
    """Prompts with completions and choices."""
    rng = np.random.default_rng(seed)

    def text(size: int) -> str:
        return " ".join(f"w{number}" for number in rng.integers(1, WORDS, size))

    rows = [
        {
            "prompt": text(5),
            "completion": text(4),
            "choices": [text(2), text(3), text(2)],
            "label": int(rng.integers(3)),
        }
        for _ in range(count)
    ]
    pd.DataFrame(rows).to_parquet(path)
    return str(path)


def task_settings(data: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Task → settings: likelihood, perplexity, choices, and generation."""
    return {
        "likelihood": {"kind": "causal_lm", "data": data},
        "perplexity": {"kind": "causal_lm", "data": data, "metric": "neg_perplexity"},
        "choices": {"kind": "causal_lm", "data": data, "completion": None, "choices": "choices"},
        "generation": {"kind": "causal_lm", "data": data, "metric": "rouge_l", "max_new_tokens": 8},
    }
