"""A task of lm-evaluation-harness: found by name, with its documents and the requests that a whole run makes of them."""

import contextlib
import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from merging.errors import TaskError
from merging.io.addresses import in_words
from merging.registry import did_you_mean

SEED = 1234
"""Of few-shot examples, as the harness has it."""
SHOWN = 8
"""Names that a message lists."""
EXTRA = "pip install 'mergequest[lm-eval]'"


@dataclass(frozen=True)
class Documents:
    """Documents of one split.

    Args:
        docs: As the harness reads them.
        requests: Those of each document, in its own order.
    """

    docs: Sequence[Any]
    requests: Sequence[Sequence[Any]]

    def requests_of(self, places: npt.NDArray[np.int64]) -> list[list[Any]]:
        """Requests of some documents, without answers yet."""
        return [[replace(request, resps=[], filtered_resps={}) for request in self.requests[place]] for place in places]


def find_task(name: str, include_path: str | None, directory: str) -> Any:
    """The harness's task.

    Args:
        name: Its name.
        include_path: A directory with further YAML files of tasks.
        directory: What relative paths in those files are relative to.

    Raises:
        TaskError: The harness is not installed, knows no such task, or cannot load it or its data.
    """
    try:
        import lm_eval.models.huggingface  # noqa: F401 (it needs more than the harness itself)
        from lm_eval.api.task import ConfigurableTask
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise TaskError(
            f"`kind: lm_eval` runs lm-evaluation-harness, which is not installed ({error.name}): {EXTRA}"
        ) from error
    if include_path is not None and not Path(include_path).is_dir():
        raise TaskError(f"include_path: there is no directory {include_path}")
    with quiet_harness():
        manager = TaskManager(include_path=include_path, include_defaults=False) if include_path else None
        if manager is None or name not in manager.all_subtasks:  # its own tasks are thousands of files
            manager = TaskManager(include_path=include_path)
        if name not in manager.all_subtasks:
            raise TaskError(_no_task(name, manager, include_path))
        try:
            with contextlib.chdir(directory):
                (task,) = manager.load([name])["tasks"].values()
        except Exception as error:  # data sets and the code of tasks raise all kinds
            raise TaskError(
                f"the harness cannot load its task '{name}' ({in_words(error)}): its data must lie in the data sets' cache of "
                "this machine, or be named by local files in its YAML"
            ) from error
    if not isinstance(task, ConfigurableTask):
        raise TaskError(
            f"the harness's task '{name}' is a class of its own, not a configuration: it cannot be cut into splits"
        )
    if getattr(task, "UNSAFE_CODE", False):
        raise TaskError(f"the harness's task '{name}' runs code that models write: it is not run here")
    if getattr(task, "MULTIMODAL", False):
        raise TaskError(f"the harness's task '{name}' shows images or sounds: only texts can be judged by it here")
    return task


def _no_task(name: str, manager: Any, include_path: str | None) -> str:
    """Why there is none."""
    entry = manager.task_index.get(name)
    if entry is not None:
        members = sorted(entry.tags) or [part for part in (entry.cfg or {}).get("task", ()) if isinstance(part, str)]
        shown = f" ({', '.join(members[:SHOWN])}{', …' if len(members) > SHOWN else ''})" if members else ""
        return f"'{name}' is a group of the harness's tasks: name those that count{shown}, each a task of its own here"
    for file, why in _unreadable(include_path):
        return f"the harness has no task '{name}', and cannot read {file}: {why}"
    return f"the harness has no task '{name}'. {did_you_mean(name, list(manager.all_subtasks))}"


def _unreadable(include_path: str | None) -> Iterator[tuple[Path, str]]:
    """YAML files that the harness passes over without a word, and why."""
    from lm_eval.tasks._yaml_loader import load_yaml

    for file in sorted(Path(include_path).rglob("*.yaml")) if include_path else ():
        try:
            load_yaml(file, resolve_func=False, recursive=True)
        except Exception as error:  # whatever its parser raises
            yield file, in_words(error)


def read_documents(task: Any, split: str, limit: int | None, chat: Mapping[str, Any]) -> Documents:
    """Documents of a data set's split, and the requests that a whole run of the harness over them makes.

    Few-shot examples are drawn document after document, so that they are fixed only where all documents are gone through.

    Args:
        task: The harness's task.
        split: Name of the split in its data set.
        limit: Only the first so many documents.
        chat: `build_all_requests`' arguments on chat templates.

    Raises:
        TaskError: There is no such split, or no document, or a template fails.
    """
    if split not in task.dataset:
        raise TaskError(f"its data set has no split '{split}'. {did_you_mean(split, list(task.dataset))}")
    task.set_config("test_split", split)
    task.set_fewshot_seed(SEED)
    try:
        with quiet_harness():
            docs = [doc for _, doc in task.doc_iterator(limit=limit)]
            if not docs:
                raise TaskError(f"its split '{split}' has no documents")
            task.build_all_requests(limit=limit, **chat)
    except TaskError:
        raise
    except Exception as error:  # whatever a template or a filter of documents raises
        raise TaskError(f"the harness cannot make requests of its split '{split}': {in_words(error)}") from error
    requests: list[list[Any]] = [[] for _ in docs]
    for request in task.instances:
        requests[request.doc_id].append(request)
    return Documents(docs, [sorted(own, key=lambda request: request.idx) for own in requests])


@contextlib.contextmanager
def quiet_harness() -> Iterator[None]:
    """Keeps the harness's progress bars and remarks off the screen."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "lm-eval", "datasets")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
