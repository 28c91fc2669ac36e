"""A file that may be a recipe or slices file of ours, or a configuration of mergekit's that becomes one."""

from collections.abc import Mapping, Sequence
from typing import Any

from flows.config.mergekit.translation import Translated, is_mergekit, translate
from flows.config.yaml_file import load_yaml, parent, resolve_checkpoint
from merging.checkpoints.checkpoint import Checkpoint
from merging.checkpoints.directories.borrowed_files import chat_template
from merging.errors import CheckpointError, SettingsError, StorageError
from merging.io import addresses, storage


def load_translated(path: str) -> dict[str, Any]:
    """A YAML file's mapping; of a mergekit configuration, what it is as a file of ours.

    Raises:
        SettingsError: It is missing or no mapping; it is mergekit's and cannot be expressed, or a model of it is not here.
        CheckpointError: As `from_mergekit`.
    """
    value = load_yaml(path)
    if not is_mergekit(value):
        return value
    recipe = from_mergekit(value, path).recipe
    _require_directories(recipe, path)
    return recipe


def from_mergekit(value: Mapping[str, Any], path: str) -> Translated:
    """What a mergekit configuration is as a recipe file, or a slices file.

    Args:
        value: Its content.
        path: The file.

    Raises:
        SettingsError: Something in it is wrong, or cannot be expressed: every key is in the message.
        CheckpointError: Parameters differ between weights, and there is no such checkpoint to know the weights' names from.
    """
    root = parent(path)

    def names(model: str) -> Sequence[str]:
        place = resolve_checkpoint(model, root)
        if not storage.is_dir(place):
            raise CheckpointError(
                f"{path}: parameters differ between weights, whose names are needed, and {_absent(place)}"
            )
        return list(Checkpoint.open(place).tensors)

    return translate(value, path, names, lambda model: chat_template(resolve_checkpoint(model, root)))


def _require_directories(recipe: Mapping[str, Any], path: str) -> None:
    """Looks whether models that are not on the Hub are here.

    Raises:
        SettingsError: One is not.
    """
    for model in dict.fromkeys([recipe["base"], *recipe.get("members", {}).values()]):
        for part in resolve_checkpoint(model, parent(path)).split("+"):
            try:
                there = storage.is_dir(part) or not addresses.is_local(part)
            except StorageError as error:
                raise SettingsError(f"{path}: {error}") from error
            if not there:
                raise SettingsError(f"{path}: {_absent(part)}")


def _absent(place: str) -> str:
    return f"there is no directory {place}, and that is no ORG/NAME of a model on the Hub"
