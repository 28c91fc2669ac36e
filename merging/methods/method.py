"""What a merge method is: declared parameters, `prepare` once for a pool, `merge` again and again for candidates."""

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from merging.errors import MethodError
from merging.methods.mergekit_names import hint
from merging.recipe import GROUP, Recipe, Value
from merging.registry import Registry, did_you_mean

LARGEST = sys.float_info.max
"""The largest finite number."""


@dataclass(frozen=True)
class Parameter:
    """A method's hyperparameter: what it is, its default, and the range that a search covers.

    Args:
        default: Value where a recipe names none.
        help: One line for users.
        low: Smallest value that a search tries.
        high: Largest value that a search tries.
        log: Search on a logarithmic scale.
        choices: The allowed values, instead of a range.
        minimum: Smallest allowed value; None for no bound.
        maximum: Largest allowed value; None for no bound.
        search: Whether a search varies it where the campaign does not say; False for what is a matter of principle.
        default_for: Model type (`model_type` of the base's configuration) → the default there, where it is another one.
    """

    default: Value
    help: str
    low: float | None = None
    high: float | None = None
    log: bool = False
    choices: tuple[Value, ...] | None = None
    minimum: float | None = None
    maximum: float | None = None
    search: bool = True
    default_for: Mapping[str, Value] = field(default_factory=dict)

    def check(self, name: str, value: Value) -> Value:
        """The value, in the parameter's type.

        Raises:
            MethodError: It is of another type, not finite, no whole number where one is needed, out of bounds, or not among
                the choices.
        """
        shown = repr(value)[:100]
        if self.choices is not None:
            for choice in self.choices:
                # as the choice is written, so that 2.0 and 2 are one merge; True is no number
                if value == choice and not (isinstance(value, bool) and not isinstance(choice, bool)):
                    return choice
            raise MethodError(f"{name} = {shown} is not one of {', '.join(map(repr, self.choices))}")
        if isinstance(self.default, str):
            if not isinstance(value, str):
                raise MethodError(f"{name} = {shown} is no text")
            return value
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise MethodError(f"{name} = {shown} is not a number")
        if not abs(value) <= LARGEST:
            raise MethodError(f"{name} = {shown} is not a finite number")
        if (self.minimum is not None and value < self.minimum) or (self.maximum is not None and value > self.maximum):
            low = "−∞" if self.minimum is None else f"{self.minimum:g}"
            high = "∞" if self.maximum is None else f"{self.maximum:g}"
            raise MethodError(f"{name} = {value:g} is outside {low} … {high}")
        if isinstance(self.default, int):
            if value != int(value):
                raise MethodError(f"{name} = {value:g} is not a whole number")
            return int(value)
        return float(value) + 0.0  # −0 is 0


@dataclass(frozen=True)
class Weight:
    """One parameter of the pool, as a method sees it.

    Args:
        name: The base's name of it.
        base: θ_0, any shape, stored dtype.
        members: θ_t by member, same shape, any floating dtype.
        statistics: Statistic kind (`fisher`, `gram`) → member (or `BASE`) → tensor. A kind that has nothing for this
            weight (no Gram for a bias) is absent. Weights that read the same input may hold the same Gram tensors.
        transposed: A matrix is stored [in, out] (GPT-2's `Conv1D`), not [out, in] (`torch.nn.Linear`). Known where there
            are statistics or the method's `extras` name it.
        factors: Member → L [rows, r] and R [r, columns] whose product is the member's task vector as it is stored, of a LoRA
            adapter; r = 0 where it leaves the weight alone, and absent where it holds it in full. Only where the method's
            `extras` name it.
        start: Flat index of the first entry, where this is a chunk [n] of a larger weight and not the whole.
    """

    name: str
    base: Tensor
    members: Mapping[str, Tensor]
    statistics: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    transposed: bool = False
    factors: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    start: int = 0


@dataclass(frozen=True)
class Needs:
    """The statistics that a merge cannot do without.

    Args:
        members: Kinds that every member must bring.
        base: Kinds that the base must bring.
        whole: Kind that is one of all members that take part.
    """

    members: tuple[str, ...] = ()
    base: tuple[str, ...] = ()
    whole: str | None = None


@dataclass(frozen=True)
class Context:
    """What a method may know of the pool besides its weights.

    Args:
        examples: Number of training examples behind each member (and `BASE`, where known).
        global_stats: The combined `Method.global_pass` of all weights of the model, whatever part of them is being prepared.
        model_type: Of the base's configuration.
    """

    examples: Mapping[str, int] = field(default_factory=dict)
    global_stats: Any = None
    model_type: str = ""


class Prepared(ABC):
    """A method's state for some weights of a pool: all that depends on no candidate."""

    @abstractmethod
    def merge(self, scaling: Mapping[str, float], parameters: Mapping[str, Value], out: Mapping[str, Tensor]) -> None:
        """Writes a candidate's merged weights.

        Args:
            scaling: Scaling factor of every member that takes part (a subset of the prepared members, in any order).
            parameters: Every declared parameter of the method, checked.
            out: The weights to overwrite, by the base's name, in the shape of the base and any floating dtype, on the
                device of the prepared state. Rounded to that dtype once, at the end.

        Raises:
            MethodError: These scaling factors and parameters have no merge (a denominator that cancels).
        """

    def report(self) -> dict[str, float]:
        """Figures on the last merge that a user should see (a ridge that was added), by name."""
        return {}


class Method(ABC):
    """A way to merge: pure mathematics over weights, without files or cluster.

    Class attributes declare what the rest of the program needs to know: `name`; `requires`, the kinds of statistic that
    every member must bring; `optional`, kinds that are used where they are there; `scaling`, the scaling factor's default
    and range; `parameters`; `scale_free`, whether a factor shared by all members cancels, so that no search need try any.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    requires: ClassVar[tuple[str, ...]] = ()
    optional: ClassVar[tuple[str, ...]] = ()
    solution: ClassVar[str | None] = None
    """Kind of statistic that is one of a set of members as a whole; its key in `Weight.statistics` joins their names by +."""
    scaling: ClassVar[Parameter]
    parameters: ClassVar[Mapping[str, Parameter]] = {}
    scale_free: ClassVar[bool] = False
    extras: ClassVar[tuple[str, ...]] = ()
    """What a merge looks at besides: `layout`, whether matrices are stored [in, out]; `factors`, adapters' own."""
    signed: ClassVar[bool] = False
    """Whether a merge is another one where rows or columns of all weights change signs, as of means or a softmax of rows."""
    flat: ClassVar[bool] = False
    """Whether all singular values of what a merge adds to a matrix are equal, so that any basis is one of singular vectors."""
    most_members: ClassVar[int | None] = None
    """Most members that a merge can take; None for any number."""
    per_member: ClassVar[tuple[str, ...]] = ()
    """Parameters that a recipe may give for one member alone, as `density@amazon`, beside or instead of one for all."""
    elementwise: ClassVar[bool] = False
    """Whether, given the global statistics, an entry's merge needs no other entry, so that a weight may be merged in chunks.

    `global_pass` and `combine` then take chunks, too: two of one weight add up."""

    def is_elementwise(self, parameters: Mapping[str, Value]) -> bool:
        """Whether a merge with these parameters is: some ask for whole rows, or for a whole weight's norm."""
        return self.elementwise

    @property
    def kinds(self) -> tuple[str, ...]:
        """All kinds of statistic that a merge may look at."""
        return (*self.requires, *self.optional, *([self.solution] if self.solution else []))

    def needs(self, parameters: Mapping[str, Value]) -> Needs:
        """The statistics that must be there for a merge with these parameters, all spelled out."""
        return Needs(self.requires, whole=self.solution)

    def prior(self, parameters: Mapping[str, Value]) -> tuple[float, bool]:
        """The base's curvature H_0 that a merge with these parameters has: a constant, and whether s_0 F_0 is added."""
        return 1.0, False

    def is_linear(self, parameters: Mapping[str, Value]) -> bool:
        """Whether a merge with these parameters is θ_0 + Σ α_t u_t, u_t independent of the scaling factors α."""
        return False

    def global_pass(self, weights: Iterable[Weight]) -> Any:
        """Facts about all weights of the model that merging any of them needs (a norm, a histogram).

        Those of parts are combined with `combine`, so that the parts may lie on different machines.
        """
        return None

    def sample(self, weights: Iterable[Weight], parameters: Mapping[str, Value]) -> Any:
        """The global statistics for one candidate alone, which may be an estimate that `second_pass` makes exact.

        It is combined with `combine`; `second_pass` is asked with it until it gives None.
        """
        return self.global_pass(weights)

    def combine(self, first: Any, second: Any) -> Any:
        """The global statistics of two disjoint sets of weights, from those of each; associative and commutative."""
        return None

    def second_pass(self, weights: Iterable[Weight], global_stats: Any, parameters: Mapping[str, Value]) -> Any:
        """More of the global statistics: what one candidate's merge asks of all weights, and no global pass can foresee.

        It is asked for where the model is prepared in parts that are not at hand together. What all parts answer is
        combined with the global statistics.

        Args:
            weights: Some of the pool's weights.
            global_stats: The combined global statistics of all.
            parameters: The candidate's.

        Returns:
            None where the global statistics say enough; then no weight has been looked at.
        """
        return None

    @abstractmethod
    def prepare(self, weights: Sequence[Weight], context: Context) -> Prepared:
        """All that can be computed before scaling factors and parameters are known.

        Args:
            weights: Some of the pool's weights, or all, on the device that will merge.
            context: What is known of the whole pool; `context.global_stats` covers the whole model.

        Raises:
            MethodError: A statistic is missing or has another shape than its weight asks for.
        """

    def defaults(self, model_type: str = "") -> dict[str, Value]:
        """Every parameter's default, for a base of this model type."""
        return {name: spec.default_for.get(model_type, spec.default) for name, spec in self.parameters.items()}

    def default_recipe(self, members: Sequence[str], model_type: str = "") -> Recipe:
        """The method at its defaults, all parameters spelled out, for a base of this model type."""
        scaling = dict.fromkeys(members, float(self.scaling.default))
        return Recipe(self.name, scaling, self.defaults(model_type))

    def complete(self, recipe: Recipe, model_type: str = "") -> Recipe:
        """The recipe with every parameter spelled out and checked.

        Args:
            recipe: A recipe of this method.
            model_type: Of the base's configuration, which some defaults follow.

        Raises:
            MethodError: An unknown parameter, a value out of bounds, no member, or a scaling factor that is no number.
        """
        own = self._of_members(recipe)
        for name in recipe.parameters:
            if name not in self.parameters and name not in own:
                hint = did_you_mean(name, list(self.parameters)) if self.parameters else "It has none."
                raise MethodError(f"method '{self.name}' has no parameter '{name}'. {hint}")
        if not recipe.scaling:
            raise MethodError(f"method '{self.name}' needs at least one member")
        scaling = {
            member: float(self.scaling.check(f"scaling factor of '{member}'", factor))
            for member, factor in recipe.scaling.items()
        }
        usual = self.defaults(model_type)
        parameters = {
            name: spec.check(name, recipe.parameters.get(name, usual[name])) for name, spec in self.parameters.items()
        }
        return Recipe(self.name, scaling, parameters | own)

    def _of_members(self, recipe: Recipe) -> dict[str, Value]:
        """A recipe's parameters of single members, checked.

        Raises:
            MethodError: A parameter is one for all members, a member takes no part, or a value is out of bounds.
        """
        values: dict[str, Value] = {}
        for key, value in recipe.parameters.items():
            name, grouped, member = key.partition(GROUP)
            if not grouped or name not in self.parameters:
                continue
            if name not in self.per_member:
                others = (
                    f"per member may be {', '.join(self.per_member)}" if self.per_member else "none may be per member"
                )
                raise MethodError(f"'{key}': {self.name} has one {name} for all members and weights; {others}")
            if member not in recipe.members:
                if member.partition(GROUP)[0] in recipe.members:
                    raise MethodError(
                        f"'{key}': {name} may differ between members, not between groups of their weights: write "
                        f"'{name}{GROUP}{member.partition(GROUP)[0]}'"
                    )
                raise MethodError(f"'{key}': '{member}' takes no part. {did_you_mean(member, list(recipe.members))}")
            values[key] = self.parameters[name].check(key, value)
        return values


def of_member(parameters: Mapping[str, Value], name: str, member: str) -> float:
    """A number for a member: its own, where a recipe gives one."""
    return float(parameters.get(f"{name}{GROUP}{member}", parameters[name]))


class Methods(Registry[Method]):
    """Methods by name, and modified ones by the modifiers' names before the method's: `lines+ties`, `svc+lines+ties`.

    Those that exist only as a combination are made when they are first asked for, and not listed.
    """

    def __init__(self) -> None:
        super().__init__("method", MethodError)
        self.modifiers: dict[str, Callable[[Method], Method]] = {}
        self._modified: dict[str, Method] = {}

    def __getitem__(self, name: str) -> Method:
        prefix, _, inner = name.partition("+")
        if not inner or prefix not in self.modifiers:
            if name not in self._entries and (known := hint(name)):
                raise MethodError(f"unknown method '{name}'. {known}")
            return super().__getitem__(name)
        if name not in self._modified:
            self._modified[name] = self.modifiers[prefix](self[inner])
        return self._modified[name]

    def __contains__(self, name: str) -> bool:
        try:
            self[name]
        except MethodError:
            return False
        return True


METHODS = Methods()


def register(method: type[Method]) -> type[Method]:
    """Class decorator: makes a method known by its name."""
    METHODS.register(method.name, method())
    return method


def modifier(name: str) -> Callable[[Callable[[Method], Method]], Callable[[Method], Method]]:
    """Decorator of a function that makes a method from another: known by this name before the other's."""

    def known(modify: Callable[[Method], Method]) -> Callable[[Method], Method]:
        METHODS.modifiers[name] = modify
        return modify

    return known
