import json
import subprocess
import sys

from merging.io.process import this_process
from ray_tasks.sessions import MARKER, mark, remove_dead


def test_only_our_dead_sessions_are_removed_and_the_last_few_stay(tmp_path):
    """Nobody else's, none that lives, and none whose driver is gone but whose raylet is not."""
    gone = int(subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True).stdout)
    dead = this_process() | {"pid": gone}

    def session(name, owner=None):
        path = tmp_path / f"session_{name}"
        (path / "logs").mkdir(parents=True)
        if owner is not None:
            (path / MARKER).write_text(owner if isinstance(owner, str) else json.dumps(owner))
        return path

    session("2026-01-01_somebody-s")
    session("2026-01-02_elsewhere", dead | {"boot": "another"})
    session("2026-01-03_container", dead | {"namespace": "pid:[1]"})
    session("2026-01-04_damaged", "{")
    mark(session("2026-01-05_alive"))
    outlived = session("2026-01-06_outlived", dead)
    first, second, _third = (session(f"2026-02-0{number}", dead) for number in (1, 2, 3))
    (tmp_path / "session_latest").symlink_to(first)
    script = "import sys; print(flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", script, f"--session-dir={outlived}"]
    raylet = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    raylet.stdout.readline()
    try:
        assert remove_dead(tmp_path, kept=1) == [first, second]
        assert not first.exists()
    finally:
        raylet.communicate("")
    assert len(list(tmp_path.glob("session_2*"))) == 7
    assert remove_dead(tmp_path / "nowhere") == []
