import pytest
import torch

from merging.methods import Weight


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
