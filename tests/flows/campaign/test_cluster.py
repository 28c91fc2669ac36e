"""What a campaign file says of its workers' environment."""

from pathlib import Path

import pytest

from flows.campaign.cluster import worker_environment
from flows.campaign.run import check
from flows.cli.submit import modules_of, pack, prepare
from flows.config.campaign_file import load_campaign
from flows.directory.progress import Display
from merging.errors import SettingsError
from merging.io.secrets import storable


def load(campaign_file, **environment):
    return load_campaign(str(campaign_file(environment=environment)))


def test_secrets_are_looked_up_and_kept_apart(campaign_file, monkeypatch):
    monkeypatch.setenv("MY_SECRET", "hidden")
    campaign = load(campaign_file, env={"PLAIN": "1", "KEY": "a-${MY_SECRET}"}, pip=["wheel"])
    result = worker_environment(campaign)
    assert (result.env, result.secrets, result.pip) == ({"PLAIN": "1"}, {"KEY": "a-hidden"}, ("wheel",))
    assert "hidden" not in campaign.model_dump_json() + repr(result)
    assert campaign.identity() == load(campaign_file).identity()
    monkeypatch.delenv("MY_SECRET")
    with pytest.raises(SettingsError, match=r"environment.env.KEY: the environment variable MY_SECRET is not set"):
        worker_environment(campaign)


def test_what_a_variable_holds_is_hidden_whatever_it_is_called(campaign_file, monkeypatch):
    monkeypatch.setenv("MY_LOGIN", "correct horse battery")
    monkeypatch.setenv("MY_PLACE", "/scratch/of-mine")
    worker_environment(load(campaign_file, env={"LOGIN": "${MY_LOGIN}", "PLACE": "${MY_PLACE}"}))
    assert storable("with correct horse battery in /scratch/of-mine") == "with *** in /scratch/of-mine"


@pytest.mark.parametrize("value", ["hf_abcdefghijklmnopqrstu", "https://user:secret@host"])
def test_a_secret_written_out_is_refused(campaign_file, value):
    with pytest.raises(SettingsError, match=r"secret|password") as error:
        load(campaign_file, env={"HF_TOKEN": value})
    assert value not in str(error.value)


@pytest.mark.parametrize("name", ["search", "merging.py", "mergequest"])
def test_a_directory_that_would_hide_the_program_is_refused(campaign_file, tmp_path, name):
    (tmp_path / "sent").mkdir()
    campaign = load(campaign_file, working_dir="sent")
    assert worker_environment(campaign).working_dir == str(tmp_path / "sent")
    (tmp_path / "sent" / name).mkdir()
    with pytest.raises(SettingsError, match=f"holds {name}, which would come before the program's own"):
        worker_environment(campaign)
    with pytest.raises(SettingsError, match="there is no local directory"):
        worker_environment(load(campaign_file, working_dir="nowhere"))


def test_a_file_in_the_place_of_the_statistics_is_said_before_work(campaign_file, tmp_path):
    (tmp_path / "cache").write_text("")
    with pytest.raises(SettingsError, match="statistics.cache: .* is a file; name a directory"):
        check(load_campaign(str(campaign_file(statistics={"cache": "cache"}))), Display())


def test_submit_sends_a_custom_evaluator_and_what_it_imports_from_there(
    campaign_file, tiny_campaign, tmp_path, monkeypatch
):
    work = tmp_path / "work"
    (work / "my_package").mkdir(parents=True)
    monkeypatch.chdir(work)
    Path("my_score.py").write_text("import json, yaml\nfrom my_helper import half\nimport my_package.inner\n")
    Path("my_helper.py").write_text("import my_score\n")
    Path("my_package/__init__.py").write_text("")
    Path("my_package/inner.py").write_text("import my_third\n")
    for name in ("my_third", "unused", "yaml", "search", "json"):
        Path(f"{name}.py").write_text("")
    custom = {"kind": "custom", "evaluator": "my_score:score", "model_class": "AutoModelForSequenceClassification"}
    file = campaign_file(tasks={"one": custom}, selection={"mode": "all"}, search={"methods": ["average"]})
    campaign = load_campaign(str(file))
    assert {path.name for path in modules_of(campaign)} == {"my_score.py", "my_helper.py", "my_package", "my_third.py"}
    place = tmp_path / "packed"
    place.mkdir()
    pack(prepare("campaign", str(file), str(tmp_path / "out")), place)
    assert (place / "my_package" / "inner.py").read_text() == "import my_third\n"
    assert (place / "my_score.py").exists()
    assert (place / "search" / "loop.py").exists()
    assert not (place / "unused.py").exists()
    assert prepare("statistics", str(file), None).modules == modules_of(campaign)  # which opens every task
    sent = load_campaign(str(campaign_file(tasks={"one": custom}, environment={"working_dir": str(work)})))
    with pytest.raises(SettingsError, match=r"holds search.py"):
        modules_of(sent)
    Path("search.py").unlink()
    assert {path.name for path in modules_of(sent)} >= {"unused.py", "my_score.py"}


def test_submit_sends_whatever_grades_or_proposes(campaign_file, tiny_campaign, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("my_grade", "my_sampler", "my_helper"):
        Path(f"{name}.py").write_text("import my_helper\n")
    task = {"kind": "causal_lm", "data": tiny_campaign["tasks"]["one"]["data"], "metric": "my_grade:grade"}
    search = {"methods": ["average"], "sampler": "my_sampler:Sampler"}
    campaign = load_campaign(str(campaign_file(tasks={"one": task}, search=search)))
    assert {path.name for path in modules_of(campaign)} == {"my_grade.py", "my_sampler.py", "my_helper.py"}


def test_what_is_sent_to_the_nodes_is_looked_at_here(campaign_file, tmp_path):
    (tmp_path / "sent").mkdir()
    score = "def score(model, checkpoint, split, limit):\n    return 1.0\n"
    sampler = "from optuna.samplers import RandomSampler\n\n\nclass Own(RandomSampler):\n    pass\n"
    (tmp_path / "sent" / "a_sent_module.py").write_text(score + sampler)
    custom = {
        "kind": "custom",
        "evaluator": "a_sent_module:score",
        "model_class": "AutoModelForSequenceClassification",
    }
    search = {"methods": ["average"], "sampler": "a_sent_module:Own"}
    settings = {
        "tasks": {"one": custom},
        "search": search,
        "environment": {"working_dir": "sent"},
        "selection": {"mode": "all"},
    }
    check(load_campaign(str(campaign_file(directory=str(tmp_path / "out"), **settings))), Display())
