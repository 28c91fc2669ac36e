import pytest

from merging.errors import MethodError
from merging.mergers.weight_groups import check, collapsed, depth_groups, factor, pattern_groups, split
from merging.recipe import Recipe

NAMES = [
    "embeddings.word.weight",
    *(f"layer.{number}.{part}.weight" for number in range(5) for part in ("attention", "output")),
    "pooler.weight",
]


def test_a_recipe_without_groups_has_one():
    assert split(NAMES, Recipe("ties", {"a": 0.5, "b": 0.2})) == [(NAMES, {"a": 0.5, "b": 0.2})]


def test_every_weight_has_the_factor_of_its_group():
    scaling = {"a@layers:0-2": 0.1, "a@layers:3-": 0.2, "b@*attention*": 0.3, "b@*": 0.4, "c": 0.5}
    result = split(NAMES, Recipe("ties", scaling))
    assert sorted(name for names, _ in result for name in names) == sorted(NAMES)
    for names, factors in result:
        for name in names:
            number = next((int(part) for part in name.split(".") if part.isdigit()), 0 if "embed" in name else 9)
            assert factors == {"a": 0.1 if number < 3 else 0.2, "b": 0.3 if "attention" in name else 0.4, "c": 0.5}
    assert len(result) == 4


def test_groups_of_a_part_are_those_of_the_whole():
    scaling = {"a@layers:0-2": 0.1, "a@layers:3-": 0.2, "b@*attention*": 0.3, "b@*": 0.4}
    whole = {name: factors for names, factors in split(NAMES, Recipe("ties", scaling)) for name in names}
    for name in NAMES:
        assert split([name], Recipe("ties", scaling)) == [([name], whole[name])]


def test_the_order_of_keys_says_nothing():
    scaling = {"a@layers:2": 0.1, "a@*": 0.2, "a@layers:3-": 0.4, "b": 1.0}
    first, second = Recipe("ties", scaling), Recipe("ties", dict(reversed(scaling.items())))
    assert first.identity == second.identity
    assert split(NAMES, first) == split(NAMES, second)


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"a@layers:0-2": 0.1}, "'layer.3.attention.weight' has no scaling factor of 'a': add 'a@\\*'"),
        ({"a@layers:0-4": 0.1}, "'pooler.weight' has no scaling factor of 'a'"),
        ({"a@layers:0-2": 0.1, "a@layers:2-": 0.2}, "'layer.2.attention.weight' has two scaling factors of 'a'"),
        ({"a@*output*": 0.1, "a@*weight": 0.2}, "must have no weight in common"),
        ({"a": 0.1, "a@layers:0-2": 0.2}, "write 'a@\\*' for the rest"),
        ({"a@layers:3-1": 0.1, "a@*": 0.2}, "'layers:3-1' names no layers"),
        ({"a@layers:two": 0.1, "a@*": 0.2}, "names no layers"),
        ({"a@": 0.1, "a@*": 0.2}, "names no group"),
        ({"a@*atention*": 0.1, "a@*": 0.2}, r"'\*atention\*' has none of the merged weights"),
        ({"a@layers:7": 0.1, "a@*": 0.2}, "'layers:7' has none of the merged weights"),
    ],
)
def test_mistakes_name_weight_and_remedy(scaling, message):
    with pytest.raises(MethodError, match=message):
        check(NAMES, Recipe("ties", scaling))


@pytest.mark.parametrize(
    ("count", "groups"),
    [
        (1, ("layers:0-",)),
        (2, ("layers:0-1", "layers:2-")),
        (3, ("layers:0", "layers:1-2", "layers:3-")),
        (None, ("layers:0", "layers:1", "layers:2", "layers:3", "layers:4-")),
        (9, ("layers:0", "layers:1", "layers:2", "layers:3", "layers:4-")),
    ],
)
def test_groups_by_depth_have_every_weight(count, groups):
    assert depth_groups(NAMES, count) == groups
    given = Recipe("ties", {f"a@{group}": 0.1 for group in groups})
    check(NAMES, given)
    assert sum(len(names) for names, _ in split(NAMES, given)) == len(NAMES)


def test_a_model_without_layers_has_no_depth():
    with pytest.raises(MethodError, match="numbered in the weights' names"):
        depth_groups(["embeddings.weight", "head.weight"], 2)


def test_groups_by_pattern_have_every_weight():
    assert pattern_groups(NAMES, ["*attention*", "embed*"]) == ("*attention*", "embed*", "*")
    assert pattern_groups(NAMES, ["layer.*", "embed*", "pool*"]) == ("layer.*", "embed*", "pool*")
    assert pattern_groups(NAMES, ["*embed*", "*"]) == ("*embed*", "*")
    with pytest.raises(MethodError, match="in common"):
        pattern_groups(NAMES, ["*attention*", "layer.*"])
    with pytest.raises(MethodError, match="none of the merged weights"):
        pattern_groups(NAMES, ["*atention*"])


def test_equal_factors_collapse_to_one():
    assert collapsed({"a@x": 0.5, "a@*": 0.5, "b@x": 0.1, "b@*": 0.2, "c": 1.0}) == {
        "a": 0.5,
        "b@x": 0.1,
        "b@*": 0.2,
        "c": 1.0,
    }
    assert factor({"a": 0.5, "b@x": 0.1}, "a", "x") == 0.5
    assert factor({"a": 0.5, "b@x": 0.1}, "b", "x") == 0.1
    assert factor({"a": 0.5, "b@x": 0.1}, "b", "y") is None
