"""The command line as a user runs it: in processes of their own."""

import json
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import jsonschema
import pandas as pd
import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file, save_file

from flows.campaign.open_campaign import open_campaign
from flows.config.campaign_file import load_campaign
from flows.directory.campaign_directory import Directory
from flows.directory.progress import Display
from merging.methods import METHODS
from merging.statistics import StatisticsFile
from merging.versions import code_version
from search.ledger.ledger import Ledger
from search.ledger.row import Row
from tests.flows.cli.running import COMMAND, mergequest


def test_help_answers_without_the_heavy_packages():
    heavy = {"torch", "numba", "ray", "transformers", "optuna", "pandas"}
    code = f"import sys, flows.cli.app; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    output, status = mergequest("--help")
    assert status == 0
    assert "mergequest run my.yaml" in output


def test_init_writes_a_file_that_loads(tmp_path):
    file = tmp_path / "my.yaml"
    output, status = mergequest("init", file)
    assert status == 0
    assert f"mergequest run {file}" in output.replace("\n", "")
    assert yaml.safe_load(file.read_text())["search"]["candidates"] == 64
    before = file.read_text()
    output, status = mergequest("init", file)
    assert (status, file.read_text()) == (2, before)
    assert "--force" in output


def test_init_writes_the_schema_that_editors_read(tmp_path):
    """It takes what the file takes, short forms included, and refuses an unknown key and a wrong type."""
    file = tmp_path / "my.yaml"
    mergequest("init", file)
    first = file.read_text().splitlines()[0]
    schema = json.loads((tmp_path / first.partition("$schema=")[2]).read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    settings = yaml.safe_load(file.read_text())
    short = settings | {"members": {"amazon": "a", "nyt": {"checkpoint": "b"}}, "search": {"methods": {"ties": None}}}
    for good in (settings, short, load_campaign(str(file)).model_dump(mode="json")):
        jsonschema.validate(good, schema)
    for bad in ({"membres": {}}, {"search": {"candidates": "many"}}, {"distil": {"step": 3}}, {"tasks": {"a b": {}}}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(settings | bad, schema)


def test_settings_of_the_command_line_stand_in_the_file_s_place(campaign_file):
    """Of any kind, in short forms too, and below names with dots; what is wrong with one is said as of the file."""
    file = campaign_file(
        members={"v1.5": "x"}, tasks={"v1.5": {"kind": "custom", "evaluator": "a:b", "model_class": "M"}}
    )
    assignments = [
        "search.candidates=7",
        "search.objective=[mean, worst]",
        "members.v1.5.examples=12",
        "distil={steps: 3}",
    ]
    result = load_campaign(str(file), [*assignments, "search.seconds=null", "base=other", "search.candidates=9"])
    assert (result.search.candidates, result.search.objectives, result.distil.steps) == (9, ("mean", "worst"), 3)
    assert (result.members["v1.5"].examples, result.search.seconds) == (12, None)
    assert result.base == str(file.parent / "other")
    methods = load_campaign(
        str(file), ["search.methods=[ties, linear]", "search.methods.ties.scaling=0.5"]
    ).search.methods
    assert list(methods) == ["ties", "linear"]
    for assignment, said in (
        ("search.candidate=7", "search.candidate: unknown key. Did you mean 'candidates'?"),
        ("search.candidates=many", "search.candidates: "),
        ("search.candidates", "expected KEY=VALUE"),
        ("=3", "expected KEY=VALUE"),
        ("search.candidates={", "is not valid YAML"),
        ("name.more=1", "'name' is 'tiny' there, and has no keys"),
        ("tasks.v1.5.evaluator.x=1", "'tasks.v1.5.evaluator' is 'a:b' there"),
        ("search.storage=postgresql://user:secret@host/db", "password"),
        ("search.storage=sqlite:///study.db", "the study is made of the ledger"),
    ):
        output, status = mergequest("check", file, "--set", assignment)
        assert (status, said in " ".join(output.split())) == (2, True), output
        assert "secret" not in output.replace("--set", "")


def test_the_version_and_one_method_are_told():
    assert mergequest("--version") == (f"mergequest {code_version()}\n", 0)
    output, status = mergequest("methods", "ties")
    assert (status, "density" in output, "breadcrumbs" in output) == (0, True, False)
    output, status = mergequest("methods", "tiess")
    assert (status, "Did you mean 'ties'?" in output.replace("\n", " ")) == (2, True)
    every = json.loads(mergequest("methods", "--json")[0])
    one = json.loads(mergequest("methods", "ties", "--json")[0])
    assert one in every
    assert one["parameters"]["density"]["default"] == METHODS["ties"].parameters["density"].default
    assert {method["name"] for method in every} >= {"average", "regmean"}
    assert next(method for method in every if method["name"] == "regmean")["statistics"] == ["gram"]


def test_ls_shows_the_campaigns_below_a_place(campaign_file, tmp_path):
    for name, place in (("first", "runs/first"), ("second", "runs/vision/second"), ("third", "else")):
        campaign = load_campaign(str(campaign_file(name=name, directory=place)))
        Directory(campaign.directory).claim(campaign, {})
    (tmp_path / "runs/broken").mkdir()
    (tmp_path / "runs/broken/campaign.yaml").write_text("name: [")
    (tmp_path / "runs/broken/pool.json").write_text("{}")

    def seen(prefix):
        lines = [json.loads(line) for line in mergequest("ls", prefix, "--json")[0].splitlines()]
        return {Path(line["directory"]).name: line.get("state", "error" in line) for line in lines}

    assert seen(tmp_path / "runs") == {"broken": True, "first": "unfinished", "second": "unfinished"}
    assert seen(f"{tmp_path}/runs/v") == {"second": "unfinished"}
    assert seen(tmp_path / "else") == {"else": "unfinished"}
    output, status = mergequest("ls", tmp_path / "runs")
    assert (status, "unreadable" in output, "0/" in output) == (0, True, True)
    output, status = mergequest("ls", tmp_path / "nothing")
    assert (status, "no campaign's directory" in output.replace("\n", " ")) == (2, True)


def test_bad_input_is_one_message_and_exit_code_2(tmp_path):
    file = tmp_path / "bad.yaml"
    file.write_text("base: x\nmembres: {}\n")
    done = subprocess.run([*COMMAND, "run", str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "membres: unknown key. Did you mean 'members'?" in done.stderr
    assert "Traceback" not in done.stderr
    requested = subprocess.run([*COMMAND, "--traceback", "run", str(file)], capture_output=True, text=True, check=False)
    assert requested.returncode != 0
    assert "Traceback" in requested.stderr


def test_methods_lists_what_there_is():
    output, status = mergequest("methods")
    assert status == 0
    assert all(name in output for name in ("regmean", "ties", "gram", "density"))


def test_check_computes_nothing(campaign_file, tmp_path):
    output, status = mergequest("check", campaign_file(directory="out"))
    assert status == 0, output
    assert "Nothing is wrong" in output
    assert not (tmp_path / "out").exists()


def test_check_finds_what_a_run_would_stop_at_later(campaign_file, tiny_campaign, tmp_path):
    """Without it, these come after minutes: a missing split when statistics begin, a full place when they end."""
    (tmp_path / "file").write_text("")
    output, status = mergequest("check", campaign_file(directory="file"))
    assert (status, "file is a file; name a directory" in output.replace("\n", "")) == (2, True)
    one = tiny_campaign["tasks"]["one"]
    bare = one | {"data": {split: file for split, file in one["data"].items() if split != "train"}}
    for changes in (
        {"search": {"methods": ["fisher"]}, "selection": {"mode": "all"}},
        {"search": {"methods": ["average"]}},
    ):
        output, status = mergequest("check", campaign_file(tasks={"one": bare}, directory="out", **changes))
        assert (status, "task 'one' has no train examples" in output.replace("\n", " ")) == (2, True), output
    earlier = {**tiny_campaign["search"], "storage": None}
    output, status = mergequest("check", campaign_file(search=earlier, directory="out"))
    assert status == 0, output


def test_members_that_are_the_base_or_one_another_are_told(campaign_file, tiny_campaign, tmp_path):
    members = tiny_campaign["members"] | {"twin": tiny_campaign["members"]["two"] | {"task": "two"}}
    shutil.copytree(tiny_campaign["base"], tmp_path / "same")
    members |= {"same": {"checkpoint": str(tmp_path / "same")}}
    output, status = mergequest(
        "check", campaign_file(members=members, selection={"mode": "all"}, search={"methods": ["average"]})
    )
    shown = " ".join(output.split())
    assert status == 0, output
    assert "twin, two are the same checkpoint, which counts 2 times" in shown
    assert "'same' has the base's own weights" in shown


def test_an_unknown_kind_of_statistic_is_told_before_anything_is_opened(campaign_file, tmp_path):
    output, status = mergequest("statistics", campaign_file(base=str(tmp_path / "nowhere")), "--kind", "fischer")
    assert (status, "Did you mean 'fisher'?" in output.replace("\n", " ")) == (2, True)


def test_statistics_of_others_are_imported(tiny_pool, tmp_path):
    weight = load_file(tiny_pool["one"] / "model.safetensors")["bert.encoder.layer.0.output.dense.weight"]
    inputs = torch.randn(50, weight.shape[1])
    source, out = tmp_path / "grams.safetensors", tmp_path / "one.gram.safetensors"
    save_file({"encoder.layer.0.output.dense": inputs.T @ inputs}, source)
    reported = ("--checkpoint", tiny_pool["one"], "--tokens", 50, "--sums", "--out", out)
    output, status = mergequest("statistics", "import", source, "--kind", "gram", *reported)
    assert (status, output.splitlines()[-1]) == (0, str(out))
    result = StatisticsFile.open(str(out)).read("bert.encoder.layer.0.output.dense.weight")
    torch.testing.assert_close(result, inputs.T @ inputs / 50)
    output, status = mergequest("statistics", "import", source, "--kind", "gramm", *reported)
    assert (status, "Did you mean 'gram'?" in output) == (2, True)


@pytest.mark.parametrize("place", ["checkpoint", "data"])
def test_a_campaign_whose_members_or_data_were_replaced_is_not_gone_on_with(
    campaign_file, tiny_campaign, tmp_path, place
):
    """Its ledger would hold scores of both, beside one another, and a winner between them."""
    task = tiny_campaign["tasks"]["one"] | {"data": {"validation": str(tmp_path / "validation.parquet")}}
    shutil.copytree(tiny_campaign["members"]["one"]["checkpoint"], tmp_path / "one")
    shutil.copy(tiny_campaign["tasks"]["one"]["data"]["validation"], tmp_path)
    members = {"one": {"checkpoint": str(tmp_path / "one")}}
    file = campaign_file(directory="out", search={"methods": ["average"]})
    settings = yaml.safe_load(file.read_text()) | {"members": members, "tasks": {"one": task}}
    file.write_text(yaml.safe_dump(settings))
    campaign = load_campaign(str(file))
    directory, display = Directory(str(tmp_path / "out")), Display(Console(quiet=True))
    opened = open_campaign(campaign, display)
    directory.claim(campaign, opened.fingerprints)
    assert mergequest("check", file)[1] == 0
    now = datetime.now(UTC)
    Ledger(directory.ledger, "tiny").append(
        Row("tiny", "a", "validation", "reference", "complete", "base", (), {}, {}, started=now, finished=now)
    )
    assert mergequest("check", file)[1] == 0
    if place == "checkpoint":
        weights = load_file(tmp_path / "one" / "model.safetensors")
        weights["bert.pooler.dense.bias"] += 1e-3
        save_file(weights, tmp_path / "one" / "model.safetensors", {"format": "pt"})
    else:
        frame = pd.read_parquet(tmp_path / "validation.parquet")
        frame[1:].to_parquet(tmp_path / "validation.parquet")
    output, status = mergequest("check", file)
    said = {
        "checkpoint": "'one' is not the checkpoint that",
        "data": "task 'one': the validation examples are not those",
    }
    assert (status, said[place] in output.replace("\n", " ")) == (2, True), output


def test_status_of_nothing(tmp_path):
    output, status = mergequest("status", tmp_path)
    assert status == 2
    assert "holds no campaign" in output.replace("\n", " ")


@pytest.fixture
def recipe(tiny_campaign, tmp_path):
    """A recipe file that a test may change."""

    def write(**changes):
        settings = {
            "base": tiny_campaign["base"],
            "members": {name: tiny_campaign["members"][name]["checkpoint"] for name in ("one", "two")},
            "method": "task_arithmetic",
            "scaling": {"one": 0.2, "two": 0.6},
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(settings | changes))
        return path

    return write


def test_merge_by_a_recipe(recipe, tmp_path, tiny_campaign):
    from safetensors.torch import load_file
    from transformers import AutoModel

    output, status = mergequest("merge", recipe(), "--out", tmp_path / "merged")
    assert status == 0, output
    base, one, two = (
        load_file(Path(path) / "model.safetensors")
        for path in (tiny_campaign["base"], *(tiny_campaign["members"][m]["checkpoint"] for m in ("one", "two")))
    )
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    name = "encoder.layer.1.intermediate.dense.weight"
    expected = base[name] + 0.2 * (one[f"bert.{name}"] - base[name]) + 0.6 * (two[f"bert.{name}"] - base[name])
    assert (merged[name] - expected).abs().max() < 1e-6
    AutoModel.from_pretrained(tmp_path / "merged")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "regmean"}, "needs the statistic 'gram' of one, two"),
        ({"method": "regmeen"}, "Did you mean 'regmean'?"),
        ({"scaling": {"one": 1.0, "four": 1.0}}, "'four' is no member"),
        ({"parameters": {"density": 0.2}}, "has no parameter 'density'"),
        ({"colour": "red"}, "colour: unknown key"),
    ],
)
def test_wrong_recipes_write_nothing(recipe, tmp_path, changes, message):
    output, status = mergequest("merge", recipe(**changes), "--out", tmp_path / "merged")
    assert status == 2
    assert message in output
    assert not (tmp_path / "merged").exists()


@pytest.mark.slow
def test_statistics_then_a_recipe_with_published_files(campaign_file, recipe, tmp_path, tiny_campaign):
    done = subprocess.run(
        [*COMMAND, "statistics", str(campaign_file()), "--kind", "gram", "--out", str(tmp_path / "published")],
        capture_output=True,
        text=True,
        check=True,
    )
    paths = dict(zip(("one", "three", "two"), sorted(done.stdout.split()), strict=True))
    members = {
        name: {"checkpoint": tiny_campaign["members"][name]["checkpoint"], "statistics": [paths[name]]}
        for name in ("one", "two")
    }
    regmean = {"method": "regmean", "members": members, "scaling": 1.0, "parameters": {"rho": 0.9}}
    output, status = mergequest("merge", recipe(**regmean), "--out", tmp_path / "merged")
    assert status == 0, output
    members["one"]["statistics"], members["two"]["statistics"] = [paths["two"]], [paths["one"]]
    output, status = mergequest("merge", recipe(**regmean), "--out", tmp_path / "swapped")
    assert status == 2
    assert "of another checkpoint" in output
    assert not (tmp_path / "swapped").exists()
