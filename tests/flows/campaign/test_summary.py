import yaml

from flows.campaign.summary import facts
from flows.config.campaign_file import load_campaign
from flows.directory.campaign_directory import Directory

TASKS = {
    "classes": ({}, "text classification, accuracy"),
    "spans": ({"kind": "token_classification"}, "token classification, entity f1"),
    "images": ({"kind": "image_classification"}, "image classification, accuracy"),
    "text": ({"kind": "causal_lm", "text": "text"}, "causal lm, log likelihood"),
    "choice": ({"kind": "causal_lm", "choices": "options"}, "causal lm, accuracy"),
    "translation": ({"kind": "seq2seq", "metric": "rouge_l"}, "seq2seq, rouge l"),
    "judge": ({"kind": "custom", "evaluator": "module:function"}, "custom, score"),
}


def test_a_report_names_every_kind_of_task_and_its_metric(tmp_path):
    tasks = {
        name: settings | ({"data": {"validation": "a.parquet"}} if name != "judge" else {})
        for name, (settings, _) in TASKS.items()
    }
    file = tmp_path / "campaign.yaml"
    file.write_text(
        yaml.safe_dump(
            {
                "name": "x",
                "base": "base",
                "members": {"one": "one"},
                "tasks": tasks,
                "task_heads": dict.fromkeys(tasks, "one"),
            }
        )
    )
    result = facts(Directory(str(tmp_path)), load_campaign(str(file)))
    assert result.tasks == {name: words for name, (_, words) in TASKS.items()}
