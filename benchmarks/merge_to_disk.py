"""`mergequest merge` beside mergekit: CPU seconds, private memory and wall time of the same merges of the same files.

    python benchmarks/merge_to_disk.py --parameters 0.5e9 --members 8

Makes a random base and members in the shapes of a Llama (bfloat16) under `--directory`, and there, too, an environment for
mergekit with pip; without it, or with `--alone`, mergequest runs alone. Both run as commands, one after the other, each of its
figures the median over `--repeats`. Start-up, the import of either program's libraries, is measured by itself and left out
of the columns `merge`; loops are compiled before, which takes seconds once on a machine. The machine's own limit is a plain
loop of as many threads that reads the files, adds up and writes, with no format, check or bookkeeping; `bound` is the ratio
that this loop would have after our start-up.
"""

import argparse
import json
import mmap
import os
import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yaml
from safetensors.torch import save_file

PEER = "mergekit==0.1.5"
VOCABULARY = 32_000
RECIPES: dict[str, tuple[str, float, dict[str, Any], str, dict[str, float]]] = {
    "linear": ("linear", 0.125, {}, "linear", {"weight": 0.125}),
    "task_arithmetic": ("task_arithmetic", 0.3, {}, "task_arithmetic", {"weight": 0.3}),
    "ties": ("ties", 1.0, {"density": 0.2}, "ties", {"weight": 1.0, "density": 0.2}),
    "dare_ties": ("dare", 0.3, {"drop": 0.8, "entries": "elected"}, "dare_ties", {"weight": 0.3, "density": 0.2}),
    "multi_slerp": ("multi_slerp", 1.0, {}, "multislerp", {"weight": 1.0}),
    "model_stock": ("model_stock", 1.0, {}, "model_stock", {}),
}
"""Ours: method, scaling factor, parameters; the peer's: method, parameters of every member."""


def shapes(parameters: float) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Llama with about so many parameters, and its width and depth."""
    hidden = max(64, round((parameters / 190) ** 0.5 / 64) * 64)
    layers = max(1, round((parameters - VOCABULARY * hidden) / (11.5 * hidden**2)))
    results: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, hidden)}
    for layer in range(layers):
        linear = {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (hidden // 4, hidden),
            "self_attn.v_proj": (hidden // 4, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (3 * hidden, hidden),
            "mlp.up_proj": (3 * hidden, hidden),
            "mlp.down_proj": (hidden, 3 * hidden),
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
        }
        results |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in linear.items()}
    return results | {"model.norm.weight": (hidden,)}


def make_pool(directory: Path, parameters: float, members: int) -> list[Path]:
    """Writes base and members, unless they are there."""
    wanted = shapes(parameters)
    hidden = wanted["model.norm.weight"][0]
    settings = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": sum("input_layernorm" in name for name in wanted),
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 256 or 1,
        "head_dim": 64,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1 << 22, generator=generator)

    def some(size: int) -> torch.Tensor:
        start = int(torch.randint(len(noise) // 2, (), generator=generator))
        return noise[start:].repeat(-(-size // (len(noise) - start)))[:size]

    base = {name: some(torch.Size(shape).numel()).mul_(0.02) for name, shape in wanted.items()}
    paths = [directory / name for name in ("base", *(f"member{number}" for number in range(members)))]
    for path in paths:
        if (path / "config.json").exists():
            continue
        path.mkdir(parents=True, exist_ok=True)
        values = {}
        for name, shape in wanted.items():
            size = base[name].numel()
            value = base[name] if path is paths[0] else some(size).mul_(0.002).add_(base[name])
            values[name] = value.view(shape).bfloat16()
        save_file(values, path / "model.safetensors", metadata={"format": "pt"})
        (path / "config.json").write_text(json.dumps(settings))
    return paths


@dataclass(frozen=True)
class Cost:
    """What a command took.

    Args:
        cpu: Seconds of all its processors.
        wall: Seconds.
        private: Largest private memory, in bytes, as looked at a hundred times a second.
    """

    cpu: float
    wall: float
    private: int


def run(command: Sequence[str]) -> Cost:
    """Runs a command and takes its measure; raises CalledProcessError with its output if it fails."""
    start, private = time.perf_counter(), 0
    with open(os.devnull, "wb") as nowhere:
        process = subprocess.Popen(command, stdout=nowhere, stderr=subprocess.PIPE)
    while True:
        done, status, usage = os.wait4(process.pid, os.WNOHANG)
        if done:
            break
        with suppress(OSError, StopIteration, IndexError):
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            private = max(private, next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")))
        time.sleep(0.01)
    wall = time.perf_counter() - start
    if status:
        raise subprocess.CalledProcessError(status, command, stderr=process.stderr.read().decode()[-2000:])
    process.stderr.close()
    return Cost(usage.ru_utime + usage.ru_stime, wall, private)


def middle(costs: Sequence[Cost]) -> Cost:
    """The median of each figure."""
    return Cost(*(median(getattr(cost, name) for cost in costs) for name in ("cpu", "wall", "private")))


def peer_environment(directory: Path) -> Path | str:
    """The directory of mergekit's programs, installed if need be; or why there is none."""
    programs = directory / "mergekit" / "bin"
    if not (programs / "mergekit-yaml").exists():
        venv.create(directory / "mergekit", with_pip=True)
        command = [str(programs / "pip"), "install", "-q", PEER, "torch>=2.6,<2.14"]
        installed = subprocess.run(command, capture_output=True, check=False)
        if installed.returncode:
            return f"pip could not install {PEER}: {installed.stderr.decode()[-300:]}"
    return programs


def our_command(directory: Path, name: str, paths: Sequence[Path]) -> list[str]:
    """Writes the recipe file; the command that merges by it."""
    method, factor, parameters, _, _ = RECIPES[name]
    recipe = {
        "base": str(paths[0]),
        "members": {path.name: {"checkpoint": str(path)} for path in paths[1:]},
        "method": method,
        "scaling": factor,
        "parameters": parameters,
    }
    file = directory / f"{name}.ours.yaml"
    file.write_text(yaml.safe_dump(recipe))
    program = Path(sys.executable).with_name("mergequest")
    return [str(program), "merge", str(file), "--out", str(directory / "out-ours"), "--quiet"]


def peer_command(directory: Path, programs: Path, name: str, paths: Sequence[Path]) -> list[str]:
    """Writes mergekit's configuration; the command that merges by it."""
    _, _, _, method, parameters = RECIPES[name]
    config: dict[str, Any] = {
        "merge_method": method,
        "dtype": "bfloat16",
        "models": [{"model": str(path), "parameters": parameters} for path in paths[1:]],
    }
    if name != "linear":
        config["base_model"] = str(paths[0])
    file = directory / f"{name}.peer.yaml"
    file.write_text(yaml.safe_dump(config))
    return [str(programs / "mergekit-yaml"), str(file), str(directory / "out-peer"), "--no-copy-tokenizer"]


def machine_limit(paths: Sequence[Path], out: Path, threads: int) -> Cost:
    """A plain loop that reads all files, adds up in float32 and writes one file of bfloat16, durably.

    It maps the files, and writes around the page cache, which is what this machine does fastest.
    """
    step = 1 << 19
    size = (paths[0] / "model.safetensors").stat().st_size // step * step
    handles = [os.open(path / "model.safetensors", os.O_RDONLY) for path in paths]
    maps = [mmap.mmap(handle, size, prot=mmap.PROT_READ, flags=mmap.MAP_PRIVATE) for handle in handles]
    for handle in handles:
        os.close(handle)
    result = os.open(out, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_DIRECT)

    def work(first: int) -> None:
        room = mmap.mmap(-1, step)
        rounded = torch.frombuffer(room, dtype=torch.bfloat16)
        term, total = torch.empty(step // 2), torch.empty(step // 2)
        for place in range(first * step, size, (threads + 1) * step):
            total.zero_()
            for whole in maps:
                total.add_(
                    term.copy_(torch.frombuffer(whole, dtype=torch.bfloat16, count=step // 2, offset=place)), alpha=0.1
                )
            rounded.copy_(total)
            os.pwrite(result, room, place)

    before, start = time.process_time(), time.perf_counter()
    torch.set_num_threads(1)
    os.posix_fallocate(result, 0, size)
    with ThreadPoolExecutor(threads + 1, initializer=torch.set_num_threads, initargs=(1,)) as executor:
        list(executor.map(work, range(threads + 1)))  # one more: one of them waits for the disk
    os.fsync(result)
    cost = Cost(time.process_time() - before, time.perf_counter() - start, 0)
    os.close(result)
    out.unlink()
    return cost


def rows(names: Sequence[str], ours: dict[str, Cost], peers: dict[str, Cost], limit: Cost) -> Iterator[list[str]]:
    """The table's rows; `bound` is the ratio that our start-up and the machine's own loop would have."""
    idle, peer_idle = ours[""], peers.get("")
    for name in names:
        own, peer = ours[name], peers.get(name)
        work = own.cpu - idle.cpu
        row = [name, f"{own.cpu:.1f}", f"{work:.1f}", f"{own.wall:.1f}", f"{own.private / 1e9:.2f}"]
        if peer and peer_idle:
            peer_work = peer.cpu - peer_idle.cpu
            row += [
                f"{peer.cpu:.1f}",
                f"{peer_work:.1f}",
                f"{peer.wall:.1f}",
                f"{peer.private / 1e9:.2f}",
            ]
            row += [f"{peer.cpu / own.cpu:.1f}×", f"{peer.cpu / (idle.cpu + limit.cpu):.1f}×"]
            row += [f"{peer_work / max(work, 1e-9):.1f}×"]
        yield row


def main() -> None:
    """Measures and prints a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, default=0.1e9)
    parser.add_argument("--members", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--methods", nargs="*", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--directory", type=Path, default=Path.home() / ".cache" / "mergequest-benchmarks")
    parser.add_argument("--alone", action="store_true", help="leave the peer out")
    arguments = parser.parse_args()

    directory: Path = arguments.directory
    pool = directory / f"llama-{arguments.parameters:.0f}"
    paths = make_pool(pool, arguments.parameters, arguments.members)
    programs = "left out as asked" if arguments.alone else peer_environment(directory)
    if isinstance(programs, str):
        print(f"mergekit: {programs}\n")
    ours: dict[str, list[Cost]] = {name: [] for name in ("", *arguments.methods)}
    peers: dict[str, list[Cost]] = {name: [] for name in ours}
    limits = []
    small = make_pool(directory / "llama-small", 1e6, arguments.members)
    for name in arguments.methods:  # loops are compiled once on a machine
        run(our_command(directory / "llama-small", name, small))
    for _ in range(arguments.repeats):
        limits.append(machine_limit(paths, pool / "limit", len(os.sched_getaffinity(0))))
        for name in ours:
            command = our_command(pool, name, paths) if name else [sys.executable, "-c", "import flows.cli.merge"]
            ours[name].append(run(command))
            if isinstance(programs, Path):
                idle = [str(programs / "python"), "-c", "import mergekit.scripts.run_yaml"]
                peers[name].append(run(peer_command(pool, programs, name, paths) if name else idle))
            for out in ("out-ours", "out-peer"):
                shutil.rmtree(pool / out, ignore_errors=True)

    results = {name: middle(costs) for name, costs in ours.items()}
    beside = {name: middle(costs) for name, costs in peers.items() if costs}
    limit = middle(limits)
    stored = sum((path / "model.safetensors").stat().st_size for path in paths)
    print(
        f"{stored / len(paths) / 2e6:.0f}M parameters, bfloat16, {arguments.members} members: {stored / 1e9:.2f} GB to read"
    )
    print(
        f"machine: read, add up and write: {limit.cpu:.1f} CPU s, {limit.wall:.1f} s on {len(os.sched_getaffinity(0))} cores"
    )
    idle = f"start-up: {results[''].cpu:.1f} CPU s" + (f", mergekit {beside[''].cpu:.1f}" if beside else "")
    print(f"{idle}; CPU s: the whole command's, `merge`: without start-up\n")
    head = ["method", "CPU s", "merge", "wall", "private GB"]
    head += ["mergekit CPU s", "merge", "wall", "private GB", "ratio", "bound", "merge ratio"] if beside else []
    for row in (head, ["---"] * len(head), *rows(arguments.methods, results, beside, limit)):
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
