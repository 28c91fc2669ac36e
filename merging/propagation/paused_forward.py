"""Forward passes that stand still at chosen layers: every layer runs once, and only what is alive there is kept."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from threading import Semaphore, Thread
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from merging.errors import MethodError


@dataclass(frozen=True)
class HookPoint:
    """Where a tensor passes: into or out of a module that runs once.

    Args:
        path: The module's name in the model.
        output: Whether it comes out of the module.
        leaf: Which leaf of (args, kwargs), or of the output.
    """

    path: str
    output: bool
    leaf: int


@dataclass
class Stop:
    """What is seen where a pass stands still.

    Args:
        input: What goes into the layer [N, …, in].
        kept: The tensors that passed the places to be watched, until they are taken.
    """

    input: Tensor
    kept: dict[HookPoint, Tensor]


class Stream:
    """A model's forward passes over some batches, all led from one stop to the next.

    Each pass is made in a thread of its own, since only a thread can stand still in the midst of a model's code;
    one runs at a time, so that results depend on no timing.

    Args:
        model: The model; its parameters may be overwritten whenever all passes stand still.
        runs: Makes one batch's pass each.
        stops: Paths of the layers to stop at, each before it runs.
        places: What to keep on the way.
    """

    def __init__(
        self, model: nn.Module, runs: Sequence[Callable[[], object]], stops: Sequence[str], places: Sequence[HookPoint]
    ) -> None:
        self._walks = [_Walk(run) for run in runs]
        self._current = _Walk(_nothing)
        self._handles = []
        for place in places:
            module = model.get_submodule(place.path)
            watch = self._watch(place)
            self._handles.append(
                module.register_forward_hook(lambda _m, _a, _k, output, watch=watch: watch(output), with_kwargs=True)
                if place.output
                else module.register_forward_pre_hook(lambda _m, *given, watch=watch: watch(given), with_kwargs=True)
            )
        # After the places, so that what passes at a stop is kept before the pass stands still there.
        self._handles += [model.get_submodule(path).register_forward_pre_hook(self._stop(path)) for path in stops]
        self._stops = iter(stops)

    def advance(self) -> Iterator[Stop]:
        """Leads each pass in turn to its next stop.

        Raises:
            MethodError: A pass ended, or came to another stop than to the next.
        """
        expected = next(self._stops)
        for walk in self._walks:
            self._current = walk
            path, value = walk.advance()
            if path != expected:
                raise MethodError(
                    f"a forward pass came to {repr(path) if path else 'its end'} where '{expected}' was expected: which "
                    "layers run depends on the examples, so that they cannot be merged one after another; use regmean"
                )
            yield Stop(value, walk.kept)

    def close(self) -> None:
        """Gives the rest of all passes up."""
        for handle in self._handles:
            handle.remove()
        for walk in self._walks:
            walk.end()

    def _stop(self, path: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda layer, args: self._current.pause(path, args[0])

    def _watch(self, place: HookPoint) -> Callable[[Any], None]:
        def keep(values: Any) -> None:
            self._current.kept[place] = tree_flatten(values)[0][place.leaf]

        return keep


class _Ended(BaseException):
    """Unwinds a pass that nobody leads on; no model's code catches it."""


@dataclass
class _Walk:
    """One pass, in a thread that starts with the first step."""

    run: Callable[[], object]
    kept: dict[HookPoint, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._go, self._stands = Semaphore(0), Semaphore(0)
        self._seen = "", torch.empty(0)
        self._error: BaseException | None = None
        self._ending = False
        self._thread = Thread(target=self._walk, daemon=True)

    def advance(self) -> tuple[str, Tensor]:
        """Goes to the next stop; returns the layer's path and input there, an empty path at the end."""
        self._seen = "", torch.empty(0)
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._go.release()
        self._stands.acquire()
        if self._error is not None:
            raise self._error
        return self._seen

    def pause(self, path: str, value: Tensor) -> None:
        """Called in the pass's own thread: stands still."""
        self._seen = path, value
        self._stands.release()
        self._go.acquire()
        if self._ending:
            raise _Ended

    def end(self) -> None:
        """Gives the rest of the pass up."""
        self._ending = True
        if self._thread.ident is not None:
            self._go.release()
            self._thread.join()
        self._seen = "", torch.empty(0)
        self.kept.clear()

    def _walk(self) -> None:
        try:
            with torch.no_grad():
                self.run()
        except _Ended:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self._stands.release()


def _nothing() -> None:
    """The pass that runs before any does."""
