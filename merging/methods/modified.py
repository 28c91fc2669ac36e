"""Methods that are made of another: `MODIFIER+METHOD`, one before the other."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from merging.errors import MethodError
from merging.kernels.blockwise import Scratch
from merging.methods.checks import target
from merging.methods.method import Method, Needs, Parameter, Prepared, Weight
from merging.recipe import GROUP, Recipe, Value


class Modified(Method):
    """A method that does something to another's merge; all that it does not say is the other's."""

    inner: ClassVar[Method]

    def needs(self, parameters: Mapping[str, Value]) -> Needs:
        """What the method that is modified needs."""
        return self.inner.needs(parameters)

    def prior(self, parameters: Mapping[str, Value]) -> tuple[float, bool]:
        """That of the method that is modified."""
        return self.inner.prior(parameters)

    def complete(self, recipe: Recipe, model_type: str = "") -> Recipe:
        """As for any method, with the other parameters as the method that is modified completes them."""
        given = {
            key: value for key, value in recipe.parameters.items() if key.partition(GROUP)[0] in self.inner.parameters
        }
        inner = self.inner.complete(Recipe(self.inner.name, recipe.scaling, given), model_type)
        return super().complete(replace(recipe, parameters={**recipe.parameters, **inner.parameters}), model_type)

    def is_linear(self, parameters: Mapping[str, Value]) -> bool:
        """Where the method that is modified is."""
        return self.inner.is_linear(parameters)

    def is_elementwise(self, parameters: Mapping[str, Value]) -> bool:
        """Where the method that is modified is."""
        return self.inner.is_elementwise(parameters)

    def global_pass(self, weights: Iterable[Any]) -> Any:
        """That of the method that is modified."""
        return self.inner.global_pass(weights)

    def sample(self, weights: Iterable[Any], parameters: Mapping[str, Value]) -> Any:
        """That of the method that is modified."""
        return self.inner.sample(weights, parameters)

    def combine(self, first: Any, second: Any) -> Any:
        """That of the method that is modified."""
        return self.inner.combine(first, second)

    def second_pass(self, weights: Iterable[Any], global_stats: Any, parameters: Mapping[str, Value]) -> Any:
        """That of the method that is modified."""
        return self.inner.second_pass(weights, global_stats, parameters)


class PreparedModified(Prepared):
    """The weights, and the state of the method that is modified.

    What it merges is worked on in float32, also where the result is rounded to another dtype.

    Args:
        weights: The weights to merge.
        prepared: The state of the method that is modified.
    """

    def __init__(self, weights: Sequence[Weight], prepared: Prepared) -> None:
        self.weights = tuple(weights)
        self.prepared = prepared
        self.scratch = Scratch()

    def report(self) -> dict[str, float]:
        """The figures of the method that is modified."""
        return self.prepared.report()

    def staged(self, out: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the other method merges into, by name, float32: the tensor to write to itself, or a buffer.

        Raises:
            MethodError: A tensor to write to is missing, or of another shape.
        """
        return {weight.name: self._stage(weight.name, target(out, weight)) for weight in self.weights}

    def write(self, staged: Mapping[str, Tensor], out: Mapping[str, Tensor]) -> None:
        """Copies what lies in buffers."""
        for name, merged in staged.items():
            if merged is not out[name]:
                out[name].copy_(merged)

    def _stage(self, name: str, destination: Tensor) -> Tensor:
        if destination.dtype == torch.float32 and destination.is_contiguous():
            return destination
        return self.scratch.take(f"merged {name}", *destination.shape, device=destination.device)


def modify(
    kind: type[Modified], prefix: str, inner: Method, summary: str, own: Mapping[str, Parameter], **changes: object
) -> Method:
    """A method made of another.

    Args:
        kind: Its class.
        prefix: The modifier's name.
        inner: The method that is modified.
        summary: One line for users.
        own: The modifier's parameters, besides the method's.
        changes: Class attributes that are not the method's.

    Raises:
        MethodError: The method is modified so already, or has parameters of these names.
    """
    if prefix in inner.name.split("+")[:-1]:
        raise MethodError(f"'{inner.name}' has a '{prefix}+' already: leave out '{prefix}+'")

    def default_recipe(method: Method, members: Sequence[str], model_type: str = "") -> Recipe:
        begun = inner.default_recipe(members, model_type)
        return Recipe(method.name, begun.scaling, {**begun.parameters, **{name: s.default for name, s in own.items()}})

    declared = (
        "requires",
        "optional",
        "solution",
        "scaling",
        "scale_free",
        "most_members",
        "per_member",
        "elementwise",
        "extras",
        "signed",
        "flat",
    )
    settings = {name: getattr(inner, name) for name in declared} | {
        "name": f"{prefix}+{inner.name}",
        "summary": summary,
        "parameters": {**inner.parameters, **own},
        "inner": inner,
        "default_recipe": default_recipe,
    }
    modified: Method = type(kind.__name__, (kind,), settings | changes)()
    return modified
