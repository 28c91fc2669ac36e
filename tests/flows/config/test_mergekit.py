"""Every documented form of mergekit's YAML becomes a recipe that means the same, or one error that names the key."""

import pytest
import yaml

from flows.config.mergekit import is_mergekit, translate
from flows.config.recipe_file import RecipeFile
from flows.config.slices_file import SlicesFile
from flows.config.yaml_file import validate
from merging.errors import MethodError, SettingsError
from merging.mergers.weight_groups import split
from merging.methods import METHODS
from merging.methods.mergekit_names import MERGEKIT_NAMES
from merging.recipe import Recipe, flat

LAYERS = 4
NAMES = [
    "model.embed_tokens.weight",
    *(
        f"model.layers.{layer}.{part}.weight"
        for layer in range(LAYERS)
        for part in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm")
    ),
    "model.norm.weight",
    "lm_head.weight",
]


def convert(text, names=NAMES, template=lambda path: None):
    found = translate(yaml.safe_load(text), "theirs.yaml", lambda path: names, template)
    validate(RecipeFile, found.recipe, "recipe").recipe()  # parameters and their ranges, too
    return found


def refusal(text):
    with pytest.raises(SettingsError) as caught:
        convert(text)
    return str(caught.value)


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


DENSITIES = ("density", "drop", "gamma", "epsilon")


def task_vectors(method, extra="", density=0.25, more=""):
    models = "".join(
        f"  - model: {name}\n    parameters: {{weight: {weight}, density: {density}{more}}}\n"
        for name, weight in (("one", 0.5), ("two", 1))
    )
    return f"merge_method: {method}\nbase_model: b\nmodels:\n{models}{extra}"


def test_a_recipe_file_is_told_from_a_configuration():
    assert is_mergekit(yaml.safe_load(task_vectors("ties")))
    assert not is_mergekit({"base": "b", "members": {}, "method": "ties"})


@pytest.mark.parametrize(
    ("method", "extra", "expected"),
    [
        ("ties", "", ("ties", [0.5, 1.0], {"density": 0.25, "lambda": 1.0, "trim": "tensor", "disjoint": "mean"})),
        (
            "ties",
            "parameters: {normalize: false, lambda: 2, int8_mask: true}",
            ("ties", [0.5, 1.0], {"density": 0.25, "lambda": 2.0, "trim": "tensor", "disjoint": "sum"}),
        ),
        ("task_arithmetic", "", ("task_arithmetic", [0.5, 1.0], None)),
        ("task_arithmetic", "parameters: {lambda: 0.5}", ("task_arithmetic", [0.25, 0.5], None)),
        ("task_arithmetic", "parameters: {normalize: true}", ("task_arithmetic", [1 / 3, 2 / 3], None)),
        ("dare_linear", "", ("dare", [0.5, 1.0], {"drop": 0.75, "entries": "all", "rescale": "l1"})),
        (
            "dare_linear",
            "parameters: {rescale: false, lambda: 2}",
            ("dare", [1.0, 2.0], {"drop": 0.75, "entries": "all", "rescale": "none"}),
        ),
        ("dare_ties", "", ("dare", [0.5, 1.0], {"drop": 0.75, "entries": "elected", "rescale": "l1"})),
        (
            "dare_ties",
            "parameters: {normalize: true, lambda: 2}",
            ("dare", [0.5, 1.0], {"drop": 0.75, "entries": "elected_mean", "rescale": "l1", "lambda": 2.0}),
        ),
        ("breadcrumbs", "", ("breadcrumbs", [0.5, 1.0], {"density": 0.25, "gamma": 0.01, "entries": "all"})),
        ("breadcrumbs_ties", "", ("breadcrumbs", [0.5, 1.0], {"density": 0.25, "gamma": 0.01, "entries": "elected"})),
        (
            "breadcrumbs_ties",
            "parameters: {normalize: true, gamma: 0.1}",
            ("breadcrumbs", [0.5, 1.0], {"density": 0.25, "gamma": 0.1, "entries": "elected_mean"}),
        ),
        (
            "della_linear",
            "parameters: {normalize: true}",
            ("della", [1 / 3, 2 / 3], {"density": 0.25, "epsilon": 0.15, "entries": "all", "rescale": "l1"}),
        ),
        (
            "della",
            "parameters: {epsilon: 0.05}",
            ("della", [0.5, 1.0], {"density": 0.25, "epsilon": 0.05, "entries": "elected_mean", "rescale": "l1"}),
        ),
    ],
)
def test_methods_of_task_vectors(method, extra, expected):
    recipe = convert(task_vectors(method, extra)).recipe
    name, factors, parameters = expected
    assert recipe["method"] == name
    assert list(recipe["scaling"].values()) == pytest.approx(factors)
    assert recipe.get("parameters") == (None if parameters is None else pytest.approx(parameters))
    assert recipe["base"] == "b"
    assert recipe["members"] == {"one": "one", "two": "two"}


@pytest.mark.parametrize(
    ("method", "more", "expected"),
    [
        ("ties", "", {"density": 0.5, "density@two": 0.25}),
        ("dare_ties", "", {"drop": 0.5, "drop@two": 0.75}),
        ("breadcrumbs", ", gamma: 0.6", {"density": 0.5, "density@two": 0.25, "gamma": 0.5, "gamma@two": 0.6}),
        ("della", ", epsilon: 0.1", {"density": 0.5, "density@two": 0.25, "epsilon": 0.1}),
    ],
)
def test_thinning_may_be_a_member_s_own(method, more, expected):
    recipe = convert(task_vectors(method, more=more).replace("0.25", "0.5", 1)).recipe
    found = {key: value for key, value in recipe["parameters"].items() if key.partition("@")[0] in DENSITIES}
    assert found == pytest.approx(expected)


@pytest.mark.parametrize(
    ("method", "count", "parameters", "name", "expected"),
    [
        ("sce", 2, "select_topk: 0.5, int8_mask: true", "sce", {"select": 0.5}),
        ("sce", 2, "", "sce", {"select": 1.0}),
        ("nearswap", 1, "t: 1e-3", "nearswap", {"t": 1e-3}),
        ("arcee_fusion", 1, "", "arcee_fusion", None),
        ("ram", 2, "", "ram", {"epsilon": 1e-5}),
        ("ramplus_tl", 2, "r: 0.2", "ram_plus", {"r": 0.2, "alpha": 0.2, "epsilon": 1e-5}),
        ("model_stock", 2, "filter_wise: true", "model_stock", {"over": "rows"}),
        ("nuslerp", 2, "weight: 1", "nuslerp", {"space": "task_vectors", "over": "tensor"}),
        (
            "nuslerp",
            2,
            "weight: 1, nuslerp_flatten: false",
            "nuslerp",
            {"space": "task_vectors", "over": "rows"},
        ),
        (
            "nuslerp",
            2,
            "weight: 1, nuslerp_flatten: false, nuslerp_row_wise: true",
            "nuslerp",
            {"space": "task_vectors", "over": "columns"},
        ),
        ("karcher", 2, "max_iter: 5", "karcher", None),
    ],
)
def test_methods_without_weights_or_with_their_own_parameters(method, count, parameters, name, expected):
    models = "".join(f"  - model: m{number}\n" for number in range(count))
    base = "" if method == "karcher" else "base_model: b\n"
    recipe = convert(f"merge_method: {method}\n{base}models:\n{models}parameters: {{{parameters}}}\n").recipe
    assert recipe["method"] == name
    assert recipe.get("parameters") == (None if expected is None else pytest.approx(expected))
    assert recipe["scaling"] == {f"m{number}": 1.0 for number in range(count)}


@pytest.mark.parametrize("method", ["dare_ties", "della", "breadcrumbs_ties", "ties"])
def test_a_density_of_one_thins_nothing_and_elects_signs(method):
    recipe = convert(task_vectors(method, "parameters: {normalize: true}", density=1)).recipe
    assert recipe["method"] == "ties"
    assert recipe["parameters"] == {"density": 1.0, "lambda": 1.0, "trim": "tensor", "disjoint": "mean"}


@pytest.mark.parametrize("method", ["dare_linear", "della_linear", "breadcrumbs"])
def test_a_density_of_one_is_task_arithmetic(method):
    assert convert(task_vectors(method, density=1.0)).recipe["method"] == "task_arithmetic"


def test_outliers_give_way_to_the_density_as_in_mergekit():
    recipe = convert(task_vectors("breadcrumbs", density=0.95, more=", gamma: 0.2")).recipe
    assert recipe["parameters"]["gamma"] == pytest.approx(0.05)


def test_linear_normalises_unless_told_and_its_base_is_a_member():
    text = "merge_method: linear\nmodels:\n  - {model: org/a, parameters: {weight: 1}}\n"
    text += "  - {model: x/a, parameters: {weight: '3e-1'}}\n"
    recipe = convert(text).recipe
    assert recipe == {
        "base": "org/a",
        "members": {"a": "org/a", "a-2": "x/a"},
        "method": "linear",
        "scaling": {"a": 1.0, "a-2": 0.3},
        "parameters": {"normalize": True},
    }
    assert convert(text + "parameters: {normalize: false}").recipe["parameters"] == {"normalize": False}
    assert convert(text + "base_model: x/a").recipe["base"] == "x/a"


def test_a_weight_for_all_models_stands_at_the_file_s_end():
    text = "merge_method: linear\nmodels: [{model: a}, {model: b, parameters: {weight: 2}}]\nparameters: {weight: 1}\n"
    assert convert(text).recipe["scaling"] == {"a": 1.0, "b": 2.0}


def test_slerp_goes_from_the_base_to_the_other():
    text = "merge_method: slerp\nbase_model: b\nmodels: [{model: a}, {model: b}]\nparameters: {t: 0.25}\n"
    for given in (text, text.replace(", {model: b}", "")):  # mergekit adds the base
        recipe = convert(given).recipe
        assert recipe["scaling"] == {"a": 0.25, "b": 0.75}
        assert recipe["parameters"] == {"space": "weights"}


GRADIENT = """
merge_method: slerp
base_model: b
slices:
  - sources:
      - {model: b, layer_range: [0, 4]}
      - {model: a, layer_range: [0, 4]}
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5
dtype: bfloat16
"""


def test_gradients_by_filter_are_one_group_a_layer_and_filter():
    recipe = convert(GRADIENT).recipe
    assert recipe["dtype"] == "bfloat16"
    found = factor_of(recipe, "a")
    for name in NAMES:
        if "self_attn" in name:
            expected = reference([0, 0.5, 0.3, 0.7, 1], name)
        elif "mlp" in name:
            expected = reference([1, 0.5, 0.7, 0.3, 0], name)
        else:
            expected = 0.5
        assert found[name] == pytest.approx(expected), name
        assert factor_of(recipe, "b")[name] == pytest.approx(1 - expected)
    assert recipe["scaling"]["a"]["*.1.*mlp*"] == pytest.approx(reference([1, 0.5, 0.7, 0.3, 0], NAMES[8]))


def test_a_gradient_alone_is_one_group_a_layer():
    text = task_vectors("task_arithmetic").replace("weight: 0.5", "weight: [0, 1]")
    recipe = convert(text).recipe
    groups = recipe["scaling"]["one"]
    assert list(groups) == ["layers:0", "layers:1", "layers:2", "layers:3", "*"]
    assert list(groups.values()) == pytest.approx([0, 1 / 3, 2 / 3, 1, 0])
    assert recipe["scaling"]["two"] == 1.0
    found = factor_of(recipe, "one")
    assert all(found[name] == pytest.approx(reference([0, 1], name)) for name in NAMES)


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
    found = factor_of(convert(text).recipe, "one")
    given = yaml.safe_load(setting)
    for name in NAMES:
        chosen = next(
            entry["value"]
            for entry in (given if isinstance(given, list) else [given])
            if entry.get("filter") in (None, "*") or entry["filter"] in name
        )
        expected = reference(chosen, name) if isinstance(chosen, list) else chosen
        assert found[name] == pytest.approx(expected), name


def test_what_no_filter_chooses_has_the_next_place_s_value():
    text = task_vectors("task_arithmetic", "parameters: {weight: 0.3}").replace(
        "weight: 0.5", "weight: [{filter: mlp, value: 0.2}]"
    )
    found = factor_of(convert(text).recipe, "one")
    assert {found["model.layers.2.mlp.up_proj.weight"], found["model.norm.weight"]} == {0.2, 0.3}


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


def test_model_stock_multislerp_and_a_base_among_the_models():
    models = "models: [{model: b}, {model: x}, {model: y}]\nbase_model: b\n"
    recipe = convert("merge_method: model_stock\n" + models).recipe
    assert (recipe["method"], recipe["scaling"]) == ("model_stock", {"x": 1.0, "y": 1.0})
    recipe = convert("merge_method: multislerp\nparameters: {weight: 0.5}\n" + models).recipe
    assert (recipe["method"], recipe["scaling"]) == ("multi_slerp", {"x": 0.5, "y": 0.5})


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


STACK = """
merge_method: passthrough
slices:
  - sources: [{model: a, layer_range: [0, 3]}]
  - sources: [{model: b, layer_range: [1, 4]}]
dtype: bfloat16
"""


def test_layers_one_after_another_are_a_slices_file():
    found = translate(yaml.safe_load(STACK), "theirs.yaml", lambda path: NAMES).recipe
    assert found == {
        "base": "a",
        "members": {"b": "b"},
        "dtype": "bfloat16",
        "slices": [{"source": "base", "layers": "0-2"}, {"source": "b", "layers": "1-3"}],
        "rest": {"model.embed_tokens.weight": "base", "*": "b"},
    }
    validate(SlicesFile, found, "slices")


def test_scales_of_layers_by_filter_and_depth():
    text = """
merge_method: passthrough
slices:
  - sources: [{model: a, layer_range: [0, 2]}]
  - sources:
      - model: a
        layer_range: [0, 4]
        parameters: {scale: [{filter: o_proj, value: 0}, {filter: down_proj, value: [1, 0.5, 0.25, 0.5]}, {value: 1}]}
"""
    found = translate(yaml.safe_load(text), "theirs.yaml", lambda path: NAMES).recipe
    assert found["slices"] == [
        {"source": "base", "layers": "0-1"},
        {"source": "base", "layers": "0", "scale": {"*o_proj*": 0.0}},
        {"source": "base", "layers": "1", "scale": {"*o_proj*": 0.0, "*down_proj*": 0.5}},
        {"source": "base", "layers": "2", "scale": {"*o_proj*": 0.0, "*down_proj*": 0.25}},
        {"source": "base", "layers": "3", "scale": {"*o_proj*": 0.0, "*down_proj*": 0.5}},
    ]
    assert "rest" not in found
    validate(SlicesFile, found, "slices")


def test_one_model_is_copied_whole():
    found = translate({"merge_method": "passthrough", "models": [{"model": "a"}]}, "f", lambda path: NAMES).recipe
    assert found == {"base": "a", "slices": [{"source": "base", "layers": "0-"}]}


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
        (task_vectors("ties").replace("base_model: b", "base_model: o/b@v2"), ["base_model: a revision ('v2')"]),
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
    ],
)
def test_what_cannot_be_expressed_is_one_error_that_names_it(text, messages):
    told = refusal(text)
    assert told.startswith("theirs.yaml is mergekit's")
    for message in messages:
        assert message in told, told


def test_all_mistakes_are_in_one_error():
    told = refusal(task_vectors("ties", "nonsense: 1\ntokenizer_source: nobody\nparameters: {wieght: 1}"))
    assert "nonsense" in told
    assert "wieght" in told


def test_a_filter_that_fits_no_weight_is_noted():
    found = convert(GRADIENT.replace("self_attn", "attention"))
    assert any("filter 'attention' fits none" in note for note in found.notes)
    assert not any("'mlp'" in note for note in found.notes)


def test_what_mergekit_ignores_is_noted():
    found = convert(task_vectors("ties", "name: mine\nparameters: {int8_mask: true, t: 0.5}"))
    assert len(found.notes) == 3
    assert any("int8_mask" in note for note in found.notes)


@pytest.mark.parametrize("name", MERGEKIT_NAMES)
def test_mergekit_s_names_are_methods_of_a_recipe_and_hints_elsewhere(name):
    method, implied = MERGEKIT_NAMES[name]
    value = {"base": "b", "members": {"a": "a"}, "method": name}
    recipe = validate(RecipeFile, value, "recipe")
    assert (recipe.method, recipe.parameters) == (method, dict(implied))
    recipe.recipe()
    for key in implied:
        with pytest.raises(SettingsError, match=f"'{name}' is '{method}' with {key}"):
            validate(RecipeFile, value | {"parameters": {key: "elected_mean"}}, "recipe")
    with pytest.raises(MethodError, match=f"unknown method '{name}'. It is mergekit's name of '{method}'"):
        METHODS[name]
