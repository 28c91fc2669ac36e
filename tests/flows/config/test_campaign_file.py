import re

import pytest
import yaml

from flows.cli.submit import prepare
from flows.cli.template import campaign_template, settings_reference
from flows.config.campaign_file import dump, load_campaign
from flows.config.search_settings import PATIENCE, PATIENCE_BEFORE_DISTILLATION, WITH_DATA, WITHOUT_DATA
from flows.config.sections import DistilSettings
from merging.errors import SettingsError


def changed(campaign_file, edit):
    """The tiny campaign's file after an edit of its settings."""
    path = campaign_file()
    settings = yaml.safe_load(path.read_text())
    edit(settings)
    path.write_text(yaml.safe_dump(settings))
    return str(path)


def start_from(method, member):
    start = {"method": method, "scaling": {member: 1}}
    return lambda s: s["search"].update(gradient={"start": start})


def test_defaults_are_filled_in_and_survive_a_round_trip(campaign_file, tmp_path):
    campaign = load_campaign(str(campaign_file()))
    assert list(campaign.search.methods) == [
        "average", "task_arithmetic", "ties", "fisher", "gradient_matching", "regmean",
    ]  # fmt: skip
    assert campaign.directory == str(tmp_path / "runs" / "tiny")
    again = tmp_path / "again.yaml"
    again.write_text(dump(campaign))
    assert load_campaign(str(again)) == campaign


def test_paths_are_relative_to_the_file(tmp_path):
    (tmp_path / "deep" / "checkpoints").mkdir(parents=True)
    path = tmp_path / "deep" / "campaign.yaml"
    path.write_text(campaign_template())
    campaign = load_campaign(str(path))
    assert campaign.base == str(tmp_path / "deep/checkpoints/base")
    assert campaign.members["nyt"].statistics == (str(tmp_path / "deep/statistics/nyt.gram.safetensors"),)
    assert campaign.tasks["nyt"].data["test"] == str(tmp_path / "deep/data/nyt/test.parquet")


def test_addresses_stay_as_they_are(campaign_file):
    path = changed(campaign_file, lambda s: s.update(base="s3://bucket/base", directory="s3://bucket/runs/x"))
    campaign = load_campaign(path)
    assert (campaign.base, campaign.directory) == ("s3://bucket/base", "s3://bucket/runs/x")


def test_a_member_may_be_a_path_alone(campaign_file, tiny_campaign):
    path = changed(campaign_file, lambda s: s["members"].update(one=s["members"]["one"]["checkpoint"]))
    assert load_campaign(path).members["one"].checkpoint == tiny_campaign["members"]["one"]["checkpoint"]


def test_methods_may_be_a_list_or_have_ranges(campaign_file):
    assert list(load_campaign(str(campaign_file(search={"methods": ["ties"]}))).search.methods) == ["ties"]
    methods = {"ties": {"parameters": {"density": {"low": 0.1, "high": 0.3}}}, "average": None}
    found = load_campaign(str(campaign_file(search={"methods": methods}))).search.methods
    assert found["ties"].parameters["density"].high == 0.3


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda s: s.update(bses="x"), r"bses: unknown key. Did you mean 'base'\?"),
        (lambda s: s["search"].update(candidate=3), r"search.candidate: unknown key. Did you mean 'candidates'\?"),
        (lambda s: s["members"]["one"].update(chekpoint="x"), r"members.one.chekpoint: unknown key. Did you mean 'checkpoint'\?"),  # noqa: E501
        (lambda s: s["tasks"]["one"].update(lable="x"), r"tasks.one.text_classification.lable: unknown key. Did you mean 'label'\?"),  # noqa: E501
        (lambda s: s["statistics"]["gram"].update(exmples=3), r"statistics.gram.exmples: unknown key. Did you mean 'examples'\?"),  # noqa: E501
        (lambda s: s.pop("base"), "base: missing"),
        (lambda s: s.update(engine={"tensor_parallel": 2}), "engine.tensor_parallel goes with `kind: vllm`"),
        (lambda s: s.update(engine={"kind": "transformers", "cache": 4}), "engine.cache goes with `kind: vllm`"),
        (lambda s: s.update(engine={"kind": "vllm", "tensor_parallel": 4}, resources={"gpus": 2}), r"tensor_parallel: 4 .* resources.gpus is 2: set both"),  # noqa: E501
        (lambda s: s.update(engine="vllm", resources={"gpus": 2}), r"tensor_parallel: 1 .* resources.gpus is 2: set both"),
        (lambda s: s.update(environment={"env": {"A=B": "x"}}), "environment.env: 'A=B' cannot be set"),
        (lambda s: s.update(environment={"env": {"": "x"}}), "environment.env: '' cannot be set"),
        (lambda s: s.update(environment={"pip": [" "]}), "environment.pip.0: "),
        (lambda s: s["search"].update(candidates=0), "search.candidates: Input should be greater than or equal to 1"),
        (lambda s: s["search"].update(candidates=-4), "search.candidates: .*found -4"),
        (lambda s: s["search"].update(scaling="per_pattern"), "`scaling: per_pattern`, which needs them"),
        (lambda s: s["search"].update(patterns=["*attention*"]), "`patterns` goes with"),
        (lambda s: s["search"].update(methods={"ties": {"scaling_of": {"oen": 1.0}}}), "Did you mean 'one'"),
        (lambda s: s["search"].update(constraints=[{"task": "too", "drop": 0.1}]), r"unknown task 'too'. Did you mean 'two'\?"),
        (lambda s: s["search"].update(constraints=[{"task": "two"}]), "give `drop` or `floor`"),
        (lambda s: s["search"].update(methods=["regmen"]), r"unknown method 'regmen'. Did you mean 'regmean'\?"),
        (lambda s: s["search"].update(objective="wurst"), r"search.objective: unknown 'wurst'. Did you mean 'worst'\?"),
        (lambda s: s["search"].update(objective=["mean", "worst"], sampler="cmaes"), "'cmaes' maximises one objective, not 2"),
        (lambda s: s["search"].update(objective="weighted"), "needs `weights`"),
        (lambda s: s["search"].update(weights={"one": 1.0}), "go with `objective: weighted`"),
        (lambda s: s["search"].update(sampler="tpee"), r"Did you mean 'tpe'\?"),
        (lambda s: s["search"].update(sampler_arguments={"n_trials": 1}), "n_trials"),
        (lambda s: s["search"].update(methods={"ties": {"parameters": {"density": {"low": 0.5, "high": 3}}}}), "density"),
        (lambda s: s["members"]["one"].update(task="fourth"), "members.one.task: unknown task 'fourth'"),
        (lambda s: s["tasks"].update(new=s["tasks"]["one"]), "no member has the task 'new'"),
        (lambda s: s["members"].update(base=s["members"]["one"]), "no member may be called 'base'"),
        (lambda s: s["selection"].update(mode="fixed"), "`mode: fixed` needs `subsets`"),
        (lambda s: s["selection"].update(mode="fixed", subsets=[["one", "four"]]), "'four' is no member"),
        (lambda s: s["selection"].update(sizes=[9]), "sizes lie between 1 and 3"),
        (lambda s: s["tasks"]["one"].update(metric="acuracy"), "accuracy"),
        (lambda s: s.update(name="a b"), r"name: a name has letters, digits and \. _ - only.*found 'a b'"),
        (lambda s: s.update(name="x" * 300), "name: String should have at most 100 characters"),
        (lambda s: s["members"].update({False: "x"}), "members: .*YAML reads one of them as False: write it in quotes"),
        (lambda s: s["members"].update(one=7), "members.one: expected a checkpoint's directory"),
        (lambda s: s["tasks"]["one"].update(kind="textclassification"), "kind 'textclassification'. Did you mean 'text_class"),
        (lambda s: s["selection"].update(mode="fixed", subsets=[["one", "one"]]), "must name members, each once"),
        (lambda s: s["selection"].update(mode="fixed", subsets=[[]]), "must name members, each once"),
        (lambda s: s["selection"].update(sizes=[]), "selection.sizes: expected at least one"),
        (lambda s: s.update(heads="classifier.*"), "heads: expected a list"),
        (start_from("dare", "one"), "gradient.start: 'dare' is none of the search's methods"),
        (start_from("ties", "one"), "gradient.start: 'ties' is not linear in its scaling factors"),
        (start_from("regmean", "on"), "gradient.start: unknown member 'on'. Did you mean 'one'"),
    ],
)  # fmt: skip
def test_mistakes_are_named_with_the_remedy(campaign_file, edit, message):
    path = changed(campaign_file, edit)
    with pytest.raises(SettingsError, match=message) as caught:
        load_campaign(path)
    assert path in str(caught.value)


def test_unseen_tasks_belong_to_nobody(campaign_file):
    def edit(settings):
        settings["tasks"]["far"] = settings["tasks"]["three"] | {"role": "unseen"}

    campaign = load_campaign(changed(campaign_file, edit))
    assert (campaign.unseen(), campaign.owners()["far"]) == (["far"], "one")
    assert "far" not in campaign.sources()
    with pytest.raises(SettingsError, match=r"tasks.one: `role: unseen`"):
        load_campaign(changed(campaign_file, lambda s: s["tasks"]["one"].update(role="unseen")))
    with pytest.raises(SettingsError, match="counts unseen tasks, and there are none"):
        load_campaign(changed(campaign_file, lambda s: s["search"].update(objective="unseen")))


def test_all_mistakes_at_once(campaign_file):
    def edit(settings):
        settings["serch"] = settings.pop("search")
        settings["seed"] = -1

    with pytest.raises(SettingsError, match=r"(?s)2 mistakes.*seed.*serch: unknown key. Did you mean 'search'"):
        load_campaign(changed(campaign_file, edit))


@pytest.mark.parametrize("text", ["", "[1, 2]", "a: [", "\x00"])
def test_no_settings_at_all(tmp_path, text):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(SettingsError, match=r"x\.yaml"):
        load_campaign(str(tmp_path / "x.yaml"))


def test_a_key_that_stands_twice_is_no_second_member(tmp_path):
    (tmp_path / "x.yaml").write_text("name: x\nbase: b\nmembers:\n  one: a\n  one: c\n")
    with pytest.raises(SettingsError, match=r"(?s)x\.yaml is not valid YAML.*'one' stands there twice.*line 5"):
        load_campaign(str(tmp_path / "x.yaml"))


def test_missing_file(tmp_path):
    with pytest.raises(SettingsError, match="does not exist"):
        load_campaign(str(tmp_path / "nowhere.yaml"))


def test_identity_is_of_the_search_and_not_of_its_budget(campaign_file):
    first = load_campaign(str(campaign_file()))
    assert (
        load_campaign(str(campaign_file(search={"candidates": 99}, directory="elsewhere"))).identity()
        == first.identity()
    )
    assert load_campaign(str(campaign_file(search={"scaling": "shared"}))).identity() != first.identity()
    assert load_campaign(str(campaign_file(seed=1))).identity() != first.identity()


def test_what_the_template_shows_as_not_set_may_be_uncommented(tmp_path):
    path = tmp_path / "campaign.yaml"
    path.write_text(re.sub(r"(?m)^( *)# (\w+: null)$", r"\1\2", campaign_template()))
    assert path.read_text().count(": null\n") > 15
    whole = load_campaign(str(path))
    path.write_text(campaign_template())
    assert whole == load_campaign(str(path))


def test_template_and_reference_name_every_setting():
    template, reference = campaign_template(), settings_reference()
    for name in ("candidates", "sampler_arguments", "centered", "precision", "estimator", "top", "task_heads"):
        assert f"{name}:" in template
        assert f"`{name}`" in reference


@pytest.mark.parametrize(
    ("place", "edit"),
    [
        (
            "tasks.one.data.validation",
            lambda s: s["tasks"]["one"]["data"].update(validation="https://h/x?token=hunter2"),
        ),
        ("members.one.checkpoint", lambda s: s["members"].update(one={"checkpoint": "s3://key:hunter2@bucket/x"})),
        ("base", lambda s: s.update(base="zip://x::https://user:hunter2@host/x.zip")),
        ("directory", lambda s: s.update(directory="https://host/x#access_token=hunter2")),
        ("a key of members", lambda s: s["members"].update({"https://u:hunter2@h": "x"})),
    ],
)
def test_an_address_with_a_secret_is_refused_by_its_place(campaign_file, place, edit):
    with pytest.raises(SettingsError, match=f"{place}: the address holds a password, token or signature") as told:
        load_campaign(changed(campaign_file, edit))
    assert "hunter2" not in str(told.value)


@pytest.mark.parametrize("what", ["campaign", "statistics", "merge"])
def test_a_job_s_command_line_holds_no_secret(campaign_file, what):
    with pytest.raises(SettingsError, match="--out: the address holds a password") as told:
        prepare(what, str(campaign_file()), "s3://key:hunter2@bucket/x")
    assert "hunter2" not in str(told.value)


def without_defaults(settings):
    """A campaign that leaves to the pool what the tests' own file says."""
    for name in ("methods", "pruning", "patience"):
        settings["search"].pop(name)
    settings.pop("distil")


def test_methods_follow_what_is_known_of_the_members(campaign_file):
    path = changed(campaign_file, without_defaults)
    assert tuple(load_campaign(str(path)).search.methods) == WITH_DATA

    def without_train(settings):
        without_defaults(settings)
        settings["tasks"]["two"]["data"].pop("train")

    path = changed(campaign_file, without_train)
    assert tuple(load_campaign(str(path)).search.methods) == WITHOUT_DATA

    def calibrated(settings):
        without_train(settings)
        settings["members"]["two"]["calibration"] = settings["tasks"]["one"]

    path = changed(campaign_file, calibrated)
    assert tuple(load_campaign(str(path)).search.methods) == WITH_DATA

    def of_texts(settings):
        without_train(settings)
        texts = {"kind": "causal_lm", "data": {"train": "texts.jsonl"}, "text": "text"}
        settings["members"]["two"]["calibration"] = texts

    path = changed(campaign_file, of_texts)
    assert tuple(load_campaign(str(path)).search.methods) == WITH_DATA[1:]


def test_a_search_before_a_distillation_has_less_patience(campaign_file):
    def patience(**changes):
        def edit(settings):
            without_defaults(settings)
            settings["search"] |= changes.get("search", {})
            if "distil" in changes:
                settings["distil"] = changes["distil"]
            if changes.get("bare"):
                settings["tasks"]["two"]["data"].pop("train")

        return load_campaign(str(changed(campaign_file, edit))).search.patience

    assert patience() == patience(distil={"steps": 9}) == PATIENCE_BEFORE_DISTILLATION
    assert patience(distil=False) == patience(bare=True) == PATIENCE
    assert patience(search={"patience": None}) is None
    assert patience(search={"patience": 3}) == 3


@pytest.mark.parametrize(
    ("search", "pruning"),
    [
        ({}, "wilcoxon"),
        ({"objective": ["mean", "worst"]}, "none"),
        ({"objective": ["mean"]}, "wilcoxon"),
        ({"anchor_examples": 8}, "none"),
        ({"sampler": "nsga2"}, "none"),
        ({"pruning": "none"}, "none"),
        ({"pruning": "halving"}, "halving"),
    ],
)
def test_candidates_are_pruned_where_nothing_speaks_against_it(campaign_file, search, pruning):
    def edit(settings):
        without_defaults(settings)
        settings["search"] |= search

    campaign = load_campaign(str(changed(campaign_file, edit)))
    assert campaign.search.pruning == pruning
    again = load_campaign(str(changed(campaign_file, edit)))
    assert again.identity() == campaign.identity()


def test_distillation_may_be_left_out_or_asked_for(campaign_file):
    for given, kept in ((False, False), (None, None), ({}, DistilSettings())):
        path = changed(campaign_file, lambda settings, given=given: settings.update(distil=given))
        assert load_campaign(str(path)).distil == kept
    path = changed(campaign_file, lambda settings: settings.update(distil={"weights": {"tow": 2.0}}))
    with pytest.raises(SettingsError, match=r"distil: unknown member 'tow'. Did you mean 'two'"):
        load_campaign(str(path))
