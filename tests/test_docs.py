"""What the documents say is what the program does."""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flows.cli import app
from flows.template import settings_reference

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_settings_page_is_the_model():
    written = (ROOT / "docs" / "campaign.md").read_text()
    assert written == settings_reference(), "write it anew: python -m flows.template > docs/campaign.md"


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
