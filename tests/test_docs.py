"""What the documents say is what the program does."""

import re
import textwrap
from pathlib import Path

import pytest
import torch
import yaml
from pydantic import TypeAdapter
from typer.testing import CliRunner

from flows.cli.app import app
from flows.cli.reference import PAGES as REFERENCE
from merging import errors
from merging.methods import METHODS, Context, Weight
from merging.recipe import Recipe
from merging.tasks import TASKS, AnyTaskSettings

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", REFERENCE)
def test_the_reference_is_the_program(page):
    assert (ROOT / "docs" / page).read_text() == REFERENCE[page](), "write it anew: make reference"


def test_every_error_has_its_remedies():
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    named = {value.__name__ for value in vars(errors).values() if isinstance(value, type)} - {"MergequestError"}
    assert {name for name in named if f"## {name}\n" in page and f"`{name}`](#{name.lower()})" in page} == named


def test_every_kind_of_task_can_be_named_in_a_campaign_file():
    page = (ROOT / "docs" / "campaign.md").read_text()
    assert {kind for kind in TASKS if f"`tasks.<name> ({kind})`" in page} == set(TASKS)


def test_the_method_of_one_s_own_works_as_it_is_written(monkeypatch):
    (source,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "methods.md").read_text(), re.DOTALL)
    monkeypatch.setattr(METHODS, "_entries", dict.copy(METHODS._entries))
    exec(source, {"__name__": "magmax"})
    method = METHODS["magmax"]
    recipe = method.complete(Recipe("magmax", {"a": 1.0, "b": 0.5}, {"lambda": 1.0}))
    weight = Weight("w", torch.ones(3), {"a": torch.tensor([2.0, 1.0, 0.0]), "b": torch.tensor([1.0, 3.0, 6.0])})
    out = {"w": torch.empty(3)}
    method.prepare([weight], Context()).merge(recipe.scaling, recipe.parameters, out)
    assert out["w"].tolist() == [2.0, 2.0, 3.5]


@pytest.mark.parametrize("page", ["classification.md", "language-models.md", "vision.md", "tagging.md"])
def test_the_tasks_in_the_guides_are_valid(page):
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)
    files = [yaml.safe_load(textwrap.dedent(block)) for block in blocks]
    tasks = [task for file in files for task in file.get("tasks", file).values()]
    tasks += [
        member["calibration"] for file in files for member in file.get("members", {}).values() if "task" in member
    ]
    kinds = [TypeAdapter(AnyTaskSettings).validate_python(task).kind for task in tasks if "kind" in task]
    assert len(kinds) == sum(block.count("kind: ") for block in blocks)


def commands():
    for page in PAGES:
        for line in re.findall(
            r"^(?:python -m flows\.cli|mergequest) (.+?)(?:\s+#.*)?$", page.read_text(), re.MULTILINE
        ):
            yield page.name, line


@pytest.mark.parametrize(("page", "line"), sorted(set(commands())))
def test_every_command_in_the_documents_exists(page, line):
    words = line.replace("\\", "").split()
    result = CliRunner().invoke(app, [words[0], "--help"])
    assert result.exit_code == 0, line
    for option in re.findall(r"--[a-z-]+", line):
        assert option in result.output, f"{page}: {line}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_within_the_repository_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name}: {target}"
