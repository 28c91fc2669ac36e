from merging.recipe import Recipe, flat, nested


def test_identity_is_of_content_and_not_of_order():
    first = Recipe("ties", {"a": 1.0, "b": 0.5}, {"density": 0.2, "trim": "global"})
    second = Recipe("ties", {"b": 0.5, "a": 1}, {"trim": "global", "density": 0.2})
    assert first.identity == second.identity
    assert first.members == ("a", "b")


def test_everything_in_a_recipe_counts():
    recipe = Recipe("ties", {"a": 1.0}, {"density": 0.2})
    others = [
        Recipe("dare", {"a": 1.0}, {"density": 0.2}),
        Recipe("ties", {"a": 0.9}, {"density": 0.2}),
        Recipe("ties", {"b": 1.0}, {"density": 0.2}),
        Recipe("ties", {"a": 1.0}, {"density": 0.3}),
        Recipe("ties", {"a": 1.0}),
    ]
    assert len({recipe.identity, *(other.identity for other in others)}) == 6


def test_groups_of_weights_belong_to_their_member():
    recipe = Recipe("ties", {"b@*": 0.2, "a": 1.0, "b@layers:0-2": 0.1})
    assert recipe.members == ("a", "b")
    assert list(recipe.as_dict()["scaling"]) == ["a", "b@*", "b@layers:0-2"]
    assert nested(recipe.scaling) == {"a": 1.0, "b": {"*": 0.2, "layers:0-2": 0.1}}
    assert flat(nested(recipe.scaling)) == recipe.scaling
    assert recipe.identity != Recipe("ties", {"a": 1.0, "b": 0.2}).identity
