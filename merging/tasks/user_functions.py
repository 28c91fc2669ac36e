"""Functions of the user's own that settings name as `module:function`."""

import ast
import importlib
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from merging.errors import TaskError
from merging.io import hashing

FUNCTION = r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$"
"""How settings name one."""


@dataclass(frozen=True)
class LastDirectory(MetaPathFinder):
    """Finds modules in a directory that nothing else finds.

    At the end of `sys.path`, its modules would still come before the namespace packages of other entries.

    Args:
        directory: Where to look.
    """

    directory: str

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """See `MetaPathFinder`; what lies inside a package is found by the package's own path."""
        return PathFinder.find_spec(fullname, [self.directory], target) if path is None else None


def search_last(directory: str) -> None:
    """Has Python look for modules in a directory, too, after all others that it has looked in so far."""
    last = LastDirectory(directory)
    if last not in sys.meta_path:
        sys.meta_path.append(last)


def load_function(name: str, directory: str) -> Callable[..., Any]:
    """A function of Python's path, or of a module in a directory.

    Args:
        name: `module:function`.
        directory: Where modules are that Python's path lacks.

    Raises:
        TaskError: There is none.
    """
    module, function_name = name.split(":")
    search_last(directory)
    try:
        imported = importlib.import_module(module)
    except (Exception, SystemExit) as error:  # the user's module may raise anything, or be a script that exits
        raise TaskError(
            f"cannot import '{module}' ({type(error).__name__}: {error}): put it into the working directory or its "
            "directory on PYTHONPATH, and what it needs into this environment. An installed module of that name comes first"
        ) from error
    if not hasattr(imported, function_name):
        file = getattr(imported, "__file__", None) or "built in"
        raise TaskError(
            f"module '{module}' has no function '{function_name}': it is {file}. If you mean another, rename that: an "
            "installed module comes before one in the working directory"
        )
    function = getattr(imported, function_name)
    if not callable(function):
        raise TaskError(f"{name} is no function but {type(function).__name__}")
    called: Callable[..., Any] = function
    return called


def code_of(function: Callable[..., Any]) -> str:
    """The statements of a function's module, without comments and layout; of a file that is no Python, its content hash."""
    source = inspect.getsourcefile(function)
    if not source:
        return ""
    try:
        return ast.unparse(ast.parse(Path(source).read_bytes()))
    except (OSError, SyntaxError, ValueError, RecursionError):
        return hashing.file_fingerprint(source)
