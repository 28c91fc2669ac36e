"""Merges of task vectors whose entries don't know of one another: θ_0 + f(τ_1 … τ_T), block by block."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from merging.kernels import cpu
from merging.kernels.blockwise import Scratch, cut, difference, flat, step_of, widened
from merging.methods.checks import check_weights, chosen, target
from merging.methods.method import Parameter, Prepared, Weight
from merging.recipe import Value

Block = Callable[[Weight, int, Tensor], Tensor]
"""(weight, flat index of the first entry in the whole weight, task vectors [T, n] float32, to be overwritten freely) →
what is added to the base [n]."""


class Deltas(Prepared):
    """Base and members as they are stored; subclasses say in `plan` what becomes of a block of task vectors.

    Args:
        weights: The weights to merge.
    """

    def __init__(self, weights: Sequence[Weight]) -> None:
        self.members = check_weights(weights)
        self.weights = tuple(weights)
        self.scratch = Scratch()

    @abstractmethod
    def plan(self, members: Sequence[str], factors: Sequence[float], parameters: Mapping[str, Value]) -> Block:
        """A candidate's arithmetic on one block; rows of task vectors are in the order of `members`."""

    def rule(
        self, weight: Weight, members: Sequence[str], factors: Sequence[float], parameters: Mapping[str, Value]
    ) -> cpu.Rule | cpu.Masks | None:
        """The same arithmetic on a whole weight, as compiled loops have it; None where they have not."""
        return None

    @torch.no_grad()
    def merge(self, scaling: Mapping[str, float], parameters: Mapping[str, Value], out: Mapping[str, Tensor]) -> None:
        """One pass over base and members, with all members' task vectors of a block in the cache at once."""
        members = chosen(scaling, self.members)
        factors = [scaling[member] for member in members]
        block = self.plan(members, factors, parameters)
        for weight in self.weights:
            base = weight.base.reshape(-1)
            values = [weight.members[member].reshape(-1) for member in members]
            with flat(target(out, weight)) as destination:
                if cpu.fits(destination, base, *values):
                    rule = self.rule(weight, members, factors, parameters)
                    if rule is not None and cpu.combine(base, values, destination, rule):
                        continue
                start = weight.start
                step = step_of(base.device, rows=len(members))
                for piece, before, *after in cut((destination, base, *values), step):
                    wide = widened(before, self.scratch)
                    deltas = self.scratch.take("deltas", len(members), before.numel(), device=base.device)
                    for row, value in zip(deltas, after, strict=True):
                        difference(value, wide, row)
                    moved = block(weight, start, deltas)
                    if piece.dtype == torch.float32:
                        torch.add(moved, wide, out=piece)
                    else:
                        piece.copy_(moved.add_(wide))
                    start += before.numel()


AGREE = Parameter(
    "all",
    "add up all entries, or those with the elected sign (TIES), or take the mean of these",
    choices=("all", "elected", "elected_mean"),
    search=False,
)
OF_AGREE = {"all": "all", "elected": "sum", "elected_mean": "mean"}
"""What the compiled loops, and `elected`, call the choices of `AGREE`."""
LAMBDA = Parameter(1.0, "scale of the merged task vector", search=False)
LARGEST = torch.finfo(torch.float32).max
"""Times itself, and times any number but 0, it is as good as infinite, and 0 times it is 0."""


def task_vectors(weight: Weight, members: Sequence[str], scratch: Scratch) -> Iterator[tuple[int, Tensor]]:
    """A weight's task vectors [T, n] float32 block by block, in one buffer, each with the index of its first entry there."""
    values = [weight.members[member].reshape(-1) for member in members]
    start = 0
    for before, *after in cut((weight.base.reshape(-1), *values), step_of(weight.base.device, rows=4 * len(members))):
        wide = widened(before, scratch)
        deltas = scratch.take("deltas", len(members), before.numel(), device=before.device)
        for row, value in zip(deltas, after, strict=True):
            difference(value, wide, row)
        yield start, deltas
        start += before.numel()


def total(deltas: Tensor, factors: Tensor, scratch: Scratch) -> Tensor:
    """Σ α_t τ_t over the rows of a block [T, n]."""
    row = scratch.take("total", deltas.shape[1], device=deltas.device)
    return torch.mv(deltas.t(), factors, out=row)


def elected(deltas: Tensor, factors: Sequence[float], disjoint: str, scratch: Scratch) -> Tensor:
    """Merges the entries that agree with the elected sign (TIES, Yadav et al. 2023, steps 2 and 3).

    The sign of an entry is that of Σ α_t τ_t; members agree whose α_t τ_t is not 0 and has that sign.

    Args:
        deltas: Trimmed task vectors [T, n]; overwritten.
        factors: α_t; negative ones turn their task vector round.
        disjoint: `mean` gives Σ α_t τ_t / Σ |α_t| over those that agree, `sum` the numerator alone.
        scratch: For rows.
    """
    device = deltas.device
    largest = max(map(abs, factors)) or 1.0
    # Equal factors are exactly 1 here, so that opposite task vectors cancel to 0 and not to the sign of a
    # rounding error.
    sizes = torch.tensor([abs(factor) / largest for factor in factors], device=device)
    if min(factors) < 0:
        deltas.mul_(torch.tensor([1.0 if factor >= 0 else -1.0 for factor in factors], device=device)[:, None])
    # 0 where the sum is, else so large a number of its sign that no entry with that sign is cut off
    limit = total(deltas, sizes, scratch).mul_(LARGEST).mul_(LARGEST)
    low, high = (scratch.take(name, deltas.shape[1], device=device) for name in ("low", "high"))
    torch.clamp(deltas, torch.clamp(limit, max=0, out=low), torch.clamp(limit, min=0, out=high), out=deltas)
    row = scratch.take("agreeing", deltas.shape[1], device=device)
    agreeing = torch.mv(deltas.t(), sizes, out=row)
    if disjoint == "sum":
        return agreeing.mul_(largest)
    count = torch.mv(deltas.sign_().t(), sizes, out=low).abs_()
    return agreeing.div_(count.clamp_(min=torch.finfo(torch.float32).tiny))


def combined(deltas: Tensor, factors: Sequence[float], entries: str, scratch: Scratch) -> Tensor:
    """Σ α_t τ_t over all entries of a block, or over those that have the elected sign.

    Args:
        deltas: Task vectors [T, n]; overwritten.
        factors: α_t.
        entries: `all`, `elected` or `elected_mean`.
        scratch: For rows.
    """
    if entries != "all":
        return elected(deltas, factors, OF_AGREE[entries], scratch)
    return total(deltas, torch.tensor(list(factors), device=deltas.device), scratch)
