"""Whole campaigns over a tiny pool, on a real Ray."""

import copy
import json
import re
import shutil
from io import StringIO
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from rich.console import Console
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from flows.campaign.run import run
from flows.campaign.summary import write_report
from flows.cli.merge import merge_recipe
from flows.cli.status import read_status
from flows.cli.winners import export_candidates
from flows.config.campaign_file import load_campaign
from flows.config.search_settings import WITH_DATA
from flows.directory.campaign_directory import Directory
from flows.directory.progress import Display
from flows.report.test_answers import KeptPredictions
from merging.checkpoints.checkpoint import Checkpoint
from merging.errors import LedgerError, MergequestError, PoolError, SettingsError, StatisticsError, TaskError
from merging.statistics import StatisticsFile
from search.ledger.ledger import Ledger
from search.objective import best, make_objective
from search.resolution import clear_best

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("local_ray")]
BRIEFLY = {"resources": {"evaluators": 1}, "test": {"top": 1}}
"""Of campaigns beside `finished`: each evaluator takes seconds to begin, each model on test a while."""
METHODS = {"average", "task_arithmetic", "ties", "fisher", "gradient_matching", "regmean", "regmean_propagated"}


@pytest.fixture(scope="module")
def finished(tiny_campaign, tmp_path_factory):
    """A campaign that was run once; read only."""
    root = tmp_path_factory.mktemp("finished")
    settings = copy.deepcopy(tiny_campaign) | {"directory": "out"}
    settings["search"] |= {"methods": sorted(METHODS), "theory": True}
    settings["statistics"]["propagated"] = {"examples": 16}
    (root / "campaign.yaml").write_text(yaml.safe_dump(settings))
    text = run(load_campaign(str(root / "campaign.yaml")), Display())
    return root / "out", text


def test_everything_is_left_where_it_is_said_to_be(finished):
    directory, text = finished
    for place in ("ledger", "exports/best", "report.html", "campaign.yaml"):
        assert str(directory / place) in text
        assert (directory / place).exists()
    for name in ("pool.json", "selection.json", "timings.json"):
        assert (directory / name).exists(), name
    assert not list(directory.rglob("*.tmp*"))


def test_the_ledger_is_read_by_pandas_as_it_stands(finished):
    directory, _ = finished
    frame = pd.read_parquet(directory / "ledger")
    tried = frame[(frame.split == "validation") & frame.origin.isin(["anchor", "search"])]
    assert len(tried) == 14
    assert set(frame[frame.origin == "anchor"].method) == METHODS
    assert set(frame[frame.origin == "reference"].method) == {"base", "member"}
    assert (frame.status == "complete").all(), frame.error.dropna().tolist()
    assert {len(scores) for scores in frame.scores} == {3}
    assert frame.data.nunique() == 1
    held = (frame.finished - frame.started).dt.total_seconds() / 3600
    assert (frame.cpu_hours > 0).all()
    assert (frame.cpu_hours <= held + 1e-3).all()
    assert (frame.gpu_hours == 0).all()


def test_no_search_ends_below_its_anchors(finished):
    directory, _ = finished
    rows = Ledger(str(directory / "ledger")).rows()
    winner = best(rows)[0]
    assert winner.objective >= max(row.objective for row in rows if row.origin == "anchor")
    tested = {row.candidate for row in rows if row.split == "test"}
    assert winner.candidate in tested
    by_method = {row.method: row for row in reversed(best(rows, 100))}
    assert all(row.candidate in tested for row in by_method.values())


def test_theory_predicts_and_proposes_nothing_unasked(finished):
    directory, _ = finished
    tried = [row for row in Ledger(str(directory / "ledger")).rows() if row.split == "validation"]
    assert not any("theory:examples" in row.proxies for row in tried)
    assert {row.method for row in tried if "theory:one" in row.proxies} == {"task_arithmetic", "regmean"}


def test_the_winner_loads_and_scores_as_it_was_measured(finished, tiny_campaign):
    directory, _ = finished
    path = directory / "exports" / "best"
    AutoModel.from_pretrained(path)
    winner = best(Ledger(str(directory / "ledger")).rows())[0]
    from safetensors.torch import load_file

    from merging.tasks import TextClassificationSettings, make_task

    for name in tiny_campaign["tasks"]:
        config = AutoConfig.from_pretrained(path / "heads" / name)
        model = AutoModelForSequenceClassification.from_pretrained(path, config=config).eval()
        head = load_file(path / "heads" / name / "head.safetensors")
        assert set(head) == {"classifier.weight", "classifier.bias"}
        assert not model.load_state_dict(head, strict=False).unexpected_keys
        settings = TextClassificationSettings(**tiny_campaign["tasks"][name])
        task = make_task(name, settings, tiny_campaign["members"][name]["checkpoint"])
        score = task.evaluate(model, "validation")
        assert score.value == winner.scores[name]
        assert score.loss == pytest.approx(winner.losses[name], rel=1e-6)


def test_the_card_and_the_recipe_repeat_the_winner(finished, tmp_path):
    directory, _ = finished
    best_path = directory / "exports" / "best"
    winner = best(Ledger(str(directory / "ledger")).rows())[0]
    card = (best_path / "README.md").read_text()
    assert winner.candidate in card
    assert winner.method in card
    for member in winner.members:
        assert re.search(rf"\| {member} \| ", card)
    merge_recipe(str(best_path / "recipe.yaml"), str(tmp_path / "again"), None, 1.0, Display())
    first, second = Checkpoint.open(str(best_path)), Checkpoint.open(str(tmp_path / "again"))
    assert first.fingerprint == second.fingerprint


def test_the_winner_is_compared_on_the_same_test_examples(finished):
    directory, text = finished
    tested = [row for row in Ledger(str(directory / "ledger")).rows() if row.split == "test"]
    kept = KeptPredictions(str(directory / "outcomes"))
    for row in tested:
        values = kept.read(row.candidate)
        assert {task: len(own) for task, own in values.items()} == dict(row.examples)
        assert {task: own.mean() for task, own in values.items()} == pytest.approx(dict(row.scores))
    for place in (text, (directory / "exports/best/README.md").read_text(), (directory / "report.html").read_text()):
        assert "winner − this" in place.lower()
        assert "(unpaired)" not in place
    assert max(map(len, text.split("ledger ")[0].splitlines())) <= 100


def test_the_winner_is_exported_again_from_the_campaigns_statistics(finished, tmp_path):
    directory, _ = finished
    shutil.copytree(directory, tmp_path / "out")
    winner = best(Ledger(str(directory / "ledger")).rows())[0]
    (place,) = export_candidates(str(tmp_path / "out"), [winner], Display()).values()
    assert Checkpoint.open(place).fingerprint == Checkpoint.open(str(directory / "exports" / "best")).fingerprint


def test_statistics_are_computed_once_and_published(finished, campaign_file, tmp_path):
    directory, _ = finished
    files = sorted((directory / "statistics").glob("*.safetensors"))
    assert {file.name.split(".")[1] for file in files} == {"fisher", "gram", "representation", "propagated"}
    times = {file: file.stat().st_mtime_ns for file in files}
    path = campaign_file(
        directory=str(tmp_path / "other"),
        search={"candidates": 2, "methods": ["fisher", "regmean"]},
        statistics={"cache": str(directory / "statistics")},
        **BRIEFLY,
    )
    run(load_campaign(str(path)), Display())
    assert {file: file.stat().st_mtime_ns for file in files} == times
    assert sorted((directory / "statistics").glob("*.safetensors")) == files
    assert not (tmp_path / "other" / "statistics").exists()


def test_the_propagated_solution_is_repeated_by_its_recipe(finished, tiny_campaign, tmp_path):
    directory, _ = finished
    (solution,) = (directory / "statistics").glob("pool.propagated.*")
    members = {name: member["checkpoint"] for name, member in tiny_campaign["members"].items()}
    recipe = {"base": tiny_campaign["base"], "members": members, "method": "regmean_propagated"}
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe | {"statistics": [str(solution)]}))
    merge_recipe(str(file), str(tmp_path / "merged"), None, 1.0, Display())
    written = Checkpoint.open(str(tmp_path / "merged"))
    values = StatisticsFile.open(str(solution))
    assert all(torch.equal(written.read(name), values.read(name)) for name in values.names)
    del members["two"]
    file.write_text(yaml.safe_dump(recipe | {"members": members, "statistics": [str(solution)]}))
    with pytest.raises(StatisticsError, match="of another checkpoint"):
        merge_recipe(str(file), str(tmp_path / "other"), None, 1.0, Display())


def test_published_statistics_stand_in_for_data(finished, campaign_file, tiny_campaign, tmp_path):
    directory, _ = finished
    members = {
        name: member
        | {
            "statistics": [
                str(file) for kind in ("fisher", "gram") for file in (directory / "statistics").glob(f"{name}.{kind}.*")
            ]
        }
        for name, member in tiny_campaign["members"].items()
    }
    tasks = {
        name: task | {"data": {split: file for split, file in task["data"].items() if split != "train"}}
        for name, task in tiny_campaign["tasks"].items()
    }
    path = campaign_file(
        members=members,
        tasks=tasks,
        selection={"mode": "all"},
        search={"candidates": 2, "methods": ["fisher", "regmean"]},
        directory=str(tmp_path / "out"),
        **BRIEFLY,
    )
    run(load_campaign(str(path)), Display())
    mine = {row.candidate: row for row in Ledger(str(tmp_path / "out/ledger")).rows() if row.split == "validation"}
    theirs = {row.candidate: row for row in Ledger(str(directory / "ledger")).rows() if row.split == "validation"}
    same = [key for key in mine if key in theirs and mine[key].method in ("regmean", "fisher")]
    assert len(same) >= 2
    assert all(mine[key].losses == theirs[key].losses for key in same)


def test_running_it_again_does_nothing(finished):
    directory, _ = finished
    before = {path: path.stat().st_mtime_ns for path in directory.rglob("*") if path.is_file() and path.name != ".lock"}
    run(load_campaign(str(directory / "campaign.yaml")), Display())
    after = {path: path.stat().st_mtime_ns for path in directory.rglob("*") if path.is_file() and path.name != ".lock"}
    assert after == before


def test_a_larger_budget_goes_on_in_a_directory_of_an_earlier_version_too(finished, tmp_path, capsys):
    """Such a one has a journal, which is not read, and a file that says where it is not."""
    directory, _ = finished
    shutil.copytree(directory, tmp_path / "out")
    (tmp_path / "out" / "study").mkdir()
    (tmp_path / "out" / "study" / "journal.log").write_text('{"op_code":0,"study_name":"somebody else"}\n')
    file = tmp_path / "out" / "campaign.yaml"
    file.write_text(file.read_text().replace("\nsearch:\n", "\nsearch:\n  storage: null\n"))
    assert "storage: null" in file.read_text()
    campaign = Directory(str(tmp_path / "out")).campaign()
    more = campaign.model_copy(
        update={
            "directory": str(tmp_path / "out"),
            "search": campaign.search.model_copy(update={"candidates": 17}),
            "resources": campaign.resources.model_copy(update=BRIEFLY["resources"]),
        }
    )
    capsys.readouterr()
    run(more, Display())
    assert "study/, which an earlier version kept, is not read" in " ".join(capsys.readouterr().err.split())
    before = {
        (row.candidate, row.split) for row in Ledger(str(directory / "ledger")).rows() if row.split == "validation"
    }
    after = {
        (row.candidate, row.split) for row in Ledger(str(tmp_path / "out/ledger")).rows() if row.split == "validation"
    }
    assert before < after
    assert len(after) == len(before) + 3


def test_status_and_report_from_the_directory_alone(finished):
    directory, _ = finished
    status = read_status(str(directory))
    assert (status.state, status.done, status.total, status.failed) == ("finished", 14, 14, 0)
    assert json.loads(status.as_json())["best"] == status.best
    before = (directory / "report.html").read_text()
    page = Path(write_report(str(directory))).read_text()
    assert len(page) == pytest.approx(len(before), rel=0.01)
    assert "tiny" in page
    hours = sum(row.cpu_hours for row in Ledger(str(directory / "ledger")).rows())
    assert status.cpu_hours == pytest.approx(hours)
    assert f"{hours:.3g} CPU hours" in page
    assert f"{hours:.3g} CPU hours" in status.as_text()


def test_hours_of_processors_are_a_budget_that_a_resume_goes_on_with(finished, tmp_path):
    directory, _ = finished
    shutil.copytree(directory, tmp_path / "out")
    campaign = load_campaign(str(directory / "campaign.yaml"), ["search.candidates=1000", "resources.evaluators=1"])
    campaign = campaign.model_copy(update={"directory": str(tmp_path / "out")})
    rows = Ledger(str(tmp_path / "out/ledger")).rows()
    spent = sum(row.cpu_hours for row in rows if row.split == "validation" and row.origin in ("anchor", "search"))
    with pytest.raises(SettingsError, match="gpu_hours: evaluators have no GPU"):
        run(campaign.model_copy(update={"search": campaign.search.model_copy(update={"gpu_hours": 1.0})}), Display())
    for budget, more in ((spent * 0.999, False), (spent * 1.5, True)):
        search = campaign.search.model_copy(update={"cpu_hours": budget})
        run(campaign.model_copy(update={"search": search}), Display())
        after = Ledger(str(tmp_path / "out/ledger")).rows()
        tried = [row for row in after if row.split == "validation" and row.origin in ("anchor", "search")]
        assert len(tried) > 14 if more else len(tried) == 14
        # one candidate is in flight, and one asked ahead; how many the budget is enough for is the machine's speed
        ahead = 2 * max(row.cpu_hours for row in tried)
        assert budget - ahead <= sum(row.cpu_hours for row in tried) < budget + ahead


def test_one_failing_candidate_is_a_row(campaign_file, tmp_path):
    # negative floors of a Fisher are refused by the method itself, candidate after candidate
    methods = {"average": {}, "task_arithmetic": {"scaling": {"low": 0.0, "high": 1e30}}}
    path = campaign_file(
        search={"methods": methods, "candidates": 8}, selection={"mode": "all"}, directory="out", **BRIEFLY
    )
    run(load_campaign(str(path)), Display())
    rows = [row for row in Ledger(str(tmp_path / "out/ledger")).rows() if row.origin in ("anchor", "search")]
    failed = [row for row in rows if row.status == "failed"]
    assert failed
    assert all("NaN or Inf" in row.error for row in failed)
    for row in failed:
        log = (tmp_path / "out" / "logs" / f"{row.candidate}-validation.log").read_text()
        assert "Traceback (most recent call last)" in log
        assert row.error.partition(": ")[2][:40] in log
    assert len(list((tmp_path / "out" / "logs").iterdir())) == len(failed)
    assert best(rows)


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        (
            lambda s, p: s["members"]["one"].update(checkpoint=str(p / "nowhere")),
            MergequestError,
            "no checkpoint directory",
        ),
        (lambda s, p: s["tasks"]["one"].update(label="lable"), TaskError, "(?s)task 'one'.*lable"),
        (lambda s, p: s["tasks"]["one"]["data"].update(validation=str(p / "no.parquet")), TaskError, "no.parquet"),
    ],
)
def test_bad_input_before_any_work(campaign_file, tmp_path, edit, error, message):
    path = campaign_file(directory="out")
    settings = yaml.safe_load(path.read_text())
    edit(settings, tmp_path)
    path.write_text(yaml.safe_dump(settings))
    with pytest.raises(error, match=message):
        run(load_campaign(str(path)), Display())
    assert not (tmp_path / "out" / "ledger").exists()
    assert not (tmp_path / "out" / "campaign.yaml").exists()


def test_another_campaign_in_the_directory(finished, campaign_file):
    directory, _ = finished
    path = campaign_file(directory=str(directory), seed=5)
    with pytest.raises(LedgerError, match=r"holds another campaign \('tiny'; it differs in search, seed, statistics\)"):
        run(load_campaign(str(path)), Display())


def test_other_things_in_the_directory(campaign_file, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(LedgerError, match="is not empty and holds no campaign"):
        run(load_campaign(str(campaign_file(directory="out"))), Display())
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years of work"


def test_two_drivers_do_not_meet(finished):
    directory, _ = finished
    with Directory(str(directory)).locked(), pytest.raises(LedgerError, match="another mergequest is running"):
        run(load_campaign(str(directory / "campaign.yaml")), Display())


def test_weights_with_nan_are_named(campaign_file, tiny_campaign, tmp_path):
    import yaml
    from safetensors.torch import load_file, save_file

    copied = shutil.copytree(tiny_campaign["members"]["two"]["checkpoint"], tmp_path / "two")
    values = load_file(copied / "model.safetensors")
    values["bert.pooler.dense.bias"][0] = torch.nan
    save_file(values, copied / "model.safetensors")
    path = campaign_file(directory="out")
    settings = yaml.safe_load(path.read_text())
    settings["members"]["two"]["checkpoint"] = str(copied)
    path.write_text(yaml.safe_dump(settings))
    with pytest.raises(PoolError, match=r"two: 'pooler\.dense\.bias' holds NaN or Inf"):
        run(load_campaign(str(path)), Display())


def test_factors_by_depth_under_constraints(campaign_file, tmp_path):
    search = {
        "methods": ["task_arithmetic"],
        "candidates": 5,
        "scaling": "per_depth",
        "depth_groups": 2,
        "line_search": False,
    }
    search |= {"constraints": [{"drop": 0.02}]}
    path = campaign_file(directory="out", selection={"mode": "all"}, search=search, **BRIEFLY)
    run(load_campaign(str(path)), Display())
    rows = Ledger(str(tmp_path / "out" / "ledger")).rows()
    own = {row.members[0]: row.scores[row.members[0]] for row in rows if row.method == "member" and row.split != "test"}
    tried = [row for row in rows if row.origin in ("anchor", "search")]
    assert [len(row.scaling) for row in tried] == [3, 3, 6, 6, 6], [row.error for row in tried]
    for row in tried:
        assert row.members == ("one", "three", "two")
        assert row.violations == pytest.approx({f"{task}.drop": own[task] - 0.02 - row.scores[task] for task in own})
    assert all(set(row.scaling) == {f"{m}@layers:{g}" for m in own for g in ("0", "1-")} for row in tried[2:])
    assert (tmp_path / "out" / "report.html").exists()


def test_starts_from_theory_and_gradients_and_a_distilled_end(campaign_file):
    methods = {"task_arithmetic": {}, "fisher": {}}
    start = {"method": "task_arithmetic", "scaling": {"one": 0.9, "two": 0.5, "three": 0.6}}
    settings = load_campaign(
        str(
            campaign_file(
                directory="out",
                search={
                    "candidates": 9,
                    "methods": methods,
                    "theory_starts": True,
                    "gradient": {"steps": 4, "batch": 8, "start": start},
                },
                distil={"steps": 4, "batch": 8},
                **BRIEFLY,
            )
        )
    )
    run(settings, Display())
    rows = [row for row in Ledger(Directory(settings.directory).ledger).rows() if row.split == "validation"]
    starts = {row.candidate: row for row in rows if row.origin == "anchor"}
    assert sorted(
        row.proxies["gradient:examples"] for row in starts.values() if "gradient:examples" in row.proxies
    ) == [
        48.0,
        90.0,
    ]
    led = [row for row in starts.values() if "gradient:examples" in row.proxies]
    far = [abs(row.scaling[member] - factor) for row in led for member, factor in start["scaling"].items()]
    assert 0 < max(far) < 0.25, "four steps of about 0.05 each from where it was told to start"
    predicted = [row for row in rows if row.method == "task_arithmetic"]
    assert all({"theory:one", "theory:two", "theory:three"} <= row.proxies.keys() for row in predicted)
    losses = {row.candidate: sum(row.proxies[f"theory:{task}"] for task in settings.tasks) for row in predicted}
    found = min(losses, key=losses.__getitem__)
    assert "theory:examples" in starts[found].proxies, (
        "no other candidate has a lower predicted loss than the minimiser"
    )
    distilled = next(row for row in rows if row.method == "distilled")
    assert distilled.parameters["start"] in {row.candidate for row in rows}
    assert {row.method for row in Ledger(Directory(settings.directory).ledger).rows() if row.split == "test"} >= {
        "distilled"
    }


def test_the_default_campaign_distils_into_the_best_merge_and_tells_what_each_stage_gained(campaign_file):
    path = campaign_file(directory="out", distil={"steps": 6, "batch": 9, "evaluations": 3}, **BRIEFLY)
    settings = yaml.safe_load(path.read_text())
    settings["search"] = {"candidates": 14, "patience": 2}
    path.write_text(yaml.safe_dump(settings))
    campaign = load_campaign(str(path))
    assert tuple(campaign.search.methods) == WITH_DATA
    assert campaign.search.pruning == "wilcoxon"
    console = Console(file=StringIO(), width=200)
    text = run(campaign, Display(console))
    rows = Ledger(Directory(campaign.directory).ledger).rows()
    tried = [row for row in rows if row.split == "validation" and row.origin in ("anchor", "search")]
    assert {row.method for row in tried} >= {*WITH_DATA, "average", "distilled"}
    assert not [row.error for row in tried if row.status == "failed"]
    merges = [row for row in best(rows, len(rows)) if row.method != "distilled"]
    made = next(row for row in tried if row.method == "distilled")
    kept = KeptPredictions(Directory(campaign.directory).validation_predictions)
    start = clear_best(merges, kept.read, make_objective("mean", list(campaign.tasks)))
    assert made.parameters["start"] == start.candidate
    assert f"starts from {start.method.replace('_', ' ')} ({start.candidate})" in console.file.getvalue()
    assert made.proxies["distil:steps"] == 6.0
    assert made.proxies["distil:examples"] == 54.0
    assert all(kept.read(row.candidate) for row in tried if row.status == "complete")
    for words in ("methods at their defaults", "distillation", "Gains on validation"):
        assert words in console.file.getvalue() + text  # tables wrap
    assert "distillation: distilled" in console.file.getvalue()
