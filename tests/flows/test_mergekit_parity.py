"""The page on mergekit says what both programs make of the same configurations."""

import importlib.util
import sys
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location("mergekit_parity", Path(__file__).with_name("mergekit_parity.py"))
parity = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = parity
spec.loader.exec_module(parity)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(
    not (parity.ENVIRONMENT / "bin" / "python").exists(), reason="`make mergekit-env` installs what it is compared with"
)
def test_the_table_is_what_is_measured(tmp_path):
    cells = parity.measure(tmp_path, list(parity.ARCHITECTURES), list(parity.MERGES))
    assert not [cell.error for cell in cells.values() if cell.error.startswith("mergequest")]
    assert parity.page_with(parity.table(cells)) == parity.PAGE.read_text(), "write it anew: make mergekit-parity"


def test_the_table_has_all_that_is_compared():
    shown = parity.PAGE.read_text().partition(parity.START)[2].partition(parity.END)[0]
    assert all(f" {architecture} |" in shown for architecture in parity.ARCHITECTURES)
    assert all(f"| {merge} |" in shown for merge in parity.MERGES)
