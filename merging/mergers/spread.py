"""Merging into weights that lie on several devices."""

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from merging.mergers.material import Material
from merging.mergers.resident import joined
from merging.mergers.shard import SECOND_PASSES, PartMerger, needs_global_pass, needs_second_pass
from merging.recipe import Recipe, Value


class SpreadMerger:
    """Merges recipe after recipe into weights of several devices, each where it lies, bit for bit as on one of them.

    Args:
        material: Pool and statistics.
        parts: The weights to overwrite on each device, by the base's name.
    """

    def __init__(self, material: Material, parts: Sequence[Mapping[str, Tensor]]) -> None:
        self._parts = [PartMerger(material, out) for out in parts if out]
        self._settled: set[str] = set()
        self._refined: dict[str, tuple[Mapping[str, Value], list[Any]]] = {}

    def merge(self, recipe: Recipe) -> dict[str, float]:
        """Overwrites the weights with the recipe's.

        Returns:
            The method's figures on this merge.

        Raises:
            MethodError: The recipe is wrong, or has no merge.
        """
        parts, method = self._parts, recipe.method
        if needs_global_pass(method) and method not in self._settled:
            every = [part.global_pass(method) for part in parts]
            for part in parts:
                part.settle(method, moved(every, part.device))
            self._settled.add(method)
        if needs_second_pass(method) and self._refined.get(method, (None, []))[0] != recipe.parameters:
            answers: list[Any] = []
            for _ in range(SECOND_PASSES):
                answers += [part.second_pass(recipe, moved(answers, part.device)) for part in parts]
            self._refined[method] = recipe.parameters, answers
        _, more = self._refined.get(method, (None, []))
        return joined([part.merge_part(recipe, moved(more, part.device)) for part in parts])


def moved(value: Any, device: torch.device) -> Any:
    """What a method knows of all weights, with its tensors on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: moved(entry, device) for key, entry in value.items()}
    if isinstance(value, list):
        return [moved(entry, device) for entry in value]
    if type(value) is tuple:
        return tuple(moved(entry, device) for entry in value)
    if is_dataclass(value) and not isinstance(value, type):
        own = {field.name: moved(getattr(value, field.name), device) for field in fields(value) if field.init}
        return replace(value, **own)
    return value
