"""Every documented form of mergekit's YAML becomes a recipe that means the same, or one error that names the key."""

import pytest
import yaml

from flows.config.mergekit import is_mergekit
from merging.errors import SettingsError
from tests.flows.config.mergekit.configurations import GRADIENT, STACK, convert, task_vectors


def refusal(text):
    with pytest.raises(SettingsError) as caught:
        convert(text)
    return str(caught.value)


def test_a_recipe_file_is_told_from_a_configuration():
    assert is_mergekit(yaml.safe_load(task_vectors("ties")))
    assert not is_mergekit({"base": "b", "members": {}, "method": "ties"})


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ("tokenizer_source: base", {}),
        ("tokenizer_source: union", {"vocabulary": "union"}),
        ("tokenizer_source: b", {}),
        ("tokenizer_source: two", {"files_from": {"tokenizer": "two"}}),
        ("tokenizer: {source: union}", {"vocabulary": "union"}),
        ("tokenizer: {source: two}", {"files_from": {"tokenizer": "two"}}),
        ("tokenizer: {}", {"vocabulary": "union"}),
        ("chat_template: auto", {"files_from": {"chat_template": "one"}}),
        ("dtype: float16", {"dtype": "float16"}),
        ("dtype: torch.float32\nout_dtype: bfloat16", {"dtype": "bfloat16"}),
    ],
)
def test_tokenizer_template_and_dtype(extra, expected):
    templates = {"b": "old", "one": "new", "two": "new"}
    recipe = convert(task_vectors("ties", extra), template=templates.get).recipe
    assert {key: recipe[key] for key in ("vocabulary", "files_from", "dtype") if key in recipe} == expected


def test_references_to_models():
    text = """
merge_method: task_arithmetic
base_model: {model: {path: org/base}}
models:
  - {model: org/base+me/adapter, parameters: {weight: 1}}
  - {model: {model: {path: x/base}, lora: {path: y/lora}}, parameters: {weight: 1}}
  - {model: weird name!, parameters: {weight: 1}}
"""
    recipe = convert(text).recipe
    assert recipe["base"] == "org/base"
    assert recipe["members"] == {
        "adapter": "org/base+me/adapter",
        "lora": "x/base+y/lora",
        "weird-name-": "weird name!",
    }


def test_an_adapter_whose_model_has_no_part_in_the_merge():
    text = "merge_method: linear\nmodels: [{model: m+a}, {model: m+b}]\nparameters: {weight: 1}"
    recipe = convert(text).recipe
    assert (recipe["base"], recipe["members"]) == ("m", {"a": "m+a", "b": "m+b"})


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        (task_vectors("tise"), ["merge_method: unknown method 'tise'. Did you mean 'ties'?"]),
        (task_vectors("passthrough"), ["models: passthrough copies one model at a time"]),
        (STACK + "parameters: {scale: 0.5}", ["scale: mergekit scales 'model.embed_tokens.weight' too"]),
        (task_vectors("ties", "moduls: {}"), ["moduls: unknown key. Did you mean 'modules'?"]),
        (task_vectors("ties", "modules: {}"), ["modules:"]),
        (
            task_vectors("ties", "parameters: {densty: 0.3}"),
            ["parameters.densty: ties has no such parameter. Did you mean"],
        ),
        (task_vectors("ties").replace("weight: 0.5, ", ""), ["models.0.parameters.weight: missing"]),
        (
            task_vectors("ties").replace("weight: 0.5", "weight: heavy"),
            ["models.0.parameters.weight: expected a number"],
        ),
        (task_vectors("ties", density="[0.2, 0.8]"), ["parameters.density: ties has one for all weights"]),
        (task_vectors("ties", "parameters: {rescale: true}"), ["parameters.rescale"]),
        (task_vectors("breadcrumbs", "parameters: {rescale: true}"), ["parameters.rescale"]),
        (
            "merge_method: nearswap\nbase_model: b\nmodels: [{model: x}, {model: y}]\nparameters: {t: 1}",
            ["nearswap is between"],
        ),
        (task_vectors("ties", "tokenizer: {source: union, tokens: {x: {source: one}}}"), ["tokenizer.tokens"]),
        (task_vectors("ties", "tokenizer: {pad_to_multiple_of: 8}"), ["tokenizer.pad_to_multiple_of"]),
        (task_vectors("ties", "tokenizer_source: nobody"), ["tokenizer_source: 'nobody' is none of the models"]),
        (task_vectors("ties", "chat_template: chatml"), ["chat_template:"]),
        (task_vectors("ties", "dtype: float64\nout_dtype: bf16"), ["dtype: 'float64'", "out_dtype: 'bf16'"]),
        (task_vectors("ties").replace("model: two", "model: one"), ["models: 'one' stands twice"]),
        (task_vectors("ties").replace("base_model: b", ""), ["base_model: missing: ties needs one"]),
        (
            task_vectors("ties").replace("base_model: b", "base_model: {model: {path: ./b, revision: v2}}"),
            ["base_model.model: a revision is of a model on the Hub"],
        ),
        (task_vectors("ties").replace("base_model: b", "base_model: b+c"), ["base_model: an adapter on a model"]),
        (
            "merge_method: slerp\nbase_model: a\nmodels: [{model: b}, {model: c}]\nparameters: {t: 1}",
            ["slerp is between two"],
        ),
        ("merge_method: slerp\nbase_model: a\nmodels: [{model: b}]", ["t: missing"]),
        ("merge_method: linear", ["models: either `models` or `slices` is needed"]),
        (GRADIENT.replace("[0, 4]", "[0, 3]"), ["slices: they end at layer 3 of 4"]),
        (
            GRADIENT.replace("{model: a, layer_range: [0, 4]}", "{model: a, layer_range: [1, 5]}"),
            ["slices.0.sources: layers"],
        ),
        (GRADIENT.replace("[0, 4]", "4", 1), ["slices.0.sources.0.layer_range"]),
        (STACK.replace("dtype", "  - nothing\ndtype"), ["slices.2: expected `key: value` entries"]),
    ],
)
def test_what_cannot_be_expressed_is_one_error_that_names_it(text, messages):
    reported = refusal(text)
    assert reported.startswith("theirs.yaml is mergekit's")
    for message in messages:
        assert message in reported, reported


def test_all_mistakes_are_in_one_error():
    reported = refusal(task_vectors("ties", "nonsense: 1\ntokenizer_source: nobody\nparameters: {wieght: 1}"))
    assert "nonsense" in reported
    assert "wieght" in reported


def test_what_mergekit_ignores_is_noted():
    result = convert(task_vectors("ties", "name: mine\nparameters: {int8_mask: true, t: 0.5}"))
    assert len(result.notes) == 3
    assert any("int8_mask" in note for note in result.notes)
