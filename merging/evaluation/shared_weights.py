"""Live models whose weights are the merged ones: what a merge overwrites is what the model computes with."""

from collections.abc import Callable, Collection, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from merging.checkpoints.models.parameter_names import (
    Conversion,
    Packing,
    loading,
    packing,
    targets_of,
    tie_sources,
    tied_names,
)
from merging.checkpoints.pool import Member, Pool
from merging.errors import PoolError
from merging.tasks.task import Task

SHOWN = 4
"""Names that a message lists."""


@dataclass(frozen=True)
class _Packed:
    """Memory that holds a checkpoint's tensors and the model's parameters both.

    Args:
        size: Entries.
        sources: The base's name → where it begins, and its shape.
        targets: Where a parameter or buffer begins, and it.
    """

    size: int
    sources: Mapping[str, tuple[int, torch.Size]]
    targets: Sequence[tuple[int, Tensor]]

    def take_gradients(self) -> dict[str, Tensor]:
        """The sources' gradients, put together from the targets', which are cleared."""
        if all(value.grad is None for _, value in self.targets):
            return {}
        first = self.targets[0][1]
        total = torch.zeros(self.size, dtype=first.dtype, device=first.device)
        for start, value in self.targets:
            if value.grad is not None:
                total[start : start + value.numel()] = value.grad.reshape(-1)
                value.grad = None
        return {name: _part(total, start, shape) for name, (start, shape) in self.sources.items()}

    def addresses(self) -> dict[str, int]:
        """Where the sources lie."""
        start, value = self.targets[0]
        begin = value.data_ptr() - start * value.element_size()
        return {name: begin + start * value.element_size() for name, (start, _) in self.sources.items()}


@dataclass(frozen=True)
class SharedWeights:
    """How a live model holds the merged weights.

    Args:
        held: The base's names of the weights that the model computes with.
        dropped: Those that its class has no place for, and that transformers drops when it loads the checkpoint.
        copies: What must be done again after every merge, where weights change their order on the way into the model.
        plain: The base's names, and the parameters or buffers that are the merged weights themselves.
        packed: Memory in which other weights are parts of parameters, or parameters of weights.
    """

    held: Collection[str]
    dropped: Collection[str]
    copies: Sequence[Callable[[], None]]
    plain: Sequence[tuple[str, Tensor]]
    packed: Sequence[_Packed]

    def refresh(self) -> None:
        """Brings what cannot be shared up to date with the merged weights."""
        for copy in self.copies:
            copy()

    def check(self, out: Mapping[str, Tensor]) -> None:
        """Looks whether the model still holds the tensors of `out`, after other models were made to share them.

        Raises:
            PoolError: It does not.
        """
        places = {name: value.data_ptr() for name, value in self.plain}
        for packed in self.packed:
            places |= packed.addresses()
        if stale := sorted(
            name for name, place in places.items() if out[name].numel() and out[name].data_ptr() != place
        ):
            raise PoolError(
                f"the tasks' models hold {len(stale)} weights in different ways ({', '.join(stale[:SHOWN])}): measure them in "
                "campaigns of their own"
            )

    def track_gradients(self) -> None:
        """Makes gradients reach the merged weights, for `take_gradients`.

        Raises:
            PoolError: Some are copied into the model, so that none can.
        """
        self.require_no_copies()
        for value in (*(value for _, value in self.plain), *(value for p in self.packed for _, value in p.targets)):
            if isinstance(value, nn.Parameter):
                value.requires_grad_(True)

    def require_no_copies(self) -> None:
        """For whoever needs every weight in the model itself.

        Raises:
            PoolError: Some are copied into the model.
        """
        if self.copies:
            raise PoolError(
                "transformers holds some weights of this model in another order than the checkpoint, so that gradients and "
                "activations cannot be related to them: choose methods and starts that need neither"
            )

    def take_gradients(self) -> dict[str, Tensor]:
        """The gradients of the merged weights by the base's name; they are cleared. A weight that is not used has none."""
        gradients = {}
        for name, value in self.plain:
            if value.grad is not None:
                gradients[name] = value.grad
                value.grad = None
        for packed in self.packed:
            gradients |= packed.take_gradients()
        return gradients


def sharing_model(
    task: Task, pool: Pool, member: Member, out: MutableMapping[str, Tensor], dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, SharedWeights]:
    """A task's model on the weights of `out`, as `share_weights` makes it; of its checkpoint only the rest is read.

    Args:
        task: The task.
        pool: Whose weights are merged.
        member: The member whose head the task is evaluated with.
        out: The merged weights by the base's name; see `share_weights`.
        dtype: Of the model, but for what transformers keeps in float32.

    Raises:
        PoolError: Some weight of the model is neither merged nor in its checkpoint.
    """
    merged_names = frozenset(member.names[name] for name in pool.weights)
    model = task.load_skeleton(merged_names, dtype).requires_grad_(False)
    shared = share_weights(model, pool, member, out)
    merged = {value.untyped_storage().data_ptr() for value in out.values()}
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        is_rest = value.untyped_storage().data_ptr() not in merged and value.is_floating_point() and value.numel()
        if is_rest and not shared.copies and value[(0,) * value.ndim].isnan():
            raise PoolError(f"task '{task.name}': '{name}' of its model is NaN: copy the checkpoint {task.head} again")
    return model, shared


def share_weights(model: nn.Module, pool: Pool, member: Member, out: MutableMapping[str, Tensor]) -> SharedWeights:
    """Replaces a model's parameters and buffers by the tensors of `out`, so that a merge changes the model itself.

    Which tensor belongs where is what transformers' own rules say of the member's checkpoint. Where transformers joins several
    tensors into one parameter (experts), or splits one, `out` gets views of the memory that the parameter lies in, with the
    values that it had, and a tensor of the parameter's dtype where transformers keeps that in float32. A model may lack weights
    that the checkpoint has (a pooler that this task does not use).

    Args:
        model: A model of the member's checkpoint.
        pool: Whose weights are merged.
        member: The member that the checkpoint belongs to.
        out: The merged weights by the base's name; entries may be replaced by others of the same values.

    Raises:
        PoolError: Another model holds some of the weights in another way.
    """
    return _Sharing(model, pool, member, out).share()


class _Sharing:
    """The work of `share_weights`."""

    def __init__(self, model: nn.Module, pool: Pool, member: Member, out: MutableMapping[str, Tensor]) -> None:
        self._model, self._member, self._out = model, member, out
        self._base = {member.names[name]: name for name in pool.weights}
        self._new: dict[str, Tensor] = {}
        """The model's names → what is put there."""
        self._plain: dict[str, str] = {}
        """The model's names → the base's."""
        self._packed: list[tuple[int, dict[str, tuple[int, torch.Size]], dict[str, int]]] = []
        self._packings: dict[Any, Packing | None] = {}
        self._copies: list[Callable[[], None]] = []
        self._places: dict[str, list[tuple[nn.Module, str]]] = {}
        for prefix, module in model.named_modules(remove_duplicate=False):
            for local, value in (*module._parameters.items(), *module._buffers.items()):
                if value is not None:
                    self._places.setdefault(f"{prefix}.{local}" if prefix else local, []).append((module, local))

    def share(self) -> SharedWeights:
        """Does it."""
        tensors = {name: info.shape for name, info in self._member.checkpoint.tensors.items()}
        how = loading(self._model, tensors)
        held: set[str] = set()
        for conversion in how.conversions:
            if mine := {self._base[name] for name in conversion.sources if name in self._base}:
                held |= mine
                self._convert(conversion)
        heads = {conversion.target for conversion in how.conversions if conversion.sources[0] in self._member.head}
        self._tie(heads)
        self._install()
        values = {name: getattr(*self._places[name][0]) for name in self._new}
        packed = [
            _Packed(size, sources, [(start, values[name]) for name, start in targets.items()])
            for size, sources, targets in self._packed
        ]
        return SharedWeights(
            held,
            {self._base[name] for name in how.homeless if name in self._base},
            self._copies,
            [(base, values[name]) for name, base in self._plain.items()],
            packed,
        )

    def _convert(self, conversion: Conversion) -> None:
        """Shares what transformers joins or splits, by memory where that can be, else by a copy after every merge."""
        if conversion.apply is None:
            name = self._base[conversion.sources[0]]
            self._out[name] = self._out[name].to(getattr(*self._places[conversion.target][0]).dtype)
            self._new[conversion.target], self._plain[conversion.target] = self._out[name], name
            return
        if all(name in self._base for name in conversion.sources):
            shapes = [tuple(self._out[self._base[name]].shape) for name in conversion.sources]
            key = (conversion.kind, *shapes)
            if key not in self._packings:
                self._packings[key] = packing(conversion, shapes)
            if (packed := self._packings[key]) is not None:
                self._pack(conversion, packed)
                return
        dtype = next(iter(self._out.values())).dtype
        kept = {
            name: self._member.checkpoint.read(name).to(dtype) for name in conversion.sources if name not in self._base
        }

        def values() -> dict[str, Tensor]:
            assert conversion.apply is not None
            here = next(iter(self._out.values())).device
            return conversion.apply(
                [self._out[self._base[n]] if n in self._base else kept[n].to(here) for n in conversion.sources]
            )

        targets = {
            name: value.contiguous().to(getattr(*self._places[name][0]).dtype, copy=True)
            for name, value in values().items()
        }
        self._new |= targets

        def copy() -> None:
            for name, value in values().items():
                targets[name].copy_(value)

        self._copies.append(copy)

    def _pack(self, conversion: Conversion, packed: Packing) -> None:
        """Lays sources and targets into the same memory: that of an earlier model, if it did so too."""
        names = [self._base[name] for name in conversion.sources]
        memory = _memory([self._out[name] for name in names], packed)
        if memory is None:
            memory = self._out[names[0]].new_empty(packed.size)
            for name, start in zip(names, packed.sources, strict=True):
                part = _part(memory, start, self._out[name].shape)
                self._out[name] = part.copy_(self._out[name])
        made = targets_of(conversion, {n: self._out[self._base[n]].shape for n in conversion.sources})
        targets = {target: start for target, (start, _) in zip(made, packed.targets, strict=True)}
        self._new |= {target: _part(memory, start, made[target]) for target, start in targets.items()}
        sources = {n: (start, self._out[n].shape) for n, start in zip(names, packed.sources, strict=True)}
        self._packed.append((packed.size, sources, targets))

    def _tie(self, kept: Collection[str]) -> None:
        """Gives every other name of a merged weight the same tensor, unless it is kept for the task.

        Names of one weight are those of the same parameter, and those that the configuration ties: of these, transformers
        left apart what was stored twice and was not read here. Where several are merged, a name goes with the one that the
        configuration ties it to.
        """
        merged = list(self._new)
        sources, tied = tie_sources(self._model), tied_names(self._model)
        twins: dict[int, set[str]] = {}
        for name, places in self._places.items():
            twins.setdefault(id(getattr(*places[0])), set()).add(name)
        for name, places in self._places.items():
            same = tied.get(name, set()) | twins[id(getattr(*places[0]))]
            others = [other for other in merged if other in same]
            if others and name not in self._new and name not in kept:
                source = sources.get(name, "")
                self._new[name] = self._new[source if source in others else others[0]]

    def _install(self) -> None:
        """Puts the tensors into the model; one with several names is one parameter."""
        made: dict[int, nn.Parameter] = {}
        for name, tensor in self._new.items():
            old = getattr(*self._places[name][0])
            if old.shape != tensor.shape:
                raise PoolError(
                    f"'{name}' of {type(self._model).__name__} is {list(old.shape)}, and what is merged {list(tensor.shape)}"
                )
            if old.dtype != tensor.dtype:
                raise PoolError(
                    f"transformers keeps '{name}' of {type(self._model).__name__} in {old.dtype}, and it is made of weights in "
                    f"{tensor.dtype}: set `resources.dtype: float32`"
                )
            new = tensor
            if isinstance(old, nn.Parameter):
                new = made.setdefault(id(tensor), nn.Parameter(tensor, requires_grad=False))
            for module, local in self._places[name]:
                setattr(module, local, new)


def _part(memory: Tensor, start: int, shape: torch.Size) -> Tensor:
    return memory[start : start + shape.numel()].view(shape)


def _memory(tensors: Sequence[Tensor], packed: Packing) -> Tensor | None:
    """The memory that tensors are already parts of, as a packing wants them."""
    first = tensors[0]
    begin = first.storage_offset() - packed.sources[0]
    for tensor, start in zip(tensors, packed.sources, strict=True):
        same = tensor.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not same or not tensor.is_contiguous() or tensor.storage_offset() != begin + start:
            return None
    if begin < 0 or first.untyped_storage().nbytes() < (begin + packed.size) * first.element_size():
        return None
    return first.as_strided((packed.size,), (1,), begin)
