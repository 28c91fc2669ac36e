"""A tiny Llama, and tasks of lm-evaluation-harness on local files."""

import json

import numpy as np
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = "the cat dog sat ran on a mat hill big small red and then home 1 2 3 4 : yes no question answer".split()  # noqa: SIM905
CHAT = "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"
BASIC = {
    "dataset_path": "json",
    "doc_to_text": "question : {{text}} answer :",
    "doc_to_target": "{{label}}",
    "metadata": {"version": 1},
}
KINDS = {
    "quiz": {
        "output_type": "multiple_choice",
        "doc_to_choice": "{{options}}",
        "metric_list": [
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
            {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True},
            {"metric": "mcc"},
            {"metric": "brier_score", "higher_is_better": False},
        ],
    },
    "sums": {
        "output_type": "generate_until",
        "doc_to_target": "{{reply}}",
        "generation_kwargs": {"until": ["home"], "max_gen_toks": 4, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}, {"metric": "bleu"}],
        "filter_list": [
            {"name": "strict", "filter": [{"function": "take_first"}]},
            {
                "name": "first-word",
                "filter": [{"function": "regex", "regex_pattern": r"(\w+)"}, {"function": "take_first"}],
            },
        ],
    },
    "cloze": {
        "output_type": "loglikelihood",
        "doc_to_target": " {{reply}}",
        "metric_list": [{"metric": "acc"}, {"metric": "perplexity", "higher_is_better": False}],
    },
    "prose": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}],
    },
}


def rows(count, seed):
    g = np.random.default_rng(seed)
    text = lambda low, high: " ".join(g.choice(WORDS, g.integers(low, high)))  # noqa: E731
    return [
        {
            "text": text(2, 9),
            "options": [text(1, 3) for _ in range(3)],
            "label": int(g.integers(3)),
            "reply": text(1, 2),
        }
        for _ in range(count)
    ]


def write_llama(path, seed, **changes):
    """A Llama near that of other seeds, with a tokenizer of `WORDS`; `changes` of its configuration."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "<user>": 4, "<assistant>": 5, "<system>": 6}
    vocabulary |= {word: len(vocabulary) + place for place, word in enumerate(WORDS)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", chat_template=CHAT
    )
    settings = {
        "vocab_size": len(vocabulary),
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    config = LlamaConfig(**(settings | changes))
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    for value in model.parameters():
        value.data += 0.3 * torch.randn_like(value)
    torch.manual_seed(seed)
    for value in model.parameters():
        value.data += 0.1 * torch.randn_like(value)
    model.save_pretrained(path)
    words.save_pretrained(path)
    return str(path)


def write_task(folder, kind, *, train=6, validation=0, test=9, seed=10, **config):
    """The harness's task `my_<kind>` as a YAML file beside its data."""
    folder.mkdir(exist_ok=True)
    name = config.get("task", f"my_{kind}")
    files = {}
    for number, (split, count) in enumerate({"train": train, "validation": validation, "test": test}.items()):
        if count:
            files[split] = str(folder / f"{name}.{split}.jsonl")
            lines = [json.dumps(row) for row in rows(count, seed + number)]
            (folder / f"{name}.{split}.jsonl").write_text("\n".join(lines))
    splits = {"train": "training_split", "validation": "validation_split", "test": "test_split"}
    written = {
        **BASIC,
        **KINDS[kind],
        "task": name,
        "dataset_kwargs": {"data_files": files, "cache_dir": str(folder / "cache")},
        **{splits[split]: split for split in files},
        **config,
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(written))
    return str(folder)
