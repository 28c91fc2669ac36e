import copy
import json
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from merging.checkpoints.pool import Pool
from merging.evaluation.live_models import LiveModels
from merging.evaluation.score_cache import KnownScores, make_score_cache
from merging.evaluation.steps import EvaluationPlan
from merging.mergers.material import Material, open_statistics
from merging.methods import METHODS
from merging.recipe import Recipe, base_recipe, member_recipe
from merging.statistics import STATISTICS, LikelihoodSettings, measure, save
from merging.tasks import CustomSettings, TextClassificationSettings, make_task
from merging.tasks.predictions import Predictions

CPU = torch.device("cpu")
MERGE = Recipe("task_arithmetic", {"one": 0.5, "two": 0.4})


class Campaign:
    """Candidates over a pool, scored with a cache: what a campaign's evaluator has."""

    def __init__(self, place, settings, *, members=("one", "two"), statistics=None, published=(), **how):
        self.place = place
        paths = {name: settings["members"][name]["checkpoint"] for name in members}
        pool = Pool.open(settings["base"], paths)
        material = Material(pool, open_statistics(pool, statistics or {}))
        tasks = [make_task(n, TextClassificationSettings(**settings["tasks"][n]), paths[n]) for n in ("one", "two")]
        owners = {task.name: task.name for task in tasks}
        prints = {task.name: {"validation": task.score_fingerprint("validation")} for task in tasks}
        self.live = LiveModels(material, tasks, owners, CPU)
        self.live.scores = make_score_cache(str(place), material, prints, owners, settings=how, published=published)

    def measure(self, recipe=MERGE, plan=None):
        return self.live.measure(recipe, "validation", plan=plan or EvaluationPlan())

    @property
    def files(self):
        return sorted(self.place.glob("*.safetensors"))


@pytest.fixture
def settings(tiny_campaign):
    return copy.deepcopy(tiny_campaign)


def known(measurement):
    """How many examples were not measured."""
    return sum(count for name, count in measurement.proxies.items() if name.startswith("cached:"))


def same(one, other):
    for task in one.scores:
        first, second = (replace(result.scores[task], seconds=0.0) for result in (one, other))
        assert first == second
    for name in ("values", "surrogates", "losses"):
        for task, array in getattr(one.trace, name).items():
            assert np.array_equal(array, getattr(other.trace, name)[task])
    assert (one.report, one.pruned) == (other.report, other.pruned)


@pytest.mark.parametrize(
    "recipe", [base_recipe(), member_recipe("two"), MERGE, Recipe("slerp", {"one": 1.0, "two": 1.0})]
)
def test_another_campaign_gets_the_same_scores_and_merges_nothing(settings, tmp_path, monkeypatch, recipe):
    recipe = METHODS[recipe.method].complete(recipe) if recipe.method in METHODS else recipe
    first = Campaign(tmp_path / "cache", settings).measure(recipe)
    assert known(first) == 0
    shutil.copytree(settings["members"]["one"]["checkpoint"], tmp_path / "moved")
    settings["members"]["one"]["checkpoint"] = str(tmp_path / "moved")
    other = Campaign(tmp_path / "cache", settings, members=("three", "two", "one"))
    monkeypatch.setattr(type(other.live), "_merge", None)
    second = other.measure(recipe)
    same(first, second)
    assert known(second) == 60
    assert second.merge_seconds is None
    assert second.evaluate_seconds is not None


def _datum(settings, root):
    frame = pd.read_parquet(settings["tasks"]["one"]["data"]["validation"])
    frame.loc[3, "text"] += " not"
    frame.to_parquet(root / "other.parquet")
    settings["tasks"]["one"]["data"]["validation"] = str(root / "other.parquet")


def _label(settings, root):
    frame = pd.read_parquet(settings["tasks"]["one"]["data"]["validation"])
    frame.loc[3, "label"] = 1 - frame.loc[3, "label"]
    frame.to_parquet(root / "other.parquet")
    settings["tasks"]["one"]["data"]["validation"] = str(root / "other.parquet")


def _metric(settings, root):
    settings["tasks"]["one"]["metric"] = "macro_f1"


def _length(settings, root):
    settings["tasks"]["one"]["max_length"] = 8


def _head(name, change):
    """Another file beside the weights of the head."""

    def alter(settings, root):
        shutil.copytree(settings["members"]["one"]["checkpoint"], root / "changed")
        content = json.loads((root / "changed" / name).read_text())
        change(content)
        (root / "changed" / name).write_text(json.dumps(content))
        settings["members"]["one"]["checkpoint"] = str(root / "changed")

    return alter


def _weight(who, name):
    def change(settings, root):
        path = settings["base"] if who == "base" else settings["members"][who]["checkpoint"]
        shutil.copytree(path, root / "changed")
        from safetensors.torch import load_file, save_file

        tensors = load_file(root / "changed" / "model.safetensors")
        tensors[name].view(-1)[0] += 1e-3
        save_file(tensors, root / "changed" / "model.safetensors", {"format": "pt"})
        if who == "base":
            settings["base"] = str(root / "changed")
        else:
            settings["members"][who]["checkpoint"] = str(root / "changed")

    return change


MISSES = {
    "datum": (_datum, {"one"}),
    "label": (_label, {"one"}),
    "metric": (_metric, {"one"}),
    "length": (_length, {"one"}),
    "padding": (_head("config.json", lambda config: config.update(pad_token_id=3)), {"one"}),
    "special tokens": (_head("tokenizer_config.json", lambda config: config.update(sep_token="[CLS]")), {"one"}),
    "head": (_weight("one", "classifier.bias"), {"one", "two"}),
    "weight": (_weight("two", "bert.encoder.layer.1.output.dense.bias"), {"one", "two"}),
    "base": (_weight("base", "encoder.layer.1.output.dense.bias"), {"one", "two"}),
}


@pytest.mark.parametrize("change", MISSES)
def test_whatever_changes_a_score_is_measured_anew(settings, tmp_path, change):
    alter, tasks = MISSES[change]
    Campaign(tmp_path / "cache", settings).measure()
    alter(settings, tmp_path)
    again = Campaign(tmp_path / "cache", settings)
    measured = again.measure()
    assert {name.partition(":")[2] for name in measured.proxies} == {"one", "two"} - tasks
    again.live.scores = None
    same(replace(again.measure(), proxies={}), replace(measured, proxies={}))


@pytest.mark.parametrize("how", [{"dtype": "float32"}, {"engine": "vllm"}])
def test_other_settings_of_the_evaluation_share_nothing(settings, tmp_path, how):
    Campaign(tmp_path, settings).measure()
    assert known(Campaign(tmp_path, settings, **how).measure()) == 0


def test_precisions_share_nothing_and_a_fresh_measurement_reads_nothing(settings, tmp_path):
    campaign = Campaign(tmp_path, settings)
    first = campaign.measure()
    other = campaign.live.measure(MERGE, "validation", plan=EvaluationPlan(), precision="bfloat16")
    assert known(other) == 0
    assert any((other.trace.losses[task] != first.trace.losses[task]).any() for task in first.scores)
    again = campaign.live.measure(MERGE, "validation", plan=EvaluationPlan(), precision="bfloat16")
    same(other, again)
    assert known(again) == 60
    same(first, campaign.measure())  # the usual precision is back
    fresh = campaign.live.measure(MERGE, "validation", plan=EvaluationPlan(), fresh=True)
    assert known(fresh) == 0
    assert fresh.merge_seconds is not None


def test_other_code_shares_nothing(settings, tmp_path, monkeypatch):
    """A method of one's own that was changed, for instance."""
    Campaign(tmp_path, settings).measure()
    monkeypatch.setattr("merging.evaluation.score_cache.code_fingerprint", lambda: "other")
    assert known(Campaign(tmp_path, settings).measure()) == 0


def test_factors_and_members_belong_to_the_key(settings, tmp_path):
    campaign = Campaign(tmp_path, settings, members=("one", "two", "three"))
    campaign.measure()
    for recipe in (
        Recipe("task_arithmetic", {"one": 0.5, "two": 0.4000001}),
        Recipe("task_arithmetic", {"one": 0.5, "two": 0.4, "three": 0.0}),
        Recipe("ties", {"one": 0.5, "two": 0.4}),
    ):
        assert known(campaign.measure(recipe)) == 0


def test_a_member_by_another_name_is_another(settings, tmp_path):
    """Random masks go by names."""
    Campaign(tmp_path, settings).measure(Recipe("dare", {"one": 1.0, "two": 1.0}))
    settings["members"]["one"], settings["members"]["two"] = settings["members"]["two"], settings["members"]["one"]
    settings["tasks"]["one"], settings["tasks"]["two"] = settings["tasks"]["two"], settings["tasks"]["one"]
    assert known(Campaign(tmp_path, settings).measure(Recipe("dare", {"one": 1.0, "two": 1.0}))) == 0


def test_a_candidate_that_was_given_up_serves_the_part_that_it_was_measured_on(settings, tmp_path):
    campaign = Campaign(tmp_path, settings)
    first = campaign.measure(plan=EvaluationPlan(10, lambda trace: trace.examples >= 20))
    assert first.pruned
    again = campaign.measure(plan=EvaluationPlan(10, lambda trace: trace.examples >= 20))
    same(first, again)
    assert known(again) == 40
    further = campaign.measure(plan=EvaluationPlan(10))
    assert known(further) == 40
    assert further.merge_seconds is not None
    campaign.live.scores, kept = None, campaign.live.scores
    same(campaign.measure(plan=EvaluationPlan(10)), further)
    campaign.live.scores = kept
    assert known(campaign.measure()) == 60
    some = EvaluationPlan(positions={"one": np.array([29, 4, 11]), "two": np.array([0, 7])})
    assert known(campaign.measure(plan=some)) == 5


def test_examples_here_and_there_add_up(settings, tmp_path):
    campaign = Campaign(tmp_path, settings)
    campaign.measure(plan=EvaluationPlan(positions={"one": np.array([25, 3]), "two": np.array([8])}))
    later = campaign.measure(plan=EvaluationPlan(positions={"one": np.array([7, 3, 1]), "two": np.array([8])}))
    assert known(later) == 1  # a step is known whole, or measured
    every = campaign.measure(plan=EvaluationPlan(positions={"one": np.array([1, 25, 3, 7]), "two": np.array([8])}))
    assert known(every) == 5


def _cut(content):
    return content[: len(content) // 2]


def _flipped(content):
    return content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]


def _empty(content):
    return b""


def _foreign(content):
    return b'{"scores": [1, 2, 3]}'


@pytest.mark.parametrize("damage", [_cut, _flipped, _empty, _foreign])
def test_a_damaged_entry_is_named_and_measured_again(settings, tmp_path, damage):
    campaign = Campaign(tmp_path, settings)
    first = campaign.measure()
    assert not first.problems
    damaged, _ = campaign.files
    damaged.write_bytes(damage(damaged.read_bytes()))
    again = campaign.measure()
    same(first, again)
    assert known(again) == 30
    (problem,) = again.problems
    assert str(damaged) in problem
    assert "measured again" in problem
    mended = campaign.measure()
    assert not mended.problems
    assert known(mended) == 60


def test_what_cannot_be_written_is_said_and_scores_stand(settings, tmp_path):
    (tmp_path / "file").write_text("")
    measured = Campaign(tmp_path / "file" / "below", settings).measure()
    assert len(measured.scores) == 2
    assert any("cannot be kept" in problem for problem in measured.problems)


def test_statistics_go_by_what_they_are_of_and_files_from_elsewhere_by_their_bytes(settings, tmp_path):
    def fisher(place, examples):
        files = {}
        for name in ("one", "two"):
            task = make_task(
                name, TextClassificationSettings(**settings["tasks"][name]), settings["members"][name]["checkpoint"]
            )
            statistic = STATISTICS["fisher"](LikelihoodSettings(examples=examples, estimator="exact"))
            pool = Pool.open(settings["base"], {name: settings["members"][name]["checkpoint"]})
            path = str(tmp_path / f"{place}.{name}.safetensors")
            checkpoint = pool.members[name].checkpoint.fingerprint
            save(path, statistic, measure(task, statistic), checkpoint=checkpoint, data=task.data_fingerprint("train"))
            files[name] = (path,)
        return files

    recipe = METHODS["fisher"].complete(Recipe("fisher", {"one": 1.0, "two": 1.0}))
    cache = tmp_path / "cache"
    own = fisher("a", 8)
    assert known(Campaign(cache, settings, statistics=own).measure(recipe)) == 0
    assert known(Campaign(cache, settings, statistics=fisher("b", 8)).measure(recipe)) == 60
    assert known(Campaign(cache, settings, statistics=fisher("c", 9)).measure(recipe)) == 0
    published = [path for paths in own.values() for path in paths]
    assert known(Campaign(cache, settings, statistics=own, published=published).measure(recipe)) == 0
    assert known(Campaign(cache, settings, statistics=own, published=published).measure(recipe)) == 60
    assert known(Campaign(cache, settings).measure()) == 0
    assert known(Campaign(cache, settings, statistics=own).measure()) == 60  # which needs none


def test_code_of_one_s_own_has_no_fingerprint(tiny_pool, settings):
    custom = make_task("c", CustomSettings(evaluator="json:dumps"), str(tiny_pool["one"]))
    assert custom.score_fingerprint("validation") is None

    class Mine(type(make_task("one", TextClassificationSettings(**settings["tasks"]["one"]), str(tiny_pool["one"])))):
        pass

    mine = Mine("one", TextClassificationSettings(**settings["tasks"]["one"]), str(tiny_pool["one"]))
    assert mine.score_fingerprint("validation") is None


def test_of_a_metric_of_all_predictions_the_payload_is_kept(settings, tmp_path):
    settings["tasks"]["one"]["metric"] = "macro_f1"
    first = Campaign(tmp_path, settings).measure()
    second = Campaign(tmp_path, settings).measure()
    same(first, second)
    assert known(second) == 60


def test_texts_are_kept_and_other_objects_are_not(tmp_path):
    texts = np.array(["a", "", "ünïcode 🙂", '"quoted"\n'], object)
    positions, values = np.array([3, 1, 2, 0]), np.array([0.1, 1 / 3, 5e-324, 1e300])
    path = str(tmp_path / "t.safetensors")
    one = KnownScores({"t": path})
    one.add("t", positions, Predictions(values, payload={"generated": texts}))
    one.keep({"condition": float("inf")})
    other = KnownScores({"t": path})
    kept = other.take("t", positions)
    assert kept.values.tolist() == values.tolist()
    assert kept.payload["generated"].tolist() == texts.tolist()
    assert (kept.losses, other.report) == (None, {"condition": float("inf")})
    strange = KnownScores({"t": str(tmp_path / "u.safetensors")})
    strange.add("t", positions, Predictions(values, payload={"items": np.array([(1, 2), None, "a", {}], object)}))
    strange.keep({})
    assert not (tmp_path / "u.safetensors").exists()
