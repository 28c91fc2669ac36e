"""Forward passes that are made again for every stop, from the last finished block on: little is kept between stops."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from merging.propagation.paused_forward import HookPoint, Stop, Stream


class RepeatedPasses:
    """What `Stream` does, of one batch at a time: each stop's passes begin anew, and are given up there.

    Blocks (the modules of a model's outermost lists) all of whose stops have been passed do not run again: the last one's
    output stands for them, and is all that is kept of a batch. Where that changes the logits of the first batch, all blocks
    run every time.

    Args:
        model: The model; its parameters may be overwritten between stops, but for those of layers before the last one.
        runs: Makes one batch's pass each, and gives the logits.
        stops: Paths of the layers to stop at, each before it runs.
        places: For each stop, what to keep on the way to it.
    """

    def __init__(
        self,
        model: nn.Module,
        runs: Sequence[Callable[[], Tensor]],
        stops: Sequence[str],
        places: Sequence[Sequence[HookPoint]],
    ) -> None:
        self._model, self._runs = model, runs
        self._stops = iter(enumerate(zip(stops, places, strict=True)))
        self._blocks = _Blocks(model)
        self._blocks.release(runs[0], stops, places)

    def advance(self) -> Iterator[Stop]:
        """Leads each pass in turn to the next stop; see `Stream.advance`."""
        number, (stop, places) = next(self._stops)
        for batch, run in enumerate(self._runs):
            self._blocks.enter(number, batch)
            stream = Stream(self._model, [run], [stop], places)
            try:
                yield from stream.advance()
            finally:
                stream.close()

    def close(self) -> None:
        """Makes the model run as before."""
        self._blocks.close()


class _Blocks:
    """The modules of a model's outermost lists, which give the output that they gave before where they are finished."""

    def __init__(self, model: nn.Module) -> None:
        self._released: dict[tuple[str, int], int] = {}
        self._stop, self._batch = -1, 0
        self._kept: dict[tuple[str, int], tuple[int, Any]] = {}
        lists = [path for path, module in model.named_modules() if isinstance(module, nn.ModuleList)]
        outermost = [path for path in lists if not any(path.startswith(f"{other}.") for other in lists)]
        self._modules = {
            (path, place): module
            for path in outermost
            for place, module in enumerate(model.get_submodule(path).children())
        }
        self._own = {block: vars(module).get("forward") for block, module in self._modules.items()}
        for block, module in self._modules.items():
            module.forward = self._wrapped(block, module.forward)

    def close(self) -> None:
        """Gives the modules their own code back."""
        for block, module in self._modules.items():
            del module.forward
            if (own := self._own[block]) is not None:
                module.forward = own
        self._kept.clear()

    def enter(self, stop: int, batch: int) -> None:
        """What follows is a batch's pass to a stop."""
        self._stop, self._batch = stop, batch

    @torch.no_grad()
    def release(self, run: Callable[[], Tensor], stops: Sequence[str], places: Sequence[Sequence[HookPoint]]) -> None:
        """Finds out from which stop on each block is finished, and whether it can be left out then.

        Args:
            run: A pass.
            stops: Paths of the layers to stop at.
            places: For each stop, what is looked at on the way to it.
        """
        released = {}
        for block in self._modules:
            path = ".".join(map(str, block))
            needed = [
                number
                for number, (stop, own) in enumerate(zip(stops, places, strict=True))
                if any(f"{one}.".startswith(f"{path}.") for one in (stop, *(place.path for place in own)))
            ]
            released[block] = max(needed, default=-1) + 1
        for (path, place), first in released.items():  # a list's blocks are finished in their order
            released[path, place] = max(first, released.get((path, place - 1), 0))
        wanted = run()
        self.enter(0, -1)
        # One more block is finished each time: it runs, those before it do not; at last none does.
        alike = []
        for block in self._modules:
            self._released[block] = 0
            alike.append(torch.equal(run(), wanted))
        suited = all(alike) and torch.equal(run(), wanted)
        self._released, self._kept = released if suited else {}, {}

    def _wrapped(self, block: tuple[str, int], forward: Callable[..., Any]) -> Callable[..., Any]:
        path, place = block

        def run(*args: Any, **kwargs: Any) -> Any:
            last, kept = self._kept.get((path, self._batch), (-1, None))
            if place <= last:
                return tree_map(_copied, kept)  # a copy, since code may overwrite what it is given
            output = forward(*args, **kwargs)
            if self._released.get(block, self._stop + 1) <= self._stop:
                self._kept[path, self._batch] = place, tree_map(_copied, output)
            return output

        return run


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
