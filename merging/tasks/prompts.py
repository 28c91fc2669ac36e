"""Prompts and completions as token ids: columns, templates, chat templates, and the boundary between the two."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from merging.errors import TaskError


@dataclass(frozen=True)
class Encoded:
    """A prompt and one completion of it.

    Args:
        ids: Token ids, prompt first.
        start: Where the completion starts; at least 1, for a first token is predicted from nothing.
    """

    ids: tuple[int, ...]
    start: int

    @property
    def prompt_ids(self) -> Sequence[int]:
        """What a generation starts from."""
        return self.ids[: self.start]

    @property
    def size(self) -> int:
        """Tokens in all."""
        return len(self.ids)

    @property
    def targets(self) -> int:
        """Tokens of the completion."""
        return len(self.ids) - self.start


def encode(
    tokenizer: Any,
    prompt: str,
    completion: str,
    max_length: int,
    *,
    delimiter: str = " ",
    chat: bool = False,
    ends: bool = False,
) -> Encoded:
    """A prompt and its completion as the model reads them.

    The boundary is the length of the prompt encoded alone, blanks at its end counted to the completion, as evaluation
    harnesses have it. What is too long loses the beginning of the prompt.

    Args:
        tokenizer: A tokenizer of transformers.
        prompt: The prompt; empty where everything is to be predicted, from a beginning-of-text token where there is one.
        completion: What follows it.
        max_length: Tokens of both together.
        delimiter: Put between the two where neither has a blank there.
        chat: Whether the tokenizer's chat template is put around both.
        ends: Whether the end-of-text token belongs to the completion.

    Raises:
        TaskError: The completion has no token, or does not fit into `max_length`.
    """
    if prompt and not chat and not prompt[-1].isspace() and not completion[:1].isspace():
        completion = delimiter + completion
    before, whole = prompt.rstrip(), prompt + completion
    if chat:
        before, whole = chat_texts(tokenizer, prompt, completion)
    special = not chat  # a chat template writes its own special tokens
    ids = _ids(tokenizer, whole, special)
    if not before:
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        ids = ids if first is None or ids[:1] == [first] else [first, *ids]
    start = max(1, len(_ids(tokenizer, before, special)) if before else 1)
    if ends and tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    if len(ids) <= start:
        raise TaskError(f"the completion {completion.strip()[:40]!r} has no token of its own: name another column")
    if (over := len(ids) - max_length) > 0:
        if len(ids) - start >= max_length:
            raise TaskError(f"the completion has {len(ids) - start} tokens, `max_length` is {max_length}: raise it")
        ids, start = ids[over:], start - over
    return Encoded(tuple(ids), start)


def chat_texts(tokenizer: Any, prompt: str, completion: str) -> tuple[str, str]:
    """A prompt, and the whole conversation, in the words of a tokenizer's chat template.

    Raises:
        TaskError: There is no template, or it fails.
    """
    user = [{"role": "user", "content": prompt}]
    try:
        before = tokenizer.apply_chat_template(user, tokenize=False, add_generation_prompt=True)
        answer = [*user, {"role": "assistant", "content": completion}]
        whole = tokenizer.apply_chat_template(answer, tokenize=False)
    except Exception as error:  # a template may raise anything
        raise TaskError(f"the chat template cannot be applied ({type(error).__name__}: {error})") from error
    return before, whole if whole.startswith(before) else before + completion


def render(template: str, row: Mapping[str, Any]) -> str:
    """A Jinja template over an example's columns.

    Raises:
        TaskError: The template is wrong, or names a column that there is not.
    """
    from jinja2 import StrictUndefined, TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    try:
        return ImmutableSandboxedEnvironment(undefined=StrictUndefined).from_string(template).render(**row)
    except (TemplateError, TypeError, ValueError) as error:
        raise TaskError(f"`template` cannot be rendered: {error}") from error


def longest_first(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Places in batches of at most `size`, the longest first, so that batches need little padding."""
    order = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    return [order[first : first + size] for first in range(0, len(order), size)]


def _ids(tokenizer: Any, text: str, special: bool) -> list[int]:
    """Token ids, without the end-of-text token that some tokenizers put after every text."""
    ids = list(tokenizer(text, add_special_tokens=special)["input_ids"])
    end = tokenizer.eos_token_id
    return (
        ids[:-1]
        if special and end is not None and ids[-1:] == [end] and not text.endswith(tokenizer.eos_token)
        else ids
    )
