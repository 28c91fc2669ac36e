"""`mergequest statistics import`: statistics that others published."""

from typing import cast, get_args

from flows.config.yaml_file import require_writable
from merging.checkpoints.checkpoint import Checkpoint
from merging.errors import SettingsError
from merging.io import addresses
from merging.registry import did_you_mean
from merging.statistics.imported import ImportedKind, import_statistics


def run(
    source: str,
    kind: str,
    checkpoint: str,
    out: str | None,
    tokens: int,
    examples: int,
    *,
    sums: bool,
    pickled: bool,
) -> list[str]:
    """Imports a file and says what it covers.

    Args:
        source: The published file.
        kind: Kind of statistic.
        checkpoint: What it is a statistic of.
        out: The file to write; by default `<checkpoint's name>.<kind>.safetensors` here.
        tokens: Tokens behind it.
        examples: Examples behind it, 0 where unknown.
        sums: Whether it holds sums.
        pickled: Whether a pickle is allowed.

    Returns:
        Lines for the terminal, the file's path last.

    Raises:
        MergequestError: See `import_statistics`.
    """
    kinds = get_args(ImportedKind)
    if kind not in kinds:
        raise SettingsError(f"unknown kind '{kind}'. {did_you_mean(kind, list(kinds))}")
    source, place = addresses.absolute(source), addresses.absolute(checkpoint)
    target = addresses.absolute(out or f"{addresses.base_name(place)}.{kind}.safetensors")
    require_writable(target.rpartition("/")[0])
    file = import_statistics(
        source,
        cast(ImportedKind, kind),
        place,
        target,
        tokens=tokens,
        examples=examples,
        sums=sums,
        pickled=pickled,
    )
    matrices = [name for name, info in Checkpoint.open(place).tensors.items() if len(info.shape) >= 2]
    missing = [name for name in matrices if name not in file.names]
    shown = f"; none of {', '.join(missing[:4])}{', …' if len(missing) > 4 else ''}" if missing else ""
    return [f"{kind} of {len(file.names)} weights of {addresses.base_name(place)}{shown}", target]
