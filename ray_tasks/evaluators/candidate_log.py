"""What is printed, logged and warned of while a candidate is measured, kept in case that it fails."""

import contextlib
import io
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

MOST = 200_000
"""Characters that are kept: the last ones."""


class _Tee(io.TextIOBase):
    """Writes to a stream, and keeps what was written last."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self.kept = stream, ""

    def write(self, text: str) -> int:
        """Writes, and keeps."""
        self.kept = (self.kept + text)[-MOST:]
        return self._stream.write(text)

    def flush(self) -> None:
        """As the stream does."""
        self._stream.flush()


@contextmanager
def kept_output() -> Iterator[Callable[[], str]]:
    """Keeps what Python prints, logs and warns of in this process during the block; yields what gives it."""
    tee = _Tee(sys.stderr)
    handler = logging.StreamHandler(tee)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        # within it Python forgets what it has warned of, which it says once a process: of an earlier candidate
        with warnings.catch_warnings(), contextlib.redirect_stdout(tee), contextlib.redirect_stderr(tee):
            yield lambda: tee.kept
    finally:
        root.removeHandler(handler)
