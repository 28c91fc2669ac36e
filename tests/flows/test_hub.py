"""Checkpoints by their ids on the Hugging Face Hub, read and pushed over HTTP."""

import json
import shutil
import sys
from pathlib import Path

import huggingface_hub
import huggingface_hub.constants
import pytest
import torch
import yaml
from safetensors.torch import load_file, save
from typer.testing import CliRunner

import flows.cli.evaluate
from flows.campaign.open_campaign import open_campaign
from flows.cli.app import app
from flows.cli.evaluate import evaluate
from flows.cli.push import with_lineage
from flows.config.campaign_file import load_campaign
from flows.config.recipe_file import load_recipe
from flows.directory.campaign_directory import Directory
from flows.directory.progress import Display
from merging.errors import MergequestError, StorageError
from merging.io import hub, storage

sys.path.insert(0, str(Path(__file__).parents[1]))
from hub_server import serving


@pytest.fixture
def server(monkeypatch, tmp_path):
    with serving() as result:
        url = result.url + "/{repo_id}/resolve/{revision}/{filename}"
        constants = huggingface_hub.constants
        monkeypatch.setattr(constants, "ENDPOINT", result.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        hub._snapshot.cache_clear()
        huggingface_hub.close_session()
        yield result
        hub._snapshot.cache_clear()
        huggingface_hub.close_session()


def mergequest(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return " ".join(result.output.split()), result.exit_code


def recipe(tmp_path, **changes):
    settings = {"base": "org/base", "members": {"one": "org/one@v1", "two": "org/two"}, "method": "average"} | changes
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path / "recipe.yaml"


@pytest.fixture
def pool(server, tiny_campaign):
    """Base and two members on the Hub; of one, `main` is another model. Name → commit."""
    members = {name: Path(tiny_campaign["members"][name]["checkpoint"]) for name in ("one", "two")}
    commits = {"base": server.commit("org/base", Path(tiny_campaign["base"]))}
    commits["one"] = server.commit("org/one", members["one"], "v1")
    server.commit("org/one", members["two"])
    return commits | {"two": server.commit("org/two", members["two"])}


def test_a_recipe_of_ids_merges_as_one_of_directories_and_names_commits(server, pool, tiny_campaign, tmp_path):
    output, status = mergequest("merge", recipe(tmp_path), "--out", tmp_path / "merged")
    assert status == 0, output
    local = {name: str(tiny_campaign["members"][name]["checkpoint"]) for name in ("one", "two")}
    file = recipe(tmp_path, base=str(tiny_campaign["base"]), members=local)
    assert mergequest("merge", file, "--out", tmp_path / "local")[1] == 0
    one, two = (load_file(tmp_path / place / "model.safetensors") for place in ("merged", "local"))
    assert all(torch.equal(one[name], two[name]) for name in two)
    written = yaml.safe_load((tmp_path / "merged" / "recipe.yaml").read_text())
    assert written["base"] == f"hf://org/base@{pool['base']}"
    assert {name: member["checkpoint"] for name, member in written["members"].items()} == {
        name: f"hf://org/{name}@{pool[name]}" for name in ("one", "two")
    }
    server.requests.clear()
    hub._snapshot.cache_clear()
    assert mergequest("merge", tmp_path / "merged" / "recipe.yaml", "--out", tmp_path / "again")[1] == 0
    assert not server.requests  # commits do not change, and are in the cache
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(again[name], two[name]) for name in two)


def test_a_mergekit_configuration_of_ids_merges_as_the_recipe_does(server, pool, tmp_path):
    assert mergequest("merge", recipe(tmp_path, method="task_arithmetic"), "--out", tmp_path / "ours")[1] == 0
    one = {"model": {"path": "org/one", "revision": "v1"}}
    theirs = {
        "merge_method": "task_arithmetic",
        "base_model": "org/base",
        "models": [
            {"model": one, "parameters": {"weight": 0.3}},
            {"model": "org/two@main", "parameters": {"weight": 0.3}},
        ],
    }
    (tmp_path / "mergekit.yaml").write_text(yaml.safe_dump(theirs))
    output, status = mergequest("merge", tmp_path / "mergekit.yaml", "--out", tmp_path / "theirs")
    assert status == 0, output
    ours, theirs = (load_file(tmp_path / place / "model.safetensors") for place in ("ours", "theirs"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    written = yaml.safe_load((tmp_path / "theirs" / "recipe.yaml").read_text())
    assert {member["checkpoint"] for member in written["members"].values()} == {
        f"hf://org/{name}@{pool[name]}" for name in ("one", "two")
    }


def test_a_directory_of_that_name_comes_first(server, pool, tiny_campaign, tmp_path):
    shutil.copytree(tiny_campaign["base"], tmp_path / "org" / "base")
    result = load_recipe(str(recipe(tmp_path, members={"one": "hf://org/one@v1", "two": "org/base+hf://org/two@main"})))
    assert result.base == str(tmp_path / "org/base")
    assert result.members["one"].checkpoint == "hf://org/one@v1"
    assert result.members["two"].checkpoint == f"{tmp_path}/org/base+hf://org/two@main"
    assert load_recipe(str(recipe(tmp_path, members={"x": "org/x"}))).members["x"].checkpoint == f"{tmp_path}/org/x"
    assert load_recipe(str(recipe(tmp_path, members={"x": "else/x"}))).members["x"].checkpoint == "hf://else/x"


def test_a_directory_of_a_repository_is_pinned_as_one(server, pool):
    commit = pool["base"]
    assert hub.pinned("hf://org/base") == f"hf://org/base@{commit}"
    assert hub.pinned("hf://org/base/sub/dir") == f"hf://org/base@{commit}/sub/dir"
    assert (
        hub.pinned(f"hf://org/base@{commit}/sub+hf://org/two")
        == f"hf://org/base@{commit}/sub+hf://org/two@{pool['two']}"
    )


def test_an_adapter_on_a_model_of_the_hub(server, pool, tiny_campaign, tmp_path):
    """`MODEL+ADAPTER`, both on the Hub."""
    base = load_file(f"{tiny_campaign['base']}/model.safetensors")
    name = next(key for key in base if key.endswith("attention.self.query.weight"))
    rank, dim = 2, base[name].shape[0]
    key = f"base_model.model.{name.removesuffix('.weight')}"
    factors = {f"{key}.lora_A.weight": torch.ones(rank, dim), f"{key}.lora_B.weight": torch.full((dim, rank), 0.01)}
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["query"], "bias": "none"}
    files = {"adapter_config.json": json.dumps(config).encode(), "adapter_model.safetensors": save(factors)}
    server.put("org/lora", "main", files)
    members = {"one": "org/base+org/lora"}
    output, status = mergequest("merge", recipe(tmp_path, members=members), "--out", tmp_path / "merged")
    assert status == 0, output
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert torch.allclose(merged[name], base[name] + 0.02)
    place = yaml.safe_load((tmp_path / "merged" / "recipe.yaml").read_text())["members"]["one"]["checkpoint"]
    assert place == f"hf://org/base@{pool['base']}+hf://org/lora@{server.sha('org/lora', 'main')}"


def test_a_campaign_keeps_the_commits_that_it_began_with(
    server, pool, campaign_file, tiny_campaign, tmp_path, monkeypatch
):
    members = {
        name: {**settings, "checkpoint": "org/one@v1" if name == "one" else settings["checkpoint"]}
        for name, settings in tiny_campaign["members"].items()
    }
    campaign = load_campaign(str(campaign_file(members=members, directory="out")))
    assert campaign.members["one"].checkpoint == "hf://org/one@v1"
    directory, display = Directory(str(tmp_path / "out")), Display()
    opened = open_campaign(campaign, display, directory.path)
    directory.claim(campaign, opened.fingerprints)
    known = json.loads((tmp_path / "out/pool.json").read_text())["revisions"]
    assert known == {"hf://org/one@v1": f"hf://org/one@{pool['one']}"}
    assert opened.setup({}).members["one"] == known["hf://org/one@v1"]
    server.commit("org/one", Path(tiny_campaign["members"]["two"]["checkpoint"]), "v1")  # the branch moves
    hub._snapshot.cache_clear()
    again = open_campaign(directory.campaign(), display, directory.path)
    assert again.fingerprints == opened.fingerprints
    assert directory.campaign().identity() == campaign.identity()
    # so has what is evaluated beside it, and the winner's recipe, which names commits, goes with it
    exported = recipe(tmp_path, base=campaign.base, members={"one": known["hf://org/one@v1"]})
    evaluated = []
    monkeypatch.setattr(flows.cli.evaluate, "published_files", lambda opened: evaluated.append(opened) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate(directory.campaign(), ["one", str(exported)], "validation", display)
    assert evaluated[0].setup({}).members == again.setup({}).members
    moved = open_campaign(campaign, display)
    assert moved.fingerprints["checkpoints"]["one"] != opened.fingerprints["checkpoints"]["one"]


@pytest.mark.parametrize(
    ("member", "said"),
    [
        ("org/nothing", "there is no such model, or it is private"),
        ("org/one@v9", "it has no revision 'v9'"),
        ("org/gated", "it is gated: accept its terms"),
        ("org/pickle", "holds no safetensors"),
        ("hf://org", "is no model on the Hub: expected hf://ORG/NAME"),
        ("hf://org/one@../x", "is no model on the Hub"),
    ],
)
def test_what_cannot_be_had_is_one_error(server, pool, tmp_path, member, said):
    server.put("org/gated", "main", {"config.json": b"{}", "model.safetensors": b"x"})
    server.gated.add("org/gated")
    server.put("org/pickle", "main", {"config.json": b"{}", "pytorch_model.bin": b"x"})
    output, status = mergequest("merge", recipe(tmp_path, members={"one": member}), "--out", tmp_path / "merged")
    assert (status, said in output) == (2, True), output
    assert not (tmp_path / "merged").exists()


def test_offline_what_is_cached_is_read_and_what_is_not_is_said(server, pool, tmp_path, monkeypatch):
    assert storage.is_dir("hf://org/base")
    (hub.local_path("hf://org/two") / "model.safetensors").unlink()  # a download that was interrupted
    hub._snapshot.cache_clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    assert hub.pinned("hf://org/base") == f"hf://org/base@{pool['base']}"
    for absent in ("org/one@v1", "org/two"):  # never there, and not whole
        with pytest.raises(StorageError, match=f"'{absent}' is no directory here .* HF_HUB_OFFLINE is set"):
            storage.is_dir(f"hf://{absent}")


def test_a_hub_that_does_not_answer(server, pool, monkeypatch):
    hub.local_path("hf://org/base")
    hub._snapshot.cache_clear()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert hub.pinned("hf://org/base").endswith(pool["base"])  # from the cache
    with pytest.raises(StorageError, match="cannot be reached"):
        hub.local_path("hf://org/two")


def test_nothing_is_written_there(server, pool, tmp_path):
    output, status = mergequest("merge", recipe(tmp_path), "--out", "hf://org/out")
    assert status == 2, output
    assert "org/out" not in server.repositories


def test_a_merge_is_pushed_with_what_it_was_made_of(server, pool, tmp_path, monkeypatch):
    assert mergequest("merge", recipe(tmp_path), "--out", tmp_path / "merged")[1] == 0
    (tmp_path / "merged" / "README.md").write_text("---\nlicense: mit\ntags: [mine]\n---\n# Card\n")
    output, status = mergequest("push", tmp_path / "merged", "org/merged")
    assert (status, "a token that may write there is needed" in output) == (2, True), output
    monkeypatch.setenv("HF_TOKEN", "hf_writer0123456789")
    output, status = mergequest("push", tmp_path / "merged", "org/merged", "--quiet")
    assert status == 0, output
    assert f"{server.url}/org/merged/commit/" in output
    pushed = server.repositories["org/merged"]["main"]
    for name in ("model.safetensors", "config.json", "recipe.yaml"):
        assert pushed[name] == (tmp_path / "merged" / name).read_bytes()
    _, head, body = pushed["README.md"].decode().split("---\n")
    assert body == "# Card\n"
    assert yaml.safe_load(head) == {
        "license": "mit",
        "tags": ["mine", "merge", "mergequest"],
        "base_model": ["org/base", "org/one", "org/two"],
        "base_model_relation": "merge",
    }
    assert not [name for name in pushed if name.startswith(".")]
    again = load_recipe(str(recipe(tmp_path, members={"again": "org/merged"}))).material()
    assert again.pool.members["again"].checkpoint.tensors
    for bad in ("merged", "org/merged@main", "a b/c"):
        assert mergequest("push", tmp_path / "merged", bad)[1] == 2
    with pytest.raises(MergequestError):
        load_recipe(str(recipe(tmp_path, members={"one": "org/one@"}))).material()


@pytest.mark.parametrize(
    ("card", "said"),
    [
        (b"---\n: [\n---\n", "is no mapping"),
        (b"---\n- a\n---\n", "is no mapping"),
        (b"\xff\xfe", "is not a UTF-8 text file"),
    ],
)
def test_a_card_that_cannot_be_read_is_one_error(tiny_campaign, tmp_path, card, said):
    shutil.copytree(tiny_campaign["base"], tmp_path / "merged")
    (tmp_path / "merged/README.md").write_bytes(card)
    output, status = mergequest("push", tmp_path / "merged", "org/merged")
    assert (status, said in output) == (2, True), output


def test_a_card_s_single_tag_stays_a_word():
    card = with_lineage("\ufeff---\r\ntags: mine\r\n---\r\n# Card\n", ["org/base"])
    _, head, body = card.split("---\n")
    assert (yaml.safe_load(head)["tags"], body) == (["mine", "merge", "mergequest"], "# Card\n")
