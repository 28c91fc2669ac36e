import optuna
from optuna.trial import TrialState, create_trial

from search.samplers.history_window import Generations, NewParameters, Recent


def trial(number, value, state=TrialState.COMPLETE, constraints=None):
    result = create_trial(state=state, value=value, constraints=constraints)
    result.number = number
    return result


def test_the_best_quarter_and_the_latest_are_kept():
    recent = Recent(8)
    values = [5, 9, 1, 7, 2, 2, 3, 9, 1, 1, 1, 1, 1, 1]
    for number, value in enumerate(values):
        recent.add(trial(number, float(value)))
    assert [t.number for t in recent.trials()] == [1, 7, 8, 9, 10, 11, 12, 13]
    assert [t.values for t in recent.trials()][:2] == [[9.0], [9.0]]


def test_what_keeps_its_constraints_is_better_than_what_does_not():
    recent = Recent(4)
    recent.add(trial(0, 0.1, constraints={"x": -1.0}))
    recent.add(trial(1, 0.9, constraints={"x": 0.5}))
    for number in (2, 3, 4):
        recent.add(trial(number, None, TrialState.PRUNED))
    assert [t.number for t in recent.trials()] == [0, 2, 3, 4]


def marked(number, generation, parents=(), state=TrialState.COMPLETE):
    result = trial(number, 0.0 if state == TrialState.COMPLETE else None, state)
    result.system_attrs = {} if generation is None else {"mark": (generation, parents)}
    return result


def test_two_generations_and_their_parents_are_kept():
    memory = Generations(lambda t: t.system_attrs.get("mark"), Recent(8))
    parents = {0: (), 1: (0, 1), 2: (1, 4), 3: (1, 5)}
    kept = []
    for number, generation in enumerate([None, 0, 0, 1, 1, 2, 1, 3, 1]):
        memory.add(marked(number, generation, parents.get(generation)))
        memory.add(marked(100 + number, generation, (), TrialState.PRUNED))
        kept.append(sorted(known.number for known in memory.trials()))
    assert kept[4] == [0, 1, 2, 3, 4]
    assert kept[6] == [0, 1, 3, 4, 5, 6]  # a late one counts
    assert kept[7] == kept[8] == [1, 4, 5, 7]  # but not of a generation that is past


def test_a_trial_with_each_parameter_is_kept():
    memory = NewParameters()
    entry = optuna.distributions.FloatDistribution(0, 1)
    for number, names in enumerate(["a", "a", "ab", "b", "c", "abc"]):
        result = create_trial(value=0.0, params=dict.fromkeys(names, 0.5), distributions=dict.fromkeys(names, entry))
        result.number = number
        memory.add(result)
    assert [known.number for known in memory.trials()] == [0, 2, 4]
