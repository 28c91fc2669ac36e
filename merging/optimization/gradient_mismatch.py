"""Gradient mismatch: what keeps a merged model from being the one that was trained on all tasks (Daheim et al. 2024, eq. 8)."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from merging.checkpoints.pool import Pool
from merging.errors import MethodError
from merging.evaluation.shared_weights import share_weights
from merging.mergers.material import Material
from merging.statistics.likelihood import IGNORED
from merging.tasks.task import Task


@dataclass(frozen=True)
class Mismatch:
    """How far the members' gradients at the merged weights are from those at their own.

    Args:
        total: ‖Σ_t α_t s_t [∇ℓ_t(θ) − ∇ℓ_t(θ_t)]‖ over the merged weights.
        members: Member → the norm of its own term.
    """

    total: float
    members: Mapping[str, float]


def gradient_mismatch(
    pool: Pool,
    tasks: Mapping[str, Task],
    weights: Mapping[str, Tensor],
    scaling: Mapping[str, float],
    *,
    counts: Mapping[str, int] | None = None,
    examples: int = 256,
    batch_size: int = 16,
) -> Mismatch:
    """The gradient mismatch itself, from unlabelled training examples.

    ℓ_t(θ) is the mean over member t's examples of −Σ_c p_t(c|x) log p_θ(c|x): the cross-entropy under the labels that the
    member itself predicts, in expectation. No label of the data is used, ∇ℓ_t(θ_t) is 0 exactly, and the Hessian of ℓ_t at
    θ_t is the exact Fisher, so that `quadratic_mismatch` is this to first order in θ − θ_t. For sequences, log p is summed
    over an example's target tokens.

    Args:
        pool: Base and members.
        tasks: Member → its task, bound to its own checkpoint.
        weights: The merged weights θ by the base's name, float32, all on the device to run on.
        scaling: α_t of every member that takes part.
        counts: s_t, the number of training examples of each member; 1 for all by default.
        examples: Training examples of each member to take the gradient over.
        batch_size: Examples a step.

    Raises:
        MethodError: A member has no task with examples, or its gradient is not finite.
    """
    device = next(iter(weights.values())).device
    here = dict(weights)
    total: dict[str, Tensor] = {}
    norms = {}
    for member, factor in scaling.items():
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
                wanted = task.logits(own, batch).float().softmax(-1)
            with torch.enable_grad():
                terms = -(wanted * log_softmax(task.logits(merged, batch).float(), -1)).sum(-1)
                (terms[batch.labels != IGNORED] if terms.dim() > 1 else terms).sum().backward()  # type: ignore[no-untyped-call]
        scale = factor * (counts or {}).get(member, 1) / stop
        parts = {name: gradient * scale for name, gradient in shared.take_gradients().items()}
        norms[member] = _norm(parts)
        if norms[member] != norms[member] or norms[member] == float("inf"):
            raise MethodError(
                f"{member}: its gradient at the merged weights is not finite: use smaller scaling factors"
            )
        for name, value in parts.items():
            total[name] = total[name] + value if name in total else value
    return Mismatch(_norm(total), norms)


def quadratic_mismatch(material: Material, merged: Callable[[str], Tensor], scaling: Mapping[str, float]) -> Mismatch:
    """The stand-in that costs no forward pass: ‖Σ_t α_t H_t (θ − θ_t)‖, H_t = s_t F_t with the diagonal Fisher.

    Weights without Fisher information (a member's task does not use them) take no part. s_t is 1 where no member's number of
    examples is known.

    Args:
        material: Pool and statistics.
        merged: Name → the merged weight θ, in the base's shape; read one by one.
        scaling: α_t of every member that takes part.

    Raises:
        MethodError: A member's Fisher information is missing.
    """
    require_fishers(material, scaling)
    fishers = material.statistics["fisher"]
    squares = dict.fromkeys(["", *scaling], 0.0)
    for name in material.pool.weights:
        theta: Any = None
        total: Any = 0.0
        for member, factor in scaling.items():
            own = material.pool.members[member].names[name]
            if own not in fishers[member].names:
                continue
            theta = merged(name).double().cpu() if theta is None else theta
            scale = factor * material.examples.get(member, 1)
            part = fishers[member].read(own).double() * (theta - material.pool.member_weight(member, name)) * scale
            squares[member] += float(part.square().sum())
            total = total + part
        squares[""] += float(torch.as_tensor(total).square().sum())
    return Mismatch(squares.pop("") ** 0.5, {member: square**0.5 for member, square in squares.items()})


def require_fishers(material: Material, members: Iterable[str]) -> None:
    """Looks whether `quadratic_mismatch` has what it needs.

    Raises:
        MethodError: A member's Fisher information is missing.
    """
    if missing := [member for member in members if member not in material.statistics.get("fisher", {})]:
        raise MethodError(
            f"the gradient mismatch needs the statistic 'fisher' of {', '.join(missing)}: compute it with "
            "`mergequest statistics`, and name its file under the member's `statistics:`"
        )


def _norm(parts: Mapping[str, Tensor]) -> float:
    """‖·‖ of all together, summed in float64."""
    return float(sum(float(part.double().square().sum()) for part in parts.values()) ** 0.5)
