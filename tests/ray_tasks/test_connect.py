import json
import os
import socket
import subprocess
import sys

import pytest
import ray

from merging.errors import ClusterError
from ray_tasks.connect import (
    JOB_CONFIG,
    WORKER_ENVIRONMENT,
    Cluster,
    NodeKind,
    WorkerEnvironment,
    connect,
    evaluators_for,
    room_for,
)


@pytest.mark.parametrize(
    ("memory", "gpus", "room"),
    [
        (40_000, 0.0, 4),  # as many as have memory
        (400_000, 0.0, 16),  # as have a core
        (1_000, 0.0, 1),  # one is always tried
        (0, 0.0, 16),  # nothing is known of memory
        (40_000, 0.5, 8),  # a GPU's evaluators are counted by GPUs
    ],
)
def test_a_cluster_of_several_nodes_has_room_for_what_its_memory_holds(memory, gpus, room):
    cluster = Cluster("127.0.0.1:6379", nodes=2, cpus=16, gpus=4.0, memory=memory)
    assert room_for(cluster, threads=1, gpus=gpus, bytes_each=10_000) == room


def test_a_cluster_that_starts_empty_is_asked_for_what_is_said():
    head = Cluster("127.0.0.1:6379", nodes=1, cpus=0, gpus=0.0)
    assert evaluators_for(head, wanted=8, threads=1, gpus=1.0, bytes_each=10_000) == 8
    with pytest.raises(ClusterError, match=r"resources\.evaluators, and for which GPUs with resources\.gpus"):
        evaluators_for(head, wanted=None, threads=1, gpus=0.0, bytes_each=10_000)


@pytest.mark.parametrize(
    ("sizes", "threads", "gpus", "places"),
    [
        ([(6, 2)], 1, 0.4, 4),  # two a GPU: the fifth would lie across both
        ([(6, 2)], 1, 0.5, 4),
        ([(6, 2)], 1, 1 / 3, 6),
        ([(3, 2)], 1, 0.4, 3),  # each asks for a CPU, too
        ([(8, 3), (8, 3)], 1, 2.0, 2),  # three GPUs hold one of two, and no process has GPUs of two nodes
        ([(16, 0), (4, 1)], 1, 1.0, 1),  # a head without GPUs
        ([(3, 0), (3, 0)], 2, 0.0, 2),
        ([(64, 8)], 1, 0.1, 64),
    ],
)
def test_processes_lie_on_one_node_and_shares_on_one_gpu(sizes, threads, gpus, places):
    cpus, devices = (sum(column) for column in zip(*sizes, strict=True))
    cluster = Cluster("127.0.0.1:6379", len(sizes), cpus, float(devices), sizes=tuple(sizes))
    assert cluster.places(threads, gpus) == places
    assert evaluators_for(cluster, None, threads, gpus, 0) == places


def test_an_address_where_nobody_answers_is_an_error_within_seconds(monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]  # bound and not listened on
        monkeypatch.setattr(ray, "is_initialized", lambda: False)
        for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}", "127.0.0.1:99999", "no-such-host.invalid:6379"):
            monkeypatch.setenv("RAY_ADDRESS", address)
            with pytest.raises(ClusterError, match=r"nobody answers at .*RAY_ADDRESS"), connect():
                pass
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    with pytest.raises(ClusterError, match="a dashboard's address"), connect():
        pass


def test_a_directory_too_long_for_sockets_is_an_error(monkeypatch, tmp_path):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / ("long" * 20)))
    with pytest.raises(ClusterError, match="RAY_TMPDIR .* too long for the paths of its sockets"), connect():
        pass


@pytest.mark.parametrize(
    ("job", "missing"),
    [
        (None, set()),
        ({"runtime_env": {"env_vars": {"TOKENIZERS_PARALLELISM": "1", "MINE": "1"}}}, {"TOKENIZERS_PARALLELISM"}),
        ({"runtime_env": {}}, set()),
        ({"runtime_env": None}, set()),
        ([], set()),
    ],
)
def test_what_a_job_says_of_its_environment_is_not_said_again(monkeypatch, job, missing):
    monkeypatch.setenv(JOB_CONFIG, json.dumps(job)) if job is not None else monkeypatch.delenv(JOB_CONFIG, False)
    assert WORKER_ENVIRONMENT.keys() - WorkerEnvironment().runtime()["env_vars"].keys() == missing


def test_what_a_campaign_says_of_workers_goes_to_ray_but_for_what_the_job_says(monkeypatch, tmp_path):
    monkeypatch.delenv(JOB_CONFIG, False)
    said = WorkerEnvironment({"MINE": "1", "OTHER": "2"}, {"KEY": "hidden"}, ("wheel",), str(tmp_path))
    runtime = said.runtime()
    assert runtime["env_vars"].items() >= {"MINE": "1", "OTHER": "2", "TOKENIZERS_PARALLELISM": "false"}.items()
    assert (runtime["pip"], runtime["working_dir"]) == (["wheel"], str(tmp_path))
    assert "hidden" not in repr(said) + repr(runtime)
    job = {"runtime_env": {"env_vars": {"MINE": "job's"}, "working_dir": "gcs://x", "pip": []}}
    monkeypatch.setenv(JOB_CONFIG, json.dumps(job))
    runtime = said.runtime()
    assert "MINE" not in runtime["env_vars"]
    assert not {"pip", "working_dir"} & runtime.keys()


@pytest.mark.slow
def test_workers_have_variables_and_secrets_and_ray_shows_no_secret(monkeypatch, tmp_path):
    (tmp_path / "my_module.py").write_text("VALUE = 7\n")
    code = f"""
import json, os, sys
import ray
from ray_tasks.connect import WorkerEnvironment, connect

def seen():
    import my_module
    context = ray.get_runtime_context()
    told = json.dumps(dict(context.runtime_env)) + context.get_runtime_env_string()
    return os.environ["MINE"], os.environ["KEY"], my_module.VALUE, "hidden-value" in told

with connect(WorkerEnvironment({{"MINE": "1"}}, {{"KEY": "hidden-value"}}, (), {str(tmp_path)!r})):
    print(ray.get(ray.remote(seen).remote()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "('1', 'hidden-value', 7, False)" in done.stdout, done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("before", ["", "ray.init('local', num_cpus=1, include_dashboard=False)"])
def test_ray_may_be_imported_and_started_first(before):
    code = f"""
import ray
{before}
from ray_tasks.connect import connect
with connect():
    print(ray.get(ray.remote(lambda: "from a worker").remote()))
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert "from a worker" in done.stdout, done.stderr[-2000:]


def test_what_nodes_have_instead_is_said():
    nodes = [
        {"Resources": {"CPU": 4, "accelerator_type:H100": 1}, "Labels": {"market": "spot"}},
        {"Resources": {"CPU": 4}, "Labels": {"market": "on-demand"}},
    ]
    assert NodeKind("A100", {"market": "x", "zone": "y"}).there(nodes) == [
        "the cluster's accelerator types are H100",
        "its nodes' values of label market are on-demand, spot",
        "its nodes' values of label zone are none",
    ]
    assert NodeKind("A100").there(nodes[1:]) == ["the cluster's accelerator types are none"]
