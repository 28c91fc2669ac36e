"""Gradients, filters and slices mean the same in every weight."""

import pytest
import yaml

from merging.mergers.weight_groups import split
from merging.recipe import Recipe, flat
from tests.flows.config.mergekit.configurations import GRADIENT, LAYERS, NAMES, convert, task_vectors


def factor_of(recipe, member):
    """Weight → factor, as the merger reads the groups."""
    scaling = flat({member: recipe["scaling"][member]})
    return {name: own[member] for names, own in split(NAMES, Recipe("linear", scaling)) for name in names}


def reference(setting, name):
    """mergekit's documented rule, for one list over the layers: lists are interpolated, and what has no layer is at 0."""
    parts = name.split(".")
    depth = next((int(part) for part in parts if part.isdigit()), None)
    t = 0 if depth is None else depth / (LAYERS - 1)
    place = t * (len(setting) - 1)
    low = min(int(place), len(setting) - 2)
    return setting[low] + (place - low) * (setting[low + 1] - setting[low])


def test_gradients_by_filter_are_one_group_a_layer_and_filter():
    recipe = convert(GRADIENT).recipe
    assert recipe["dtype"] == "bfloat16"
    result = factor_of(recipe, "a")
    for name in NAMES:
        if "self_attn" in name:
            expected = reference([0, 0.5, 0.3, 0.7, 1], name)
        elif "mlp" in name:
            expected = reference([1, 0.5, 0.7, 0.3, 0], name)
        else:
            expected = 0.5
        assert result[name] == pytest.approx(expected), name
        assert factor_of(recipe, "b")[name] == pytest.approx(1 - expected)
    assert recipe["scaling"]["a"]["*.1.*mlp*"] == pytest.approx(reference([1, 0.5, 0.7, 0.3, 0], NAMES[8]))


def test_a_gradient_alone_is_one_group_a_layer():
    text = task_vectors("task_arithmetic").replace("weight: 0.5", "weight: [0, 1]")
    recipe = convert(text).recipe
    groups = recipe["scaling"]["one"]
    assert list(groups) == ["layers:0", "layers:1", "layers:2", "layers:3", "*"]
    assert list(groups.values()) == pytest.approx([0, 1 / 3, 2 / 3, 1, 0])
    assert recipe["scaling"]["two"] == 1.0
    result = factor_of(recipe, "one")
    assert all(result[name] == pytest.approx(reference([0, 1], name)) for name in NAMES)


@pytest.mark.parametrize(
    "setting",
    [
        "[{filter: mlp, value: 0.2}, {filter: self_attn, value: 0.4}, {value: 0.6}]",
        "[{filter: mlp, value: 0.2}, {filter: '*', value: 0.6}]",
        "[{filter: up_proj, value: 0.2}, {filter: mlp, value: 0.4}, {value: 0.6}]",  # the first that fits wins
        "[{filter: mlp, value: [0.2, 0.8]}, {value: [1, 0.5]}]",
        "[{filter: layers.1., value: 0.9}, {value: 0.1}]",
        "{filter: null, value: 0.3}",
        "[{filter: lm_head, value: 1.0}, {filter: embed_tokens, value: 0.7}, {value: 0.5}]",
    ],
)
def test_filters_mean_the_same_in_every_weight(setting):
    text = task_vectors("task_arithmetic").replace("weight: 0.5", f"weight: {setting}")
    result = factor_of(convert(text).recipe, "one")
    given = yaml.safe_load(setting)
    for name in NAMES:
        chosen = next(
            entry["value"]
            for entry in (given if isinstance(given, list) else [given])
            if entry.get("filter") in (None, "*") or entry["filter"] in name
        )
        expected = reference(chosen, name) if isinstance(chosen, list) else chosen
        assert result[name] == pytest.approx(expected), name


def test_what_no_filter_chooses_has_the_next_place_s_value():
    text = task_vectors("task_arithmetic", "parameters: {weight: 0.3}").replace(
        "weight: 0.5", "weight: [{filter: mlp, value: 0.2}]"
    )
    result = factor_of(convert(text).recipe, "one")
    assert {result["model.layers.2.mlp.up_proj.weight"], result["model.norm.weight"]} == {0.2, 0.3}


def test_slices_that_follow_each_other_have_parameters_of_their_own():
    text = """
merge_method: linear
base_model: a
slices:
  - sources: [{model: a, layer_range: [0, 3], parameters: {weight: [0, 1]}}, {model: b, layer_range: [0, 3]}]
    parameters: {weight: 0.25}
  - sources: [{model: a, layer_range: [3, 4]}, {model: b, layer_range: [3, 4]}]
parameters: {weight: 0.75}
"""
    recipe = convert(text).recipe
    assert recipe["scaling"]["a"] == pytest.approx(
        {"layers:0": 0, "layers:1": 0.5, "layers:2": 1, "layers:3": 0.75, "*": 0.75}
    )
    assert recipe["scaling"]["b"] == pytest.approx(
        {"layers:0": 0.25, "layers:1": 0.25, "layers:2": 0.25, "layers:3": 0.75, "*": 0.75}
    )


def test_a_filter_that_fits_no_weight_is_noted():
    result = convert(GRADIENT.replace("self_attn", "attention"))
    assert any("filter 'attention' fits none" in note for note in result.notes)
    assert not any("'mlp'" in note for note in result.notes)
