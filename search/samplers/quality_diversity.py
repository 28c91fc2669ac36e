"""An Optuna sampler that draws subsets of members from a k-DPP, and learns how good each member is as it goes."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from optuna import Study
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import BaseSampler, TPESampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from scipy.special import ndtri
from scipy.stats import rankdata

from merging.errors import SettingsError
from search.subsets import dpp
from search.subsets.dpp_kernel import Matrix, kernel, positive_semidefinite

JOINT = "+"
Vector = npt.NDArray[np.float64]


class QualityDiversitySampler(BaseSampler):
    """Draws the subset of members from a k-DPP on L = diag(q) S diag(q); another sampler draws all the rest.

    The subset is a categorical parameter whose choices are members joined by `+` (`a+c+d`), or, where there are too
    many subsets to list, a boolean of each member (`members.a`, `members.c`, …). First the size k is drawn, then Y of
    that size with probability ∝ det(L_Y) = Π q² · det(S_Y): exactly, among all subsets or among the choices that
    there are. A subset that S calls singular is drawn only where all of its size are.

    q is learnt from the study. Values become normal scores (by rank, so that their scale is of no matter; trials that
    were pruned or break a constraint are worse than all others), and a ridge regression on who took part gives each
    member's effect: the posterior mean of a linear model, 0 without trials. Then q = prior · exp(strength · effect).
    Sizes are weighted alike: exp(2 · strength · effect), the effect of a size being the shrunken mean of its scores.

    Args:
        similarity: S [N, N], unit diagonal, positive semi-definite; rows in the order of `members`.
        members: The N names.
        parameter: Name of the subset's parameter; `<anything>.<parameter>` counts as well (`ties.members`).
        sampler: Draws every other parameter; TPE by default.
        quality: Prior q of each member; equal by default. A member with q = 0 is not drawn.
        sizes: Sizes to draw from: one fixes it; by default every size that there is.
        learn_sizes: Whether sizes that scored well become likelier; otherwise they stay equally likely.
        strength: How much a member's effect, in standard deviations of the score, says; 0 keeps the prior.
        shrinkage: Trials' worth of doubt that effects are 0 (the ridge).
        strata: A categorical parameter (`method`) within whose values scores are compared, so that a member is not
            praised for the company that it was tried in.
        seed: Of the draws.

    Raises:
        SettingsError: Sizes, strength or shrinkage out of range, or names that don't match.
        SelectionError: S or q cannot make a DPP.
    """

    def __init__(
        self,
        similarity: Matrix,
        members: Sequence[str],
        parameter: str = "members",
        sampler: BaseSampler | None = None,
        *,
        quality: Mapping[str, float] | None = None,
        sizes: Sequence[int] | None = None,
        learn_sizes: bool = True,
        strength: float = 2.0,
        shrinkage: float = 4.0,
        strata: str | None = None,
        seed: int | None = None,
    ) -> None:
        self._members = tuple(members)
        if len(set(self._members)) < len(self._members) or np.shape(similarity) != (len(members), len(members)):
            raise SettingsError(
                f"similarity of shape {list(np.shape(similarity))} does not fit the members {list(members)}: give a row "
                f"for each, and each name once"
            )
        if sizes is not None and (not sizes or not all(1 <= k <= len(self._members) for k in sizes)):
            raise SettingsError(f"sizes {list(sizes)} of subsets must lie between 1 and {len(self._members)}")
        if not strength >= 0 or not shrinkage > 0:
            raise SettingsError(f"strength {strength} must be at least 0, and shrinkage {shrinkage} above 0")
        self._similarity = positive_semidefinite(similarity)
        self._prior = np.array([1.0 if quality is None else quality.get(name, 0.0) for name in self._members])
        kernel(self._prior, self._similarity)  # for the errors that it raises
        self._parameter, self._strata = parameter, strata
        self._sizes = None if sizes is None else frozenset(sizes)
        self._learn_sizes, self._strength, self._shrinkage = learn_sizes, strength, shrinkage
        self._sampler = sampler if sampler is not None else TPESampler(seed=seed)
        self._rng = np.random.default_rng(seed)
        self._place = {name: i for i, name in enumerate(self._members)}
        self._choices: dict[tuple[Any, ...], tuple[list[list[int]], Vector] | None] = {}
        self._drawn: dict[int, frozenset[str]] = {}

    def reseed_rng(self) -> None:
        """Fresh randomness, in a process forked from another."""
        self._rng = np.random.default_rng()
        self._sampler.reseed_rng()

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """What the other sampler draws jointly, the subset left out."""
        space = self._sampler.infer_relative_search_space(study, trial)
        return {name: entry for name, entry in space.items() if not self._is_subset(name, entry)}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The other sampler's joint draw."""
        drawn = self._sampler.sample_relative(study, trial, search_space)
        return {name: value for name, value in drawn.items() if name in search_space}  # some give more than is asked

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """The subset, or what the other sampler draws."""
        if not self._is_subset(param_name, param_distribution):
            return self._sampler.sample_independent(study, trial, param_name, param_distribution)
        assert isinstance(param_distribution, CategoricalDistribution)
        listed = self._listed(param_distribution)
        if listed is not None:
            q, sizes = self.learnt(study)
            return param_distribution.choices[self._draw_listed(*listed, q, sizes)]
        if trial.number not in self._drawn:  # all booleans of a trial are one draw
            self._drawn[trial.number] = self._draw(*self.learnt(study))
        return param_name.removeprefix(f"{self._parameter}.") in self._drawn[trial.number]

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """Tells the other sampler."""
        self._sampler.before_trial(study, trial)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        """Tells the other sampler."""
        self._drawn.pop(trial.number, None)
        self._sampler.after_trial(study, trial, state, values)

    def learnt(self, study: Study) -> tuple[Vector, dict[int, float]]:
        """What the study's trials say.

        Returns:
            q [N], in the order of the members, and size → log weight of the sizes that were tried.
        """
        trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
        tried = [(subset, trial) for trial in trials if (subset := self._subset(trial))]
        if not tried:
            return self._prior, {}
        scores = _normal_scores([trial for _, trial in tried], study.directions, self._strata)
        part = np.zeros((len(tried), len(self._members)))
        for i, (subset, _) in enumerate(tried):
            part[i, subset] = 1.0
        sizes = part.sum(axis=1).astype(int)
        weights = {
            int(k): 2 * self._strength * float(scores[sizes == k].sum() / ((sizes == k).sum() + self._shrinkage))
            for k in np.unique(sizes)
        }
        effects = _ridge(part - part.mean(axis=0), scores, self._shrinkage)
        return self._prior * np.exp(self._strength * effects), weights

    def _is_subset(self, name: str, distribution: BaseDistribution) -> bool:
        """Whether a parameter is the subset, or one member's part in it."""
        if not isinstance(distribution, CategoricalDistribution):
            return False
        if name == self._parameter or name.endswith(f".{self._parameter}"):
            return self._listed(distribution) is not None
        return self._member(name) is not None and set(distribution.choices) == {False, True}

    def _member(self, name: str) -> str | None:
        """The member whose boolean has this name."""
        prefix, _, member = name.partition(f"{self._parameter}.")
        return member if not prefix and member in self._place else None

    def _listed(self, distribution: CategoricalDistribution) -> tuple[list[list[int]], Vector] | None:
        """Members and log det(S_Y) of every choice; None where a choice is no subset of members."""
        if distribution.choices not in self._choices:
            subsets = [self._places(choice) for choice in distribution.choices]
            known = [subset for subset in subsets if subset]
            whole = len(known) == len(subsets)
            self._choices[distribution.choices] = (
                (known, dpp.log_determinants(self._similarity, known)) if whole else None
            )
        return self._choices[distribution.choices]

    def _places(self, choice: object) -> list[int]:
        """A choice's members; none where it is no subset."""
        names = choice.split(JOINT) if isinstance(choice, str) else []
        return [self._place[name] for name in names] if all(name in self._place for name in names) else []

    def _subset(self, trial: FrozenTrial) -> list[int]:
        """A trial's subset; empty where it has none."""
        for name, value in trial.params.items():
            if name == self._parameter or name.endswith(f".{self._parameter}"):
                return self._places(value)
        parts = ((self._member(name), value) for name, value in trial.params.items())
        return [self._place[member] for member, value in parts if member is not None and value is True]

    def _draw_listed(
        self, subsets: Sequence[Sequence[int]], log_dets: Vector, q: Vector, sizes: Mapping[int, float]
    ) -> int:
        """The place of the subset that is drawn."""
        lengths = np.array([len(subset) for subset in subsets])
        k = self._draw_size(sorted(set(lengths.tolist())), sizes)
        places = np.flatnonzero(lengths == k).tolist()
        with np.errstate(divide="ignore"):
            logs = np.log(q)
        weights = np.array([2 * logs[subsets[i]].sum() + log_dets[i] for i in places])
        return int(self._rng.choice(places, p=_probabilities(weights)))

    def _draw(self, q: Vector, sizes: Mapping[int, float]) -> frozenset[str]:
        """A subset among all that there are."""
        L = kernel(q, self._similarity)
        k = self._draw_size(list(range(1, dpp.rank(L) + 1)), sizes)
        drawn = dpp.sample_k_dpp(L, k, int(self._rng.integers(2**31)), 1)[0]
        return frozenset(self._members[i] for i in drawn)

    def _draw_size(self, there: Sequence[int], weights: Mapping[int, float]) -> int:
        """A size that is there and asked for; any that is there if none is."""
        wanted = [k for k in there if self._sizes is None or k in self._sizes] or list(there)
        logs = np.array([weights.get(k, 0.0) if self._learn_sizes else 0.0 for k in wanted])
        return int(self._rng.choice(wanted, p=_probabilities(logs)))


def _normal_scores(trials: Sequence[FrozenTrial], directions: Sequence[StudyDirection], strata: str | None) -> Vector:
    """Each trial's rank within its stratum as a quantile of the normal distribution, the mean over all objectives."""
    signs = np.array([1.0 if direction == StudyDirection.MAXIMIZE else -1.0 for direction in directions])
    worst = np.full(len(signs), -np.inf)
    values = np.array([signs * trial.values if _counts(trial) else worst for trial in trials])
    stratum = np.array([str(trial.params.get(strata or "", "")) for trial in trials])
    scores = np.zeros(len(trials))
    for name in np.unique(stratum):
        own = stratum == name
        scores[own] = ndtri((rankdata(values[own], axis=0) - 0.5) / own.sum()).mean(axis=1)
    return scores


def _counts(trial: FrozenTrial) -> bool:
    """Whether a trial has its value and keeps its constraints."""
    return trial.state == TrialState.COMPLETE and all(value <= 0 for value in trial.constraints.values())


def _ridge(part: Matrix, scores: Vector, shrinkage: float) -> Vector:
    """Effects b [N] that minimise ‖scores − part b‖² + shrinkage ‖b‖², by the smaller of the two normal equations."""
    trials, members = part.shape
    if members <= trials:
        return np.asarray(np.linalg.solve(part.T @ part + shrinkage * np.eye(members), part.T @ scores))
    return np.asarray(part.T @ np.linalg.solve(part @ part.T + shrinkage * np.eye(trials), scores))


def _probabilities(logs: Vector) -> Vector:
    """Weights as probabilities; equal ones where all weights are 0."""
    top = logs.max()
    weights = np.exp(logs - top) if np.isfinite(top) else np.ones(len(logs))
    return np.asarray(weights / weights.sum())
