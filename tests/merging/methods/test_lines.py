from dataclasses import replace

import pytest
import torch

from merging.errors import MethodError
from merging.mergers.weight_groups import split
from merging.methods import METHODS, Context, Weight
from merging.recipe import Recipe

EXAMPLES = {"amazon": 300, "movie": 120, "nyt": 50, "tweets": 700, "base": 1000}


@pytest.mark.parametrize(
    ("name", "scale"),
    [
        ("embeddings.word.weight", 0.5),
        ("encoder.layer.0.output.weight", 0.5),
        ("encoder.layer.2.output.weight", 0.7),
        ("encoder.layer.5.output.weight", 1.0),
        ("pooler.dense.weight", 1.0),
    ],
)
def test_the_scale_grows_from_the_first_layer_to_the_last(name, scale, merge):
    names = ["embeddings.word.weight", "pooler.dense.weight", *(f"encoder.layer.{i}.output.weight" for i in range(6))]
    weights = [Weight(each, torch.zeros(2), {"a": torch.ones(2)}) for each in names]
    merged = merge("lines", weights, {"a": 1.0}, {"a": 0.5, "b": 0.5})
    torch.testing.assert_close(merged[name], torch.full((2,), scale))


@pytest.mark.parametrize(
    ("name", "scale"),
    [
        ("wte.weight", 0.5),
        ("transformer.wpe.weight", 0.5),
        ("shared.weight", 0.5),
        ("model.embed_tokens.weight", 0.5),
        ("vision_model.embeddings.class_embedding", 0.5),
        ("h.1.mlp.c_fc.weight", 1.0),
        ("ln_f.weight", 1.0),
        ("embed_out.weight", 1.0),
        ("h.0.mlp.shared_expert.weight", 0.5),
    ],
)
def test_embeddings_of_any_architecture_belong_to_the_first_layer_as_for_groups(name, scale, merge):
    names = ["h.0.attn.c_attn.weight", "h.1.attn.c_attn.weight", *([] if name.startswith("h.0") else ["h.0.x"]), name]
    weights = [Weight(each, torch.zeros(2), {"a": torch.ones(2)}) for each in names]
    merged = merge("lines", weights, {"a": 1.0}, {"a": 0.5, "b": 0.5})
    torch.testing.assert_close(merged[name], torch.full((2,), scale))
    (group,) = split([name], Recipe("lines", {"a@layers:0": 0.5, "a@layers:1-": 1.0}))
    assert group[1]["a"] == scale


def test_gradient_matching_keeps_the_base_s_fisher_and_its_delta():
    method, inner = METHODS["lines+gradient_matching"], METHODS["gradient_matching"]
    recipe = Recipe(method.name, {"a": 1.0}, {"base_curvature": "fisher", "a": 0.3})
    complete = method.complete(recipe)
    assert complete.parameters["delta"] == 1e-12
    assert (complete.parameters["a"], complete.parameters["b"]) == (0.3, 0.5)
    assert method.needs(complete.parameters).base == inner.needs(complete.parameters).base == ("fisher",)
    assert method.complete(replace(recipe, parameters={})).parameters["delta"] == 1.0
    with pytest.raises(MethodError, match="has no parameter 'detla'"):
        method.complete(replace(recipe, parameters={"detla": 1.0}))


@pytest.mark.parametrize("curvature", ["identity", "fisher"])
def test_gradient_matching_grows_with_depth_as_its_formula_says(
    curvature, make_pool, merge, complete, reference, assert_close
):
    weights = make_pool(2)
    parameters = {"base_curvature": curvature, "a": 0.25, "b": 0.5}
    merged = merge("lines+gradient_matching", weights, SCALING, parameters)
    spelled = complete("gradient_matching", SCALING, {"base_curvature": curvature})
    plain = reference.gradient_matching(weights, SCALING, spelled, EXAMPLES)
    expected = {}
    for w in weights:
        scale = 0.25 if w.name.startswith(("embeddings", "layer.0")) else 0.75
        expected[w.name] = w.base.double() + scale * (plain[w.name] - w.base.double())
    assert_close(merged, expected)


DEPTHS = {"a": 0.25, "b": 0.5}
SCALING = {"amazon": 0.7, "movie": 0.4, "nyt": 1.1}
INNER = [
    ("ties", {"density": 0.4}),
    ("regmean", {}),
    ("fisher", {}),
    ("dare", {"seed": 3}),
    ("linear", {"normalize": True}),
]


@pytest.mark.parametrize(("inner", "parameters"), INNER)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_any_method_s_step_can_grow_with_depth(inner, parameters, dtype, tolerance, make_pool, merge):
    weights = make_pool(1)
    plain = merge(inner, weights, SCALING, parameters)
    whole = merge(f"lines+{inner}", weights, SCALING, parameters | DEPTHS, dtype=dtype)
    parts = merge(f"lines+{inner}", weights, SCALING, parameters | DEPTHS, dtype=dtype, parts=3)
    for w in weights:
        scale = 0.25 if w.name.startswith(("embeddings", "layer.0")) else 0.75  # the test pool has two layers
        expected = (w.base + scale * (plain[w.name] - w.base)).to(dtype)
        torch.testing.assert_close(whole[w.name], expected, rtol=tolerance, atol=1e-6)
        torch.testing.assert_close(parts[w.name], whole[w.name], rtol=tolerance, atol=1e-6)


def test_writes_into_transposed_parameters(make_pool):
    weights = [w for w in make_pool(4) if w.base.dim() == 2]
    method = METHODS["lines+ties"]
    prepared = method.prepare(weights, Context())
    recipe = method.default_recipe(list(SCALING))
    plain = {w.name: torch.empty(w.base.shape) for w in weights}
    turned = {w.name: torch.empty(w.base.T.shape) for w in weights}
    prepared.merge(recipe.scaling, recipe.parameters, plain)
    prepared.merge(recipe.scaling, recipe.parameters, {name: value.T for name, value in turned.items()})
    assert all(torch.equal(plain[name], turned[name].T) for name in plain)


def test_a_modified_method_is_the_method_with_two_more_parameters():
    method, inner = METHODS["lines+regmean"], METHODS["regmean"]
    assert method is METHODS["lines+regmean"]
    assert (method.name, method.requires, method.scaling) == ("lines+regmean", inner.requires, inner.scaling)
    assert method.parameters.keys() == {*inner.parameters, "a", "b"}
    assert METHODS["lines+linear"].default_recipe(["x", "y"]).scaling == {"x": 0.5, "y": 0.5}
    recipe = method.default_recipe(["x", "y"])
    assert method.complete(recipe) == recipe
    assert "lines+regmean" in METHODS
    assert "lines+regmean" not in list(METHODS)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lines+tis", "Did you mean 'ties'"),
        ("lines+lines", r"leave out 'lines\+'"),
        ("svc+svc+ties", r"leave out 'svc\+'"),
        ("svc+lines+svc+ties", r"leave out 'svc\+'"),
        ("svc+lines+tis", "Did you mean 'ties'"),
        ("line+ties", r"unknown method 'line\+ties'"),
    ],
)
def test_what_cannot_be_modified_is_refused(name, message):
    assert name not in METHODS
    with pytest.raises(MethodError, match=message):
        METHODS[name]
