import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from merging.checkpoints.models.parameter_names import checkpoint_names
from merging.errors import StatisticsError
from merging.statistics import Gram, Partial, StatisticSettings, measure
from merging.statistics.capture.layers import decoder_mask
from merging.statistics.gram_sums import LEAST_BLOCK, GramSums
from merging.tasks.task import Batch, Task
from merging.testing.reference import rows_read

TIED_OUTPUTS = {"transformer.wte.weight", "shared.weight"}


def gram(batch_size: int = 3) -> Gram:
    return Gram(StatisticSettings(batch_size=batch_size))


def inputs_of(task: Task, model: nn.Module) -> dict[str, list[tuple[nn.Module, Tensor, Batch]]]:
    """What went into each linear layer, one example after another, by the weight's name."""
    names = checkpoint_names(model)
    seen: dict[str, list[tuple[nn.Module, Tensor, Batch]]] = {}
    handles = []
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | Conv1D):
            name = names[id(module.weight)]
            handles.append(
                module.register_forward_pre_hook(
                    lambda layer, args, name=name: seen.setdefault(name, []).append((layer, args[0], batch))
                )
            )
    with torch.no_grad():
        for batch in task.batches("train", 0, task.size("train"), 1):
            task.logits(model, batch)
    for handle in handles:
        handle.remove()
    return seen


def expected_mean(seen: list[tuple[nn.Module, Tensor, Batch]]) -> Tensor:
    """(1/rows) Σ x xᵀ, row by row; single examples are cut to their length, so nothing is padding."""
    rows = [row for layer, value, _ in seen for row in rows_read(layer, value)[:, 0]]
    return sum(torch.outer(row, row) for row in rows) / len(rows)


@pytest.mark.parametrize("name", ["bert", "llama", "vit", "gpt2", "t5"])
def test_is_the_mean_outer_product_over_real_tokens(build, name):
    task = build(name)
    partial = measure(task, gram())
    means = gram().finalize(partial)
    seen = inputs_of(task, task.load_model())
    for weight, values in seen.items():
        if weight in TIED_OUTPUTS:
            continue
        result = means[partial.shared.get(weight, weight)]
        torch.testing.assert_close(result.double(), expected_mean(values), rtol=1e-5, atol=1e-6)
    assert {*means, *partial.shared} == {*seen} - TIED_OUTPUTS


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_sharded_is_serial_whatever_the_batch_size(build, sharded, name):
    task = build(name)
    serial = measure(task, gram(batch_size=7))
    parts = sharded(task, gram(batch_size=2))
    assert parts.counts == serial.counts
    assert parts.shared == serial.shared
    for weight, value in serial.sums.items():
        torch.testing.assert_close(parts.sums[weight], value, rtol=1e-5, atol=1e-5)


def test_query_key_and_value_share_one_gram(build):
    partial = measure(build("bert"), gram())
    layer = "bert.encoder.layer.1.attention.self"
    assert partial.shared[f"{layer}.key.weight"] == f"{layer}.query.weight"
    assert partial.shared[f"{layer}.value.weight"] == f"{layer}.query.weight"
    assert f"{layer}.key.weight" not in partial.sums
    assert partial.transposed == ()


def test_pooled_rows_all_count(build):
    task = build("bert")
    counts = measure(task, gram()).counts
    assert counts["bert.pooler.dense.weight"] == counts["examples"] == 7
    assert counts["bert.encoder.layer.0.output.dense.weight"] == counts["tokens"] == int(task.mask.sum())


def test_conv1d_is_transposed_and_tied_output_left_out(build):
    partial = measure(build("gpt2"), gram())
    assert "transformer.h.0.attn.c_attn.weight" in partial.transposed
    assert "transformer.wte.weight" not in partial.sums
    assert partial.sums["transformer.h.0.mlp.c_proj.weight"].shape == (64, 64)


def test_encoder_and_decoder_positions_have_their_own_masks(build):
    """Even where both are equally long, so that shapes tell nothing."""
    task = build("t5")
    short = {name: value[:, :5] for name, value in task.inputs.items()}
    short["input_ids"][:, 0] = 5
    task.inputs, task.mask = short, short["attention_mask"]
    (batch,) = task.batches("train", 0, 7, 7)
    counts = measure(task, gram(batch_size=7)).counts
    decoder, encoder = int(decoder_mask(batch).sum()), int(batch.mask.sum())
    assert decoder != encoder
    assert counts["encoder.block.0.layer.0.SelfAttention.q.weight"] == encoder
    assert counts["decoder.block.0.layer.0.SelfAttention.q.weight"] == decoder
    assert counts["decoder.block.0.layer.1.EncDecAttention.q.weight"] == decoder
    assert counts["decoder.block.0.layer.1.EncDecAttention.k.weight"] == encoder


class Twice(nn.Module):
    """One layer used twice; two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.again.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.again(self.first(self.first(x).tanh()).tanh()))


def test_layers_used_twice_and_tied_weights_sum_over_uses(tiny_task):
    torch.manual_seed(0)
    x = torch.randn(5, 4, dtype=torch.float64)
    task = tiny_task(Twice().double(), {"x": x}, torch.zeros(5, dtype=torch.int64))
    partial = measure(task, gram())
    seen = inputs_of(task, task.load_model())["first.weight"]
    assert partial.counts["first.weight"] == len(seen) == 15
    torch.testing.assert_close(partial.sums["first.weight"], 15 * expected_mean(seen))
    assert "again.weight" not in partial.sums


class Fickle(nn.Module):
    """Gives two layers the same tensor in its first passes only."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.passes = nn.Linear(3, 2), nn.Linear(3, 2), 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        return self.one(x) + self.two(x if self.passes < 6 else x.clone())


def test_sharing_that_changes_is_refused(tiny_task):
    task = tiny_task(Fickle(), {"x": torch.ones(8, 3)}, torch.zeros(8, dtype=torch.int64))
    with pytest.raises(StatisticsError, match=r"'two.weight' shares its input with"):
        measure(task, gram(batch_size=2))


class Relative(nn.Module):
    """Two layers share their first inputs, and one of them also reads what the whole batch shares."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.value = nn.Linear(4, 4), nn.Linear(4, 4)
        self.positions = nn.Parameter(torch.randn(1, 3, 4))

    def forward(self, x: Tensor) -> Tensor:
        return (self.query(x) + self.value(x)).mean(1) + self.query(self.positions).mean(1)


def test_what_a_batch_shares_counts_for_every_example_and_for_one_layer_only(tiny_task):
    torch.manual_seed(0)
    model, x = Relative().double(), torch.randn(5, 2, 4, dtype=torch.float64)
    task = tiny_task(model, {"x": x}, torch.zeros(5, dtype=torch.int64))
    rows, shared = x.reshape(-1, 4), model.positions.detach()[0]
    for size in (1, 2, 5):
        partial = measure(task, gram(batch_size=size))
        assert not partial.shared
        assert partial.counts["query.weight"] == 10 + 5 * 3
        torch.testing.assert_close(partial.sums["value.weight"], rows.T @ rows)
        torch.testing.assert_close(partial.sums["query.weight"], rows.T @ rows + 5 * shared.T @ shared)


class Experts(nn.Module):
    """Every token goes to one of three layers."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(40, 4)
        self.experts = nn.ModuleList([nn.Linear(4, 3) for _ in range(3)])

    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        states = self.table(ids)
        out = states.new_zeros(*ids.shape, 3)
        for number, expert in enumerate(self.experts):
            if (ids % 3 == number).any():
                out[ids % 3 == number] = expert(states[ids % 3 == number])
        return (out * attention_mask[..., None]).sum(1)


def test_an_expert_has_the_gram_of_the_tokens_that_reach_it(tiny_task, sharded):
    torch.manual_seed(0)
    ids, mask = torch.randint(1, 40, (7, 6)), (torch.arange(6) < torch.tensor([6, 2, 3, 6, 1, 4, 5])[:, None]).long()
    ids[:2] = 3  # a whole shard for one expert
    model = Experts().double()
    task = tiny_task(model, {"ids": ids, "attention_mask": mask}, torch.zeros(7, dtype=torch.int64), mask)
    real = ids[mask.bool()]
    for partial in (measure(task, gram(batch_size=3)), sharded(task, gram(batch_size=3))):
        for number in range(3):
            rows, name = model.table(real[real % 3 == number]).detach(), f"experts.{number}.weight"
            assert partial.counts[name] == len(rows) > 0
            torch.testing.assert_close(partial.sums[name], rows.T @ rows)
        assert partial.uncovered == partial.unreached == ()
    task.inputs["ids"] = 3 * (ids % 13) + 1  # all for one
    alone = measure(task, gram(batch_size=3))
    assert alone.sums.keys() == {"experts.1.weight"}
    assert (alone.unreached, alone.uncovered) == (("experts.0.weight", "experts.2.weight"), ())


class OutsideToo(nn.Module):
    """Reads a layer's weight outside of the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.both = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        states = self.both(self.plain(x)).tanh()
        return states @ self.both.weight


def test_a_weight_that_is_also_read_outside_of_its_layer_has_no_gram_and_is_named(tiny_task):
    torch.manual_seed(0)
    task = tiny_task(
        OutsideToo().double(), {"x": torch.randn(5, 4, dtype=torch.float64)}, torch.zeros(5, dtype=torch.int64)
    )
    partial = measure(task, gram())
    assert partial.sums.keys() == {"plain.weight"}
    assert (partial.unreached, partial.uncovered) == ((), ("both.weight",))


def test_the_model_is_left_as_it_was(build):
    task = build("t5")
    model = task.load_model()
    gram().measure(model, task, task.batches("train", 0, 4, 2))
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_large_grams_are_symmetric_and_exact():
    torch.manual_seed(0)
    extent = 2 * LEAST_BLOCK["cpu"] + 37
    value = torch.randn(2, 30, extent)
    mask = torch.arange(30)[None] < torch.tensor([[30], [11]])
    sums = GramSums()
    sums.add("w", value, mask)
    sums.count(Batch({}, torch.zeros(2), torch.arange(2), mask))
    partial = sums.partial({}, ())
    rows = value[mask].double()
    assert partial.counts == {"examples": 2, "tokens": 41, "w": 41}
    assert torch.equal(partial.sums["w"], partial.sums["w"].T)
    torch.testing.assert_close(partial.sums["w"].double(), rows.T @ rows, rtol=1e-5, atol=1e-4)


def test_nothing_measured_is_neutral_and_cannot_be_finalized(build):
    task = build("bert")
    empty = gram().measure(task.load_model(), task, [])
    full = measure(task, gram())
    assert full.combine(empty) is full
    with pytest.raises(StatisticsError, match="no examples"):
        gram().finalize(Partial())
