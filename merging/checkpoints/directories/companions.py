"""The files of a model directory that are not its weights: tokenizer, templates, preprocessors, custom code, licence."""

from fnmatch import fnmatchcase
from posixpath import basename, dirname

from merging.checkpoints.directories.manifest import MANIFEST
from merging.errors import CheckpointError
from merging.io import addresses, documents, storage

WEIGHTS = (
    "*.safetensors",
    "*.bin",
    "*.pt",
    "*.pth",
    "*.ckpt",
    "*.ckpt.*",
    "*.pkl",
    "*.pickle",
    "*.h5",
    "*.hdf5",
    "*.msgpack",
    "*.onnx",
    "*.onnx_data*",
    "*.onnx.data",
    "*.gguf",
    "*.ggml",
    "*.ot",
    "*.tflite",
    "*.pb",
    "*.npz",
    "*.nemo",
    "*.mlmodel",
    "*.engine",
    "*.pte",
    "*.pdparams",
    "*.index.json",
    "openvino_model.xml",
)
"""Weights in any format, and the indices of files that hold them."""
OTHER_FOLDERS = ("original/*", "runs/*", "wandb/*", "heads/*")
"""Folders of the same model in its makers' format, of a training's logs, or of an earlier merge's heads."""
NOT_THE_MERGE = (
    "README*",
    "*/README*",
    "adapter_config.json",
    "quantize_config.json",
    "trainer_state.json",
    "recipe.yaml",
    "zero_to_fp32.py",
    "*.lock",
    "*.incomplete",
    MANIFEST,
)
"""What is said of the base and would not hold for a merge."""
MODULES = "modules.json"
"""What names the folders of a sentence-transformers model; some hold small layers of their own, which are not merged."""
LARGEST = 1 << 28
"""Bytes of a file above which it is no companion."""


def companions(path: str) -> tuple[list[str], list[str]]:
    """The files that make a checkpoint's directory usable beside its weights, at any depth below it.

    Folders that hold weights are other models, or the same in another format, unless `modules.json` names them.

    Args:
        path: The directory, local or an address.

    Returns:
        Their sorted paths relative to the directory; and notes on files that had to be left out.

    Raises:
        CheckpointError: `modules.json` cannot be read.
        StorageError: The directory cannot be listed.
    """
    sizes = storage.list_files(path, hidden=False)
    layers = _layers(path) if MODULES in sizes else []
    other = {dirname(name) for name in sizes if "/" in name and _is_weights(name)} - {*layers}
    chosen, notes = [], []
    for name, size in sizes.items():
        if any(name.startswith(f"{layer}/") for layer in layers) and _is_weights(name):
            if name.endswith(".bin"):
                notes.append(
                    f"{path}/{name} is a pickle and is not copied: save the model with a newer sentence-transformers, which "
                    "writes safetensors"
                )
            if not name.endswith(".safetensors"):
                continue
        elif not _is_companion(name) or any(name.startswith(f"{folder}/") for folder in other):
            continue
        if size > LARGEST:
            notes.append(f"{path}/{name} is not copied: {size / 1e6:.0f} MB are no companion file")
            continue
        chosen.append(name)
    return chosen, notes


def _is_weights(name: str) -> bool:
    return any(fnmatchcase(basename(name), pattern) for pattern in WEIGHTS)


def _is_companion(name: str) -> bool:
    if _is_weights(name) or any(part.startswith(".") or part == "__pycache__" for part in name.split("/")):
        return False
    return not any(fnmatchcase(name, pattern) for pattern in (*OTHER_FOLDERS, *NOT_THE_MERGE))


def _layers(path: str) -> list[str]:
    """The folders of a sentence-transformers model's own layers; the transformer itself may lie in one, or beside them."""
    modules = documents.read_json(addresses.join(path, MODULES))
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise CheckpointError(f"{path}/{MODULES} is no list of modules: copy it again")
    places = [str(module.get("path") or "") for module in modules if "Transformer" not in str(module.get("type"))]
    return [place.strip("/") for place in places if place.strip("/") and ".." not in place.split("/")]
