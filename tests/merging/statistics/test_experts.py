"""Joined experts: a Gram for each over the tokens that reach it, under the names and in the layout of the checkpoint."""

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F

from merging.checkpoints.pool import Pool
from merging.errors import CheckpointError, StatisticsError
from merging.kernels.gram_sketch import dense, diagonal, is_sketch
from merging.mergers.material import Material
from merging.mergers.resident import ResidentMerger
from merging.recipe import Recipe
from merging.statistics import Gram, GramSettings, StatisticSettings, StatisticsFile, measure, save
from merging.tasks.task import IGNORED

SIZE = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 24,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 32,
}
TWO = {"num_experts_per_tok": 2}
MODELS = {
    "Mixtral": ("Mixtral", {"num_local_experts": 4, **TWO}),
    "Qwen3Moe": ("Qwen3Moe", {"num_experts": 4, **TWO, "moe_intermediate_size": 12, "mlp_only_layers": []}),
    "GptOss": ("GptOss", {"num_local_experts": 4, **TWO, "layer_types": ["full_attention"] * 2}),
    "GraniteMoe": ("GraniteMoe", {"num_local_experts": 4, **TWO}),
}
NAMES = {
    "Mixtral": ("block_sparse_moe.experts.{}.w1", "block_sparse_moe.experts.{}.w3", "block_sparse_moe.experts.{}.w2"),
    "Qwen3Moe": ("mlp.experts.{}.gate_proj", "mlp.experts.{}.up_proj", "mlp.experts.{}.down_proj"),
}
"""Layers of an expert as the checkpoint stores them: the two that read the tokens, and the one that reads what they make."""
FUSED = {
    "GptOss": ("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
    "GraniteMoe": ("block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight"),
}


def gram(size=3):
    return Gram(StatisticSettings(batch_size=size))


@pytest.fixture
def make(tiny_task):
    """A causal language model with experts, and texts of differing lengths: `make(name, left=False, seed=0)`."""

    def run(name, left=False, seed=0, count=4):
        kind, more = MODELS[name]
        torch.manual_seed(0)
        config = getattr(transformers, f"{kind}Config")(**SIZE, **more)
        model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for value in model.parameters():
                value.add_(torch.randn(value.shape, generator=generator) * 0.1)
        mask = (torch.arange(8) < torch.tensor([8, 3, 6, 5])[:count, None]).long()
        ids = torch.randint(4, 40, (count, 8), generator=generator) * mask
        if left:
            ids, mask = ids.flip(1), mask.flip(1)
        labels = torch.where(mask.bool(), ids, IGNORED)
        return tiny_task(model, {"input_ids": ids, "attention_mask": mask}, labels, mask)

    return run


def by_hand(task):
    """What reaches each expert of each layer: rows that gate and up read, and rows that down reads; without padding."""
    model, result = task.load_model(), {}
    for config in {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values():
        config._experts_implementation = "eager"

    def see(path):
        def hook(module, args, kwargs):
            states, index = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)][:2]
            for token, experts in zip(states, index, strict=True):
                for expert in experts.tolist():
                    weight = module.gate_up_proj[expert]
                    both = token @ weight if module.is_transposed else F.linear(token, weight)
                    if module.has_bias:
                        both = both + module.gate_up_proj_bias[expert]
                    read, made = result.setdefault((path, expert), ([], []))
                    read.append(token.double())
                    made.append(module._apply_gate(both).double())

        return hook

    experts = {path: module for path, module in model.named_modules() if hasattr(module, "is_transposed")}
    for path, module in experts.items():
        module.register_forward_pre_hook(see(path), with_kwargs=True)
    with torch.no_grad():
        for ids, mask in zip(task.inputs["input_ids"], task.inputs["attention_mask"], strict=True):
            model(input_ids=ids[mask.bool()][None])
    grams = {}
    for layer, path in enumerate(experts):
        for expert in range(4):
            rows = result.get((path, expert), ([], []))
            grams[layer, expert] = (
                [torch.stack(own).T @ torch.stack(own) if own else None for own in rows],
                len(rows[0]),
            )
    return grams


def assert_gram(result, expected):
    if expected is None:
        assert not result.any()
    else:
        torch.testing.assert_close(result.double(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("name", MODELS)
def test_each_expert_has_the_gram_of_the_tokens_that_reach_it(make, name, left):
    task = make(name, left)
    expected = by_hand(task)
    partial = measure(task, gram(4))
    for (layer, expert), (grams, count) in expected.items():
        start = f"model.layers.{layer}."
        if name in NAMES:
            first, second, last = (f"{start}{part.format(expert)}.weight" for part in NAMES[name])
            assert partial.shared[second] == first
            sums = partial.sums[first], partial.sums[last]
            assert partial.counts[first] == partial.counts[last] == count
            assert first not in partial.transposed
        else:
            first, last = (start + part for part in FUSED[name])
            sums = partial.sums[first][expert], partial.sums[last][expert]
            assert partial.counts[f"{first}[{expert}]"] == count
            assert (first in partial.transposed) == (name == "GptOss")
        for own, wanted in zip(sums, grams, strict=True):
            assert_gram(own, wanted)
    assert not any("experts" in each and not each.endswith("_bias") for each in partial.uncovered)


@pytest.mark.parametrize("name", ["Mixtral", "GptOss"])
def test_sharded_is_serial_and_means_are_over_an_expert_s_own_tokens(make, sharded, name):
    task = make(name)
    serial, parts = measure(task, gram(4)), sharded(task, gram(1))
    assert parts.counts == serial.counts
    for weight, value in serial.sums.items():
        torch.testing.assert_close(parts.sums[weight], value, rtol=1e-4, atol=1e-4)
    means = gram().finalize(serial)
    if name == "GptOss":
        weight = "model.layers.0.mlp.experts.gate_up_proj"
        for expert in range(4):
            count = max(1, serial.counts[f"{weight}[{expert}]"])
            torch.testing.assert_close(means[weight][expert], serial.sums[weight][expert] / count)


def pool_of(make, name, place, unreached=()):
    """A base and two members on disk, and their Grams; experts in `unreached` get zeros, as if no token had come."""
    files, tasks = {}, {}
    for seed, who in enumerate(("base", "a", "b")):
        task = make(name, seed=seed)
        task.model.save_pretrained(place / who)
        tasks[who] = task
    pool = Pool.open(str(place / "base"), {who: str(place / who) for who in ("a", "b")})
    for who in ("a", "b"):
        partial = measure(tasks[who], gram(4))
        for weight in unreached:
            partial.sums[weight] = torch.zeros_like(partial.sums[weight])
        fingerprint = pool.members[who].checkpoint.fingerprint
        path = str(place / f"{who}.gram.safetensors")
        files[who] = save(path, gram(4), partial, checkpoint=fingerprint, data="d")
        files[who].check(fingerprint, pool.members[who].checkpoint.tensors)
        assert isinstance(files[who], StatisticsFile)
    return pool, files


@pytest.mark.parametrize("name", ["Mixtral", "GptOss", "GraniteMoe"])
def test_regmean_solves_expert_by_expert_in_the_checkpoint_s_layout(make, name, tmp_path):
    dead = "model.layers.0.block_sparse_moe.experts.1.w2.weight" if name == "Mixtral" else None
    pool, files = pool_of(make, name, tmp_path, [dead] if dead else [])
    out = {key: torch.empty(info.shape) for key, info in pool.weights.items()}
    report = ResidentMerger(Material(pool, {"gram": files}), out).merge(Recipe("regmean", {"a": 1.0, "b": 1.0}))
    assert report.get("unreached_experts", 0) == (1 if dead else 0)
    members = {who: {key: pool.member_weight(who, key).double() for key in out} for who in ("a", "b")}
    checked = 0
    for key in out:
        if ("experts" not in key and "_linear" not in key) or key.endswith("bias"):
            continue
        grams = {who: files[who].read(key).double() for who in files}
        mean = torch.stack([members[who][key] for who in members]).mean(0)
        if key == dead:
            torch.testing.assert_close(out[key].double(), mean, rtol=1e-5, atol=1e-6)
            continue
        for expert in range(4) if out[key].dim() == 3 else [None]:
            pick = (lambda value: value) if expert is None else (lambda value, at=expert: value[at])
            left, right = 0.0, 0.0
            for who, value in members.items():
                own = pick(grams[who])
                own = 0.9 * own + 0.1 * torch.diag(own.diagonal())
                matrix = pick(value[key])
                matrix = matrix if key in files[who].transposed else matrix.T
                left, right = left + own, right + own @ matrix
            if torch.linalg.cond(left) > 1e7:  # too few tokens: a ridge decides
                continue
            expected = torch.linalg.solve(left, right)
            merged = pick(out[key]).double()
            merged = merged if key in files["a"].transposed else merged.T
            torch.testing.assert_close(merged, expected, rtol=1e-2, atol=1e-3)
            checked += 1
    assert checked


def test_oriented_methods_learn_the_layout_of_experts_from_their_module(make, tmp_path):
    pool, _ = pool_of(make, "GptOss", tmp_path / "gpt")
    assert {key for key in pool.transposed if "experts" in key} == {
        f"model.layers.{layer}.mlp.experts.{part}" for layer in range(2) for part in ("gate_up_proj", "down_proj")
    }
    (tmp_path / "granite").mkdir()
    pool, _ = pool_of(make, "GraniteMoe", tmp_path / "granite")
    assert pool.transposed == frozenset()


def test_oriented_methods_refuse_experts_whose_module_does_not_tell(tmp_path):
    config = transformers.Llama4TextConfig(
        **SIZE, num_local_experts=2, num_experts_per_tok=1, intermediate_size_mlp=24, interleave_moe_layer_step=1
    )
    for who in ("base", "a"):
        transformers.Llama4ForCausalLM(config).save_pretrained(tmp_path / who)
    pool = Pool.open(str(tmp_path / "base"), {"a": str(tmp_path / "a")})
    with pytest.raises(CheckpointError, match=r"joins the experts of Llama4TextExperts.*only its code tells.*iso_c"):
        _ = pool.transposed


class Hidden(nn.Module):
    """Experts that are multiplied in a way that no one sees."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4, 5))
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        return self.head(torch.einsum("ni,eoi->neo", x, self.weight).flatten(1))


def test_products_that_are_not_seen_leave_no_gram(tiny_task):
    torch.manual_seed(0)
    task = tiny_task(Hidden(), {"x": torch.randn(4, 5)}, torch.arange(4) % 3)
    partial = measure(task, gram(2))
    assert set(partial.sums) == {"head.weight"}
    assert partial.uncovered == ("weight",)


class Sorted(nn.Module):
    """Experts that are given rows in an order of their own."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 5)
        self.inner = Parallel()
        self.head = nn.Linear(4, 3)

    def forward(self, input_ids, attention_mask):
        states = self.embed(input_ids)
        rows = states.flatten(0, 1)
        order = rows[:, 0].argsort()
        mixed = torch.empty(len(rows), 4, dtype=rows.dtype)
        mixed[order] = self.inner(rows[order], [len(rows) // 2, len(rows) - len(rows) // 2])
        weights = attention_mask[..., None].to(rows.dtype)
        return self.head((mixed.view(*states.shape[:2], 4) * weights).sum(1))


class Parallel(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 4, 5))

    def forward(self, rows, sizes):
        return torch.cat([F.linear(part, self.weight[e]) for e, part in enumerate(rows.split(sizes))])


def test_experts_whose_padding_cannot_be_told_run_alone_or_are_refused(tiny_task):
    torch.manual_seed(0)
    mask = (torch.arange(6) < torch.tensor([6, 4, 5])[:, None]).long()
    ids = torch.randint(1, 20, (3, 6)) * mask
    task = tiny_task(Sorted(), {"input_ids": ids, "attention_mask": mask}, torch.arange(3), mask)
    alone, together = measure(task, gram(1)), measure(task, gram(3))
    assert alone.counts == together.counts
    assert together.counts["weight[0]" if "weight[0]" in together.counts else "inner.weight[0]"] == 3 + 2 + 2
    torch.testing.assert_close(alone.sums["inner.weight"], together.sums["inner.weight"])
    task.inputs = {name: value.flip(1) for name, value in task.inputs.items()}
    task.mask = task.inputs["attention_mask"]
    with pytest.raises(StatisticsError, match="set the statistic's batch_size to 1"):
        measure(task, gram(3))


@pytest.mark.parametrize("name", MODELS)
def test_wide_experts_have_a_sketch_each(make, name):
    task = make(name, count=2)
    whole = measure(task, gram(2))
    sketched = measure(task, Gram(GramSettings(batch_size=2, rank=3)))
    assert sketched.counts == whole.counts
    assert sketched.unreached == whole.unreached
    for one, value in whole.sums.items():
        kept = sketched.sums[one]
        assert is_sketch(kept) == (value.shape[-1] >= 12)
        assert dense(kept).shape == value.shape
        torch.testing.assert_close(diagonal(kept), value.diagonal(dim1=-2, dim2=-1), rtol=1e-4, atol=1e-5)
