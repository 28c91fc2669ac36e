import pytest

from merging.tasks import HarnessSettings, make_task
from tests.harness_tasks import write_llama, write_task


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    """A tiny Llama's directory."""
    return write_llama(tmp_path_factory.mktemp("llama"), 1)


@pytest.fixture
def make(tmp_path, llama):
    """A task of the harness and its settings: `make("quiz", {"validation": 9}, metric="acc_norm")`."""

    def run(kind, written=None, **settings):
        folder = write_task(tmp_path / "harness", kind, **(written or {}))
        return make_task("judge", HarnessSettings(**{"task": f"my_{kind}", "include_path": folder, **settings}), llama)

    return run
