"""The papers' experiments, from a pool to the page, on tiny models."""

import copy
import json
import random
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from flows.config.campaign_file import Campaign
from flows.directory.progress import Display
from flows.report.experiments import load, write_files
from merging.errors import StorageError
from merging.recipe import Recipe

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT))  # benchmarks are no part of what is installed

from benchmarks.papers import __main__ as papers  # noqa: E402
from benchmarks.papers import pools, topics, wordnet  # noqa: E402
from benchmarks.papers.bench import Bench, Measured, paired, together  # noqa: E402
from benchmarks.papers.page import page  # noqa: E402
from benchmarks.papers.pools import POOLS, PaperPool  # noqa: E402
from benchmarks.papers.result import Result, is_of, save, verdict  # noqa: E402


@pytest.fixture
def tiny(tiny_campaign, tmp_path) -> PaperPool:
    campaign = Campaign.model_validate(copy.deepcopy(tiny_campaign))
    together = dict.fromkeys(("one", "two", "three"), campaign.members["two"].checkpoint)
    return PaperPool("tiny", 0, campaign, lambda: together, None, tmp_path / "tiny")


@pytest.fixture
def bench(tiny) -> Bench:
    return Bench(tiny, Display(Console(quiet=True)), examples=12, statistic_examples=12)


def test_every_experiment_is_a_module_with_its_pools():
    found = (ROOT / "benchmarks" / "papers").glob("*/*.py")
    modules = {f"{path.parent.name}.{path.stem}" for path in found if "def run(bench" in path.read_text()}
    assert modules == set(papers.EXPERIMENTS)
    for name in papers.EXPERIMENTS:
        module = papers.module(name)
        assert module.__doc__
        assert set(module.POOLS) <= set(POOLS)


def test_a_result_is_kept_for_the_settings_that_made_it(tmp_path):
    name, path = "mats.residual", tmp_path / "result.parquet"
    settings = papers.settings_of(name, 12, multi_task=True)
    assert not is_of(path, settings)
    save(Result([{"series": "a", "value": 1.0}]), path, settings, experiment=name)
    assert is_of(path, settings)
    others = (papers.settings_of(name, 13, multi_task=True), papers.settings_of(name, 12, multi_task=False))
    assert not any(
        is_of(path, other) for other in (*others, papers.settings_of("mats.intermediate", 12, multi_task=True))
    )
    pd.DataFrame({"series": ["a"]}).to_parquet(path)
    assert is_of(path, settings), "an earlier version's"


def test_an_experiment_from_the_pool_to_the_page(tiny, tmp_path, monkeypatch):
    """What is measured once is kept; the page, tables and figures come from the results alone."""
    names = ["gradient_matching.figure_2", "regmean.table_8", "quality_diversity.table_1"]
    monkeypatch.setattr(
        "benchmarks.papers.quality_diversity.subsets.dpp_kernel.quality",
        lambda own, base: (dict.fromkeys(own, 1.0), []),
    )
    found = [papers.run(name, lambda display: tiny, tmp_path / "results", 12) for name in names]
    kept = {path: path.stat().st_mtime_ns for path in (tiny.place / "measured").iterdir()}
    frame = load([str(path) for path in found])
    assert set(frame[frame.kind == "claim"].verdict) <= {"agrees", "no difference", "contradicts"}
    curve = frame[(frame.experiment == names[0]) & (frame.task == "mean") & (frame.series == "task arithmetic")]
    assert list(curve.x) == ["0.2", "0.4", "0.6", "0.8", "1.0", "1.25", "1.5"]
    again = papers.run(names[0], lambda display: tiny, tmp_path / "again", 12)
    pd.testing.assert_frame_equal(
        pd.read_parquet(again).drop(columns="seconds"), pd.read_parquet(found[0]).drop(columns="seconds")
    )
    assert kept == {path: path.stat().st_mtime_ns for path in (tiny.place / "measured").iterdir()}
    assert "`gradient_matching.figure_2`" in page(frame)
    write_files(frame, str(tmp_path / "docs" / "papers"))
    assert (tmp_path / "docs" / "papers" / "gradient_matching.figure_2.tiny.0.svg").read_text().count("<circle") > 14
    assert (tmp_path / "docs" / "papers" / "claims.tex").read_text().startswith("\\begin{tabular}")


def test_experiments_on_the_members_of_a_campaign_file(campaign_file, tiny_campaign, tmp_path, monkeypatch, capsys):
    file = campaign_file(tasks={"far": {**tiny_campaign["tasks"]["one"], "role": "unseen"}})
    where = ["--campaign", str(file), "--root", str(tmp_path / "kept"), "--examples", "12"]
    monkeypatch.setattr(sys, "argv", ["papers", "regmean.figure_3", "regmean.table_2", *where])
    papers.main()
    frame = load([str(tmp_path / "kept" / "results")])
    drops = frame[(frame.quantity == "relative drop") & (frame.x != "all pairs")]
    assert len(drops) == 3 * 3  # pairs of three members, by three methods
    table = frame[(frame.experiment == "regmean.table_2") & (frame.series == "regmean")]
    assert set(table[table.quantity == "score"].task) == {"one", "two", "three", "mean"}
    assert list(table[table.quantity != "score"].x) == ["far", "unseen mean"]
    wrong = {
        "regmean.figure3": "Did you mean 'regmean.figure_3'?",
        "--pool sentimnt": "unknown pool 'sentimnt'. Did you mean 'sentiment'?",
        "--seed -1": "'-1' is no number from 0 up",
        "--campaign x.yaml --pool images": "--campaign takes the place of --pool and --seed",
        "--campaign x.yaml": "x.yaml",
    }
    for words, why in wrong.items():
        monkeypatch.setattr(sys, "argv", ["papers", *words.split()])
        with pytest.raises(SystemExit):
            papers.main()
        assert why in capsys.readouterr().err


def test_measurements_are_what_the_models_say(bench, tiny):
    scores = bench.member("two").scores
    task = bench.tasks["two"]
    assert scores["two"] == pytest.approx(task.evaluate(task.load_model(), "test", limit=12).value)
    assert bench.own_members().values["two"].tolist() == bench.member("two").values["two"].tolist()
    whole = bench.all_data()
    assert whole is not None
    assert whole.values["two"].tolist() == bench.member("two").values["two"].tolist()
    one = bench.measure(Recipe("task_arithmetic", dict.fromkeys(bench.members, 0.0)))
    assert one.scores == bench.base().scores


def test_a_metric_of_all_examples_together_has_one_number_an_example(tiny, bench):
    for task in tiny.campaign.tasks.values():
        task.metric = "macro_f1"  # type: ignore[union-attr]
    task = bench.tasks["two"]
    score = task.evaluate(task.load_model(), "test", limit=12)
    found = bench.member("two").on(["two"])
    assert found.mean == pytest.approx(score.value)
    assert found.error == pytest.approx(score.standard_error, rel=0.5)
    assert len(found.values["two"]) == 12
    assert bench.member("two").scores["two"] == pytest.approx(score.value)  # from what is kept
    fewer = Bench(tiny, Display(Console(quiet=True)), examples=9)
    assert fewer.member("two").scores["two"] == pytest.approx(task.evaluate(task.load_model(), "test", limit=9).value)


def test_some_weights_of_a_merge_can_be_the_mean(bench):
    average = bench.measure(bench.default("average"))
    fitted = bench.default("task_arithmetic")
    assert bench.measure(fitted, averaged=["bert."]).values["two"].tolist() == average.values["two"].tolist()
    none = bench.measure(fitted, averaged=["no weight."])
    assert none.values["two"].tolist() == bench.measure(fitted).values["two"].tolist()


def test_a_base_with_a_head_is_made_anew_for_other_classes(tiny, tmp_path):
    base, task = Path(tiny.campaign.base), tiny.campaign.tasks["two"]
    made = [pools._with_head(base, task, labels, 0, tmp_path) for labels in (("a", "b"), ("a", "b", "c"), ("a", "b"))]
    assert made[0] == made[2] != made[1]
    heads = [json.loads((place / "config.json").read_text())["id2label"] for place in made[:2]]
    assert heads == [{"0": "a", "1": "b"}, {"0": "a", "1": "b", "2": "c"}]


def test_pairs_of_texts_from_wordnet():
    raw = """  1 licence
00000001 03 n 01 animal 0 002 ~ 00000002 n 0000 ~ 00000003 n 0000 | a living thing
00000002 05 n 02 dog 0 wolf(a) 1 002 @ 00000001 n 0000 ~ 00000004 n 0000 | barks; "the dog ran"; "dogs bark"
00000003 05 n 01 cat 0 001 @ 00000001 n 0000 | it meows
00000004 05 n 01 toy_dog 0 001 @ 00000002 n 0000 | a small dog
"""
    nouns = wordnet.synsets(raw, "noun")
    assert nouns["noun 00000002"] == wordnet.Synset(
        "noun 00000002", ("dog", "wolf"), ("noun 00000001",), ("noun 00000004",), "barks", ("the dog ran", "dogs bark")
    )
    dog = "dog: barks"
    assert [(pair.text, pair.text_pair, pair.label) for pair in wordnet.inference(nouns, random.Random(0))] == [
        (dog, "It is a kind of animal.", "follows"),
        (dog, "It is a kind of toy dog.", "open"),
        (dog, "It is a kind of cat.", "excluded"),
    ]
    pairs = list(wordnet.definition(nouns, random.Random(0)))
    assert ("barks", "dog", "right") in [(pair.text, pair.text_pair, pair.label) for pair in pairs]
    hot = wordnet.Synset("n", ("dog",), (), (), "a sausage", ("a hot dog",))
    senses = {"dog": [nouns["noun 00000002"], hot], "cat": [nouns["noun 00000003"]]}
    used = [(p.text, p.text_pair, p.label) for n in range(9) for p in wordnet.usage(senses, random.Random(n))]
    assert set(used) == {
        ("the dog ran", "dog: it meows", "other"),
        ("the dog ran", "dog: barks", "right"),
        ("a hot dog", "dog: it meows", "other"),
        ("a hot dog", "dog: a sausage", "right"),
    }
    near = {
        (p.text[:3], p.text_pair[:3]): p.label for n in range(9) for p in wordnet.similarity(nouns, random.Random(n))
    }
    steps = {("dog", "toy"): 1, ("dog", "ani"): 1, ("dog", "cat"): 2, ("cat", "toy"): 3}
    assert {pair: near[pair] for pair in steps if pair in near} == {
        pair: pytest.approx(1 - count / 5) for pair, count in steps.items() if pair in near
    }
    assert len(near.keys() & steps.keys()) > 2
    with pytest.raises(StorageError, match=r"line 1 of data\.verb is no entry of WordNet"):
        wordnet.synsets("00000001 03 v", "verb")


def test_topics_of_sentences_from_wordnet():
    data = """  1 licence
00000001 18 n 01 child 0 000 | young
00000002 28 n 01 day 0 000 | a day
00000003 05 n 01 dog 0 000 | barks
"""
    index = """  1 licence
child n 1 2 @ ~ 1 1 00000001
city n 1 0 1 0 00000009
day n 2 1 @ 2 1 00000002 00000001
dog n 1 1 @ 1 1 00000003
"""
    known = topics.first_topics(index, data)
    assert known == {"child": "people", "day": "deeds"}
    words, tags = ["Days", "of", "a", "child", "'s", "dog"], ["noun", "other", "other", "noun", "other", "noun"]
    assert topics.topics_of(words, tags, known) == ["deeds", "people"]
    assert topics.topics_of(words, ["verb"] * 6, known) == []
    with pytest.raises(StorageError, match=r"line 1 of index\.noun is no entry"):
        topics.first_topics("child n 1 x", data)


def test_differences_are_paired():
    generator = np.random.default_rng(0)
    first = {"x": generator.random(50), "y": generator.random(80)}
    second = {task: values - 0.1 + 1e-3 * generator.random(len(values)) for task, values in first.items()}
    gap, error = paired(Measured(first), Measured(second))
    gaps = {task: first[task] - second[task] for task in first}
    assert gap == pytest.approx(np.mean([values.mean() for values in gaps.values()]))
    assert error == pytest.approx(np.sqrt(sum(values.var() / len(values) for values in gaps.values())) / 2)
    assert [verdict(gap, error), verdict(-gap, error), verdict(gap, gap)] == ["agrees", "contradicts", "no difference"]
    assert verdict(float("nan"), float("nan")) == "no difference"
    many = together([Measured(first), Measured({"x": first["x"]})])
    assert {task: values.tolist() for task, values in many.values.items()} == {
        task: values.tolist() for task, values in first.items()
    }
    assert many.error == Measured(first).error  # an example counts once, whatever number of models was measured on it
    assert together([Measured(first), Measured(second)]).mean == pytest.approx((many.mean + Measured(second).mean) / 2)


def test_the_page_is_what_the_results_say():
    """docs/papers.md is written from benchmarks/papers/results by `python -m benchmarks.papers --page`."""
    results = ROOT / "benchmarks" / "papers" / "results"
    assert (ROOT / "docs" / "papers.md").read_text() == page(load([str(results)]))
