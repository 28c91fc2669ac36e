"""Kernels for GPUs beside the compiled loops; without a GPU in Triton's interpreter, and compiled for GPUs elsewhere."""

import os
import subprocess
import sys

import pytest
import torch

from merging.kernels import cpu, gpu
from merging.methods import METHODS, Context, Weight

pytest.importorskip("triton", reason="Triton comes with torch for CUDA; `pip install triton` has these tests run")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETER = "TRITON_INTERPRET"
runs = pytest.mark.skipif(
    DEVICE == "cpu" and INTERPRETER not in os.environ, reason="by the interpreter, in a process of its own: see below"
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = (1, 1024, 3001)
BOUNDS = cpu.Bounds((0.08, 0.09), 20_000)
BETWEEN = cpu.Bounds((0.05, 0.06), 40_000, (0.2, 0.3), 30_000)
TIES = {"keys": [(11, 2**32 - 5)], "offset": 2**33 - 1001}
RULES = {
    "dare": cpu.Rule(
        [0.3, -0.2, 0.4, 0.1, 0.5], "all", keys=[(7 * i + 1, 9 * i) for i in range(5)], level=32768, offset=2**33 - 1001
    ),
    "dare, elected": cpu.Rule(
        [0.3] * 5, "sum", keys=[(7 * i, 2**32 - 1 - i) for i in range(5)], level=52_000, offset=7
    ),
    "dare, mean": cpu.Rule([0.3] * 5, "mean", keys=[(i, i) for i in range(5)], level=9),
    "ties": cpu.Rule([1.0] * 5, "mean", bounds=[BOUNDS] * 5, scale=0.7, **TIES),
    "ties, sum": cpu.Rule([1.0, -1.0, 0.5, 0.0, 0.1], "sum", bounds=[cpu.Bounds((-1.0, -1.0))] * 5),
    "ties, own factors": cpu.Rule([1.0, -0.5, 0.3, 0.0, 0.2], "mean", bounds=[BOUNDS] * 5, **TIES),
    "breadcrumbs": cpu.Rule([0.3] * 5, "all", bounds=[BETWEEN] * 5, **TIES),
    "breadcrumbs, mean": cpu.Rule([0.3] * 5, "mean", bounds=[BETWEEN] * 5, **TIES),
}


def pool(size, dtype):
    g = torch.Generator().manual_seed(size)
    base = torch.randn(size, generator=g)
    values = [(base + 0.1 * torch.randn(size, generator=g)).to(dtype) for _ in range(5)]
    return base.to(dtype), values


def there(values):
    return [value.to(DEVICE) for value in values]


@runs
@pytest.mark.parametrize("to", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sum_is_that_of_the_loops(dtype, to):
    for size in SIZES:
        base, values = pool(size, dtype)
        factors = [0.3 * k - 0.5 for k in range(6)]
        expected, out = torch.empty(size, dtype=to), torch.empty(size, dtype=to, device=DEVICE)
        cpu.weighted_sum(list(zip([base, *values], factors, strict=True)), expected)
        gpu.weighted_sum(list(zip(there([base, *values]), factors, strict=True)), out)
        close = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[
            to
        ]  # the interpreter cuts bfloat16 off
        torch.testing.assert_close(out.cpu(), expected, rtol=close, atol=1e-6)


@runs
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", RULES)
def test_a_merge_is_that_of_the_loops(name, dtype):
    for size in SIZES:
        base, values = pool(size, dtype)
        expected, out = torch.empty(size), torch.empty(size, device=DEVICE)
        cpu.combine(base, values, expected, RULES[name])
        gpu.combine(base.to(DEVICE), there(values), out, RULES[name])
        torch.testing.assert_close(out.cpu(), expected, rtol=1e-6, atol=1e-6)


@runs
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", RULES)
def test_what_is_not_finite_shows(name, value):
    base, values = pool(1024, torch.float32)
    values[0][5] = value
    expected, out = torch.empty(1024), torch.empty(1024, device=DEVICE)
    cpu.combine(base, values, expected, RULES[name])
    gpu.combine(base.to(DEVICE), there(values), out, RULES[name])
    assert torch.equal(out.cpu().isfinite(), expected.isfinite())


@runs
def test_rows_may_begin_anywhere():
    base, values = pool(3001, torch.bfloat16)
    cut = [value[1:] for value in (base, *values)]
    expected, out = torch.empty(3000), torch.empty(3000, device=DEVICE)
    cpu.weighted_sum([(value, 0.5) for value in cut], expected)
    gpu.weighted_sum([(value[1:], 0.5) for value in there([base, *values])], out)
    torch.testing.assert_close(out.cpu(), expected, rtol=1e-6, atol=1e-6)


@runs
@pytest.mark.parametrize("name", ["average", "task_arithmetic", "ties", "dare", "breadcrumbs", "consensus"])
def test_methods_merge_by_kernels_what_those_take(name, monkeypatch):
    base, values = pool(3001, torch.bfloat16)
    members = {f"m{number}": value for number, value in enumerate(values)}
    method = METHODS[name]
    recipe = method.default_recipe(list(members))

    def merged(device):
        on = {member: value.to(device) for member, value in members.items()}
        out = {"w": torch.empty(3001, device=device)}
        weight = Weight("w", base.to(device), on)
        prepared = method.prepare([weight], Context(global_stats=method.global_pass([weight])))
        prepared.merge(recipe.scaling, recipe.parameters, out)
        return out["w"].cpu()

    expected = merged("cpu")
    if DEVICE == "cpu":  # as if it were a GPU
        monkeypatch.setattr(cpu, "fits", lambda *_: False)
        monkeypatch.setattr(gpu, "fits", lambda *_: True)
    torch.testing.assert_close(merged(DEVICE), expected, rtol=1e-5, atol=1e-6)


def test_a_cpu_s_weights_are_not_for_kernels():
    assert not gpu.fits(torch.empty(3), torch.empty(3))


@pytest.mark.slow
@pytest.mark.skipif(DEVICE != "cpu" or INTERPRETER in os.environ, reason="they run as they are")
def test_without_a_gpu_they_run_in_the_interpreter():
    """Which is chosen when Triton is first imported, as other tests' libraries do."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]  # not what is slow
    done = subprocess.run(command, env=os.environ | {INTERPRETER: "1"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert f"{len(DTYPES) ** 2 + len(RULES) * len(DTYPES) + 2 * len(RULES) + 8} passed" in done.stdout


COMPILE = """
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from merging.kernels import triton_kernels as kernels

def cubin(kernel, signature, constants):
    names = signature | dict.fromkeys(constants, "constexpr")
    source = ASTSource(fn=kernel, signature=names, constexprs=constants)
    return triton.compile(source, target=GPUTarget("cuda", {arch}, 32)).asm["cubin"]

for word, dtype in (("fp32", tl.float32), ("bf16", tl.bfloat16), ("fp16", tl.float16)):
    fixed = dict(dtype=dtype, aligned=True, block=kernels.BLOCK)
    assert cubin(kernels.sum_kernel, dict(table="*i64", count="i32", out="*fp32", size="i32"), fixed)
    arguments = dict(table="*i64", count="i32", base="*" + word, out="*fp32", size="i32")
    arguments |= dict(scale="fp32", level="i32", offset="i64")
    for trimmed in (True, False):
        for entries in kernels.ENTRIES.values():
            assert cubin(kernels.combine_kernel, arguments, dict(trimmed=trimmed, entries=entries) | fixed)
"""


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
def test_kernels_compile_for_gpus_that_are_not_here(arch, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    code = COMPILE.replace("{arch}", str(arch))
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
