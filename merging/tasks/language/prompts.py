"""Prompts and completions as token ids: columns, templates, chat templates, and the boundary between the two."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from merging.errors import TaskError
from merging.io.documents import is_text

if TYPE_CHECKING:
    from jinja2 import Environment

MAX_PROMPT = 10_000_000
"""Characters that a template may give."""
MAX_STEPS = 10_000
"""Of all `range` loops of a template together."""
MAX_EXPONENT = 1000


@dataclass(frozen=True)
class Encoded:
    """A prompt and one completion of it.

    Args:
        ids: Token ids, prompt first.
        start: Where the completion starts; at least 1, for a first token is predicted from nothing.
        is_cut: Whether the example has more tokens than these.
    """

    ids: tuple[int, ...]
    start: int
    is_cut: bool = False

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
    cuts: bool = False,
    column: str | None = None,
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
        cuts: Whether a completion that does not fit into `max_length` loses its end.
        column: Where the completion stands, for messages.

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
        first = _first(tokenizer)
        ids = ids if first is None or ids[:1] == [first] else [first, *ids]
    start = max(1, len(_ids(tokenizer, before, special)) if before else 1)
    if ends and tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    named = f" (column '{column}')" if column else ""
    if len(ids) <= start:
        raise TaskError(
            f"the completion {completion.strip()[:40]!r} has no token of its own{named}: name another column"
        )
    if (over := len(ids) - max_length) > 0:
        if len(ids) - start >= max_length and cuts:
            ids = ids[start - 1 :][:max_length]
            return Encoded(tuple(ids), 1, is_cut=True)
        if len(ids) - start >= max_length:
            raise TaskError(
                f"the completion{named} has {len(ids) - start} tokens, `max_length` is {max_length}: raise it where the model "
                "reads more, or shorten the completion"
            )
        ids, start = ids[over:], start - over
    return Encoded(tuple(ids), start, is_cut=over > 0)


def encode_prompt(tokenizer: Any, prompt: str, *, chat: bool = False) -> list[int]:
    """What a completion of a prompt is generated from, as `encode` begins: token ids, at least one.

    Raises:
        TaskError: The prompt has no token, and the tokenizer none that texts begin with; or the chat template fails.
    """
    before = chat_texts(tokenizer, prompt, "")[0] if chat else prompt.rstrip()
    ids = _ids(tokenizer, before, not chat) if before else []
    first = _first(tokenizer)
    if not ids and first is None:
        raise TaskError(f"the prompt {prompt[:40]!r} has no token that a completion could be generated from: remove it")
    return ids or [first]


def chat_texts(tokenizer: Any, prompt: str, completion: str) -> tuple[str, str]:
    """A prompt, and the whole conversation, in the words of a tokenizer's chat template.

    Raises:
        TaskError: There is no template, or it fails.
    """
    if not tokenizer.chat_template:
        raise TaskError("`chat`: the tokenizer has no chat template: leave it out, or save one with the head")
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
    try:
        text: str = _environment().from_string(template).render(dict(row))
    except Exception as error:  # whatever the expressions of a template raise
        raise TaskError(f"`template` cannot be rendered: {type(error).__name__}: {str(error)[:300]}") from error
    if len(text) > MAX_PROMPT:
        raise TaskError(f"`template` gives {len(text):,} characters, more than {MAX_PROMPT:,}")
    if not is_text(text):
        raise TaskError("`template` gives half of a character (a lone surrogate)")
    return text


def template_columns(template: str) -> list[str]:
    """The columns that a Jinja template names.

    Raises:
        TaskError: It is no Jinja template.
    """
    from jinja2 import TemplateError, meta

    environment = _environment()
    try:
        names = meta.find_undeclared_variables(environment.parse(template))
    except (TemplateError, RecursionError, MemoryError, ValueError, OverflowError) as error:
        raise TaskError(f"`template` is no Jinja template: {type(error).__name__}: {str(error)[:300]}") from error
    return sorted(names - environment.globals.keys())


def _environment() -> "Environment":
    """Where templates are rendered: nothing in it is random, endless, or reaches out of the row."""
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    left = MAX_STEPS

    def counted(*bounds: int) -> range:
        nonlocal left
        steps = range(*bounds)
        if (size := max(0, -(-(steps.stop - steps.start) // steps.step))) > left:
            raise ValueError(f"its loops take more than {MAX_STEPS:,} steps")
        left -= size
        return steps

    environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, finalize=_printed)
    environment.intercepted_binops = frozenset(["**"])
    environment.binop_table = {**environment.binop_table, "**": _power}
    environment.globals["range"] = counted
    del environment.globals["lipsum"], environment.filters["random"]
    return environment


def _printed(value: Any) -> Any:
    """What an expression prints: never a missing value, which would become a word of the prompt."""
    if value is None or value != value:  # NaN is how tables hold a missing number
        raise ValueError("a value that is printed is missing: remove those rows, or print it under `{% if … %}`")
    return value


def _power(base: Any, exponent: Any) -> Any:
    if abs(exponent) > MAX_EXPONENT or abs(base) > 1 << 64:
        raise ValueError(f"an exponent above {MAX_EXPONENT}")
    return base**exponent


def _first(tokenizer: Any) -> Any:
    """The token that texts begin with, or that stands between them; None where there is neither."""
    return tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id


def _ids(tokenizer: Any, text: str, special: bool) -> list[int]:
    """Token ids, without the end-of-text token that some tokenizers put after every text."""
    ids = list(tokenizer(text, add_special_tokens=special)["input_ids"])
    end = tokenizer.eos_token_id
    return (
        ids[:-1]
        if special and end is not None and ids[-1:] == [end] and not text.endswith(tokenizer.eos_token)
        else ids
    )
