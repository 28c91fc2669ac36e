import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModel

from flows.cli.merge import merge_recipe
from flows.config.recipe_file import load_recipe
from flows.directory.progress import Display
from merging.checkpoints.checkpoint import Checkpoint
from merging.errors import MethodError, SettingsError
from merging.optimization.gradient_mismatch import quadratic_mismatch
from merging.statistics import STATISTICS, LikelihoodSettings, measure, save
from merging.tasks import TextClassificationSettings, make_task

MEMBERS = ("one", "two")


@pytest.fixture
def write_recipe(tiny_campaign, tmp_path):
    """Writes a recipe of two members, with the Fisher information of some: `write_recipe("one")`."""

    def write(*with_fisher):
        members = {}
        for name in MEMBERS:
            path = tiny_campaign["members"][name]["checkpoint"]
            members[name] = {"checkpoint": path}
            if name in with_fisher:
                task = make_task(name, TextClassificationSettings(**tiny_campaign["tasks"][name]), path)
                statistic = STATISTICS["fisher"](LikelihoodSettings(examples=4))
                partial = measure(task, statistic)
                file = str(tmp_path / f"{name}.safetensors")
                save(file, statistic, partial, checkpoint=Checkpoint.open(path).fingerprint, data="d")
                members[name]["statistics"] = [file]
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(yaml.safe_dump({"base": tiny_campaign["base"], "members": members, "method": "average"}))
        return str(recipe)

    return write


def test_the_mismatch_is_told_where_it_is_asked_for(write_recipe, tmp_path, capsys):
    recipe = write_recipe(*MEMBERS)
    merge_recipe(recipe, str(tmp_path / "out"), "float32", 1.0, Display(), mismatch=True)
    printed = capsys.readouterr()
    material = load_recipe(recipe).material()
    expected = quadratic_mismatch(material, Checkpoint.open(str(tmp_path / "out")).read, dict.fromkeys(MEMBERS, 1.0))
    shown = " ".join((printed.out + printed.err).split())
    assert expected.total > 0
    assert f"predicts it: {expected.total:.3g} (one {expected.members['one']:.3g}," in shown
    assert torch.float32 == Checkpoint.open(str(tmp_path / "out")).read("pooler.dense.weight").dtype


def test_a_mismatch_without_fisher_information_is_refused_before_anything_is_written(write_recipe, tmp_path):
    with pytest.raises(MethodError, match="needs the statistic 'fisher' of two"):
        merge_recipe(write_recipe("one"), str(tmp_path / "out"), None, 1.0, Display(), mismatch=True)
    assert not (tmp_path / "out").exists()


def test_nothing_but_an_earlier_merge_is_replaced(write_recipe, tiny_pool, tmp_path):
    """The directory is replaced whole: what else lay in it would be lost."""
    own = tmp_path / "own"
    shutil.copytree(tiny_pool["base"], own / "base")
    settings = yaml.safe_load(Path(write_recipe()).read_text()) | {"base": str(own / "base")}
    recipe = tmp_path / "own.yaml"
    recipe.write_text(yaml.safe_dump(settings))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("years of work")
    for out, message in (
        (own / "base", "would replace .*base, which is merged"),
        (own, "would replace .*base, which is merged"),
        (tiny_pool["three"], "holds no earlier merge"),
        (tmp_path / "notes", "is not empty and holds no earlier merge"),
    ):
        before = sorted(out.rglob("*"))
        with pytest.raises(SettingsError, match=message):
            merge_recipe(str(recipe), str(out), None, 1.0, Display())
        assert sorted(out.rglob("*")) == before
    for dtype in ("float32", "float16"):
        merge_recipe(str(recipe), str(tmp_path / "out"), dtype, 1.0, Display())
    assert Checkpoint.open(str(tmp_path / "out")).read("pooler.dense.weight").dtype == torch.float16


def test_a_merge_in_another_dtype_is_loaded_in_it(write_recipe, tmp_path):
    merge_recipe(write_recipe(), str(tmp_path / "out"), "bfloat16", 1.0, Display())
    assert {value.dtype for value in AutoModel.from_pretrained(tmp_path / "out").parameters()} == {torch.bfloat16}


def test_merging_imports_torch_and_nothing_else_that_takes_seconds():
    dear = "{'numba', 'transformers', 'sklearn', 'pandas', 'pyarrow', 'optuna', 'ray', 'scipy', 'matplotlib'}"
    script = f"import sys, flows.cli.merge; print(sorted({dear} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
