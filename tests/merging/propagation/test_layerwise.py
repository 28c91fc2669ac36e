import threading

import pytest
import torch
from torch import nn

from merging.errors import MethodError
from merging.evaluation.shared_weights import share_weights
from merging.propagation import PropagationSettings, propagate
from merging.propagation.equations import Equations
from merging.propagation.layerwise import plain_mean, shared_inputs, solved
from merging.propagation.member_group import MemberGroup
from merging.statistics.capture.layers import real_rows

KINDS = ("bert", "llama", "gpt2", "vit", "t5")
SMALL = PropagationSettings(examples=40, batch_size=14)


def ridge_fit(inputs, wanted, weight, bias, ridge, factors=(1.0, 1.0, 1.0)):
    """argmin Σ_t α_t ‖X_t Wᵀ + b − Y_t‖² / rows_t + λ ‖W − W̄‖² in float64, as [out, in + 1] with the bias last."""
    gram, right = 0.0, 0.0
    for x, y, factor in zip(inputs, wanted, factors, strict=False):
        x = torch.cat([x.double(), torch.ones(len(x), 1, dtype=torch.float64)], dim=1)
        gram = gram + factor * x.T @ x / len(x)
        right = right + factor * x.T @ y.double() / len(x)
    pull = torch.full((len(gram),), ridge * float(gram.diagonal()[:-1].mean()), dtype=torch.float64)
    pull[-1] = 0
    mean = torch.cat([weight.double(), bias.double()[:, None]], dim=1).T
    return torch.linalg.solve(gram + pull.diag(), right + pull[:, None] * mean).T


def mean(values):
    return sum(value.detach().double() for value in values) / len(values)


def inputs_of(task, path, rows=real_rows):
    """What enters a layer of a task's model, at real tokens."""
    seen = []
    model = task.load_model()
    for batch in task.batches("train", 0, 40, 40):
        handle = model.get_submodule(path).register_forward_pre_hook(
            lambda _, args, mask=batch.mask: seen.append(rows(args[0], mask))
        )
        with torch.no_grad():
            task.logits(model, batch)
        handle.remove()
    return torch.cat(seen)


def mismatch(given, weights):
    """Σ_t mean squared distance of the merged model's logits from member t's, on its examples."""
    total = 0.0
    for member, task in given.tasks.items():
        own, merged = task.load_model(), task.load_model()
        share_weights(merged, given.pool, given.pool.members[member], weights)
        for batch in task.batches("train", 0, 40, 40):
            with torch.no_grad():
                total += float((task.logits(own, batch) - task.logits(merged, batch)).square().mean())
    return total


@pytest.mark.parametrize(
    ("kind", "update"), [*((kind, "propagated") for kind in KINDS), ("bert", "regmean++"), ("gpt2", "regmean")]
)
def test_identical_members_give_that_member(given, kind, update):
    pool = given(kind, members=2, noise=0.0)
    result = propagate(pool.pool, pool.tasks, pool.members, SMALL.model_copy(update={"update": update}))
    assert result.weights.keys() == pool.pool.weights.keys()
    assert len(result.fits) > 6
    for name, value in result.weights.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, pool.pool.member_weight("m0", name), rtol=0, atol=2e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_are_nearer_to_the_members_than_those_of_regmean_and_of_the_mean(given, kind):
    pool = given(kind)
    result = {
        update: propagate(pool.pool, pool.tasks, pool.members, SMALL.model_copy(update={"update": update})).weights
        for update in ("propagated", "regmean")
    }
    plain = {name: mean([pool.pool.member_weight(m, name) for m in pool.members]).float() for name in pool.pool.weights}
    assert mismatch(pool, result["propagated"]) < mismatch(pool, result["regmean"])
    assert mismatch(pool, result["propagated"]) < 0.9 * mismatch(pool, plain)


@pytest.mark.parametrize(
    ("kind", "path", "weight", "transposed"),
    [
        ("bert", "bert.encoder.layer.0.attention.self.key", "encoder.layer.0.attention.self.key", False),
        ("bert", "bert.encoder.layer.0.output.dense", "encoder.layer.0.output.dense", False),
        ("gpt2", "transformer.h.0.mlp.c_fc", "h.0.mlp.c_fc", True),
    ],
)
def test_update_regmean_solves_the_plain_normal_equations(given, kind, path, weight, transposed):
    pool = given(kind)
    result = propagate(pool.pool, pool.tasks, pool.members, SMALL.model_copy(update={"update": "regmean"})).weights
    weights = {
        m: pool.pool.member_weight(m, f"{weight}.weight").T
        if transposed
        else pool.pool.member_weight(m, f"{weight}.weight")
        for m in pool.members
    }
    biases = {m: pool.pool.member_weight(m, f"{weight}.bias") for m in pool.members}
    inputs = [inputs_of(pool.tasks[m], path) for m in pool.members]
    wanted = [x @ weights[m].T + biases[m] for x, m in zip(inputs, pool.members, strict=True)]
    expected = ridge_fit(inputs, wanted, mean(weights.values()), mean(biases.values()), SMALL.ridge)
    merged = result[f"{weight}.weight"].T if transposed else result[f"{weight}.weight"]
    torch.testing.assert_close(merged.double(), expected[:, :-1], rtol=0, atol=1e-4)
    torch.testing.assert_close(result[f"{weight}.bias"].double(), expected[:, -1], rtol=0, atol=1e-4)


class Small(nn.Module):
    """c(h + b(h)), h = relu(a(x))."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.b, self.c = nn.Linear(3, 5), nn.Linear(5, 5), nn.Linear(5, 2)

    def forward(self, x):
        h = torch.relu(self.a(x))
        return self.c(h + self.b(h))


def small(handmade):
    torch.manual_seed(9)
    return handmade(Small(0), {m: (Small(seed), {"x": torch.randn(30, 3)}) for seed, m in enumerate(("one", "two"), 1)})


@pytest.mark.parametrize("update", ["propagated", "regmean++", "regmean"])
def test_three_layers_by_hand(handmade, update):
    pool = small(handmade)
    settings = PropagationSettings(batch_size=8, ridge=0.01, update=update)
    result = propagate(pool.pool, pool.tasks, pool.members, settings)

    models = [task.model.double() for task in pool.tasks.values()]
    own = [task.inputs["x"].double() for task in pool.tasks.values()]
    merged = list(own)
    residual_own = residual_merged = None
    with torch.no_grad():
        for name in ("a", "b", "c"):
            layers = [model.get_submodule(name) for model in models]
            if update == "regmean++":
                own = merged
            if update == "regmean":
                merged = own
            wanted = [layer(x) for layer, x in zip(layers, own, strict=True)]
            if name == "b":
                residual_own, residual_merged = own, merged
                if update == "propagated":
                    wanted = [y + r - s for y, r, s in zip(wanted, own, merged, strict=True)]
            fit = ridge_fit(merged, wanted, mean([m.weight for m in layers]), mean([m.bias for m in layers]), 0.01)
            torch.testing.assert_close(result.weights[f"{name}.weight"].double(), fit[:, :-1], rtol=0, atol=1e-5)
            torch.testing.assert_close(result.weights[f"{name}.bias"].double(), fit[:, -1], rtol=0, atol=1e-5)
            own = [layer(x) for layer, x in zip(layers, own, strict=True)]
            merged = [x @ fit[:, :-1].T + fit[:, -1] for x in merged]
            if name == "a":
                own, merged = [x.relu() for x in own], [x.relu() for x in merged]
            if name == "b":
                own = [x + r for x, r in zip(own, residual_own, strict=True)]
                merged = [x + r for x, r in zip(merged, residual_merged, strict=True)]
    assert [fit.weights for fit in result.fits] == [("a.weight",), ("b.weight",), ("c.weight",)]
    assert [fit.residual for fit in result.fits] == [False, update == "propagated", False]


def test_factors_weigh_the_members(handmade):
    pool = small(handmade)

    def merged(one, two):
        settings = PropagationSettings(ridge=0.01, factors={"one": one, "two": two})
        return propagate(pool.pool, pool.tasks, pool.members, settings).weights

    models = [task.model for task in pool.tasks.values()]
    inputs = [task.inputs["x"] for task in pool.tasks.values()]
    with torch.no_grad():
        wanted = [model.a(x) for model, x in zip(models, inputs, strict=True)]
    means = mean([m.a.weight for m in models]), mean([m.a.bias for m in models])
    fit = ridge_fit(inputs, wanted, *means, 0.01, factors=(2.0, 0.5))
    result, scaled = merged(2.0, 0.5), merged(8.0, 2.0)
    torch.testing.assert_close(result["a.weight"].double(), fit[:, :-1], rtol=0, atol=1e-5)
    torch.testing.assert_close(result["a.bias"].double(), fit[:, -1], rtol=0, atol=1e-5)
    for name, value in result.items():
        torch.testing.assert_close(scaled[name], value, rtol=0, atol=1e-5)
    with pytest.raises(MethodError, match="factors: all are 0"):
        merged(0.0, 0.0)
    with pytest.raises(MethodError, match="factors: 'ones' is no member.*'one'"):
        propagate(pool.pool, pool.tasks, pool.members, PropagationSettings(factors={"ones": 1.0}))


@pytest.mark.parametrize("kind", ["gpt2", "llama", "vit"])
def test_groups_that_exchange_sums_agree_with_one_of_all_members(given, kind):
    pool = given(kind)
    settings = SMALL.model_copy(update={"factors": {"m1": 0.7}})
    whole = propagate(pool.pool, pool.tasks, pool.members, settings)
    groups_of_members = [
        MemberGroup(pool.pool, pool.tasks, part, plain_mean(pool.pool, pool.members, "cpu"), settings)
        for part in (["m0"], ["m1", "m2"])
    ]
    plans = [plan for one in groups_of_members for plan in one.plans]
    groups = shared_inputs(plans)
    assert [fit.weights for fit in whole.fits] == groups
    for one in groups_of_members:
        one.begin(groups)
    for group in groups:
        total = Equations(torch.device("cpu"))
        for one in groups_of_members:
            total.add(one.equations(group))
        for one in groups_of_members:
            one.apply(group, solved(group, plans, total, settings))
    for one in groups_of_members:
        one.end()
        for name, value in whole.weights.items():
            torch.testing.assert_close(one.out[name], value, rtol=0, atol=2e-5)


def test_fits_tell_what_mean_and_merged_weights_miss(handmade):
    pool = small(handmade)
    (first, *_) = propagate(pool.pool, pool.tasks, pool.members, PropagationSettings(ridge=1e-6)).fits
    before, after, total = 0.0, 0.0, 0.0
    weights = propagate(pool.pool, pool.tasks, pool.members, PropagationSettings(ridge=1e-6)).weights
    plain = {k: mean([pool.pool.member_weight(m, k) for m in pool.members]).float() for k in ("a.weight", "a.bias")}
    with torch.no_grad():
        for task in pool.tasks.values():
            x = task.inputs["x"]
            y = task.model.a(x)
            before += float((x @ plain["a.weight"].T + plain["a.bias"] - y).square().sum())
            after += float((x @ weights["a.weight"].T + weights["a.bias"] - y).square().sum())
            total += float(y.square().sum())
    assert first.rows == 60
    assert first.before == pytest.approx(before / total, rel=1e-4)
    assert first.after == pytest.approx(after / total, rel=1e-3)


def test_the_order_of_members_changes_nothing(given):
    pool = given("bert")
    one, two = (
        propagate(pool.pool, pool.tasks, members, SMALL).weights for members in (pool.members, pool.members[::-1])
    )
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_some_members_may_be_left_out(given):
    pool = given("bert")
    result = propagate(pool.pool, {"m1": pool.tasks["m1"]}, ["m1"], SMALL).weights
    for name, value in result.items():
        torch.testing.assert_close(value, pool.pool.member_weight("m1", name), rtol=0, atol=2e-4)


def test_batches_change_rounding_only(given):
    pool = given("llama")
    one, two = (
        propagate(pool.pool, pool.tasks, pool.members, PropagationSettings(batch_size=size)).weights for size in (3, 64)
    )
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("kind", "update"),
    [*((kind, "propagated") for kind in (*KINDS, "albert")), ("gpt2", "regmean++"), ("bert", "regmean")],
)
def test_blocks_that_run_again_give_the_same_bits(given, kind, update):
    pool = given(kind)
    settings = SMALL.model_copy(update={"update": update})
    whole = propagate(pool.pool, pool.tasks, pool.members, settings)
    again = propagate(pool.pool, pool.tasks, pool.members, settings.model_copy(update={"recompute": True}))
    assert again.fits == whole.fits
    for name, value in whole.weights.items():
        assert torch.equal(again.weights[name], value), name


def test_what_is_not_solved_is_the_plain_mean(given):
    pool = given("bert")
    result = propagate(pool.pool, pool.tasks, pool.members, SMALL)
    solved = {name for fit in result.fits for name in fit.weights}
    solved |= {name.replace(".weight", ".bias") for name in solved}
    assert "pooler.dense.weight" in solved
    assert not any("classifier" in name for name in result.weights)
    rest = result.weights.keys() - solved
    assert {"embeddings.word_embeddings.weight", "encoder.layer.1.output.LayerNorm.bias"} <= rest
    for name in rest:
        values = [pool.pool.member_weight(member, name) for member in pool.members]
        assert torch.equal(result.weights[name], mean(values).float())


def test_layers_that_run_twice_are_the_plain_mean(given):
    pool = given("albert", count=10)
    result = propagate(pool.pool, pool.tasks, pool.members, SMALL)
    assert {fit.weights for fit in result.fits} == {("encoder.embedding_hidden_mapping_in.weight",), ("pooler.weight",)}


def test_progress_reaches_the_end_and_nothing_is_left_running(given):
    pool = given("bert", count=10)
    reported = []
    threads = threading.active_count()
    result = propagate(pool.pool, pool.tasks, pool.members, SMALL, progress=lambda *done: reported.append(done))
    total = len(result.fits)
    assert reported == [(done, total) for done in range(total + 1)]
    assert threading.active_count() == threads


def test_what_is_missing_is_named(given):
    pool = given("bert", count=10)
    with pytest.raises(MethodError, match="at least one member"):
        propagate(pool.pool, pool.tasks, [])
    with pytest.raises(MethodError, match="'m9' is no member"):
        propagate(pool.pool, pool.tasks, ["m9"])
    with pytest.raises(MethodError, match="'m1' has no task"):
        propagate(pool.pool, {"m0": pool.tasks["m0"]}, ["m0", "m1"])
    empty = pool.tasks["m0"]
    empty = type(empty)("m0", empty.model, {k: v[:0] for k, v in empty.inputs.items()}, empty.mask[:0])
    with pytest.raises(MethodError, match=r"m0: its task .* has no train examples"):
        propagate(pool.pool, {"m0": empty}, ["m0"])


def test_an_overflow_is_named_by_member_and_weight(given):
    pool = given("bert", count=10)
    task = pool.tasks["m1"]
    damaged = type(task)("m1", task.load_model(), task.inputs, task.mask)
    with torch.no_grad():
        damaged.model.bert.encoder.layer[1].intermediate.dense.weight[0, 0] = float("inf")
    threads = threading.active_count()
    with pytest.raises(MethodError, match=r"m1: .*'encoder.layer.1.intermediate.dense.weight'"):
        propagate(pool.pool, pool.tasks | {"m1": damaged}, pool.members, SMALL)
    assert threading.active_count() == threads


def test_members_that_run_their_layers_in_another_order_are_refused(handmade):
    class Turned(Small):
        def forward(self, x):
            return self.c(self.b(torch.relu(self.a(x))) * 2)

    class Back(Small):
        def forward(self, x):
            b = self.b(torch.ones(len(x), 5))
            return self.c(torch.relu(self.a(x)) + b)

    x = torch.randn(12, 3)
    pool = handmade(Small(0), {"one": (Turned(1), {"x": x}), "two": (Back(2), {"x": x})})
    with pytest.raises(MethodError, match="two runs its layers in another order than one"):
        propagate(pool.pool, pool.tasks, pool.members)
