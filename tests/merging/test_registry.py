import pytest

from merging.errors import MethodError
from merging.registry import Registry


def test_names_are_taken_once_and_unknown_ones_get_a_suggestion():
    registry: Registry[int] = Registry("method", MethodError)
    registry.register("average", 1)
    registry.register("regmean", 2)
    assert (registry["regmean"], "average" in registry, list(registry), len(registry)) == (
        2,
        True,
        ["average", "regmean"],
        2,
    )
    with pytest.raises(ValueError, match="'average' is already registered"):
        registry.register("average", 3)
    with pytest.raises(MethodError, match=r"unknown method 'regmeen'. Did you mean 'regmean'\?"):
        registry["regmeen"]
    with pytest.raises(MethodError, match="Known: average, regmean"):
        registry["zzz"]
