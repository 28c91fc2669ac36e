"""`mergequest convert`: a checkpoint's pickles in, safetensors out, or a mergekit configuration in, a recipe out."""

import yaml
from safetensors.torch import save

from flows.config.mergekit import from_mergekit, is_mergekit
from flows.config.recipe_file import seen_from
from flows.config.yaml_file import load_yaml, parent, require_writable, resolve_checkpoint
from flows.directory.progress import Display
from merging.checkpoints.adapters.adapter import ADAPTER_WEIGHTS
from merging.checkpoints.checkpoint import CONFIG, Checkpoint, read_settings
from merging.checkpoints.directories.pickles import OTHER_WEIGHTS, read_pickled
from merging.checkpoints.directories.writer import SHARD_BYTES, lay_out, new_checkpoint
from merging.errors import CheckpointError, SettingsError
from merging.io import addresses, atomic, storage


def convert(source: str, out: str | None, display: Display) -> str:
    """Converts a checkpoint's pickles, or a mergekit configuration.

    Args:
        source: The checkpoint's directory, or the configuration.
        out: The directory, or the recipe file, to write; a recipe need not be written.
        display: Shows progress and what was left out.

    Returns:
        Where the result is, or the recipe.

    Raises:
        MergequestError: It cannot be converted; nothing is written.
    """
    if not storage.is_dir(source) and source.endswith((".yaml", ".yml")):
        return convert_configuration(source, out, display)
    if out is None:
        raise SettingsError("--out is missing: name the directory for the converted checkpoint")
    convert_checkpoint(source, out, display)
    return out


def convert_configuration(path: str, out: str | None, display: Display) -> str:
    """Writes what a mergekit configuration is as a recipe file, models' paths as seen from there.

    Args:
        path: The configuration.
        out: The recipe file; None to return its content instead.
        display: Shows what was left out.

    Raises:
        SettingsError: It is none, cannot be expressed, or there is something else at `out`.
    """
    value = load_yaml(path)
    if not is_mergekit(value):
        raise SettingsError(f"{path} is no mergekit configuration, which has a `merge_method`")
    translation = from_mergekit(value, path)
    for note in translation.notes:
        display.note(note)
    recipe = translation.recipe
    if out is not None and parent(out) != parent(path):

        def moved(model: str) -> str:
            return seen_from(resolve_checkpoint(model, parent(path)), parent(out))

        recipe = recipe | {
            "base": moved(recipe["base"]),
            **(
                {"members": {name: moved(model) for name, model in recipe["members"].items()}}
                if "members" in recipe
                else {}
            ),
        }
    text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)
    if out is None:
        return text.rstrip()
    if storage.is_dir(out) or (storage.exists(out) and addresses.absolute(out) == addresses.absolute(path)):
        raise SettingsError(f"{out} is there already: name another file for the recipe")
    atomic.write_text(out, text)
    return out


def convert_checkpoint(path: str, out: str, display: Display, max_shard_bytes: int = SHARD_BYTES) -> None:
    """Writes a checkpoint's weights as safetensors, under their own names and in their own dtypes.

    Args:
        path: A directory with `pytorch_model.bin`, its shards, or `adapter_model.bin`.
        out: The directory to write, which must be new or empty.
        display: Shows progress and what was left out.
        max_shard_bytes: An output file is closed before it exceeds this.

    Raises:
        SettingsError: There is something at `out`.
        CheckpointError: There is no pickle of weights, it holds more than tensors, or it is damaged; nothing is written.
    """
    if not storage.is_dir(path):
        raise CheckpointError(f"there is no checkpoint directory at {path}")
    if storage.list_dir(out):
        raise SettingsError(f"{out} is not empty: name a new directory")
    require_writable(out)
    with display.phase(f"Converting {path}"):
        pickled = read_pickled(path)
        names = _files(path)
        left_out = [name for name in names if name.endswith(OTHER_WEIGHTS)]
        others = {name: storage.read_bytes(addresses.join(path, name)) for name in names if name not in left_out}
        if pickled.is_adapter:
            weights = save(
                {name: tensor.clone().contiguous() for name, tensor in pickled.tensors.items()}, {"format": "pt"}
            )
            for name, content in {ADAPTER_WEIGHTS: weights, **others}.items():
                atomic.write_bytes(addresses.join(out, name), content)
        else:
            config = read_settings(addresses.join(path, CONFIG))
            outlines = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in pickled.tensors.items()]
            shards = lay_out(outlines, max_shard_bytes)
            with new_checkpoint(out, shards, like=Checkpoint(path, config, {}, {}), extra=others) as files:
                for shard in shards:
                    with files.open(shard) as put:
                        for name, info in shard.tensors.items():
                            put(info.start, pickled.tensors[name].contiguous())
        size = sum(tensor.nbytes for tensor in pickled.tensors.values())
        display.say(f"  {len(pickled.tensors)} tensors ({size / 1e6:.0f} MB), {len(others)} other files")
        if left_out:
            display.note(f"left out: {', '.join(left_out)}")


def _files(path: str) -> list[str]:
    """Paths of all files below a directory, relative to it."""
    system, inner = addresses.file_system(path)
    root = inner.rstrip("/") + "/"
    return sorted(file.removeprefix(root) for file in map(str, system.find(inner)))
