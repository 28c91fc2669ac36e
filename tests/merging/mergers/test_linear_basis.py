import pytest
import torch

from merging.errors import MethodError
from merging.mergers.linear_basis import compute_basis, is_linear
from merging.mergers.resident import ResidentMerger
from merging.methods import METHODS
from merging.recipe import Recipe

MEMBERS = ("one", "three", "two")
CONTRIBUTIONS = Recipe("regmean", dict.fromkeys(MEMBERS, 1.0), {"factors": "contribution", "rho": 0.7})
LINEAR = [
    *(recipe for name in METHODS if is_linear(recipe := METHODS[name].default_recipe(MEMBERS))),
    CONTRIBUTIONS,
]


def test_the_linear_methods_are_known():
    assert {"task_arithmetic", "lines", "regmean"} <= {recipe.method for recipe in LINEAR}
    assert not is_linear(METHODS["ties"].default_recipe(MEMBERS))
    assert not is_linear(Recipe("regmean", dict.fromkeys(MEMBERS, 1.0), {"factors": "gram"}))


@pytest.mark.parametrize("recipe", LINEAR, ids=lambda recipe: recipe.method)
def test_any_merge_is_the_base_and_a_sum_over_the_basis(tiny_material, recipe):
    material = tiny_material.material
    recipe = material.check(recipe)
    basis = compute_basis(material, recipe.method, MEMBERS, recipe.parameters, torch.device("cpu"))
    factors = {"one": 0.4, "two": -0.3, "three": 1.2}
    out = {name: torch.empty(info.shape) for name, info in material.pool.weights.items()}
    ResidentMerger(material, out).merge(Recipe(recipe.method, factors, recipe.parameters))
    for name, merged in out.items():
        expected = material.pool.base_weight(name).double()
        for index, member in enumerate(basis.members):
            expected = expected + factors[member] * basis.vectors[name][index].double()
        assert torch.allclose(merged.double(), expected, atol=1e-6), name


def test_a_method_without_a_basis_is_an_error_that_names_those_that_have_one(tiny_material):
    with pytest.raises(MethodError, match="'ties'.*not linear.*task_arithmetic"):
        compute_basis(tiny_material.material, "ties", MEMBERS, {}, torch.device("cpu"))
