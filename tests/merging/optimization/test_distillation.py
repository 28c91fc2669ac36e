import pytest
import torch

from merging.errors import TaskError
from merging.mergers.resident import ResidentMerger
from merging.optimization.distillation import OneWorker, distil, train
from merging.optimization.distillation_settings import DistillationSettings
from merging.optimization.distiller import Distiller
from merging.optimization.losses import SharedModels
from merging.recipe import Recipe

MEMBERS = ("one", "three", "two")
CPU = torch.device("cpu")
START = Recipe("task_arithmetic", dict.fromkeys(MEMBERS, 0.3))
BRIEF = DistillationSettings(steps=6, batch=9, learning_rate=1e-3, evaluations=3, held_out=0.2)


def run(tiny, settings=BRIEF, **more):
    return distil(tiny.material, tiny.tasks, tiny.owners, START, settings, CPU, **more)


def same(one, other):
    return all(torch.equal(one.weights[name], other.weights[name]) for name in one.weights)


def near(one, other, tolerance=1e-5):
    return all((one.weights[name] - other.weights[name]).abs().max() < tolerance for name in one.weights)


class KilledError(Exception):
    pass


@pytest.mark.parametrize("changes", [{}, {"rank": 2}])
@pytest.mark.parametrize("after", [1, 3, 5])
def test_a_run_that_was_killed_comes_to_the_weights_of_an_unbroken_one(
    tiny_material, tmp_path, monkeypatch, changes, after
):
    settings = BRIEF.model_copy(update=changes)
    whole = run(tiny_material, settings, cache=str(tmp_path))
    taken = []
    step = OneWorker.step

    def dying(self, number):
        if len(taken) == after:
            raise KilledError
        taken.append(number)
        return step(self, number)

    monkeypatch.setattr(OneWorker, "step", dying)
    resume = str(tmp_path / "resume")
    with pytest.raises(KilledError):
        run(tiny_material, settings, cache=str(tmp_path), resume=resume, every=1)
    monkeypatch.setattr(OneWorker, "step", step)
    again = run(tiny_material, settings, cache=str(tmp_path), resume=resume, every=1)
    assert taken == list(range(after))
    assert same(whole, again)
    assert again.looks[1:] == whole.looks[1:]


def test_what_another_distillation_left_or_what_is_damaged_is_not_gone_on_from(tiny_material, tmp_path):
    resume = tmp_path / "resume"
    run(tiny_material, BRIEF, cache=str(tmp_path), resume=str(resume), every=1)
    assert resume.exists()
    other = BRIEF.model_copy(update={"learning_rate": 2e-3})
    whole = run(tiny_material, other, cache=str(tmp_path))
    assert same(whole, run(tiny_material, other, cache=str(tmp_path), resume=str(resume)))
    resume.write_bytes(resume.read_bytes()[:100])
    assert same(whole, run(tiny_material, other, cache=str(tmp_path), resume=str(resume)))


class Several(OneWorker):
    """OneWorker of their own weights each, which compute the parts in another order."""

    def __init__(self, distillers):
        super().__init__(distillers[0])
        self.all = distillers

    def step(self, step):
        parts = range(self.all[0].settings.parts)
        result = {part: self.all[part % len(self.all)].gradient(step, part) for part in reversed(parts)}
        losses = [one.apply(step, [result[part] for part in parts]) for one in self.all]
        return losses[0]


@pytest.mark.parametrize("count", [2, 3])
def test_the_result_does_not_depend_on_how_many_workers_share_the_parts(tiny_material, tmp_path, count):
    tiny = tiny_material
    settings = BRIEF.model_copy(update={"parts": 3})
    made = [
        Distiller(tiny.material, tiny.tasks, tiny.owners, START, settings, CPU, str(tmp_path)) for _ in range(count)
    ]
    alone = run(tiny, settings, cache=str(tmp_path))
    shared = train(Several(made), settings, "key")
    assert same(alone, shared)
    for name, value in made[-1].weights().items():
        assert torch.equal(value, made[0].weights()[name])


@pytest.mark.parametrize(
    "changes", [{"at_once": 1}, {"parts": 1}, {"teachers": "live"}], ids=lambda changes: next(iter(changes))
)
def test_memory_settings_change_rounding_only(tiny_material, tmp_path, changes):
    whole = run(tiny_material, cache=str(tmp_path))
    assert near(whole, run(tiny_material, BRIEF.model_copy(update=changes), cache=str(tmp_path)), 1e-4)


def test_the_order_of_tasks_does_not_matter_for_what_is_kept(tiny_material, tmp_path):
    """Teachers' outputs are found again by whoever asks for the same ones."""
    run(tiny_material, cache=str(tmp_path))
    kept = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    assert len(kept) == 3
    run(tiny_material, BRIEF.model_copy(update={"steps": 2}), cache=str(tmp_path))
    assert {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()} == kept


def test_it_stops_where_held_out_examples_like_nothing_better(tiny_material, tmp_path):
    settings = DistillationSettings(
        steps=40, batch=9, learning_rate=3.0, evaluations=20, patience=2, held_out=0.3, warm_up=0
    )
    result = run(tiny_material, settings, cache=str(tmp_path))
    assert [look.step for look in result.looks] == [0, 2, 4, 6]
    assert (result.steps, result.best) == (6, 2)
    held_out = [look.held_out for look in result.looks]
    assert min(held_out[1:]) == held_out[1]


def test_low_rank_additions_leave_all_but_matrices_alone(tiny_material, tmp_path):
    result = run(tiny_material, BRIEF.model_copy(update={"rank": 2, "held_out": 0.0}), cache=str(tmp_path))
    merged = SharedModels(tiny_material.material.pool, tiny_material.tasks, tiny_material.owners, CPU)
    ResidentMerger(tiny_material.material, merged.weights).merge(tiny_material.material.check(START))
    for name, value in merged.weights.items():
        change = result.weights[name] - value
        if name in merged.linear:
            assert 1 <= torch.linalg.matrix_rank(change.double(), rtol=1e-4) <= 2, name
        else:
            assert not change.any(), name


def test_all_weights_zero_or_too_few_examples_are_refused(tiny_material, tmp_path):
    with pytest.raises(TaskError, match="all are 0"):
        run(tiny_material, BRIEF.model_copy(update={"weights": dict.fromkeys(MEMBERS, 0.0)}))

    class Single:
        def __init__(self, task):
            self.name = task.name

        def size(self, split):
            return 1

    with pytest.raises(TaskError, match="1 train examples"):
        distil(tiny_material.material, [Single(tiny_material.tasks[0])], tiny_material.owners, START, BRIEF, CPU)


def test_without_held_out_examples_it_goes_to_the_end(tiny_material, tmp_path):
    result = run(tiny_material, replace_settings(held_out=0.0), cache=str(tmp_path))
    assert result.looks == ()
    assert result.steps == result.best == 6


def replace_settings(**changes):
    return BRIEF.model_copy(update=changes)
