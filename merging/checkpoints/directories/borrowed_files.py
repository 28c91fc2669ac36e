"""Whose tokenizer, chat template and generation settings a merge has; and where members' are not the base's."""

import json
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from merging.checkpoints.checkpoint import Checkpoint
from merging.checkpoints.directories.companions import companions
from merging.checkpoints.formats import vocab_size
from merging.checkpoints.formats.tokenizer_json import TOKENIZER_CONFIG, read_tokens
from merging.errors import PoolError, StorageError
from merging.io import addresses, documents, storage

TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.spm",
    "spm.model",
    "spiece.model",
    "sentencepiece*.model",
    "*.bpe.model",
    "*.tiktoken",
    "bpe.codes",
    "dict.txt",
    "entity_vocab.json",
    "tekken.json",
    "normalizer.json",
    "tokenization_*.py",
)
"""Files that a tokenizer is made from."""
TEMPLATES = ("chat_template.*", "additional_chat_templates/*")
CHAT_TEMPLATE = "chat_template"
GENERATION = "generation_config.json"
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")

Files = dict[str, bytes | None]
"""Path below the output directory → content; None of what the base has and the merge has not."""


def borrowed_files(
    base: Checkpoint,
    tokenizer: Checkpoint | None = None,
    chat_template: Checkpoint | None = None,
    generation_config: Checkpoint | None = None,
) -> Files:
    """What a merge has in place of the base's files.

    Args:
        base: The base.
        tokenizer: Whose tokenizer; None for the base's. Its tokens must have the base's numbers: so rows are merged.
        chat_template: Whose chat templates; None for those that come with the tokenizer.
        generation_config: Whose generation settings; None for the base's.

    Raises:
        PoolError: The member has none, or its tokens have other numbers.
    """
    files: Files = {}
    if tokenizer is not None:
        own = _matching(tokenizer, TOKENIZER)
        if not own:
            raise PoolError(f"files_from.tokenizer: {tokenizer.path} holds no tokenizer")
        _require_same_tokens(base, tokenizer)
        files |= dict.fromkeys(_matching(base, TOKENIZER))
        files |= {name: storage.read_bytes(addresses.join(tokenizer.path, name)) for name in own}
    talker = chat_template or tokenizer
    if talker is not None:
        files |= dict.fromkeys(_matching(base, TEMPLATES))
        own = _matching(talker, TEMPLATES)
        files |= {name: storage.read_bytes(addresses.join(talker.path, name)) for name in own}
        if chat_template is not None:
            inside = _json(talker.path, TOKENIZER_CONFIG).get(CHAT_TEMPLATE)
            if inside is None and not own:
                raise PoolError(f"files_from.chat_template: {talker.path} holds no chat template")
            holder = tokenizer or base
            config = _json(holder.path, TOKENIZER_CONFIG)
            if config or inside is not None:
                config = {key: value for key, value in config.items() if key != CHAT_TEMPLATE}
                config |= {} if inside is None else {CHAT_TEMPLATE: inside}
                files[TOKENIZER_CONFIG] = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
    if generation_config is not None:
        if not storage.exists(addresses.join(generation_config.path, GENERATION)):
            raise PoolError(f"files_from.generation_config: {generation_config.path} holds no {GENERATION}")
        files[GENERATION] = storage.read_bytes(addresses.join(generation_config.path, GENERATION))
    return files


def chat_template(path: str) -> str | None:
    """A checkpoint's default chat template; None where it has none."""
    template = _templates(path).get("default") if storage.is_dir(path) else None
    return template if isinstance(template, str) else None


def without_tokenizer(base: Checkpoint) -> Files:
    """What leaves the base's tokenizer and chat templates out of a merge."""
    return dict.fromkeys([*_matching(base, TOKENIZER), *_matching(base, TEMPLATES)])


def notes_on_files(base: Checkpoint, members: Mapping[str, Checkpoint]) -> list[str]:
    """Where members' chat templates, special tokens and generation settings are not the base's, whose a merge has."""
    notes = list(companions(base.path)[1])
    templates = {name: _templates(member.path) for name, member in members.items() if _matching(member, TOKENIZER)}
    ours = _templates(base.path)
    if other := [name for name, theirs in templates.items() if theirs and theirs != ours]:
        what = "differ from the base's" if ours else "are there, and the base has none"
        notes.append(
            f"chat templates of {', '.join(other)} {what}: the merge has the base's, unless `files_from.chat_template` names "
            "a member"
        )
    for where in ("config.json", GENERATION):
        known = base.config if where == "config.json" else _json(base.path, where)
        for name, member in members.items():
            config = member.config if where == "config.json" else _json(member.path, where)
            for key in SPECIAL:
                if (
                    key in config
                    and config[key] != known.get(key)
                    and not (config[key] is None and key == "pad_token_id")
                ):
                    notes.append(
                        f"{key} in {where}: {name} has {config[key]!r}, the base {known.get(key)!r}, which the merge has"
                        + (", unless `files_from.generation_config` names a member" if where == GENERATION else "")
                    )
    return notes


def _matching(checkpoint: Checkpoint, patterns: tuple[str, ...]) -> list[str]:
    """The companion files of a checkpoint, at its top or in a folder that a pattern names."""
    names = companions(checkpoint.path)[0]
    return [name for name in names if any(fnmatchcase(name, p) and name.count("/") == p.count("/") for p in patterns)]


def _templates(path: str) -> dict[str, Any]:
    """A checkpoint's chat templates by name, wherever they stand."""
    templates: dict[str, Any] = {}
    inside = _json(path, TOKENIZER_CONFIG).get(CHAT_TEMPLATE)
    if isinstance(inside, list):
        templates |= {str(entry.get("name")): entry.get("template") for entry in inside if isinstance(entry, dict)}
    elif inside is not None:
        templates["default"] = inside
    if (text := _json(path, f"{CHAT_TEMPLATE}.json").get(CHAT_TEMPLATE)) is not None:
        templates["default"] = text
    folder = "additional_chat_templates"
    places = {"default": f"{CHAT_TEMPLATE}.jinja"} | {
        name.removesuffix(".jinja"): f"{folder}/{name}" for name in storage.list_dir(addresses.join(path, folder))
    }
    for name, place in places.items():
        if storage.exists(addresses.join(path, place)):
            templates[name] = storage.read_text(addresses.join(path, place))
    return templates


def _json(path: str, name: str) -> dict[str, Any]:
    """A small file's settings; none where there is no such file."""
    try:
        value = documents.read_json(addresses.join(path, name))
    except StorageError:
        if storage.exists(addresses.join(path, name)):
            raise
        return {}
    return value if isinstance(value, dict) else {}


def _require_same_tokens(base: Checkpoint, member: Checkpoint) -> None:
    """Looks whether a member's tokenizer means the same rows by its tokens as the base's.

    Raises:
        PoolError: It does not.
    """
    both = [read_tokens(checkpoint.path) for checkpoint in (base, member)]
    ours, theirs = (tokens.ids if tokens is not None else {} for tokens in both)
    moved = [token for token, number in theirs.items() if token in ours and ours[token] != number]
    if moved:
        raise PoolError(
            f"files_from.tokenizer: in {member.path} token {moved[0]!r} has number {theirs[moved[0]]}, and {ours[moved[0]]} in "
            "the base, whose numbers a merge has: take the base's tokenizer"
        )
    rows = vocab_size.stated(base.config)
    if isinstance(rows, int) and theirs and max(theirs.values()) >= rows:
        last = max(theirs, key=lambda token: theirs[token])
        raise PoolError(
            f"files_from.tokenizer: token {last!r} of {member.path} has number {theirs[last]}, and the base's embeddings have "
            f"{rows} rows: take the base's tokenizer"
        )
