"""The image's recipe: whole, small, without root and without secrets."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
HADOLINT = Path(sys.executable).with_name("hadolint")


@pytest.fixture(scope="module")
def instructions():
    """Instruction and arguments, comments dropped and continued lines joined."""
    text = (ROOT / "infra" / "Dockerfile").read_text()
    lines = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    result = [line.strip() for line in re.sub(r"\\\n\s*", "", lines).splitlines() if line.strip()]
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in result]


def test_every_package_is_copied_and_passes_the_ignore_file(instructions):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = {name.rstrip("*") for name in project["tool"]["setuptools"]["packages"]["find"]["include"]}
    needed = packages | {"pyproject.toml", project["project"]["readme"], *project["project"]["license-files"]}
    copied = {source for name, value in instructions if name == "COPY" for source in value.split()[:-1]}
    assert copied == needed
    assert all((ROOT / source).exists() for source in copied)
    ignored = (ROOT / "infra" / "Dockerfile.dockerignore").read_text().splitlines()
    rules = [line for line in ignored if line and not line.startswith("#")]
    assert rules[0] == "*"
    assert {rule[1:] for rule in rules if rule.startswith("!")} == copied


def test_base_user_and_environment(instructions):
    names = [name for name, _ in instructions]
    assert set(names) <= {"FROM", "ARG", "RUN", "COPY", "ENV", "USER", "WORKDIR", "CMD"}
    base = next(value for name, value in instructions if name == "FROM")
    requires = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert base == f"python:{requires.removeprefix('>=')}-slim"
    users = [value for name, value in instructions if name == "USER"]
    assert users
    assert users[-1] not in ("0", "root")
    assert "RUN" not in names[names.index("USER") :]
    environment = " ".join(value for name, value in instructions if name == "ENV")
    assert "RAY_AUTH_MODE=token" in environment
    assert not re.search(r"TOKEN=|SECRET|PASSWORD|ACCESS_KEY", environment)


def test_dependencies_are_a_layer_that_the_program_does_not_change(instructions):
    installs = [at for at, (name, value) in enumerate(instructions) if name == "RUN" and "pip install" in value]
    program = [at for at, (name, value) in enumerate(instructions) if name == "COPY" and "flows" in value]
    dependencies, itself = installs
    assert dependencies < program[0] < itself
    assert "--no-deps" in instructions[itself][1]
    # which the development environment has by chance
    assert yaml.safe_load((ROOT / "infra" / "aws.yaml").read_text())["provider"]["type"] == "aws"
    assert ("ARG", "EXTRAS=aws") in instructions[:dependencies]
    assert "/src[${EXTRAS}]" in instructions[dependencies][1]


@pytest.mark.skipif(not HADOLINT.exists(), reason="hadolint comes with the dev extra on Linux")
def test_hadolint_parses_the_dockerfile_and_its_shell_and_finds_nothing():
    def findings(text):
        done = subprocess.run([HADOLINT, "--no-color", "-"], input=text, capture_output=True, text=True, check=False)
        return done.stdout + done.stderr

    text = (ROOT / "infra" / "Dockerfile").read_text()
    assert findings(text) == ""
    assert "unexpected 'W'" in findings(text.replace("WORKDIR", "WORK DIR"))
