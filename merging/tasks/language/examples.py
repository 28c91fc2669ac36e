"""Examples of prompts and completions, and how they are read from files."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from merging.errors import TaskError
from merging.io.documents import is_number, is_text
from merging.tasks.language.language_settings import LanguageSettings
from merging.tasks.language.prompts import render, template_columns


@dataclass(frozen=True)
class Example:
    """An example: its prompt, its completions, which of them is right, and what it is called in messages."""

    prompt: str
    completions: tuple[str, ...]
    right: int = 0
    name: str = ""


def read_examples(paths: Sequence[str], settings: LanguageSettings) -> list[Example]:
    """Examples from files.

    Raises:
        TaskError: A file, column or row is unusable; the first bad row is named.
    """
    from merging.tasks.labelled_texts import read_tables, text_problems  # with pandas, which takes a second

    texts = [settings.whole_text] if settings.whole_text is not None else []
    columns = template_columns(settings.template) if settings.template is not None else []
    if settings.whole_text is None:
        texts += [settings.prompt] if settings.template is None and settings.prompt is not None else []
        texts += [settings.completion] if settings.choices is None and settings.completion is not None else []
        columns += [settings.choices, settings.label] if settings.choices is not None else []
    examples = []
    for path, frame in read_tables(paths, list(dict.fromkeys([*texts, *columns])), texts):
        if problems := [problem for column in texts for problem in text_problems(frame[column], column)]:
            raise TaskError(f"{path}: {'; '.join(problems)}")
        for number, row in enumerate(frame.to_dict("records"), start=1):
            name = f"{path}, row {number}"
            try:
                example = _example({str(key): value for key, value in row.items()}, settings)
            except TaskError as error:
                raise TaskError(f"{name}: {error}") from error
            examples.append(replace(example, name=name))
    return examples


def _example(row: Mapping[str, Any], settings: LanguageSettings) -> Example:
    if settings.whole_text is not None:
        return Example("", (row[settings.whole_text],))
    prompt = render(settings.template, row) if settings.template is not None else row[settings.prompt or ""]
    if settings.choices is None:
        return Example(prompt, () if settings.completion is None else (row[settings.completion],))
    choices = row[settings.choices]
    if isinstance(choices, str | Mapping) or not hasattr(choices, "__len__") or len(choices) < 2:
        raise TaskError(f"column '{settings.choices}' holds {_shown(choices)}: a list of at least two texts is needed")
    if strange := [choice for choice in choices if not _is_choice(choice)]:
        raise TaskError(f"column '{settings.choices}' holds {_shown(strange[0])} among its choices: texts are needed")
    options = tuple(str(choice) for choice in choices)
    label = row[settings.label]
    if isinstance(label, str):
        if label not in options:
            raise TaskError(f"column '{settings.label}' holds {_shown(label)}, which is none of the choices")
        return Example(prompt, options, options.index(label))
    if not isinstance(label, bool | np.bool_) and isinstance(label, int | float | np.number):
        place = next((place for place in range(len(options)) if place == label), None)
        if place is not None:
            return Example(prompt, options, place)
    raise TaskError(
        f"column '{settings.label}' holds {_shown(label)}: a position from 0 to {len(options) - 1} is needed"
    )


def _is_choice(value: object) -> bool:
    """Whether it is a text, or a number that stands for one."""
    return is_text(value) or (is_number(value.item() if isinstance(value, np.number) else value))


def _shown(value: object) -> str:
    """A value in a message."""
    return repr(value)[:100]
