"""Every command and file of the tutorial, on tiny models in the places that it names."""

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flows.cli.app import app

PAGE = Path(__file__).parents[1] / "docs" / "tutorial.md"
BLOCK = re.compile(r"(?:`(?P<file>[\w.-]+)`:\n\n)?```(?P<kind>bash|yaml|python)\n(?P<text>.*?)```", re.DOTALL)


@pytest.mark.slow
def test_every_command_runs_as_it_is_written(
    tmp_path, monkeypatch, save_base, save_member, write_texts, local_ray, capsys
):
    base = save_base(tmp_path / "checkpoints" / "base")
    for seed, name in enumerate(("amazon", "nyt")):
        save_member(tmp_path / "checkpoints" / name, base, seed)
        for split in ("train", "validation", "test"):
            write_texts(tmp_path / "data" / name / f"{split}.parquet", 24, seed=seed)
    monkeypatch.chdir(tmp_path)
    blocks = [match.groupdict() for match in BLOCK.finditer(PAGE.read_text())]
    assert len([block for block in blocks if block["kind"] == "bash"]) == PAGE.read_text().count("```bash")
    for block in blocks:
        if block["kind"] == "yaml":
            assert block["file"], f"a file without a name: {block['text']}"
            Path(block["file"]).write_text(block["text"])
        elif block["kind"] == "python":
            exec(block["text"], {})
        else:
            for line in block["text"].splitlines():
                program, *words = shlex.split(line, comments=True)
                assert program == "mergequest"
                result = CliRunner().invoke(app, words)
                assert result.exit_code == 0, f"{line}\n{result.output}"
    assert (tmp_path / "runs/my-campaign/exports/best/recipe.yaml").is_file()
    assert (tmp_path / "by-hand/model.safetensors").is_file()
    assert "regmean" in capsys.readouterr().out
