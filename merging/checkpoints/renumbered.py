"""A checkpoint whose embeddings have the rows of a merge's tokens, formed from its own as they are read."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from merging.checkpoints.checkpoint import Checkpoint
from merging.checkpoints.formats import vocab_size
from merging.checkpoints.formats.safetensors_file import TensorInfo
from merging.checkpoints.formats.tokenizer_json import Tokens
from merging.checkpoints.view import View


@dataclass(frozen=True)
class TokenRows:
    """Where the rows of a merged embedding lie in a checkpoint's own.

    Args:
        dim: The dimension that counts tokens.
        index: Of every token of the merge the row in the checkpoint, −1 where it has none.
        missing: Gives the tensor, in the merge's shape, whose rows stand in for those.
    """

    dim: int
    index: Tensor
    missing: Callable[[], Tensor]

    def apply(self, value: Tensor) -> Tensor:
        """The checkpoint's tensor with the merge's rows, in its own dtype."""
        picked = value.index_select(self.dim, self.index.clamp(min=0))
        absent = (self.index < 0).nonzero()[:, 0]
        if len(absent):
            picked.index_copy_(self.dim, absent, self.missing().index_select(self.dim, absent).to(picked.dtype))
        return picked


@dataclass(frozen=True)
class Renumbered(View):
    """A checkpoint whose embeddings have the merge's rows.

    Args:
        rows: Name → where its rows lie.
        moves_tokens: Whether a token of its own tokenizer has another row in the merge, or none.
    """

    rows: Mapping[str, TokenRows]
    moves_tokens: bool

    def read(self, name: str) -> Tensor:
        """A tensor on the CPU, with the merge's rows."""
        value = super().read(name)
        return self.rows[name].apply(value) if name in self.rows else value

    def factors(self, name: str) -> tuple[Tensor, Tensor] | None:
        """The source's, but for tensors that get other rows."""
        return None if name in self.rows else super().factors(name)

    @property
    def is_mapped(self) -> bool:
        """No: embeddings are formed when they are read."""
        return False

    def advise(self, name: str, advice: int, start: int = 0, stop: int | None = None) -> None:
        """Tells the system about the use of bytes of a tensor that is as it is stored."""


@dataclass(frozen=True)
class Stored:
    """Reads a tensor of a checkpoint."""

    checkpoint: Checkpoint
    name: str

    def __call__(self) -> Tensor:
        """The tensor, in its stored dtype."""
        return self.checkpoint.read(self.name)


@dataclass(frozen=True)
class Mean:
    """Reads the mean of the members that have a row that the base lacks; 0 where none has it.

    Args:
        shape: Of the merge's tensor.
        dim: The dimension that counts tokens.
        own: The base's own rows, as in `TokenRows.index`.
        parts: Each member's checkpoint, its name of the tensor, and its rows.
    """

    shape: tuple[int, ...]
    dim: int
    own: Tensor
    parts: Sequence[tuple[Checkpoint, str, Tensor]]

    def __call__(self) -> Tensor:
        """The tensor, float32."""
        total, counts = torch.zeros(self.shape), torch.zeros(len(self.own))
        for checkpoint, name, index in self.parts:
            there = ((self.own < 0) & (index >= 0)).nonzero()[:, 0]
            if len(there):
                total.index_add_(self.dim, there, checkpoint.read(name).index_select(self.dim, index[there]).float())
                counts[there] += 1
        return total / counts.clamp(min=1).reshape([-1 if d == self.dim else 1 for d in range(len(self.shape))])


def resized(shape: Sequence[int], dim: int, size: int) -> tuple[int, ...]:
    """A shape with another extent of one dimension."""
    return tuple(size if d == dim else extent for d, extent in enumerate(shape))


def renumbered(
    checkpoint: Checkpoint, rows: Mapping[str, TokenRows], tokens: Tokens | None, *, resize: bool
) -> Renumbered:
    """A checkpoint with these rows.

    Args:
        checkpoint: As it is stored.
        rows: Its name of a tensor → where that one's rows lie.
        tokens: Its tokens; None where rows are matched by their place.
        resize: Whether its configuration gets the number of rows.
    """
    moves = False
    tensors = dict(checkpoint.tensors)
    for name, token_rows in rows.items():
        info = tensors[name]
        places = torch.tensor(sorted(tokens.ids.values()) if tokens is not None else range(info.shape[token_rows.dim]))
        within = places[places < len(token_rows.index)]
        moves = moves or len(within) < len(places) or not torch.equal(token_rows.index[within], within)
        shape = resized(info.shape, token_rows.dim, len(token_rows.index))
        tensors[name] = TensorInfo(name, info.dtype, shape, "", 0, math.prod(shape) * info.dtype.itemsize)
    config = dict(checkpoint.config)
    if resize and rows:
        config = vocab_size.replaced(config, max(len(token_rows.index) for token_rows in rows.values()))
    names = {name: name for name in checkpoint.tensors}
    return Renumbered(checkpoint.path, config, tensors, {}, checkpoint, names, dict(rows), moves)
