import psutil
import pytest

from merging.io.memory import available_memory

MIB = 1 << 20


@pytest.fixture
def group(tmp_path):
    """Writes a control group's files: `group("2/a/b", **{"memory.max": "…"})`."""

    def write(place, **files):
        directory = tmp_path / place
        directory.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (directory / name).write_text(f"{text}\n")
        return tmp_path

    return write


def test_a_container_of_version_2_has_what_its_tightest_group_has_left(group, tmp_path):
    group("pod", **{"memory.max": 100 * MIB, "memory.current": 40 * MIB, "memory.stat": f"anon 7\ninactive_file {MIB}"})
    group("pod/box", **{"memory.max": "max", "memory.current": 30 * MIB})
    own = tmp_path / "own"
    own.write_text("0::/pod/box\n")
    assert available_memory(tmp_path, own) == 61 * MIB
    own.write_text("0::/somewhere/else\n")  # as the host sees it: within the container the mount itself is the group
    assert available_memory(tmp_path, own) > 61 * MIB
    group(".", **{"memory.max": 10 * MIB, "memory.current": 12 * MIB})
    assert available_memory(tmp_path, own) == 0


def test_a_container_of_version_1(group, tmp_path):
    files = {"memory.limit_in_bytes": 64 * MIB, "memory.usage_in_bytes": 60 * MIB}
    group("memory/docker/id", **files, **{"memory.stat": f"cache 9\ntotal_inactive_file {2 * MIB}"})
    group("memory", **{"memory.limit_in_bytes": 9223372036854771712, "memory.usage_in_bytes": MIB})
    own = tmp_path / "own"
    own.write_text("5:cpu,cpuacct:/docker/id\n4:memory:/docker/id\n0::/\n")
    assert available_memory(tmp_path, own) == 6 * MIB


def test_without_control_groups_it_is_the_machines(tmp_path):
    assert available_memory(tmp_path, tmp_path / "none") == pytest.approx(psutil.virtual_memory().available, rel=0.2)
