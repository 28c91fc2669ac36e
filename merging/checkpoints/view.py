"""A checkpoint seen otherwise than it is stored: some tensors under other names, or not at all."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

from torch import Tensor

from merging.checkpoints.checkpoint import Checkpoint
from merging.errors import CheckpointError


@dataclass(frozen=True)
class View(Checkpoint):
    """A checkpoint whose tensors have other names, or that holds one of them under several.

    Args:
        source: The checkpoint as it is stored.
        names: Name → the source's name, of everything that is seen.
    """

    source: Checkpoint
    names: Mapping[str, str]

    @classmethod
    def of(cls, source: Checkpoint, names: Mapping[str, str], config: Mapping[str, Any]) -> Self:
        """What is seen of a checkpoint under these names, with this configuration."""
        tensors = {name: replace(source.tensors[own], name=name) for name, own in names.items()}
        return cls(source.path, config, tensors, {}, source, dict(names))

    def read(self, name: str) -> Tensor:
        """A tensor on the CPU, as the source gives it.

        Raises:
            CheckpointError: There is no such tensor.
        """
        if name not in self.names:
            raise CheckpointError(f"{self.path} holds no tensor '{name}'")
        return self.source.read(self.names[name])

    @property
    def is_adapter(self) -> bool:
        """Whether the source is one."""
        return self.source.is_adapter

    def factors(self, name: str) -> tuple[Tensor, Tensor] | None:
        """The source's."""
        return self.source.factors(self.names[name])

    def prefetch(self, names: Iterable[str]) -> None:
        """Says that these tensors are about to be read."""
        self.source.prefetch([self.names[name] for name in names if name in self.names])

    def copy_here(self) -> None:
        """Copies what is remote to this machine."""
        self.source.copy_here()

    def find_copy(self) -> None:
        """Looks once more for copies of what is remote."""
        self.source.find_copy()

    @property
    def is_mapped(self) -> bool:
        """Whether the source's tensors are views of memory maps."""
        return self.source.is_mapped

    @property
    def is_cached(self) -> bool:
        """Whether the system seems to hold the source in memory."""
        return self.source.is_cached

    def advise(self, name: str, advice: int, start: int = 0, stop: int | None = None) -> None:
        """Tells the system about the use of bytes of a tensor."""
        self.source.advise(self.names[name], advice, start, stop)

    @cached_property
    def identity(self) -> tuple[str, ...]:
        """The source's: a view follows from it and the pool."""
        return self.source.identity

    @property
    def hashes_tensors(self) -> bool:
        """No: the fingerprint is of the source's tensors."""
        return False

    @property
    def is_recognised(self) -> bool:
        """Whether the source is."""
        return self.source.is_recognised

    @cached_property
    def fingerprint(self) -> str:
        """The source's."""
        return self.source.fingerprint

    def recognise(self, fingerprint: str) -> None:
        """Takes over what somebody found who read all bytes."""
        self.source.recognise(fingerprint)
