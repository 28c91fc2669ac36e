import functools
import warnings
from collections import Counter
from itertools import combinations

import numpy as np
import optuna
import pytest
from optuna.distributions import CategoricalDistribution
from optuna.samplers import CmaEsSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.testing.pytest_samplers import (
    BasicSamplerTestCase,
    MultiObjectiveSamplerTestCase,
    RelativeSamplerTestCase,
)
from optuna.trial import TrialState, create_trial
from scipy.stats import chisquare

from merging.errors import SelectionError, SettingsError
from search.samplers.quality_diversity import QualityDiversitySampler
from search.subsets import dpp_kernel

MEMBERS = ("a", "b", "c", "d", "e")
SUBSETS = tuple("+".join(Y) for k in range(1, 6) for Y in combinations(MEMBERS, k))


def similarity_of(n, seed=0):
    return dpp_kernel.similarity_from_representations(
        {str(i): np.random.default_rng((seed, i)).normal(size=(8, 6)) + 0.7 for i in range(n)}
    )


S = similarity_of(5)


def make(members=MEMBERS, similarity=S, **more):
    return QualityDiversitySampler(similarity, members, **{"seed": 1, **more})


@pytest.mark.slow
class TestConformance(BasicSamplerTestCase, RelativeSamplerTestCase, MultiObjectiveSamplerTestCase):
    """Optuna's own suite, for the sampler that owns every categorical of "x" and "y" that it can."""

    @pytest.fixture(params=["members", "x"])
    def sampler(self, request):
        # A parameter "x" whose choices are the members "x" and "y" is a subset; others go to the wrapped sampler.
        wrapped = functools.partial(TPESampler, n_startup_trials=0, multivariate=True, seed=0)
        return lambda: QualityDiversitySampler(np.eye(2), ["x", "y"], request.param, wrapped())


@pytest.mark.parametrize("form", ["listed", "booleans"])
@pytest.mark.parametrize("k", [2, 4])
def test_a_subset_is_drawn_as_often_as_its_determinant_says(form, k):
    q = {"a": 1.0, "b": 0.8, "c": 1.3, "d": 0.6, "e": 1.0}
    sampler = make(quality=q, sizes=[k], sampler=RandomSampler(0))
    study = optuna.create_study(sampler=sampler)
    counts = Counter()
    draws = 1000 if form == "listed" else 300
    listed = CategoricalDistribution(SUBSETS)
    switch = CategoricalDistribution((False, True))
    for number in range(draws):
        trial = create_trial(state=TrialState.RUNNING)
        trial.number = number
        if form == "listed":
            counts[sampler.sample_independent(study, trial, "members", listed)] += 1
        else:
            taken = [m for m in MEMBERS if sampler.sample_independent(study, trial, f"members.{m}", switch)]
            counts["+".join(taken)] += 1
    L = dpp_kernel.kernel(list(q.values()), S)
    weights = {"+".join(MEMBERS[i] for i in Y): np.linalg.det(L[np.ix_(Y, Y)]) for Y in combinations(range(5), k)}
    assert set(counts) <= set(weights)
    expected = np.array(list(weights.values())) / sum(weights.values()) * draws
    assert chisquare([counts[name] for name in weights], expected).pvalue > 0.01


def toy(trial, good=frozenset("ad")):
    """Members a and d help, the others harm, a factor matters too."""
    subset = trial.suggest_categorical("members", SUBSETS).split("+")
    return sum(1.0 if name in good else -1.0 for name in subset) - (trial.suggest_float("factor", 0, 1) - 0.7) ** 2


@pytest.mark.parametrize("wrapped", [TPESampler, RandomSampler, CmaEsSampler, NSGAIISampler])
def test_it_learns_which_members_are_good_beside_any_sampler(wrapped):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sampler = make(sampler=wrapped(seed=0))
        study = optuna.create_study(direction="maximize", sampler=sampler)
        study.optimize(toy, n_trials=50)
    q, sizes = sampler.learnt(study)
    assert set(np.argsort(q)[-2:]) == {0, 3}
    assert sizes[2] > sizes[5]
    late = [trial.params["members"] for trial in study.trials[-20:]]
    harm = [sum(name not in "ad" for name in subset.split("+")) for subset in late]
    assert np.mean(harm) < 1.0  # equally likely sizes would hold 1.8 of them


def test_minimising_pruned_and_infeasible_trials_count_the_right_way_round():
    study = optuna.create_study(direction="minimize")
    for value, subset in [(1.0, "a"), (2.0, "b"), (None, "c"), (1.1, "a+d"), (2.1, "b+d"), (None, "c+d")]:
        state = TrialState.COMPLETE if value else TrialState.PRUNED
        distributions = {"members": CategoricalDistribution(SUBSETS)}
        study.add_trial(create_trial(state=state, value=value, params={"members": subset}, distributions=distributions))
    broken = {"too much": 0.1}
    for params in ({"members": "e"}, {"members": "d+e"}):
        study.add_trial(create_trial(value=0.0, params=params, distributions=distributions, constraints=broken))
    q, _ = make().learnt(study)
    assert q[0] > q[1] > q[2]
    assert q[1] > q[4]
    np.testing.assert_array_equal(make(strength=0.0).learnt(study)[0], np.ones(5))
    doubt = make(shrinkage=1e9).learnt(study)[0]
    np.testing.assert_allclose(doubt, 1.0, atol=1e-6)


def test_scores_are_compared_within_a_stratum():
    study = optuna.create_study(direction="maximize")
    distributions = {"members": CategoricalDistribution(SUBSETS), "method": CategoricalDistribution(("good", "bad"))}
    for number in range(40):
        method = "good" if number % 2 else "bad"
        # Member a is harmful, but mostly seen with the good method.
        subset = "a+c" if (number % 2) == (number % 10 != 0) else "b+c"
        value = (10.0 if method == "good" else 0.0) - ("a" in subset)
        study.add_trial(
            create_trial(value=value, params={"method": method, "members": subset}, distributions=distributions)
        )
    blind, _ = make().learnt(study)
    aware, _ = make(strata="method").learnt(study)
    assert blind[0] > blind[1]
    assert aware[0] < aware[1]


def test_methods_with_subsets_of_their_own_and_strange_parameters():
    sampler = make(sampler=RandomSampler(0), quality={"a": 1.0, "b": 1.0, "c": 1.0})
    study = optuna.create_study(sampler=sampler)
    seen = set()
    for _ in range(20):
        trial = study.ask()
        seen.add(trial.suggest_categorical("slerp.members", ["a+b", "c+d", "b+c"]))
        assert trial.suggest_categorical("members", ["plain", "signed"]) in ("plain", "signed")
        study.tell(trial, 0.0)
    assert seen == {"a+b", "b+c"}  # d has no quality
    assert sampler.learnt(study)[0].tolist() == [1.0, 1.0, 1.0, 0.0, 0.0]


def test_where_all_are_singular_one_is_drawn_nevertheless():
    sampler = make(similarity=np.ones((5, 5)), sampler=RandomSampler(0), sizes=[3])
    study = optuna.create_study(sampler=sampler)
    assert study.ask().suggest_categorical("members", ["a+b+c", "c+d+e"]) in ("a+b+c", "c+d+e")
    assert study.ask().suggest_categorical("ties.members", ["a", "b"]) in ("a", "b")  # no subset of the size asked for


def test_equal_seeds_draw_equally_and_others_do_not():
    def proposals(seed):
        study = optuna.create_study(direction="maximize", sampler=make(seed=seed))
        study.optimize(toy, n_trials=15)
        return [trial.params for trial in study.trials]

    assert proposals(1) == proposals(1)
    assert proposals(1) != proposals(2)


def test_a_thousand_members_are_booleans():
    names = [f"m{i}" for i in range(1000)]
    vectors = np.random.default_rng(0).normal(size=(1000, 1000))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    sampler = QualityDiversitySampler(vectors @ vectors.T, names, sampler=RandomSampler(0), sizes=[12], seed=0)
    study = optuna.create_study(sampler=sampler)
    trial = create_trial(state=TrialState.RUNNING)
    switch = CategoricalDistribution((True, False))
    taken = [name for name in names if sampler.sample_independent(study, trial, f"members.{name}", switch)]
    assert len(taken) == 12


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"members": "abcd"}, SettingsError, "does not fit the members"),
        ({"members": "aabcd"}, SettingsError, "each name once"),
        ({"sizes": [6]}, SettingsError, "between 1 and 5"),
        ({"sizes": []}, SettingsError, "between 1 and 5"),
        ({"strength": -1.0}, SettingsError, "strength"),
        ({"shrinkage": 0.0}, SettingsError, "shrinkage"),
        ({"quality": {"z": 1.0}}, SelectionError, "every q is 0"),
        ({"similarity": -np.eye(5)}, SelectionError, "positive semi-definite"),
    ],
)
def test_what_cannot_be_is_refused(given, error, words):
    with pytest.raises(error, match=words):
        make(**given)
