"""Samplers of the user's own and of OptunaHub's, in a search."""

import importlib
import sys
from pathlib import Path

import optuna
import pytest
from optuna.samplers import RandomSampler, TPESampler

from flows.config.campaign_file import load_campaign
from merging.errors import MergequestError, SettingsError
from search.budget import Budget
from search.candidate import Provenance
from search.ledger.ledger import Ledger
from search.loop import search
from search.objective import make_objective
from search.samplers.make_sampler import memories, sampler_of_trials
from search.space.method_space import MethodSpace
from search.space.search_space import Space

MINE = """
from optuna.samplers import RandomSampler

class Counting(RandomSampler):
    heard = []

    def __init__(self, seed=None, factor=1.0):
        super().__init__(seed)
        self.made = (seed, factor)
        Counting.heard.clear()

    def after_trial(self, study, trial, state, values):
        Counting.heard.append((trial.number, state.name, values))
        study.stop()

class Broken(RandomSampler):
    def sample_independent(self, study, trial, name, distribution):
        raise KeyError("no idea at https://u:secret@host")

class Noting(RandomSampler):
    def before_trial(self, study, trial):
        for name, value in (("plain", [1.5]), ("object", object()), ("surrogate", chr(0xD800)), ("deep", deep())):
            study._storage.set_trial_system_attr(trial._trial_id, f"mine:{name}", value)

class Moody(RandomSampler):
    asked = 0

    def sample_independent(self, study, trial, name, distribution):
        Moody.asked += 1
        raise ValueError(f"no idea for the {Moody.asked}th time")

def deep():
    value = []
    for _ in range(150):
        value = [value]
    return value

def build(factor=2.0):
    return Counting(7, factor)

def nothing():
    return 3

value = 3
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my_samplers.py").write_text(MINE)
    yield tmp_path
    sys.modules.pop("my_samplers", None)
    sys.meta_path[:] = [finder for finder in sys.meta_path if getattr(finder, "directory", None) != str(tmp_path)]
    importlib.invalidate_caches()


@pytest.fixture
def run(tmp_path, threads):
    def run(name, arguments=None, candidates=8):
        space = Space({"task_arithmetic": MethodSpace()}, "ab", None, "per_member")
        study = optuna.create_study(direction="maximize")
        ledger = Ledger(str(tmp_path / "ledger"), "demo")
        search(
            study,
            space,
            sampler_of_trials(name, 5, arguments),
            ledger,
            threads(lambda recipe: {"one": 0.5 + 0.1 * recipe.scaling["a"]}),
            make_objective("mean", ["one"]),
            Provenance("demo"),
            Budget(candidates),
        )
        return study, ledger.rows()

    return run


@pytest.mark.parametrize("name", ["my_samplers:Counting", "my_samplers:build"])
def test_a_sampler_of_one_s_own_proposes_and_hears_of_every_end(place, run, name):
    study, rows = run(name, {"factor": 3.0})
    assert len(rows) == 8
    import my_samplers

    reported = my_samplers.Counting.heard
    assert 4 < len(reported) < 8  # of the last ones it would hear before it proposed again
    assert reported == [(trial.number, "COMPLETE", [trial.value]) for trial in study.trials[: len(reported)]]
    sampler = sampler_of_trials(name, 5, {"factor": 3.0})(0)
    assert sampler is not None
    assert sampler._sampler.made == ((5, 3.0) if name.endswith("Counting") else (7, 3.0))


def test_any_of_optuna_s_own_by_its_place(run):
    _, rows = run("optuna.samplers:TPESampler", {"n_startup_trials": 3})
    assert len({row.candidate for row in rows}) == 8
    assert isinstance(sampler_of_trials("optuna.samplers:TPESampler", 1)(3)._sampler, TPESampler)


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("my_samplers:", None, "expected optunahub:samplers/NAME"),
        ("my_samplers:a b", None, "or module:attribute"),
        ("optunahub:", None, "expected optunahub:samplers/NAME"),
        ("my_sampler:Counting", None, "cannot import 'my_sampler'"),
        ("my_samplers:value", None, "has no class or function 'value'"),
        ("my_samplers:Nothing", None, "has no class or function 'Nothing'"),
        ("my_samplers:nothing", None, "gave a int, and no sampler"),
        ("my_samplers:Counting", {"wrong": 1}, "refuses its arguments"),
    ],
)
def test_what_is_no_sampler_is_said(place, name, arguments, said):
    with pytest.raises(SettingsError, match=said):
        sampler_of_trials(name, 5, arguments)


def test_one_that_fails_names_itself_and_shows_no_secret(place, run):
    with pytest.raises(MergequestError, match="sampler 'my_samplers:Broken' failed: KeyError") as error:
        run("my_samplers:Broken")
    assert "secret" not in str(error.value)


def test_of_its_notes_a_row_has_what_a_file_can_hold(place, run, tmp_path):
    _, rows = run("my_samplers:Noting")
    assert len(rows) == 8
    again = Ledger(str(tmp_path / "ledger"), "demo").rows()
    notes = [row.sampler["notes"] for row in again if row.trial is not None and row.origin == "search"]
    assert notes
    assert all(result == {"mine:plain": [1.5]} for result in notes)


def test_one_that_fails_otherwise_each_time_ends_the_search(place, run):
    with pytest.raises(MergequestError, match="100 proposals in a row led to nothing new.*no idea for the 100th time"):
        run("my_samplers:Moody")


@pytest.mark.parametrize("inner", ["my_samplers:Counting", "optunahub:samplers/auto_sampler"])
def test_beside_quality_diversity_it_is_refused_and_not_imported(campaign_file, inner):
    with pytest.raises(SettingsError, match="sampler 'quality_diversity' takes one of"):
        load_campaign(
            str(campaign_file()),
            ["search.sampler=quality_diversity", f"search.sampler_arguments={{sampler: '{inner}'}}"],
        )


@pytest.mark.parametrize(
    ("arguments", "said"), [("{sampler: 3}", "unknown sampler '3'"), ("{sampler_arguments: 3}", "= 3 is no mapping")]
)
def test_what_stands_beside_quality_diversity_is_looked_at(campaign_file, arguments, said):
    with pytest.raises(SettingsError, match=said):
        load_campaign(
            str(campaign_file()), ["search.sampler=quality_diversity", f"search.sampler_arguments={arguments}"]
        )


def test_it_sees_all_trials_whatever_its_arguments_are_called():
    assert memories("my_samplers:Counting", {"n_startup_trials": [1]}) is None


def test_a_package_of_optunahub_s(tmp_path, run, monkeypatch):
    pytest.importorskip("optunahub", reason="OptunaHub is not installed: pip install 'mergequest[optunahub]'")
    package = tmp_path / "registry" / "samplers" / "mine"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(MINE.replace("value = 3", "__all__ = ['Counting']"))
    _, rows = run(f"optunahub:{package}")
    assert len(rows) == 8
    assert isinstance(sampler_of_trials(f"optunahub:{package}:Broken", 1)(0)._sampler, RandomSampler)
    with pytest.raises(SettingsError, match="the package has no 'Nothing'"):
        sampler_of_trials(f"optunahub:{package}:Nothing", 1)
    (package / "__init__.py").write_text(MINE)
    with pytest.raises(SettingsError, match=r"has Counting, Broken, Noting, Moody of that kind: name one, .*:CLASS"):
        sampler_of_trials(f"optunahub:{package}", 1)
    import optunahub

    def unreachable(*arguments, **settings):
        raise ConnectionError("no network")

    monkeypatch.setattr(optunahub, "load_module", unreachable)
    with pytest.raises(SettingsError, match=r"cannot be had from OptunaHub: ConnectionError: no network\nIs there"):
        sampler_of_trials("optunahub:samplers/auto_sampler@abc123", 1)


def test_a_campaign_file_is_read_without_importing_or_fetching_it(campaign_file):
    for name in ("optunahub:samplers/auto_sampler", "nowhere:Sampler"):
        assert load_campaign(str(campaign_file()), [f"search.sampler={name}"]).search.sampler == name
    with pytest.raises(SettingsError, match="expected optunahub:samplers/NAME"):
        load_campaign(str(campaign_file()), ["search.sampler='optunahub: x'"])
