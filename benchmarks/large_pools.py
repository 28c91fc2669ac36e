"""The bytes of docs/scale.md: what the program plans for pools of 7B and 70B, from headers alone.

    python benchmarks/large_pools.py

Checkpoints are sparse files with a true header and no weights; plans and estimates are the program's own.
"""

import argparse
import json
import struct
import tempfile
from collections.abc import Iterator
from math import prod
from pathlib import Path

from merging.checkpoints.pool import Pool
from merging.evaluation.engines import EngineSettings
from merging.evaluation.memory import EvaluatorMemory, fed_memory, resident_memory
from merging.kernels.gram_sketch import stored_shape
from merging.mergers.material import Material
from merging.methods import METHODS
from ray_tasks.sharded.placement import Node, plan

SIZES: dict[str, dict[str, int]] = {
    "7b": {"hidden": 4096, "inner": 11008, "layers": 32, "words": 32000, "keys": 4096, "heads": 32},
    "70b": {"hidden": 8192, "inner": 28672, "layers": 80, "words": 128256, "keys": 1024, "heads": 64},
}
MEMBERS = {"7b": 8, "70b": 32}
NODES = {"7b": 1, "70b": 8}
EVALUATORS = {"7b": 8, "70b": 16}
SHARDS = {"7b": 8, "70b": 128}
SEARCHED = (["task_arithmetic"], ["task_arithmetic", "ties"], ["fisher"], ["regmean"])
GPUS = (1, 2, 4, 8)
TASKS = 8
CACHE = 8.0
"""GB of an engine's keys and values."""


def write(directory: Path, hidden: int, inner: int, layers: int, words: int, keys: int, heads: int) -> None:
    """A Llama's checkpoint in bfloat16 that takes no room on the disk."""
    shapes = {"model.embed_tokens": (words, hidden), "model.norm": (hidden,), "lm_head": (words, hidden)}
    for number in range(layers):
        attention = {"q_proj": (hidden, hidden), "k_proj": (keys, hidden), "v_proj": (keys, hidden)}
        attention["o_proj"] = (hidden, hidden)
        inside = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
        parts = {f"self_attn.{name}": shape for name, shape in attention.items()}
        parts |= {f"mlp.{name}": shape for name, shape in inside.items()}
        parts |= {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
        shapes |= {f"model.layers.{number}.{name}": shape for name, shape in parts.items()}
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * prod(shape)
        header[f"{name}.weight"] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys * heads // hidden,
        "vocab_size": words,
        "dtype": "bfloat16",
    }
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    with (directory / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def rows(size: str, root: Path) -> Iterator[tuple[str, str]]:
    """What is planned for a pool, and its bytes."""
    names = ("base", *(f"m{number}" for number in range(MEMBERS[size])))
    for name in names:
        write(root / name, **SIZES[size])
    pool = Pool.open(str(root / "base"), {name: str(root / name) for name in names[1:]})
    material, owners = Material(pool), [names[1]] * TASKS
    entries = sum(prod(info.shape) for info in pool.weights.values())
    yield f"{size}: parameters", f"{entries / 1e9:.4g} billion"
    yield "pool", _gigabytes((len(pool.members) + 1) * pool.base.nbytes)
    for methods in SEARCHED:
        beside = ", beside its statistics" * any(METHODS[method].requires for method in methods)
        held = resident_memory(material, methods, owners, on_gpu=True)
        yield f"resident, {' and '.join(methods)}{beside}", _held(held, GPUS)
    yield "sharded", _held(fed_memory(pool, owners, 1), GPUS)
    for parallel in GPUS[:3]:
        engine = EngineSettings(kind="vllm", tensor_parallel=parallel, cache=CACHE)
        yield f"sharded, vllm over {parallel}", _held(fed_memory(pool, owners, 1, engine=engine), (parallel,))
    nodes = [Node(2 * 10**12, 4 * 10**11)] * NODES[size]
    made = plan(material, SEARCHED[0], nodes, evaluators=EVALUATORS[size], threads=8, shards=SHARDS[size])
    yield f"{SHARDS[size]} shards", f"{_gigabytes(sum(made.bundles))}, the largest {_gigabytes(max(made.bundles))}"
    yield f"object stores, {EVALUATORS[size]} evaluators", _gigabytes((EVALUATORS[size] + 1) * made.merged_bytes)
    inputs = [SIZES[size][name] for name in ("hidden", "hidden", "hidden", "inner")] * SIZES[size]["layers"]
    inputs.append(SIZES[size]["hidden"])  # of the output head
    for rank in (None, 4096, 2048):
        kept = sum(prod(stored_shape(n, rank)) for n in inputs)
        yield f"Grams a member{f', rank {rank}' if rank else ''}", _gigabytes(4 * kept)


def _held(memory: EvaluatorMemory, gpus: tuple[int, ...]) -> str:
    each = ", ".join(f"{name} {value:.3g}" for name, value in memory.per_parameter().items() if value)
    spread = ", ".join(f"{memory.on_a_device(count) / 1e9:.3g}" for count in gpus)
    return f"bytes a parameter: {each}; GB on the fullest of {', '.join(map(str, gpus))} GPUs: {spread}"


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:,.4g} GB"


def main() -> None:
    """Prints a table."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print("| | |\n|---|---|")
    for size in SIZES:
        with tempfile.TemporaryDirectory() as place:
            for what, bytes_of in rows(size, Path(place)):
                print(f"| {what} | {bytes_of} |")


if __name__ == "__main__":
    main()
