from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import wilcoxon

from merging.evaluation.steps import Trace
from merging.recipe import Recipe
from merging.tasks.task import Score
from search.candidate import PARTIAL, Candidate, Measurement, Outcome, Provenance
from search.early_stopping.halving import RUNG, Behind, Halving
from search.early_stopping.wilcoxon import Wilcoxon, WorseThan, make_pruning, p_worse, paired_differences
from search.ledger.ledger import Ledger
from search.loop import Budget, search
from search.objective import best, make_objective
from search.samplers.make_sampler import make_sampler
from search.space.search_space import MethodSpace, Space
from search.study import build_study

TASKS = ("x", "y")
MEAN = make_objective("mean", TASKS)
SIZE, STEP = 160, 20


def trace_of(chosen, step=STEP, upto=SIZE):
    """The trace of p_y [N] of each task, right where it is above a half."""
    chosen = {task: np.asarray(values[:upto], np.float32) for task, values in chosen.items()}
    right = {task: (values > 0.5).astype(np.float32) for task, values in chosen.items()}
    scores = [
        {
            task: Score(
                float(right[task][:stop].mean()),
                0.0,
                len(right[task][:stop]),
                "accuracy",
                0.0,
                1 - float(chosen[task][:stop].mean()),
            )
            for task in chosen
        }
        for stop in range(step, upto + 1, step)
    ]
    return Trace(scores, right, chosen)


def answers(quality, seed=0):
    """p_y of each task under a model of some quality; the examples' difficulty is the same for all."""
    difficulty = np.random.default_rng(7).random((2, SIZE))
    noise = np.random.default_rng(seed).normal(0, 0.05, size=(2, SIZE))
    return dict(zip(TASKS, np.clip(0.5 + quality - difficulty + noise, 0.01, 0.99), strict=True))


def outcome_of(trace, recipe=None, origin="search", pruned=False):
    candidate = Candidate(recipe or Recipe("average", {"a": 1.0}), "validation", origin, 0)
    return Outcome(candidate, Measurement(trace.scores[-1], trace=trace, pruned=pruned))


def test_differences_are_judged_by_their_ranks_and_ties_say_nothing():
    result = np.random.default_rng(0).normal(-0.3, 1, size=40)
    expected = wilcoxon(result, alternative="less").pvalue
    assert p_worse(result) == p_worse(np.concatenate([result, np.zeros(30)])) == pytest.approx(expected)
    assert p_worse(np.zeros(5)) == p_worse(np.zeros(0)) == 1.0


@pytest.mark.parametrize(
    ("name", "weights"),
    [("mean", (0.5, 0.5)), ("worst", (0.0, 1.0)), ("x", (1.0, 0.0)), ("expected_mean", (0.5, 0.5))],
)
def test_differences_count_as_the_objective_weighs_their_tasks(name, weights):
    value = make_objective(name, TASKS).parts[name]
    own, bar = trace_of({"x": answers(0.4)["x"], "y": answers(0.1)["y"]}), trace_of(answers(0.3, 1))
    result = paired_differences(own, bar, value)
    parts = [
        weight * (own.surrogates[task].astype(float) - bar.surrogates[task]) / SIZE
        for task, weight in zip(TASKS, weights, strict=True)
        if weight
    ]
    assert result == pytest.approx(np.concatenate(parts), abs=1e-7)


def test_a_metric_that_grades_examples_is_compared_by_its_own_numbers():
    own, bar = (
        replace(trace, values={task: np.log(chosen) for task, chosen in trace.surrogates.items()})
        for trace in (trace_of(answers(0.2)), trace_of(answers(0.3, 1)))
    )
    result = paired_differences(own, bar, MEAN.parts["mean"])
    expected = [0.5 * (own.values[task].astype(float) - bar.values[task]) / SIZE for task in TASKS]
    assert result == pytest.approx(np.concatenate(expected), abs=1e-7)


def test_no_lower_an_accuracy_is_never_pruned_however_unsure_the_candidate():
    sure = {task: np.full(SIZE, 0.9) for task in TASKS}
    unsure = {task: np.full(SIZE, 0.55) for task in TASKS}
    own, bar = trace_of(unsure, upto=STEP), trace_of(sure)
    assert p_worse(paired_differences(own, bar, MEAN.parts["mean"])) < 0.001
    assert not WorseThan(bar, MEAN.parts["mean"], 0.02)(own)
    assert WorseThan(bar, make_objective("expected_mean", TASKS).parts["expected_mean"], 0.02)(own)


def test_the_clearly_worse_stops_and_the_better_goes_on():
    bar = trace_of(answers(0.3))
    stop = WorseThan(bar, MEAN.parts["mean"], 0.05)
    assert stop(trace_of(answers(0.0), upto=2 * STEP))
    assert not stop(trace_of(answers(0.5), upto=2 * STEP))
    assert not stop(trace_of(answers(0.3), upto=2 * STEP))


def test_anchors_and_what_is_not_the_searchs_own_are_measured_whole(tmp_path):
    pruning = make_pruning("wilcoxon", MEAN, STEP, [], str(tmp_path))
    recipe = Recipe("average", {"a": 1.0})
    assert pruning.plan(Candidate(recipe)).gate is None  # nothing to compare with yet
    pruning.learn(outcome_of(trace_of(answers(0.3))))
    assert pruning.plan(Candidate(recipe)).gate is not None
    assert pruning.plan(Candidate(recipe, origin="anchor")).gate is None
    assert pruning.plan(Candidate(recipe, "test", "final")) is None
    assert pruning.plan(Candidate(recipe, origin="reference")) is None
    assert make_pruning("none", MEAN, STEP, [], str(tmp_path)) is None


def test_a_pruned_or_forbidden_candidate_is_no_bar(tmp_path):
    bounded = make_objective("mean", TASKS, constraints=lambda scores: {"x": 0.3 - scores["x"]})
    pruning = Wilcoxon(bounded, STEP, str(tmp_path))
    pruning.learn(outcome_of(trace_of(answers(0.1))))
    pruning.learn(outcome_of(trace_of(answers(0.5), upto=STEP), pruned=True))
    assert pruning.plan(Candidate(Recipe("average", {"a": 1.0}))).gate is None
    pruning.learn(outcome_of(trace_of(answers(0.5))))
    assert pruning.plan(Candidate(Recipe("average", {"a": 1.0}))).gate is not None


def test_half_of_what_reaches_a_rung_goes_on():
    value = MEAN.parts["mean"]
    at = trace_of(answers(0.2), upto=2 * STEP)
    here = value(at.scores[-1])
    assert not Behind({}, value, STEP, 2)(at)
    assert not Behind({2 * STEP: (here - 0.1, here - 0.2, here + 0.1)}, value, STEP, 2)(at)
    assert Behind({2 * STEP: (here + 0.3, here + 0.2, here - 0.1)}, value, STEP, 2)(at)
    assert not Behind({3 * STEP: (1.0, 1.0)}, value, STEP, 2)(trace_of(answers(0.2), upto=3 * STEP))  # no rung


def test_a_restarted_halving_knows_its_rungs():
    halving = Halving(MEAN, STEP)
    learnt = halving.learn(outcome_of(trace_of(answers(0.4))))
    assert set(learnt.measurement.proxies) == {f"{RUNG}{n * STEP}" for n in (1, 2, 4, 8)}
    halving.learn(outcome_of(trace_of(answers(0.3))))

    class Noted:
        proxies = learnt.measurement.proxies

    again = Halving(MEAN, STEP, [Noted()])
    again.learn(outcome_of(trace_of(answers(0.3))))
    candidate = Candidate(Recipe("average", {"a": 1.0}))
    assert again.plan(candidate).gate.rungs == halving.plan(candidate).gate.rungs


class Examples:
    """Measures candidates example by example as its planner says, in this process."""

    capacity = 1

    def __init__(self, planner):
        self.planner, self.queue, self.examples = planner, [], 0

    def submit(self, candidate):
        self.queue.append(candidate)

    def wait(self, timeout):
        candidate = self.queue.pop()
        quality = 0.4 - (candidate.recipe.scaling["a"] - 0.7) ** 2
        whole = answers(quality, int(candidate.recipe.identity, 16) % 1000)
        plan = self.planner.plan(candidate) if self.planner else None
        upto = SIZE
        for stop in range(STEP, SIZE, STEP):
            if plan is not None and plan.gate is not None and plan.gate(trace_of(whole, upto=stop)):
                upto = stop
                break
        self.examples += upto
        trace = trace_of(whole, upto=upto)
        outcome = Outcome(candidate, Measurement(trace.scores[-1], trace=trace, pruned=upto < SIZE))
        return [self.planner.learn(outcome) if self.planner else outcome]


@pytest.fixture
def run(tmp_path):
    space = Space({"task_arithmetic": MethodSpace(), "average": MethodSpace()}, "ab", None, "per_member")

    def run(policy, candidates, name="run"):
        ledger = Ledger(str(tmp_path / name / "ledger"), "demo")
        planner = make_pruning(policy, MEAN, STEP, ledger.rows(), str(tmp_path / name / "pruning"))
        executor = Examples(planner)
        study = build_study(ledger, space)
        sampler = lambda number: make_sampler("random", 3, None, number)  # noqa: E731
        search(study, space, sampler, ledger, executor, MEAN, Provenance("demo"), Budget(candidates))
        states = [trial.state.name for trial in study.get_trials()]
        return ledger.rows(), executor.examples, states

    return run


@pytest.mark.parametrize("policy", ["wilcoxon", "halving"])
def test_a_search_keeps_its_winner_and_saves_examples(run, policy):
    plain, all_examples, _ = run("none", 40, "plain")
    rows, examples, states = run(policy, 40)
    (winner,) = best(rows)
    assert winner.objective == best(plain)[0].objective
    assert examples < 0.7 * all_examples
    pruned = [row for row in rows if row.status == "pruned"]
    assert len(pruned) == states.count("PRUNED") > 10
    assert all(row.objective is None and row.objectives == {} and row.error is None for row in pruned)
    assert all(0 <= row.proxies[PARTIAL] < 1 and row.examples["x"] < SIZE for row in pruned)
    assert all(row.examples["x"] == SIZE for row in rows if row.status == "complete")


@pytest.mark.parametrize("policy", ["wilcoxon", "halving"])
def test_a_resumed_search_prunes_as_an_unbroken_one(run, policy):
    def reported(rows):
        return {row.candidate: (row.trial, row.status, row.examples, row.proxies, row.objective) for row in rows}

    unbroken, _, _ = run(policy, 24, "unbroken")
    run(policy, 9, "broken")
    run(policy, 15, "broken")
    resumed, _, _ = run(policy, 24, "broken")
    assert reported(resumed) == reported(unbroken)
