"""What a merge takes: a subset of members, a method, scaling factors, the method's parameters."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from merging.io import hashing

Value = float | int | bool | str
"""What a method's parameter may be."""

GROUP = "@"
"""Between a member and a group of weights in the key of a scaling factor."""

BASE = "base"
"""The base's key among statistics; no member may have this name."""
REFERENCE_BASE = "base"
REFERENCE_MEMBER = "member"
REFERENCES = (REFERENCE_BASE, REFERENCE_MEMBER)
"""Methods of the two recipes that merge nothing: the base as it is, one member as it is."""


@dataclass(frozen=True)
class Recipe:
    """A merge of members of a pool.

    Args:
        method: The method's registered name.
        scaling: Scaling factors of the members that take part; members that are not named here do not. A key is a member
            (its factor for all weights) or `member@group` (for a group of weights: see `merging.mergers.weight_groups`).
        parameters: The method's parameters; those left out have the method's defaults.
    """

    method: str
    scaling: Mapping[str, float]
    parameters: Mapping[str, Value] = field(default_factory=dict)

    @property
    def members(self) -> tuple[str, ...]:
        """Names of the members that take part, sorted."""
        return tuple(sorted({key.partition(GROUP)[0] for key in self.scaling}))

    def as_dict(self) -> dict[str, Any]:
        """The recipe as JSON-like values, in one order of keys."""
        return {
            "method": self.method,
            "scaling": {key: float(self.scaling[key]) for key in sorted(self.scaling)},
            "parameters": {name: self.parameters[name] for name in sorted(self.parameters)},
        }

    @property
    def identity(self) -> str:
        """Content hash: equal recipes have equal identities, whatever the order of their keys."""
        return hashing.fingerprint(self.as_dict())


def base_recipe() -> Recipe:
    """The base as it is."""
    return Recipe(REFERENCE_BASE, {})


def member_recipe(member: str) -> Recipe:
    """One member as it is."""
    return Recipe(REFERENCE_MEMBER, {member: 1.0})


def nested(scaling: Mapping[str, float]) -> dict[str, float | dict[str, float]]:
    """Scaling factors as a recipe file has them: member → its factor, or group → factor; members and groups sorted."""
    by_member: dict[str, float | dict[str, float]] = {}
    for key in sorted(scaling):
        member, grouped, group = key.partition(GROUP)
        groups = by_member.setdefault(member, {}) if grouped else None
        if isinstance(groups, dict):
            groups[group] = scaling[key]
        else:
            by_member[key] = scaling[key]
    return by_member


def flat(scaling: Mapping[str, float | Mapping[str, float]]) -> dict[str, float]:
    """Scaling factors by `member` or `member@group`, however they were written; the inverse of `nested`."""
    factors_of: dict[str, float] = {}
    for member, factors in scaling.items():
        if isinstance(factors, Mapping):
            factors_of |= {f"{member}{GROUP}{group}": factor for group, factor in factors.items()}
        else:
            factors_of[member] = factors
    return factors_of
