import json

import numpy as np

from merging.evaluation.steps import EvaluationPlan, Trace
from merging.tasks.task import Score


def shown(steps):
    return [{task: positions.tolist() for task, positions in step.items()} for step in steps]


def test_every_task_gives_a_slice_a_step_until_it_is_through():
    steps = shown(EvaluationPlan(2).steps({"long": 5, "short": 3}))
    assert steps == [{"long": [0, 1], "short": [0, 1]}, {"long": [2, 3], "short": [2]}, {"long": [4]}]


def test_without_steps_everything_comes_at_once():
    assert shown(EvaluationPlan().steps({"x": 3})) == [{"x": [0, 1, 2]}]
    assert shown(EvaluationPlan(positions={"x": np.array([7, 2])}).steps({"x": 9, "y": 1})) == [{"x": [7, 2], "y": [0]}]
    assert shown(EvaluationPlan().steps({})) == []


def test_a_trace_survives_json():
    score = Score(0.5, float("nan"), 2, "accuracy", 0.1, 0.2)
    trace = Trace([{"x": score}], {"x": np.array([0.1, 1], np.float32)}, {"x": np.array([0.3, 0.9], np.float32)})
    again = Trace.from_dict(json.loads(json.dumps(trace.as_dict())))
    assert again.examples == 2
    assert again.scores[0]["x"].as_dict() | {"standard_error": 0, "entropy": 0} == (
        score.as_dict() | {"standard_error": 0, "entropy": 0}
    )
    assert again.values["x"].tolist() == trace.values["x"].tolist()
    assert again.surrogates["x"].dtype == np.float32
