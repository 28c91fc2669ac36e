import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_a_cluster_with_gpus_is_asked_for_them_where_they_lie():
    script = Path(__file__).with_name("two_gpu_nodes.py")
    found = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300, check=False)
    assert found.returncode == 0, found.stderr
    seen = json.loads(found.stdout.splitlines()[-1])
    assert seen["default"] == [1.0, 0.5, 0.0]
    places = {(node, tuple(gpus)) for node, gpus in seen["first order"]}
    assert len(places) == 3  # three calls on three GPUs, not three on the first
    assert all(len(gpus) == 1 for _, gpus in places)
    assert seen["sharing"] == [[]]
    assert seen["evaluators"] == [6, 6]  # two shares of 0.4 a GPU
    assert seen["after one"] == []
    assert len(seen["after two"]) == 1
    assert "CUDA error: y" in seen["after two"][0]
    assert seen["on the sick node"] == [0, 2]


@pytest.mark.slow
def test_evaluators_are_started_on_nodes_of_a_kind_and_not_where_they_cannot_be_built():
    script = Path(__file__).with_name("kinds_of_nodes.py")
    found = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300, check=False)
    assert found.returncode == 0, found.stderr
    seen = json.loads(found.stdout.splitlines()[-1])
    assert seen["sizes"] == [2, 8.0, 12.0]
    assert seen["room"] == [2, 2, 4, 8]  # no evaluator lies across two nodes, no share across two GPUs
    assert seen["refused"][0] == ""
    assert "an evaluator of 8 GPUs fits no node: the largest has 4" in seen["refused"][1]
    assert "no node has accelerator type A100: the cluster's accelerator types are H100" in seen["refused"][2]
    assert "no node has label a=b: its nodes' values of label a are none" in seen["refused"][3]
    assert "an evaluator that asks for 1e+06 GB fits no node" in seen["refused"][4]
    assert seen["statistics"] == [True, 1]
    assert seen["built"] == [[0], 2]
    (said,) = [line for line in seen["said"] if "no more evaluators are started on node" in line]
    assert "2 evaluators could not be built there, the last with OSError: no such device" in said
