"""What the documents say is what the program does."""

import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from flows.cli.app import app
from flows.cli.methods_page import methods_page
from flows.cli.template import settings_reference
from merging.methods import METHODS, Context, Weight
from merging.recipe import Recipe

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_settings_page_is_the_model():
    written = (ROOT / "docs" / "campaign.md").read_text()
    assert written == settings_reference(), "write it anew: python -m flows.cli.template > docs/campaign.md"


def test_the_methods_page_is_the_registry():
    written = (ROOT / "docs" / "methods.md").read_text()
    assert written == methods_page(), "write it anew: python -m flows.cli.methods_page > docs/methods.md"


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


def commands():
    for page in PAGES:
        for line in re.findall(
            r"^(?:python -m flows\.cli|mergequest) (.+?)(?:\s+#.*)?$", page.read_text(), re.MULTILINE
        ):
            yield page.name, line


@pytest.mark.parametrize(("page", "line"), sorted(set(commands())))
def test_every_command_in_the_documents_exists(page, line):
    words = line.replace("\\", "").split()
    depth = 2 if words[0] == "campaign" else 1
    found = CliRunner().invoke(app, [*words[:depth], "--help"])
    assert found.exit_code == 0, line
    for option in re.findall(r"--[a-z-]+", line):
        assert option in found.output, f"{page}: {line}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_within_the_repository_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name}: {target}"
