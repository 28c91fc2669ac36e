import math

import optuna
import pytest
from optuna.trial import TrialState

from merging.errors import LedgerError, StorageError
from merging.methods.method import METHODS
from merging.recipe import Recipe
from search.candidate import Candidate, Provenance
from search.in_flight import measure
from search.ledger.ledger import Ledger
from search.loop import Budget, search
from search.objective import make_objective
from search.samplers.make_sampler import make_sampler
from search.space.search_space import MethodSpace, Space
from search.study import CANDIDATE, check_storage, open_study, read_shared_study

SPACE = Space({"task_arithmetic": MethodSpace(), "ties": MethodSpace()}, "ab", None, "per_member")


def scores(recipe):
    return {
        "x": 1 - abs(recipe.scaling["a"] - 0.6) - abs(recipe.scaling["b"] - 0.3) / 2 + 0.1 * (recipe.method == "ties")
    }


class Killed(BaseException):
    pass


@pytest.fixture
def quest(tmp_path, threads):
    """Runs a one-worker search in a directory of that name; may die before or after a row is written."""

    def run(name, candidates, space=SPACE, dies=None, url=None, sampler="tpe"):
        ledger = Ledger(str(tmp_path / name / "ledger"), "demo")
        extend = ledger.extend

        def dying(rows):
            if dies == ("before", len(ledger.rows())):
                raise Killed
            extend(rows)
            if dies == ("after", len(ledger.rows()) - 1):
                raise Killed

        ledger.extend = dying
        executor = threads(scores)
        with open_study(str(tmp_path / name / "study"), "demo", space, ledger, url) as study:
            states = [trial.state for trial in study.trials]
            search(
                study,
                space,
                lambda number: make_sampler(sampler, 1, None, number),
                ledger,
                executor,
                make_objective("mean", ["x"]),
                Provenance("demo"),
                Budget(candidates),
            )
        run.states, run.study, run.submitted = states, study, executor.submitted
        return [(row.trial, row.candidate, row.objective, row.origin) for row in ledger.rows()]

    return run


def journal(tmp_path, name):
    return tmp_path / name / "study" / "journal.log"


def test_a_new_study_has_its_anchors_waiting(tmp_path):
    with open_study(str(tmp_path), "demo", SPACE, Ledger(str(tmp_path / "ledger"))) as study:
        waiting = study.get_trials(states=(TrialState.WAITING,))
        heard = [recipe.identity for recipe in SPACE.baselines() if recipe in SPACE]
        assert [trial.user_attrs[CANDIDATE] for trial in waiting] == heard
        assert len(study.trials) == len(heard) == 2


@pytest.mark.parametrize("sampler", ["tpe", "cmaes", "nsga2", "qmc"])
def test_dying_beside_a_row_changes_nothing(quest, sampler):
    unbroken = quest("unbroken", 14, sampler=sampler)
    for death in (("before", 0), ("after", 2), ("before", 9), ("after", 9), ("before", 11)):
        with pytest.raises(Killed):
            quest("broken", 14, dies=death, sampler=sampler)
    assert quest("broken", 14, sampler=sampler) == unbroken


def test_a_journal_cut_anywhere_does_no_harm(quest, tmp_path):
    unbroken = quest("unbroken", 12)
    path = journal(tmp_path, "cut")
    for number, cut in enumerate((1, 7, 100, 333, 1000, 2500)):
        with pytest.raises(Killed):
            quest("cut", 12, dies=("after", 4 + number))
        path.write_bytes(path.read_bytes()[:-cut])
    assert quest("cut", 12) == unbroken
    assert path.read_bytes().endswith(b"\n")


@pytest.mark.parametrize("damage", ["missing", "empty", "binary", "half", "other"])
def test_a_lost_journal_is_rebuilt_from_the_ledger(quest, tmp_path, damage):
    unbroken = quest("unbroken", 12)
    quest("rebuilt", 9)
    path = journal(tmp_path, "rebuilt")
    if damage == "missing":
        path.unlink()
    elif damage == "other":
        path.write_text('{"op_code":0,"worker_id":"w","study_name":"someone else","directions":[2]}\n')
    else:
        damaged = {"empty": b"", "binary": b"\x00\xff" * 99 + b"\n", "half": path.read_bytes()[200:]}
        path.write_bytes(damaged[damage])
    assert quest("rebuilt", 12) == unbroken
    assert quest.states == [TrialState.COMPLETE] * 8
    assert len(quest.submitted) == 3


def test_a_killed_drivers_lock_does_not_hold_up_the_next(quest, tmp_path):
    quest("locked", 5)
    lock = tmp_path / "locked" / "study" / "journal.log.lock"
    lock.symlink_to("journal.log")
    assert len(quest("locked", 6)) == 6
    assert not lock.is_symlink()


def test_two_drivers_do_not_share_a_campaign(tmp_path):
    ledger = Ledger(str(tmp_path / "ledger"))
    with open_study(str(tmp_path), "demo", SPACE, ledger):  # noqa: SIM117
        with (
            pytest.raises(LedgerError, match="another process is running this campaign"),
            open_study(str(tmp_path), "demo", SPACE, ledger),
        ):
            pytest.fail("the second was let in")
    with open_study(str(tmp_path), "demo", SPACE, ledger) as study:
        assert study.study_name == "demo"


def test_an_undisturbed_journal_is_left_as_it_is(quest, tmp_path):
    quest("calm", 8)
    before = journal(tmp_path, "calm").read_bytes()
    quest("calm", 8)
    assert journal(tmp_path, "calm").read_bytes() == before


def test_rows_are_kept_when_the_space_changes(quest):
    before = quest("wider", 10)
    wider = Space(
        {"task_arithmetic": MethodSpace(), "ties": MethodSpace(), "regmean": MethodSpace()},
        "ab",
        None,
        "per_member",
    )
    after = quest("wider", 14, space=wider)
    assert after[:10] == before
    assert len(after) == 14
    assert {trial.distributions["method"].choices for trial in quest.study.trials} == {
        ("task_arithmetic", "ties", "regmean")
    }
    narrower = Space({"ties": MethodSpace()}, "ab", None, "per_member")
    assert quest("wider", 16, space=narrower)[:14] == after
    numbers = [row[0] for row in quest("wider", 16, space=narrower) if row[0] is not None]
    assert len(set(numbers)) == len(numbers) >= 14


def measured_before(tmp_path, name, threads):
    """Rows of an earlier stage: two that the space has, one that fails there, and two that it has not."""
    recipes = [
        Recipe("task_arithmetic", {"a": 0.6, "b": 0.3}),
        Recipe("average", {"a": 1.0, "b": 1.0}),
        Recipe("task_arithmetic", {"a": 0.6}),
        Recipe("task_arithmetic", {"a": 0.9, "b": 0.9}),
        Recipe("task_arithmetic", {"a": 0.2, "b": 0.2}),
    ]
    recipes = [METHODS[recipe.method].complete(recipe) for recipe in recipes]
    executor = threads(lambda recipe: scores(recipe) if recipe is not recipes[3] else {"x": math.nan})
    candidates = [Candidate(recipe, "validation", "anchor") for recipe in recipes]
    ledger = Ledger(str(tmp_path / name / "ledger"), "demo")
    return measure(candidates, executor, ledger, make_objective("mean", ["x"]), Provenance("demo"))


@pytest.mark.parametrize("damage", ["none", "killed", "journal"])
def test_what_was_measured_before_is_heard_by_the_study_where_it_lies_in_its_space(quest, tmp_path, threads, damage):
    before = measured_before(tmp_path, "unbroken", threads)
    unbroken = quest("unbroken", 14)
    assert quest.states[:3] == [TrialState.COMPLETE, TrialState.FAIL, TrialState.COMPLETE]
    heard = quest.study.trials[:3]
    assert [trial.user_attrs[CANDIDATE] for trial in heard] == [before[i].candidate for i in (0, 3, 4)]
    assert [trial.values for trial in heard] == [[before[0].objective], None, [before[4].objective]]
    assert [number for number, *_ in unbroken[:5]] == [None] * 5
    assert min(number for number, *_ in unbroken if number is not None) == 3
    assert len({trial.user_attrs.get(CANDIDATE) for trial in quest.study.trials}) == len(quest.study.trials)
    measured_before(tmp_path, "broken", threads)
    if damage == "killed":
        with pytest.raises(Killed):
            quest("broken", 14, dies=("after", 9))
    elif damage == "journal":
        quest("broken", 10)
        journal(tmp_path, "broken").unlink()
    assert quest("broken", 14) == unbroken


def test_failed_candidates_are_measured_again_where_that_is_asked_for(tmp_path, threads):
    sick = {"task_arithmetic"}

    def measure_or_fail(recipe):
        if recipe.method in sick:
            raise RuntimeError(f"CUDA error at {recipe.identity}")
        return scores(recipe)

    def run(*, retry_failed=False, journal=True):
        ledger = Ledger(str(tmp_path / "ledger"), "demo", retry_failed=retry_failed)
        if not journal:
            (tmp_path / "study" / "journal.log").unlink()
        executor = threads(measure_or_fail)
        with open_study(str(tmp_path / "study"), "demo", SPACE, ledger) as study:
            search(
                study,
                SPACE,
                lambda number: make_sampler("random", 1, None, number),
                ledger,
                executor,
                make_objective("mean", ["x"]),
                Provenance("demo"),
                Budget(12),
            )
        return executor.submitted, ledger.rows()

    _, rows = run()
    failed = {row.candidate for row in rows if row.status == "failed"}
    assert 2 <= len(failed) < 12
    sick.clear()
    assert run()[0] == []
    again, rows = run(retry_failed=True, journal=False)
    assert {candidate.recipe.identity for candidate in again} == failed
    assert len(again) == len(failed)
    assert {row.status for row in rows} == {"complete"}
    assert len(rows) == 12
    assert sum(row.origin == "anchor" for row in rows) == 3
    _, rows = run()
    assert {row.status for row in rows} == {"complete"}
    assert len(rows) == 12
    assert run(retry_failed=True)[0] == []


def test_a_space_that_is_the_same_is_not_looked_through_again(quest, monkeypatch):
    quest("same", 12)
    looked = []
    distributions = Space.distributions
    monkeypatch.setattr(Space, "distributions", lambda self, recipe: looked.append(1) or distributions(self, recipe))
    quest("same", 12)
    assert len(looked) < 10  # anchors, and what no trial has
    looked.clear()
    quest("same", 12, space=Space({"task_arithmetic": MethodSpace(), "ties": MethodSpace()}, "ab", None, "shared"))
    assert len(looked) > 10


def test_a_study_in_a_database(quest, tmp_path):
    url = f"sqlite:///{tmp_path}/study.db"
    unbroken = quest("unbroken", 6)
    with pytest.raises(Killed):
        quest("database", 6, dies=("before", 4), url=url)
    assert quest("database", 6, url=url) == unbroken
    assert len(optuna.load_study(study_name="demo", storage=url).trials) == 5  # the average is no trial
    assert not journal(tmp_path, "database").exists()


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
def test_a_study_of_the_same_name_that_is_anothers_is_refused_and_left_as_it_is(quest, tmp_path, direction):
    url = f"sqlite:///{tmp_path}/study.db"
    theirs = optuna.create_study(study_name="demo", storage=url, direction=direction)
    theirs.optimize(lambda trial: trial.suggest_float("lr", 0, 1), n_trials=3)
    before = [(trial.number, trial.params, trial.values) for trial in theirs.trials]
    with pytest.raises(StorageError, match="'demo' that is not this campaign's"):
        quest("mine", 6, url=url)
    with pytest.raises(StorageError, match="another `name`"):
        check_storage(url, "demo", str(tmp_path / "mine" / "study"))
    assert read_shared_study(url, "demo", str(tmp_path / "mine" / "study")) is None
    again = optuna.load_study(study_name="demo", storage=url)
    assert [(trial.number, trial.params, trial.values) for trial in again.trials] == before
    theirs.tell(theirs.ask(), 0.1)


def test_two_campaigns_of_one_name_do_not_share_a_database(quest, tmp_path):
    url = f"sqlite:///{tmp_path}/study.db"
    quest("first", 4, url=url)
    with pytest.raises(StorageError, match="not this campaign's"):
        quest("second", 4, url=url)
    assert len(quest("first", 6, url=url)) == 6
    assert read_shared_study(url, "demo", str(tmp_path / "first" / "study")).study_name == "demo"


def test_a_storage_that_does_not_open_keeps_its_password(tmp_path):
    with (
        pytest.raises(StorageError, match="check its URL") as caught,
        open_study(str(tmp_path), "demo", SPACE, Ledger(str(tmp_path)), "nosuchdb://user:secret@host/db"),
    ):
        pytest.fail("it opened")
    assert "secret" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_a_directory_on_an_object_store_has_its_study_in_memory(threads):
    ledger = Ledger("memory://study-test/ledger", "demo")
    for candidates in (6, 9):
        with open_study("memory://study-test/study", "demo", SPACE, ledger) as study:
            known = len(study.get_trials(states=(TrialState.COMPLETE,)))
            search(
                study,
                SPACE,
                lambda number: make_sampler("tpe", 1, None, number),
                ledger,
                threads(scores),
                make_objective("mean", ["x"]),
                Provenance("demo"),
                Budget(candidates),
            )
    assert known == 5
    assert len(Ledger("memory://study-test/ledger").rows()) == 9
