"""Machine code of the loops: compiled by numba once for a user's machine, kept as object files, loaded without numba.

Numba's own cache has every process import all of numba first, which takes longer than many a merge. Code is kept in this
user's cache directory, by what it was made from: the sources, numba's and LLVM's versions, the processor and its features.
Where nothing may be written, each process compiles for itself; of several that ask for one loop at the same time, one
compiles and the others wait. What cannot be compiled is left to torch, with a warning.
"""

import ctypes
import fcntl
import hashlib
import importlib
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from threading import RLock
from typing import Any

from merging.io.fact_cache import cache_directory

DIGEST = 32
"""Bytes of the checksum that a kept file begins with: damaged code would take the process with it."""

Loop = Callable[..., int]
"""Integers of 64 bits in and out, addresses among them; runs without Python's lock."""

_lock = RLock()
_engines: list[Any] = []  # threads that begin together may make several processors, of which one is kept


class _Processor:
    """What code is made for, and loaded into.

    Raises:
        ImportError: There is no numba, no LLVM for this machine, or no instruction that converts float16, in whose place
            the code would call what may not be there.
    """

    def __init__(self) -> None:
        numba = version("numba")  # not imported, which takes longer than many a merge
        import llvmlite  # type: ignore[import-untyped]
        import llvmlite.binding as llvm  # type: ignore[import-untyped]

        with suppress(RuntimeError):  # what recent versions do by themselves, and refuse to be asked for
            llvm.initialize()
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        name, features = llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()
        self._llvm, self._cpu, self._features = llvm, name, features
        if "+f16c" not in features and "+fullfp16" not in features:
            raise ImportError("no conversion of float16")
        made_from = [numba, llvmlite.__version__, str(llvm.llvm_version_info), name, features]
        made_from += [file.read_text() for file in sorted(Path(__file__).parent.glob("*.py"))]
        self.version = hashlib.sha256("\0".join(made_from).encode()).hexdigest()[:16]

    def target(self) -> Any:
        """A machine to make code with, or to own an engine's."""
        described = self._llvm.Target.from_default_triple()
        return described.create_target_machine(cpu=self._cpu, features=self._features, opt=3, jit=True)

    def address(self, symbol: str, code: bytes) -> int:
        """Loads code for as long as the process lives, and gives the address of a function in it."""
        engine = self._llvm.create_mcjit_compiler(self._llvm.parse_assembly(""), self.target())
        engine.add_object_file(self._llvm.ObjectFileRef.from_data(code))
        engine.finalize_object()
        _engines.append(engine)
        return int(engine.get_function_address(symbol))


@cache
def _processor() -> _Processor | None:
    try:
        return _Processor()
    except (ImportError, OSError):
        return None


def is_there() -> bool:
    """Whether loops can be had on this machine."""
    return _processor() is not None


def loop(name: str) -> Loop | None:
    """A loop by its module and its name, such as `reductions.weighted_sum`; None where it cannot be compiled."""
    with _lock:
        return _loaded(name)


@cache
def _loaded(name: str) -> Loop | None:
    processor = _processor()
    assert processor is not None
    try:
        symbol, code = _kept(processor, name) or _made(processor, name)
        address = processor.address(symbol, code)
    except Exception as error:  # of versions that do not go together, numba and LLVM raise all kinds
        warnings.warn(
            f"the loop '{name}' cannot be compiled ({type(error).__name__}: {error}): torch's own operations merge in its "
            "place, in more passes. Are numba, llvmlite and numpy of versions that go together (`pip check`)?",
            stacklevel=2,
        )
        return None
    parameters: list[Any] = []

    def call(*numbers: int) -> int:
        if not parameters:
            parameters.append(ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * len(numbers))(address))
        return int(parameters[0](*numbers))

    return call


def _made(processor: _Processor, name: str) -> tuple[str, bytes]:
    """Compiles a loop, or waits for who does, and keeps the code where that is possible."""
    with _alone(processor):
        if (kept := _kept(processor, name)) is not None:
            return kept
        from merging.kernels.loops.compiling import machine_code

        module, _, function = name.partition(".")
        source = getattr(importlib.import_module(f"{__package__}.{module}"), function)
        symbol, code = machine_code(source, processor.target())
        content = symbol.encode() + b"\0" + code
        path = _directory(processor) / name
        new = path.with_name(f"{path.name}.{os.getpid()}")
        with suppress(OSError):
            new.write_bytes(hashlib.sha256(content).digest() + content)
            new.replace(path)
        return symbol, code


def _kept(processor: _Processor, name: str) -> tuple[str, bytes] | None:
    """The code of a loop that was compiled before; None where it is not there, or damaged."""
    try:
        content = (_directory(processor) / name).read_bytes()
    except OSError:
        return None
    digest, content = content[:DIGEST], content[DIGEST:]
    if hashlib.sha256(content).digest() != digest:
        return None
    symbol, _, code = content.partition(b"\0")
    return symbol.decode(), code


def _directory(processor: _Processor) -> Path:
    return cache_directory() / "loops" / processor.version


@contextmanager
def _alone(processor: _Processor) -> Iterator[None]:
    """No other process of this user compiles here meanwhile, where the file system can see to that."""
    directory = _directory(processor)
    handle = -1
    try:
        with suppress(OSError):
            directory.mkdir(parents=True, exist_ok=True)
            handle = os.open(directory / "lock", os.O_CREAT | os.O_RDWR, 0o600)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        if handle >= 0:
            os.close(handle)
