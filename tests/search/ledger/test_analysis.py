from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from search.ledger import analysis
from search.ledger.frame import frame, history
from search.ledger.row import Row

START = datetime(2031, 1, 1, tzinfo=UTC)
METHOD = {"average": 0.5, "ties": 0.53, "regmean": 0.6}
MEMBER = {"a": 0.04, "b": 0.0, "c": -0.03}


def row(number, method, members, x, y, split="validation", origin="search", **more):
    return Row(
        "demo", f"c{number}", split, origin, "failed" if x is None else "complete", method, tuple(members),
        dict.fromkeys(members, number / 100), {"rho": number / 50} if method == "regmean" else {}, trial=number,
        objective=None if x is None else (x + y) / 2, scores={} if x is None else {"x": x, "y": y},
        examples={"x": 100, "y": 50}, started=START + timedelta(seconds=10 * number),
        finished=START + timedelta(seconds=10 * number + 10), **more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def result():
    """Objectives that are a method's height and what its members add; regmean mostly has the bad member c."""
    rows = []
    for number, (method, members) in enumerate(
        [("average", "ab"), ("ties", "bc"), ("average", "ac"), ("ties", "a"), ("regmean", "bc"), ("regmean", "abc")] * 4
    ):
        height = METHOD[method] + sum(MEMBER[name] for name in members)
        rows.append(row(number, method, members, height + 0.001 * number, height - 0.001 * number))
    rows += [row(90, "ties", "ab", None, None), row(91, "base", "", 0.9, 0.9, origin="reference")]
    rows += [row(5, "regmean", "abc", 0.55, 0.57, split="test", origin="final")]
    return frame(rows)


def test_effects_are_those_that_were_put_in(result):
    effects = analysis.marginal_effects(result).set_index("name")
    mean = np.mean(list(METHOD.values()))
    for name, height in METHOD.items():
        assert effects.loc[name, "adjusted"] == pytest.approx(height - mean, abs=1e-9)
    for name, added in MEMBER.items():
        assert effects.loc[name, "adjusted"] == pytest.approx(added, abs=1e-9)
    assert effects.loc["b", "difference"] > 0.01  # the company of regmean
    assert effects.loc["a", ["kind", "count"]].tolist() == ["member", 16]
    assert (effects["standard_error"] < 1e-6).all()


def test_what_cannot_be_told_apart_has_no_effect():
    rows = [row(i, "ties", members, 0.5 + i / 10, 0.5) for i, members in enumerate(["ab", "ab", "abc", "abc"])]
    effects = analysis.marginal_effects(frame(rows)).set_index("name")
    assert effects.loc[["a", "b"], "adjusted"].isna().all()
    assert np.isnan(effects.loc["a", "difference"])
    assert effects.loc["c", "adjusted"] == pytest.approx(0.1)
    assert analysis.marginal_effects(frame([])).empty


@pytest.mark.parametrize("evaluator", ["ped-anova", "fanova", "impurity"])
def test_importance_finds_the_method(result, evaluator):
    shares = analysis.importance(result, evaluator)
    assert shares.sum() == pytest.approx(1.0)
    assert shares["method"] > 0.05
    if evaluator != "ped-anova":
        assert set(shares.index) == {"method", "members"}
    assert analysis.importance(frame([row(1, "ties", "ab", 0.5, 0.5)])).empty


def test_what_a_target_cost(result):
    cost = analysis.evaluations_to_target(result, [0.0, 0.6, 0.7])
    first = next(i for i, value in enumerate(history(result)["best"]) if value >= 0.6)
    assert list(cost["candidates"][:2]) == [1, first + 1]
    assert list(cost["examples"][:2]) == [150, 150 * (first + 1)]
    assert list(cost["seconds"][:2]) == [10.0, 10.0 * (first + 1)]
    assert cost.loc[2, ["candidates", "examples", "seconds"]].isna().all()


def test_campaigns_side_by_side(result):
    early = result[result["trial"] < 4]
    table = analysis.compare({"early": early, "whole": result, "empty": frame([])})
    assert list(table["campaign"]) == ["whole", "early", "empty"]
    assert table.loc[0, ["candidates", "failed", "at", "members"]].tolist() == [25, 1, 6, "a+b+c"]
    assert table.loc[0, "test"] == pytest.approx(0.56)
    assert np.isnan(table.loc[1, "test"])
    assert table.loc[2, "candidates"] == 0


def test_a_study_of_the_ledger(result):
    study = analysis.as_study(result)
    assert len(study.trials) == 24
    assert study.best_params == {
        "method": "regmean", "members": "a+b+c", "regmean.rho": 0.1,
        **{f"regmean.scaling.{name}": 0.05 for name in "abc"},
    }  # fmt: skip


def test_several_objectives_make_a_study_of_several():
    rows = [row(i, "ties", "ab", i / 10, 0.5, objectives={"mean": i / 10, "worst": -i / 10}) for i in range(1, 4)]
    study = analysis.as_study(frame(rows))
    assert [trial.values for trial in study.trials] == [[0.1, -0.1], [0.2, -0.2], [0.3, -0.3]]
    assert len(study.best_trials) == 3


def test_of_few_candidates_nothing_is_called_important():
    rows = [row(i, "ties", "ab", 0.5 + 0.001 * (i % 7), 0.5) for i in range(30)]
    rows += [row(30 + i, "regmean", "ab", 0.6 + 0.01 * i, 0.6) for i in range(analysis.FEWEST - 1)]
    shares = analysis.importance(frame(rows))
    assert not any(name.startswith("regmean.") for name in shares.index)
    assert any(name.startswith("ties.") for name in shares.index)
    assert shares.sum() == pytest.approx(1.0)


def test_what_validation_promised(result):
    errors = {"standard_errors": {"x": 0.03, "y": 0.04}}
    rows = [row(1, "ties", "ab", 0.7, 0.8, **errors), row(2, "ties", "bc", 0.6, 0.6, **errors)]
    rows += [row(1, "ties", "ab", 0.65, 0.75, split="test", origin="final", **errors)]
    reported = analysis.validation_beside_test(frame(rows))
    assert reported[["candidate", "origin", "members"]].to_numpy().tolist() == [["c1", "search", "a+b"]]
    assert reported[["validation", "test", "change"]].to_numpy()[0] == pytest.approx([0.75, 0.7, -0.05])
    assert reported["standard_error"][0] == pytest.approx(0.025 * 2**0.5)
    assert analysis.validation_beside_test(result)["change"].to_list() == pytest.approx([0.56 - 0.61])


def test_a_study_of_everything_says_what_became_of_it_and_when(result):
    study = analysis.as_study(result, every=True, name="demo")
    states = [trial.state.name for trial in study.trials]
    assert (states.count("COMPLETE"), states.count("FAIL")) == (24, 1)
    assert study.study_name == "demo"
    times = [time.to_pydatetime().astimezone() for time in sorted(result[result["origin"] == "search"]["finished"])]
    assert [trial.datetime_complete for trial in study.trials] == [time.replace(tzinfo=None) for time in times]
