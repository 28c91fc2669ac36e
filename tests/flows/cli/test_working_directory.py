"""What lies in the user's working directory is neither run nor in the way."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from search.ledger.ledger import Ledger

PROGRAM = ("flows", "merging", "ray_tasks", "search")
"""Of its packages all but `mergequest`, which `-m mergequest` looks for there first, as Python always does."""
INSTALLED = [
    name
    for name in importlib.metadata.packages_distributions()
    if name.isidentifier() and name not in (*PROGRAM, "mergequest") and find_spec(name)
]
STANDARD = [name for name in sys.stdlib_module_names if name.isidentifier() and find_spec(name)]
HOSTILE = 'open(__file__ + ".ran", "w").close()\nraise RuntimeError(f"{__file__} was imported")\n'
SCRIPT = [str(Path(sys.executable).with_name("mergequest"))]
MODULE = [sys.executable, "-m", "mergequest"]
EVALUATOR = """
from my_helper import half

def score(model, checkpoint, split, limit):
    return half(float(next(model.parameters()).norm()))
"""


@pytest.fixture
def place(tmp_path):
    """Makes a directory with a module of each name, each of which says that it was run: `place(names, packages)`."""

    def make(modules, packages):
        directory = tmp_path / "place"
        directory.mkdir()
        for name in modules:
            (directory / f"{name}.py").write_text(HOSTILE)
        for name in packages:
            (directory / name).mkdir()
            (directory / name / "__init__.py").write_text(HOSTILE)
        return directory

    return make


def run(command, directory, **environment):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONSAFEPATH"} | environment
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not list(directory.rglob("*.ran"))
    return done.stdout


@pytest.mark.parametrize("command", [SCRIPT, MODULE], ids=["script", "module"])
def test_modules_there_are_not_imported(place, tiny_campaign, command):
    # with `-m`, Python itself looks for some modules of its own there first
    directory = place(INSTALLED + STANDARD if command == SCRIPT else INSTALLED, PROGRAM)
    members = {name: tiny_campaign["members"][name]["checkpoint"] for name in ("one", "two")}
    recipe = {"base": tiny_campaign["base"], "members": members, "method": "ties", "scaling": 0.5}
    (directory / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert "Search for the best merge" in run([*command, "--help"], directory)
    run([*command, "merge", "recipe.yaml", "--out", "merged", "--quiet"], directory)
    assert (directory / "merged" / "model.safetensors").exists()


@pytest.mark.slow
def test_a_custom_evaluator_there_comes_last(place, campaign_file):
    """Driver and workers find the module and what lies beside it, and nothing else there."""
    directory = place(INSTALLED + STANDARD, PROGRAM)
    (directory / "my_score.py").write_text(EVALUATOR)
    (directory / "my_helper.py").write_text("def half(value):\n    return value / 2\n")
    custom = {"kind": "custom", "evaluator": "my_score:score", "model_class": "AutoModelForSequenceClassification"}
    settings = yaml.safe_load(
        campaign_file(
            search={"candidates": 3, "methods": ["average", "task_arithmetic"]},
            selection={"mode": "all", "quality": "equal"},
            resources={"evaluators": 1},
            test={"top": 1},
            directory="out",
        ).read_text()
    )
    settings["tasks"]["one"] = custom
    (directory / "my.yaml").write_text(yaml.safe_dump(settings))
    run([*SCRIPT, "run", "my.yaml", "--quiet"], directory)
    rows = Ledger(str(directory / "out" / "ledger")).rows()
    assert {row.status for row in rows} == {"complete"}, [row.error for row in rows]
    assert all(row.scores["one"] > 0 for row in rows)
    shutil.rmtree(directory / "out")
