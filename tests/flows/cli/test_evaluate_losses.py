from contextlib import contextmanager, nullcontext

import pytest

import flows.cli.evaluate
from flows.cli.evaluate import evaluate
from flows.config.campaign_file import load_campaign
from flows.directory.progress import Display
from merging.errors import TaskError
from merging.tasks.task import Score
from search.candidate import Measurement, Outcome


class Losing:
    """An executor that loses its worker a few times before it measures."""

    capacity = 2

    def __init__(self, times):
        self._left, self._queue = times, []

    def submit(self, candidate):
        self._queue.append(candidate)

    def wait(self, timeout):
        candidate = self._queue.pop(0)
        if self._left:
            self._left -= 1
            return [Outcome(candidate, error=RuntimeError("ActorDiedError"), lost=True)]
        return [Outcome(candidate, Measurement({t: Score(0.5, 0.1, 9, "accuracy") for t in ("one", "two", "three")}))]


@pytest.fixture
def lose(monkeypatch):
    def times(count):
        @contextmanager
        def evaluators(*_):
            yield Losing(count)

        monkeypatch.setattr(flows.cli.evaluate, "evaluators", evaluators)
        monkeypatch.setattr(flows.cli.evaluate, "connected", lambda campaign: nullcontext())

    return times


def test_a_worker_that_is_lost_is_not_the_end(campaign_file, lose, capsys):
    campaign = load_campaign(str(campaign_file(resources={"retries": 3})))
    lose(4)
    evaluate(campaign, ["one", "two"], "validation", Display())
    assert capsys.readouterr().out.count("0.5000 ± 0.1000") == 6
    lose(99)
    with pytest.raises(TaskError, match="one: the worker was lost 4 times: ActorDiedError"):
        evaluate(campaign, ["one"], "validation", Display())
