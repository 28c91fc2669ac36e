"""Whole campaigns over kinds of head side by side on one base: a class, several labels, a number."""

import copy

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file
from scipy.stats import pearsonr
from sklearn.metrics import f1_score
from transformers import AutoConfig, AutoModelForSequenceClassification

from flows.campaign.run import run
from flows.config.campaign_file import load_campaign
from flows.directory.progress import Display
from search.ledger.ledger import Ledger
from search.objective import best

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("local_ray")]
HEADS = {"topics": ("multi_label_classification", 3), "rating": ("regression", 1)}
METHODS = {"average", "fisher", "gradient_matching", "mats", "regmean", "regmean_propagated"}


@pytest.fixture(scope="module")
def finished(tiny_campaign, tiny_pool, tokenizer, tmp_path_factory):
    """A campaign that was run once; read only."""
    root = tmp_path_factory.mktemp("kinds")
    settings = copy.deepcopy(tiny_campaign) | {"directory": "out"}
    for name in ("two", "three"):
        del settings["members"][name], settings["tasks"][name]
    generator = np.random.default_rng(0)
    for seed, (name, (problem, outputs)) in enumerate(HEADS.items()):
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_pretrained(
            tiny_pool["base"], num_labels=outputs, problem_type=problem
        )
        with torch.no_grad():
            for value in model.parameters():
                value.add_(torch.randn_like(value) * 0.005)
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
        data = {}
        for split, file in settings["tasks"]["one"]["data"].items():
            texts = pd.read_parquet(file)["text"]
            values = {
                "topics": [np.flatnonzero(generator.random(3) < 0.5) for _ in texts],
                "rating": generator.normal(3, 1, len(texts)),
            }
            data[split] = str(root / f"{name}-{split}.parquet")
            pd.DataFrame({"text": texts, "label": values[name]}).to_parquet(data[split])
        settings["members"][name] = {"checkpoint": str(root / name)}
        settings["tasks"][name] = {"data": data, "max_length": 16}
    settings["search"] |= {
        "methods": sorted(METHODS),
        "pruning": "wilcoxon",
        "gradient": {"steps": 2, "methods": ["regmean"]},
    }
    settings["statistics"] |= {"propagated": {"examples": 16}, "output_gram": {"examples": 16}}
    settings |= {"distil": {"steps": 2, "batch": 4}, "resources": {"evaluators": 1}}
    (root / "campaign.yaml").write_text(yaml.safe_dump(settings))
    run(load_campaign(str(root / "campaign.yaml")), Display())
    return root / "out"


def test_every_method_is_measured_on_every_kind_of_head(finished):
    frame = pd.read_parquet(finished / "ledger")
    assert (frame.status.isin(["complete", "pruned"])).all(), frame.error.dropna().tolist()
    assert set(frame[frame.origin == "anchor"].method) == METHODS
    assert {len(scores) for scores in frame[frame.status == "complete"].scores} == {3}
    references = frame[frame.origin == "reference"]
    assert references.expected_errors.map(lambda pairs: 0 < dict(pairs)["rating"] < 1).all()


def test_the_winner_scores_as_scikit_learn_and_scipy_have_it(finished, tokenizer):
    winner = best(Ledger(str(finished / "ledger")).rows())[0]
    settings = yaml.safe_load((finished / "campaign.yaml").read_text())
    for name in HEADS:
        data = pd.read_parquet(settings["tasks"][name]["data"]["validation"])
        best_path = finished / "exports" / "best"
        config = AutoConfig.from_pretrained(best_path / "heads" / name)
        model = AutoModelForSequenceClassification.from_pretrained(best_path, config=config).eval()
        head = load_file(best_path / "heads" / name / "head.safetensors")
        assert not model.load_state_dict(head, strict=False).unexpected_keys
        inputs = tokenizer(data["text"].tolist(), truncation=True, max_length=16, padding=True, return_tensors="pt")
        with torch.no_grad():
            logits = model(**inputs).logits.numpy()
        if name == "rating":
            expected = pearsonr(data["label"], logits[:, 0])[0]
        else:
            labels = np.stack([np.isin(np.arange(3), own) for own in data["label"]])
            expected = f1_score(labels, logits > 0, average="micro")
        assert winner.scores[name] == pytest.approx(expected, abs=1e-3)


def test_the_report_names_each_head_s_metric(finished):
    page = (finished / "report.html").read_text()
    assert "text classification, micro f1" in page
    assert "text classification, pearson" in page
