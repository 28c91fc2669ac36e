from merging.methods import METHODS


def test_weights_are_taken_as_they_are_unless_they_are_to_be_normalised(make_pool, merge, assert_close):
    weights = make_pool()
    factors = {"amazon": 1.0, "nyt": 3.0}
    assert_close(
        merge("linear", weights, factors), {w.name: w.members["amazon"] + 3 * w.members["nyt"] for w in weights}
    )
    assert_close(merge("linear", weights, factors, {"normalize": True}), merge("average", weights, factors))


def test_its_default_is_the_mean(make_pool, merge, assert_close):
    recipe = METHODS["linear"].default_recipe(["amazon", "nyt"])
    weights = make_pool()
    assert_close(merge("linear", weights, recipe.scaling), merge("average", weights, {"amazon": 1.0, "nyt": 1.0}))
