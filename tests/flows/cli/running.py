"""The command line, in this process and in processes of their own that are watched."""

import signal
import subprocess
import sys
import time
from functools import partial

import psutil
from typer.testing import CliRunner

from flows.cli.app import app
from search.ledger.ledger import Ledger

COMMAND = [sys.executable, "-m", "mergequest"]


def mergequest(*arguments, **options):
    """Runs a command in this process; returns what it printed and its exit code."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], **options)
    return result.output, result.exit_code


def start(*arguments):
    """Starts a command that Ctrl-C reaches, also where this process runs in a shell's background, which ignores it."""
    return subprocess.Popen(
        [*COMMAND, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )


def rows_of(ledger):
    return {(row.candidate, row.split): row for row in Ledger(str(ledger)).rows()}


def wait_for_rows(ledger, count, process, seconds=240):
    deadline = time.monotonic() + seconds
    while len(rows_of(ledger)) < count and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)


def offspring(process):
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def computes(process):
    """Whether this is Ray's raylet, its control store, or one of its workers and actors, and not an agent of its own."""
    try:
        name = process.name()
    except psutil.NoSuchProcess:
        return False
    return name in ("raylet", "gcs_server") or (name.startswith("ray::") and not name.endswith("Agent"))
