"""What a merge takes: a subset of members, a method, scaling factors, the method's parameters."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from merging import storage

Value = float | int | bool | str
"""What a method's parameter may be."""


@dataclass(frozen=True)
class Recipe:
    """A merge of members of a pool.

    Args:
        method: The method's registered name.
        scaling: Scaling factor of every member that takes part; members that are not named here do not.
        parameters: The method's parameters; those left out have the method's defaults.
    """

    method: str
    scaling: Mapping[str, float]
    parameters: Mapping[str, Value] = field(default_factory=dict)

    @property
    def members(self) -> tuple[str, ...]:
        """Names of the members that take part, sorted."""
        return tuple(sorted(self.scaling))

    def as_dict(self) -> dict[str, Any]:
        """The recipe as JSON-like values, in one order of keys."""
        return {
            "method": self.method,
            "scaling": {member: float(self.scaling[member]) for member in self.members},
            "parameters": {name: self.parameters[name] for name in sorted(self.parameters)},
        }

    @property
    def identity(self) -> str:
        """Content hash: equal recipes have equal identities, whatever the order of their keys."""
        return storage.fingerprint(self.as_dict())
