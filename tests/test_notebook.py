"""The notebook in docs/ runs, and its SQL says what its pandas says.

Its cells are executed as plain Python: a Jupyter kernel would bring some twenty packages to run a dozen cells.
"""

import json
from pathlib import Path

import numpy as np
import pytest

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def ran():
    """What the notebook's names stand for after its last cell."""
    cells = json.loads((DOCS / "analysis.ipynb").read_text())["cells"]
    names = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(DOCS)
        for cell in cells:
            if cell["cell_type"] == "code":
                exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
    return names


def test_it_keeps_no_outputs():
    cells = json.loads((DOCS / "analysis.ipynb").read_text())["cells"]
    assert [cell["id"] for cell in cells if cell.get("outputs")] == []


def test_best_by_method(ran):
    ours, theirs = ran["by_method"], ran["by_method_sql"]
    assert list(theirs["method"]) == list(ours["method"])
    np.testing.assert_array_equal(theirs["objective"], ours["objective"])
    assert list(theirs["members"]) == list(ours["members"])
    assert ran["winners"]["objective"].iloc[0] == theirs["objective"].max()


def test_members(ran):
    effects = ran["effects"][ran["effects"]["kind"] == "member"]
    assert list(ran["members_sql"]["member"]) == list(effects["name"])
    assert list(ran["members_sql"]["candidates"]) == list(effects["count"])
    np.testing.assert_allclose(ran["members_sql"]["mean_with"], effects["mean_with"])


def test_evaluations_to_a_target(ran):
    ours = ran["until"].set_index("target").loc[0.72]
    assert ran["until_sql"]["candidates"].item() == ours["candidates"]
    assert ran["until_sql"]["examples"].item() == ours["examples"]


def test_scores_and_parameters(ran):
    winners = ran["winners"]
    np.testing.assert_array_equal(ran["tasks_sql"]["movie"], winners["score.movie"])
    np.testing.assert_array_equal(ran["tasks_sql"]["rho"], winners["parameter.rho"])


def test_the_sample_is_a_whole_campaign(ran):
    assert set(ran["frame"]["split"]) == {"validation", "test"}
    assert len(ran["front"]) > 3
    assert ran["study"].best_value == ran["winners"]["objective"].iloc[0]


def test_what_validation_promised(ran):
    tested = ran["frame"][ran["frame"]["split"] == "test"]
    promised = ran["promised"]
    assert set(promised["candidate"]) == set(tested["candidate"])
    assert ran["winners"]["candidate"].iloc[0] == promised["candidate"].iloc[0]
