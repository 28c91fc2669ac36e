"""Layers one after another are a slices file."""

import yaml

from flows.config.mergekit import translate
from flows.config.slices_file import SlicesFile
from flows.config.yaml_file import validate
from tests.flows.config.mergekit.configurations import NAMES, STACK


def test_layers_one_after_another_are_a_slices_file():
    result = translate(yaml.safe_load(STACK), "theirs.yaml", lambda path: NAMES).recipe
    assert result == {
        "base": "a",
        "members": {"b": "b"},
        "dtype": "bfloat16",
        "slices": [{"source": "base", "layers": "0-2"}, {"source": "b", "layers": "1-3"}],
        "rest": {"model.embed_tokens.weight": "base", "*": "b"},
    }
    validate(SlicesFile, result, "slices")


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
    result = translate(yaml.safe_load(text), "theirs.yaml", lambda path: NAMES).recipe
    assert result["slices"] == [
        {"source": "base", "layers": "0-1"},
        {"source": "base", "layers": "0", "scale": {"*o_proj*": 0.0}},
        {"source": "base", "layers": "1", "scale": {"*o_proj*": 0.0, "*down_proj*": 0.5}},
        {"source": "base", "layers": "2", "scale": {"*o_proj*": 0.0, "*down_proj*": 0.25}},
        {"source": "base", "layers": "3", "scale": {"*o_proj*": 0.0, "*down_proj*": 0.5}},
    ]
    assert "rest" not in result
    validate(SlicesFile, result, "slices")


def test_one_model_is_copied_whole():
    result = translate({"merge_method": "passthrough", "models": [{"model": "a"}]}, "f", lambda path: NAMES).recipe
    assert result == {"base": "a", "slices": [{"source": "base", "layers": "0-"}]}
