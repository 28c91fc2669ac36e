"""Configurations of mergekit's, and what becomes of them."""

import yaml

from flows.config.mergekit import translate
from flows.config.recipe_file import RecipeFile
from flows.config.yaml_file import validate

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
STACK = """
merge_method: passthrough
slices:
  - sources: [{model: a, layer_range: [0, 3]}]
  - sources: [{model: b, layer_range: [1, 4]}]
dtype: bfloat16
"""


def convert(text, names=NAMES, template=lambda path: None):
    """A configuration's translation, whose recipe is valid."""
    result = translate(yaml.safe_load(text), "theirs.yaml", lambda path: names, template)
    validate(RecipeFile, result.recipe, "recipe").recipe()  # parameters and their ranges, too
    return result


def task_vectors(method, extra="", density=0.25, more=""):
    """A configuration of two models whose task vectors are summed, with weights 0.5 and 1."""
    models = "".join(
        f"  - model: {name}\n    parameters: {{weight: {weight}, density: {density}{more}}}\n"
        for name, weight in (("one", 0.5), ("two", 1))
    )
    return f"merge_method: {method}\nbase_model: b\nmodels:\n{models}{extra}"
