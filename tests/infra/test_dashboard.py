"""The Grafana dashboard and Prometheus' settings, beside what the program exports."""

import json
import re
from pathlib import Path

import pytest
import yaml
from ray.util.metrics import Counter, Histogram, Metric

from ray_tasks.evaluators.prometheus import EvaluatorMetrics

INFRA = Path(__file__).parents[2] / "infra"


@pytest.fixture(scope="module")
def exported():
    """Name in Prometheus → labels, of everything that evaluators count."""
    metrics = [value for value in vars(EvaluatorMetrics("a")).values() if isinstance(value, Metric)]
    result = {}
    for metric in metrics:
        name, labels = f"ray_{metric.info['name']}", set(metric.info["tag_keys"])
        if isinstance(metric, Histogram):
            result |= {f"{name}_{part}": labels | {"le"} for part in ("bucket", "count", "sum")}
        else:
            result[f"{name}_total" if isinstance(metric, Counter) else name] = labels
    return result


@pytest.fixture(scope="module")
def board():
    return json.loads((INFRA / "grafana" / "mergequest.json").read_text())


def expressions(board):
    return [target["expr"] for panel in board["panels"] for target in panel["targets"]]


def test_the_dashboard_asks_for_what_is_exported(board, exported):
    variables = [entry["query"]["query"] for entry in board["templating"]["list"] if entry["type"] == "query"]
    requested = {name for text in expressions(board) + variables for name in re.findall(r"\w*mergequest_\w+", text)}
    assert requested <= set(exported)
    # nothing is exported that the dashboard does not show; of a histogram, the buckets
    assert {name for name in exported if not name.endswith(("_count", "_sum"))} <= requested


def test_its_queries_group_by_labels_that_there_are(board, exported):
    for text in expressions(board):
        (name, *others) = re.findall(r"ray_mergequest_\w+", text)
        labels = {label.strip() for group in re.findall(r"by \(([^)]*)\)", text) for label in group.split(",")}
        assert labels <= exported[name], text
        assert text.count("{") == text.count("}") == len([name, *others])
        assert text.count("(") == text.count(")")


def test_panels_stand_side_by_side(board):
    seats = [panel["gridPos"] for panel in board["panels"]]
    taken = [(x, y) for s in seats for x in range(s["x"], s["x"] + s["w"]) for y in range(s["y"], s["y"] + s["h"])]
    assert len(taken) == len(set(taken))
    assert max(x for x, _ in taken) < 24
    assert len({panel["id"] for panel in board["panels"]}) == len(seats)


def test_prometheus_reads_the_file_that_ray_writes():
    from ray._private.ray_constants import PROMETHEUS_SERVICE_DISCOVERY_FILE

    settings = yaml.safe_load((INFRA / "prometheus.yml").read_text())
    (job,) = settings["scrape_configs"]
    (files,) = (entry["files"] for entry in job["file_sd_configs"])
    assert files == [f"/tmp/ray/{PROMETHEUS_SERVICE_DISCOVERY_FILE}"]
