import ctypes
import gc
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from merging.checkpoints.pool import Pool
from merging.evaluation.live_models import LiveModels
from merging.evaluation.memory import fed_memory, resident_memory
from merging.mergers.material import Material
from merging.recipe import Recipe, base_recipe
from merging.statistics.statistic import Partial
from merging.statistics.statistics_file import save_tensors
from merging.tasks.task import Score, Task

CONFIG = {
    "vocab_size": 4000,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}
MEMBERS = ("one", "two")
OVERHEAD = 64e6
"""Bytes of compiled loops, buffers and the like, which count as the process's."""
FREE = Recipe("task_arithmetic", {"one": 0.5, "two": 0.5})


class Still(Task):
    """A task that loads a model and asks nothing of it."""

    kind = "still"

    def check(self):
        return []

    def load_model(self):
        raise NotImplementedError

    def load_skeleton(self, merged, dtype=torch.float32):
        from merging.tasks.head import load_model

        return load_model(self.head, "AutoModelForCausalLM", hollow=merged, dtype=dtype)

    def size(self, split):
        return 1

    def data_fingerprint(self, split):
        return ""

    def measure(self, model, split, *, limit=None, precision="float32"):
        return Score(float(next(model.parameters()).float().mean()), 0.0, 1, "mean"), None


class Given:
    """Candidates that others merged: the weights that wait, in the dtype in which they come."""

    def __init__(self, material, out):
        self._out = out
        self._waiting = {name: torch.ones(info.shape, dtype=info.dtype) for name, info in material.pool.weights.items()}

    def merge(self, recipe):
        for name, value in self._out.items():
            value.copy_(self._waiting[name])
        return {}


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Pools of 18 million parameters in bfloat16 and float32, with Fisher information."""
    root, result = tmp_path_factory.mktemp("memory"), {}
    for dtype in (torch.bfloat16, torch.float32):
        result[dtype] = {name: str(root / str(dtype) / name) for name in ("base", *MEMBERS)}
        for seed, path in enumerate(result[dtype].values()):
            torch.manual_seed(seed)
            LlamaForCausalLM(LlamaConfig(**CONFIG)).to(dtype).save_pretrained(path)
    return result


def material(paths, fisher):
    pool = Pool.open(paths["base"], {name: paths[name] for name in MEMBERS})
    if not fisher:
        return Material(pool)
    files = {}
    for name in MEMBERS:
        path = str(Path(paths[name]).parent / f"{name}.fisher.safetensors")
        values = {own: torch.rand(info.shape) for own, info in pool.weights.items()}
        about = Partial({}, {"examples": 1})
        files[name] = save_tensors(path, "fisher", {}, values, about, checkpoint="", data="")
    return Material(pool, {"fisher": files})


def peak(work) -> int:
    """Bytes that some work adds at most to a process of its own."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what earlier tests freed counts anew
        before = resident()
        try:
            work()
            os.write(writer, json.dumps(_status("VmHWM") - before).encode())
        except BaseException as error:
            os.write(writer, json.dumps(repr(error)).encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(writer)
    with os.fdopen(reader) as stream:
        answer = json.loads(stream.read())
    assert isinstance(answer, int), answer
    return answer


def resident() -> int:
    """Bytes of this process now, from where its peak is counted again."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(field) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{field}:")))


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
@pytest.mark.parametrize("regime", ["resident", "prepared", "fed"])
@pytest.mark.parametrize(
    ("stored", "dtype"),
    [
        (torch.bfloat16, None),
        pytest.param(torch.bfloat16, torch.float32, marks=pytest.mark.slow),
        pytest.param(torch.float32, None, marks=pytest.mark.slow),
    ],
    ids=["own", "widened", "float32"],
)
def test_an_evaluator_takes_what_is_estimated(paths, stored, dtype, regime):
    given = material(paths[stored], fisher=regime == "prepared")
    methods = ["fisher"] if regime == "prepared" else ["task_arithmetic"]
    recipe = Recipe(methods[0], FREE.scaling)
    AutoModelForCausalLM.from_pretrained(paths[stored]["one"])  # what is imported for this is not an evaluator's

    def work():
        source = {"source": Given} if regime == "fed" else {}
        task = Still("still", None, paths[stored]["one"])
        live = LiveModels(given, [task], {"still": "one"}, torch.device("cpu"), dtype=dtype, **source)
        live.measure(recipe, "validation")
        live.measure(base_recipe(), "validation")

    if regime == "fed":
        estimate = fed_memory(given.pool, ["one"], 1, dtype)
    else:
        estimate = resident_memory(given, methods, ["one"], dtype)
    expected = estimate.models + estimate.pool + estimate.waiting
    measured = peak(work)
    # Mapped files count as held, and may leave memory before the peak.
    assert 0.5 * expected < measured < expected + OVERHEAD
