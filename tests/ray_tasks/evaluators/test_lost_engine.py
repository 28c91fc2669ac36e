from merging.errors import EngineError, EngineLostError
from merging.recipe import base_recipe
from ray_tasks.evaluators.evaluator import Assignment, Evaluator, Setup


class Models:
    """Candidates of which none is measured."""

    def __init__(self, error):
        self._error = error

    def measure(self, *assignment):
        raise self._error


def answer_after(error):
    evaluator = Evaluator(Setup("", {}, (), {}, {}, {}, {}), 1)
    evaluator._models = Models(error)
    return evaluator.measure(Assignment("ticket", base_recipe(), "validation"))


def test_an_engine_that_died_is_a_lost_evaluator_and_not_a_failed_candidate():
    lost = answer_after(EngineLostError("the engine has died (RuntimeError: CUDA error)"))
    assert (lost.lost, lost.unreachable, lost.fault) == (True, True, False)
    assert "the engine has died" in lost.error
    wrong = answer_after(EngineError("answers otherwise than transformers"))
    assert (wrong.lost, wrong.unreachable, wrong.fault) == (False, False, False)
