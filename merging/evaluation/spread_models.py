"""A live model's layers spread over several devices, each with the merged weights that it computes with."""

from collections.abc import Collection, Mapping, MutableMapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn

from merging.errors import PoolError
from merging.evaluation.shared_weights import SharedWeights


class Spread:
    """Devices that live models are spread over, layer by layer in the order in which they run.

    Args:
        devices: At least two; one may be named more than once.

    Raises:
        PoolError: accelerate is not installed.
    """

    def __init__(self, devices: Sequence[torch.device]) -> None:
        try:
            import accelerate  # noqa: F401
        except ImportError as error:
            raise PoolError(
                f"a model over {len(devices)} GPUs needs accelerate: pip install 'mergequest[accelerate]' on every node, or "
                "set resources.gpus: 1"
            ) from error
        self._devices = devices
        self._homes: dict[str, int] = {}
        """Weight → which of the devices it lies on."""

    def place(self, model: nn.Module, shared: SharedWeights, out: MutableMapping[str, Tensor]) -> None:
        """Moves a model's layers, and the weights of `out` that they compute with, and has inputs follow.

        A weight that an earlier model brought to its device stays there.

        Args:
            model: The model, whose merged weights are those of `out`.
            shared: How it holds them.
            out: The merged weights by the base's name.

        Raises:
            PoolError: Some weights are copied into the model after every merge.
        """
        from accelerate.hooks import AlignDevicesHook, add_hook_to_module

        if shared.copies:
            raise PoolError(
                "transformers holds some weights of this model in another order than the checkpoint, so that it cannot be "
                "spread over several GPUs: set resources.gpus: 1"
            )
        settled = {_start(out[name]): home for name, home in self._homes.items()}
        places = dict(settled)
        blocks = blocks_of(model)
        for block, number in zip(blocks, shares([_nbytes(block) for block in blocks], len(self._devices)), strict=True):
            known = [places[_start(value)] for value in _tensors(block) if _start(value) in places]
            place = known[0] if known else number  # tied weights are one
            for value in _tensors(block):
                places.setdefault(_start(value), place)
            add_hook_to_module(block, AlignDevicesHook(execution_device=self._devices[place], place_submodules=False))
        self._homes |= {name: places[_start(value)] for name, value in out.items() if _start(value) in places}
        self._move([*model.parameters(), *model.buffers(), *out.values()], places, settled)
        first = next(model.parameters()).device
        add_hook_to_module(model, AlignDevicesHook(execution_device=first, io_same_device=True))

    def parts(self, out: MutableMapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """The weights that lie with each of the devices, once models are placed; those of no model with the first."""
        by_device: list[dict[str, Tensor]] = [{} for _ in self._devices]
        for name, value in out.items():
            if name not in self._homes:
                out[name] = value.to(self._devices[0])
            by_device[self._homes.get(name, 0)][name] = out[name]
        return by_device

    def _move(self, values: Sequence[Tensor], places: Mapping[int, int], settled: Collection[int]) -> None:
        """Brings memory to its device, and has everything that views it view it there."""
        memories: dict[int, Tensor] = {}
        for value in values:
            start = _start(value)
            if start in settled or start not in places:
                continue
            if start not in memories:
                whole = torch.empty(0, dtype=value.dtype, device=value.device).set_(value.untyped_storage())
                memories[start] = whole.to(self._devices[places[start]], copy=True)
        views = [(value, memories[_start(value)]) for value in values if _start(value) in memories]
        for value, memory in views:
            value.data = memory.as_strided(value.shape, value.stride(), value.storage_offset())


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The parts of a model that stay whole, in their order: layers, as transformers names them, and what lies beside these."""
    whole = set(getattr(model, "_no_split_modules", None) or ())
    blocks: list[nn.Module] = []

    def walk(module: nn.Module) -> None:
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if type(module).__name__ in whole or own:
            blocks.append(module)
            return
        for child in module.children():
            walk(child)

    walk(model)
    return blocks


def shares(sizes: Sequence[int], count: int) -> list[int]:
    """Which of `count` equal shares each of these sizes falls into, by its middle, one after another."""
    total = max(sum(sizes), 1)
    ends = list(accumulate(sizes))
    return [min(int((end - size / 2) * count / total), count - 1) for size, end in zip(sizes, ends, strict=True)]


def _tensors(module: nn.Module) -> list[Tensor]:
    return [value for value in (*module.parameters(), *module.buffers()) if value.numel()]


def _nbytes(module: nn.Module) -> int:
    return sum(value.nbytes for value in _tensors(module))


def _start(value: Tensor) -> int:
    """Which memory a tensor views."""
    return int(value.untyped_storage().data_ptr())
