"""`mergequest convert`: a checkpoint's pickles in, safetensors out, every tensor and every other file."""

from safetensors.torch import save

from flows.config.yaml_file import require_writable
from flows.directory.progress import Display
from merging.checkpoints.adapter import ADAPTER_WEIGHTS
from merging.checkpoints.checkpoint import CONFIG, Checkpoint, read_settings
from merging.checkpoints.pickles import OTHER_WEIGHTS, read_pickled
from merging.checkpoints.writer import SHARD_BYTES, lay_out, new_checkpoint
from merging.errors import CheckpointError, SettingsError
from merging.io import storage


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
        others = {name: storage.read_bytes(storage.join(path, name)) for name in names if name not in left_out}
        if pickled.is_adapter:
            weights = save(
                {name: tensor.clone().contiguous() for name, tensor in pickled.tensors.items()}, {"format": "pt"}
            )
            for name, content in {ADAPTER_WEIGHTS: weights, **others}.items():
                storage.write_bytes(storage.join(out, name), content)
        else:
            config = read_settings(storage.join(path, CONFIG))
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
    system, inner = storage.file_system(path)
    root = inner.rstrip("/") + "/"
    return sorted(found.removeprefix(root) for found in map(str, system.find(inner)))
