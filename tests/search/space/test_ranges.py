import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from pydantic import ValidationError

from search.space.ranges import Domain


@pytest.mark.parametrize("given", [0.5, 3, True, "gram", [1, 2], ["a", "b"], {"low": 0.1, "high": 1.0, "log": True}])
def test_short_forms_survive_a_file(given):
    domain = Domain.model_validate(given)
    assert domain.model_dump(mode="json") == given
    assert type(domain.model_dump(mode="json")) is type(given)
    assert Domain.model_validate(domain.model_dump(mode="json")) == domain


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "give one value"),
        ({"low": 0.1}, "low and a larger"),
        ({"low": 1.0, "high": 1.0}, "larger"),
        ({"low": 0.0, "high": float("inf")}, "finite"),
        ({"low": 0.0, "high": 1.0, "log": True}, "starts above 0"),
        ({"low": 0.1, "high": 1.0, "log": True, "step": 0.1}, "not both"),
        ({"value": 1, "choices": [1, 2]}, "give one value"),
        ({"value": 1, "log": True}, "belong to a range"),
        ([], "choices must be there"),
        ([1, 1], "differ"),
        ({"lo": 0.1, "high": 1.0}, "lo"),
    ],
)
def test_nonsense_is_refused(given, message):
    with pytest.raises(ValidationError, match=message):
        Domain.model_validate(given)


def test_distributions():
    span = Domain(low=1, high=9)
    assert span.distribution(whole=False) == FloatDistribution(1.0, 9.0)
    assert span.distribution(whole=True) == IntDistribution(1, 9)
    assert Domain(low=1, high=9, step=2).distribution(whole=True) == IntDistribution(1, 9, step=2)
    assert Domain(choices=("a", "b")).distribution(whole=False) == CategoricalDistribution(("a", "b"))
    assert Domain(value=0.5).distribution(whole=False) is None
    assert Domain(choices=(0.5,)).distribution(whole=False) is None


@pytest.mark.parametrize(
    ("domain", "default", "nearest"),
    [
        (Domain(low=0.2, high=0.8), 0.5, 0.5),
        (Domain(low=0.2, high=0.8), 1.0, 0.8),
        (Domain(low=0.2, high=0.8, step=0.2), 0.5, 0.4),
        (Domain(low=2, high=8), 1, 2),
        (Domain(choices=("a", "b")), "b", "b"),
        (Domain(choices=("a", "b")), "c", "a"),
        (Domain(value=0.1), 0.9, 0.1),
    ],
)
def test_the_nearest_value_to_a_default(domain, default, nearest):
    assert domain.nearest(default) == pytest.approx(nearest)
    assert type(domain.nearest(default)) is type(default)
