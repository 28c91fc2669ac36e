"""What is said to a campaign from another process."""

import json
import time

import pytest
import yaml

from flows.config.campaign_file import load_campaign
from flows.directory.campaign_directory import Directory
from flows.directory.steering import DirectorySteering, forget_stop, request_stop
from merging.methods import METHODS
from search.ledger.ledger import Ledger
from search.ledger.row import Row
from tests.flows.cli.running import mergequest, rows_of, start, wait_for_rows


@pytest.mark.slow
def test_a_running_campaign_is_told_to_measure_a_recipe_and_to_stop(campaign_file, tiny_campaign, tmp_path):
    """Both from another process, by the directory alone; what was in flight is in the ledger, and a resume goes on."""
    search = {"candidates": 5000, "sampler": "random", "methods": ["average", "task_arithmetic"]}
    settings = {"selection": {"mode": "all"}, "test": {"top": 1}, "resources": {"evaluators": 1}}
    out = tmp_path / "out"
    process = start("run", str(campaign_file(search=search, **settings)), "--out", str(out))
    wait_for_rows(out / "ledger", 6, process)
    members = {name: member["checkpoint"] for name, member in tiny_campaign["members"].items()}
    recipe = {"base": tiny_campaign["base"], "members": members, "method": "task_arithmetic", "scaling": 0.4375}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    output, status = mergequest("enqueue", out, tmp_path / "recipe.yaml")
    assert (status, "is measured before the next proposal" in output) == (0, True), output
    identity = output.split()[0]
    deadline = time.monotonic() + 240
    while (identity, "validation") not in rows_of(out / "ledger") and time.monotonic() < deadline:
        time.sleep(0.2)
    assert rows_of(out / "ledger")[identity, "validation"].status == "complete"
    assert mergequest("stop", out, "--wait")[1] == 0
    output, _ = process.communicate(timeout=240)
    assert (process.returncode, "stopped as asked" in output) == (0, True), output
    result = json.loads(mergequest("status", out, "--json")[0])
    assert (result["state"], result["ended"]) == ("unfinished", "stopped")
    rows = len(rows_of(out / "ledger"))
    again = start("resume", str(out), "--set", f"search.candidates={rows + 3}")
    output, _ = again.communicate(timeout=400)
    assert again.returncode == 0, output
    assert json.loads(mergequest("status", out, "--json")[0])["state"] == "finished"


def test_what_is_not_of_the_campaign_is_neither_enqueued_nor_stopped(campaign_file, tiny_campaign, tmp_path):
    campaign = load_campaign(str(campaign_file(directory="out", search={"methods": ["average", "ties"]})))
    directory = Directory(campaign.directory)
    directory.claim(campaign, {})
    members = {name: member["checkpoint"] for name, member in tiny_campaign["members"].items()}
    base, file = {"base": tiny_campaign["base"], "members": members}, tmp_path / "recipe.yaml"
    for changes, said in (
        ({"method": "dare"}, "'dare' is none of the campaign's methods (average, ties)"),
        ({"members": {"other": members["one"]}}, "'other' is"),
        ({"members": {"one": members["two"]}}, "'one' is"),
        ({"base": members["one"]}, "the campaign's base is"),
        ({"parameters": {"density": 7.0}}, "density"),
        ({"heads": ["encoder.*"]}, "has heads: ['encoder.*'], and the campaign has not"),
        ({"vocabulary": "union"}, "has vocabulary: union, and the campaign has not"),
    ):
        file.write_text(yaml.safe_dump({**base, "method": "ties", **changes}))
        output, status = mergequest("enqueue", directory.path, file)
        assert (status, said in " ".join(output.split())) == (2, True), output
    assert not (tmp_path / "out/queue").exists()
    file.write_text(yaml.safe_dump({**base, "method": "ties", "parameters": {"density": 0.5}}))
    output, status = mergequest("enqueue", directory.path, file)
    assert (status, "when the campaign goes on" in output) == (0, True), output
    (tmp_path / "out/queue/damaged.json").write_text('{"method": "ties"')
    (tmp_path / "out/queue/other.json").write_text('{"method": "ties", "scaling": {"x": 1.0}, "parameters": {}}')
    grouped = {"method": "ties", "scaling": {"one@pooler*": 1.0, "one@*": 0.5}, "parameters": {}}
    (tmp_path / "out/queue/zz.json").write_text(json.dumps(grouped))
    notes = []
    steering = DirectorySteering(directory.path, ["ties"], list(members), "bert", ["layer.0.weight"], notes.append)
    (recipe,) = steering.queued()
    assert recipe.parameters == {**METHODS["ties"].defaults("bert"), "density": 0.5}
    assert not list(steering.queued())
    ledger = Ledger(directory.ledger, campaign.name)
    ledger.append(Row(campaign.name, recipe.identity, "validation", "search", "failed", "ties", tuple(members), {}))
    output, status = mergequest("enqueue", directory.path, file)
    assert (status, "was measured before (failed; once" in output) == (0, True), output
    assert ["damaged" in notes[0], "'x' is none of the campaign's members" in notes[1]] == [True, True]
    assert "zz.json is not measured: scaling factor 'one@pooler*': 'pooler*' has none of the merged weights" in notes[2]
    assert not steering.stopping()
    output, status = mergequest("stop", directory.path)
    assert (status, "no driver is at work" in output) == (2, True), output
    request_stop(directory.path)
    steering.look()
    assert steering.stopping()
    assert DirectorySteering(directory.path, ["ties"], [], "bert", []).stopping()  # asked while the pool was opened
    forget_stop(directory.path)
    assert not DirectorySteering(directory.path, ["ties"], [], "bert", []).stopping()  # the next run is not meant
