"""What a GPU makes of it, in one command: merges beside a copy, RegMean, statistics, and candidates an hour in both engines.

    python benchmarks/gpu.py                      # a Llama of 1.2B parameters on a GPU, of 1M where there is none
    python benchmarks/gpu.py --size 7b --members 4
    python benchmarks/gpu.py --base DIRECTORY     # a language model of yours instead of random weights

Prints Markdown. Merges are of a BERT encoder's shapes (`merge_in_memory.py`); the copy beside them moves the bytes that a merge
reads and writes. Language models are a base and members a little away from it, written to a
temporary directory. The part with vLLM runs where vLLM is installed (docs/engines.md).
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import torch
from merge_in_memory import pool as encoder
from merge_in_memory import seconds
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from merging.checkpoints.pool import Pool
from merging.evaluation.engines import EngineSettings
from merging.evaluation.live_models import LiveModels, best_device
from merging.mergers.material import Material
from merging.methods import METHODS, Context
from merging.recipe import Recipe
from merging.statistics import STATISTICS, LikelihoodSettings, StatisticSettings, measure_shard
from merging.tasks import make_task
from merging.tasks.language.causal_lm import CausalLMSettings

SIZES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
}
VOCABULARY = {"tiny": 512, "1b": 32000, "7b": 32000}
METHODS_OF_MERGES = ("task_arithmetic", "ties", "dare", "fisher", "regmean")
REPEATS = 5


def merges(device: torch.device, members: int, layers: int, hidden: int) -> Iterator[str]:
    """Each method's merge beside a copy of the bytes that it reads and writes."""
    settings = argparse.Namespace(
        layers=layers, hidden=hidden, vocabulary=hidden * 8, members=members, dtype="bfloat16", device=device.type
    )
    weights = encoder(settings)
    out = {weight.name: torch.empty_like(weight.base) for weight in weights}
    entries = sum(value.numel() for value in out.values())
    size = 2 * entries * (members + 2)
    source = torch.empty(size // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = min(seconds(lambda: target.copy_(source), device.type) for _ in range(REPEATS))
    yield (
        f"Merges of {entries / 1e6:.3g}M parameters, {members} members, bfloat16, on {device}; a copy: "
        f"{size / copy / 1e9:.4g} GB/s read and written.\n"
    )
    yield "| method | ms a candidate | as a multiple of the copy |\n|---|--:|--:|"
    for name in METHODS_OF_MERGES:
        method = METHODS[name]
        recipe = method.complete(method.default_recipe(list(weights[0].members)))
        prepared = method.prepare(weights, Context(global_stats=method.global_pass(weights)))
        prepared.merge(recipe.scaling, recipe.parameters, out)
        turns = []
        for turn in range(REPEATS):
            scaling = {member: factor * (1 + 0.01 * turn) for member, factor in recipe.scaling.items()}
            turns.append(seconds(lambda: prepared.merge(scaling, recipe.parameters, out), device.type))  # noqa: B023
        yield f"| {name} | {1e3 * min(turns):.3g} | {min(turns) / copy:.2g} |"


def language_pool(root: Path, size: str, base: str | None, members: int, dtype: torch.dtype) -> tuple[Pool, str]:
    """A base with members a little away from it, and a file of examples."""
    if base is None:
        words = ["<pad>", "<s>", "</s>", *(f"w{number}" for number in range(VOCABULARY[size] - 3))]
        splitter = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="w0"))
        splitter.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer: Any = PreTrainedTokenizerFast(
            tokenizer_object=splitter, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=2048
        )
        config = LlamaConfig(**SIZES[size], vocab_size=VOCABULARY[size], max_position_embeddings=2048)
        model: Any = LlamaForCausalLM(config)
    else:
        tokenizer, words = AutoTokenizer.from_pretrained(base), []
        given = AutoModelForCausalLM.from_pretrained(base)
        given.config.__dict__.pop("quantization_config", None)  # a GGUF file's, of weights that are plain numbers now
        model = AutoModelForCausalLM.from_config(given.config)
        model.load_state_dict(given.state_dict())
    model = model.to(dtype)
    generator = torch.Generator().manual_seed(0)
    names = ("base", *(f"m{number}" for number in range(members)))
    for name in names:
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
        with torch.no_grad():
            for value in model.parameters():
                value.add_(1e-3 * torch.randn(value.shape, generator=generator).to(dtype))
    rng = np.random.default_rng(0)
    chosen = words[3:] or ["time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world"]
    rows = [
        {"prompt": " ".join(rng.choice(chosen, 96)), "completion": " ".join(rng.choice(chosen, 32))} for _ in range(256)
    ]
    pd.DataFrame(rows).to_parquet(root / "examples.parquet")
    return Pool.open(str(root / "base"), {name: str(root / name) for name in names[1:]}), str(root / "examples.parquet")


def statistics(pool: Pool, data: str, examples: int, device: torch.device) -> Iterator[str]:
    """Fisher and Gram beside a forward pass over the same examples."""
    head = pool.members["m0"].checkpoint.path
    task = make_task("lm", CausalLMSettings(data={"train": data, "validation": data}, batch_size=8), head)
    model = task.load_model().to(device)
    task.evaluate(model, "validation", limit=8)
    forward = seconds(lambda: task.evaluate(model, "validation", limit=examples), device.type)
    yield f"\nStatistics of {examples} examples; a forward pass over them: {forward:.3g} s.\n"
    yield "| statistic | s | as a multiple of the pass |\n|---|--:|--:|"
    for kind, settings in (
        ("fisher", LikelihoodSettings(examples=examples)),
        ("gram", StatisticSettings(examples=examples)),
    ):
        statistic = STATISTICS[kind](settings)
        taken = seconds(lambda: measure_shard(task, statistic, "train", 0, examples, device, model), device.type)  # noqa: B023
        yield f"| {kind} | {taken:.3g} | {taken / forward:.2g} |"


def engines(pool: Pool, data: str, examples: int, device: torch.device, settings: EngineSettings) -> Iterator[str]:
    """Candidates of task arithmetic in both engines."""
    head, owner = pool.members["m0"].checkpoint.path, "m0"
    likelihood = make_task("likelihood", CausalLMSettings(data={"validation": data}), head)
    generation = make_task(
        "generation", CausalLMSettings(data={"validation": data}, metric="rouge_l", max_new_tokens=32), head
    )
    recipes = [Recipe("task_arithmetic", dict.fromkeys(pool.members, 0.1 * turn)) for turn in range(1, 4)]
    yield f"\nCandidates on {examples} examples of 96 + 32 words, likelihood and generation of 32 tokens.\n"
    yield (
        "| engine | start s | merge and load s | likelihood s | with generation s | candidates an hour | memory GB |\n"
        "|---|--:|--:|--:|--:|--:|--:|"
    )

    def row(name: str, make: Callable[[list[Any]], Any]) -> str:
        before = _memory(device)
        start = time.perf_counter()
        held = make([likelihood, generation])
        start = time.perf_counter() - start
        held.measure(recipes[0], "validation", limit=examples)
        measured = [held.measure(recipe, "validation", limit=examples) for recipe in recipes[1:]]
        merge = min(one.merge_seconds for one in measured)
        scored = min(one.scores["likelihood"].seconds for one in measured)
        both = min(one.evaluate_seconds for one in measured)
        return (
            f"| {name} | {start:.1f} | {merge:.3g} | {scored:.3g} | {both:.3g} | {3600 / (merge + both):,.0f} | "
            f"{(_memory(device) - before) / 1e9:.2f} |"
        )

    owners = {"likelihood": owner, "generation": owner}
    yield row("transformers", lambda tasks: LiveModels(Material(pool), tasks, owners, device))
    if find_spec("vllm") is None:
        yield "| vllm | not installed here | | | | | |"
        return
    from merging.evaluation.engines.engine_models import EngineModels

    yield row("vllm", lambda tasks: EngineModels(Material(pool), tasks, owners, device, settings))


def _memory(device: torch.device) -> int:
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        return int(total - free)
    return int(psutil.Process().memory_info().rss)


def main() -> None:
    """Measures and prints all of it."""
    device = best_device()
    gpu = device.type == "cuda"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="1b" if gpu else "tiny")
    parser.add_argument("--base")
    parser.add_argument("--members", type=int, default=3)
    parser.add_argument("--examples", type=int, default=256 if gpu else 16)
    parser.add_argument("--dtype", default="bfloat16" if gpu else "float32")
    parser.add_argument("--cache", type=float, default=8.0 if gpu else 0.2, help="GB of the engine's keys and values")
    arguments = parser.parse_args()
    layers, hidden = (24, 2048) if gpu else (6, 384)
    print(
        f"{torch.cuda.get_device_name() if gpu else 'no GPU: a tiny version on the CPU'}, torch {torch.__version__}\n"
    )
    for line in merges(device, arguments.members, layers, hidden):
        print(line, flush=True)
    with tempfile.TemporaryDirectory() as place:
        dtype = getattr(torch, arguments.dtype)
        pool, data = language_pool(Path(place), arguments.size, arguments.base, arguments.members, dtype)
        for line in statistics(pool, data, min(arguments.examples, 32), device):
            print(line, flush=True)
        settings = EngineSettings(kind="vllm", cache=arguments.cache)
        for line in engines(pool, data, arguments.examples, device, settings):
            print(line, flush=True)


if __name__ == "__main__":
    main()
