"""The checkpoint that brings a task's head: its classes, tokenizer and live model; no code, no pickle."""

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import cache
from typing import Any

import torch
from torch import nn

from merging.checkpoints.adapters.adapter import ADAPTER_CONFIG, is_adapter, open_checkpoint
from merging.checkpoints.checkpoint import CONFIG, Checkpoint, read_settings
from merging.checkpoints.models import skeleton
from merging.checkpoints.models.parameter_names import Loading, loading, remember_names
from merging.errors import CheckpointError, StorageError, TaskError
from merging.io import addresses, documents, hashing, local_copies, storage
from merging.io.addresses import in_words
from merging.io.documents import is_number
from merging.io.prefetch import download

IMAGE_PROCESSOR = "preprocessor_config.json"
POSITIONS = re.compile(r"(^|\.)(position_embeddings?|embed_positions|wpe)$")
"""Names of tables of learnt positions."""
TOKENIZERS = ("*tokenizer*", "vocab*", "merges.txt", "*.spm", "spiece.model", "sentencepiece*.model")
"""Files that a tokenizer is made from."""
TOKENIZER_FILES = (*TOKENIZERS, "special_tokens_map.json", "added_tokens.json", "*chat_template*")
"""Files that what a tokenizer does may depend on."""
NAMES = ("_name_or_path", "name_or_path", "transformers_version")
"""Fields of a configuration that say where it is from."""
GENERATION = "generation_config.json"
AUTO_CLASSES = (
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForSequenceClassification",
    "AutoModelForMaskedLM",
    "AutoModelForImageTextToText",
    "AutoModelForImageClassification",
)
"""Automatic classes in the order in which one is looked for that loads an architecture; others come after."""


def class_names(
    head: str, labels: Sequence[str] | None, base: str = "", *, suffix: str = "ForSequenceClassification"
) -> Sequence[str]:
    """Names of a classification head's outputs, in order.

    Args:
        head: The checkpoint's directory or address.
        labels: Names to take in place of the configuration's `id2label`.
        base: The base that the head belongs to, if it is an adapter.
        suffix: What the architecture's name ends in, which says what it classifies.

    Raises:
        TaskError: There is no configuration or no head, or another number of `labels` than outputs.
    """
    config = configuration(head, base)
    architecture = str((config.get("architectures") or ["model of unknown architecture"])[0])
    if not architecture.endswith(suffix):
        raise TaskError(
            f"{head} is a {architecture}, without a classification head: "
            f"name a checkpoint that was fine-tuned with AutoModel{suffix}"
        )
    # transformers leaves out what is its default
    id2label: Mapping[str, str] = config.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}
    if not isinstance(id2label, dict) or set(id2label) != {str(number) for number in range(len(id2label))}:
        raise TaskError(f"`id2label` in the config.json of {head} does not name classes 0, 1, …: {id2label}")
    if labels is not None and len(labels) != len(id2label):
        raise TaskError(f"`labels` names {len(labels)} classes, the head of {head} has {len(id2label)}")
    names = labels or [str(id2label[key]) for key in sorted(id2label, key=int)]
    if len(set(names)) < len(names):
        raise TaskError(f"the head of {head} has two classes of the same name: name them all by `labels`")
    return names


def problem_type(head: str, base: str = "") -> str | None:
    """What a head's configuration says that its outputs are, in transformers' words; None where it says nothing.

    Raises:
        TaskError: There is no configuration.
    """
    own = configuration(head, base).get("problem_type")
    return None if own is None else str(own)


def configuration(head: str, base: str = "") -> Mapping[str, Any]:
    """A checkpoint's configuration; of an adapter, that of the model that it is merged into.

    Raises:
        TaskError: There is none.
    """
    try:
        return open_checkpoint(head, base).config if is_adapter(head) else read_settings(addresses.join(head, CONFIG))
    except (CheckpointError, StorageError) as error:
        raise TaskError(f"the head has no configuration: {error}") from error


def blank_model(head: str, model_class: str, base: str = "") -> tuple[nn.Module, Loading]:
    """The model that a checkpoint is loaded as, without weights and on no device, and what the checkpoint brings to it.

    Args:
        head: The checkpoint's directory or address.
        model_class: Name of the class in `transformers`.
        base: The base that the head belongs to, if it is an adapter.

    Raises:
        TaskError: The checkpoint is of another architecture, or lacks some of the model's weights.
    """
    checkpoint = open_checkpoint(head, base)
    try:
        with quiet():
            model = _blank(checkpoint, _loader(model_class))
            plan = loading(model, {name: info.shape for name, info in checkpoint.tensors.items()})
    except TaskError:
        raise
    except Exception as error:  # transformers raises all kinds
        raise TaskError(f"{head} cannot be loaded as {model_class}: {in_words(error)}") from error
    if plan.misfits:
        name, (has, wants) = next(iter(plan.misfits.items()))
        raise TaskError(
            f"{head}: '{name}' of {type(model).__name__} is {list(has)}, where its configuration wants {list(wants)}: name a "
            "checkpoint whose config.json is its own"
        )
    for name, part in model.named_children():
        own = {f"{name}.{local}" for local in part.state_dict()}
        if own and own <= set(plan.missing) and name != getattr(model, "base_model_prefix", ""):
            raise TaskError(
                f"{head} lacks the weights of '{name}', the head of {type(model).__name__}: name a checkpoint that was "
                f"fine-tuned with this head{_or_its_class(model, checkpoint.architecture)}"
            )
    if plan.missing:
        raise _incomplete(head, model, plan.missing, checkpoint.architecture)
    return model, plan


def _blank(checkpoint: Checkpoint, loader: Any) -> nn.Module:
    """A model of a checkpoint's configuration on no device."""
    config = skeleton.parsed(checkpoint.config)
    with torch.device("meta"):
        model: nn.Module = loader.from_config(config) if hasattr(loader, "from_config") else loader(config)
    return model


def _loader(model_class: str) -> Any:
    """A class in `transformers` that loads checkpoints."""
    import transformers

    loader = getattr(transformers, model_class, None)
    if not hasattr(loader, "from_pretrained"):
        raise TaskError(f"transformers has no model class '{model_class}': name one such as AutoModelForCausalLM")
    return loader


def class_of(config: Mapping[str, Any]) -> str:
    """Name of the class in `transformers` that loads a checkpoint with all of its heads, best an automatic one.

    What is no architecture of transformers' is loaded by `AutoModel`, whatever the configuration calls it.
    """
    import transformers
    from transformers.models.auto import modeling_auto

    own = next((name for name in config.get("architectures") or () if isinstance(name, str)), "")
    others = sorted(name for name in dir(modeling_auto) if name.startswith("AutoModelFor"))
    for auto in dict.fromkeys((*AUTO_CLASSES, *others)):
        known = getattr(getattr(modeling_auto, auto), "_model_mapping", None)
        names = getattr(known, "_model_mapping", {}).get(config.get("model_type"), ())
        if own and own in ((names,) if isinstance(names, str) else names):
            return auto
    is_class = own.isidentifier() and hasattr(getattr(transformers, own, None), "from_pretrained")
    return own if is_class else "AutoModel"


def _incomplete(head: str, model: nn.Module, missing: Sequence[str], architecture: str) -> TaskError:
    return TaskError(
        f"{head} lacks {len(missing)} weights of {type(model).__name__} ({', '.join(missing[:4])}), which would be random: "
        f"name a checkpoint that was fine-tuned with this head{_or_its_class(model, architecture)}"
    )


def _or_its_class(model: nn.Module, architecture: str) -> str:
    return "" if architecture == type(model).__name__ else f", or load it as what it was saved from, {architecture}"


def token_limit(head: str, tokenizer: Any, model: Any) -> int:
    """How many tokens of a text a model can read, by its tokenizer and by its positions.

    Args:
        head: The checkpoint, for messages.
        tokenizer: Its tokenizer.
        model: The model of its configuration, on any device.

    Raises:
        TaskError: The tokenizer's limit is no number, or leaves no room beside its special tokens; or its tokens lie
            beyond the model's embedding.
    """
    limit = tokenizer.model_max_length
    special = tokenizer.num_special_tokens_to_add()
    if not is_number(limit) or limit <= special:
        raise TaskError(
            f"`model_max_length` in the tokenizer_config.json of {head} is {str(limit)[:100]!r}: a number of tokens above its "
            f"{special} special ones is needed"
        )
    embedding = model.get_input_embeddings()
    rows = getattr(embedding, "num_embeddings", None)
    words = tokenizer.get_vocab()
    if rows is not None:
        unused = set(tokenizer.all_special_tokens) - {tokenizer.pad_token, tokenizer.cls_token, tokenizer.sep_token}
        beyond = [word for word, number in words.items() if number >= rows and word not in unused]
        if beyond:
            raise TaskError(
                f"the tokenizer of {head} has {len(beyond):,} tokens that the model has no embedding for ('{beyond[0]}' is "
                f"{words[beyond[0]]:,} of {rows:,}): take the model's own tokenizer, or resize its embedding"
            )
    return int(min(limit, learnt_positions(model), 1 << 31))


def learnt_positions(model: Any) -> float:
    """Positions that a model has learnt, which nothing can be read beyond; infinite where it needs no such table."""
    most = float("inf")
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and POSITIONS.search(name):
            # RoBERTa counts from behind its padding, OPT and BART from 2
            first = getattr(module, "offset", None) or (0 if module.padding_idx is None else module.padding_idx + 1)
            most = min(most, module.num_embeddings - first)
    return most


def load_tokenizer(head: str, base: str = "") -> Any:
    """A checkpoint's tokenizer, or its base's where it was saved without one.

    Where it has no token for padding, the end-of-sequence token is taken.

    Raises:
        TaskError: It is missing, damaged, or knows no words.
    """
    import transformers

    try:
        place = _tokenizer_directory(head, base)
        with quiet():
            tokenizer: Any = transformers.AutoTokenizer.from_pretrained(
                place, local_files_only=True, trust_remote_code=False
            )
    except Exception as error:  # transformers raises all kinds
        raise TaskError(
            f"the tokenizer of {head} cannot be loaded ({in_words(error)}): save the base model's tokenizer there"
        ) from error
    if len(tokenizer.get_vocab().keys() - set(tokenizer.all_special_tokens)) < 2:
        # of a directory without its vocabulary, transformers makes one that knows no words, and says nothing
        raise TaskError(f"the tokenizer of {head} knows no words: save the base model's tokenizer there")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_image_processor(head: str, base: str = "") -> Any:
    """A checkpoint's image processor, or its base's where it was saved without one; needs no torchvision.

    Raises:
        TaskError: It is missing or damaged.
    """
    import transformers

    place = head
    if not storage.exists(addresses.join(head, IMAGE_PROCESSOR)):
        place = base or head
    try:
        with quiet():
            return transformers.AutoImageProcessor.from_pretrained(
                local_directory(place, weights=False), local_files_only=True, trust_remote_code=False, backend="pil"
            )
    except Exception as error:  # transformers raises all kinds
        raise TaskError(
            f"the image processor of {head} cannot be loaded ({in_words(error)}): save the base model's "
            f"{IMAGE_PROCESSOR} there"
        ) from error


def tokenizer_identity(tokenizer: Any) -> Any:
    """What a tokenizer does to a text, JSON-like, without the padding that its last call left there."""
    if not tokenizer.is_fast:
        return [type(tokenizer).__name__, tokenizer.get_vocab()]
    pipeline = json.loads(tokenizer.backend_tokenizer.to_str())
    return {name: part for name, part in pipeline.items() if name not in ("truncation", "padding")}


def configuration_fingerprint(head: str, base: str = "") -> str:
    """Content hash of a head's whole configuration: of what is no matter of weights, too (tokens for padding, classes' names).

    Raises:
        TaskError: There is none.
    """
    return hashing.fingerprint({key: value for key, value in configuration(head, base).items() if key not in NAMES})


def tokenizer_fingerprint(head: str, base: str = "") -> str:
    """Content hash of the files of a head's tokenizer, or of its base's: special tokens and chat template, too.

    Raises:
        TaskError: There is none.
    """
    place = _tokenizer_directory(head, base)
    files = [name for name in storage.list_files(place, hidden=False) if "/" not in name]
    names = [name for name in files if any(fnmatchcase(name, pattern) for pattern in TOKENIZER_FILES)]
    return hashing.fingerprint([[name, hashing.file_fingerprint(addresses.join(place, name))] for name in names])


def load_model(
    head: str,
    model_class: str,
    *,
    base: str = "",
    hollow: Collection[str] = (),
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """A checkpoint as a live model: evaluation mode, on the CPU.

    Args:
        head: The checkpoint's directory or address.
        model_class: Name of the class in `transformers` (`AutoModelForSequenceClassification`).
        base: The base that the head belongs to, if it is an adapter.
        hollow: Names of the checkpoint's tensors that the caller overwrites: they are not read, and hold NaN.
        dtype: Of its weights, but for those that transformers keeps in float32.

    Raises:
        TaskError: The class is unknown, or the checkpoint is damaged, unsafe, or incomplete.
    """
    loader = _loader(model_class)
    try:
        with quiet():
            checkpoint = open_checkpoint(head, base)
            model, info = (
                _assembled(checkpoint, loader, hollow, dtype)
                if hollow or is_adapter(head)
                else loader.from_pretrained(
                    local_directory(head),
                    dtype=dtype,
                    local_files_only=True,
                    use_safetensors=True,
                    trust_remote_code=False,
                    output_loading_info=True,
                )
            )
    except Exception as error:  # transformers raises all kinds
        raise TaskError(f"{head} cannot be loaded as {model_class}: {in_words(error)}") from error
    if missing := sorted(info["missing_keys"]):
        raise _incomplete(head, model, missing, str((getattr(model.config, "architectures", None) or ["?"])[0]))
    live: nn.Module = model.eval()
    remember_names(live, {name: info.shape for name, info in checkpoint.tensors.items()})
    return live


def local_directory(head: str, *, weights: bool = True) -> str:
    """The directory itself, or a copy of a remote one, perhaps without its weights, that lasts as long as this process."""
    return str(addresses.local_path(head)) if addresses.is_local(head) else _download(head, weights)


@cache
def _download(head: str, with_weights: bool) -> str:
    weights: set[str] = set()
    if with_weights and not is_adapter(head):
        weights = {addresses.base_name(info.file) for info in Checkpoint.open(head).tensors.values()}
    directory = local_copies.own_directory()
    for name in storage.list_dir(head):
        source, target = addresses.join(head, name), directory / name
        if name in weights and (file := local_copies.made(source)) is not None:
            target.symlink_to(file)
        elif name in weights or name.endswith((".json", ".txt", ".model", ".jinja")):
            download(source, target)
    return str(directory)


def _assembled(
    checkpoint: Checkpoint, loader: Any, hollow: Collection[str], dtype: torch.dtype
) -> tuple[nn.Module, dict[str, Any]]:
    """A model from tensors that are read one by one, and what transformers says of the loading."""
    blank: Any = _blank(checkpoint, loader)
    nothing = torch.tensor(torch.nan, dtype=dtype)
    checkpoint.prefetch([name for name in checkpoint.tensors if name not in hollow])
    weights = {
        name: nothing.expand(info.shape) if name in hollow else checkpoint.read(name)
        for name, info in checkpoint.tensors.items()
    }
    model, info = type(blank).from_pretrained(
        None, config=blank.config, state_dict=weights, dtype=dtype, output_loading_info=True
    )
    if model.can_generate():
        model.generation_config = _generation_config(model, checkpoint)
    return model, info


def generation_config(head: str, base: str, model: Any) -> Any:
    """What transformers' generation does by a checkpoint's own settings: a `GenerationConfig`.

    Args:
        head: The checkpoint's directory or address.
        base: The base that the head belongs to, if it is an adapter.
        model: The model of its configuration, on any device.
    """
    return _generation_config(model, open_checkpoint(head, base))


def _generation_config(model: Any, checkpoint: Checkpoint) -> Any:
    from transformers import GenerationConfig

    if GENERATION not in storage.list_dir(checkpoint.path):
        return model.generation_config
    return GenerationConfig.from_dict(read_settings(addresses.join(checkpoint.path, GENERATION)))


def has_tokenizer(path: str) -> bool:
    """Whether a checkpoint was saved with what its tokenizer is made from."""
    return any(fnmatchcase(name, pattern) for name in storage.list_dir(path) for pattern in TOKENIZERS)


def _tokenizer_directory(head: str, base: str) -> str:
    """Where the tokenizer lies: with the head, or with its base where the head was saved without one."""
    if has_tokenizer(head):
        return local_directory(head, weights=False)
    if not base and is_adapter(head):
        base = str(documents.read_object(addresses.join(head, ADAPTER_CONFIG)).get("base_model_name_or_path") or "")
    if not base or not has_tokenizer(base):
        raise TaskError("there is none")
    return local_directory(base, weights=False)


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps transformers' progress bars and loading reports off the screen."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
