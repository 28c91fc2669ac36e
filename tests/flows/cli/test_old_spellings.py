"""What the version before called its commands."""

import pytest
import typer
from typer.testing import CliRunner

from flows.cli.app import app


def run(*arguments):
    """Standard output, standard error and exit code of a command line."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="mergequest")
    return result.stdout, result.stderr, result.exit_code


@pytest.mark.parametrize("name", ["run", "check", "status", "resume"])
def test_an_old_spelling_does_the_same_and_names_the_new_one(name, tmp_path):
    old, new = run("campaign", name, tmp_path / "nowhere"), run(name, tmp_path / "nowhere")
    note = f"deprecated: `mergequest campaign {name}` is `mergequest {name}` now; the next version will not read it\n"
    assert old == (new[0], note + new[1], new[2])
    assert new[2] == 2
    assert "nowhere" in new[1]


def test_options_reach_the_command(campaign_file):
    stdout, stderr, status = run("campaign", "check", campaign_file(), "--set", "search.candidates=none")
    assert (stdout, status) == ("", 2)
    assert "deprecated: " in stderr.splitlines()[0]
    assert "search.candidates" in stderr


def test_they_are_hidden_and_are_all_that_there_was(tmp_path):
    assert typer.main.get_command(app).commands["campaign"].hidden
    stdout, stderr, status = run("campaign", "--help")
    assert (status, stderr) == (0, "")
    assert all(name in stdout for name in ("run", "check", "status", "resume"))
    assert run("campaign", "stop", tmp_path)[2] == 2
