import optuna
import pytest
from optuna.trial import TrialState, create_trial

from search.samplers.history_window import Recent
from search.samplers.windowed_study import WindowedStudy


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
    asking = WindowedStudy(study, None if limit is None else [Recent(limit)])
    result = []
    for _ in range(3):
        result.append((asking.next_number, asking.has_waiting))
        requested = asking.ask()
        assert requested.number == result[-1][0]
        result[-1] += (requested.suggest_float("x", 0, 1),)
        asking.under_way(requested)
    assert result[:2] == [(30, True, 0.25), (31, True, 0.5)]
    assert result[2][:2] == (32, False)
    running = asking.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    assert [t.params["x"] for t in running] == [x for *_, x in result]
    asking.tell(requested, 99.0)
    asking.finished(requested)
    seen = asking.get_trials(states=(TrialState.COMPLETE,))
    assert len(seen) == (31 if limit is None else 7)  # 99 is among the best and the latest
    assert seen[-1].values == [99.0]
    assert len(study.trials) == 33
