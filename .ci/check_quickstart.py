"""Looks at what `make quickstart` left, as its users would."""

import json
import sys
from pathlib import Path

import pandas as pd
import torch
import transformers
import yaml
from safetensors.torch import load_file


def main(root: Path) -> None:
    """Checks ledger, winner, members, report and campaign file.

    Args:
        root: The quick start's directory.
    """
    ledger = pd.read_parquet(root / "ledger")
    tried = ledger[(ledger.split == "validation") & ledger.origin.isin(["anchor", "search"])]
    assert len(tried) >= 10, f"only {len(tried)} candidates"
    whole = tried[(tried.origin == "anchor") | (tried.method == "distilled")]  # what is never given up early
    assert (whole.status == "complete").mean() > 0.9, tried.error.dropna().tolist()
    assert (tried.status != "failed").mean() > 0.9, tried.error.dropna().tolist()
    distilled = tried[tried.method == "distilled"].iloc[0]
    merges = tried[tried.method != "distilled"]
    anchors = merges[merges.origin == "anchor"]
    baseline = anchors.loc[anchors.objective.idxmax()]
    start = merges.set_index("candidate", drop=False).loc[json.loads(distilled.parameters)["start"]]
    assert start.candidate == baseline.candidate or start.objective > baseline.objective, "it starts from the best"
    assert not ledger.duplicated(["candidate", "split"]).any()
    winner = tried.loc[tried.objective.idxmax()]
    average = tried[(tried.method == "average") & (tried.origin == "anchor")].iloc[0]
    assert winner.objective > average.objective, "no search ends below its baselines"
    tests = ledger[ledger.split == "test"].set_index("candidate")
    mean = lambda row: sum(value for _, value in row.scores) / len(row.scores)  # noqa: E731
    shown = {"winner": winner, "distilled": distilled, "its start": start, "average": average}
    tested = {name: mean(tests.loc[row.candidate]) for name, row in shown.items() if row.candidate in tests.index}
    print("test mean: " + ", ".join(f"{name} {value:.4f}" for name, value in tested.items()))

    best = root / "exports" / "best"
    transformers.AutoModel.from_pretrained(best)
    for task in [name for name, _ in winner.scores]:
        config = transformers.AutoConfig.from_pretrained(best / "heads" / task)
        model = transformers.AutoModelForSequenceClassification.from_pretrained(best, config=config)
        missing, unexpected = model.load_state_dict(load_file(best / "heads" / task / "head.safetensors"), strict=False)
        assert not unexpected, unexpected
        assert not any(name.startswith("classifier") for name in missing), missing
        tokenizer = transformers.AutoTokenizer.from_pretrained(best)
        with torch.inference_mode():
            logits = model(**tokenizer("A wonderful film.", return_tensors="pt")).logits
        assert logits.isfinite().all()
        transformers.AutoModelForSequenceClassification.from_pretrained(root / "members" / task)
    card = (best / "README.md").read_text()
    assert winner.method in card, "the model card names the method"
    assert all(member in card for member in winner.members), "the model card names the members"
    assert "</html>" in (root / "report.html").read_text()
    assert yaml.safe_load((root / "campaign.yaml").read_text())["name"] == "quickstart"
    print("what the quick start left is sound")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
