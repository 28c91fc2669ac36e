"""What every registered method must do; a new one is tested here as soon as it is registered."""

import pytest

from merging.methods import METHODS
from merging.testing.methods import MethodCase, MethodTests

# A method that scales a solution of all members together has tests of its own (least_squares/test_precomputed.py).
EVERY = sorted(name for name in METHODS if METHODS[name].solution is None)
ROUNDED = ("karcher", "model_stock", "multi_slerp", "nuslerp", "slerp")
"""Inner products of all members are one matrix product, whose rounding depends on how many there are."""
VARIANTS = [
    ("ties", {"trim": "tensor", "disjoint": "sum", "lambda": 0.6}),
    ("ties", {"density": 1.0}),
    ("fisher", {"normalize": True}),
    ("gradient_matching", {"base_curvature": "fisher"}),
    ("gradient_matching", {"delta": 1e-6}),
    ("regmean", {"factors": "gram", "rho": 0.5}),
    ("regmean", {"beta": 0.3, "rho": 1.0}),
    ("linear", {"normalize": True}),
    ("dare", {"entries": "elected", "drop": 0.3, "seed": 7}),
    ("dare", {"drop": 0.0}),
    ("dare", {"entries": "elected_mean", "lambda": 0.7}),
    ("dare", {"rescale": "l1", "entries": "elected_mean", "drop@movie": 0.7}),
    ("dare", {"rescale": "none", "drop@movie": 0.2}),
    ("dare", {"drop@movie": 0.8}),
    ("della", {"rescale": "l1", "density@movie": 0.7, "lambda": 1.2}),
    ("della", {"rescale": "none", "entries": "elected_mean", "epsilon@movie": 0.3}),
    ("ties", {"density@movie": 0.7}),
    ("ties", {"density@movie": 0.1, "trim": "tensor"}),
    ("breadcrumbs", {"entries": "elected_mean", "density@movie": 0.4, "gamma@movie": 0.2, "lambda": 0.6}),
    ("della", {"entries": "elected", "seed": 3}),
    ("breadcrumbs", {"entries": "elected", "density": 0.4, "gamma": 0.1}),
    ("breadcrumbs", {"gamma": 0.0}),
    ("consensus", {"k": 3, "lambda": 0.2}),
    ("slerp", {"space": "task_vectors"}),
    ("nearswap", {"t": 0.05}),
    ("ram", {"epsilon": 0.1}),
    ("ram_plus", {"epsilon": 0.1, "alpha": 2.0, "r": 0.5}),
    ("sce", {"select": 0.5, "lambda": 0.7}),
    ("sce", {"select": 1.0}),
    ("sce", {"select": 0.0}),
    ("nuslerp", {"over": "rows"}),
    ("nuslerp", {"over": "columns", "space": "weights"}),
    ("model_stock", {"over": "rows"}),
    ("mats", {"iterations": 5}),
    ("mats", {"subspace": "identity"}),
    ("mats", {"subspace": "fisher", "iterations": 8}),
    ("mats", {"subspace": "kfac", "iterations": 6, "tolerance": 0.0}),
    ("mats", {"subspace": "kfac", "iterations": 6, "preconditioner": "jacobi"}),
    ("mats", {"subspace": "kfac", "iterations": 6, "preconditioner": "kfac"}),
    ("mats", {"iterations": 3, "preconditioner": "kfac"}),
    ("mats", {"preconditioner": "jacobi", "iterations": 8}),
    ("regmean", {"rho": 0.999}),
    ("iso_c", {"rank": 0.5}),
    ("tsv_m", {"rank": 0.5}),
    ("iso_cts", {"common": 0.5}),
    ("ace", {"epsilon": 0.04, "refine": True}),
    ("wudi", {"filter": 0.05}),
    ("esm", {"layers": False}),
    ("svc+task_arithmetic", {}),
    ("svc+ties", {"density": 0.5}),
    ("svc+lines+ties", {"density": 0.5}),
    ("lines+svc+iso_cts", {}),
]
IDENTICAL = {  # parameters and factor (per member, of 4) at which members that are all one must give that one
    "average": ({}, 1.0),
    "task_arithmetic": ({}, 0.25),
    "ties": ({"density": 1.0}, 1.0),
    "fisher": ({}, 1.0),
    "gradient_matching": ({}, 0.25),
    "regmean": ({}, 1.0),
    "linear": ({}, 0.25),
    "lines": ({"a": 1.0, "b": 0.0}, 0.25),
    "consensus": ({"lambda": 0.2, "k": 4}, 0.25),
    "dare": ({"drop": 0.0}, 0.25),
    "breadcrumbs": ({"density": 1.0, "gamma": 0.0}, 0.25),
    "della": ({"density": 1.0, "epsilon": 0.0}, 0.25),
    "slerp": ({}, 1.0),
    "multi_slerp": ({}, 1.0),
    "karcher": ({}, 1.0),
    "nearswap": ({"t": 10.0}, 0.25),
    "ram": ({"epsilon": 0.0}, 1.0),
    "sce": ({}, 1.0),
    "nuslerp": ({"over": "rows"}, 1.0),
    "model_stock": ({}, 1.0),
    "mats": ({}, 1.0),
    "wudi": ({}, 1.0),
}
CASES = [MethodCase(name, parameters, None, name not in ROUNDED) for name, parameters in VARIANTS] + [
    MethodCase(name, {}, IDENTICAL.get(name), name not in ROUNDED) for name in EVERY
]


class TestEveryMethod(MethodTests):
    """The suite, on all methods and some of their variants."""

    @pytest.fixture(autouse=True)
    def _own_reference(self, reference):
        self._references = reference

    @pytest.fixture(params=CASES, ids=str)
    def case(self, request):
        return request.param

    def reference(self, name, weights, factors, parameters, examples):
        return getattr(self._references, name)(weights, factors, parameters, examples)


def test_every_identity_is_of_a_method_that_there_is():
    assert set(IDENTICAL) <= set(METHODS)
