"""What members say of their own inputs: run once and kept on disk, or live."""

from typing import Any

import numpy as np
import torch
from safetensors.torch import save as serialize
from torch import Tensor, nn

from merging.checkpoints.formats.safetensors_file import SafetensorsFile
from merging.io import addresses, atomic, hashing, storage
from merging.optimization.divergence import target_rows, wanted_outputs
from merging.optimization.schedule import Places, lengths_of
from merging.tasks.likelihood import Likelihood
from merging.tasks.task import Batch, Task

AT_ONCE = 32
"""Examples that a teacher runs on at once."""


class Teacher:
    """A member that says what its task's outputs should be.

    Args:
        task: The task, bound to the member's head.
        checkpoint: Fingerprint of the member.
        size: Train examples that it is asked of.
        device: Where it runs.
        temperature: Of its distribution.
        top_k: See `wanted_outputs`.
        whole: Whether every token of a causal language model's examples counts.
        cache: Directory that its outputs are kept in; None for a teacher that runs whenever it is asked.
        autocast: Whether it runs in bfloat16.
    """

    def __init__(
        self,
        task: Task,
        checkpoint: str,
        size: int,
        device: torch.device,
        *,
        temperature: float,
        top_k: int | None,
        whole: bool,
        cache: str | None,
        autocast: bool,
    ) -> None:
        self._task, self._size, self._device = task, size, device
        self.temperature, self._top_k, self._whole, self._autocast = temperature, top_k, whole, autocast
        self._path = ""
        self._model: nn.Module | None = None
        self._kept: tuple[dict[str, Tensor], Tensor] | None = None
        self._likelihood: Likelihood | None = None
        if cache is None:
            self._model = task.load_model().requires_grad_(False).to(device).eval()
            self._likelihood = task.likelihood(self._model)
            return
        key = [checkpoint, task.data_fingerprint("train"), size, temperature, top_k, whole, autocast, task.kind]
        self._path = addresses.join(cache, f"teacher.{task.name}.{hashing.fingerprint(key)}.safetensors")

    @property
    def likelihood(self) -> Likelihood:
        """What its logits are parameters of."""
        if self._likelihood is None:
            self._open()
        assert self._likelihood is not None
        return self._likelihood

    def batch(self, places: Places) -> Batch:
        """Examples as the model reads them, with the positions that count as targets."""
        batch = self._task.batch("train", places)
        return self._task.with_all_targets(batch) if self._whole else batch

    def wanted(self, places: Places, batch: Batch, hidden: bool = False) -> tuple[dict[str, Tensor], Tensor | None]:
        """Its outputs at the targets of examples [rows, …], and its last hidden states where they are asked for."""
        if self._model is None:
            return {name: value.to(self._device) for name, value in self._stored(places).items()}, None
        with torch.no_grad():
            states, logits = hidden_and_logits(self._task, self._model, batch, hidden)
        rows, _ = target_rows(logits.float(), batch)
        return wanted_outputs(rows, self.likelihood, self.temperature, self._top_k), states

    def run(self) -> None:
        """Runs over all examples, longest together so that they need little padding, and keeps the outputs."""
        if not self._path or storage.exists(self._path):
            return
        model = self._task.load_model().requires_grad_(False).to(self._device).eval()
        likelihood = self._task.likelihood(model)
        places = np.arange(self._size)
        order = places[np.argsort(lengths_of(self._task, places), kind="stable")]
        outputs: list[dict[str, Tensor]] = [{}] * self._size
        autocast = torch.autocast(self._device.type, torch.bfloat16, enabled=self._autocast)
        for first in range(0, self._size, AT_ONCE):
            chosen = order[first : first + AT_ONCE]
            batch = self.batch(chosen).to(self._device)
            with torch.no_grad(), autocast:
                logits = self._task.logits(model, batch)
            rows, counts = target_rows(logits.float(), batch)
            kept = wanted_outputs(rows, likelihood, self.temperature, self._top_k)
            for name, value in kept.items():
                for place, own in zip(chosen, torch.split(value.cpu(), counts.tolist()), strict=True):
                    outputs[place] = {**outputs[place], name: own}
        tensors = {name: torch.cat([one[name] for one in outputs]) for name in outputs[0]}
        name = next(iter(outputs[0]))
        tensors["ends"] = torch.tensor([len(one[name]) for one in outputs]).cumsum(0)
        atomic.write_bytes(self._path, serialize(tensors, {"likelihood": likelihood}))

    def _open(self) -> None:
        self.run()
        file = SafetensorsFile.open(self._path)
        self._likelihood = file.metadata["likelihood"]  # type: ignore[assignment]
        kept = {name: file.read(name) for name in file.tensors}
        ends = kept.pop("ends")
        self._kept = kept, torch.cat([torch.zeros(1, dtype=ends.dtype), ends])

    def _stored(self, places: Places) -> dict[str, Tensor]:
        if self._kept is None:
            self._open()
        assert self._kept is not None
        kept, bounds = self._kept
        rows = torch.cat([torch.arange(int(bounds[place]), int(bounds[place + 1])) for place in places])
        return {name: value[rows] for name, value in kept.items()}


def hidden_and_logits(task: Task, model: nn.Module, batch: Batch, hidden: bool) -> tuple[Tensor | None, Tensor]:
    """A model's last hidden states [N, S, D], where they are asked for, and its logits, of one pass where that can be."""
    backbone = getattr(model, "base_model", None)
    if not hidden:
        return None, task.logits(model, batch)
    seen: list[Any] = []
    handle = (
        backbone.register_forward_hook(lambda _module, _args, output: seen.append(output))
        if isinstance(backbone, nn.Module) and backbone is not model
        else None
    )
    try:
        logits = task.logits(model, batch)
    finally:
        if handle is not None:
            handle.remove()
    states = getattr(seen[-1], "last_hidden_state", None) if seen else None
    return (states if states is not None else task.representation(model, batch)), logits
