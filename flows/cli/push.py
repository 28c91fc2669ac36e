"""`mergequest push`: a merged checkpoint to the Hugging Face Hub, its card naming what it was merged from."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from flows.config.recipe_file import RECIPE, load_recipe
from flows.directory.progress import Display
from merging.checkpoints.checkpoint import CONFIG, Checkpoint
from merging.errors import MergequestError, SettingsError, StorageError
from merging.io import addresses, hub, storage
from merging.io.secrets import redacted

CARD = "README.md"
_HEAD = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)


def push(
    directory: str, repository: str, display: Display, *, private: bool = False, message: str | None = None
) -> str:
    """Uploads a checkpoint as one commit; the repository is made if there is none.

    The card's `base_model` names the base and the members that are on the Hub, as the checkpoint's own recipe does; what
    else stands in the card is left as it is.

    Args:
        directory: A merged checkpoint (`exports/best`, or what `merge` wrote), local.
        repository: `ORG/NAME`.
        display: Says what goes.
        private: Whether a new repository is private.
        message: Of the commit.

    Returns:
        The commit's address.

    Raises:
        SettingsError: The name is none, or the directory holds no merge.
        StorageError: The Hub cannot be reached, or the token may not write there.
    """
    if not hub.is_id(repository) or "@" in repository:
        raise SettingsError(f"'{repository}' is no name on the Hub: expected ORG/NAME")
    if not addresses.is_local(directory) or hub.is_hub(directory):
        raise SettingsError(f"{directory}: only a local directory is pushed; copy it here first")
    checkpoint = Checkpoint.open(directory)
    place = addresses.local_path(directory)
    there = storage.read_text(str(place / CARD)) if (place / CARD).exists() else ""
    card = with_lineage(there, lineage(directory))
    display.say(f"  {checkpoint.nbytes / 1e6:.0f} MB of weights to {repository}")
    from huggingface_hub import CommitOperationAdd, HfApi

    operations = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=card.encode() if name == CARD else place / name)
        for name in sorted({*storage.list_files(directory, hidden=False), CARD})
        if name == CONFIG or not Path(name).name.startswith(".")
    ]
    try:
        api = HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        done = api.create_commit(repository, operations, commit_message=message or "A merge by mergequest")
    except Exception as error:  # of the library and of its client
        raise StorageError(f"cannot push to {repository}: {_why(error)}") from error
    return str(done.commit_url)


def lineage(directory: str) -> list[str]:
    """Base and members of a merge's own recipe that are on the Hub, without revisions, each once."""
    if not storage.exists(path := addresses.join(directory, RECIPE)):
        return []
    try:
        recipe = load_recipe(path)
    except MergequestError as error:
        raise SettingsError(f"{path} cannot be read, so that what was merged is not known: {error}") from error
    parts = [recipe.base, *(member.checkpoint for member in recipe.members.values())]
    on_hub = [part for whole in parts for part in whole.split("+") if hub.is_hub(part)]
    return list(dict.fromkeys(part.removeprefix(hub.SCHEME).partition("@")[0] for part in on_hub))


def with_lineage(card: str, models: list[str]) -> str:
    """A model card whose head names what a merge was made of, as the Hub reads it.

    Raises:
        SettingsError: Its head is no mapping.
    """
    card = card.removeprefix("\ufeff").replace("\r\n", "\n")
    head = _HEAD.match(card)
    try:
        metadata: Any = yaml.safe_load(head[1]) if head else {}
    except yaml.YAMLError:
        metadata = None
    if not isinstance(metadata, Mapping):
        raise SettingsError(f"{CARD}: what stands between its lines `---` is no mapping")
    own = metadata.get("tags") or []
    tags = list(dict.fromkeys([*([own] if isinstance(own, str) else own), "merge", "mergequest"]))
    settings = {**metadata, **({"base_model": models, "base_model_relation": "merge"} if models else {}), "tags": tags}
    text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    return f"---\n{text}---\n{card[head.end() :] if head else card}"


def _why(error: Exception) -> str:
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set: unset it"
    if status in (401, 403):
        return "a token that may write there is needed (HF_TOKEN, or `hf auth login`)"
    if isinstance(error, errors.HfHubHTTPError) or not type(error).__module__.startswith("httpx"):
        return redacted(f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}")
    return f"the Hub cannot be reached ({type(error).__name__})"
