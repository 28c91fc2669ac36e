"""Gradient mismatch: what keeps a merged model from being the one that was trained on all tasks (Daheim et al. 2024, eq. 8)."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from merging.errors import MethodError
from merging.evaluation.shared_weights import share_weights
from merging.mergers import weight_groups
from merging.mergers.material import Material
from merging.methods import METHODS
from merging.methods.checks import example_counts
from merging.recipe import BASE, REFERENCES, Recipe
from merging.tasks.likelihood import divergences
from merging.tasks.task import IGNORED, Task


@dataclass(frozen=True)
class Mismatch:
    """How far the members' gradients at the merged weights are from those at their own.

    Args:
        total: ‖H_0⁻¹ Σ_t α_t s_t [∇ℓ_t(θ) − ∇ℓ_t(θ_t)]‖ over the merged weights.
        members: Member → the norm of its own term.
    """

    total: float
    members: Mapping[str, float]


class Weighing:
    """What a recipe's equation 8 weighs gradients by: its own α_t, the numbers of examples s_t, and H_0⁻¹.

    H_0 is the identity but for gradient matching, whose `delta` and `base_curvature` say it; where it is 0 (`delta: 0`) there
    is no base in the objective, and no H_0⁻¹. References merge nothing: every member counts with α_t = 1 there.

    Args:
        material: Pool, statistics and numbers of examples; 1 for all where none is known.
        recipe: A recipe with every parameter spelled out.
        members: Members that have a term where the recipe is a reference.

    Raises:
        MethodError: Numbers of examples are known of some members only; H_0 is partly 0, or its Fisher is missing.
    """

    def __init__(self, material: Material, recipe: Recipe, members: Iterable[str] = ()) -> None:
        self._pool = material.pool
        reference = recipe.method in REFERENCES
        self.members = tuple(sorted(members)) if reference else recipe.members
        plain = Recipe("", dict.fromkeys(self.members, 1.0)) if reference else recipe
        counts = example_counts(material.examples, self.members)
        self._scales = {
            name: {member: factor * counts[member] for member, factor in factors.items()}
            for names, factors in weight_groups.split(material.pool.weights, plain)
            for name in names
        }
        self._delta, fisher = (1.0, False) if reference else METHODS[recipe.method].prior(recipe.parameters)
        self._fisher = material.statistics.get("fisher", {}).get(BASE) if fisher else None
        self._count = material.examples.get(BASE, 1)
        if fisher and self._fisher is None:
            raise MethodError("the gradient mismatch of this recipe needs the statistic 'fisher' of the base, its H_0")
        if fisher and not self._delta > 0:
            raise MethodError(
                "H_0⁻¹ of the gradient mismatch is infinite where the base's Fisher is 0: give the method a delta above 0"
            )

    def scale(self, name: str, member: str) -> float:
        """α_t s_t of a member for a weight."""
        return self._scales[name][member]

    def divided(self, name: str, value: Tensor) -> Tensor:
        """H_0⁻¹ times a weight's gradient."""
        prior: Tensor | float = self._delta or 1.0
        if self._fisher is not None and name in self._fisher.names:
            prior = self._fisher.read(name).to(value.device, value.dtype) * self._count + self._delta
        return value / prior


def gradient_mismatch(
    material: Material,
    tasks: Mapping[str, Task],
    weights: Mapping[str, Tensor],
    recipe: Recipe,
    *,
    examples: int = 256,
    batch_size: int = 16,
) -> Mismatch:
    """The gradient mismatch itself, from unlabelled training examples.

    ℓ_t(θ) is the mean over member t's examples of −Σ_c p_t(c|x) log p_θ(c|x): the cross-entropy under the labels that the
    member itself predicts, in expectation; of several labels summed over these, of numbers half the squared difference. No
    label of the data is used, ∇ℓ_t(θ_t) is 0 exactly, and the Hessian of ℓ_t at θ_t is the exact Fisher, so that
    `quadratic_mismatch` is this to first order in θ − θ_t. For sequences, log p is summed over an example's target tokens.

    Args:
        material: Base and members, and how many training examples each has (s_t).
        tasks: Member → its task, bound to its own checkpoint.
        weights: The merged weights θ by the base's name, float32, all on the device to run on.
        recipe: What they were merged by: see `Weighing`.
        examples: Training examples of each member to take the gradient over.
        batch_size: Examples a step.

    Raises:
        MethodError: A member has no task with examples, or its gradient is not finite; see `Weighing`.
    """
    pool, weighing = material.pool, Weighing(material, recipe, tasks)
    device = next(iter(weights.values())).device
    here = dict(weights)
    total: dict[str, Tensor] = {}
    norms = {}
    for member in weighing.members:
        task = tasks.get(member)
        stop = min(examples, task.size("train")) if task is not None and task.has_logits else 0
        if task is None or not stop:
            raise MethodError(f"'{member}' has no train examples to take its gradient on: give it a task with data")
        own, merged = task.load_model().to(device), task.load_model()
        merged.to(device).requires_grad_(False)
        shared = share_weights(merged, pool, pool.members[member], here)
        shared.track_gradients()
        for batch in task.batches("train", 0, stop, batch_size):
            batch = batch.to(device)
            with torch.no_grad():
                wanted = task.logits(own, batch).float()
            with torch.enable_grad():
                # as the cross-entropy but for what does not depend on the merged weights
                terms = divergences(task.likelihood(merged), task.logits(merged, batch).float(), wanted)
                (terms[batch.labels != IGNORED] if batch.is_sequential else terms).sum().backward()  # type: ignore[no-untyped-call]
        parts = {
            name: weighing.divided(name, gradient * (weighing.scale(name, member) / stop))
            for name, gradient in shared.take_gradients().items()
        }
        norms[member] = _norm(parts)
        if norms[member] != norms[member] or norms[member] == float("inf"):
            raise MethodError(
                f"{member}: its gradient at the merged weights is not finite: use smaller scaling factors"
            )
        for name, value in parts.items():
            total[name] = total[name] + value if name in total else value
    return Mismatch(_norm(total), norms)


def quadratic_mismatch(material: Material, merged: Callable[[str], Tensor], recipe: Recipe) -> Mismatch:
    """The stand-in that costs no forward pass: ‖H_0⁻¹ Σ_t α_t H_t (θ − θ_t)‖, H_t = s_t F_t with the diagonal Fisher.

    Weights without Fisher information (a member's task does not use them) take no part.

    Args:
        material: Pool and statistics.
        merged: Name → the merged weight θ, in the base's shape; read one by one.
        recipe: What they were merged by: see `Weighing`.

    Raises:
        MethodError: A member's Fisher information is missing; see `Weighing`.
    """
    weighing = require_fishers(material, recipe)
    fishers = material.statistics["fisher"]
    squares = dict.fromkeys(["", *weighing.members], 0.0)
    for name in material.pool.weights:
        theta: Any = None
        total: Any = 0.0
        for member in weighing.members:
            own = material.pool.members[member].names[name]
            if own not in fishers[member].names:
                continue
            theta = merged(name).double().cpu() if theta is None else theta
            moved = theta - material.pool.member_weight(member, name)
            part = fishers[member].read(own).double() * moved * weighing.scale(name, member)
            part = weighing.divided(name, part)
            squares[member] += float(part.square().sum())
            total = total + part
        squares[""] += float(torch.as_tensor(total).square().sum())
    return Mismatch(squares.pop("") ** 0.5, {member: square**0.5 for member, square in squares.items()})


def require_fishers(material: Material, recipe: Recipe) -> Weighing:
    """Looks whether `quadratic_mismatch` has what it needs.

    Raises:
        MethodError: A member's Fisher information is missing; see `Weighing`.
    """
    if missing := [member for member in recipe.members if member not in material.statistics.get("fisher", {})]:
        raise MethodError(
            f"the gradient mismatch needs the statistic 'fisher' of {', '.join(missing)}: compute it with "
            "`mergequest statistics`, and name its file under the member's `statistics:`"
        )
    return Weighing(material, recipe)


def _norm(parts: Mapping[str, Tensor]) -> float:
    """‖·‖ of all together, summed in float64."""
    return float(sum(float(part.double().square().sum()) for part in parts.values()) ** 0.5)
