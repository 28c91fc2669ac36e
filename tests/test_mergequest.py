"""The package that programs import."""

import importlib
import subprocess
import sys

import mergequest as mq


def test_importing_it_costs_nothing():
    code = "import sys, mergequest; print(*set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    bare = subprocess.run(
        [sys.executable, "-c", "import sys; print(*set(sys.modules))"], capture_output=True, text=True
    )
    assert set(run.stdout.split()) - set(bare.stdout.split()) == {"mergequest"}


def test_every_name_is_another_package_s_own():
    assert set(mq.__all__) == set(mq._PLACES) <= set(dir(mq))
    for name, place in mq._PLACES.items():
        module, _, attribute = place.partition(":")
        assert getattr(mq, name) is getattr(importlib.import_module(module), attribute)
    assert not hasattr(mq, "nothing")


def test_a_recipe_is_merged_and_a_campaign_checked(campaign_file, tiny_campaign, tmp_path, capsys):
    members = {name: tiny_campaign["members"][name]["checkpoint"] for name in ("one", "two")}
    file = tmp_path / "recipe.yaml"
    file.write_text(f"base: {tiny_campaign['base']}\nmembers: {members}\nmethod: average\n")
    mq.merge(str(file), str(tmp_path / "merged"))
    assert (tmp_path / "merged" / "model.safetensors").exists()
    mq.check(mq.load_campaign(str(campaign_file(directory="out")), ["search.candidates=3"]))
    assert "Pool" not in capsys.readouterr().out  # on standard error
