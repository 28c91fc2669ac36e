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
