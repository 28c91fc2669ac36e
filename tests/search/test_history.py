import optuna
import pytest
from optuna.trial import TrialState, create_trial

from search.history import Asking, Recent


def trial(number, value, state=TrialState.COMPLETE, constraints=None):
    found = create_trial(state=state, value=value, constraints=constraints)
    found.number = number
    return found


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


@pytest.fixture
def study():
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(direction="maximize")
    for number in range(30):
        study.add_trial(create_trial(value=-float(number)))
    study.enqueue_trial({"x": 0.25})
    study.enqueue_trial({"x": 0.5})
    return study


@pytest.mark.parametrize("limit", [None, 8])
def test_waiting_trials_come_first_and_in_order(study, limit):
    asking = Asking(study, limit)
    found = []
    for _ in range(3):
        found.append((asking.next_number, asking.has_waiting))
        asked = asking.ask()
        assert asked.number == found[-1][0]
        found[-1] += (asked.suggest_float("x", 0, 1),)
        asking.under_way(asked)
    assert found[:2] == [(30, True, 0.25), (31, True, 0.5)]
    assert found[2][:2] == (32, False)
    running = asking.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    assert [t.params["x"] for t in running] == [x for *_, x in found]
    asking.tell(asked, 99.0)
    asking.finished(asked)
    seen = asking.get_trials(states=(TrialState.COMPLETE,))
    assert len(seen) == (31 if limit is None else 7)  # 99 is among the best and the latest
    assert seen[-1].values == [99.0]
    assert len(study.trials) == 33
