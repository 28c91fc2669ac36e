import numpy as np
import pytest
import torch

from merging.errors import TaskError
from merging.mergers.resident import ResidentMerger
from merging.optimization import distillation
from merging.optimization.distillation import DistillationSettings, Distiller, OneWorker, distil, train
from merging.optimization.losses import SharedModels
from merging.optimization.schedule import Schedule, parted
from merging.recipe import Recipe

MEMBERS = ("one", "three", "two")
CPU = torch.device("cpu")
START = Recipe("task_arithmetic", dict.fromkeys(MEMBERS, 0.3))
FAR = Recipe("task_arithmetic", dict.fromkeys(MEMBERS, 5.0))
BRIEF = DistillationSettings(steps=6, batch=9, learning_rate=1e-3, evaluations=3, held_out=0.2)


def run(tiny, settings=BRIEF, **more):
    return distil(tiny.material, tiny.tasks, tiny.owners, START, settings, CPU, **more)


def same(one, other):
    return all(torch.equal(one.weights[name], other.weights[name]) for name in one.weights)


def near(one, other, tolerance=1e-5):
    return all((one.weights[name] - other.weights[name]).abs().max() < tolerance for name in one.weights)


def reference_gradient(tiny, distiller, step, settings):
    """By autograd in float64, example by example, over the whole step at once."""
    models = SharedModels(tiny.material.pool, tiny.tasks, tiny.owners, CPU)
    ResidentMerger(tiny.material, models.weights).merge(tiny.material.check(FAR))
    counts = [len(places) for places in distiller.schedule._places]
    factors = np.array([settings.weights.get(tiny.owners[task.name], 1.0) for task in tiny.tasks])
    units = distiller.schedule.step(step)
    total = torch.zeros((), dtype=torch.float64)
    for task, model, places, count, factor in zip(tiny.tasks, models.models, units, counts, factors, strict=True):
        temperature = settings.temperatures.get(tiny.owners[task.name], settings.temperature)
        teacher, model = task.load_model().double(), model.double().requires_grad_(True)
        share = factor / factors.sum() * sum(counts) / count / sum(len(places) for places in units)
        for place in places:
            batch = task.batch("train", np.array([place]))
            own, other = (task.logits(one, batch)[0] / temperature for one in (model, teacher))
            p, log_q = other.detach().softmax(0), own.log_softmax(0)
            total = total + share * temperature**2 * (p * (p.log() - log_q)).sum()
            if settings.hidden:
                h, t = (task.representation(one, batch)[0] for one in (model, teacher))
                total = total + share * settings.hidden * (h - t).square().sum() / t.square().sum().detach()
    total.backward()
    found = {}
    for task, model in zip(tiny.tasks, models.models, strict=True):
        names = tiny.material.pool.members[tiny.owners[task.name]].names
        parameters = dict(model.named_parameters())
        for name in tiny.material.pool.weights:
            gradient = parameters[names[name]].grad
            if gradient is not None:
                found[name] = found.get(name, 0) + gradient
    return float(total.detach()), found


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"temperature": 2.0, "temperatures": {"two": 0.5}, "weights": {"one": 3.0}},
        {"hidden": 0.7, "at_once": 2, "parts": 3},
    ],
)
def test_the_loss_and_its_gradient_are_those_of_single_examples_in_float64(tiny_material, tmp_path, changes):
    settings = BRIEF.model_copy(update=changes)
    tiny = tiny_material
    distiller = Distiller(tiny.material, tiny.tasks, tiny.owners, FAR, settings, CPU, str(tmp_path))
    wanted, gradients = reference_gradient(tiny, distiller, 1, settings)
    parts = [distiller.gradient(1, part) for part in range(settings.parts)]
    assert sum(part.loss for part in parts) == pytest.approx(wanted, rel=5e-3)
    for name, gradient in gradients.items():
        found = sum(part.gradients[name].double() for part in parts if name in part.gradients)
        torch.testing.assert_close(found, gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()) + 1e-9)


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
        found = {part: self.all[part % len(self.all)].gradient(step, part) for part in reversed(parts)}
        losses = [one.apply(step, [found[part] for part in parts]) for one in self.all]
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
    found = run(tiny_material, settings, cache=str(tmp_path))
    assert [look.step for look in found.looks] == [0, 2, 4, 6]
    assert (found.steps, found.best) == (6, 2)
    held_out = [look.held_out for look in found.looks]
    assert min(held_out[1:]) == held_out[1]


def test_low_rank_additions_leave_all_but_matrices_alone(tiny_material, tmp_path):
    found = run(tiny_material, BRIEF.model_copy(update={"rank": 2, "held_out": 0.0}), cache=str(tmp_path))
    merged = SharedModels(tiny_material.material.pool, tiny_material.tasks, tiny_material.owners, CPU)
    ResidentMerger(tiny_material.material, merged.weights).merge(tiny_material.material.check(START))
    for name, value in merged.weights.items():
        change = found.weights[name] - value
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


@pytest.mark.parametrize("batch", [1, 5, 12, 64])
def test_every_pass_has_every_example_once(batch):
    places = [np.arange(3, 40), np.arange(0, 11), np.array([5])]
    lengths = [np.arange(len(own)) % 7 for own in places]
    schedule = Schedule(places, lengths, batch, 3)
    count = schedule.steps_a_pass
    for number in range(3):
        steps = [schedule.step(number * count + at) for at in range(count)]
        for task, own in enumerate(places):
            seen = np.concatenate([step[task] for step in steps])
            assert sorted(seen.tolist()) == own.tolist()
        sizes = [sum(map(len, step)) for step in steps]
        assert max(sizes) <= batch + 3
    first, second = (np.concatenate([schedule.step(n * count + at)[0] for at in range(count)]) for n in (0, 1))
    assert batch == 64 or first.tolist() != second.tolist()


def test_parts_are_neighbours_and_nearly_equal():
    units = [np.arange(5), np.arange(0), np.arange(4)]
    cut = [list(parted(units, part, 4)) for part in range(4)]
    assert sorted(sum(len(places) for _, places in part) for part in cut) == [2, 2, 2, 3]
    joined = [(number, place) for part in cut for number, places in part for place in places]
    assert joined == [(0, 0), (0, 1), (0, 2), (0, 3), (0, 4), (2, 0), (2, 1), (2, 2), (2, 3)]


def test_without_held_out_examples_it_goes_to_the_end(tiny_material, tmp_path):
    found = run(tiny_material, replace_settings(held_out=0.0), cache=str(tmp_path))
    assert found.looks == ()
    assert found.steps == found.best == 6


def replace_settings(**changes):
    return BRIEF.model_copy(update=changes)


def test_steps_follow_the_inputs_where_none_are_named(tiny_material, tmp_path):
    tiny = tiny_material
    settings = DistillationSettings(batch=8)
    made = Distiller(tiny.material, tiny.tasks, tiny.owners, START, settings, CPU, str(tmp_path))
    assert made.steps == distillation.PASSES * made.schedule.steps_a_pass == 10 * round(66 / 8)
