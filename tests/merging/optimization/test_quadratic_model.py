import numpy as np
import pytest
import torch

from merging.errors import MethodError
from merging.mergers import weight_groups
from merging.mergers.linear_basis import compute_basis
from merging.mergers.material import Material
from merging.methods import METHODS
from merging.optimization.quadratic_model import Quadratic, minimiser, quadratics

MEMBERS = ("one", "three", "two")


def task_vectors(pool, name):
    base = pool.base_weight(name).double()
    return {member: pool.member_weight(member, name).double() - base for member in MEMBERS}


def plain_prediction(material, kind, member, moved):
    """½ (θ − θ_t)ᵀ H_t (θ − θ_t) in float64, weight by weight; `moved` is θ − θ_0."""
    total = 0.0
    pool = material.pool
    for name, delta in moved.items():
        file = material.statistics[kind][member]
        own = pool.members[member].names[name]
        if own not in file.names:
            continue
        away = delta - task_vectors(pool, name)[member]
        curvature = file.read(own).double()
        if kind == "fisher":
            total += 0.5 * float((curvature * away * away).sum())
            continue
        output = material.statistics.get("output_gram", {}).get(member)
        if output is not None and own not in output.names:
            continue
        bent = away @ curvature if output is None else output.read(own).double() @ away @ curvature
        total += 0.5 * float((bent * away).sum())
    return total


@pytest.mark.parametrize("kind", ["fisher", "gram", "k-fac"])
def test_the_forms_are_the_losses_written_out(tiny_material, kind):
    material = tiny_material.material
    if kind == "gram":
        material = Material(material.pool, {"gram": material.statistics["gram"]})
    statistic = "fisher" if kind == "fisher" else "gram"
    basis = compute_basis(material, "task_arithmetic", MEMBERS, {}, torch.device("cpu"))
    names = list(material.pool.weights)
    first = [name for name in names if "layer.0" in name]
    rest = [name for name in names if "layer.0" not in name]
    forms = quadratics(material, basis, [first, rest], statistic)
    factors = np.array([[0.2, 0.9, -0.4], [1.0, 0.3, 0.5]])
    moved = {}
    for row, group in zip(factors, (first, rest), strict=True):
        for name in group:
            vectors = task_vectors(material.pool, name)
            moved[name] = sum(factor * vectors[member] for factor, member in zip(row, MEMBERS, strict=True))
    for member in MEMBERS:
        expected = plain_prediction(material, statistic, member, moved)
        assert forms[member](factors) == pytest.approx(expected, rel=1e-4)
        assert Quadratic.from_dict(forms[member].as_dict())(factors) == pytest.approx(expected, rel=1e-4)


def test_a_member_predicts_nothing_lost_for_itself(tiny_material):
    material = tiny_material.material
    basis = compute_basis(material, "task_arithmetic", MEMBERS, {}, torch.device("cpu"))
    forms = quadratics(material, basis, [list(material.pool.weights)], "fisher")
    for index, member in enumerate(MEMBERS):
        itself = np.eye(len(MEMBERS))[index][None]
        assert forms[member](itself) == pytest.approx(0.0, abs=1e-4 * forms[member](np.zeros((1, 3))))


@pytest.mark.parametrize("shared", [False, True])
def test_the_minimiser_is_one(tiny_material, shared):
    material = tiny_material.material
    basis = compute_basis(material, "task_arithmetic", MEMBERS, {}, torch.device("cpu"))
    recipe = METHODS["task_arithmetic"].default_recipe(MEMBERS)
    parts = [names for names, _ in weight_groups.split(list(material.pool.weights), recipe)]
    forms = list(quadratics(material, basis, parts, "fisher").values())
    best = minimiser(forms, shared=shared)

    def loss(factors):
        return sum(form(factors) for form in forms)

    generator = np.random.default_rng(0)
    for _ in range(20):
        step = generator.normal(size=1 if shared else best.shape) * 0.05
        assert loss(best + step) >= loss(best) - 1e-9


def test_a_missing_statistic_names_its_member(tiny_material):
    pool = tiny_material.material.pool
    basis = compute_basis(tiny_material.material, "task_arithmetic", MEMBERS, {}, torch.device("cpu"))
    fewer = {"fisher": {"one": tiny_material.material.statistics["fisher"]["one"]}}
    with pytest.raises(MethodError, match="'fisher' of three, two"):
        quadratics(Material(pool, fewer), basis, [list(pool.weights)], "fisher")
