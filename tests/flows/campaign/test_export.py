"""What a campaign exports, without a cluster."""

import json
import sys

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file

from flows.campaign.export import export
from flows.campaign.open_campaign import OpenCampaign, open_campaign
from flows.cli.merge import merge_recipe
from flows.config.campaign_file import load_campaign
from flows.directory.progress import Display
from merging.checkpoints.checkpoint import Checkpoint
from merging.errors import PoolError, TaskError
from merging.evaluation.live_models import LiveModels
from merging.mergers.material import Material
from merging.recipe import Recipe
from tests.merging.evaluation.tiny_models import FAMILIES

RECIPE = Recipe("task_arithmetic", {"one": 0.7, "two": 0.4})
EVALUATOR = """
def score(model, checkpoint, split, limit):
    return float(sum(p.double().square().sum() for p in model.parameters()))
"""


@pytest.fixture
def campaign_of(tmp_path, monkeypatch):
    """`campaign_of(family, model_class, change)`: an opened campaign over a base and two members, each with a task."""
    (tmp_path / "export_scores.py").write_text(EVALUATOR)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("export_scores", None)

    def make(name: str, model_class: str | None = None, change=lambda directory: None) -> OpenCampaign:
        family = FAMILIES[name]
        for place, model in (("base", family.make()), ("one", family.changed(1)), ("two", family.changed(2))):
            model.save_pretrained(tmp_path / "checkpoints" / place)
            change(tmp_path / "checkpoints" / place)
        task = {"kind": "custom", "evaluator": "export_scores:score", "model_class": model_class or family.auto}
        settings = {
            "name": "exported",
            "base": "checkpoints/base",
            "members": {who: {"checkpoint": f"checkpoints/{who}", "task": who} for who in ("one", "two")},
            "tasks": {"one": task, "two": task},
        }
        (tmp_path / "campaign.yaml").write_text(yaml.safe_dump(settings))
        return open_campaign(load_campaign(str(tmp_path / "campaign.yaml")), Display())

    return make


def card_and_model(place) -> tuple[str, torch.nn.Module]:
    """An export's card, and the model that its first piece of code loads."""
    card = (place / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0].replace("path/to/this/directory", str(place))
    names: dict[str, object] = {}
    exec(code, names)
    return card, names["model"].eval()


@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "mixtral",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("gpt2", "t5", "clip", "bert_mlm", "llava")),
    ],
)
def test_the_card_loads_the_model_that_was_measured(name, campaign_of, tmp_path):
    opened = campaign_of(name)
    owners = opened.campaign.owners()
    material = Material(opened.pool)
    live = LiveModels(material, list(opened.tasks.values()), owners, torch.device("cpu"))
    measured = live.measure(RECIPE, "validation").scores["one"].value
    place = tmp_path / "out"
    export(opened, {}, RECIPE, str(place), table="")
    card, model = card_and_model(place)
    assert type(model).__name__ == FAMILIES[name].model
    assert f"import {FAMILIES[name].auto}\n" in card
    assert sum(p.double().square().sum() for p in model.parameters()).item() == pytest.approx(measured, rel=1e-6)
    assert not (place / "heads").exists()
    assert "which was not merged" not in card
    for file in ("README.md", "recipe.yaml"):
        assert str(tmp_path) not in (place / file).read_text()
    assert "| one | 0.7 | `one` |" in card
    merge_recipe(str(place / "recipe.yaml"), str(tmp_path / "deep" / "again"), None, 1.0, Display())
    assert Checkpoint.open(str(tmp_path / "deep/again")).fingerprint == Checkpoint.open(str(place)).fingerprint
    again = yaml.safe_load((tmp_path / "deep/again/recipe.yaml").read_text())
    assert again["base"] == "../../checkpoints/base"


def test_heads_are_shipped_where_there_are_some(campaign_of, tmp_path):
    opened = campaign_of(
        "bert", change=lambda directory: _without_head(directory) if directory.name == "base" else None
    )
    export(opened, {}, RECIPE, str(tmp_path / "out"), table="")
    assert set(load_file(tmp_path / "out/heads/one/head.safetensors")) == {"classifier.weight", "classifier.bias"}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "transformers.AutoModelForSequenceClassification.from_pretrained(here, config=config)" in card


def _without_head(directory) -> None:
    model = transformers.BertModel.from_pretrained(directory)
    model.save_pretrained(directory)


def test_code_that_a_configuration_names_is_not_passed_on(campaign_of, tmp_path):
    def hostile(directory) -> None:
        path = directory / "config.json"
        config = json.loads(path.read_text())
        config["auto_map"] = {"AutoModelForCausalLM": "someone/else--code.Model"}
        config["architectures"] = ["NobodysModel"]
        path.write_text(json.dumps(config))
        (directory / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["a.B", None]}}))

    opened = campaign_of("llama", change=hostile)
    export(opened, {}, RECIPE, str(tmp_path / "out"), table="")
    assert "auto_map" not in (tmp_path / "out/config.json").read_text()
    assert "auto_map" not in (tmp_path / "out/tokenizer_config.json").read_text()
    card = (tmp_path / "out/README.md").read_text()
    assert "NobodysModel.from_pretrained" not in card
    assert "import AutoModel\n" in card


def test_check_finds_a_weight_in_no_task_s_model(campaign_of):
    with pytest.raises(PoolError, match=r"lm_head.weight\).*AutoModelForCausalLM"):
        campaign_of("llama", "AutoModel")


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_check_finds_a_weight_that_no_checkpoint_brings(campaign_of, name):
    def lacking(directory) -> None:
        from safetensors.torch import save_file

        file = directory / "model.safetensors"
        kept = {key: value for key, value in load_file(file).items() if key != "lm_head.weight"}
        save_file(kept, file, metadata={"format": "pt"})

    with pytest.raises(TaskError, match=r"task 'one': .* lacks the weights of 'lm_head', the head of"):
        campaign_of(name, change=lacking)
