"""`mergequest report --experiment`: results of experiments as a page, figures and tables."""

from datetime import UTC, datetime

from flows.report import experiments
from merging.io import addresses, atomic, storage


def write_experiments(results: str, out: str | None) -> str:
    """Writes what results come to.

    Args:
        results: A result's Parquet file, or a directory of them.
        out: Directory to fill; by default `report` beside the files.

    Returns:
        The page.

    Raises:
        SettingsError: There is no result, or a file holds none.
        StorageError: Something cannot be read or written.
    """
    frame = experiments.load([results])
    if out is None:
        beside = results if storage.is_dir(results) else results.rpartition("/")[0] or "."
        out = addresses.join(beside, "report")
    out = addresses.absolute(out)
    experiments.write_files(frame, out)
    page = addresses.join(out, experiments.PAGE)
    atomic.write_text(page, experiments.as_html(frame, datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")))
    return page
