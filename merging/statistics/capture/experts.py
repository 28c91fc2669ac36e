"""Joined experts, one parameter [E, …] of many matrices: which rows reach which, seen where they are multiplied.

Whether a matrix is stored [out, in] or [in, out] is read off the product itself.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from merging.checkpoints.models.parameter_names import in_checkpoint
from merging.statistics.capture.hooks import differentiable
from merging.statistics.capture.linear_calls import UnaccountableRowsError
from merging.statistics.capture.modules import Logits
from merging.statistics.capture.patches import is_convolution
from merging.statistics.capture.verification import differs, probe_gradient
from merging.tasks.task import Batch

LINEAR = (F.linear, torch.nn.functional.linear)
PRODUCTS = (
    torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.__matmul__,
)  # fmt: skip


def joined_experts(model: nn.Module) -> dict[str, nn.Parameter]:
    """A model's own names of parameters that are several matrices, one behind the other."""
    return {
        f"{path}.{local}".removeprefix("."): parameter
        for path, module in model.named_modules()
        if not is_convolution(module) and not isinstance(module, nn.modules.conv._ConvNd)
        for local, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3 and min(parameter.shape) > 1
    }


@dataclass(frozen=True)
class Product:
    """Rows times an expert's matrix, or some of its outputs.

    Args:
        name: The parameter's.
        expert: Which expert.
        rows: What is multiplied [n, in].
        transposed: The parameter is stored [E, in, out].
        first: The first of the outputs.
        output: What comes out [n, outputs].
    """

    name: str
    expert: int
    rows: Tensor
    transposed: bool
    first: int
    output: Tensor


class _Watch(TorchFunctionMode):
    """Sees every product with a part of some parameters, while it is entered."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], see: Callable[[Product], Tensor | None]) -> None:
        super().__init__()
        self._parameters = list(parameters.items())
        self._see = see

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func in LINEAR or func in PRODUCTS:
            given = [*args, *(kwargs or {}).values()]
            if len(given) >= 2 and isinstance(given[0], Tensor) and isinstance(given[1], Tensor):
                weight = given[1].mT if func in LINEAR else given[1]  # [in, out], or [E, in, out]
                changed = self._look(given[0], weight, output)
                output = output if changed is None else changed
        return output

    def _look(self, value: Tensor, weight: Tensor, output: Tensor) -> Tensor | None:
        match = next(
            (
                (name, whole, weight.data_ptr() - whole.data_ptr())
                for name, whole in self._parameters
                if weight.device == whole.device
                and 0 <= weight.data_ptr() - whole.data_ptr() < whole.numel() * whole.element_size()
            ),
            None,
        )
        if match is None or weight.dim() not in (2, 3):
            return None
        name, whole, offset = match
        experts, rows, columns = whole.shape
        inputs, outputs = weight.stride()[-2:]
        # the stored matrix is [rows, columns] with strides (columns, 1)
        transposed = (inputs, outputs) == (columns, 1)
        if not transposed and (inputs, outputs) != (1, columns):
            return None
        if weight.shape[-2] != (rows if transposed else columns):
            return None
        expert, inside = divmod(offset // whole.element_size(), rows * columns)
        first = inside if transposed else inside // columns
        if weight.dim() == 3:
            if len(weight) != experts or expert or value.dim() != 3:
                return None
            parts = [
                Product(name, number, value[number], transposed, first, output[number]) for number in range(experts)
            ]
            for part in parts:
                self._see(part)
            return None
        rows_in = value.reshape(-1, value.shape[-1])
        return self._see(Product(name, expert, rows_in, transposed, first, output))


@contextmanager
def eager_experts(model: nn.Module) -> Iterator[None]:
    """Within it, transformers runs experts one by one, and not all in one kernel."""
    configs = {id(c): c for module in model.modules() if (c := getattr(module, "config", None)) is not None}
    changed = [
        (config, config._experts_implementation)
        for config in configs.values()
        if getattr(config, "_experts_implementation", None) not in (None, "eager")
    ]
    for config, _ in changed:
        config._experts_implementation = "eager"
    try:
        yield
    finally:
        for config, before in changed:
            config._experts_implementation = before


class ExpertRows:
    """What reaches each expert of a model, at real tokens.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.parameters = joined_experts(model)
        self.transposed: dict[str, bool] = {}
        self.batch: Batch | None = None
        owners = {name.rpartition(".")[0] for name in self.parameters}
        self._handles: list[Any] = []
        for path in sorted(owners):
            module = model.get_submodule(path)
            self._handles += [
                module.register_forward_pre_hook(self._without_padding, with_kwargs=True),
                module.register_forward_hook(self._with_padding),
            ]
        self._kept: list[tuple[Tensor, int] | None] = []

    @contextmanager
    def watching(self, add: Callable[[str, int, Tensor], None]) -> Iterator[None]:
        """Within it, products are seen.

        Args:
            add: Told a parameter's name, an expert, and the rows that reach it.
        """

        def see(product: Product) -> None:
            if (
                product.name in self.parameters and product.first == 0
            ):  # gate and up of one parameter read the same rows
                rows = product.rows.detach()
                add(product.name, product.expert, rows[rows.any(1)])

        if not self.parameters:
            yield
            return
        with eager_experts(self._model), _Watch(self.parameters, see):
            yield

    def verify(self, logits: Logits, batch: Batch) -> None:
        """Leaves out the parameters whose gradient is not what the products seen make it: they are read elsewhere, too."""
        if not self.parameters:
            return
        sketches = {name: torch.zeros(0) for name in self.parameters}
        vectors: dict[int, Tensor] = {}

        def see(product: Product) -> Tensor | None:
            whole = self.parameters[product.name]
            self.transposed.setdefault(product.name, product.transposed)
            if product.transposed != self.transposed[product.name]:
                sketches.pop(product.name, None)
            inputs = product.rows.shape[1]
            if inputs not in vectors:
                drawn = torch.randn(inputs, generator=torch.Generator().manual_seed(inputs), dtype=torch.float64)
                vectors[inputs] = drawn.to(product.rows)
            seen = product.rows.detach() @ vectors[inputs]
            outputs = whole.shape[2 if product.transposed else 1]

            def backward(gradient: Tensor) -> None:
                if product.name not in sketches:
                    return
                if not len(sketches[product.name]):
                    sketches[product.name] = gradient.new_zeros(len(whole), outputs)
                rows = gradient.reshape(-1, gradient.shape[-1])
                stop = product.first + rows.shape[1]
                sketches[product.name][product.expert, product.first : stop] += seen @ rows

            if not product.output.requires_grad:
                return None
            product.output.register_hook(backward)  # type: ignore[no-untyped-call]
            return product.output.clone()

        with differentiable(self._model, parameters=True), eager_experts(self._model), _Watch(self.parameters, see):
            self.batch = batch
            output = logits(self._model, batch)
        wanted = list(self.parameters.values())
        gradients = torch.autograd.grad(output, wanted, probe_gradient(output), allow_unused=True)
        for (name, whole), gradient in zip(list(self.parameters.items()), gradients, strict=True):
            vector = vectors.get(whole.shape[1 if self.transposed.get(name) else 2])
            if gradient is None or vector is None or name not in sketches or not len(sketches[name]):
                del self.parameters[name]
                continue
            true = vector @ gradient if self.transposed[name] else gradient @ vector
            if differs(sketches[name], true):
                del self.parameters[name]

    def close(self) -> None:
        """Leaves the model as it was."""
        for handle in self._handles:
            handle.remove()

    def _without_padding(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Takes the rows of padding out of what experts are given, where they have a row for each position."""
        mask = None if self.batch is None else self.batch.mask
        if mask is None or bool(mask.all()):
            self._kept.append(None)
            return None
        given = [*args, *kwargs.values()]
        size = _token_rows(module, given, mask.numel())
        if not size:
            shapes = [list(value.shape) for value in given if isinstance(value, Tensor)]
            raise UnaccountableRowsError(
                f"the experts of {type(module).__name__} are given {shapes} for {list(mask.shape)} tokens, some of them "
                "padding, so that their real rows cannot be told: set the statistic's batch_size to 1"
            )
        real = mask.reshape(-1).bool().repeat(size // mask.numel())
        self._kept.append((real, size))

        def cut(value: Any) -> Any:
            return value[real] if isinstance(value, Tensor) and value.shape[:1] == (size,) else value

        return tuple(map(cut, args)), {name: cut(value) for name, value in kwargs.items()}

    def _with_padding(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Puts rows of zeros back in their place."""
        kept = self._kept.pop()
        if kept is None or not isinstance(output, Tensor):
            return None
        real, size = kept
        whole = output.new_zeros(size, *output.shape[1:])
        whole[real] = output
        return whole


def _token_rows(module: nn.Module, given: list[Any], tokens: int) -> int:
    """How many rows experts are given where these are the tokens in their order; 0 where nobody can say.

    They are where indices of experts stand beside them, row by row, or where every expert is given all tokens.
    """
    if not given or not all(isinstance(value, Tensor) for value in given) or given[0].dim() != 2:
        return 0
    size = len(given[0])
    routed = any(len(value) == size and not value.is_floating_point() for value in given[1:] if value.dim() > 1)
    experts = {len(value) for value in module.parameters(recurse=False) if value.dim() == 3}
    everything = len(given) == 1 and size in {count * tokens for count in experts}
    return size if (routed and size == tokens) or everything else 0


@dataclass
class StoredExpert:
    """A parameter's matrices as a checkpoint stores them.

    Args:
        experts: Name in the checkpoint → its expert, or None where it holds all of them.
        transposed: Those that are stored [in, out].
    """

    experts: dict[str, int | None] = field(default_factory=dict)
    transposed: set[str] = field(default_factory=set)


def stored_experts(model: nn.Module, name: str, transposed: bool) -> StoredExpert:
    """How a checkpoint stores a parameter of experts, found by marking them.

    Args:
        model: The model.
        name: The parameter's own name.
        transposed: It is [E, in, out] in the model.

    Returns:
        What could be told; tensors that hold parts of several experts or only some inputs are not there.
    """
    whole = model.get_parameter(name)
    shape, side = whole.shape, 1 if transposed else 2
    experts = torch.arange(shape[0], dtype=torch.float32)[:, None, None].expand(shape).contiguous()
    view = [1, 1, 1]
    view[side] = shape[side]
    inputs = torch.arange(shape[side], dtype=torch.float32).view(view).expand(shape).contiguous()
    marks, places = in_checkpoint(model, {name: experts}), in_checkpoint(model, {name: inputs})
    stored = StoredExpert()
    for key, mark in marks.items():
        place, count = places[key], shape[side]
        expected = torch.arange(count, dtype=torch.float32)
        if place.shape[-1:] == (count,) and torch.equal(place, expected.expand(place.shape)):
            turned = False
        elif place.dim() > 1 and place.shape[-2] == count and torch.equal(place, expected[:, None].expand(place.shape)):
            turned = True
        else:
            continue
        if mark.dim() == 2 and bool((mark == mark[0, 0]).all()):
            stored.experts[key] = int(mark[0, 0])
        elif mark.shape[:1] == shape[:1] and mark.dim() == 3 and torch.equal(mark[:, 0, 0], experts[:, 0, 0]):
            stored.experts[key] = None
        else:
            continue
        if turned:
            stored.transposed.add(key)
    return stored
